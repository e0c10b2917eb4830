"""Attention over a sequence that devices share: how keys reach the queries that see them.

Every device has an equal part of the queries, keys and values. The operands of masks, scores and
dropout are those of the whole sequence, on every device. So a device cuts what belongs to any pair
of parts out of them, as an engine does for a tile, and only keys, values and their gradients move:

- "ring": the parts of keys go from rank to rank, each to the next, while the engine computes those
  that are here. Partial results are added by their LSEs. In the backward the gradients of keys go
  around with them, and arrive at home. A part of which no query here sees a key is passed on.
- "gather": all keys come at once. In the backward their gradients are summed at home.
- "halo": only the keys come that a window asks for, a number before and a number after one's own.
- "whole": all keys are here already, and their gradients are summed by the caller.

Sums over parts are in the dtype of accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...mesh import constant, varying
from ...shapes import Array, Bool
from ...tiles import intervals
from ...tiles.tile_map import EMPTY
from ...tracing.dependence import Kind
from ...tracing.split import Operand, along, cut, tile_slice
from .. import base, formula
from ..base import Shards
from ..problem import DROPOUT, Config, Gradients, Inputs
from . import nonfinite
from .operands import replaced


def forward(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, N, Hv]` and LSE `[B, T, N]` of this device's queries, over all keys."""
    shards = _of(config)
    B, T, N, _ = x.query.shape
    wide = base.accumulator(x.query.dtype)
    parts = [constant(x.query, (B, T, N, x.value.shape[-1]), wide)]
    parts += [constant(x.query, (B, T, N, 1), wide, c.first) for c in config.columns]
    sums = _Sums(
        jnp.concatenate(parts, -1),
        constant(x.query, (B, T, N), wide, -jnp.inf),
        constant(x.query, (), bool),
    )

    def add(sums: _Sums, here: _Part) -> _Sums:
        def seen() -> _Sums:
            return sums.added(config, *nonfinite.of_some_keys(here.config, here.x))

        return _if(here.active, seen, sums)

    if shards.schedule == "ring":

        def visit(sums: _Sums, keys: Any, rank: Any) -> _Sums:
            return add(sums, _of_rank(config, x, keys, rank))

        sums = _around(shards, (x.key, x.value), visit, sums)
    else:
        keys = _fetch(shards, x)((x.key, x.value))
        sums = add(sums, _fetched(config, x, keys))
    out = sums.out if config.columns else sums.out.astype(x.query.dtype)
    return nonfinite.decided(_local(config), _rows(config, x), out, sums.lse, sums.doubtful)


def backward(
    config: Config, groups: int, x: Inputs, out: Array, lse: Array, d_out: Array, d_lse: Array
) -> Gradients:
    """Cotangents of the inputs: of this device's queries and keys, and its part of the others'."""
    shards = _of(config)
    # XLA would send keys once for both passes, and hold those of all devices in between.
    x, out, lse = lax.optimization_barrier((x, out, lse))
    lse = jnp.where(_without_gradient(config, x) & (lse != -jnp.inf), jnp.nan, lse)
    wide = base.accumulator(x.query.dtype)
    which = config.learned

    def zeros(shape: tuple[int, ...]) -> Array:
        return constant(x.query, shape, wide)

    def shape_of(operand: Array) -> tuple[int, ...]:
        return (groups if operand.shape[0] == 1 else operand.shape[0], *operand.shape[1:])

    def gradients(here: _Part) -> Gradients:
        """Those of one part, in the dtype of sums; of operands, only those that learn."""

        def seen() -> Gradients:
            g = nonfinite.backward(here.config, groups, here.x, out, lse, d_out, d_lse)
            g = g._replace(score=tuple(g.score[n] for n in which))
            found: Gradients = jax.tree.map(lambda a: a.astype(wide), g)
            return found

        query, key, value = (zeros(a.shape) for a in (here.x.query, here.x.key, here.x.value))
        score = tuple(zeros(shape_of(here.x.score[n])) for n in which)
        none = Gradients(query, key, value, zeros(query.shape[:1]), score)
        return _if(here.active, seen, none)

    own = (zeros(x.query.shape), zeros(x.query.shape[:1]))
    sums = (*own, tuple(zeros(shape_of(x.score[n])) for n in which))

    def add(sums: Any, here: _Part) -> tuple[Any, tuple[Array, Array]]:
        g = gradients(here)
        query, scale, score = sums
        score = tuple(
            here.into(config.kinds[n], whole, part)
            for n, whole, part in zip(which, score, g.score, strict=True)
            if part is not None
        )
        return (query + g.query, scale + g.scale, score), (g.key, g.value)

    if shards.schedule == "ring":

        def visit(sums: Any, keys: Any, rank: Any) -> Any:
            return add(sums, _of_rank(config, x, keys, rank))

        sums, (key, value) = _around_with_gradients(shards, (x.key, x.value), visit, sums)
    else:
        fetch = _fetch(shards, x)
        fetched = fetch((x.key, x.value))
        sums, found = add(sums, _fetched(config, x, fetched))
        like = jax.tree.map(lambda a: constant(x.query, a.shape, wide), (x.key, x.value))
        ((key, value),) = jax.linear_transpose(fetch, like)(found)
    query, scale, score = sums
    none: list[Any] = [None] * len(x.score)
    return Gradients(
        query.astype(x.query.dtype),
        key.astype(x.key.dtype),
        value.astype(x.value.dtype),
        scale,
        tuple(
            None if a is None else a.astype(operand.dtype)
            for a, operand in zip(replaced(none, which, score), x.score, strict=True)
        ),
    )


def tangent(config: Config, x: Inputs, moved: tuple[Array, ...]) -> tuple[Array, Array]:
    """Tangents of output and LSE, for those of `x.floats()`."""
    found: tuple[Array, Array] = jax.jvp(
        lambda *floats: by_formula(config, x.with_floats(floats)), x.floats(), moved
    )[1]
    return found


def by_formula(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output and LSE by the formula, for derivatives: all keys are gathered."""
    shards = _of(config)
    whole = shards.schedule == "whole"
    keys = (lambda array: array) if whole else partial(_gathered, shards)
    rows = _rows(config, x)._replace(key=keys(x.key), value=keys(x.value))
    return formula.by_rows(_local(config), rows)


# --- sums over parts of the keys ------------------------------------------------------------------


class _Sums(NamedTuple):
    """Output and LSE over the keys so far, and whether a row without any weight may see a key."""

    out: Array
    lse: Array
    doubtful: Bool[Array, ""]

    def added(self, config: Config, out: Array, lse: Array, doubtful: Bool[Array, ""]) -> _Sums:
        total = jnp.logaddexp(self.lse, lse)
        # Of a row without any weight so far: -inf - -inf is NaN.
        level = jnp.where(total == -jnp.inf, jnp.zeros((), total.dtype), total)

        def share(out: Array, lse: Array) -> Array:
            out = out.astype(total.dtype)
            # What is infinite stays so, however little its weight.
            return jnp.where(jnp.isfinite(out), out * jnp.exp(lse - level)[..., None], out)

        reduces = [column.reduce for column in config.columns]
        means = out.shape[-1] - len(reduces) + reduces.count("mean")
        both = share(self.out[..., :means], self.lse) + share(out[..., :means], lse)
        if means < out.shape[-1]:
            extremes = _extremes(reduces[reduces.count("mean") :], self.out, out)
            both = jnp.concatenate([both, *extremes], -1)
        return _Sums(both, total, self.doubtful | doubtful)


def _extremes(reduces: Sequence[str], first: Array, second: Array) -> list[Array]:
    """Columns that are no means, of some keys and of others; the last of what is given."""
    names = range(first.shape[-1] - len(reduces), first.shape[-1])
    pairs = [(first[..., n, None], second[..., n, None]) for n in names]
    found = [
        jnp.maximum(*pair) for pair, reduce in zip(pairs, reduces, strict=True) if reduce == "max"
    ]
    if len(found) < len(reduces):
        one, other = pairs[len(found) - 1]
        for a, b in pairs[len(found) :]:
            found.append(jnp.where(one == other, jnp.minimum(a, b), jnp.where(one > other, a, b)))
    return found


# --- the part of the work of this device's queries and some keys ----------------------------------


class _Part(NamedTuple):
    """This device's queries and some keys, as an engine takes them.

    Attributes:
      config, x: with the operands of these queries and keys.
      active: whether any pair may be visible; None if the mask allows all.
      into: `(kind, array, part) -> array`: an array for all operands of a kind, with the part for
        these queries and keys added in its place.
    """

    config: Config
    x: Inputs
    active: Bool[Array, ""] | None
    into: Callable[[Kind, Array, Array], Array]


def _of(config: Config) -> Shards:
    assert config.shards is not None
    return config.shards


def _local(config: Config) -> Config:
    return config._replace(shards=None)


def _of_rank(config: Config, x: Inputs, keys: tuple[Array, Array], rank: Any) -> _Part:
    """This device's queries and the keys of a rank."""
    shards = _of(config)
    T, S = x.query.shape[1], keys[0].shape[1]
    at = (lax.axis_index(shards.axis) * T, rank * S)
    return _part(config, x, keys, at, S * shards.ranks)


def _part(
    config: Config, x: Inputs, keys: tuple[Array, Array], at: tuple[Any, Any], S: int
) -> _Part:
    """This device's queries and the keys from `at` on, of S in all."""
    tile = (x.query.shape[1], keys[0].shape[1])

    def part(kind: Kind, array: Array) -> Array:
        return cut(kind, array, 2, at, tile, S)

    def into(kind: Kind, array: Array, part: Array) -> Array:
        starts, sizes = tile_slice(kind, *at, *tile, S)
        zero = np.int32(0)
        starts = (zero, zero, *starts, *[zero] * (array.ndim - 2 - len(starts)))
        old = lax.dynamic_slice(
            array, starts, (*array.shape[:2], *sizes, *part.shape[2 + len(sizes) :])
        )
        return lax.dynamic_update_slice(array, old + part, starts)

    return _made(config, x, keys, part, into, at)


def _made(
    config: Config,
    x: Inputs,
    keys: tuple[Array, Array],
    part: Callable[[Kind, Array], Array],
    into: Callable[[Kind, Array, Array], Array],
    at: tuple[Any, Any] | None = None,
) -> _Part:
    T, S = x.query.shape[1], keys[0].shape[1]
    tile = min(config.tile[0], T), min(config.tile[1], S)

    def parts(kinds: Sequence[Kind], arrays: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(part(kind, a) for kind, a in zip(kinds, arrays, strict=True))

    mask = () if config.mask is None else parts(config.mask.kinds, x.mask)
    score = parts(config.kinds, x.score)
    dropout = parts(DROPOUT, x.dropout) if config.dropout else ()
    states = None
    if config.mask is not None:
        if x.states is not None and at is not None:
            # Whole tiles of the sequence's own map.
            first = (np.int32(0), np.int32(0), at[0] // tile[0], at[1] // tile[1])
            size = (*x.states.shape[:2], T // tile[0], S // tile[1])
            states = lax.dynamic_slice(x.states, first, size)
        else:
            operands = [Operand(k, a) for k, a in zip(config.mask.kinds, mask, strict=True)]
            states = intervals.states(config.mask, operands, *tile, T, S)
    active = None if states is None else base.anywhere(states != EMPTY)
    assert config.engine is not None
    here = x._replace(
        key=keys[0],
        value=keys[1],
        states=states if config.engine.states else None,
        mask=mask,
        score=score,
        dropout=dropout,
    )
    return _Part(_local(config)._replace(tile=tile), here, active, into)


def _rows(config: Config, x: Inputs) -> Inputs:
    """The inputs of this device's queries and all keys, with keys and values of width 0."""
    shards = _of(config)
    B, S, K, _ = x.key.shape
    S *= 1 if shards.schedule == "whole" else shards.ranks
    nothing = constant(x.query, (B, S, K, 0), x.key.dtype)
    at = (lax.axis_index(shards.axis) * x.query.shape[1], np.int32(0))
    return _part(config, x, (nothing, nothing), at, S).x


def _if(active: Bool[Array, ""] | None, compute: Callable[[], Any], otherwise: Any) -> Any:
    return compute() if active is None else lax.cond(active, compute, lambda: otherwise)


def _without_gradient(config: Config, x: Inputs) -> Bool[Array, "B T N"]:
    """The queries that see a key, of any device, that is not finite."""
    shards = _of(config)
    B, T, N, _ = x.query.shape
    flags = ~base.all_finite(x.key, -1)  # [B, S, K]
    none = constant(x.query, (B, T, N), bool)

    def found() -> Array:
        def visit(bad: Array, flags: Array, rank: Any) -> Array:
            here = _of_rank(config, x, (flags[..., None], flags[..., None]), rank)
            return nonfinite.that_see(here.config, here.x, flags, bad)

        if shards.schedule == "whole":
            # The backward of a part looks at its keys itself.
            return none
        return _around(shards, flags, visit, none)

    # One number from each device of the mesh: all of them have to go the same way.
    axes = tuple(sorted(varying(flags))) or shards.mesh
    anywhere = lax.pmax(base.anywhere(flags).astype(jnp.int32), axes) > 0
    return lax.cond(anywhere, found, lambda: none)


# --- around the ring ------------------------------------------------------------------------------


def _sent(shards: Shards, tree: Any) -> Any:
    """What the rank before has sent, for what this one sends to the next."""
    to = [(rank, (rank + 1) % shards.ranks) for rank in range(shards.ranks)]
    return jax.tree.map(lambda a: lax.ppermute(a, shards.axis, to), tree)


def _around(shards: Shards, keys: Any, visit: Callable[[Any, Any, Any], Any], sums: Any) -> Any:
    """`sums = visit(sums, keys, rank)` for the keys of every rank, one's own first."""
    me = lax.axis_index(shards.axis)

    def step(carry: Any, n: Any) -> Any:
        keys, sums = carry
        # Sent before they are used, so that they travel meanwhile.
        following = _sent(shards, keys)
        return (following, visit(sums, keys, (me - n) % shards.ranks)), None

    steps = jnp.arange(shards.ranks - 1, dtype=jnp.int32)
    (keys, sums), _ = lax.scan(step, (keys, sums), steps)
    return visit(sums, keys, (me + 1) % shards.ranks)


def _around_with_gradients(
    shards: Shards, keys: Any, visit: Callable[[Any, Any, Any], Any], sums: Any
) -> Any:
    """The same; `visit` also gives what belongs to the keys, which is summed, and sent home."""
    me = lax.axis_index(shards.axis)
    last = shards.ranks - 1

    def later(keys: Any, found: Any, sums: Any, n: Any) -> Any:
        # What was found so far for these keys comes in while more of it is computed.
        arriving = _sent(shards, found)
        sums, more = visit(sums, keys, (me - n) % shards.ranks)
        return jax.tree.map(jnp.add, arriving, more), sums

    def step(carry: Any, n: Any) -> Any:
        keys, found, sums = carry
        following = _sent(shards, keys)
        return (following, *later(keys, found, sums, n)), None

    following = _sent(shards, keys)
    sums, found = visit(sums, keys, me)
    steps = jnp.arange(1, last, dtype=jnp.int32)
    if last > 1:
        (following, found, sums), _ = lax.scan(step, (following, found, sums), steps)
    found, sums = later(following, found, sums, np.int32(last))
    return sums, _sent(shards, found)


# --- all at once ----------------------------------------------------------------------------------


def _gathered(shards: Shards, array: Array) -> Array:
    return lax.all_gather(array, shards.axis, axis=1, tiled=True)


def _fetch(shards: Shards, x: Inputs) -> Callable[[Any], Any]:
    """The function from this device's keys to those that its queries need; linear."""
    match shards.schedule:
        case "whole":
            return lambda keys: keys
        case "gather":
            one = _gathered
        case _:
            one = _with_halo
    return partial(jax.tree.map, partial(one, shards))


def _with_halo(shards: Shards, array: Array) -> Array:
    """An array `[B, S, ...]` with those of its neighbours' numbers that are in the halo."""
    S = array.shape[1]

    def side(count: int, step: int) -> list[Array]:
        """The nearest `count`, from the ranks on one side, in the order of their positions."""
        found = []
        for distance in range(1, -(-count // S) + 1):
            size = min(S, count - (distance - 1) * S)
            part = (
                lax.slice_in_dim(array, S - size, S, axis=1)
                if step > 0
                else (lax.slice_in_dim(array, 0, size, axis=1))
            )
            to = [(rank, (rank + step * distance) % shards.ranks) for rank in range(shards.ranks)]
            found.append(lax.ppermute(part, shards.axis, to))
        return found[::-1] if step > 0 else found

    return jnp.concatenate([*side(shards.before, 1), array, *side(shards.after, -1)], 1)


def _fetched(config: Config, x: Inputs, keys: tuple[Array, Array]) -> _Part:
    """This device's queries and the keys that `_fetch` brings."""
    shards = _of(config)
    T, S = x.query.shape[1], x.key.shape[1]
    me = lax.axis_index(shards.axis)
    if shards.schedule != "halo":
        return _part(config, x, keys, (me * T, np.int32(0)), keys[0].shape[1])
    # The halo of the first ranks wraps around to the last keys: a mask that asks for no more than
    # the halo masks them.
    total, first = S * shards.ranks, me * S - shards.before
    columns = (first + jnp.arange(keys[0].shape[1], dtype=jnp.int32)) % total

    def index(kind: Kind) -> tuple[Any, ...]:
        count = T + keys[0].shape[1] - 1
        # From the distance of the first query and the last key on.
        least = me * T - first - keys[0].shape[1] + 1 + total - 1
        distances = jnp.clip(least + jnp.arange(count, dtype=jnp.int32), 0, None)
        return along(kind, me * T + jnp.arange(T, dtype=jnp.int32), columns, distances)

    def part(kind: Kind, array: Array) -> Array:
        for axis, at in enumerate(index(kind), 2):
            array = jnp.take(array, at, axis, mode="clip")
        return array

    def into(kind: Kind, array: Array, found: Array) -> Array:
        # Varying as the part is: a sum over devices would be taken of its transpose here.
        like = constant(found, array.shape, array.dtype)
        (more,) = jax.linear_transpose(partial(part, kind), like)(found)
        return array + more

    return _made(config, x, keys, part, into)

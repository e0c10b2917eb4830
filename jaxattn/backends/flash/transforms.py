"""Engines as functions that work under all of JAX's transformations.

From the outside in:

- `operation`: JAX sees one operation. The transpose of its tangent is the engine's own backward,
  over the same tiles. Second derivatives are those of the formula, some rows at a time;
- `custom_vmap`: a vmapped axis is folded into the batch axis. A loop batched by JAX would run for
  every batch row as long as for the longest;
- `custom_partitioning`: inputs sharded over batch, heads or lengths are computed where they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ...mesh import constant, varying, varying_alike
from ...shapes import Array, Float
from .. import base, formula
from ..operation import Rules, operation
from ..problem import Config, Gradients, Inputs
from . import exchange, nonfinite

# The names of the results that the backward needs, for `jax.checkpoint` policies.
SAVED = ("jaxattn_out", "jaxattn_lse")


def attend(config: Config, x: Inputs) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output and LSE by the config's engine, under any transformation."""
    leaves, tree = jax.tree.flatten(x)
    # All varying over the same axes of a `shard_map`: gradients are then summed outside.
    alike = varying_alike(leaves)
    # Inside a `shard_map` arrays are local already. Asked here: derivatives are traced elsewhere.
    local = bool(varying(x.query) or jax.sharding.get_abstract_mesh().manual_axes)
    B, T, N, _ = x.query.shape
    wide = base.accumulator(x.query.dtype)
    like = (
        constant(alike[0], (B, T, N, x.value.shape[-1]), x.query.dtype),
        constant(alike[0], (B, T, N), wide),
    )
    out, lse = operation(_forward_rules(config, tree, local), alike, (), like)
    return out, _with_empty(lse)


# --- differentiation ------------------------------------------------------------------------------


def _kept(lse: Array) -> Array:
    """An LSE as it is kept for derivatives: `jax_debug_infs` would stop for -inf."""
    return jnp.where(lse == -jnp.inf, jnp.finfo(lse.dtype).max, lse)


def _with_empty(lse: Array) -> Array:
    """An LSE as it was before it was kept."""
    return jnp.where(lse == jnp.finfo(lse.dtype).max, -jnp.inf, lse)


@lru_cache(maxsize=1024)
def _forward_rules(config: Config, tree: Any, local: bool) -> Rules:
    """Attention of the leaves of inputs: output and kept LSE."""

    def apply(leaves: Any, _: Any) -> Any:
        out, lse = _forward(config, local)(_inputs(tree, leaves))
        return out, _kept(lse)

    def slope(leaves: Any, _: Any, results: Any, moved: Any) -> Any:
        operands = _inputs(tree, leaves).floats(_inputs(tree, moved))
        rules = _tangent_rules(config, tree, local)
        return operation(rules, (*leaves, *results), operands, results)

    return Rules(apply, slope, names=SAVED)


@lru_cache(maxsize=1024)
def _tangent_rules(config: Config, tree: Any, local: bool) -> Rules:
    """The tangent of attention: of inputs, output and kept LSE, for tangents of the inputs.

    Its transpose is the backward. Where it is differentiated, the formula is, in its place.
    """

    def apply(fixed: Any, operands: Any) -> Any:
        *leaves, _, _ = fixed
        return _tangent(config, local)(_inputs(tree, leaves), tuple(operands))

    def slope(fixed: Any, operands: Any, _: Any, moved: Any) -> Any:
        x, others = _inputs(tree, fixed[:-2]), _inputs(tree, moved[:-2])
        by_formula = _by_formula(config, x)

        def tangent(floats: Any) -> Any:
            return jax.jvp(by_formula, floats, tuple(operands))[1]

        return jax.jvp(tangent, (x.floats(),), (x.floats(others),))[1]

    def transpose(fixed: Any, cotangents: Any) -> Any:
        like = _inputs(tree, fixed[:-2]).floats()
        return operation(_backward_rules(config, tree, local), (*fixed, *cotangents), (), like)

    return Rules(apply, slope, transpose)


@lru_cache(maxsize=1024)
def _backward_rules(config: Config, tree: Any, local: bool) -> Rules:
    """The backward: of inputs, output, kept LSE, and the cotangents of both."""

    def apply(fixed: Any, _: Any) -> Any:
        *leaves, out, lse, d_out, d_lse = fixed
        x = _inputs(tree, leaves)
        g: Gradients = _backward(config, local, 1)(x, out, _with_empty(lse), d_out, d_lse)
        scale = g.scale if x.scale.shape[0] != 1 else g.scale.sum(0, keepdims=True)
        return (g.query, g.key, g.value, scale, *(a for a in g.score if a is not None))

    def slope(fixed: Any, _: Any, __: Any, moved: Any) -> Any:
        x, others = _inputs(tree, fixed[:-4]), _inputs(tree, moved[:-4])
        by_formula = _by_formula(config, x)

        def gradients(floats: Any, cotangents: Any) -> Any:
            return jax.vjp(by_formula, *floats)[1](cotangents)

        given = (x.floats(), tuple(fixed[-2:]))
        return jax.jvp(gradients, given, (x.floats(others), tuple(moved[-2:])))[1]

    return Rules(apply, slope)


def _inputs(tree: Any, leaves: Sequence[Any]) -> Inputs:
    """Inputs with these leaves, or with others in the same places, such as tangents."""
    return cast(Inputs, jax.tree.unflatten(tree, leaves))


def _by_formula(config: Config, x: Inputs) -> Callable[..., Any]:
    """Output and LSE from `x.floats()`, for derivatives that no engine has."""
    by_rows = formula.by_rows if config.shards is None else exchange.by_formula
    return lambda *floats: by_rows(config, x.with_floats(floats))


# --- vmap -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _forward(config: Config, local: bool) -> Any:
    @custom_vmap
    def forward(x: Inputs) -> tuple[Array, Array]:
        return cast("tuple[Array, Array]", _partitioned(Pass("forward"), config, local, x))

    @forward.def_vmap
    def rule(size: int, batched: Any, x: Inputs) -> Any:
        heads_first = config.engine is not None and config.engine.heads_first
        return _unfolded(size, forward(_fold(size, batched[0], x, heads_first)))

    return forward


@lru_cache(maxsize=1024)
def _tangent(config: Config, local: bool) -> Any:
    @custom_vmap
    def tangent(x: Inputs, moved: Any) -> tuple[Array, Array]:
        return cast("tuple[Array, Array]", _partitioned(Pass("tangent"), config, local, x, moved))

    @tangent.def_vmap
    def rule(size: int, batched: Any, x: Inputs, moved: Any) -> Any:
        # A tangent has the shape of its primal: both are batched, or neither is.
        flags = tuple(map(operator.or_, x.floats(batched[0]), batched[1]))
        pairs = []
        for of, given in ((batched[0], x.floats()), (x.with_floats(batched[1], batched[0]), moved)):
            spread = [
                jnp.broadcast_to(a, (size, *a.shape)) if wanted and not yes else a
                for a, wanted, yes in zip(given, flags, x.floats(of), strict=True)
            ]
            pairs.append(_fold(size, x.with_floats(flags, batched[0]), x.with_floats(spread)))
        return _unfolded(size, tangent(pairs[0], pairs[1].floats()))

    return tangent


@lru_cache(maxsize=1024)
def _backward(config: Config, local: bool, groups: int) -> Any:
    """The backward, with a gradient of each operand that batch rows share for every group of rows.

    Under vmap an array that is not batched still has one cotangent for each element.
    """

    @custom_vmap
    def backward(x: Inputs, out: Array, lse: Array, d_out: Array, d_lse: Array) -> Gradients:
        work = Pass("backward", groups)
        return cast(Gradients, _partitioned(work, config, local, x, out, lse, d_out, d_lse))

    @backward.def_vmap
    def rule(size: int, batched: Any, x: Inputs, *rest: Array) -> Any:
        B = x.query.shape[1 if batched[0].query else 0]
        folded = _fold(size, batched[0], x)
        others = (_fold_one(size, yes, B, a) for yes, a in zip(batched[1:], rest, strict=True))
        g = _backward(config, local, groups * size)(folded, *others)

        def unfold(gradient: Array, primal: Array, yes: bool) -> Array:
            """The gradient for each element: `[size, groups]` or `[size, B]` in front."""
            extent = primal.shape[1 if yes else 0]
            target = extent if extent == B and B > 1 else groups
            gradient = gradient.reshape(size, -1, *gradient.shape[1:])
            if gradient.shape[1] == target:
                return gradient
            parts = gradient.reshape(size, target, -1, *gradient.shape[2:])
            return parts.sum(2)

        score = tuple(
            None if part is None else unfold(part, primal, yes)
            for part, primal, yes in zip(g.score, x.score, batched[0].score, strict=True)
        )
        rows, _ = _unfolded(size, g._replace(score=()))
        result = rows._replace(score=score)
        return result, jax.tree.map(lambda _: True, result)

    return backward


def _fold_one(size: int, batched: bool, B: int, array: Array, shared: bool = False) -> Array:
    """`[size, B, ...]` as `[size * B, ...]`; what is not batched is repeated, unless shared."""
    if not batched:
        if shared and array.shape[0] == 1:
            return array
        array = jnp.broadcast_to(array, (size, *array.shape))
    if array.shape[1] != B:
        array = jnp.broadcast_to(array, (size, B, *array.shape[2:]))
    return array.reshape(size * B, *array.shape[2:])


def _fold(size: int, batched: Inputs, x: Inputs, heads_first: bool = False) -> Inputs:
    if heads_first:
        # In the order in which they lie, or XLA would copy them.
        return _swapped(_fold(size, batched, _swapped(x)))
    B = x.query.shape[1 if batched.query else 0]
    rows = {"query", "key", "value"}
    return Inputs(
        *(
            jax.tree.map(
                lambda yes, a, own=name in rows: _fold_one(size, yes, B, a, shared=not own),
                getattr(batched, name),
                getattr(x, name),
            )
            for name in Inputs._fields
        )
    )


def _swapped(x: Inputs) -> Inputs:
    """The inputs, length and heads of keys and values exchanged."""
    key, value = (jnp.swapaxes(a, -3, -2) for a in (x.key, x.value))
    return x._replace(key=key, value=value)


def _unfolded(size: int, tree: Any) -> Any:
    """Results of a folded call, `[size, B, ...]`, and that all of them are batched."""
    found = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), tree)
    return found, jax.tree.map(lambda _: True, found)


# --- sharding -------------------------------------------------------------------------------------


# Names of axes by role. Batch rows b, query heads n, key heads k and lengths t may be sharded; that
# of keys only if there are as many as queries. Operands have more axes after these, and extents of
# 1 where they don't depend on b or h.
_AXES = {
    "query": "btnh", "key": "btkh", "value": "btkw", "scale": "b", "operand": "bn", "out": "btnw",
    "lse": "btn",
}  # fmt: skip


class Pass(NamedTuple):
    """What is computed: "forward", "tangent", or "backward", with this number of groups."""

    name: str
    groups: int = 1


def _partitioned(work: Pass, config: Config, local: bool, x: Inputs, *rest: Any) -> Any:
    """The pass `work`, computed where the inputs are."""
    args = (x, *rest)
    fn = _local(work, config)
    if local:
        return fn(*args)

    def operands(values: Any) -> Any:
        return jax.tree.map(lambda _: "operand", values)

    own: tuple[Any, ...] = ("query", "key", "value", operands(x.states), "scale")
    roles: Any = Inputs(*own, *map(operands, x[5:]))
    shapes = jax.eval_shape(fn, *args)
    out_roles: Any = ("out", "lse")
    match work.name:
        case "forward":
            given: tuple[Any, ...] = (roles,)
        case "tangent":
            given = (roles, x.floats(roles))
        case _:
            given = (roles, "out", "lse", "out", "lse")
            query, key, value, _, scale = own
            out_roles = Gradients(query, key, value, scale, operands(shapes.score))
    B, T, N, _ = x.query.shape
    extents = {"b": B, "n": N, "k": x.key.shape[2], "t": T}
    leaves, tree = jax.tree.flatten(args)
    results, out_tree = jax.tree.flatten(shapes)

    def named(arrays: Any, roles: Any) -> tuple[str, ...]:
        pairs = zip(arrays, jax.tree.leaves(roles), strict=True)
        return tuple(_names(a.shape, role, extents) for a, role in pairs)

    op = _operation(
        work, config, tree, named(leaves, given), named(results, out_roles), tuple(extents.items())
    )
    return jax.tree.unflatten(out_tree, op(*leaves))


@lru_cache(maxsize=1024)
def _local(work: Pass, config: Config) -> Callable[..., Any]:
    """What is computed; traced once for its shapes, for the primal and for the forward rule."""
    passes: Any = nonfinite if config.shards is None else exchange
    match work.name:
        case "forward":
            fn: Any = partial(passes.forward, config)
        case "tangent":
            fn = partial(passes.tangent, config)
        case _:
            fn = partial(passes.backward, config, work.groups)
    return jax.jit(fn, inline=True)


def _names(shape: tuple[int, ...], role: str, extents: dict[str, int]) -> str:
    """A letter for each axis: b, n, k, t where it has that extent, "." for what stays whole."""
    letters = _AXES[role].ljust(len(shape), ".")
    return "".join(
        letter if letter in extents and extents[letter] == size else "."
        for letter, size in zip(letters, shape, strict=True)
    )


class _ShardedAxes(NamedTuple):
    """How an operation is split: mesh axes of batch rows, query heads, key heads, and lengths.

    And all axes of the mesh.
    """

    b: tuple[Any, ...] = ()
    n: tuple[Any, ...] = ()
    k: tuple[Any, ...] = ()
    t: tuple[Any, ...] = ()
    mesh: tuple[Any, ...] = ()


@lru_cache(maxsize=1024)
def _operation(
    work: Pass,
    config: Config,
    tree: Any,
    names: tuple[str, ...],
    outs: tuple[str, ...],
    extents: tuple[tuple[str, int], ...],
) -> Callable[..., Any]:
    """The work as an operation that XLA's partitioner may split.

    Where key heads are fewer than the devices that query heads are split over, every device is
    given all of them, and takes those that its query heads use. Where lengths are split, keys go
    from device to device (`exchange`).
    """
    B, N, K, T = (size for _, size in extents)
    engine = config.engine
    # An engine that is exact needs all keys at once.
    lengths = engine is not None and not engine.exact
    key_word = names[1]

    def local(split: _ShardedAxes, parts: int, *leaves: Array) -> Any:
        # XLA asks for this while it compiles, under whatever mesh the caller has set; on one
        # device there is none.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return computed(split, parts, *leaves)

    def computed(split: _ShardedAxes, parts: int, *leaves: Array) -> Any:
        here = work._replace(groups=max(work.groups // parts, 1))
        used = None
        if split.n and not split.k:
            used = _used(N, K, leaves[0].shape[2], lax.axis_index(split.n))
            leaves = tuple(
                jnp.take(a, used, 2) if "k" in word else a
                for a, word in zip(leaves, names, strict=True)
            )
        x, *rest = jax.tree.unflatten(tree, leaves)
        made, x = over_lengths(split, x)
        results = jax.tree.leaves(_local(here, made)(x, *rest))
        return tuple(whole(a, word, split, used) for a, word in zip(results, outs, strict=True))

    def over_lengths(split: _ShardedAxes, x: Inputs) -> tuple[Config, Inputs]:
        """The config and inputs of a device that has a part of the queries, and of the keys."""
        if not split.t:
            return config, x
        t, s = x.query.shape[1], x.key.shape[1]
        keys = "ring" if "t" in key_word else "whole"
        if t % config.tile[0] or s % config.tile[1]:
            x = x._replace(states=None)
        shards = base.Shards(split.t, T // t, keys, split.mesh)
        return config._replace(states=None, shards=shards), x

    def whole(array: Array, word: str, split: _ShardedAxes, used: Array | None) -> Array:
        """A result of all devices: gradients of arrays that they share are summed."""
        if used is not None and "k" in word:
            zeros = jnp.zeros((*array.shape[:2], K, *array.shape[3:]), array.dtype)
            array = zeros.at[:, :, used].add(array)
        over = () if "b" in word else split.b
        if "n" not in word and not ("k" in word and split.k):
            over += split.n
        if "t" not in word:
            over += split.t
        return lax.psum(array, over) if over else array

    @custom_partitioning
    def op(*leaves: Array) -> Any:
        return computed(_ShardedAxes(), 1, *leaves)

    def split_of(arg_shapes: Any) -> tuple[_ShardedAxes, int]:
        """How the queries are split, and into how many parts their batch rows are."""
        sharding = arg_shapes[0].sharding
        spec = (*getattr(sharding, "spec", ()), *(None,) * 4)
        b, t, n = (_tuple(axes) for axes in spec[:3])
        sizes = [math.prod(sharding.mesh.shape[axis] for axis in axes) for axes in (b, n, t)]
        # A gradient for each group of rows: only whole groups are split off.
        if B % sizes[0] or (work.groups > 1 and work.groups % sizes[0]):
            b, sizes[0] = (), 1
        if N % sizes[1]:
            n, sizes[1] = (), 1
        if not lengths or T % sizes[2]:
            t = ()
        mesh = tuple(sharding.mesh.axis_names)
        return _ShardedAxes(b, n, () if K % sizes[1] else n, t, mesh), sizes[0]

    def shardings(mesh: Any, split: _ShardedAxes, words: Sequence[str]) -> tuple[Any, ...]:
        axes = split._asdict()
        return tuple(NamedSharding(mesh, P(*(axes.get(n) or None for n in word))) for word in words)

    def infer(mesh: Any, arg_shapes: Any, _: Any) -> Any:
        return shardings(mesh, split_of(arg_shapes)[0], outs)

    def partition(mesh: Any, arg_shapes: Any, _: Any) -> Any:
        split, parts = split_of(arg_shapes)
        return (
            mesh,
            partial(local, split, parts),
            shardings(mesh, split, outs),
            shardings(mesh, split, names),
        )

    # A rule like einsum's: shared letters shard alike, every other axis stays whole.
    left: list[str] = []

    def spelled(word: str) -> str:
        named = []
        for n in word:
            if n == "." or (n == "t" and not lengths):
                left.append(f"x{len(left)}")
                n = left[-1]
            # As many key heads as query heads: they go together.
            named.append("n" if n == "k" and K == N else n)
        return " ".join(named)

    rule = ", ".join(map(spelled, names)) + " -> " + ", ".join(map(spelled, outs))
    op.def_partition(
        infer_sharding_from_operands=infer,
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(left),
    )
    return cast("Callable[..., Any]", op)


def _used(N: int, K: int, here: int, device: Array) -> Array:
    """The key heads that this device's `here` query heads use, each for as many of them."""
    group = N // K
    each = math.gcd(here, group)
    first = device * here + jnp.arange(here // each, dtype=jnp.int32) * each
    return lax.div(first, jnp.int32(group))


def _tuple(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)

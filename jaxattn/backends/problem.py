"""What the formula, loops and kernels are given: a `Config`, compiled in, and `Inputs`, arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, Int
from ..tiles import intervals, known
from ..tiles.tile_map import TileStates
from ..tracing.dependence import Kind
from ..tracing.pointwise import pointwise
from ..tracing.program import Program
from ..tracing.split import Operand, Split
from . import base
from .base import Call, Shards, Sizes

# The kinds of the operands of dropout, `Inputs.dropout`.
DROPOUT: tuple[Kind, ...] = ("row", "row", "column", "head")


class Residue(NamedTuple):
    """The residue of a mask or score.

    Attributes:
      program: from (the logit and) one element of each operand to one element of the result.
      kinds: of the operands, in order; they say which part of an operand a tile needs.
    """

    program: Program
    kinds: tuple[Kind, ...]

    @property
    def identity(self) -> bool:
        """Whether it is a score that leaves logits as they are."""
        return self.program.outputs == self.program.inputs[:1]

    def evaluated(self, *tiles: Array) -> Array:
        """The result on a tile, `[.., tq, tk]`; an extent is 1 where no operand has more.

        Args:
          *tiles: for a score first the logits `[.., tq, tk]`, then each operand's part of the
            tile, as it broadcasts to that.
        """
        program = self.program
        ranks = [len(program.types[ref].shape) for ref in program.inputs]
        return pointwise(program, tiles, ranks)

    def scored(self, logits: Array, tiles: Sequence[Array]) -> Array:
        """The logits of a tile after a score, in the shape and dtype they had before."""
        found = self.evaluated(logits, *tiles)
        return jnp.broadcast_to(found, logits.shape).astype(logits.dtype)


class Column(NamedTuple):
    """A statistic of each row of weights, which engines return as a column of the output.

    Attributes:
      residue: of a function of the final logit and the positions.
      reduce: "mean", the sum of weights times the function; "max", its maximum over visible pairs,
        -inf without any; "largest", its value at the pair with the largest logit, the least of
        several, and -1 without any. Only means have gradients. Means come first, then maxima, and
        before the first "largest" the maximum of the logit.
    """

    residue: Residue
    reduce: Literal["mean", "max", "largest"]

    @property
    def mean(self) -> bool:
        return self.reduce == "mean"

    @property
    def first(self) -> float:
        """What it is before the first key."""
        return {"mean": 0.0, "max": -jnp.inf, "largest": -1.0}[self.reduce]


class Keeping(NamedTuple):
    """Passes of an engine that keeps weights for its backward, as `Engine` has them.

    Attributes:
      forward: gives the weights `[B, K, G, T, S]` too, before dropout.
      backward: `(config, groups, x, weights, far, delta, d_out) -> Gradients`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Engine(NamedTuple):
    """Loops or kernels that compute attention, as functions of a `Config` and `grouped` inputs.

    Values are finite, and in the backward queries and keys too, as `flash/nonfinite.py` sees to.
    Logits need not be, nor the LSE of rows whose gradients are to be NaN.

    Attributes:
      forward: `(config, x) -> (out [B, T, K, G, Hv] in the query's dtype, natural-log lse
        [B, T, K, G])`. Where the weights of a row sum up to 0, these are 0 and -inf.
      backward: `(config, groups, x, far, delta, d_out) -> Gradients`, with the cotangent of `out`
        and two numbers of each query, `[B, K, G, T]`. With logits `s` and the cotangents `dp` of
        weights, `p = e^(s - far)` and `ds = p * (dp - delta)`: `far` is the LSE, inf where a query
        takes no part, and NaN where its gradients are to be NaN. All others are finite. Operands
        of a score that the batch rows share get one gradient for each of `groups` equal groups of
        rows.
      differentiable: the forward where JAX can push tangents through it; None where the formula
        has to be differentiated in its place.
      decided: the forward where no other device has keys. It gives NaN itself to queries that see
        keys, all with logits of -inf. None where that is found out from the LSE.
      keeping: the passes of calls whose weights take no more memory than the inputs and outputs, so
        that they are kept for the backward; else None. They need all keys, like `decided`.
      cleans: whether it is given arrays as they are, and itself puts 0 in place of what is not
        finite, as `flash.operands.cleaned` does, where it copies them anyway.
      exact: whether its forward is given values as they are, and is right for those that are not
        finite too.
      heads_first: whether keys and values lie in memory with heads first, as `Call` says.
      states: whether it reads the states of tiles.
      known: whether it takes them from the config where they are known.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    differentiable: Callable[..., Any] | None = None
    decided: Callable[..., Any] | None = None
    keeping: Keeping | None = None
    cleans: bool = False
    exact: bool = False
    heads_first: bool = False
    states: bool = True
    known: bool = False


class Config(NamedTuple):
    """What a loop or a kernel is compiled for: the same for all values of the inputs, hashable.

    Attributes:
      engine: what computes; None for the formula.
      mask, score: their residues.
      dropout: whether weights are dropped.
      precision: of matrix products.
      dtype: of the factors of products.
      tile: queries and keys of a tile.
      states: those of the tiles, a row of bytes each, where they are the same for all values of the
        inputs, and the engine takes them from here; else None.
      shards: how devices share the sequence, or None.
      columns: statistics, columns of the output after those of the values. With any, the output
        is in the dtype of accumulation.
    """

    engine: Engine | None
    mask: Residue | None
    score: Residue | None
    dropout: bool
    precision: Any
    dtype: Any
    tile: tuple[int, int]
    states: tuple[bytes, ...] | None = None
    shards: Shards | None = None
    columns: tuple[Column, ...] = ()

    @property
    def residues(self) -> tuple[Residue, ...]:
        """What takes logits: the score, then the columns. `Inputs.score` has their operands."""
        score = () if self.score is None else (self.score,)
        return score + tuple(column.residue for column in self.columns)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the operands of the residues."""
        return tuple(kind for residue in self.residues for kind in residue.kinds)

    @property
    def learned(self) -> tuple[int, ...]:
        """Which operands of the residues have gradients: those of floats, but for maxima."""
        found, n = [], 0
        for i, residue in enumerate(self.residues, len(self.columns) - len(self.residues)):
            types = [residue.program.types[ref].dtype for ref in residue.program.inputs[1:]]
            if i < 0 or self.columns[i].mean:
                found += [n + j for j, t in enumerate(types) if jnp.issubdtype(t, jnp.floating)]
            n += len(types)
        return tuple(found)

    def split(self, arrays: Sequence[Any]) -> tuple[Sequence[Any], list[Sequence[Any]]]:
        """What belongs to the operands of the score, and to those of each column."""
        parts, n = [], 0
        for residue in self.residues:
            parts.append(arrays[n : n + len(residue.kinds)])
            n += len(residue.kinds)
        return ((), parts) if self.score is None else (parts[0], parts[1:])


class Inputs(NamedTuple):
    """The arrays of a call; extents of operands are 1 where they don't depend on b or h.

    Where devices share the sequence, query, key and value are this device's part, and all others
    are those of the whole sequence.

    Attributes:
      query: `[B, T, N, H]`.
      key, value: `[B, S, K, H]`, `[B, S, K, Hv]`.
      states: int8 `[B|1, N|1, nq, nk]`; None where every tile is FULL, or `Config` has them.
      scale: `[B|1]`.
      mask, score: operands of the residues, `[B|1, N|1, ...]`; after those of the score come
        those of the columns.
      dropout: empty, or two words for each row `[B, N, T]`, positions of keys `[B|1, 1, S]`, and
        the rate `[B|1, 1]`.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    states: Int[Array, "..."] | None
    scale: Float[Array, "..."]
    mask: tuple[Any, ...]
    score: tuple[Any, ...]
    dropout: tuple[Any, ...]

    def floats(self, of: Any = None) -> tuple[Any, ...]:
        """The arrays that have derivatives: query, key, value, scale, and the score's floats.

        With `of`, something of the same structure such as tangents or flags: its entries in the
        places of these arrays.
        """
        of = self if of is None else of
        score = (each for a, each in zip(self.score, of.score, strict=True) if _learns(a))
        return (of.query, of.key, of.value, of.scale, *score)

    def with_floats(self, floats: Sequence[Any], of: Any = None) -> Inputs:
        """The same inputs, or `of` of the same structure, with others in place of `floats()`."""
        of = self if of is None else of
        query, key, value, scale, *learned = floats
        following = iter(learned)
        pairs = zip(self.score, of.score, strict=True)
        score = tuple(next(following) if _learns(a) else each for a, each in pairs)
        made = of._replace(query=query, key=key, value=value, scale=scale, score=score)
        return cast(Inputs, made)

    def grouped(self) -> Inputs:
        """The same with the N query heads as K key heads of G query heads each.

        Queries are `[B, T, K, G, H]`, states, operands and what dropout needs
        `[B|1, K|1, G|1, ...]`.
        """
        K = self.key.shape[2]
        fields = self._asdict() | {"query": by_key_head(self.query, 2, K)}
        for name in ("states", "mask", "score", "dropout"):
            fields[name] = jax.tree.map(lambda a: by_key_head(a, 1, K), fields[name])
        return Inputs(**fields)


def _learns(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def by_key_head(array: Array, axis: int, K: int) -> Array:
    """An axis of N query heads as two, of K key heads and of the group of each; 1 as 1 and 1."""
    N = array.shape[axis]
    heads = (1, 1) if N == 1 else (K, N // K)
    return array.reshape(*array.shape[:axis], *heads, *array.shape[axis + 1 :])


def joined(array: Array, axis: int) -> Array:
    """Two axes of heads as one; undoes `by_key_head`."""
    return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])


class Gradients(NamedTuple):
    """Cotangents: of query, key, value, scale (`[B]` always), and of the score's operands."""

    query: Array
    key: Array
    value: Array
    scale: Array
    score: tuple[Array | None, ...]


def whole(call: Call) -> tuple[Config, Inputs]:
    """The config and inputs of the formula: no engine, no tiles."""
    return build(call, None, call.query.dtype, lambda known, heads: (call.sizes.T, call.sizes.S))


def build(
    call: Call,
    engine: Engine | None,
    dtype: Any,
    choose: Callable[[TileStates | None, int], tuple[int, int]],
) -> tuple[Config, Inputs]:
    """The config that an engine is compiled for, and the inputs that it is given.

    Args:
      call: what to compute.
      engine: what computes it; with None no states of tiles are computed.
      dtype: of the factors of products.
      choose: from the call's tile map, if it has one, and the number of heads that share their
        tiles, to the queries and keys of a tile.
    """
    sizes = call.sizes
    B, N = sizes.B, sizes.N
    T, S = call.lengths
    wide = base.accumulator(call.query.dtype)
    states, parts, fixed = None, None, None
    operands: tuple[Operand, ...] = ()
    mapped = call.tiles
    if call.mask is not None:
        parts = call.mask
        operands = parts.operands(call.positions, B, N, T, S)
    tile = choose(mapped, _heads(sizes, operands))
    if call.shards is not None:
        # States are computed of one device's queries and another's keys, unless tiles divide both.
        whole_tiles = sizes.T % tile[0] == 0 and sizes.S % tile[1] == 0
        if mapped is not None and mapped.tile == tile and whole_tiles:
            states = mapped.states
    elif parts is not None and engine is not None and engine.states:
        if mapped is not None and _within(mapped.tile, T, S) == _within(tile, T, S):
            states = mapped.states
        else:
            if engine.known and not base.symbolic(B, N):
                fixed = known.states(parts, call.positions, (B, N, T, S), tile)
            if fixed is None:
                states = intervals.states(parts, operands, *tile, T, S)

    scores, scored = call.score, list[Operand]()
    for part in (*(() if scores is None else (scores,)), *call.means, *call.maxima, *call.largest):
        scored += part.operands(call.positions, B, N, T, S)
    config = Config(
        engine,
        _residue(parts),
        _residue(scores),
        call.dropout is not None,
        call.precision,
        dtype,
        tile,
        fixed,
        call.shards,
        (
            *(Column(Residue(fn.program, fn.kinds), "mean") for fn in call.means),
            *(Column(Residue(fn.program, fn.kinds), "max") for fn in call.maxima),
            *(Column(Residue(fn.program, fn.kinds), "largest") for fn in call.largest),
        ),
    )
    return config, Inputs(
        call.query,
        call.key,
        call.value,
        states,
        jnp.asarray(call.scale, wide).reshape(1),
        tuple(op.array for op in operands),
        tuple(op.array for op in scored),
        _dropout(call),
    )


def _within(tile: tuple[int, int], T: int, S: int) -> tuple[int, int]:
    return min(tile[0], T), min(tile[1], S)


def _heads(sizes: Sizes, operands: Sequence[Operand]) -> int:
    """The number of heads that share their tiles: G if each head has a mask of its own."""
    by_b = any(op.array.shape[0] != 1 for op in operands)
    by_h = any(op.array.shape[1] != 1 for op in operands)
    if by_h:
        return sizes.N // sizes.K
    return sizes.N if by_b or base.symbolic(sizes.B) else sizes.N * sizes.B


def _residue(parts: Split[Any] | None) -> Residue | None:
    return None if parts is None else Residue(parts.program, parts.kinds)


def _dropout(call: Call) -> tuple[Array, ...]:
    if call.dropout is None:
        return ()
    B, N = call.sizes.B, call.sizes.N
    T, S = call.lengths
    at = call.positions.filled(B, N, T, S)
    b, h = at.b[:, None, None], at.h[None, :, None]
    first, second = call.dropout.rows(b, h, at.q[:, None, :])
    shape = (B, N, T)
    rate = jnp.asarray(call.dropout.rate, base.accumulator(call.query.dtype))
    return (
        jnp.broadcast_to(first, shape),
        jnp.broadcast_to(second, shape),
        at.k[:, None, :],
        rate.reshape(1, 1),
    )

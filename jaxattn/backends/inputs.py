"""What loops and kernels are given: the split mask and score, the states of tiles, the arrays.

Arrays come with heads split into K key heads of G query heads each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from .. import intervals
from ..program import Program
from ..shapes import Array, Float, Int
from ..split import Kind, Operand, Split, split
from ..tiles import TileMap
from . import base
from .base import Call, Sizes


class Residue(NamedTuple):
    """A residue of a mask or score, and how its operands are cut into tiles."""

    program: Program
    kinds: tuple[Kind, ...]


class Engine(NamedTuple):
    """What computes: loops or kernels, as functions of a `Plan` and `Inputs`.

    Attributes:
      forward: `(plan, x) -> (out [B, T, K, G, Hv] in the query's dtype, natural-log lse
        [B, T, K, G])`.
      backward: `(plan, groups, x, out, lse, d_out, d_lse) -> Gradients`. Operands of a score that
        the batch rows share get one gradient for each of `groups` equal groups of rows.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class Plan(NamedTuple):
    """What is the same for all values: hashable, the key of a compiled loop."""

    engine: Engine
    mask: Residue | None
    score: Residue | None
    dropout: bool
    precision: Any
    dtype: Any  # of the factors of products
    tile: tuple[int, int]


class Inputs(NamedTuple):
    """What engines work on; extents of operands are 1 where they don't depend on b or h.

    Attributes:
      query: `[B, T, K, G, H]`.
      key, value: `[B, S, K, H]`, `[B, S, K, Hv]`.
      states: int8 `[B|1, K|1, G|1, nq, nk]`, or None: everything is FULL.
      scale: `[B|1]`.
      mask, score: operands of the residues, `[B|1, K|1, G|1, ...]`.
      dropout: nothing, or two words for each row `[B, K, G, T]`, positions of keys
        `[B|1, 1, 1, S]`, and the rate `[B|1, 1, 1]`.
    """

    query: Float[Array, "B T K G H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    states: Int[Array, "..."] | None
    scale: Float[Array, "..."]
    mask: tuple[Any, ...]
    score: tuple[Any, ...]
    dropout: tuple[Any, ...]


class Gradients(NamedTuple):
    """Cotangents: of query, key, value, scale (`[B]` always), and of the score's operands."""

    query: Array
    key: Array
    value: Array
    scale: Array
    score: tuple[Array | None, ...]


def prepare(
    call: Call, engine: Engine, dtype: Any, choose: Callable[[TileMap | None, int], tuple[int, int]]
) -> tuple[Plan, Inputs]:
    """What an engine is compiled for, and what it is given.

    Args:
      call: what to compute.
      engine: what computes it.
      dtype: of the factors of products.
      choose: queries and keys of a tile, from the map that the call brings along, if any, and the
        number of heads that share their tiles.
    """
    sizes = call.sizes
    B, T, S, N, K, _, _ = sizes
    wide = base.accumulator(call.query.dtype)
    states, parts = None, None
    operands: tuple[Operand, ...] = ()
    known = call.mask if isinstance(call.mask, TileMap) else None
    if call.mask is not None:
        mask = call.mask if known is None else known.mask
        parts = split(mask, call.positions)
        operands = parts.operands(call.positions, B, N, T, S)
    tile = choose(known, _heads(sizes, operands))
    if parts is not None:
        if known is not None and _within(known.tile, T, S) == _within(tile, T, S):
            states = known.states
        else:
            states = intervals.states(parts, operands, *tile, T, S)
        states = _grouped(sizes, states)

    scores, scored = None, tuple[Operand, ...]()
    if call.score is not None:
        scores = split(call.score, call.positions, logit=wide)
        scored = scores.operands(call.positions, B, N, T, S)
    plan = Plan(
        engine,
        _residue(parts),
        _residue(scores),
        call.dropout is not None,
        call.precision,
        dtype,
        tile,
    )
    return plan, Inputs(
        call.query.reshape(B, T, K, N // K, -1),
        call.key,
        call.value,
        states,
        jnp.asarray(call.scale, wide).reshape(1),
        tuple(_grouped(sizes, op.array) for op in operands),
        tuple(_grouped(sizes, op.array) for op in scored),
        _dropout(call),
    )


def _within(tile: tuple[int, int], T: int, S: int) -> tuple[int, int]:
    return min(tile[0], T), min(tile[1], S)


def _heads(sizes: Sizes, operands: Sequence[Operand]) -> int:
    """How many heads share their tiles: a mask of its own for each head says one group."""
    by_b = any(op.array.shape[0] != 1 for op in operands)
    by_h = any(op.array.shape[1] != 1 for op in operands)
    if by_h:
        return sizes.N // sizes.K
    return sizes.N if by_b else sizes.N * sizes.B


def _residue(parts: Split | None) -> Residue | None:
    return None if parts is None else Residue(parts.program, parts.kinds)


def _grouped(sizes: Sizes, array: Array) -> Array:
    """`[B|1, N|1, ...]` as `[B|1, K|1, G|1, ...]`."""
    b, n, *rest = array.shape
    heads = (1, 1) if n == 1 else (sizes.K, sizes.N // sizes.K)
    return array.reshape(b, *heads, *rest)


def _dropout(call: Call) -> tuple[Array, ...]:
    if call.dropout is None:
        return ()
    sizes = call.sizes
    at = call.positions.filled(sizes.B, sizes.N, sizes.T, sizes.S)
    b, h = at.b[:, None, None], at.h[None, :, None]
    first, second = call.dropout.rows(b, h, at.q[:, None, :])
    shape = (sizes.B, sizes.N, sizes.T)
    rate = jnp.asarray(call.dropout.rate, base.accumulator(call.query.dtype))
    return (
        _grouped(sizes, jnp.broadcast_to(first, shape)),
        _grouped(sizes, jnp.broadcast_to(second, shape)),
        at.k[:, None, None, :],
        rate.reshape(1, 1, 1),
    )

"""Which tiles the tiled engine computes, in what order, and how many at a time.

A *step* computes a rectangle of queries and keys, one tile or a few that lie side by side, for a
few batch rows and key heads at once. There are three lists of steps: groups of 2 x 2 tiles that
are all FULL, runs of other active tiles in one row of tiles, and single tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ...shapes import Array, Int
from ...tiles.tile_map import EMPTY, FULL
from .. import base
from ..flash import tile_lists
from ..flash.tile_sizes import TileSizes
from ..problem import Config, Inputs

# Heads times cells of one step: large enough that starting its dozen operations is cheap, small
# enough that logits and weights stay in the caches (2 x 2 MB in float32 for a group of tiles).
STEP_CELLS = 128 * 1024

# PARTIAL tiles side by side that one step computes: the three that a window of two tiles has in
# each row. Of 2, 3 and 4 the best for windows, as good as any for documents, causal and dilated
# masks.
RUN = 3


@dataclass(frozen=True)
class StepSizes(TileSizes):
    """The sizes of a problem, of its tiles, and of the steps that compute them.

    Attributes:
      step_rows: the number of batch rows that one step computes.
      step_heads: the number of key heads that one step computes, each with its G query heads.
    """

    step_rows: int
    step_heads: int

    @property
    def units(self) -> int:
        """The pairs of a batch row and a key head in one step."""
        return self.step_rows * self.step_heads

    @classmethod
    def chosen(cls, config: Config, x: Inputs) -> StepSizes:
        """As many batch rows and key heads in a step as share their tiles and fit its cells."""
        B, _, K, G, _ = x.query.shape
        tq, tk = config.tile
        by_b, by_h = (
            (False, False)
            if x.states is None
            else (x.states.shape[0] != 1, max(x.states.shape[1:3]) != 1)
        )
        # Half as many again, for numbers of heads such as 11 and 12.
        room = max(1, STEP_CELLS * 3 // 2 // (G * tq * tk))
        heads = 1 if by_h else _largest_divisor(K, room)
        rows = 1 if by_b or heads != K else _largest_divisor(B, room // heads)
        return cls.of(x, config.tile, step_rows=rows, step_heads=heads)


class Step(NamedTuple):
    """One step: what it starts from (traced), and its numbers of queries and keys (static).

    Attributes:
      b, h, q, k: the first batch row, key head, query and key.
      tq, tk: the numbers of queries and keys.
      masked: whether the mask has to be evaluated.
    """

    b: Any
    h: Any
    q: Any
    k: Any
    tq: int
    tk: int
    masked: bool


class StepList(NamedTuple):
    """Steps of one size.

    Attributes:
      starts: where all steps start, in b, h, q and k; those of this list begin at `first`.
      first, number: the part of `starts` that is this list.
      repeats: how many times the list is run, for further batch rows and further key heads.
      tq, tk, masked: as in `Step`.
    """

    starts: Int[Array, "n 4"]
    first: Int[Array, ""]
    number: Int[Array, ""]
    repeats: tuple[int, int]
    tq: int
    tk: int
    masked: bool


def tile_size(T: int, S: int, heads: int) -> tuple[int, int]:
    """Queries and keys of a tile, for this number of heads in a step.

    Small tiles cover windows and documents tightly. With few heads tiles are larger, or starting
    the operations of a step would cost more than the operations.
    """
    side = 128 if heads >= 6 else 256
    tq = _even(T, side)
    # Few queries (decoding): the same number of cells, in a longer row.
    return tq, _even(S, min(1024, max(side, side * side // max(tq, 16))))


def _even(length: int, most: int) -> int:
    """A tile length of at most `most` that divides `length` with little left over."""
    if length <= most:
        return max(length, 1)
    count = -(-length // most)
    return -(-length // (count * 8)) * 8


def _largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`; 1 if n is symbolic."""
    if base.symbolic(n):
        return 1
    return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)


def step_lists(sizes: StepSizes, states: Array | None) -> list[StepList]:
    """The lists of steps: groups of FULL tiles, runs of other active tiles, and single ones."""
    tq, tk = sizes.tq, sizes.tk
    states = tile_lists.states_of(states, (tq, tk), (tq, tk), sizes.T, sizes.S)
    nq, nk = states.shape[3:]
    # The query heads of one key head are computed together.
    active, all_full = (states != EMPTY).any(2), (states == FULL).all(2)
    gq, gk, run = min(nq, 2), min(nk, 2), min(nk, RUN)
    eb, eh = active.shape[:2]
    wide = jnp.pad(all_full, [(0, 0), (0, 0), (0, -nq % gq), (0, -nk % gk)])
    full = wide.reshape(eb, eh, -(-nq // gq), gq, -(-nk // gk), gk).all((3, 5))
    rest = active & ~jnp.repeat(jnp.repeat(full, gq, 2), gk, 3)[:, :, :nq, :nk]
    at = lax.broadcasted_iota(jnp.int32, rest.shape, 3)
    # How far into its stretch of neighbours a tile is, and how long that is.
    before = lax.cummax(jnp.where(rest, jnp.int32(-1), at), axis=3)
    after = lax.cummin(jnp.where(rest, jnp.int32(nk), at), axis=3, reverse=True)
    place, length = at - before - 1, after - before - 1
    in_runs = length - lax.rem(length, jnp.int32(run))
    first_of_run = rest & (place < in_runs) & (lax.rem(place, jnp.int32(run)) == 0)
    # Flags of steps, the tiles from one flag to the next, the tiles of a step, and `masked`.
    kinds = [(full, (gq, gk), (gq, gk), False), (first_of_run, (1, 1), (1, run), True)]
    if run > 1:
        kinds.append((rest & (place >= in_runs), (1, 1), (1, 1), True))

    # One array of all lists, one after the other.
    flat = jnp.concatenate([flags.reshape(-1) for flags, *_ in kinds])
    running = jnp.cumsum(flat, dtype=jnp.int32)
    starts = jnp.concatenate([_starts(a.shape, tq * by[0], tk * by[1]) for a, by, *_ in kinds])
    # Each goes to the place that the running count names.
    to = jnp.where(flat, running - 1, flat.size)
    starts = jnp.zeros_like(starts).at[to].set(starts, mode="drop")
    repeats = (
        sizes.B // sizes.step_rows if eb == 1 else 1,
        sizes.K // sizes.step_heads if eh == 1 else 1,
    )
    lists, first = [], jnp.int32(0)
    for flags, _, (by_q, by_k), masked in kinds:
        number = flags.sum(dtype=jnp.int32)
        lists.append(StepList(starts, first, number, repeats, tq * by_q, tk * by_k, masked))
        first = first + number
    return lists


def _starts(shape: tuple[int, ...], tq: int, tk: int) -> Int[Array, "n 4"]:
    """Where the tiles of an array of flags start, in b, h, q and k."""
    axes = [lax.broadcasted_iota(jnp.int32, shape, axis).reshape(-1) for axis in range(4)]
    return jnp.stack([axes[0], axes[1], axes[2] * tq, axes[3] * tk], 1)


def loop(
    sizes: StepSizes, lists: list[StepList], compute: Callable[[Step, Any], Any], carry: Any
) -> Any:
    """Runs `carry = compute(step, carry)` over all lists, for all batch rows and key heads."""
    for one in lists:
        by_rows, by_heads = one.repeats

        def body(n: Any, carry: Any, one: StepList = one, by_heads: int = by_heads) -> Any:
            count = jnp.maximum(one.number, 1)
            at = one.first + lax.rem(n, count)
            b, h, q, k = lax.dynamic_index_in_dim(one.starts, at, keepdims=False)
            again = lax.div(n, count)
            b = b + lax.div(again, jnp.int32(by_heads)) * sizes.step_rows
            h = h + lax.rem(again, jnp.int32(by_heads)) * sizes.step_heads
            return compute(Step(b, h, q, k, one.tq, one.tk, one.masked), carry)

        carry = lax.fori_loop(0, one.number * (by_rows * by_heads), body, carry)
    return carry

"""Which tiles the tiled engine computes, in what order, and how many at a time.

A *step* computes a rectangle of queries and keys, one tile or a few that lie side by side, for a
few batch rows and key heads at once. There are three lists of steps: groups of 2 x 2 tiles that
are all FULL, runs of other active tiles in one row of tiles, and single tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...shapes import Array, Int
from ...tiles import known
from ...tiles.tile_map import EMPTY, FULL
from .. import base
from ..flash import tile_lists
from ..flash.tile_sizes import TileSizes, largest_divisor
from ..problem import Config, Inputs

# Heads times cells of one step: large enough that starting its dozen operations is cheap, small
# enough that logits and weights stay in the caches (2 x 2 MB in float32 for a group of tiles).
STEP_CELLS = 128 * 1024

# PARTIAL tiles side by side that one step computes: the three that a window of two tiles has in
# each row. Of 2, 3 and 4 the best for windows, as good as any for documents, causal and dilated
# masks.
RUN = 3

# With at most so many tiles of keys, lists are made in ways that XLA compiles into about
# 15 loops fewer. They take time in proportion to the square.
FEW = 64


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
        heads = 1 if by_h else largest_divisor(K, room)
        rows = 1 if by_b or heads != K else largest_divisor(B, room // heads)
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
      keys: of all steps, `base` and the number of the first tile in the grid.
      base: of this list.
      first, end: the part of `keys` that is this list.
      grid: the tiles along b, h, q and k; 1 along b and h where the mask does not depend on them.
      repeats: how many times the list is run, for further batch rows and further key heads.
      tq, tk, masked: as in `Step`.
    """

    keys: Int[Array, "n"]
    base: int
    first: Int[Array, ""]
    end: Int[Array, ""]
    grid: tuple[int, int, int, int]
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


def states_of(config: Config, sizes: StepSizes, x: Inputs) -> Array | np.ndarray:
    """The states of tiles `[B|1, K|1, G|1, nq, nk]`; NumPy's where they are known."""
    tile = sizes.tq, sizes.tk
    states: Any = x.states
    if config.states is not None:
        rows = [np.frombuffer(row, np.int8) for row in config.states]
        states = np.stack(rows)[None, None, None]
    elif states is None:
        counts = sizes.Tp // tile[0], sizes.Sp // tile[1]
        xp: Any = np if math.prod(counts) <= known.MOST else jnp
        states = xp.full((1, 1, 1, *counts), FULL, np.int8)
    return tile_lists.partial_at_ends(states, tile, sizes.T, sizes.S)


def step_lists(sizes: StepSizes, states: Array | np.ndarray) -> list[StepList]:
    """The lists of steps: groups of FULL tiles, runs of other active tiles, and single ones.

    Where the states are NumPy's so are the lists, and those without a step are left out.
    """
    tq, tk = sizes.tq, sizes.tk
    traced = isinstance(states, jax.Array)
    xp: Any = jnp if traced else np
    nq, nk = states.shape[3:]
    # The query heads of one key head are computed together.
    active, all_full = (states != EMPTY).any(2), (states == FULL).all(2)
    gq, gk, run = min(nq, 2), min(nk, 2), min(nk, RUN)
    eb, eh = active.shape[:2]
    wide = xp.pad(all_full, [(0, 0), (0, 0), (0, -nq % gq), (0, -nk % gk)])
    full = wide.reshape(eb, eh, -(-nq // gq), gq, -(-nk // gk), gk).all((3, 5))
    grouped = xp.repeat(xp.repeat(full, gq, 2), gk, 3)[:, :, :nq, :nk]
    rest = active & ~grouped
    row, column = (tile_lists.along(active, axis) for axis in (2, 3))
    # How far into its stretch of neighbours a tile is, and how long that is.
    before = _running_max(xp.where(rest, np.int32(-1), column))
    after = -_running_max(xp.where(rest, np.int32(-nk), -column), reverse=True)
    place, length = column - before - 1, after - before - 1
    within = xp.fmod(place, np.int32(run))
    in_run = place - within + run <= length
    # The list that a tile begins a step of.
    of_runs = xp.where(within == 0, np.int32(_RUNS), np.int32(_NONE))
    kind = xp.where(in_run, of_runs, np.int32(_SINGLES))
    kind = xp.where(rest, kind, np.int32(_NONE))
    begins = (row % gq == 0) & (column % gk == 0)
    kind = xp.where(grouped & begins, np.int32(_GROUPS), kind)
    size = math.prod(active.shape)
    tile = xp.arange(size, dtype=np.int32).reshape(active.shape)
    keys = kind * size + tile
    if traced:
        # Without a barrier XLA would compute them again in every sum of them.
        keys = lax.optimization_barrier(keys)
    order = _sorted(keys.reshape(-1))
    if not traced:
        # A function's own constant: in JAX 0.10 `custom_partitioning` refuses those around it.
        order = jax.jit(partial(jnp.asarray, order))()
    repeats = (
        sizes.B // sizes.step_rows if eb == 1 else 1,
        sizes.K // sizes.step_heads if eh == 1 else 1,
    )
    # The queries and keys of a step, in tiles, and `masked`, of each list.
    kinds = [((gq, gk), False), ((1, run), True), ((1, 1), True)]
    lists: list[StepList] = []
    first: Any = np.int32(0)
    for n, ((by_q, by_k), masked) in enumerate(kinds[: 2 if run == 1 else 3]):
        end = (keys < (n + 1) * size).sum(dtype=np.int32)
        grid = (eb, eh, nq, nk)
        one = StepList(order, n * size, first, end, grid, repeats, tq * by_q, tk * by_k, masked)
        if traced or first < end:
            lists.append(one)
        first = end
    return lists


# The lists, in order, and what belongs to none.
_GROUPS, _RUNS, _SINGLES, _NONE = range(4)


def _running_max(array: Any, *, reverse: bool = False) -> Any:
    """The largest number up to each along the last axis, or with `reverse` from each on."""
    if isinstance(array, np.ndarray):
        way = slice(None, None, -1 if reverse else 1)
        return np.maximum.accumulate(array[..., way], 3)[..., way]
    length = array.shape[-1]
    if length > FEW:
        return lax.cummax(array, axis=3, reverse=reverse)
    # XLA compiles this as one loop, and a cumulative maximum as five.
    at, to = (lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    counts = at <= to if not reverse else at >= to
    return jnp.where(counts, array[..., None], jnp.iinfo(jnp.int32).min).max(3)


def _sorted(keys: Any) -> Any:
    """Keys, `list * n + tile`, in order; those of no list may be missing."""
    size = keys.shape[0]
    if isinstance(keys, np.ndarray):
        return np.sort(keys)[: (keys < _NONE * size).sum()]
    if not base.symbolic(size) and size <= FEW**2:
        return lax.sort(keys)
    # Sorting many takes longer than the steps. Each goes to the place that a running count says.
    kind = lax.div(keys, jnp.asarray(size, jnp.int32))
    flags = jnp.concatenate([kind == n for n in (_GROUPS, _RUNS, _SINGLES)])
    to = jnp.where(flags, jnp.cumsum(flags, dtype=jnp.int32) - 1, flags.size)
    return jnp.zeros_like(keys).at[to].set(lax.iota(jnp.int32, flags.size), mode="drop")


def loop(
    sizes: StepSizes, lists: list[StepList], compute: Callable[[Step, Any], Any], carry: Any
) -> Any:
    """Runs `carry = compute(step, carry)` over all lists, for all batch rows and key heads."""
    for one in lists:
        by_rows, by_heads = one.repeats
        once = (by_rows, by_heads) == (1, 1)

        def body(n: Any, carry: Any, one: StepList = one, once: bool = once) -> Any:
            b, h, q, k = _at(sizes, one, n, once)
            return compute(Step(b, h, q, k, one.tq, one.tk, one.masked), carry)

        if once:
            carry = lax.fori_loop(one.first, one.end, body, carry)
        else:
            carry = lax.fori_loop(0, (one.end - one.first) * (by_rows * by_heads), body, carry)
    return carry


def _at(sizes: StepSizes, one: StepList, n: Any, once: bool) -> tuple[Any, ...]:
    """Where the n-th step of a loop starts; zeros that are known are Python's.

    XLA compiles what is computed here for every loop, so only what a list needs is.
    """
    again: Any = 0
    if not once:
        count = jnp.maximum(one.end - one.first, 1)
        n, again = one.first + lax.rem(n, count), lax.div(n, count)
    key = lax.dynamic_slice(one.keys, (n,), (1,), allow_negative_indices=False)
    tile = lax.reshape(key, ()) - jnp.asarray(one.base, jnp.int32)
    eb, eh, nq, nk = one.grid
    # Of one dtype, with x64 enabled or not.
    high, wide, heads = (jnp.asarray(n, jnp.int32) for n in (nq, nk, eh))
    q, k = lax.rem(lax.div(tile, wide), high) * sizes.tq, lax.rem(tile, wide) * sizes.tk
    # Without a barrier XLA would compute them again in every operation of the step.
    q, k = lax.optimization_barrier((q, k))
    lead = lax.div(tile, high * wide)
    b: Any = 0 if eb == 1 else lax.div(lead, heads)
    h: Any = 0 if eh == 1 else lax.rem(lead, heads)
    by_rows, by_heads = one.repeats
    if not isinstance(by_rows, int) or by_rows > 1:
        b = b + lax.div(again, jnp.int32(by_heads)) * sizes.step_rows
    if by_heads > 1:
        h = h + lax.rem(again, jnp.int32(by_heads)) * sizes.step_heads
    return b, h, q, k

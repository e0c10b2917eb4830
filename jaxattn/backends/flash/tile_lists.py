"""Which tiles a kernel visits: for every row of tiles, the active ones, PARTIAL ones first.

A program of a kernel computes one row of tiles, in two loops over its list: one over PARTIAL tiles,
with the mask, and one over FULL tiles, without. From the states of tiles of one size follow those
of other sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...shapes import Array, Int
from ...tiles.tile_map import EMPTY, FULL, PARTIAL


class Lists(NamedTuple):
    """Active tiles of every row of tiles.

    Attributes:
      tile: int32 `[B|1, K|1, G|1, rows, columns]`, the columns of a row's active tiles: PARTIAL
        ones, then FULL ones, then EMPTY ones, which are not to be read.
      ends: int32 `[B|1, K|1, G|1, rows, 2]`, where PARTIAL tiles end, and where FULL ones do.
    """

    tile: Int[Array, "b k g rows columns"]
    ends: Int[Array, "b k g rows 2"]


def states_of(
    states: Int[Array | np.ndarray, "b k g nq nk"] | None,
    given: tuple[int, int],
    wanted: tuple[int, int],
    T: int,
    S: int,
) -> Any:
    """States of tiles of the size `wanted`, from those of the size `given`.

    Along each axis one size divides the other, or one tile covers everything. Tiles that reach
    beyond the end are PARTIAL at most: the mask has to hide what is beyond it.

    Args:
      states: those of grouped `Inputs`; None where every tile is FULL. Those of NumPy stay NumPy's
        if the sizes are the same.
      given, wanted: queries and keys of a tile.
      T, S: numbers of queries and keys.
    """
    counts = [-(-length // n) for length, n in zip((T, S), wanted, strict=True)]
    found: Any = states
    if states is None:
        found = jnp.full((1, 1, 1, *counts), FULL, jnp.int8)
    else:
        for axis, old, new, count in zip((3, 4), given, wanted, counts, strict=True):
            found = _resized(found, axis, old, new, count)
    xp: Any = jnp if isinstance(found, jax.Array) else np
    last = xp.minimum(found, np.int8(PARTIAL))
    for axis, length, n, count in zip((3, 4), (T, S), wanted, counts, strict=True):
        if length % n:
            at = np.arange(count).reshape((1, 1, 1, -1, 1) if axis == 3 else (1, 1, 1, 1, -1))
            found = xp.where(at == count - 1, last, found)
    return found


def _resized(states: Any, axis: int, old: int, new: int, count: int) -> Any:
    extent = states.shape[axis]
    if extent == count and old == new:
        return states
    if extent == 1 or old % new == 0:
        # Each of the smaller tiles has the state of the tile that contains it.
        states = jnp.repeat(states, count if extent == 1 else old // new, axis)
        return lax.slice_in_dim(states, 0, count, axis=axis)
    widths = [(0, 0)] * states.ndim
    widths[axis] = (0, count * (new // old) - extent)
    states = jnp.pad(states, widths, mode="edge")
    parts = states.reshape(*states.shape[:axis], count, new // old, *states.shape[axis + 1 :])
    least, most = parts.min(axis + 1), parts.max(axis + 1)
    return jnp.where(least == most, least, jnp.int8(PARTIAL))


def rows(states: Int[Array, "b k g rows columns"]) -> Lists:
    """The lists of active tiles of every row; of every column, for `jnp.swapaxes(states, 3, 4)`."""
    order = jnp.where(states == EMPTY, jnp.int8(FULL + 1), states)
    # Stable, so that tiles stay in the order of their keys, which caches and prefetching prefer.
    tile = jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)
    ends = [(order <= kind).sum(-1, dtype=jnp.int32) for kind in (PARTIAL, FULL)]
    return Lists(tile, jnp.stack(ends, -1))

"""Which tiles a kernel visits: for every row of tiles, the active ones, PARTIAL ones first.

A program of a kernel computes one row of tiles, in two loops over its list: one over PARTIAL tiles,
with the mask, and one over FULL tiles, without. From the states of tiles of one size follow those
of other sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...shapes import Array, Int
from ...tiles.tile_map import EMPTY, FULL, PARTIAL

# Arrays of JAX, or of NumPy.
Arrays = TypeVar("Arrays", Array, np.ndarray)


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
    states: Int[Array, "b k g nq nk"] | None,
    given: tuple[int, int],
    wanted: tuple[int, int],
    T: int,
    S: int,
) -> Int[Array, "b k g rows columns"]:
    """States of tiles of the size `wanted`, from those of the size `given`.

    Along each axis one size divides the other, or one tile covers everything.

    Args:
      states: those of grouped `Inputs`; None where every tile is FULL.
      given, wanted: queries and keys of a tile.
      T, S: numbers of queries and keys.
    """
    counts = [-(-length // n) for length, n in zip((T, S), wanted, strict=True)]
    if states is None:
        states = jnp.full((1, 1, 1, *counts), FULL, jnp.int8)
    else:
        for axis, old, new, count in zip((3, 4), given, wanted, counts, strict=True):
            states = _resized(states, axis, old, new, count)
    return partial_at_ends(states, wanted, T, S)


def partial_at_ends(
    states: Int[Arrays, "b k g rows columns"], tile: tuple[int, int], T: int, S: int
) -> Int[Arrays, "b k g rows columns"]:
    """States where tiles that reach beyond the end are PARTIAL at most: the mask has to hide that.

    Those of NumPy stay NumPy's.
    """
    xp: Any = jnp if isinstance(states, jax.Array) else np
    last = xp.minimum(states, np.int8(PARTIAL))
    for axis, length, n in zip((3, 4), (T, S), tile, strict=True):
        if length % n:
            at = along(states, axis)
            states = xp.where(at == states.shape[axis] - 1, last, states)
    return states


def along(array: Arrays, axis: int) -> Arrays:
    """0, 1, 2, ... along an axis of an array, of extent 1 along others; NumPy's for NumPy's.

    Made by XLA for JAX's: `custom_partitioning` of JAX 0.10 refuses arrays from around it.
    """
    extents = [n if i == axis else 1 for i, n in enumerate(array.shape)]
    if isinstance(array, jax.Array):
        return lax.broadcasted_iota(jnp.int32, extents, axis)
    return np.arange(array.shape[axis], dtype=np.int32).reshape(extents)


def _resized(states: Array, axis: int, old: int, new: int, count: int) -> Array:
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

"""Where two masks differ: `jaxattn.masks.diff`."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ..masks.mask import Mask, MaskLike, as_mask
from ..masks.positions import Positions
from ..tiles.tile_map import EMPTY, tile_map
from .cells import check_row_and_head, sizes, tile_of
from .text import CELLS, GRID, grid_of

# Masks of at most this many pairs are compared pair by pair; larger ones by bounds first.
_COMPARED = 2**22


@dataclass(frozen=True)
class Diff:
    """Where two masks differ, to be printed.

    Attributes:
      same: whether the same pairs are visible in both.
      first: the first pair `(q, k)`, by query, that is visible in only one; None without any.
      text: what is printed.
    """

    same: bool
    first: tuple[int, int] | None
    text: str

    def __bool__(self) -> bool:
        return not self.same

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def diff(
    first: MaskLike,
    second: MaskLike,
    T: int,
    S: int | None = None,
    *,
    b: int = 0,
    h: int = 0,
    color: bool | None = None,
) -> Diff:
    """The work of `jaxattn.masks.diff`, whose docstring describes it."""
    left, right = as_mask(first, "first"), as_mask(second, "second")
    T, S = sizes(left, T, T if S is None else S, "diff")
    for mask in (left, right):
        check_row_and_head(mask, b, h, "diff")
    at = Positions(b=jnp.array([b]), h=jnp.array([h]))
    if T * S <= _COMPARED:
        mine, other = (np.asarray(m.dense(T, S, positions=at))[0, 0] for m in (left, right))
        differ = mine != other
        if not differ.any():
            return Diff(True, None, f"the same {int(mine.sum())} of {T * S} pairs")
        q, k = (int(n) for n in np.argwhere(differ)[0])
        count = f"{int(differ.sum())} of {T * S} pairs differ"
        tile = tile_of(T, S, CELLS, GRID)
        only = mine & differ, other & differ
    else:
        tile = tile_of(T, S, CELLS, GRID)
        either = left ^ right
        shapes = (1, T, 1, 1), (1, S, 1, 1)
        found = tile_map(either, *shapes, positions=at, tile=tile)
        if (np.asarray(found.states) == EMPTY).all():
            return Diff(True, None, f"the same pairs of {T * S}")
        found = tile_map(either, *shapes, positions=at, tile=tile, exact=True)
        states = np.asarray(found.states)[0, 0]
        if (states == EMPTY).all():
            return Diff(True, None, f"the same pairs of {T * S}")
        q, k = _first(either, states, tile, T, S, at)
        count = f"{int((states != EMPTY).sum())} of {states.size} tiles of {tile} differ"
        only = None
    holds = bool(left(b, h, jnp.int32(q), jnp.int32(k)))
    name = "first" if holds else "second"
    title = f"{count}; the first: query {q}, key {k}, which only the {name} mask allows"
    if only is None:
        signs = np.where(states == EMPTY, "·", "±")
    elif tile == (1, 1):
        signs = np.where(only[0], "-", np.where(only[1], "+", np.where(mine, "█", "·")))
    else:
        removed, added = (_any(flags, tile) for flags in only)
        signs = np.where(removed & added, "±", np.where(removed, "-", np.where(added, "+", "·")))
    return Diff(False, (q, k), "\n".join([title, *grid_of(signs, None, color)]))


def _first(
    either: Mask, states: np.ndarray, tile: tuple[int, int], T: int, S: int, at: Positions
) -> tuple[int, int]:
    """The first visible pair, by query, in the tiles that are not EMPTY."""
    line = int(np.argmax((states != EMPTY).any(1)))
    rows = np.arange(line * tile[0], min(line * tile[0] + tile[0], T))
    found = (T, S)  # beyond all of them
    for j in np.flatnonzero(states[line] != EMPTY):
        columns = np.arange(int(j) * tile[1], min(int(j) * tile[1] + tile[1], S))
        here = Positions(b=at.b, h=at.h, q=jnp.asarray(rows), k=jnp.asarray(columns))
        pairs = np.argwhere(either.dense(len(rows), len(columns), positions=here)[0, 0])
        q, k = pairs[0] + (rows[0], columns[0])
        found = min(found, (int(q), int(k)))
    return found


def _any(flags: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Whether any pair of each tile is flagged."""
    pad = [(0, -n % t) for n, t in zip(flags.shape, tile, strict=True)]
    wide = np.pad(flags, pad)
    lines, columns = (n // t for n, t in zip(wide.shape, tile, strict=True))
    return np.asarray(wide.reshape(lines, tile[0], columns, tile[1]).any((1, 3)))

"""Pictures of masks in text: `mask.show(T, S)`, and where two masks differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from .algebra import Mask, MaskLike, as_mask
from .cells import cells, check_row_and_head, sizes, tile_of
from .foreign import VIEWS, answers
from .positions import Positions
from .tiles import EMPTY, FULL, PARTIAL, tile_map

# Up to so many queries and keys every pair is a cell; beyond, a cell is a tile.
_CELLS = 64
# A screen of a terminal: lines, and cells of two characters in a line.
_GRID = 32, 64
# Masks of so many pairs are compared pair by pair; larger ones by bounds first.
_COMPARED = 2**22

_SIGNS = {EMPTY: "·", PARTIAL: "▒", FULL: "█"}
_COLORS = {
    EMPTY: "\x1b[2m",
    PARTIAL: "\x1b[33m",
    FULL: "\x1b[32m",
    "-": "\x1b[31m",
    "+": "\x1b[36m",
}


@answers(VIEWS, "show")
def text(
    mask: MaskLike,
    /,
    T: int | None = None,
    S: int | None = None,
    *,
    b: int = 0,
    h: int = 0,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
    color: bool | None = None,
) -> str:
    """A mask as a picture in text: queries go down, keys go across.

    Args:
      mask: a mask, a callable `(b, h, q, k) -> bool`, or a boolean array.
      T, S: numbers of queries and of keys. By default what the mask's arrays say, else four times
        its largest number (a window, a chunk, a prefix), at least 16: enough to show its shape.
      b, h: batch row and query head.
      labels: a word for each query and for each key, where every pair has a cell.
      color: whether to colour by ANSI codes; by default on a terminal, unless `NO_COLOR` is set.

    Up to 64 by 64, every pair is a cell, `█` where the query may see the key and `·` where not.
    Beyond, a cell is a tile, `▒` where it is mixed or may be; bounds decide, nothing of T x S is
    built.

    Raises:
      TypeError: for a batch row or a head that is not an integer.
      ValueError: for sizes below 1 or not those of the mask's arrays, for a row or a head
        that these do not have, and for labels that do not fit.

    Example:
      >>> from jaxattn import masks
      >>> masks.causal().show(3)
      causal(), 3 queries, 3 keys: 6 of 9 pairs, 66.7%
      ██ · ·
      ████ ·
      ██████
    """
    whole = as_mask(mask)
    found = cells(whole, T, S, b, h, most=_CELLS, grid=_GRID, name="show")
    title = f"{whole!r}, {found.caption()}"
    signs = np.vectorize(_SIGNS.get)(found.states)
    return "\n".join([title, *_grid(signs, labels if found.exact else None, color)])


@dataclass(frozen=True)
class Diff:
    """Where two masks differ, to be printed.

    Attributes:
      same: whether they allow the same pairs.
      first: the first pair `(q, k)`, by query, that only one of them allows; None without any.
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
    """`jaxattn.masks.diff`, which says what it does."""
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
        tile = tile_of(T, S, _CELLS, _GRID)
        only = mine & differ, other & differ
    else:
        tile = tile_of(T, S, _CELLS, _GRID)
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
    return Diff(False, (q, k), "\n".join([title, *_grid(signs, None, color)]))


def _first(
    either: Mask, states: np.ndarray, tile: tuple[int, int], T: int, S: int, at: Positions
) -> tuple[int, int]:
    """The first pair, by query, that is allowed in the tiles that are not empty."""
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


def _grid(
    signs: np.ndarray, labels: tuple[Sequence[str], Sequence[str]] | None, color: bool | None
) -> list[str]:
    """Lines of cells; two characters a cell, as a character is twice as high as wide."""
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    states = {sign: state for state, sign in _SIGNS.items()}

    def cell(sign: str) -> str:
        wide = sign * 2 if sign in "█▒" else f" {sign}"
        code = _COLORS.get(states.get(sign, sign), "")
        return f"{code}{wide}\x1b[0m" if color and code else wide

    lines = ["".join(map(cell, line)) for line in signs]
    if labels is None:
        return lines
    for name, given, count in zip(("queries", "keys"), labels, signs.shape, strict=True):
        if len(given) != count:
            raise ValueError(f"show(labels): got {len(given)} for the {name}, expected {count}")
    width = max(map(len, labels[0]))
    height = max(map(len, labels[1]))
    # The keys' words stand upright above their columns.
    head = [
        " " * (width + 1) + "".join(f" {word.rjust(height)[i]}" for word in labels[1])
        for i in range(height)
    ]
    return head + [
        f"{word.rjust(width)} {line}" for word, line in zip(labels[0], lines, strict=True)
    ]

"""Pictures of masks in text: `mask.show(T, S)`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np

from ..checks.foreign_names import VIEWS, with_remedies
from ..checks.options import optional_flag
from ..masks.mask import MaskLike, as_mask
from ..tiles.tile_map import EMPTY, FULL, PARTIAL
from .cells import cells, words

# With at most this many queries and keys every pair is a cell; beyond, a cell is a tile.
CELLS = 64
# The screen of a terminal: its lines, and the cells of two characters in a line.
GRID = 32, 64

_SIGNS = {EMPTY: "·", PARTIAL: "▒", FULL: "█"}
_COLORS = {
    EMPTY: "\x1b[2m",
    PARTIAL: "\x1b[33m",
    FULL: "\x1b[32m",
    "-": "\x1b[31m",
    "+": "\x1b[36m",
}


@with_remedies(VIEWS, "show")
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
      T, S: numbers of queries and of keys. By default the extents of the mask's arrays, else four
        times its largest number (a window, a chunk, a prefix), and at least 16.
      b, h: batch row and query head.
      labels: a word for each query and for each key; shown where every pair has a cell.
      color: whether to colour by ANSI codes; by default on a terminal, unless `NO_COLOR` is set.

    Up to 64 by 64, every pair is a cell: `█` where the query may see the key, `·` where not.
    Beyond, a cell is a tile, `▒` where it is mixed or may be. Its state is found from bounds; no
    array T x S is built.

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
    found = cells(whole, T, S, b, h, most=CELLS, grid=GRID, name="show")
    labels = words(labels, found.T, found.S, "show")
    title = f"{whole!r}, {found.caption()}"
    signs = np.vectorize(_SIGNS.get)(found.states)
    return "\n".join([title, *grid_of(signs, labels if found.exact else None, color)])


def grid_of(
    signs: np.ndarray, labels: tuple[Sequence[str], Sequence[str]] | None, color: bool | None
) -> list[str]:
    """Lines of cells; two characters a cell, as a character is twice as high as wide."""
    color = optional_flag(color, "color")
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

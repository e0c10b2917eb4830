"""Pictures of masks as HTML: a cell says why the pair is visible or masked when pointed at."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

import jax
import numpy as np

from ..checks.foreign_names import VIEWS, with_remedies
from ..masks.mask import Mask, MaskLike, as_mask
from ..masks.results import Html
from ..tiles.tile_map import EMPTY, FULL, PARTIAL
from .cells import COLORS, Cells, cells, parts, words
from .why import Asked

# With at most this many queries and keys every pair is a cell; a megabyte of text at most.
_CELLS, _GRID = 64, (64, 64)
# Sizes of a picture and of the largest cell, in pixels.
_SIDE, _CELL = 320, 24

_NAMES = {EMPTY: "none may be seen", PARTIAL: "some may be seen", FULL: "all may be seen"}


Labels: TypeAlias = tuple[Sequence[str], Sequence[str]] | None


@with_remedies(VIEWS, "html")
def html(
    mask: MaskLike,
    /,
    T: int | None = None,
    S: int | None = None,
    *,
    b: int = 0,
    h: int = 0,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Html:
    """A mask as self-contained HTML: a cell that is pointed at shows the text of `mask.why`.

    Args:
      mask: a mask, a callable `(b, h, q, k) -> bool`, or a boolean array.
      T, S: numbers of queries and of keys. By default the extents of the mask's arrays, else four
        times its largest number (a window, a chunk, a prefix), and at least 16.
      b, h: batch row and query head.
      labels: a word for each query and for each key; shown where every pair has a cell.

    The parts of a composed mask are drawn beside the whole mask. Up to 64 by 64, every pair is a
    cell; beyond, a cell is a tile, whose state is found from bounds.

    Raises:
      TypeError: for a mask whose arrays are traced, and for a batch row or a head that is not an
        integer.
      ValueError: for sizes below 1 or not those of the mask's arrays, for a row or a head
        that these do not have, and for labels that do not fit.

    Example:
      >>> from jaxattn import masks
      >>> page = masks.causal().html(4)
      >>> "query 0 may not see key 1" in page
      True
    """
    whole = as_mask(mask)
    found = _cells(whole, T, S, b, h)
    labels = words(labels, found.T, found.S, "html")
    sign, pieces = parts(whole, h)
    figures = [
        _figure(f"{sign if n or sign == '~' else ''} {piece!r}".strip(), piece, shown, labels)
        for n, piece in enumerate(pieces)
        for shown in [_cells(piece, found.T, found.S, b, h)]
    ]
    title = f"= {whole!r}" if pieces else repr(whole)
    figures.append(_figure(title, whole, found, labels))
    style = "display:flex;flex-wrap:wrap;gap:16px;font:12px sans-serif"
    return Html(f'<div style="{style}">{"".join(figures)}</div>')


def default(mask: Mask) -> str | None:
    """What a notebook shows for a mask, or None for a traced one."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(mask)):
        return None
    return html(mask)


def _cells(mask: Mask, T: int | None, S: int | None, b: int, h: int) -> Cells:
    return cells(mask, T, S, b, h, most=_CELLS, grid=_GRID, name="html")


def _figure(title: str, mask: Mask, found: Cells, labels: Labels) -> str:
    lines, columns = found.states.shape
    side = min(_CELL, max(2, _SIDE // max(lines, columns)))
    said = _words(mask, found)
    gap = 1 if side > 6 else 0
    cells = "".join(
        f'<rect x="{j * side}" y="{i * side}" width="{side - gap}" height="{side - gap}" '
        f'fill="{COLORS[int(state)]}"><title>{escape(said[i][j])}</title></rect>'
        for (i, j), state in np.ndenumerate(found.states)
    )
    left, top, marks = _marks(found, labels, side)
    size = f'width="{left + columns * side}" height="{top + lines * side}"'
    return (
        f'<figure style="margin:0;max-width:{max(_SIDE, left + columns * side)}px">'
        f"<code>{escape(title)}</code>"
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="display:block;margin:4px 0">'
        f'{marks}<g transform="translate({left} {top})">{cells}</g></svg>'
        f"<figcaption>{escape(found.caption())}</figcaption></figure>"
    )


def _words(mask: Mask, found: Cells) -> list[list[str]]:
    """The text of each cell."""
    lines, columns = found.states.shape
    if found.exact:
        asked = Asked(mask, np.arange(found.T), np.arange(found.S), found.b, found.h)
        return [[str(asked.why(i, j)) for j in range(columns)] for i in range(lines)]

    def stretch(n: int, size: int, extent: int) -> str:
        return f"{n * size} to {min(n * size + size, extent) - 1}"

    return [
        [
            f"queries {stretch(i, found.tile[0], found.T)}, keys "
            f"{stretch(j, found.tile[1], found.S)}: {_NAMES[int(found.states[i, j])]}"
            for j in range(columns)
        ]
        for i in range(lines)
    ]


def _marks(found: Cells, labels: Labels, side: int) -> tuple[int, int, str]:
    """The space for labels on the left and on top, and their SVG."""
    if labels is None or not found.exact:
        return 0, 0, ""
    left, top = (7 * max(map(len, each)) + 6 for each in labels)
    queries = "".join(
        f'<text x="{left - 4}" y="{top + side * (n + 0.7)}" text-anchor="end">{escape(w)}</text>'
        for n, w in enumerate(labels[0])
    )
    keys = "".join(
        f'<text transform="translate({left + side * (n + 0.7)} {top - 4}) rotate(-90)">'
        f"{escape(w)}</text>"
        for n, w in enumerate(labels[1])
    )
    return left, top, queries + keys

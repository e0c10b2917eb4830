"""Pictures of masks by matplotlib: `mask.plot(ax, T, S)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checks.arrays import described
from ..checks.foreign_names import VIEWS, with_remedies
from ..masks.mask import Mask, MaskLike, as_mask
from ..shapes import Array, Float
from ..tiles.tile_map import EMPTY, FULL, PARTIAL, TileMap, tile_map
from .cells import COLORS, Cells, cells, parts, words

# With at most this many queries and keys every pair is a cell: as many as a figure can show.
_CELLS, _GRID = 256, (128, 128)

_NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}

# The width of a panel in inches.
_PANEL = 3.6


@with_remedies(VIEWS, "plot")
def plot(
    mask: MaskLike,
    /,
    ax: Any = None,
    T: int | None = None,
    S: int | None = None,
    *,
    b: int = 0,
    h: int = 0,
    labels: tuple[Sequence[str], Sequence[str]] | None = None,
    tiles: TileMap | int | tuple[int, int] | None = None,
    weights: Float[Array | np.ndarray, "..."] | None = None,
) -> Any:
    """A mask as a picture: queries go down, keys go across.

    Args:
      mask: a mask, a callable `(b, h, q, k) -> bool`, or a boolean array.
      ax: the axes to draw into. By default a new figure is made; it shows the parts of a composed
        mask beside the whole mask.
      T, S: numbers of queries and of keys. By default the extents of the mask's arrays, else four
        times its largest number (a window, a chunk, a prefix), and at least 16.
      b, h: batch row and query head.
      labels: a word for each query and for each key; shown where every pair has a cell.
      tiles: a `TileMap`, or the size of a tile: drawn over the mask, each coloured by its state.
      weights: attention weights `[T, S]`, or `[N, T, S]` or `[B, N, T, S]`, of which row `b` and
        head `h` are shown: drawn over the mask. A weight of 0 is not drawn.

    Returns:
      The axes of the whole mask; its figure is `.figure`.

    Up to 256 by 256, every pair is a cell. Beyond, a cell is a tile, whose state is found from
    bounds; no array T x S is built.

    Raises:
      ImportError: without matplotlib, which `pip install "jaxattn[plot]"` brings.
      TypeError: for a batch row or a head that is not an integer.
      ValueError: for sizes below 1 or not those of the mask's arrays, for a row or a head
        that these do not have, for labels or weights that do not fit, and for a `TileMap` made for
        other sizes.
    """
    whole = as_mask(mask)
    found = _cells(whole, T, S, b, h)
    labels = words(labels, found.T, found.S, "plot")
    if weights is not None:
        weights = _weights(weights, found)
    if ax is not None and not hasattr(ax, "imshow"):
        raise TypeError(f"plot(ax): got {described(ax)}, expected axes of matplotlib, or None")
    if ax is None:
        ax = _panels(whole, found, labels)
    _draw(ax, found, labels)
    if weights is not None:
        _draw_weights(ax, weights, found)
    if tiles is not None:
        _draw_tiles(ax, whole, tiles, found)
    ax.set_title(_short(repr(whole)), fontsize=10)
    ax.set_xlabel("key\n" + found.caption().replace(": ", "\n"), fontsize=8)
    ax.set_ylabel("query", fontsize=8)
    return ax


def _cells(mask: Mask, T: int | None, S: int | None, b: int, h: int) -> Cells:
    return cells(mask, T, S, b, h, most=_CELLS, grid=_GRID, name="plot")


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'plot: needs matplotlib; pip install "jaxattn[plot]" brings it, and mask.show() prints '
            "the picture as text"
        ) from error
    return plt


def _panels(whole: Mask, found: Cells, labels: Any) -> Any:
    """Draws the parts in a new figure, and returns the axes for the whole."""
    sign, pieces = parts(whole, found.h)
    count = len(pieces) + 1
    _, axes = _pyplot().subplots(
        1, count, figsize=(_PANEL * count, _PANEL * 1.15), layout="constrained", squeeze=False
    )
    for n, (ax, piece) in enumerate(zip(axes[0], pieces, strict=False)):
        shown = _cells(piece, found.T, found.S, found.b, found.h)
        _draw(ax, shown, labels)
        before = sign if n or sign == "~" else ""
        ax.set_title(f"{before} {_short(repr(piece))}".strip(), fontsize=10)
    if pieces:
        axes[0][-1].set_title("=")
    return axes[0][-1]


def _draw(ax: Any, found: Cells, labels: tuple[Sequence[str], Sequence[str]] | None) -> None:
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([COLORS[state] for state in (EMPTY, PARTIAL, FULL)])
    # In positions, not in cells, so that tiles and weights fit at any size of a cell.
    extent = (-0.5, found.S - 0.5, found.T - 0.5, -0.5)
    lines, columns = (n * t for n, t in zip(found.states.shape, found.tile, strict=True))
    ax.imshow(
        found.states,
        cmap=colors,
        vmin=EMPTY,
        vmax=FULL,
        interpolation="nearest",
        aspect="auto" if max(found.T, found.S) > 8 * min(found.T, found.S) else "equal",
        extent=(-0.5, columns - 0.5, lines - 0.5, -0.5),
    )
    ax.set(xlim=extent[:2], ylim=extent[2:])
    if found.exact and max(found.T, found.S) <= 32:
        # Lines between the cells, where there is room for them.
        ax.set_xticks(np.arange(found.S + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(found.T + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(which="both", length=0, labelsize=8)
    if labels is None or not found.exact:
        return
    ax.set_yticks(range(found.T), labels[0])
    ax.set_xticks(range(found.S), labels[1], rotation=90)


def _weights(given: Any, found: Cells) -> np.ndarray:
    try:
        array = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"plot(weights): got {described(given)}, expected numbers [T, S]"
        ) from error
    if array.ndim == 4 and found.b < array.shape[0]:
        array = array[found.b]
    if array.ndim == 3 and found.h < array.shape[0]:
        array = array[found.h]
    if array.shape != (found.T, found.S):
        raise ValueError(
            f"plot(weights): got shape {list(np.shape(given))}, expected [T, S] = [{found.T}, "
            f"{found.S}], or [N, T, S] or [B, N, T, S] with row {found.b} and head {found.h}"
        )
    return array


def _draw_weights(ax: Any, weights: np.ndarray, found: Cells) -> None:
    # Weights of 0 are transparent, so that a weight on a masked pair would stand out.
    hidden = weights == 0
    extent = (-0.5, found.S - 0.5, found.T - 0.5, -0.5)
    picture = ax.imshow(
        np.ma.masked_array(weights, hidden), cmap="magma_r", vmin=0, extent=extent, aspect="auto"
    )
    ax.figure.colorbar(picture, ax=ax, shrink=0.8, label="weight")


def _draw_tiles(ax: Any, mask: Mask, given: Any, found: Cells) -> None:
    from matplotlib.patches import Patch, Rectangle

    if isinstance(given, TileMap):
        if given.sizes[2:] != (found.T, found.S):
            raise ValueError(
                f"plot(tiles): got a TileMap of {given.sizes[2]} queries and {given.sizes[3]} "
                f"keys, expected {found.T} and {found.S}"
            )
        tiled = given
        states = np.asarray(given.states)
        states = states[min(found.b, len(states) - 1), min(found.h, states.shape[1] - 1)]
    else:
        tiled = tile_map(
            mask,
            (found.b + 1, found.T, found.h + 1, 1),
            (found.b + 1, found.S, found.h + 1, 1),
            tile=given,
        )
        states = np.asarray(tiled.states)[-1, -1]
    tile_q, tile_k = tiled.tile
    for (i, j), state in np.ndenumerate(states):
        color = COLORS[int(state)]
        corner, size = (j * tile_k - 0.5, i * tile_q - 0.5), (tile_k, tile_q)
        ax.add_patch(Rectangle(corner, *size, facecolor=color, alpha=0.35, edgecolor="none"))
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#333333", linewidth=0.7))
    legend = [
        Patch(color=COLORS[state], label=f"{int((states == state).sum())} {_NAMES[state]}")
        for state in (FULL, PARTIAL, EMPTY)
    ]
    ax.legend(handles=legend, fontsize=7, loc="upper right", title="tiles", title_fontsize=7)


def _short(text: str, most: int = 46) -> str:
    """A title that fits its panel."""
    return text if len(text) <= most else f"{text[: most - 1]}…"

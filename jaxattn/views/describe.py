"""The words for a mask: `jaxattn.masks.describe`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checks.integers import concrete, plain
from ..describing.evaluate import cells_of, evaluated
from ..describing.search import described, nearest
from ..masks.mask import Mask, MaskLike, PerHead, as_mask, dense, parts_of
from ..masks.results import Description
from ..shapes import Bool
from ..tiles.tile_map import TileMap
from .cells import extents, sizes
from .diff import diff

# The search passes over all pairs a few hundred times.
_MOST = 2**22


def describe(
    observed: MaskLike,
    T: int | None = None,
    S: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
) -> Description:
    """The work of `jaxattn.masks.describe`, whose docstring describes it."""
    array = _observed(observed, T, S, batch, heads)
    # A row or a head that is like all others is described once.
    for axis in (0, 1):
        first = array.take([0], axis=axis)
        array = first if (array == first).all() else array
    _check_size(array.shape)
    found = described(array)
    term = nearest(array) if found is None else found
    mask = evaluated(term.text)
    B, N, T, S = array.shape
    differ = cells_of(mask, (B, N, T, S)) != array
    cells = np.argwhere(differ)
    if not len(cells):
        lines = [term.text, f"equal on all {array.size} pairs"]
    else:
        b, h = (int(at) for at in cells[0, :2])
        lines = [
            term.text,
            f"nothing fits exactly: this is the nearest, and differs in {len(cells)} of "
            f"{array.size} pairs" + (f"; those of row {b}, head {h}:" if B * N > 1 else ":"),
            str(diff(dense(differ[b, h] ^ array[b, h]), dense(array[b, h]), T, S)),
        ]
    return Description(term.text, mask, not len(cells), cells, "\n".join(lines))


def _observed(
    given: Any, T: int | None, S: int | None, batch: int | None, heads: int | None
) -> Bool[np.ndarray, "B N T S"]:
    """What is described, as an array."""
    mask = as_mask(given, "describe(observed)")
    for name, size in (("batch", batch), ("heads", heads)):
        if size is not None:
            plain(size, f"describe({name})", 1)
    if isinstance(given, Mask) or not hasattr(given, "shape"):
        T, S = sizes(mask, T, S, "describe")
        B = extents(mask).get("b", 1) if batch is None else batch
        N = _heads(mask) if heads is None else heads
        if isinstance(mask, TileMap):
            mask = mask.mask
        _check_size((B, N, T, S))
        values = mask.dense(T, S, batch=B, heads=N)
    else:
        values = given
    array = concrete(values)
    if array is None:
        raise TypeError(
            f"describe(observed): got {mask!r} without known values, as inside jit; expected "
            "known ones: describe it outside, or return it"
        )
    if array.ndim == 2:
        array = array[None, None]
    wanted = zip(("batch", "heads", "T", "S"), (batch, heads, T, S), array.shape, strict=True)
    for name, size, extent in wanted:
        if size is not None and extent not in (size, 1):
            raise ValueError(
                f"describe({name}): got {size} for an array of shape {list(np.shape(values))}, "
                f"expected {extent}, or leave it out"
            )
    shape = tuple(
        extent if size is None else size
        for size, extent in zip((batch, heads, T, S), array.shape, strict=True)
    )
    if 0 in shape:
        raise ValueError(
            f"describe(observed): got an array of shape {list(np.shape(values))}, expected at "
            "least one query and one key"
        )
    return np.broadcast_to(array, shape)


def _heads(mask: Mask) -> int:
    """The number of heads that the arrays of a mask have, or its `per_head`; 1 without either."""
    if isinstance(mask, PerHead):
        return len(mask.parts)
    return max([extents(mask).get("h", 1), *map(_heads, parts_of(mask))])


def _check_size(shape: tuple[int, ...]) -> None:
    if np.prod(shape) > _MOST:
        B, N, T, S = shape
        raise ValueError(
            f"describe: got {T} queries and {S} keys in {B} rows and {N} heads, expected at most "
            f"{_MOST} pairs in all: say a smaller T and S, or give a corner of the array, "
            "array[..., :512, :512]"
        )

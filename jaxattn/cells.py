"""What every picture of a mask is made of: cells, each a pair of positions or a tile of many."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .algebra import And, Mask, Not, Or, PerHead, Positions, Xor, tokens_of
from .hoist import hoist
from .shapes import Int
from .split import split
from .tiles import EMPTY, FULL, PARTIAL, TileMap, tile_map

# Of cells, in pictures that have colours: told apart without any, too, by how light they are.
COLORS = {EMPTY: "#f4f1ec", PARTIAL: "#f0b429", FULL: "#1f7a8c"}

_SIGNS = {And: "&", Or: "|", Xor: "^"}


class Cells(NamedTuple):
    """The cells of a picture: queries go down, keys go across.

    Attributes:
      states: EMPTY, PARTIAL or FULL, of each cell.
      tile: queries and keys of a cell; (1, 1) where every pair has its own.
      T, S: numbers of queries and of keys.
      b, h: the batch row and the query head.
    """

    states: Int[np.ndarray, "lines columns"]
    tile: tuple[int, int]
    T: int
    S: int
    b: int
    h: int

    @property
    def exact(self) -> bool:
        """Whether every pair has a cell of its own."""
        return self.tile == (1, 1)

    def density(self) -> tuple[float, float]:
        """The least and the largest share of pairs that may be allowed; equal where exact."""
        extents = zip(self.tile, (self.T, self.S), self.states.shape, strict=True)
        q, k = (np.minimum(size, n - size * np.arange(count)) for size, n, count in extents)
        area = np.outer(q, k) / (self.T * self.S)
        full, some = self.states == FULL, self.states != EMPTY
        return float((area * full).sum()), float((area * some).sum())

    def caption(self) -> str:
        """Sizes, and how many pairs are allowed."""
        where = f", row {self.b}, head {self.h}" if (self.b, self.h) != (0, 0) else ""
        least, most = self.density()
        if self.exact:
            seen = int((self.states == FULL).sum())
            pairs = f"{seen} of {self.T * self.S} pairs, {least:.1%}"
        else:
            pairs = f"{least:.1%} to {most:.1%} of the pairs; a cell is {self.tile[0]} by "
            pairs += str(self.tile[1])
        return f"{self.T} queries, {self.S} keys{where}: {pairs}"


def cells(
    mask: Mask,
    T: int | None,
    S: int | None,
    b: int,
    h: int,
    *,
    most: int,
    grid: tuple[int, int],
    name: str,
) -> Cells:
    """The cells of a picture.

    Args:
      mask: what is shown.
      T, S: numbers of queries and of keys; None for what the mask's arrays say, else 16.
      b, h: batch row and query head.
      most: up to so many queries and keys every pair is a cell.
      grid: beyond, at most so many lines and columns of cells, whose states bounds decide: nothing
        of T x S is built.
      name: of the caller, for errors.

    Raises:
      ValueError: for sizes below 1 or not those of the mask's arrays.
    """
    T, S = sizes(mask, T, S, name)
    tile, at = tile_of(T, S, most, grid), Positions(b=jnp.array([b]), h=jnp.array([h]))
    if tile == (1, 1):
        dense = np.asarray(mask.dense(T, S, positions=at))[0, 0]
        return Cells(np.where(dense, FULL, EMPTY), tile, T, S, b, h)
    found = tile_map(mask, (1, T, 1, 1), (1, S, 1, 1), positions=at, tile=tile)
    return Cells(np.asarray(found.states)[0, 0], tile, T, S, b, h)


def tile_of(T: int, S: int, most: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Queries and keys of a cell; see `cells`."""
    if max(T, S) <= most:
        return 1, 1
    return -(-T // grid[0]), -(-S // grid[1])


def sizes(mask: Mask, T: int | None, S: int | None, name: str) -> tuple[int, int]:
    """Numbers of queries and of keys, those that are not said by the mask's arrays."""
    extents: dict[str, int] = {}
    if T is None or S is None:
        plan = split(hoist(mask), Positions()).plan
        extents = {extent.position: extent.extent for _, extent in plan.extents}
        for tokens, _ in tokens_of(mask):
            extents = {"q": tokens, "k": tokens} | extents
    T = extents.get("q", extents.get("k", S or 16)) if T is None else T
    S = extents.get("k", T) if S is None else S
    for letter, size in (("T", T), ("S", S)):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}({letter}): got {size!r}, expected an integer >= 1")
    return int(T), int(S)


def parts(mask: Mask, h: int) -> tuple[str, list[Mask]]:
    """The parts that a mask is composed of, and the sign between them; nothing of a mask that is
    one line of maths. Chains of one sign are one list; of `per_head` it is the head's own part."""
    match mask:
        case TileMap():
            return parts(mask.mask, h)
        case PerHead() if h < len(mask.parts):
            return parts(mask.parts[h], h)
        case Not():
            return "~", [mask.part]
        case And() | Or() | Xor():
            kind, found = type(mask), list[Mask]()
            for side in (mask.left, mask.right):
                found += parts(side, h)[1] if isinstance(side, kind) else [side]
            return _SIGNS[kind], found
    return "", []

"""The cells of a picture of a mask: each cell is one pair, or one tile of many pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.arrays import described
from ..checks.integers import MOST, concrete
from ..masks.mask import And, Mask, Not, Or, PerHead, Xor, tokens_of
from ..masks.positions import Positions
from ..shapes import Int
from ..tiles.tile_map import EMPTY, FULL, PARTIAL, TileMap, tile_map
from ..tracing.canonical import canonicalize
from ..tracing.dependence import SplitPlan
from ..tracing.hashing import Const
from ..tracing.split import split

# Colours of cells. Their lightness differs too, so that they can be told apart in grey.
COLORS = {EMPTY: "#f4f1ec", PARTIAL: "#f0b429", FULL: "#1f7a8c"}

_SIGNS = {And: "&", Or: "|", Xor: "^"}

# Four windows, chunks or prefixes show what repeats; 16 tokens are enough for a diagonal.
_TIMES, _FEW = 4, 16
# A larger number usually means "no limit", so it suggests no size.
_MANY = 2**20


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
        """The least and the largest share of pairs that can be visible; equal where exact."""
        extents = zip(self.tile, (self.T, self.S), self.states.shape, strict=True)
        q, k = (np.minimum(size, n - size * np.arange(count)) for size, n, count in extents)
        area = np.outer(q, k) / (self.T * self.S)
        full, some = self.states == FULL, self.states != EMPTY
        return float((area * full).sum()), float((area * some).sum())

    def caption(self) -> str:
        """The sizes, and how many pairs are visible."""
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
      T, S: numbers of queries and of keys; with None, `sizes` finds them in the mask.
      b, h: batch row and query head.
      most: with at most this many queries and keys, every pair is a cell.
      grid: with more, the largest numbers of lines and columns of cells. A cell is then a tile,
        whose state is found from bounds; no array T x S is built.
      name: the function to name in errors.

    Raises:
      TypeError: for a batch row or a head that is not an integer.
      ValueError: for sizes below 1, for sizes that the mask's arrays do not have, and for a batch
        row or a head that they do not have.
    """
    T, S = sizes(mask, T, S, name)
    check_row_and_head(mask, b, h, name)
    tile, at = tile_of(T, S, most, grid), Positions(b=jnp.array([b]), h=jnp.array([h]))
    if tile == (1, 1):
        dense = np.asarray(mask.dense(T, S, positions=at))[0, 0]
        return Cells(np.where(dense, FULL, EMPTY), tile, T, S, b, h)
    found = tile_map(mask, (1, T, 1, 1), (1, S, 1, 1), positions=at, tile=tile)
    return Cells(np.asarray(found.states)[0, 0], tile, T, S, b, h)


def words(labels: Any, T: int, S: int, name: str) -> tuple[list[str], list[str]] | None:
    """A word for each query and for each key, checked; None without.

    Raises:
      TypeError: for what is no two lists.
      ValueError: for other numbers of words.
    """
    if labels is None:
        return None
    pair = isinstance(labels, (tuple, list)) and len(labels) == 2
    if not pair or not all(isinstance(each, (Sequence, np.ndarray)) for each in labels):
        raise TypeError(
            f"{name}(labels): got {described(labels)}, expected two lists of words, for the "
            "queries and for the keys"
        )
    for whose, given, count in zip(("queries", "keys"), labels, (T, S), strict=True):
        if len(given) != count:
            raise ValueError(f"{name}(labels): got {len(given)} for the {whose}, expected {count}")
    queries, keys = (list(map(str, each)) for each in labels)
    return queries, keys


def tile_of(T: int, S: int, most: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Queries and keys of a cell; see `cells`."""
    if max(T, S) <= most:
        return 1, 1
    return -(-T // grid[0]), -(-S // grid[1])


def sizes(mask: Mask, T: int | None, S: int | None, name: str) -> tuple[int, int]:
    """Numbers of queries and of keys.

    A number that is not given is taken from the extents of the mask's arrays. If these do not say
    it, it is four times the largest number in the mask (a window, a chunk, a prefix, a literal in a
    function), or the number of tokens that a table of blocks covers, and at least 16.
    """
    if isinstance(mask, TileMap) and T is None and S is None:
        T, S = mask.sizes[2:]
    if T is None or S is None:
        known = extents(mask)
        for tokens, _ in tokens_of(mask):
            known = {"q": tokens, "k": tokens} | known
        T = known.get("q", known.get("k", S)) if T is None else T
        T = _default_length(mask, _plan(mask)) if T is None else T
        S = known.get("k", T) if S is None else S
    for letter, size in (("T", T), ("S", S)):
        number = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not number or not 1 <= size <= MOST:
            raise ValueError(
                f"{name}({letter}): got {described(size)}, expected an integer >= 1, below 2**31"
            )
    return int(T), int(S)


def extents(mask: Mask) -> dict[str, int]:
    """How many batch rows `b`, heads `h`, queries `q` and keys `k` the mask's arrays have."""
    return {extent.position: extent.extent for _, extent in _plan(mask).axis_reads}


def check_row_and_head(mask: Mask, b: int, h: int, name: str) -> None:
    """Checks that the batch row and the head exist; raises as `cells` does."""
    for letter, at in (("b", b), ("h", h)):
        if isinstance(at, (bool, np.bool_)) or not isinstance(at, (int, np.integer)):
            raise TypeError(f"{name}({letter}): got {described(at)}, expected an integer")
        if not 0 <= at <= MOST:
            raise ValueError(f"{name}({letter}): got {at}, expected an integer >= 0, below 2**31")
    if (b, h) == (0, 0):
        return
    asked = {"b": (b, "batch rows"), "h": (h, "heads")}
    for label, extent in _plan(mask).axis_reads:
        at, what = asked.get(extent.position, (-1, ""))
        if at >= extent.extent:
            raise ValueError(
                f"{name}({extent.position}): got {at}, expected less than {extent.extent}, the "
                f"number of {what} of {label}"
            )


def _plan(mask: Mask) -> SplitPlan:
    return split(canonicalize(mask), Positions()).plan


def _default_length(mask: Mask, plan: SplitPlan) -> int:
    """The number of tokens for a mask whose arrays do not say it; see `sizes`."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(mask) if concrete(leaf) is not None]
    numbers = [n for n in (*_numbers(leaves), *_literals(plan)) if 0 < n <= _MANY]
    largest = max(numbers, default=0)
    blocks = [axis for leaf in leaves if leaf.dtype == np.bool_ for axis in leaf.shape[-2:]]
    return max(_FEW, largest * max(_TIMES, *blocks, 0))


def _numbers(leaves: list[np.ndarray]) -> Iterator[int]:
    """The integers among the leaves of a mask, those in vectors included."""
    for leaf in leaves:
        if leaf.dtype.kind in "iu" and leaf.ndim < 2:
            yield from map(int, leaf.reshape(-1))


def _literals(plan: SplitPlan) -> Iterator[int]:
    """The integers that are literals in the mask's functions."""
    for step in (*plan.free, *plan.residue.steps, *(s for r in plan.recipes for s in r.steps)):
        for arg in step.args:
            if isinstance(arg, Const) and np.ndim(arg.value) == 0:
                value = np.asarray(arg.value)
                if value.dtype.kind in "iu":
                    yield int(value)


def parts(mask: Mask, h: int) -> tuple[str, list[Mask]]:
    """The parts of a composed mask, and the sign between them.

    A mask that is not composed has no parts. A chain of one sign is one list. Of `per_head`, the
    parts are those of the head's own mask.
    """
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

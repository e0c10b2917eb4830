"""Layouts: which blocks of a sequence each rank holds.

A causal mask over equal, contiguous parts leaves half of the devices idle: the queries of the last
one see all keys, those of the first one few. A layout deals smaller blocks. Masks, scores and
dropout see positions, so no mask needs another form for it: tokens are put in order once, at the
door of a model, and `parallel.attention(layout=...)` is told of it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks import integers
from ..checks.arrays import array_of, described
from ..masks.mask import MaskLike
from ..mesh import evaluated
from ..tiles.tile_map import EMPTY, tile_map
from .known import is_known, known_part, plain

# Blocks of a rank: enough that blocks of unequal work can be dealt out evenly, for ten masks to
# within 2%, and few enough that blocks stay longer than tiles.
_BLOCKS = 16

# Keys of the tiles by which work is measured: those of the engine on CPU, near those of kernels.
_TILE = 128

# The most work of a rank, in means of all, up to which tokens stay in order.
_EVEN = 1.05

# The share of the keys below which a mask is taken for a window.
_NARROW = 0.5

# Of a cyclic layout, which knows nothing of the mask: more of them, so that their work evens out.
_CYCLIC = 32


@dataclass(frozen=True)
class Layout:
    """Which blocks of a sequence each rank holds, in order.

    Attributes:
      blocks: a row of block numbers for each rank; every number from 0 to the number of blocks
        occurs once.
      length: the number of tokens of the sequence, a multiple of the number of blocks.

    Raises:
      ValueError: for rows that are not such a table, and for a length that they don't divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattn import parallel
      >>> layout = parallel.zigzag(8, ranks=2)
      >>> layout.blocks
      ((0, 3), (1, 2))
      >>> tokens = layout.shard(jnp.arange(8), axis=0)
      >>> print(tokens, layout.unshard(tokens, axis=0))
      [0 1 6 7 2 3 4 5] [0 1 2 3 4 5 6 7]
    """

    blocks: tuple[tuple[int, ...], ...]
    length: int

    def __post_init__(self) -> None:
        try:
            rows = tuple(tuple(map(operator.index, row)) for row in self.blocks)
        except TypeError:
            raise TypeError(
                f"Layout.blocks: got {described(self.blocks)}, expected a row of block numbers for "
                "each rank"
            ) from None
        object.__setattr__(self, "blocks", rows)
        object.__setattr__(self, "length", integers.plain(self.length, "Layout.length", 1))
        numbers = sorted(number for row in rows for number in row)
        even = len({len(row) for row in rows}) == 1
        if not numbers or not even or numbers != list(range(len(numbers))):
            raise ValueError(
                f"Layout.blocks: got {_short(rows)}, expected a row of equal length for each rank, "
                "and in them every number from 0 on once"
            )
        if self.length % len(numbers):
            raise ValueError(
                f"Layout.length: got {self.length}, expected a multiple of the {len(numbers)} "
                "blocks: pad the sequence, and mask the padding"
            )

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return len(self.blocks)

    @property
    def block(self) -> int:
        """The number of tokens of a block."""
        return self.length // (self.ranks * len(self.blocks[0]))

    @property
    def contiguous(self) -> bool:
        """Whether the tokens stay in their order."""
        return bool((self._order == np.arange(len(self._order))).all())

    @cached_property
    def _order(self) -> np.ndarray:
        return np.asarray(self.blocks, np.int32).reshape(-1)

    @property
    def positions(self) -> np.ndarray:
        """The position of each token, int32 `[length]`, in the order in which ranks hold them."""
        inside = np.arange(self.block, dtype=np.int32)
        return (self._order[:, None] * np.int32(self.block) + inside).reshape(-1)

    def shard(self, tree: Any, axis: int = 1) -> Any:
        """Arrays with an axis of tokens, put in the order of the ranks.

        Args:
          tree: a pytree of arrays, such as tokens, labels and segment ids, with axes `[.., length,
            ..]`.
          axis: that of the tokens.

        Raises:
          ValueError: for an axis of another length.
        """
        return jax.tree.map(lambda a: self._moved(a, self._order, axis), tree)

    def unshard(self, tree: Any, axis: int = 1) -> Any:
        """Arrays put back in the order of positions: undoes `shard`."""
        return jax.tree.map(lambda a: self._moved(a, np.argsort(self._order), axis), tree)

    def _moved(self, array: Any, order: np.ndarray, axis: int) -> Any:
        array = array_of(array, "Layout(tree)", "arrays with an axis of tokens")
        axis = integers.plain(axis, "Layout(axis)", -array.ndim)
        if not -array.ndim <= axis < array.ndim or array.shape[axis] != self.length:
            raise ValueError(
                f"Layout: got an array of shape {list(array.shape)} and axis={axis}, expected "
                f"{self.length} tokens along that axis; axis= says which axis the tokens are"
            )
        axis %= array.ndim
        shape = array.shape
        blocks = array.reshape(*shape[:axis], len(order), self.block, *shape[axis + 1 :])
        return jnp.take(blocks, order, axis).reshape(shape)

    def __repr__(self) -> str:
        return f"Layout({_short(self.blocks)}, length={self.length})"


def _short(blocks: Any) -> str:
    said = str(blocks)
    return said if len(said) <= 120 else f"{said[:100]}..., {len(blocks)} ranks"


def contiguous(length: int, ranks: int) -> Layout:
    """One block a rank, in order: best where few keys come from elsewhere, as with a window.

    Args:
      length: of the sequence, in tokens.
      ranks: their number.
    """
    length = integers.plain(length, "parallel.contiguous(length)", 1)
    ranks = integers.plain(ranks, "parallel.contiguous(ranks)", 1)
    return Layout(tuple((rank,) for rank in range(ranks)), length)


def zigzag(length: int, ranks: int) -> Layout:
    """Two blocks a rank, one from each end: even for a causal mask alone.

    Args:
      length: of the sequence, in tokens.
      ranks: their number.

    Source: Zhu 2024, github.com/zhuzilin/ring-flash-attention.
    """
    length = integers.plain(length, "parallel.zigzag(length)", 1)
    ranks = integers.plain(ranks, "parallel.zigzag(ranks)", 1)
    return Layout(tuple((rank, 2 * ranks - 1 - rank) for rank in range(ranks)), length)


def cyclic(length: int, ranks: int, blocks: int | None = None) -> Layout:
    """Every `ranks`-th block: about even for every mask, without knowing it.

    Args:
      length: of the sequence, in tokens.
      ranks: their number.
      blocks: of a rank; by default the largest divisor of the length of its part up to 32.
    """
    ranks = integers.plain(ranks, "parallel.cyclic(ranks)", 1)
    length = integers.plain(length, "parallel.cyclic(length)", 1)
    count = _blocks(blocks, length, ranks, "parallel.cyclic(blocks)", _CYCLIC)
    rows = tuple(tuple(rank + n * ranks for n in range(count)) for rank in range(ranks))
    return Layout(rows, length)


def striped(length: int, ranks: int) -> Layout:
    """Every `ranks`-th token: even, but for masks of blocks and windows no tile stays empty.

    Args:
      length: of the sequence, in tokens.
      ranks: their number.

    Source: Brandon et al. 2023, arXiv 2311.09431.
    """
    ranks = integers.plain(ranks, "parallel.striped(ranks)", 1)
    length = integers.plain(length, "parallel.striped(length)", ranks)
    return cyclic(length, ranks, blocks=length // ranks)


def layout(
    masks: MaskLike | Sequence[MaskLike],
    length: int,
    ranks: int,
    *,
    blocks: int | None = None,
    batch: int = 1,
    heads: int = 1,
) -> Layout:
    """The layout under which the ranks have equal work, for one mask or those of all layers.

    Blocks are dealt by the tiles that their queries have to compute, the most work first, each to
    the rank with the least so far. Where equal parts in order are even already, as with a window,
    the tokens stay in order: few keys then come from elsewhere. Of a mask with arrays that are
    traced only the conjuncts that are known can be looked at. If they are no such window, the
    layout is `cyclic`.

    Args:
      masks: a mask, or those of several layers, which share the tokens' order.
      length: of the sequence, in tokens.
      ranks: their number.
      blocks: of a rank; by default the largest divisor of the length of its part up to 16.
      batch, heads: numbers of batch rows and heads, for masks that depend on them.

    Raises:
      TypeError, ValueError: for ranks that are no positive integer, or don't divide the length.

    Example:
      >>> from jaxattn import masks, parallel
      >>> parallel.layout(masks.causal(), 4096, ranks=2, blocks=2).blocks
      ((0, 3), (1, 2))
    """
    ranks = integers.plain(ranks, "parallel.layout(ranks)", 1)
    given = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    whole = [mask for mask in map(plain, given) if mask is not None]
    length = integers.plain(length, "parallel.layout(length)", 1)
    batch = integers.plain(batch, "parallel.layout(batch)", 1)
    heads = integers.plain(heads, "parallel.layout(heads)", 1)
    count = _blocks(blocks, length, ranks, "parallel.layout(blocks)", _BLOCKS)
    # Checks the length, too.
    block = Layout(tuple((n,) for n in range(ranks * count)), length).block
    parts = [known_part(mask) for mask in whole]
    known = [part for part in parts if part is not None]

    def work() -> np.ndarray:
        """The share of the keys that each block sees, in tiles, over all masks."""
        total = np.zeros(ranks * count)
        for mask in known:
            shape = (batch, length, heads, 1)
            found = tile_map(mask, shape, shape, tile=(block, min(_TILE, length))).states
            total += (np.asarray(found) != EMPTY).mean((0, 1, 3))
        return total / len(known)

    if len(known) < len(whole):
        return cyclic(length, ranks)
    shares = evaluated(work)
    loads = shares.reshape(ranks, count).sum(1)
    even = loads.max() <= _EVEN * loads.mean()
    if not all(map(is_known, whole)):
        narrow = shares.mean() < _NARROW
        return contiguous(length, ranks) if even and narrow else cyclic(length, ranks)
    return contiguous(length, ranks) if even else _dealt(shares, ranks, length)


def _dealt(work: np.ndarray, ranks: int, length: int) -> Layout:
    """Blocks dealt to ranks by their work, as many to each."""
    count = len(work) // ranks
    rows: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for block in np.argsort(-work, kind="stable"):
        open_ = [rank for rank in range(ranks) if len(rows[rank]) < count]
        rank = min(open_, key=lambda rank: (loads[rank], len(rows[rank])))
        rows[rank].append(int(block))
        loads[rank] += work[block]
    return Layout(tuple(tuple(sorted(row)) for row in rows), length)


def _blocks(given: Any, length: int, ranks: int, name: str, most: int) -> int:
    """The number of blocks of a rank, by default at most `most`, checked before they are listed."""
    if given is None:
        return _divisor(length, ranks, most)
    count = integers.plain(given, name, 1)
    if length % (count * ranks):
        raise ValueError(
            f"{name}: got {count}, expected a number of blocks of each of the {ranks} ranks that "
            f"divides the {length} tokens"
        )
    return count


def _divisor(length: int, ranks: int, most: int) -> int:
    """The largest number of blocks up to `most` that a rank's part can be cut into."""
    if length % ranks or length <= 0:
        raise ValueError(
            f"length: got {length}, expected a multiple of the {ranks} ranks: pad the sequence, "
            "and mask the padding"
        )
    part = length // ranks
    return max(n for n in range(1, most + 1) if part % n == 0)

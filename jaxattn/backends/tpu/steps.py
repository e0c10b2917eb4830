"""The order in which a kernel visits tiles: one list of steps, a word of 32 bits each.

A kernel's grid is `[batch rows, heads, steps, heads of a group]`, and steps follow each other row
by row of tiles. So a program pays for active tiles alone, whatever their number in each row. A row
without any is visited once, where its result is written as zeros.

    row | column | ends its row | begins its row | state of the tile (2 bits)

Lists are prefetched into the scalar memory of a core before its kernel starts. What does not fit
there is computed by several calls, some rows of tiles each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ...shapes import Array, Int
from ...tiles.tile_map import EMPTY
from ..flash.operands import head_index

# Steps of all lists of one call. The scalar memory holds 2^18 words, and the compiler needs some.
MOST = 3 * 2**16

_STATE, _BEGINS, _ENDS, _FLAGS = 0b11, 0b100, 0b1000, 4


class Place(NamedTuple):
    """Where a program of the grid is.

    Attributes:
      b, n, k: the batch row, query head and key head.
      g: the query head within its group.
      i, j: the tile of queries, and the tile of keys.
      row: the row of tiles, counted from the first one of this call.
      state: of the tile.
      begins, ends: whether it is the first of its row, and the last.
    """

    b: Any
    n: Any
    k: Any
    g: Any
    i: Any
    j: Any
    row: Any
    state: Any
    begins: Any
    ends: Any


class Steps(NamedTuple):
    """Lists of steps.

    Attributes:
      words: all lists, one after the other: an axis more would be padded to 128 words.
      most: the number of steps of the longest.
    """

    words: Int[Array, "n"]
    most: Int[Array, ""]


@dataclass(frozen=True)
class Walk:
    """How programs of a grid find their place.

    Attributes:
      across: whether rows of tiles go along keys, and heads are those of keys.
      extents: the numbers of batch rows and heads that have lists of their own.
      length: of a list; 0 before it is known how many rows of tiles one has.
      columns: the number of columns of tiles. Across, with `merged` heads, these of every query
        head of a group, one after the other.
      groups: query heads of a key head.
      merged: whether columns are those of all heads of a group.
    """

    across: bool
    extents: tuple[int, int]
    length: int
    columns: int
    groups: int
    merged: bool

    @property
    def inner(self) -> int:
        """The extent of the grid's last axis."""
        return self.groups if self.across and not self.merged else 1

    @property
    def _bits(self) -> int:
        return (self.columns * (self.groups if self.merged else 1) - 1).bit_length()

    def place(self, b: Any, head: Any, step: Any, inner: Any, words: Any, first: Any) -> Place:
        """The place of a program, from references to `words` and the first row of this call."""
        at_b, at_head = head_index(self.extents, b, head)
        word = words[(at_b * self.extents[1] + at_head) * self.length + step]
        row = lax.shift_right_logical(word, jnp.int32(_FLAGS + self._bits))
        column = lax.shift_right_logical(word, jnp.int32(_FLAGS)) & ((1 << self._bits) - 1)
        begins, ends = (word & _BEGINS) != 0, (word & _ENDS) != 0
        if not self.across:
            k, g = (head, 0) if self.groups == 1 else _divided(head, self.groups)
            return Place(b, head, k, g, row + first[0], column, row, word & _STATE, begins, ends)
        g, i = _divided(column, self.columns) if self.merged else (inner, column)
        if self.inner > 1:
            begins, ends = begins & (inner == 0), ends & (inner == self.inner - 1)
        n = head * self.groups + g
        return Place(b, n, head, g, i, row + first[0], row, word & _STATE, begins, ends)

    def steps(self, states: Int[Array, "b heads rows columns"]) -> Steps:
        """The steps over the active tiles, row by row."""
        b, heads, rows, columns = states.shape
        at_row, at_column = (lax.broadcasted_iota(jnp.int32, states.shape, axis) for axis in (2, 3))
        active = states != EMPTY
        visited = active | ((at_column == 0) & ~active.any(-1, keepdims=True))
        seen = jnp.cumsum(visited, -1, dtype=jnp.int32)
        begins, ends = seen == 1, seen == seen[..., -1:]
        words = (at_row << (_FLAGS + self._bits)) | (at_column << _FLAGS)
        words = words | states.astype(jnp.int32)
        words = words | jnp.where(begins, _BEGINS, 0) | jnp.where(ends, _ENDS, 0)
        flat, words = (a.reshape(b, heads, rows * columns) for a in (visited, words))
        order = jnp.argsort(~flat, axis=-1, stable=True)
        words = jnp.take_along_axis(words, order, -1)
        counts = flat.sum(-1, dtype=jnp.int32)
        # After its end a list stays where it is, and does nothing: no tile is copied.
        last = jnp.take_along_axis(words, counts[..., None] - 1, -1)
        rest = (last >> _FLAGS) << _FLAGS
        n = lax.broadcasted_iota(jnp.int32, words.shape, 2)
        words = jnp.where(n < counts[..., None], words, rest)
        return Steps(words.reshape(-1), counts.max())


def _divided(n: Any, by: int) -> tuple[Any, Any]:
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))


def walk(states: Int[Array, "b k g nq nk"], groups: int, across: bool) -> tuple[Walk, Array]:
    """A walk over states, and the states by rows of tiles, `[b, heads, rows, columns]`.

    Args:
      states: of the tiles.
      groups: query heads of a key head.
      across: whether rows of tiles go along keys.
    """
    b, k, g, nq, nk = states.shape
    if not across:
        rows = states.reshape(b, k * g, nq, nk)
        return Walk(False, (b, k * g), 0, nk, groups, False), rows
    rows = states.transpose(0, 1, 4, 2, 3).reshape(b, k, nk, g * nq)
    return Walk(True, (b, k), 0, nq, groups, g > 1), rows


# --- tiles that batch rows and heads share --------------------------------------------------------


@dataclass(frozen=True)
class SharedWalk:
    """How programs find their place that sum over what shares a tile.

    All tiles are visited, and each by all members of the grid's last axis.

    Attributes:
      extents: the numbers of batch rows and heads that have states of their own.
      length: of the states of one of them; 0 as in `Walk`.
      columns: the number of columns of tiles.
      shared: the numbers of batch rows and of query heads that share a tile.
      groups: query heads of a key head.
    """

    extents: tuple[int, int]
    length: int
    columns: int
    shared: tuple[int, int]
    groups: int

    @property
    def inner(self) -> int:
        """The extent of the grid's last axis."""
        return self.shared[0] * self.shared[1]

    def place(self, b: Any, head: Any, step: Any, inner: Any, words: Any, first: Any) -> Place:
        """The place of a program; as `Walk.place`, across."""
        more_b, more_n = _divided(inner, self.shared[1])
        b, n = b * self.shared[0] + more_b, head * self.shared[1] + more_n
        at_b, at_n = head_index(self.extents, b, n)
        state = words[(at_b * self.extents[1] + at_n) * self.length + step]
        row, column = _divided(step, self.columns)
        k, g = _divided(n, self.groups)
        ends = inner == self.inner - 1
        return Place(b, n, k, g, column, row + first[0], row, state, inner == 0, ends)

    def steps(self, states: Int[Array, "b heads rows columns"]) -> Steps:
        """The steps over all tiles: their states are the words."""
        *_, rows, columns = states.shape
        return Steps(states.astype(jnp.int32).reshape(-1), jnp.int32(rows * columns))

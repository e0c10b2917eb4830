"""A cache in pages: the rows share memory, and each takes the pages that it needs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ..checks.arrays import array_of
from ..checks.integers import integers
from ..pytrees import pytree, static
from ..shapes import Array, ArrayLike, Bool, Float, Int
from .cache import Cache, check_dtypes, check_room, check_rows, check_sizes, empty, unpacked


@pytree
class PagedKVCache(Cache):
    """Keys and values in pages that the rows share: long rows take many, short rows few.

    Memory is that of `pages`, not of the longest row times the batch. `append` takes pages as it
    needs them, and `free` returns them.

    Attributes:
      table: int32 `[B, pages_per_row]`: the pages of each row in order, -1 where it has none.
    """

    key: tuple[Array, ...]
    value: tuple[Array, ...]
    table: Int[Array, "B P"]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]
    dtype: Any = static()

    @classmethod
    def create(
        cls,
        batch: int,
        pages: int,
        page: int,
        heads: int,
        head_dim: int,
        *,
        pages_per_row: int | None = None,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        stored: Any = None,
    ) -> PagedKVCache:
        """An empty cache.

        Args:
          batch: rows B.
          pages: the number of pages that all rows share.
          page: the number of tokens in a page.
          pages_per_row: the most that one row can have; by default all of them.
          heads, head_dim, value_dim, dtype, stored: as in `KVCache.create`.
        """
        columns = pages if pages_per_row is None else pages_per_row
        sizes = {"batch": batch, "pages": pages, "page": page, "heads": heads}
        sizes |= {"head_dim": head_dim, "pages_per_row": columns}
        width = head_dim if value_dim is None else value_dim
        check_sizes("PagedKVCache.create", sizes | {"value_dim": width})
        hold = check_dtypes("PagedKVCache.create", dtype, stored)
        return cls(
            empty((pages, heads, page, head_dim), hold),
            empty((pages, heads, page, width), hold),
            jnp.full((batch, columns), -1, jnp.int32),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(batch, bool),
            jnp.dtype(dtype),
        )

    @property
    def page(self) -> int:
        """Tokens in a page."""
        return int(self.key[0].shape[2])

    @property
    def capacity(self) -> int:
        return int(self.table.shape[1]) * self.page

    @property
    def positions(self) -> Int[Array, "B S"]:
        places = jnp.arange(self.capacity, dtype=jnp.int32)
        return jnp.broadcast_to(places, (self.table.shape[0], self.capacity))

    @property
    def _form(self) -> tuple[str, dict[str, Any]]:
        batch, columns = self.table.shape
        sizes = {"batch": batch, "pages": self.key[0].shape[0], "page": self.page}
        return "PagedKVCache", sizes | {"pages_per_row": columns}

    @property
    def available(self) -> Int[Array, ""]:
        """The number of free pages."""
        return (~self._taken()).sum(dtype=jnp.int32)

    def _taken(self) -> Bool[Array, "pages"]:
        pages = self.key[0].shape[0]
        at = jnp.where(self.table < 0, pages, self.table)
        return jnp.zeros(pages, bool).at[at].set(True, mode="drop")

    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        pages = jnp.maximum(self.table, 0)

        def gathered(held: tuple[Array, ...]) -> Array:
            rows = unpacked(tuple(a[pages] for a in held), self.dtype)  # [B, P, K, page, H]
            return jnp.moveaxis(rows, 2, 3).reshape(len(pages), self.capacity, *rows.shape[2::2])

        return gathered(self.key), gathered(self.value)

    def allocate(self, counts: Int[ArrayLike, "B"] | int) -> PagedKVCache:
        """The cache with pages for `counts` more tokens of each row, as far as pages are free."""
        given = integers(counts, "cache.allocate(counts)", ("[]", "[B]"), 0)
        most = jnp.int32(self.capacity)
        number = jnp.broadcast_to(jnp.minimum(most, given), self.length.shape)
        has = (self.table >= 0).sum(1, dtype=jnp.int32)
        wants = jnp.minimum(-(-(self.length + number) // self.page), self.table.shape[1])
        need = jnp.maximum(wants - has, 0)
        taken = self._taken()
        pages = taken.size
        rank = jnp.cumsum(~taken, dtype=jnp.int32) - 1
        numbers = jnp.arange(pages, dtype=jnp.int32)
        # The n-th free page, and -1 beyond the last.
        free = jnp.full(pages, -1, jnp.int32)
        free = free.at[jnp.where(taken, pages, rank)].set(numbers, mode="drop")
        column = jnp.arange(self.table.shape[1], dtype=jnp.int32)[None] - has[:, None]
        nth = (jnp.cumsum(need, dtype=jnp.int32) - need)[:, None] + column
        given = jnp.where(nth < pages, free[jnp.clip(nth, 0, pages - 1)], -1)
        table = jnp.where((column >= 0) & (column < need[:, None]), given, self.table)
        return PagedKVCache(self.key, self.value, table, self.length, self.overflowed, self.dtype)

    def free(self, rows: Bool[ArrayLike, "B"]) -> PagedKVCache:
        """The cache with these rows emptied and their pages free."""
        gone = array_of(rows, "cache.free(rows)", f"booleans [B] = [{len(self.length)}]")
        if gone.dtype != jnp.bool_ or gone.shape != self.length.shape:
            raise ValueError(
                f"cache.free(rows): got {gone.dtype}{list(gone.shape)}, expected booleans [B] = "
                f"[{self.length.shape[0]}], True for a row to be freed"
            )
        return PagedKVCache(
            self.key,
            self.value,
            jnp.where(gone[:, None], -1, self.table),
            jnp.where(gone, 0, self.length),
            self.overflowed & ~gone,
            self.dtype,
        )

    def append(
        self,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int[ArrayLike, "B"] | None = None,
    ) -> PagedKVCache:
        return self._put(*self._tokens(key, value, counts))

    def _put(
        self, key: tuple[Array, ...], value: tuple[Array, ...], number: Int[Array, "B"]
    ) -> PagedKVCache:
        grown = self.allocate(number)
        room = (grown.table >= 0).sum(1, dtype=jnp.int32) * self.page
        check_room(self.length + number, room)
        T = key[0].shape[1]
        at = self.upcoming(T)
        fits = (jnp.arange(T, dtype=jnp.int32)[None] < number[:, None]) & (at < room[:, None])
        column = jnp.minimum(at // self.page, self.table.shape[1] - 1)
        pages = jnp.take_along_axis(grown.table, column, axis=1)
        pages = jnp.where(fits, pages, self.key[0].shape[0])

        def put(held: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
            inside = at % self.page
            pairs = zip(held, new, strict=True)
            return tuple(a.at[pages, :, inside].set(n, mode="drop") for a, n in pairs)

        length = self.length + number
        most = jnp.minimum(length, room)
        return PagedKVCache(
            put(self.key, key),
            put(self.value, value),
            grown.table,
            most,
            self.overflowed | (most < length),
            self.dtype,
        )

    def _stored(self, at: Int[Array, "B T"]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        column = jnp.minimum(at // self.page, self.table.shape[1] - 1)
        pages = jnp.maximum(jnp.take_along_axis(self.table, column, axis=1), 0)
        inside = at % self.page
        return tuple(a[pages, :, inside] for a in self.key), tuple(
            a[pages, :, inside] for a in self.value
        )

    def truncate(self, length: Int[ArrayLike, "B"] | int) -> PagedKVCache:
        """The cache without the tokens from position `length` on; a row keeps its pages."""
        to = integers(length, "cache.truncate(length)", ("[]", "[B]"))
        shorter = jnp.minimum(self.length, jnp.maximum(to, 0))
        over = self.overflowed & (shorter > 0)
        return PagedKVCache(self.key, self.value, self.table, shorter, over, self.dtype)

    def reorder(self, rows: Int[ArrayLike, "B"]) -> PagedKVCache:
        """The cache whose row b is this one's row `rows[b]`, copied to pages of its own."""
        order = check_rows(rows, self.length.shape[0])
        pages = jnp.maximum(self.table, 0)[order]

        def copied(held: tuple[Array, ...]) -> tuple[Array, ...]:
            rows = (jnp.moveaxis(a[pages], 2, 3) for a in held)
            return tuple(a.reshape(a.shape[0], self.capacity, *a.shape[3:]) for a in rows)

        new = self.free(jnp.ones_like(self.overflowed))
        new = new._put(copied(self.key), copied(self.value), self.length[order])
        over = new.overflowed | self.overflowed[order]
        return PagedKVCache(new.key, new.value, new.table, new.length, over, new.dtype)

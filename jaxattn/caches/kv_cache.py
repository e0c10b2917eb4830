"""A cache whose rows have places of their own: one for each token, or a ring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.integers import concrete, integers
from ..masks.mask import BuiltInMask, Mask, as_mask
from ..masks.positions import Filled, over_grid
from ..pytrees import pytree, static
from ..shapes import Array, ArrayLike, Bool, Float, Int
from .cache import Cache, check_dtypes, check_room, check_rows, check_sizes, empty, unpacked

Own = TypeVar("Own", bound="KVCache")


@pytree
class Recent(BuiltInMask):
    """The last `window` keys before the query, those after it, and the `first` of all."""

    window: Any
    first: Any

    def formula(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k <= self.window) | (k < self.first)


@pytree
class KVCache(Cache):
    """Keys and values of each row in places of its own: `capacity` of them, or a ring.

    `key[0]` is `[B, K, capacity, H]`: with heads first, decoding reads it in place, several times
    faster than in the layout of the inputs.

    Example:
      >>> import jax.numpy as jnp, jaxattn as ja
      >>> x = jnp.ones((1, 3, 2, 8))
      >>> cache = ja.KVCache.create(batch=1, capacity=16, heads=2, head_dim=8)
      >>> out, cache = cache.step(x, x, x, mask=ja.masks.causal())
      >>> out.shape
      (1, 3, 2, 8)
      >>> cache
      KVCache(batch=1, capacity=16, heads=2, head_dim=8, dtype=float32, length=[3])

    Attributes:
      places: int32 `[B, S]`: the position of the token in each place, -1 if there is none. In a
        ring, a token that was taken back stays until its place is needed, and so does the gap that
        it left; `mask` shows neither.
      window: how far back a query of a ring sees; `None` if the cache is no ring.
      first: how many of the first tokens of each row a ring keeps for good.
    """

    key: tuple[Array, ...]
    value: tuple[Array, ...]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]
    places: Int[Array, "B S"]
    dtype: Any = static()
    window: int | None = static(default=None)
    first: int = static(default=0)
    heads_first: ClassVar[bool] = True

    @classmethod
    def create(
        cls: type[Own],
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        stored: Any = None,
    ) -> Own:
        """An empty cache.

        Args:
          batch: rows B.
          capacity: the number of tokens that a row can hold.
          heads: key heads K.
          head_dim: H.
          value_dim: Hv; by default `head_dim`.
          dtype: the dtype in which keys and values are read.
          stored: the dtype in which they are stored; by default `dtype`. `jnp.int8` stores every
            head of every token relative to its largest number, in a quarter of float32's memory,
            with errors of at most 1/254 of that number.
        """
        sizes = {"batch": batch, "capacity": capacity, "heads": heads, "head_dim": head_dim}
        width = head_dim if value_dim is None else value_dim
        check_sizes("KVCache.create", sizes | {"value_dim": width})
        hold = check_dtypes("KVCache.create", dtype, stored)
        return cls(
            empty((batch, heads, capacity, head_dim), hold),
            empty((batch, heads, capacity, width), hold),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(batch, bool),
            jnp.full((batch, capacity), -1, jnp.int32),
            jnp.dtype(dtype),
        )

    @classmethod
    def rolling(
        cls: type[Own],
        batch: int,
        window: int,
        heads: int,
        head_dim: int,
        *,
        chunk: int = 1,
        first: int = 0,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        stored: Any = None,
    ) -> Own:
        """A ring: it holds the last `window` tokens before each query, and no more.

        Its `mask` is `(q - k <= window) | (k < first)`, so that results are those of the whole
        sequence under `mask & (masks.sliding_window(window) | masks.global_tokens(first))`. Memory
        is `first + window + chunk` places.

        Args:
          window: how far back a query sees, as `left` of `masks.sliding_window`.
          chunk: the most tokens that one `append` adds, and that `truncate` takes back.
          first: how many of the first tokens stay in the cache for good. A model that was trained
            without a window needs a few: its heads put there the weight that they have no use for
            (attention sinks, arXiv 2309.17453).
          batch, heads, head_dim, value_dim, dtype, stored: as in `create`.
        """
        check_sizes("KVCache.rolling", {"window": window, "first": first}, least=0)
        check_sizes("KVCache.rolling", {"chunk": chunk, "batch": batch})
        options = {"value_dim": value_dim, "dtype": dtype, "stored": stored}
        made = cls.create(batch, first + window + chunk, heads, head_dim, **options)
        return replace(made, window=window, first=first)

    @property
    def capacity(self) -> int:
        return int(self.key[0].shape[2])

    @property
    def positions(self) -> Int[Array, "B S"]:
        return self.places

    @property
    def mask(self) -> Mask:
        held = super().mask
        return held if self.window is None else held & Recent(self.window, self.first)

    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        key, value = unpacked(self.key, self.dtype), unpacked(self.value, self.dtype)
        return jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)

    def append(
        self,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int[ArrayLike, "B"] | None = None,
    ) -> KVCache:
        return self._put(*self._tokens(key, value, counts))

    def _put(
        self, key: tuple[Array, ...], value: tuple[Array, ...], number: Int[Array, "B"]
    ) -> KVCache:
        T = key[0].shape[1]
        at = self.upcoming(T)
        length = most = self.length + number
        if self.window is None:
            free = self.places < 0
            room = free.sum(1, dtype=jnp.int32)
            check_room(self.capacity - room + number, self.capacity)
            most = self.length + jnp.minimum(number, room)
            # The n-th free place, and none beyond the last.
            place = jax.vmap(jnp.searchsorted, (0, None))(
                jnp.cumsum(free, 1, dtype=jnp.int32), jnp.arange(1, T + 1, dtype=jnp.int32)
            )
        elif self._chunk < T:
            raise ValueError(
                f"cache.append(key): got {T} tokens, expected at most the {self._chunk} that this "
                "ring takes at once; create it with rolling(chunk=...), or append in parts"
            )
        else:
            place = self._around(at)
        # Out of bounds: dropped.
        place = jnp.where(at < most[:, None], place, self.capacity)
        rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]

        def put(held: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
            pairs = zip(held, new, strict=True)
            return tuple(a.at[rows, :, place].set(n, mode="drop") for a, n in pairs)

        return replace(
            self,
            key=put(self.key, key),
            value=put(self.value, value),
            length=most,
            overflowed=self.overflowed | (most < length),
            places=self.places.at[rows, place].set(at, mode="drop"),
        )

    def _around(self, at: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The places in a ring of tokens at these positions."""
        around = self.first + (at - self.first) % (self.capacity - self.first)
        return jnp.where(at < self.first, at, around)

    def _stored(self, at: Int[Array, "B T"]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        if self.window is None:
            place = jnp.argmax(self.places[:, None] == at[..., None], axis=2)
        else:
            place = self._around(at)
        place = place[:, None, :, None]

        def taken(held: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(jnp.moveaxis(jnp.take_along_axis(a, place, 2), 1, 2) for a in held)

        return taken(self.key), taken(self.value)

    def truncate(self, length: Int[ArrayLike, "B"] | int) -> KVCache:
        """The cache without the tokens from position `length` on: rejected drafts, a new prompt.

        A ring takes back at most its last `chunk` tokens, counted from its largest length: older
        tokens were overwritten.

        Raises:
          ValueError: outside `jit`, for a ring that cannot go back so far. Inside `jit`,
            `overflowed` becomes True.
        """
        to = integers(length, "cache.truncate(length)", ("[]", "[B]"))
        shorter = jnp.minimum(self.length, jnp.maximum(to, 0))
        lost = jnp.zeros_like(self.overflowed)
        places = self.places
        if self.window is None:
            places = jnp.where(places < shorter[:, None], places, -1)
        else:
            # Whether the next token will see tokens that the ring no longer has.
            begins = jnp.maximum(shorter - self.window, self.first)
            lost = begins < jnp.minimum(self._oldest, shorter)
            found = concrete(lost)
            if found is not None and found.any():
                row = int(np.argmax(found))
                least = int(self._oldest[row]) + self.window
                kept = f"at most {self.first}" if self.first else "0"
                raise ValueError(
                    f"cache.truncate(length): got {int(shorter[row])} in row {row}, expected "
                    f"{least} to {int(self.length[row])}, or {kept}: a query there sees the "
                    f"{self.window} tokens before it, and this ring has none before position "
                    f"{int(self._oldest[row])}; create it with a larger rolling(chunk=...)"
                )
        over = (self.overflowed & (shorter > 0)) | lost
        return replace(self, length=shorter, overflowed=over, places=places)

    def keep(self, index: Int[ArrayLike, "*B M"]) -> KVCache:
        """The cache with the tokens in these places alone; later tokens take the other places.

        A cache of fixed size forgets so what matters least. Tokens keep their positions and
        `length` stays: masks, scores and rotary embeddings mean what they meant, and attention is
        that under a mask which hides what is gone. No key moves, so that statistics of each place
        stay valid too. The same compiled program serves every `index`, in a loop as well.

        Places are common to all heads: sum what each head says, or choose once for all.

        Args:
          index: `[M]` or `[B, M]`, places in the order of `positions`, `read` and
            `stats.received`. Their own order is of no matter, and one that comes twice counts once.
            -1 stands for none, where rows keep different numbers; so does a place without a token.

        Raises:
          TypeError: for what is no integer.
          ValueError: for other shapes, for a ring, which forgets by itself, and, outside `jit`, for
            numbers that are no places.

        Source: H2O, arXiv 2306.14048, where keys that received most weight are kept beside the
        last ones; SnapKV, arXiv 2404.14469, where the last queries of a prompt choose.

        Example:
          Four of six tokens: the last, and those which received most.

          >>> import jax, jax.numpy as jnp, jaxattn as ja
          >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
          >>> cache = ja.KVCache.create(batch=1, capacity=8, heads=2, head_dim=8)
          >>> (out, got), cache = cache.step(
          ...     x, x, x, mask=ja.masks.causal(), stats=ja.stats.received()
          ... )
          >>> newest = cache.positions == cache.length[:, None] - 1
          >>> worth = jnp.where(newest, jnp.inf, got.sum(-1))  # [B, S]
          >>> cache = cache.keep(jax.lax.top_k(worth, 4)[1])
          >>> int((cache.positions >= 0).sum()), cache.length.tolist()
          (4, [6])
        """
        if self.window is not None:
            raise ValueError(
                f"cache.keep(index): got a ring, {self!r}, which forgets by itself, expected a "
                "cache of KVCache.create"
            )
        B, S = self.places.shape
        given = integers(index, "cache.keep(index)", ("[M]", "[B, M]"), -1)
        if given.shape[:-1] not in ((), (B,)):
            raise ValueError(
                f"cache.keep(index): got shape {list(given.shape)}, expected [M] or [{B}, M]"
            )
        values = concrete(given)
        if values is not None and (values >= S).any():
            raise ValueError(
                f"cache.keep(index): got {values.max()}, expected places below {S}, the capacity "
                "of this cache; -1 stands for none"
            )
        # A negative index would count from the end; one out of bounds is dropped.
        at = jnp.broadcast_to(jnp.where(given < 0, S, given), (B, given.shape[-1]))
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        kept = jnp.zeros((B, S), bool).at[rows, at].set(True, mode="drop")
        return replace(self, places=jnp.where(kept, self.places, -1))

    def reorder(self, rows: Int[ArrayLike, "B"]) -> KVCache:
        """The cache whose row b is this one's row `rows[b]`: the survivors of a beam search."""
        order = check_rows(rows, self.length.shape[0])
        return jax.tree.map(lambda a: a[order], self)

    @property
    def _chunk(self) -> int:
        """The most tokens that a ring takes at once."""
        assert self.window is not None
        return self.capacity - self.window - self.first

    @property
    def _oldest(self) -> Int[Array, "B"]:
        """The position from which all tokens are held; the length if none is.

        Of a ring, without those that it keeps for good.
        """
        end = self.length[:, None]
        held = (self.positions >= self.first) & (self.positions < end)
        return jnp.where(held, self.positions, end).min(1)

    def _check_positions(self, at: Int[Array, "B T"], N: int, mask: Any) -> None:
        super()._check_positions(at, N, mask)
        places, lengths = concrete(at), concrete(self.length)
        if self.window is None or places is None or lengths is None:
            return
        oldest = concrete(self._oldest)
        if oldest is None:
            return
        begins = np.maximum(places - self.window, self.first)
        if not (begins < oldest[:, None]).any():
            return
        # A lost token matters only if the mask would have shown it.
        gap = np.arange(begins.min(), oldest.max(), dtype=np.int32)
        missed = (gap >= begins[:, None, :, None]) & (gap < oldest[:, None, None, None])
        if mask is not None:
            rows, heads = (jnp.arange(n, dtype=jnp.int32) for n in (len(oldest), N))
            shown = over_grid(as_mask(mask), Filled(rows, heads, at, jnp.asarray(gap)[None]))
            allowed = concrete(shown)
            if allowed is None:
                return
            missed = missed & allowed
        if missed.any():
            row, _, query, hole = np.argwhere(missed)[0]
            raise ValueError(
                f"cache.attend(at): got position {places[row, query]} in row {row}, which sees "
                f"position {gap[hole]}, but this ring holds {oldest[row]} to {lengths[row] - 1} "
                "there; expected positions of the last append; for older ones create it with a "
                "larger rolling(chunk=...)"
            )

    @property
    def _form(self) -> tuple[str, dict[str, Any]]:
        batch = {"batch": self.length.shape[0]}
        if self.window is None:
            return "KVCache", batch | {"capacity": self.capacity}
        sizes = {"window": self.window, "chunk": self._chunk}
        first = {"first": self.first} if self.first else {}
        return "KVCache.rolling", batch | sizes | first

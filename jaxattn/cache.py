"""Caches of keys and values: what a decoder has seen so far, and where it stood.

    at = cache.upcoming(T)  # positions of the next tokens, for rotary embeddings too
    cache = cache.append(key, value)
    out = cache.attend(query, at, mask=mask)  # any mask: the one of training

A cache says where its keys stand (`positions`) and which of its places hold one (`mask`); attention
itself knows nothing of caches. So a chunk of a prompt, a single token and a tree of drafts are the
same call, and equal what one pass over the whole sequence gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .algebra import Mask, Positions, Predicate, as_mask, pytree, static
from .attention import attention
from .backends import decode
from .integers import as_given, integers, is_integer, known, narrowed
from .pytrees import ByStructure
from .shapes import Array, ArrayLike, Bool, Float, Int

# The largest number of an int8, kept symmetric.
_LARGEST = 127


def _held(b: Any, h: Any, q: Any, k: Any, length: Any) -> Any:
    # A ring that is not full yet has places before position 0.
    return (k >= 0) & (k < length[b])


def _recent(b: Any, h: Any, q: Any, k: Any, window: Any) -> Any:
    return q - k <= window


def empty(shape: tuple[int, ...], dtype: Any) -> tuple[Array, ...]:
    """Room for keys or values: zeros, and with int8 a scale for each head of each token."""
    held = jnp.zeros(shape, dtype)
    if held.dtype == jnp.int8:
        return held, jnp.zeros((*shape[:-1], 1), jnp.float32)
    if not jnp.issubdtype(held.dtype, jnp.floating):
        raise TypeError(f"cache: got stored={held.dtype}, expected a float dtype, or int8")
    return (held,)


def packed(array: Array, dtype: Any) -> tuple[Array, ...]:
    """What is held of new keys or values: themselves, or as int8 with a scale for each head."""
    if dtype != jnp.int8:
        return (array.astype(dtype),)
    exact = array.astype(jnp.float32)
    scale = jnp.abs(exact).max(-1, keepdims=True) / _LARGEST
    whole = jnp.round(exact / jnp.where(scale > 0, scale, 1))
    return whole.astype(jnp.int8), scale


def unpacked(held: tuple[Array, ...], dtype: Any) -> Array:
    """What `packed` packed."""
    if len(held) == 1:
        return held[0].astype(dtype)
    whole, scale = held
    return (whole.astype(jnp.float32) * scale).astype(dtype)


def _counts(given: Any, B: int, T: int) -> Int[Array, "B"]:
    if given is None:
        return jnp.full(B, T, jnp.int32)
    array = as_given(given)
    if not is_integer(array) or array.shape != (B,):
        raise ValueError(
            f"cache.append(counts): got {array.dtype}{list(array.shape)}, expected integers [B] = "
            f"[{B}], how many of the {T} tokens of each row are real"
        )
    values = known(array)
    if values is not None and ((values < 0) | (values > T)).any():
        raise ValueError(f"cache.append(counts): got {values}, expected numbers from 0 to {T}")
    return jnp.clip(narrowed(array), 0, T)


def check_room(length: Array, room: Any) -> None:
    """Raises for a row that overflows, where that can be seen."""
    lengths, places = known(length), known(room)
    if lengths is None or places is None or not (lengths > places).any():
        return
    row = int(np.argmax(lengths > places))
    holds = int(np.broadcast_to(places, lengths.shape)[row])
    raise ValueError(
        f"cache.append(key): row {row} would have {lengths[row]} tokens, and there is room for "
        f"{holds}; create a larger cache, or a rolling one, free or truncate rows, or append fewer "
        "tokens (counts=)"
    )


def check_sizes(where: str, sizes: dict[str, Any], least: int = 1) -> None:
    """Raises for a size that is no integer, or too small."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < least:
            raise ValueError(f"{where}({name}=): got {size!r}, expected an integer >= {least}")


class Cache(ByStructure, ABC):
    """What every cache can do; how keys are kept is each class's own.

    Attributes:
      key, value: the arrays that hold them, with their scales where they are int8.
      length: int32 `[B]`: how many tokens each row has seen, which is the position of its next.
      overflowed: bool `[B]`: whether a row was given more than it can hold; what did not fit was
        dropped. Stays until the row is freed or truncated to nothing.
      dtype: of the keys and values that are read.
    """

    key: tuple[Array, ...]
    value: tuple[Array, ...]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]
    dtype: Any

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Places of a row."""

    @property
    @abstractmethod
    def positions(self) -> Int[Array, "B S"]:
        """The position of the key in each place, in storage order; `mask` says if there is one."""

    @abstractmethod
    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Keys and values in storage order."""

    @abstractmethod
    def append(
        self,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int[ArrayLike, "B"] | None = None,
    ) -> Cache:
        """The cache with the keys and values of the next tokens.

        Args:
          key, value: `[B, T, K, H]` and `[B, T, K, Hv]`.
          counts: how many of the T tokens of each row are real, the first ones; all by default.

        Raises:
          ValueError: for shapes that do not fit, and, outside `jit`, for a row that overflows.
            Inside, what does not fit is dropped, and `overflowed` says so.
        """

    @property
    def mask(self) -> Mask:
        """Which places hold a key: the mask of every call that reads the cache."""
        return Predicate(_held, (self.length,))

    def upcoming(self, T: int) -> Int[Array, "B T"]:
        """The positions of the next `T` tokens of each row."""
        return self.length[:, None] + jnp.arange(T, dtype=jnp.int32)[None]

    def attend(
        self,
        query: Float[ArrayLike, "B T N H"],
        at: Int[ArrayLike, "B T"],
        *,
        mask: Any = None,
        **options: Any,
    ) -> Any:
        """`attention` of queries at the positions `at` to everything in the cache.

        Args:
          query: `[B, T, N, H]`.
          at: their positions, what `upcoming` said before they were appended.
          mask: which query may see which key, by position. Without one a query sees the whole
            cache, later tokens of its own chunk included.
          **options: those of `attention`, but for `positions`; without a `backend`, few queries
            take "decode".

        Returns:
          What `attention` returns.
        """
        key, value = self.read()
        held = self.mask if mask is None else as_mask(mask) & self.mask
        positions = Positions(q=at, k=self.positions)
        _, T, N, _ = jnp.shape(query)
        # XLA on CPU converts keys of 16 bits before it multiplies them, and dense does it best.
        direct = jax.default_backend() != "cpu" or key.dtype.itemsize >= 4
        if direct and T * (N // key.shape[2]) <= decode.MOST:
            options = {"backend": "decode"} | options
        return attention(query, key, value, mask=held, positions=positions, **options)

    def _tokens(self, key: Any, value: Any, counts: Any) -> tuple[Any, Any, Int[Array, "B"]]:
        """New keys and values in the form they are held in, and how many a row has."""
        parts = []
        for name, given, held in (("key", key, self.key), ("value", value, self.value)):
            array = jnp.asarray(given)
            expected = (self.length.shape[0], held[0].shape[1], held[0].shape[3])
            if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != expected:
                B, K, H = expected
                raise ValueError(
                    f"cache.append({name}): got shape {list(array.shape)}, expected "
                    f"[{B}, T, {K}, {H}], as the cache was created"
                )
            parts.append(array)
        key, value = parts
        B, T = key.shape[:2]
        if value.shape[1] != T:
            raise ValueError(
                f"cache.append(value): got {value.shape[1]} tokens, expected the {T} of the keys"
            )
        return (
            packed(key, self.key[0].dtype),
            packed(value, self.value[0].dtype),
            _counts(counts, B, T),
        )


@pytree
class KVCache(Cache):
    """Keys and values of each row in places of its own: `capacity` of them, or a ring.

    `key[0]` is `[B, K, capacity, H]`: with heads first, decoding reads it as it lies, several times
    faster than in the layout of the inputs.

    Example:
      >>> import jax.numpy as jnp, jaxattn as ja
      >>> x = jnp.ones((1, 3, 2, 8))
      >>> cache = ja.KVCache.create(batch=1, capacity=16, heads=2, head_dim=8)
      >>> at, cache = cache.upcoming(3), cache.append(x, x)
      >>> cache.attend(x, at, mask=ja.masks.causal()).shape
      (1, 3, 2, 8)
    """

    key: tuple[Array, ...]
    value: tuple[Array, ...]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]
    dtype: Any = static()
    window: int | None = static(default=None)

    @classmethod
    def create(
        cls,
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        stored: Any = None,
    ) -> KVCache:
        """An empty cache.

        Args:
          batch: rows B.
          capacity: how many tokens a row can hold.
          heads: key heads K.
          head_dim: H.
          value_dim: Hv; by default `head_dim`.
          dtype: of the keys and values that are read.
          stored: what they are held in; by default `dtype`. `jnp.int8` keeps every head of every
            token by its largest number, in a quarter of float32's memory: errors of 1/254 of it.
        """
        sizes = {"batch": batch, "capacity": capacity, "heads": heads, "head_dim": head_dim}
        check_sizes("KVCache.create", sizes)
        hold = dtype if stored is None else stored
        return cls(
            empty((batch, heads, capacity, head_dim), hold),
            empty((batch, heads, capacity, value_dim or head_dim), hold),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros(batch, bool),
            jnp.dtype(dtype),
        )

    @classmethod
    def rolling(
        cls,
        batch: int,
        window: int,
        heads: int,
        head_dim: int,
        *,
        chunk: int = 1,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        stored: Any = None,
    ) -> KVCache:
        """A ring: the last `window` tokens before each query, and no more, for ever.

        Its `mask` is `q - k <= window`, so that results are those of the whole sequence under
        `mask & masks.sliding_window(window)`. Memory is `window + chunk` places.

        Args:
          window: how far back a query sees, as `left` of `masks.sliding_window`.
          chunk: the most tokens that one `append` brings, and that `truncate` takes back.
          batch, heads, head_dim, value_dim, dtype, stored: as in `create`.
        """
        check_sizes("KVCache.rolling", {"window": window}, least=0)
        check_sizes("KVCache.rolling", {"chunk": chunk})
        made = cls.create(
            batch, window + chunk, heads, head_dim, value_dim=value_dim, dtype=dtype, stored=stored
        )
        return cls(made.key, made.value, made.length, made.overflowed, made.dtype, window)

    @property
    def capacity(self) -> int:
        return int(self.key[0].shape[2])

    @property
    def positions(self) -> Int[Array, "B S"]:
        places = jnp.arange(self.capacity, dtype=jnp.int32)
        if self.window is None:
            return jnp.broadcast_to(places, (self.length.shape[0], self.capacity))
        # The last token that was put there: the largest position of that place below the length.
        last = self.length[:, None] - 1
        return last - (last - places[None]) % self.capacity

    @property
    def mask(self) -> Mask:
        held = Predicate(_held, (self.length,))
        return held if self.window is None else held & Predicate(_recent, (self.window,))

    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        key, value = unpacked(self.key, self.dtype), unpacked(self.value, self.dtype)
        return jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)

    def append(
        self,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int[ArrayLike, "B"] | None = None,
    ) -> KVCache:
        new_key, new_value, number = self._tokens(key, value, counts)
        T = new_key[0].shape[1]
        if self.window is None:
            check_room(self.length + number, self.capacity)
        elif self.capacity < self.window + T:
            raise ValueError(
                f"cache.append(key): got {T} tokens, expected at most the "
                f"{self.capacity - self.window} that this ring takes at once; create it with "
                "rolling(chunk=...), or append in parts"
            )
        at = self.upcoming(T)
        fits = jnp.arange(T, dtype=jnp.int32)[None] < number[:, None]
        if self.window is None:
            fits &= at < self.capacity
        # Out of bounds: dropped.
        at = jnp.where(fits, at % self.capacity, self.capacity)
        rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]

        def put(held: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
            pairs = zip(held, new, strict=True)
            return tuple(a.at[rows, :, at].set(n, mode="drop") for a, n in pairs)

        length = self.length + number
        most = length if self.window is not None else jnp.minimum(length, self.capacity)
        return KVCache(
            put(self.key, new_key),
            put(self.value, new_value),
            most,
            self.overflowed | (most < length),
            self.dtype,
            self.window,
        )

    def truncate(self, length: Int[ArrayLike, "B"] | int) -> KVCache:
        """The cache without the tokens from position `length` on: rejected drafts, a new prompt.

        A ring takes back its last `chunk` tokens at most: what stood in their places is gone.

        Raises:
          ValueError: outside `jit`, for a ring that can't go so far back. Inside, `overflowed`
            says so.
        """
        to = integers(length, "cache.truncate(length)", ("[]", "[B]"))
        shorter = jnp.minimum(self.length, jnp.maximum(to, 0))
        lost = jnp.zeros_like(self.overflowed)
        if self.window is not None:
            lost = (self.length > self.capacity) & (shorter > 0)
            lost &= self.length - shorter > self.capacity - self.window
            found = known(lost)
            if found is not None and found.any():
                raise ValueError(
                    f"cache.truncate(length): got {known(shorter)} of {known(self.length)} tokens, "
                    f"expected at most the last {self.capacity - self.window} to be taken back: "
                    "what a ring held before them is gone; create it with rolling(chunk=...)"
                )
        over = (self.overflowed & (shorter > 0)) | lost
        return KVCache(self.key, self.value, shorter, over, self.dtype, self.window)

    def reorder(self, rows: Int[ArrayLike, "B"]) -> KVCache:
        """The cache whose row b is this one's row `rows[b]`: the survivors of a beam search."""
        order = jnp.asarray(rows)
        return jax.tree.map(lambda a: a[order], self)

"""Caches of the keys and values of earlier tokens, and of their positions.

    out, cache = cache.step(query, key, value, mask=mask)  # any mask: the one of training

A cache has the positions of its keys (`positions`) and a mask of its places that hold one (`mask`);
attention itself knows nothing of caches. So a chunk of a prompt, a single token and a tree of
drafts are the same call, and the results equal those of one pass over the whole sequence.

`step` is `upcoming`, `append` and `attend`, in that order; they may be called apart:

    at = cache.upcoming(T)  # positions of the next tokens: before they are appended
    cache = cache.append(key, value)
    out = cache.attend(query, at, mask=mask)

Prompts of different lengths share a batch if they are padded at their ends: `counts` is the number
of real tokens in each row; the others are not kept and get no position. Prompts padded at their
beginnings are rolled first, `jax.vmap(partial(jnp.roll, axis=0))(prompt, -pads)`. No mask of the
padding is needed then. If padding is kept, its mask has to cover later tokens too: an array as long
as the cache, or a function of positions, `lambda b, h, q, k: k >= pads[b]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..arguments import checked_call
from ..backends import decode
from ..checks import options as checks
from ..checks.arrays import array_of, described
from ..checks.foreign_names import with_remedies
from ..checks.integers import MOST, as_given, concrete, integers, is_integer, narrowed, plain
from ..dispatch import dispatch
from ..masks.mask import BuiltInMask, Mask, as_mask, leaf_repr
from ..masks.positions import Positions
from ..pytrees import ByStructure, pytree
from ..shapes import Array, ArrayLike, Bool, Float, Int

C = TypeVar("C", bound="Cache")

# The largest number of an int8, kept symmetric.
_LARGEST = 127


@pytree
class Held(BuiltInMask):
    """The keys that a cache holds."""

    length: Any

    def formula(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        # An unused place has position -1; a token that was taken back, the length or more.
        return (k >= 0) & (k < self.length[b])


def empty(shape: tuple[int, ...], dtype: Any) -> tuple[Array, ...]:
    """Empty places for keys or values: zeros, and with int8 a scale for each head of each token."""
    held = jnp.zeros(shape, dtype)
    if held.dtype == jnp.int8:
        return held, jnp.zeros((*shape[:-1], 1), jnp.float32)
    return (held,)


def packed(array: Array, dtype: Any) -> tuple[Array, ...]:
    """New keys or values as they are stored: as they are, or as int8 with a scale for each head."""
    if dtype != jnp.int8:
        return (array.astype(dtype),)
    exact = array.astype(jnp.float32)
    scale = jnp.abs(exact).max(-1, keepdims=True) / _LARGEST
    whole = jnp.round(exact / jnp.where(scale > 0, scale, 1))
    return whole.astype(jnp.int8), scale


def unpacked(held: tuple[Array, ...], dtype: Any) -> Array:
    """Undoes `packed`."""
    if len(held) == 1:
        return held[0].astype(dtype)
    whole, scale = held
    return (whole.astype(jnp.float32) * scale).astype(dtype)


def _values(leaf: Any) -> np.ndarray | None:
    """The values of an array; None for a tracer, a deleted array, or anything else."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, (jax.Array, np.ndarray)):
        return None
    gone = isinstance(leaf, jax.Array) and leaf.is_deleted()
    return None if gone else concrete(leaf)


def _shown(leaf: Any) -> str:
    """The values of an array, shortened if there are many; its dtype and shape if traced."""
    values = _values(leaf)
    if values is None:
        return leaf_repr(leaf)
    return np.array2string(
        values, separator=", ", threshold=8, max_line_width=10**6, formatter={"all": str}
    )


def _counts(given: Any, B: int, T: int) -> Int[Array, "B"]:
    if given is None:
        return jnp.full(B, T, jnp.int32)
    array = array_of(given, "cache.append(counts)", f"integers [B] = [{B}]", as_given)
    if not is_integer(array) or array.shape != (B,):
        raise ValueError(
            f"cache.append(counts): got {array.dtype}{list(array.shape)}, expected integers [B] = "
            f"[{B}], how many of the {T} tokens of each row are real"
        )
    values = concrete(array)
    if values is not None and ((values < 0) | (values > T)).any():
        raise ValueError(f"cache.append(counts): got {values}, expected numbers from 0 to {T}")
    return jnp.clip(narrowed(array), 0, T)


def check_room(length: Array, room: Any) -> None:
    """Raises for a row that overflows, if the values are known."""
    lengths, places = concrete(length), concrete(room)
    if lengths is None or places is None or not (lengths > places).any():
        return
    row = int(np.argmax(lengths > places))
    holds = int(np.broadcast_to(places, lengths.shape)[row])
    raise ValueError(
        f"cache.append(key): got tokens that make row {row} {lengths[row]} long, expected at most "
        f"{holds}; create a larger cache, or a rolling one, free or truncate rows, or append fewer "
        "tokens (counts=)"
    )


def check_sizes(where: str, sizes: dict[str, Any], least: int = 1) -> None:
    """Checks that sizes are integers of at least `least`."""
    for name, size in sizes.items():
        number = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not number or not least <= size <= MOST:
            raise ValueError(
                f"{where}({name}=): got {described(size)}, expected an integer >= {least}, and "
                "below 2**31"
            )


def check_dtypes(where: str, dtype: Any, stored: Any) -> Any:
    """Checks the dtype in which a cache is read; returns the one in which it is stored."""
    checks.dtype(dtype, f"{where}(dtype=)")
    if stored is None:
        return dtype
    return checks.dtype(stored, f"{where}(stored=)", also=jnp.int8)


def check_rows(rows: Any, B: int) -> Int[Array, "B"]:
    """Numbers of rows of a cache, checked; their values only if they are known."""
    order = array_of(rows, "cache.reorder(rows)", f"integers [B] = [{B}]")
    if not jnp.issubdtype(order.dtype, jnp.integer) or order.shape != (B,):
        raise ValueError(
            f"cache.reorder(rows): got {order.dtype}{list(order.shape)}, expected integers [B] = "
            f"[{B}], for each row the number of the row to copy"
        )
    values = concrete(order)
    if values is not None and ((values < 0) | (values >= B)).any():
        raise ValueError(f"cache.reorder(rows): got {values}, expected numbers from 0 to {B - 1}")
    return order


class Cache(ByStructure, ABC):
    """What every cache can do; each class stores keys in its own way.

    Attributes:
      key, value: the stored arrays, with their scales if they are int8.
      length: int32 `[B]`: the number of tokens that each row has seen, which is the position of
        its next token.
      overflowed: bool `[B]`: whether tokens of a row were dropped because it was full. It stays
        True until the row is freed or truncated to length 0.
      dtype: the dtype in which keys and values are read.
    """

    key: tuple[Array, ...]
    value: tuple[Array, ...]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]
    dtype: Any
    # Whether `read` returns transposed views of arrays with heads first.
    heads_first: ClassVar[bool] = False

    @property
    @abstractmethod
    def capacity(self) -> int:
        """The number of places of a row."""

    @property
    @abstractmethod
    def positions(self) -> Int[Array, "B S"]:
        """The position of the key in each place, in storage order; see `mask` for empty places."""

    @abstractmethod
    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Keys and values in storage order."""

    @abstractmethod
    def append(
        self: C,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int[ArrayLike, "B"] | None = None,
    ) -> C:
        """The cache with the keys and values of the next tokens.

        Args:
          key, value: `[B, T, K, H]` and `[B, T, K, Hv]`.
          counts: how many of the T tokens of each row are real; they come first. All by default.

        Raises:
          ValueError: for shapes that do not fit, and, outside `jit`, for a row that overflows.
            Inside `jit`, tokens that do not fit are dropped, and `overflowed` becomes True.
        """

    @abstractmethod
    def truncate(self: C, length: Int[ArrayLike, "B"] | int) -> C:
        """The cache without the tokens from position `length` on: rejected drafts, a new prompt."""

    @abstractmethod
    def reorder(self: C, rows: Int[ArrayLike, "B"]) -> C:
        """The cache whose row b is this one's row `rows[b]`: the survivors of a beam search."""

    def accept(
        self: C,
        length: Int[ArrayLike, "B"] | int,
        positions: Int[ArrayLike, "B M"],
        counts: Int[ArrayLike, "B"] | None = None,
    ) -> C:
        """The cache with some of the tokens from position `length` on, moved together.

        After a tree of drafts was appended and verified, this is the path that was accepted. A
        token takes the next free position; its key stays what it was, so that rotary embeddings
        have to be those of the depth in the tree (`rope_positions`).

        Args:
          length: where the tree begins, as `cache.length` was before it was appended.
          positions: of the tokens that stay, in order, as the cache counts them.
          counts: how many of the M positions of each row are meant; they come first. All by
            default.

        Raises:
          ValueError: for shapes that do not fit, and as `truncate` and `append` do.
        """
        at = integers(positions, "cache.accept(positions)", ("[B, M]",), 0)
        B = self.length.shape[0]
        if at.shape[0] != B:
            raise ValueError(
                f"cache.accept(positions): got shape {list(at.shape)}, expected [{B}, M]"
            )
        stored = self._stored(at)
        return self.truncate(length)._put(*stored, _counts(counts, *at.shape))

    @abstractmethod
    def _stored(self, at: Int[Array, "B T"]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Keys and values at these positions, `[B, T, K, H]`, as they are stored."""

    @abstractmethod
    def _put(
        self: C, key: tuple[Array, ...], value: tuple[Array, ...], number: Int[Array, "B"]
    ) -> C:
        """Appends keys and values as they are stored, the first `number` of each row."""

    @property
    def mask(self) -> Mask:
        """Which places hold a key; every call that reads the cache uses it."""
        return Held(self.length)

    def upcoming(self, T: int) -> Int[Array, "B T"]:
        """The positions of the next `T` tokens of each row; call it before they are appended."""
        T = plain(T, "cache.upcoming(T)", 0)
        return self.length[:, None] + jnp.arange(T, dtype=jnp.int32)[None]

    def step(
        self: C,
        query: Float[ArrayLike, "B T N H"],
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int[ArrayLike, "B"] | None = None,
        *,
        mask: Any = None,
        **options: Any,
    ) -> tuple[Any, C]:
        """Appends the next tokens, and attends from them to everything in the cache.

        For rotary embeddings of queries and keys, `upcoming(T)` has their positions.

        Args:
          query: `[B, T, N, H]`, of the same tokens as key and value.
          key, value, counts: as in `append`. The outputs of padding mean nothing.
          mask, **options: as in `attend`.

        Returns:
          What `attention` returns, and the cache after.

        Raises:
          ValueError: as `append`, and for queries that do not fit the cache.
          TypeError: for queries of another dtype than that of the cache.

        Example:
          >>> import jax.numpy as jnp, jaxattn as ja
          >>> prompt, token = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 1, 4, 8))
          >>> cache = ja.KVCache.create(batch=2, capacity=16, heads=4, head_dim=8)
          >>> real = jnp.array([5, 3])  # the second prompt has two tokens of padding after it
          >>> out, cache = cache.step(prompt, prompt, prompt, real, mask=ja.masks.causal())
          >>> out, cache = cache.step(token, token, token, mask=ja.masks.causal())
          >>> cache.length.tolist()
          [6, 4]
        """
        T = self._check_query("step", query)
        at = self.upcoming(T)
        after = self.append(key, value, counts)
        if jnp.shape(key)[1] != T:
            raise ValueError(
                f"cache.step(query): got {T} tokens, expected the {jnp.shape(key)[1]} of the keys; "
                "for other queries use append, then attend"
            )
        return over(after, query, at, mask=mask, **options), after

    def attend(
        self,
        query: Float[ArrayLike, "B T N H"],
        at: Int[ArrayLike, "*Bq T"],
        *,
        mask: Any = None,
        **options: Any,
    ) -> Any:
        """`attention` of queries at the positions `at` to everything in the cache.

        Args:
          query: `[B, T, N, H]`.
          at: their positions, `[B, T]` or `[T]`: the result of `upcoming` before their own keys
            were appended. Called afterwards, `upcoming` is T too large, and a causal mask shows a
            query the tokens after it.
          mask: which query may see which key, by position. Without a mask, a query sees the whole
            cache, later tokens of its own chunk included.
          **options: those of `attention` except `positions`; without a `backend`, few queries run
            on "decode".

        Returns:
          What `attention` returns.

        Raises:
          ValueError: for queries that do not fit the cache; and, outside `jit`, for positions that
            are all after its last token, and for positions that see keys which a ring no longer
            has. Inside `jit`, positions are not known: the first mistake is not found (`step` does
            not make it), and with the second, queries see only the keys that are left.
          TypeError: for queries of another dtype than that of the cache.
        """
        T = self._check_query("attend", query)
        at, B = array_of(at, "cache.attend(at)", "integers [B, T]"), self.length.shape[0]
        if not jnp.issubdtype(at.dtype, jnp.integer) or at.shape not in ((T,), (1, T), (B, T)):
            raise ValueError(
                f"cache.attend(at): got {at.dtype}{list(at.shape)}, expected integers [B, T] = "
                f"[{B}, {T}], the positions of the queries"
            )
        self._check_positions(jnp.broadcast_to(at, (B, T)), jnp.shape(query)[2], mask)
        return over(self, query, at, mask=mask, **options)

    def _check_query(self, method: str, query: Any) -> int:
        """The number of queries of each row; raises for queries that do not fit the cache."""
        array = array_of(query, f"cache.{method}(query)", "an array [B, T, N, H]")
        shape, dtype = array.shape, array.dtype
        B, (K, H) = self.length.shape[0], self.key[0].shape[1::2]
        if len(shape) != 4 or shape[0] != B or shape[2] % K or shape[3] != H:
            raise ValueError(
                f"cache.{method}(query): got shape {list(shape)}, expected [{B}, T, N, {H}] with N "
                f"a multiple of {K}, as the cache was created: {self!r}"
            )
        if dtype != self.dtype:
            raise TypeError(
                f"cache.{method}(query): got {dtype}, expected {self.dtype}, in which this cache "
                f"is read; create it with dtype=jnp.{dtype} (stored= is the dtype of its memory), "
                "or cast the queries"
            )
        return int(shape[1])

    def _check_positions(self, at: Int[Array, "B T"], N: int, mask: Any) -> None:
        """Raises for queries at positions where the cache has no token, if the values are known."""
        places, lengths, flags = concrete(at), concrete(self.length), concrete(self.overflowed)
        if places is None or lengths is None or flags is None or 0 in places.shape:
            return
        # Padding of a chunk is at such positions too, so it is a mistake only if all queries are.
        # So are tokens for which a row had no room; `overflowed` reports them.
        if flags.any() or (places < lengths[:, None]).any():
            return
        raise ValueError(
            f"cache.attend(at): got positions from {places[0, 0]} on in row 0, expected positions "
            f"below {lengths[0]}, the number of its tokens; call at = cache.upcoming(T) before "
            "cache.append, or use cache.step, which does both"
        )

    @property
    @abstractmethod
    def _form(self) -> tuple[str, dict[str, Any]]:
        """The constructor of the cache and its own sizes, for the repr."""

    def __repr__(self) -> str:
        if any(getattr(part, "ndim", 0) != 4 for part in (*self.key, *self.value)):
            # Stacked caches, or leaves that are no arrays, as in tree transformations.
            parts = {"key": self.key, "value": self.value, "length": self.length}
            inner = ", ".join(
                f"{name}=[{', '.join(map(leaf_repr, jax.tree.leaves(part)))}]"
                for name, part in parts.items()
            )
            return f"{type(self).__name__}({inner})"
        name, sizes = self._form
        key, value = self.key[0], self.value[0]
        sizes |= {"heads": key.shape[1], "head_dim": key.shape[3]}
        if value.shape[3] != key.shape[3]:
            sizes["value_dim"] = value.shape[3]
        sizes["dtype"] = self.dtype
        if key.dtype != self.dtype:
            sizes["stored"] = key.dtype
        sizes["length"] = _shown(self.length)
        flags = _values(self.overflowed)
        if flags is not None and flags.any():
            sizes["overflowed"] = _shown(self.overflowed)
        return f"{name}({', '.join(f'{name}={size}' for name, size in sizes.items())})"

    def _tokens(self, key: Any, value: Any, counts: Any) -> tuple[Any, Any, Int[Array, "B"]]:
        """New keys and values as they are stored, and the number of real ones in each row."""
        parts = []
        for name, given, held in (("key", key, self.key), ("value", value, self.value)):
            expected = (self.length.shape[0], held[0].shape[1], held[0].shape[3])
            array = array_of(given, f"cache.append({name})", "an array [B, T, K, H]")
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


def over(
    cache: Cache, query: Any, at: Int[ArrayLike, "*Bq T"], *, mask: Any = None, **options: Any
) -> Any:
    """`Cache.attend` without its checks, for queries at any positions, as in cross-attention."""
    key, value = cache.read()
    held = cache.mask if mask is None else as_mask(mask) & cache.mask
    positions = Positions(q=at, k=cache.positions)
    _, T, N, _ = jnp.shape(query)
    few = T * (N // key.shape[2]) <= decode.MOST
    backend = options.pop("backend", "decode" if few else "auto")
    with_lse = checks.flag(options.pop("return_lse", False), "return_lse")
    # As `attention` does, and with what it can't know: how the keys lie in memory.
    call = _checked(query, key, value, mask=held, positions=positions, **options)
    call = replace(call, heads_first=cache.heads_first)
    results = dispatch(call, backend, with_lse=with_lse)
    return results if len(results) > 1 else results[0]


_checked = with_remedies(name="attention")(checked_call)

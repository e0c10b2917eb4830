"""Masks that read arrays: documents, padding, prompts, arrays of other libraries.

Every constructor returns a class of one line of maths, its `formula`. The arrays are leaves: they
may be traced, and new values reuse the compiled program. Where an array may differ by batch row or
by head its shape says so (`[B, T]`, `[B, N, Q, K]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp

from ..checks.arrays import array_of
from ..checks.integers import as_given, identifiers, integers, is_integer
from ..pytrees import pytree
from ..shapes import Array, ArrayLike, Bool, Int, Shaped
from .conventions import Convention, kept_pairs
from .mask import BuiltInMask, Mask, Scalar, constructor, dense, entry


def booleans(given: Any, name: str, shapes: Sequence[str]) -> Array:
    """A constructor's argument as an array of booleans, of one of these shapes."""
    array = array_of(given, name, f"booleans {' or '.join(shapes)}")
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"{name}: got dtype {array.dtype}, expected booleans, True where it is real; "
            "masks.from_array(array, convention) reads other conventions"
        )
    if array.ndim not in [shape.count(",") + 1 for shape in shapes]:
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected {' or '.join(shapes)}")
    return array


# --- documents, padding, prompts ------------------------------------------------------------------


@pytree
class Segments(BuiltInMask):
    """The mask that `segments` makes."""

    q_ids: Any
    k_ids: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return entry(self.q_ids, b, q) == entry(self.k_ids, b, k)


def segments(q_ids: Int[ArrayLike, "*Bq T"], k_ids: Int[ArrayLike, "*Bk S"] | None = None) -> Mask:
    """Queries see the keys of their own packed document: `q_ids[b, q] == k_ids[b, k]`.

    Args:
      q_ids: segment ids of the queries, integers `[T]` or `[B, T]`, in any order.
      k_ids: segment ids of the keys, `[S]` or `[B, S]`; by default those of the queries.

    Ids may have 64 bits, as hashes of documents do: without JAX's x64 they are numbered,
    where their values are known. JAX cuts arguments of `jit` to 32 bits by default: make the mask
    outside and pass it.

    Padding is a segment like any other here: `& key_padding(...)` masks it.
    Source: packing, Krell et al., arXiv 2107.02027; T5, arXiv 1910.10683.
    """
    rows, columns = ("[T]", "[B, T]"), ("[S]", "[B, S]")
    of_queries = (q_ids, "segments(q_ids)", rows)
    if k_ids is None:
        return Segments(*identifiers(of_queries) * 2)
    return Segments(*identifiers(of_queries, (k_ids, "segments(k_ids)", columns)))


@pytree
class Spans(BuiltInMask):
    """The mask that `spans` makes."""

    first: Any = field(metadata={"argument": "ids"})
    last: Any = field(metadata={"argument": "ids"}, repr=False)

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return (entry(self.first, b, q) <= k) & (k <= entry(self.last, b, q))


def spans(ids: Int[ArrayLike, "*B T"]) -> Mask:
    """Tokens of a span see each other, both ways: `first[b, q] <= k <= last[b, q]`.

    `first` and `last` are the ends of the query's span; a token outside of all spans sees itself.

    Args:
      ids: integers `[T]` or `[B, T]`. A span is a run of equal ids, -1 is outside of all spans.

    `causal() | spans(ids)` lets the tokens of an image see each other within text that is causal.
    Two images that touch need different ids. Sources: Gemma 3, arXiv 2503.19786, whose local layers
    are `sliding_window(w) | spans(ids)`; Transfusion, arXiv 2408.11039. In PaliGemma
    (arXiv 2407.07726) the image and the prompt are one span at the beginning: `prefix_lm(lengths)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattn import masks
      >>> image = jnp.array([-1, 0, 0, 0, -1])
      >>> (masks.causal() | masks.spans(image)).dense(5, 5)[0, 0].astype(int)
      Array([[1, 0, 0, 0, 0],
             [1, 1, 1, 1, 0],
             [1, 1, 1, 1, 0],
             [1, 1, 1, 1, 0],
             [1, 1, 1, 1, 1]], dtype=int32)
    """
    array = integers(ids, "spans(ids)", ("[T]", "[B, T]"), -1)
    # The ends never fall from one token to the next, so that bounds of whole tiles are tight.
    inside = (array[..., 1:] == array[..., :-1]) & (array[..., 1:] >= 0)
    apart = jnp.pad(~inside, [(0, 0)] * (array.ndim - 1) + [(1, 1)], constant_values=True)
    at, axis = jnp.arange(array.shape[-1], dtype=jnp.int32), array.ndim - 1
    first = jax.lax.cummax(jnp.where(apart[..., :-1], at, 0), axis)
    last = jax.lax.cummin(jnp.where(apart[..., 1:], at, at[-1]), axis, reverse=True)
    return Spans(first, last)


@pytree
class KeyPadding(BuiltInMask):
    """The mask that `key_padding` makes."""

    valid: Any = None
    lengths: Any = field(default=None, kw_only=True)

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        if self.lengths is None:
            return entry(self.valid, b, k)
        return k < entry(self.lengths, b)


def key_padding(
    valid: Bool[ArrayLike, "*B S"] | None = None,
    *,
    lengths: Int[ArrayLike, "*B"] | int | None = None,
) -> Mask:
    """Padding keys are masked for every query: `valid[b, k]`, or `k < lengths[b]`.

    Args:
      valid: booleans `[S]` or `[B, S]`, True where the key is a real token (on the left, on the
        right, anywhere).
      lengths: instead, how many real tokens come before the padding, int or `[B]`.

    For tokens padded on the left, `~key_padding(lengths=pads)` gives the numbers of pads.
    """
    return _padding(KeyPadding, "S", valid, lengths)


@pytree
class QueryPadding(BuiltInMask):
    """The mask that `query_padding` makes."""

    valid: Any = None
    lengths: Any = field(default=None, kw_only=True)

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        if self.lengths is None:
            return entry(self.valid, b, q)
        return q < entry(self.lengths, b)


def query_padding(
    valid: Bool[ArrayLike, "*B T"] | None = None,
    *,
    lengths: Int[ArrayLike, "*B"] | int | None = None,
) -> Mask:
    """Padding queries see nothing: `valid[b, q]`, or `q < lengths[b]`.

    Their output is then 0, their LSE -inf, their gradient 0, and their rows cost nothing.

    Args:
      valid: booleans `[T]` or `[B, T]`, True where the query is a real token.
      lengths: instead, how many real tokens come before the padding, int or `[B]`.
    """
    return _padding(QueryPadding, "T", valid, lengths)


def _padding(
    kind: type[KeyPadding] | type[QueryPadding], axis: str, valid: Any, lengths: Any
) -> Mask:
    name = constructor(kind)
    if (valid is None) == (lengths is None):
        got = "neither" if valid is None else "both"
        raise ValueError(f"{name}: got {got} of `valid` and `lengths`, expected one of them")
    if valid is not None:
        return kind(booleans(valid, f"{name}(valid)", (f"[{axis}]", f"[B, {axis}]")))
    return kind(lengths=integers(lengths, f"{name}(lengths)", ("[]", "[B]"), 0))


@pytree
class SharedPrefix(BuiltInMask):
    """The mask that `shared_prefix` makes."""

    length: Any
    ids: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return (k < entry(self.length, b)) | (entry(self.ids, b, q) == entry(self.ids, b, k))


def shared_prefix(length: Int[ArrayLike, "*Bp"] | int, ids: Int[ArrayLike, "*B T"]) -> Mask:
    """Several continuations of one prompt: `(k < length[b]) | (ids[b, q] == ids[b, k])`.

    Args:
      length: number of prompt tokens, int or `[B]`.
      ids: which continuation each position belongs to, integers `[T]` or `[B, T]`, as wide as in
        `segments`; the prompt needs an id of its own.

    Compose with `& causal()` to train on or to score many answers to a prompt that is computed
    once. Where a row holds several prompts, each with its answers, see `tree(parents, ids=)`.
    Source: Hydragen, arXiv 2402.05099.
    """
    return SharedPrefix(
        integers(length, "shared_prefix(length)", ("[]", "[B]"), 0),
        *identifiers((ids, "shared_prefix(ids)", ("[T]", "[B, T]"))),
    )


@pytree
class GlobalTokens(BuiltInMask):
    """The mask that `global_tokens` makes."""

    tokens: Any = None
    counts: Any = field(default=None, kw_only=True)

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        if self.counts is None:
            return entry(self.tokens, b, q) | entry(self.tokens, b, k)
        count = entry(self.counts, b)
        return (q < count) | (k < count)

    def __repr__(self) -> str:
        number = isinstance(self.counts, int)
        return f"global_tokens({self.counts})" if number else super().__repr__()


def global_tokens(
    tokens: Bool[ArrayLike, "*B T"] | Int[ArrayLike, ""] | int | None = None,
    *,
    counts: Int[ArrayLike, "*B"] | int | None = None,
) -> Mask:
    """Global tokens see all and are seen by all: `(q < n[b]) | (k < n[b])`, or `g[b, q] | g[b, k]`.

    Args:
      tokens: an int, the first `n` tokens; or booleans `[T]` or `[B, T]`, True at global tokens.
      counts: instead, how many tokens of each row are global, the first ones: int or `[B]`.

    `global_tokens(n) | sliding_window(w, w)` is Longformer (arXiv 2004.05150) and, with
    `| random_blocks(...)`, BigBird (arXiv 2007.14062);
    `(global_tokens(4) | sliding_window(w)) & causal()` keeps the attention sinks of StreamingLLM
    (arXiv 2309.17453).

    Raises:
      TypeError: for integers `[n]` as `tokens`: positions and numbers a row look the same.
    """
    if (tokens is None) == (counts is None):
        got = "neither" if tokens is None else "both"
        raise ValueError(f"global_tokens: got {got} of `tokens` and `counts`, expected one of them")
    if counts is not None:
        n = integers(counts, "global_tokens(counts)", ("[]", "[B]"), 0)
        return GlobalTokens(counts=n)
    array = array_of(tokens, "global_tokens(tokens)", "an integer or booleans", as_given)
    if array.ndim == 0:
        return GlobalTokens(counts=integers(tokens, "global_tokens(n)", ("[]",), 0))
    if is_integer(array):
        raise TypeError(
            f"global_tokens(tokens): got integers {list(array.shape)}, expected one integer or "
            "booleans [T] or [B, T]; tokens at these positions are "
            "global_tokens(jnp.zeros(T, bool).at[positions].set(True)), numbers of first "
            "tokens, one for each row, are global_tokens(counts=...)"
        )
    flags = booleans(tokens, "global_tokens(flags)", ("[T]", "[B, T]"))
    return GlobalTokens(flags)


# --- arrays of other libraries --------------------------------------------------------------------


def from_array(array: Shaped[ArrayLike, "..."], convention: Convention) -> Mask:
    """A mask from an array of another library's convention.

    Args:
      array: the array. Rank 4 is `[B|1, N|1, T|1, S|1]`, rank 3 is `[B|1, T|1, S|1]`, and what
        rank 2 means is the convention's:

        | convention | keeps | removes | dtype | rank 2 | used by |
        |---|---|---|---|---|---|
        | `"attend"` | True, 1 | False, 0 | bool, integer | `[T, S]` | `jax.nn`, torch SDPA |
        | `"ignore"` | False, 0 | True, 1 | bool, int, float | `[T, S]`, or `[B, S]` (see below) \
| the Transformer tutorial, torch `key_padding_mask`, `attn_mask` |
        | `"additive"` | 0 | -1e4 or less | float | `[T, S]` | torch float masks, T5, Hugging Face \
inside |
        | `"hf"` | 1 | 0 | int, bool, float | `[B, S]` | Hugging Face `attention_mask` |
        | `"keras"` | True, 1 | False, 0 | bool, integer | `[B, S]` | Keras `mask`, `padding_mask` |
        | `"flax"` | not 0 | 0 | bool, int, float | `[T, S]` | `flax.linen.make_attention_mask` |

        Give padding `[B, S]` in the "ignore" convention rank 4, so that it is no `[T, S]`, as the
        tutorial does: `padding[:, None, None, :]`.
      convention: one of the six names.

    Returns:
      The mask that keeps exactly the cells that the array keeps.

    Raises:
      TypeError: for a dtype that the convention does not have.
      ValueError: for values that it does not have (a float array of only 0 and 1 is no additive
        mask; an additive array with values that neither keep nor remove is a bias and belongs in
        `jaxattn.scores.bias`), for an unknown convention, and for a rank without a meaning. Values
        are checked where they are known, that is, outside `jit`.
    """
    keep = kept_pairs(array, convention)
    if keep.ndim == 4:
        return dense(keep)
    if keep.ndim == 3:
        return dense(keep[:, None])
    if keep.ndim == 2:
        return key_padding(keep) if convention in ("hf", "keras") else dense(keep)
    raise ValueError(
        f"from_array(array): got shape {list(keep.shape)}, expected rank 2, 3 or 4: [T, S] or "
        "[B, S], [B|1, T|1, S|1], [B|1, N|1, T|1, S|1]"
    )

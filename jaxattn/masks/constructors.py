"""Masks: the constructors, each one line of maths.

Every constructor returns a `Mask`, a pure function of positions that composes with `&`, `|`, `~`
and `^`. Its arguments are leaves: they may be traced, and new values reuse the compiled program.
Where an argument may differ by batch row or by head its shape says so (`[B]`, `[N]`, `[B, T]`).
Numbers that meet positions become int32 like these: beyond, the nearest, which means the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.foreign_names import VIEWS, answers
from ..checks.integers import (
    MOST,
    as_given,
    check_exact,
    concrete,
    identifiers,
    integers,
    is_integer,
    plain,
)
from ..shapes import Array, ArrayLike, Bool, Int, Shaped
from .conventions import Convention, kept
from .door import views
from .mask import Mask, MaskLike, PerHead, Predicate, as_mask, check_is_predicate, dense, repr_as

if TYPE_CHECKING:
    # The result of a view behind the door; a type alone, never imported when the code runs.
    from ..views.diff import Diff

# --- checks of arguments, and how an argument is read -------------------------------------------


def _booleans(given: Any, name: str, shapes: Sequence[str]) -> Array:
    array = jnp.asarray(given)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"{name}: got dtype {array.dtype}, expected booleans, True where it is real; "
            "masks.from_array(array, convention) reads other conventions"
        )
    if array.ndim not in [shape.count(",") + 1 for shape in shapes]:
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected {' or '.join(shapes)}")
    return array


def _at(array: Any, *index: Any) -> Any:
    """`array[index]` with as many trailing indices as the array has axes: `[]`, `[T]`, `[B, T]`."""
    rank = np.ndim(array)
    return array[index[len(index) - rank :]] if rank else array


# --- nothing and everything ------------------------------------------------------------------


def _full(b: Any, h: Any, q: Any, k: Any) -> Any:
    return jnp.asarray(True)


def full() -> Mask:
    """Every query sees every key: `True`."""
    return Predicate(_full)


def _empty(b: Any, h: Any, q: Any, k: Any) -> Any:
    return jnp.asarray(False)


def empty() -> Mask:
    """No query sees any key: `False`. Attention under it is 0, and its LSE is -inf."""
    return Predicate(_empty)


# --- order and distance ----------------------------------------------------------------------


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


@repr_as(lambda offset: f"causal({offset})")
def _causal_offset(b: Any, h: Any, q: Any, k: Any, offset: Any) -> Any:
    # Not q + offset >= k: the sum of two large numbers would wrap around.
    return k - q <= _at(offset, b)


def causal(offset: Int[ArrayLike, "*B"] | int = 0) -> Mask:
    """A query sees itself and what came before: `q + offset >= k`.

    Args:
      offset: int or `[B]`; how many keys come before the first query. With the default the first
        query meets the first key (top-left, as in `jax.nn`), also where T != S; `S - T` aligns
        the last query with the last key (bottom-right). `positions=` says the same for every mask
        of a call at once.

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """
    if isinstance(offset, int) and not isinstance(offset, bool) and offset == 0:
        return Predicate(_causal)
    return Predicate(_causal_offset, (integers(offset, "causal(offset)", ("[]", "[B]")),))


def _sliding_window(b: Any, h: Any, q: Any, k: Any, left: Any, right: Any) -> Any:
    return (q - k <= _at(left, h)) & (k - q <= _at(right, h))


def sliding_window(
    left: Int[ArrayLike, "*Nl"] | int, right: Int[ArrayLike, "*Nr"] | int = 0
) -> Mask:
    """A query sees `left` keys before itself, itself, and `right` after: `-right <= q - k <= left`.

    Args:
      left: int or, one a head, `[N]`; at least 0.
      right: the same; 0 (the default) sees no future.

    Sources: Longformer, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825 (its window of W tokens
    counts the query itself: `left = W - 1`).
    """
    allowed = ("[]", "[N]")
    return Predicate(
        _sliding_window,
        (
            integers(left, "sliding_window(left)", allowed, 0),
            integers(right, "sliding_window(right)", allowed, 0),
        ),
    )


def _prefix_lm(b: Any, h: Any, q: Any, k: Any, lengths: Any) -> Any:
    return (k < _at(lengths, b)) | (q >= k)


def prefix_lm(lengths: Int[ArrayLike, "*B"] | int) -> Mask:
    """Everyone sees the prefix, the rest is causal: `(k < lengths[b]) | (q >= k)`.

    Args:
      lengths: int or `[B]`, the number of prefix tokens, at least 0.

    Sources: T5, arXiv 1910.10683, section 3.2.1; UniLM, arXiv 1905.03197.
    """
    return Predicate(_prefix_lm, (integers(lengths, "prefix_lm(lengths)", ("[]", "[B]"), 0),))


def _chunked(b: Any, h: Any, q: Any, k: Any, size: Any) -> Any:
    return q // size == k // size


def chunked(size: Int[ArrayLike, ""] | int) -> Mask:
    """Positions are cut in chunks, each sees its own: `q // size == k // size`.

    With `& causal()` this is the local attention of Llama 4; alone, the blockwise attention of
    arXiv 1911.02972.
    """
    return Predicate(_chunked, (integers(size, "chunked(size)", ("[]",), 1),))


def _dilated(b: Any, h: Any, q: Any, k: Any, rate: Any) -> Any:
    return (q - k) % rate == 0


def dilated(rate: Int[ArrayLike, ""] | int) -> Mask:
    """Every `rate`-th key, counted from the query: `(q - k) % rate == 0`.

    With `& causal()`, the strided head of the Sparse Transformer (arXiv 1904.10509); with
    `& sliding_window(rate * w, rate * w)`, Longformer's dilated window (arXiv 2004.05150).
    """
    return Predicate(_dilated, (integers(rate, "dilated(rate)", ("[]",), 1),))


# --- documents, padding, prompts ---------------------------------------------------------------


def _segments(b: Any, h: Any, q: Any, k: Any, q_ids: Any, k_ids: Any) -> Any:
    return _at(q_ids, b, q) == _at(k_ids, b, k)


def segments(q_ids: Int[ArrayLike, "*Bq T"], k_ids: Int[ArrayLike, "*Bk S"] | None = None) -> Mask:
    """Packed documents see only themselves: `q_ids[b, q] == k_ids[b, k]`.

    Args:
      q_ids: segment ids of the queries, integers `[T]` or `[B, T]`, in any order.
      k_ids: segment ids of the keys, `[S]` or `[B, S]`; by default those of the queries.

    Ids may have 64 bits, as hashes of documents do: without JAX's x64 they are numbered, where
    their values are known. Through `jit` they come as wide as JAX keeps them, by default cut to 32
    bits: make the mask outside and pass it.

    Padding is a segment like any other here: `& key_padding(...)` keeps it from being seen.
    Source: packing, Krell et al., arXiv 2107.02027; T5, arXiv 1910.10683.
    """
    rows, columns = ("[T]", "[B, T]"), ("[S]", "[B, S]")
    of_queries = (q_ids, "segments(q_ids)", rows)
    if k_ids is None:
        return Predicate(_segments, identifiers(of_queries) * 2)
    return Predicate(_segments, identifiers(of_queries, (k_ids, "segments(k_ids)", columns)))


@repr_as(lambda valid: f"key_padding({valid})")
def _key_valid(b: Any, h: Any, q: Any, k: Any, valid: Any) -> Any:
    return _at(valid, b, k)


@repr_as(lambda lengths: f"key_padding(lengths={lengths})")
def _key_length(b: Any, h: Any, q: Any, k: Any, lengths: Any) -> Any:
    return k < _at(lengths, b)


def key_padding(
    valid: Bool[ArrayLike, "*B S"] | None = None,
    *,
    lengths: Int[ArrayLike, "*B"] | int | None = None,
) -> Mask:
    """Padding keys are seen by nobody: `valid[b, k]`, or `k < lengths[b]`.

    Args:
      valid: booleans `[S]` or `[B, S]`, True where the key is a real token (on the left, on the
        right, anywhere).
      lengths: instead, how many real tokens come before the padding, int or `[B]`.

    For tokens padded on the left, `~key_padding(lengths=pads)` with the numbers of pads says it.
    """
    return _padding("key_padding", "S", _key_valid, _key_length, valid, lengths)


@repr_as(lambda valid: f"query_padding({valid})")
def _query_valid(b: Any, h: Any, q: Any, k: Any, valid: Any) -> Any:
    return _at(valid, b, q)


@repr_as(lambda lengths: f"query_padding(lengths={lengths})")
def _query_length(b: Any, h: Any, q: Any, k: Any, lengths: Any) -> Any:
    return q < _at(lengths, b)


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
    return _padding("query_padding", "T", _query_valid, _query_length, valid, lengths)


def _padding(
    name: str,
    axis: str,
    by_valid: Callable[..., Any],
    by_length: Callable[..., Any],
    valid: Any,
    lengths: Any,
) -> Mask:
    if (valid is None) == (lengths is None):
        got = "neither" if valid is None else "both"
        raise ValueError(f"{name}: got {got} of `valid` and `lengths`, expected one of them")
    if valid is not None:
        shapes = (f"[{axis}]", f"[B, {axis}]")
        return Predicate(by_valid, (_booleans(valid, f"{name}(valid)", shapes),))
    counts = integers(lengths, f"{name}(lengths)", ("[]", "[B]"), 0)
    return Predicate(by_length, (counts,))


def _shared_prefix(b: Any, h: Any, q: Any, k: Any, length: Any, ids: Any) -> Any:
    return (k < _at(length, b)) | (_at(ids, b, q) == _at(ids, b, k))


def shared_prefix(length: Int[ArrayLike, "*Bp"] | int, ids: Int[ArrayLike, "*B T"]) -> Mask:
    """Several continuations of one prompt: `(k < length[b]) | (ids[b, q] == ids[b, k])`.

    Args:
      length: number of prompt tokens, int or `[B]`.
      ids: which continuation each position belongs to, integers `[T]` or `[B, T]`, as wide as in
        `segments`; the prompt needs an id of its own.

    Compose with `& causal()` to train on or to score many answers to a prompt that is computed
    once. Source: Hydragen, arXiv 2402.05099.
    """
    return Predicate(
        _shared_prefix,
        (
            integers(length, "shared_prefix(length)", ("[]", "[B]"), 0),
            *identifiers((ids, "shared_prefix(ids)", ("[T]", "[B, T]"))),
        ),
    )


# --- global tokens, grids, blocks, trees -------------------------------------------------------


@repr_as(lambda n: f"global_tokens({n if n.isdigit() else f'counts={n}'})", "counts")
def _first_tokens(b: Any, h: Any, q: Any, k: Any, n: Any) -> Any:
    return (q < _at(n, b)) | (k < _at(n, b))


@repr_as(lambda flags: f"global_tokens({flags})", "tokens")
def _flagged_tokens(b: Any, h: Any, q: Any, k: Any, flags: Any) -> Any:
    return _at(flags, b, q) | _at(flags, b, k)


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
        return Predicate(_first_tokens, (n,))
    array = as_given(tokens)
    if array.ndim == 0:
        return Predicate(_first_tokens, (integers(tokens, "global_tokens(n)", ("[]",), 0),))
    if is_integer(array):
        raise TypeError(
            f"global_tokens(tokens): got integers {list(array.shape)}, expected one integer or "
            "booleans [T] or [B, T]; tokens at these positions are "
            "global_tokens(jnp.zeros(T, bool).at[positions].set(True)), so many first tokens of "
            "each row are global_tokens(counts=...)"
        )
    flags = _booleans(tokens, "global_tokens(flags)", ("[T]", "[B, T]"))
    return Predicate(_flagged_tokens, (flags,))


def _written_grid(*numbers: str) -> str:
    axes = len(numbers) // 2
    shape, radius = (
        f"({', '.join(n)}{',' * (axes == 1)})" for n in (numbers[:axes], numbers[axes : 2 * axes])
    )
    prefix = f", prefix={numbers[-1]}" if len(numbers) % 2 else ""
    return f"neighborhood({shape}, {radius}{prefix})"


@repr_as(_written_grid)
def _neighborhood(b: Any, h: Any, q: Any, k: Any, shape: Any, radius: Any) -> Any:
    near, stride = True, 1
    for extent, reach in zip(reversed(shape), reversed(radius), strict=True):
        at, seen = q // stride % extent, k // stride % extent
        near &= jnp.abs(jnp.clip(at, reach, extent - 1 - reach) - seen) <= reach
        stride = stride * extent
    return near


@repr_as(_written_grid)
def _neighborhood_after(
    b: Any, h: Any, q: Any, k: Any, shape: Any, radius: Any, prefix: Any
) -> Any:
    near = _neighborhood(b, h, q - prefix, k - prefix, shape, radius)
    return (q < prefix) | (k < prefix) | near


def neighborhood(shape: Sequence[int], radius: int | Sequence[int], *, prefix: int = 0) -> Mask:
    """Tokens of a grid see the nearest `2 * radius + 1` along every axis.

    With x the coordinates of a position in a row-major grid:
    `|clip(x_q, radius, shape - 1 - radius) - x_k| <= radius` on every axis, so that a token at the
    border sees as many neighbours as one in the middle.

    Args:
      shape: extents of the grid, as in `(height, width)`.
      radius: one for all axes, or one an axis; `2 * radius + 1` fits in the extent.
      prefix: tokens before the grid that see all and are seen by all, as the class token of a ViT.

    The mask is for `prefix + prod(shape)` queries and keys: another T or S is an error, and where
    `positions=` lie beyond, nothing is seen.

    Source: Neighborhood Attention (NATTEN), arXiv 2204.07143.
    """
    axes = tuple(shape) if isinstance(shape, (Sequence, np.ndarray)) else (shape,)
    extents = tuple(plain(n, f"neighborhood(shape[{i}])", 1) for i, n in enumerate(axes))
    radii = tuple(radius) if isinstance(radius, (Sequence, np.ndarray)) else (radius,) * len(axes)
    if len(radii) != len(extents) or not extents:
        raise ValueError(
            f"neighborhood(radius): got {radius!r}, expected one integer or one for each axis of "
            f"shape {extents}"
        )
    reach = tuple(plain(r, "neighborhood(radius)", 0) for r in radii)
    for extent, r in zip(extents, reach, strict=True):
        if 2 * r + 1 > extent:
            raise ValueError(
                f"neighborhood(radius): got {r} for an axis of extent {extent}, expected "
                f"0 <= radius and 2 * radius + 1 <= extent"
            )
    before = plain(prefix, "neighborhood(prefix)", 0)
    tokens = before + math.prod(extents)
    if tokens > MOST:
        raise ValueError(
            f"neighborhood(shape): got {extents}, {tokens} tokens, expected less than 2**31: "
            "positions are int32"
        )
    if before:
        return Predicate(_neighborhood_after, (extents, reach, before), tokens)
    return Predicate(_neighborhood, (extents, reach), tokens)


def _block_sparse(b: Any, h: Any, q: Any, k: Any, table: Any, block: Any) -> Any:
    return _at(table, b, h, q // block, k // block)


def block_sparse(table: Bool[ArrayLike, "*BN Q K"], block: Int[ArrayLike, ""] | int) -> Mask:
    """A table of blocks: `table[b, h, q // block, k // block]`.

    Args:
      table: booleans `[Q, K]`, `[N, Q, K]` or `[B, N, Q, K]`; block (i, j) covers queries
        `i * block` to `(i + 1) * block - 1` and the keys likewise.
      block: tokens in a block, at least 1.

    Positions beyond the table use its last row or column (JAX's indexing).
    Source: Sparse Transformer, arXiv 1904.10509; BigBird, arXiv 2007.14062.
    """
    allowed = ("[Q, K]", "[N, Q, K]", "[B, N, Q, K]")
    return Predicate(
        _block_sparse,
        (
            _booleans(table, "block_sparse(table)", allowed),
            integers(block, "block_sparse(block)", ("[]",), 1),
        ),
    )


def _check_key(key: Any) -> None:
    """Checks that it is one key of `jax.random`, typed or of the old kind."""
    dtype, shape = getattr(key, "dtype", None), np.shape(key) if hasattr(key, "shape") else None
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return
    elif dtype == jnp.uint32 and shape is not None and len(shape) == 1:
        return
    got = repr(key) if dtype is None else f"{dtype}{list(shape or ())}"
    raise TypeError(
        f"random_blocks(key): got {got}, expected one key of jax.random, as jax.random.key(0)"
    )


def random_blocks(key: Array, count: int, block: int, q_len: int, k_len: int | None = None) -> Mask:
    """Every block of queries sees `count` random blocks of keys: `table[q // block, k // block]`.

    Args:
      key: a jax random key; the same key gives the same mask.
      count: blocks seen by each block of queries, drawn without replacement.
      block: tokens in a block.
      q_len, k_len: numbers of queries and of keys the table has to cover (`k_len` is `q_len` by
        default).

    Source: BigBird, arXiv 2007.14062, section 2.
    """
    _check_key(key)
    count, block, q_len, k_len = (
        plain(size, f"random_blocks({name})", 1)
        for name, size in (
            ("count", count),
            ("block", block),
            ("q_len", q_len),
            ("k_len", q_len if k_len is None else k_len),
        )
    )
    table = (-(-q_len // block), -(-k_len // block))
    if count > table[1]:
        raise ValueError(
            f"random_blocks(count): got {count}, expected at most {table[1]}, the number of blocks "
            f"of {block} in {k_len} keys"
        )
    rank = jax.random.uniform(key, table).argsort(axis=-1).argsort(axis=-1)
    return block_sparse(rank < count, block)


@repr_as(lambda *ends: f"tree({ends[0]})", "parents", "parents")
def _tree(b: Any, h: Any, q: Any, k: Any, enter: Any, leave: Any) -> Any:
    return (_at(enter, b, k) <= _at(enter, b, q)) & (_at(enter, b, q) < _at(leave, b, k))


@repr_as(lambda *ends: f"tree({ends[0]}, start={ends[2]})", "parents", "parents", "start")
def _tree_after(b: Any, h: Any, q: Any, k: Any, enter: Any, leave: Any, start: Any) -> Any:
    first = _at(start, b)
    # Beyond the tree an index would be clamped to its last node.
    related = _tree(b, h, q - first, k - first, enter, leave) & (k - first < enter.shape[-1])
    return jnp.where((q < first) | (k < first), q >= k, related)


def tree(parents: Int[ArrayLike, "*B T"], start: Int[ArrayLike, "*B"] | int | None = None) -> Mask:
    """A node sees itself and its ancestors: `enter[k] <= enter[q] < leave[k]`.

    `enter` and `leave` number the nodes in depth-first order, so that the descendants of a node
    are the interval between them.

    Args:
      parents: integers `[T]` or `[B, T]`, the parent of every node, -1 for a root; parents come
        before their children.
      start: an integer or `[B]`: the position of the first node, where a context comes before the
        tree: it is causal, and every node sees all of it. Without it the tree is all there is.

    Verifies a tree of drafted tokens in one pass. Sources: SpecInfer, arXiv 2305.09781; Medusa,
    arXiv 2401.10774.
    """
    array = integers(parents, "tree(parents)", ("[T]", "[B, T]"), -1)
    values = concrete(array)
    if values is not None and (values >= np.arange(array.shape[-1])).any():
        raise ValueError(
            "tree(parents): got a node before its parent, expected parents[i] < i; sort the nodes"
        )
    number = _depth_first if array.ndim == 1 else jax.vmap(_depth_first)
    enter, leave = number(array)
    if start is None:
        return Predicate(_tree, (enter, leave))
    first = integers(start, "tree(start)", ("[]", "[B]"), 0)
    return Predicate(_tree_after, (enter, leave, first))


def _depth_first(parents: Array) -> tuple[Array, Array]:
    """Entering and leaving times of every node, for parents that come before their children."""
    n = parents.shape[0]
    # Roots hang on a node n of their own.
    above = jnp.where(parents < 0, n, parents)

    def add(i: Any, sizes: Array) -> Array:
        node = n - 1 - i
        return sizes.at[above[node]].add(sizes[node])

    sizes = jax.lax.fori_loop(0, n, add, jnp.ones(n + 1, jnp.int32))

    def place(node: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        enter, free = state
        at = free[above[node]]
        free = free.at[above[node]].add(sizes[node]).at[node].set(at + 1)
        return enter.at[node].set(at), free

    enter, _ = jax.lax.fori_loop(
        0, n, place, (jnp.zeros(n, jnp.int32), jnp.zeros(n + 1, jnp.int32))
    )
    return enter, enter + sizes[:n]


def _block_diffusion(b: Any, h: Any, q: Any, k: Any, length: Any, block: Any) -> Any:
    q_clean, k_clean = q >= length, k >= length
    q_block = jnp.where(q_clean, q - length, q) // block
    k_block = jnp.where(k_clean, k - length, k) // block
    within = (q_block == k_block) & (q_clean == k_clean)
    before = (q_block > k_block) & k_clean
    return within | before


def block_diffusion(length: Int[ArrayLike, ""] | int, block: Int[ArrayLike, ""] | int) -> Mask:
    """Training mask of block diffusion: `length` noisy tokens, then the same tokens clean.

    With `blk` the block of a token within its half:
    `(blk_q == blk_k and same half) or (blk_q > blk_k and k is clean)`: a noisy block sees itself
    and the clean blocks before it; a clean block sees itself and the clean blocks before it.

    Args:
      length: tokens in each half; T = S = 2 * length.
      block: tokens in a block.

    Source: Block Diffusion, arXiv 2503.09573, section 3.2 and appendix B.6.
    """
    return Predicate(
        _block_diffusion,
        (
            integers(length, "block_diffusion(length)", ("[]",), 1),
            integers(block, "block_diffusion(block)", ("[]",), 1),
        ),
    )


# --- by head, by array, by function --------------------------------------------------------------


def per_head(parts: Sequence[Any]) -> Mask:
    """Head `h` uses `parts[h]`: masks or callables, one for every query head."""
    if not isinstance(parts, Sequence) or not parts:
        raise ValueError(f"per_head(masks): got {parts!r}, expected a list of masks, one a head")
    return PerHead(tuple(as_mask(p, f"per_head(masks[{i}])") for i, p in enumerate(parts)))


def predicate(fn: Callable[..., Any], *args: Any) -> Mask:
    """Any function of positions: `fn(b, h, q, k, *args) -> bool`, for one query and one key.

    Args:
      fn: a pure function; FlexAttention's `mask_mod` signature, with `q`, `k` for `q_idx`,
        `kv_idx`.
      *args: arrays it reads, passed after the positions. They are leaves of the mask; arrays that
        the function closes over become leaves when it is traced.

    An axis read at a bare `b`, `h`, `q` or `k` must have that extent, or, where `positions=` are
    given, hold them (see `Positions`); computed indices follow JAX's rules (out of range is
    clamped).
    """
    if not callable(fn):
        raise TypeError(f"predicate(fn): got {type(fn).__name__}, expected fn(b, h, q, k, *args)")
    check_is_predicate(fn, "predicate(fn)")
    if isinstance(fn, Mask):
        if args:
            raise TypeError(f"predicate(fn): got {fn!r} with arguments, expected a function")
        return fn
    check_exact(args, "predicate(args)")
    return Predicate(fn, args)


def from_array(array: Shaped[ArrayLike, "..."], convention: Convention) -> Mask:
    """A mask from an array of another library's convention.

    Args:
      array: the array. Rank 4 is `[B|1, N|1, T|1, S|1]`, rank 3 is `[B|1, T|1, S|1]`, and what
        rank 2 means is the convention's:

        | convention | keeps | removes | dtype | rank 2 | used by |
        |---|---|---|---|---|---|
        | `"attend"` | True, 1 | False, 0 | bool, integer | `[T, S]` | `jax.nn`, torch SDPA |
        | `"ignore"` | False, 0 | True, 1 | bool, int, float | `[T, S]`, or `[B, S]` as said below \
| the Transformer tutorial, torch `key_padding_mask`, `attn_mask` |
        | `"additive"` | 0 | -1e4 or less | float | `[T, S]` | torch float masks, T5, Hugging Face \
inside |
        | `"hf"` | 1 | 0 | int, bool, float | `[B, S]` | Hugging Face `attention_mask` |
        | `"keras"` | True, 1 | False, 0 | bool, integer | `[B, S]` | Keras `mask`, `padding_mask` |
        | `"flax"` | not 0 | 0 | bool, int, float | `[T, S]` | `flax.linen.make_attention_mask` |

        Padding `[B, S]` in the "ignore" convention is told from `[T, S]` by giving it rank 4, as
        the tutorial does: `padding[:, None, None, :]`.
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
    keep = kept(array, convention)
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


@answers(VIEWS, "diff")
def diff(
    first: MaskLike,
    second: MaskLike,
    /,
    T: int,
    S: int | None = None,
    *,
    b: int = 0,
    h: int = 0,
    color: bool | None = None,
) -> Diff:
    """Where two masks differ: for checking one that was rewritten against the old one.

    Args:
      first, second: masks, callables `(b, h, q, k) -> bool`, or boolean arrays; given by place.
      T, S: numbers of queries and of keys; S is T by default.
      b, h: the batch row and the query head that are compared.
      color: whether to colour by ANSI codes; by default on a terminal, unless `NO_COLOR` is set.

    Returns:
      A `Diff`, true if they differ, to be printed: `-` where only the first allows, `+` where only
      the second does. Above 4 million pairs masks are compared by bounds and, where these cannot
      tell, tile by tile: O(T * S) time, O(tile) memory.

    Raises:
      TypeError: for a batch row or a head that is not an integer.
      ValueError: for sizes below 1 or not those of the masks' arrays, and for a row or a head that
        these do not have.

    Example:
      >>> from jaxattn import masks
      >>> print(masks.diff(masks.causal(), lambda b, h, q, k: q > k, 3))
      3 of 9 pairs differ; the first: query 0, key 0, which only the first mask allows
       - · ·
      ██ - ·
      ████ -
    """
    return cast("Diff", views().diff(first, second, T, S, b=b, h=h, color=color))

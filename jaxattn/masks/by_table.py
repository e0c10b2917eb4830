"""Masks that read tables: of blocks, given, random or chosen by the data; and of parents in trees.

Every constructor returns a class of one line of maths, its `formula`; the arrays are leaves, as in
`by_array`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.arrays import array_of
from ..checks.integers import concrete, integers, plain
from ..pytrees import pytree
from ..shapes import Array, ArrayLike, Bool, Float, Int
from .by_array import booleans
from .mask import BuiltInMask, Mask, Scalar, entry

_TABLES = ("[Q, K]", "[N, Q, K]", "[B, N, Q, K]")


@pytree
class BlockSparse(BuiltInMask):
    """The mask that `block_sparse` makes."""

    table: Any
    block: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        rows, columns = self.block if isinstance(self.block, tuple) else (self.block, self.block)
        return entry(self.table, b, h, q // rows, k // columns)


def block_sparse(
    table: Bool[ArrayLike, "*BN Q K"],
    block: Int[ArrayLike, ""] | int | tuple[Int[ArrayLike, ""] | int, Int[ArrayLike, ""] | int],
) -> Mask:
    """A table of blocks: `table[b, h, q // block, k // block]`.

    Args:
      table: booleans `[Q, K]`, `[N, Q, K]` or `[B, N, Q, K]`; block (i, j) covers queries
        `i * block` to `(i + 1) * block - 1` and the keys likewise.
      block: tokens in a block, at least 1; or two numbers, of queries and of keys in a block.

    From indices of key blocks, `[..., Q, count]`, a table is
    `jax.nn.one_hot(indices, K, dtype=bool).any(-2)`, and from the scores of all blocks
    `top_blocks` makes it.

    Positions beyond the table use its last row or column (JAX's indexing).
    Source: Sparse Transformer, arXiv 1904.10509; BigBird, arXiv 2007.14062.
    """
    return BlockSparse(
        booleans(table, "block_sparse(table)", _TABLES), _sides(block, "block_sparse(block)")
    )


def top_blocks(
    block_scores: Float[ArrayLike, "*BN Q K"],
    count: Int[ArrayLike, ""] | int,
    block: Int[ArrayLike, ""] | int | tuple[Int[ArrayLike, ""] | int, Int[ArrayLike, ""] | int],
) -> Mask:
    """Every block of queries sees the `count` blocks of keys with the greatest scores.

    `rank(block_scores)[b, h, q // block, k // block] < count`, with rank 0 for the greatest score
    of a row; of equal scores the earlier block comes first, and -inf and NaN are never chosen.

    Args:
      block_scores: floats `[Q, K]`, `[N, Q, K]` or `[B, N, Q, K]`, as from pooled queries and keys.
        The choice carries no gradient.
      count: blocks that are chosen, at least 0; it may be traced.
      block: tokens in a block, at least 1; or two numbers, of queries and of keys in a block:
        `(1, 64)` chooses for every query by itself.

    New scores reuse the compiled program, and tiles that no block touches cost nothing, so blocks
    as large as the tiles, or larger, save most.
    MoBA (arXiv 2502.13189) is `causal() & (chunked(block) | top_blocks(s, count, (1, block)))`,
    with `s` the products of queries and mean keys, -inf where a block is not in the past. The
    branch of chosen blocks in NSA (arXiv 2502.11089) is the same with its own scores.

    Raises:
      TypeError: for scores that are not floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxattn import masks
      >>> scores = jnp.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
      >>> masks.top_blocks(scores, 2, block=(1, 2)).dense(2, 6)[0, 0].astype(int)
      Array([[1, 1, 0, 0, 1, 1],
             [0, 0, 1, 1, 1, 1]], dtype=int32)
    """
    array = array_of(block_scores, "top_blocks(block_scores)", "floats")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"top_blocks(block_scores): got dtype {array.dtype}, expected floats; a table of "
            "booleans is block_sparse(table, block)"
        )
    if array.ndim not in (2, 3, 4):
        raise ValueError(
            f"top_blocks(block_scores): got shape {list(array.shape)}, expected "
            f"{' or '.join(_TABLES)}"
        )
    kept = integers(count, "top_blocks(count)", ("[]",), 0)
    array = jax.lax.stop_gradient(array)
    real = array > -jnp.inf
    worst_last = jnp.where(real, -array, jnp.inf)
    rank = worst_last.argsort(axis=-1).argsort(axis=-1)
    return BlockSparse((rank < kept) & real, _sides(block, "top_blocks(block)"))


def _sides(block: Any, name: str) -> Any:
    """One number of tokens in a block, or two: of queries and of keys."""
    if not isinstance(block, (tuple, list)):
        return integers(block, name, ("[]",), 1)
    if len(block) != 2:
        raise ValueError(f"{name}: got {block!r}, expected one integer, or (queries, keys)")
    return tuple(integers(side, f"{name}[{i}]", ("[]",), 1) for i, side in enumerate(block))


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


@pytree
class Tree(BuiltInMask):
    """The mask that `tree` makes."""

    enter: Any = field(metadata={"argument": "parents"})
    leave: Any = field(metadata={"argument": "parents"}, repr=False)
    start: Any = field(default=None, kw_only=True)

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        if self.start is None:
            return self._related(b, q, k)
        first = entry(self.start, b)
        # Beyond the tree an index would be clamped to its last node.
        related = self._related(b, q - first, k - first) & (k - first < self.enter.shape[-1])
        return jnp.where((q < first) | (k < first), q >= k, related)

    def _related(self, b: Scalar, q: Scalar, k: Scalar) -> Any:
        at_q, at_k = entry(self.enter, b, q), entry(self.enter, b, k)
        return (at_k <= at_q) & (at_q < entry(self.leave, b, k))


def tree(
    parents: Int[ArrayLike, "*B M"],
    start: Int[ArrayLike, "*Bs"] | int | None = None,
    *,
    ids: Int[ArrayLike, "*Bt T"] | None = None,
) -> Mask:
    """A node sees itself and its ancestors: `enter[k] <= enter[q] < leave[k]`.

    `enter` and `leave` number the nodes in depth-first order, so that the descendants of a node
    are the interval between them.

    Args:
      parents: integers `[M]` or `[B, M]`, the parent of every node, -1 for a root; parents come
        before their children. Without `ids` a node is a token: M is T.
      start: an integer or `[B]`: the position of the first node, where a context comes before the
        tree: it is causal, and every node sees all of it. Without it the tree is all there is.
      ids: integers `[T]` or `[B, T]`, the node to which each token belongs, where a node is a piece
        of text; `& causal()` orders the tokens within it.

    With `ids`, one row holds several prompts, each computed once, with its answers, as
    reinforcement learning from groups of answers needs (GRPO, arXiv 2402.03300):
    `tree([-1, 0, 0, -1, 3, 3], ids=ids) & causal()` is two prompts, 0 and 3, with two answers each.
    Answers may branch again. Give padding a root of its own.

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
    if ids is not None:
        of_tokens = _nodes(ids, array)
        enter, leave = (_read_at(times, of_tokens) for times in (enter, leave))
    if start is None:
        return Tree(enter, leave)
    return Tree(enter, leave, start=integers(start, "tree(start)", ("[]", "[B]"), 0))


def _nodes(given: Any, parents: Array) -> Array:
    """The node of every token, checked."""
    ids = jnp.asarray(integers(given, "tree(ids)", ("[T]", "[B, T]"), 0))
    values, nodes = concrete(ids), parents.shape[-1]
    if values is not None and (values >= nodes).any():
        raise ValueError(
            f"tree(ids): got node {values.max()}, expected less than {nodes}, the number of parents"
        )
    if ids.ndim == parents.ndim == 2 and len(ids) != len(parents):
        raise ValueError(
            f"tree(ids): got {len(ids)} rows, expected {len(parents)}, as many as parents has"
        )
    return ids


def _read_at(times: Array, ids: Array) -> Array:
    """`times[b, ids[b, t]]`, where either may be the same for all rows."""
    if times.ndim == 1:
        return times[ids]
    return jnp.take_along_axis(times, jnp.broadcast_to(ids, (len(times), ids.shape[-1])), axis=-1)


def _depth_first(parents: Array) -> tuple[Array, Array]:
    """Entering and leaving times of every node, for parents that come before their children."""
    n = parents.shape[0]
    # The roots are children of an additional node n.
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

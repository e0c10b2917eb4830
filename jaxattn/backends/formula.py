"""Masked attention as the formula, on whole rows of logits: the definition.

    logits = score(scale * query . key)     weights = softmax(logits, where=mask)
    out = weights @ value                   lse = log(sum(exp(logits), where=mask))

Differentiable any number of times, in both modes. Every other engine computes the same. Where an
engine has no derivative of its own, this formula is differentiated, some rows at a time.

Sums are over visible pairs only, also where numbers are not finite. Products of matrices are over
all pairs, and 0 * NaN is NaN, so their factors are made finite first. `reach` then finds the
queries that see a number that was not finite. If all are finite, none of that is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import Array, Bool, Float
from ..tracing.dependence import Kind
from ..tracing.split import Operand
from . import base
from .operation import Rules, operation
from .problem import DROPOUT, Column, Config, Inputs, by_key_head, joined

# The number of logits computed at once where a derivative takes some rows at a time.
CELLS = 2**22

# The number of groups of channels of values, one after the other, if some are not finite.
_GROUPS = 8


class Result(NamedTuple):
    """Output with the config's columns, LSE, and weights before dropout, of some rows."""

    out: Float[Array, "B T N Hv+columns"]
    lse: Float[Array, "B T N"]
    weights: Float[Array, "B N T S"]


def attend(
    config: Config,
    x: Inputs,
    start: Any = 0,
    rows: int | None = None,
    *,
    layout: Layout | None = None,
) -> Result:
    """Attention of `rows` queries from `start` on, by default of all.

    `layout` says how products are written, by default `LENGTH_FIRST`.
    """
    layout = LENGTH_FIRST if layout is None else layout
    T = x.query.shape[1]
    rows = T if rows is None else rows
    seen = visible(config, x, start, rows)  # [B|1, N|1, T, S]

    query = x.query if rows == T else lax.dynamic_slice_in_dim(x.query, start, rows, 1)
    query, key, value = (layout.swapped(a) for a in (query, x.key, x.value))
    products = Products(layout, config.precision)
    logits = _product(products, query, key)
    weighed = weigh(config, x, seen, logits, start, rows)
    out = layout.swapped(_weigh(products, weighed.kept, value, key, seen))
    if config.columns:
        columns = [jnp.moveaxis(column, 1, 2)[..., None] for column in weighed.columns]
        out = jnp.concatenate([out, *columns], -1)
    else:
        out = out.astype(x.query.dtype)
    return Result(out, jnp.moveaxis(weighed.lse, 1, 2), weighed.weights)


class Weighed(NamedTuple):
    """Weights after dropout, weights before it, LSE, and columns of statistics, of some rows."""

    kept: Float[Array, "B N T S"]
    weights: Float[Array, "B N T S"]
    lse: Float[Array, "B N T"]
    columns: list[Float[Array, "B N T"]]


def weigh(
    config: Config, x: Inputs, seen: Array | None, logits: Array, start: Any, rows: int
) -> Weighed:
    """The weights of some rows, and what is read off them, from `query . key`."""
    dtype = logits.dtype
    operands, of_columns = config.split(x.score)
    zero = jnp.zeros((), dtype)
    logits = logits * x.scale.reshape(-1, 1, 1, 1)
    if seen is not None:
        logits = jnp.where(seen, logits, zero)
    if config.score is not None:
        parts = _tiles(config.score.kinds, operands, x, start, rows)
        logits = config.score.scored(logits, parts)
    weights, lse = _softmax(seen, logits)
    columns = []
    for column, some in zip(config.columns, of_columns, strict=True):
        found = column.residue.scored(logits, _tiles(column.residue.kinds, some, x, start, rows))
        if column.mean:
            # A weight of 0 takes no part, whatever the function is there: 0 * inf is NaN.
            columns.append((weights * jnp.where(weights == 0, zero, found)).sum(-1))
        else:
            columns.append(_extreme(column, lax.stop_gradient((seen, logits, found))))
    kept = weights
    if config.dropout:
        first, second, at, rate = _tiles(DROPOUT, x.dropout, x, start, rows)
        keep = base.keeps((first, second), at, rate)
        # A factor, so that dropping a weight of NaN does not hide it.
        kept = weights * jnp.where(keep, base.kept_scale(rate, dtype), zero)
    return Weighed(kept, weights, lse, columns)


def _extreme(column: Column, of: tuple[Array | None, Array, Array]) -> Float[Array, "B N T"]:
    """A column that is no mean, of the mask, the logits and the column's function."""
    seen, logits, found = of
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    if column.reduce == "max":
        return (found if seen is None else jnp.where(seen, found, -jnp.inf)).max(-1)
    top = logits.max(-1, keepdims=True)
    least = jnp.where(logits == top, found, jnp.inf).min(-1)
    return jnp.where(top[..., 0] == -jnp.inf, -1, least)


def by_rows(config: Config, x: Inputs) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output and LSE, some rows at a time: memory is O(T + S), forward and backward."""

    def some(start: Any, rows: int) -> tuple[Array, Array]:
        return jax.checkpoint(lambda first: attend(config, x, first, rows)[:2])(start)

    out, lse = over_rows(x, some)
    return out, lse


def over_rows(x: Inputs, fn: Callable[[Any, int], Any]) -> Any:
    """`fn(start, rows)` for all rows, some at a time: arrays `[B, rows, ...]` as `[B, T, ...]`."""
    T, size = x.query.shape[1], rows_at_once(x)
    if base.symbolic(T) or size == T:
        return fn(0, T)
    found = lax.map(lambda start: fn(start, size), jnp.arange(T // size, dtype=jnp.int32) * size)
    parts = [jax.tree.map(_rows_joined, found)]
    if T % size:
        parts.append(fn(T - T % size, T % size))
    return jax.tree.map(lambda *each: jnp.concatenate(each, 1), *parts)


def rows_at_once(x: Inputs) -> Any:
    """The number of rows that are computed at once: `T`, or fewer if there are too many logits."""
    B, T, N, _ = x.query.shape
    S = x.key.shape[1]
    if base.symbolic(T, S):
        return T
    size = max(1, CELLS // max((1 if base.symbolic(B) else B) * N * S, 1))
    return T if size >= T else size


def _rows_joined(array: Array) -> Array:
    """`[n, B, rows, ...]` as `[B, n * rows, ...]`."""
    n, B, rows = array.shape[:3]
    return jnp.moveaxis(array, 0, 1).reshape(B, n * rows, *array.shape[3:])


# --- the mask and the score of some rows ----------------------------------------------------------


def visible(config: Config, x: Inputs, start: Any, rows: int) -> Bool[Array, "b n T S"] | None:
    """The mask of some rows, `[B|1, N|1, rows, S]`; None without a mask."""
    if config.mask is None:
        return None
    found = config.mask.evaluated(*_tiles(config.mask.kinds, x.mask, x, start, rows))
    lead = (1, 1, *found.shape[:-2])[-2:]
    return jnp.broadcast_to(found, (*lead, rows, x.key.shape[1]))


def _tiles(
    kinds: Sequence[Kind], arrays: Sequence[Array], x: Inputs, start: Any, rows: int
) -> list[Array]:
    """The parts of operands that belong to some rows, as they broadcast to `[.., rows, S]`."""
    S = x.key.shape[1]
    pairs = zip(kinds, arrays, strict=True)
    return [Operand(kind, array).tile(start, 0, rows, S, S) for kind, array in pairs]


# --- products -------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How products are written: with which axes of queries, keys, values and outputs first."""

    logits: str
    values: str
    heads_first: bool

    def swapped(self, array: Array) -> Array:
        """An array with length before heads as this layout has it, and back."""
        return jnp.swapaxes(array, 1, 2) if self.heads_first else array

    def with_heads_first(self, array: Array) -> Array:
        """An array of this layout with heads before length, and back."""
        return array if self.heads_first else jnp.swapaxes(array, 1, 2)


# The layout of the inputs: XLA transposes them in the products, if at all.
LENGTH_FIRST = Layout("btkgh,bskh->bkgts", "bkgts,bskh->btkgh", False)
# The layout in which a cache holds keys and values, so that they are read in place. A branch would
# receive them transposed.
HEADS_FIRST = Layout("bkth,bksh->bkts", "bkts,bksh->bkth", True)


class Products(NamedTuple):
    """The layout of products, and their precision."""

    layout: Layout
    precision: Any


def _logits(products: Products, query: Array, key: Array) -> Float[Array, "B N T S"]:
    """`query . key` of every pair; the queries of a key head together, so that it is read once."""
    if products.layout.heads_first:
        B, N, T, H = query.shape
        by_key = query.reshape(B, key.shape[1], -1, H)
        return _einsum(products.layout.logits, products.precision, by_key, key).reshape(B, N, T, -1)
    query = by_key_head(query, 2, key.shape[2])
    return joined(_einsum(products.layout.logits, products.precision, query, key), 1)


def _values(products: Products, weights: Array, value: Array) -> Float[Array, "B ..."]:
    value = value.astype(weights.dtype)
    if products.layout.heads_first:
        B, N, T, S = weights.shape
        by_key = weights.reshape(B, value.shape[1], -1, S)
        return _einsum(products.layout.values, products.precision, by_key, value).reshape(
            B, N, T, -1
        )
    weights = by_key_head(weights, 1, value.shape[2])
    return joined(_einsum(products.layout.values, products.precision, weights, value), 2)


def _einsum(layout: str, precision: Any, a: Array, b: Array) -> Array:
    dtype = base.accumulator(a.dtype)
    precision = lax.Precision.HIGHEST if precision is None else precision
    return jnp.einsum(layout, a, b, precision=precision, preferred_element_type=dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(products: Products, query: Array, key: Array) -> Float[Array, "B N T S"]:
    """`query . key`; what is not finite stays with its pairs, in derivatives too."""
    return _logits(products, query, key)


@_product.defjvp
def _product_jvp(products: Products, primals: Any, tangents: Any) -> tuple[Array, Array]:
    query, key = primals
    d_query, d_key = tangents
    moved = _logits(products, d_query, base.finite(key)) + _logits(
        products, base.finite(query), d_key
    )
    return _product(products, query, key), moved


@jax.custom_jvp
def _softmax(
    seen: Bool[Array, "#B #N T S"] | None, logits: Float[Array, "B N T S"]
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T"]]:
    """Weights of visible pairs, `exp(logits - lse)`, and the LSE; 0 and -inf in empty rows.

    The mask decides which rows are empty: a row whose visible logits are all -inf is NaN, as in
    any softmax.
    """
    if seen is None:
        top = logits.max(-1, keepdims=True)
        p = jnp.exp(below(logits, top))
        total = p.sum(-1, keepdims=True)
        return p / total, (top + jnp.log(total))[..., 0]
    some = seen.any(-1, keepdims=True)
    # Over visible pairs alone: their logits may be smaller than any number put in masked places.
    top = jnp.where(seen, logits, -jnp.inf).max(-1, keepdims=True)
    top = jnp.where(some, top, 0)
    p = jnp.where(seen, jnp.exp(jnp.where(seen, below(logits, top), 0)), 0)
    total = jnp.where(some, p.sum(-1, keepdims=True), 1)
    # The total of a row that sees a NaN is NaN, and the weights of what it may not see are 0 still.
    return jnp.where(seen, p / total, 0), jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]


@jax.custom_jvp
def below(logits: Float[Array, "..."], top: Float[Array, "..."]) -> Float[Array, "..."]:
    """`logits - top`, exactly 0 at the largest logit.

    XLA may compute the scale and the difference as one operation with one rounding, and the largest
    of huge logits would then differ from itself.
    """
    return jnp.where((logits == top) & jnp.isfinite(top), 0, logits - top)


@below.defjvp
def _below_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return below(*primals), tangents[0] - tangents[1]


@_softmax.defjvp
def _softmax_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    p, lse = _softmax(*primals)
    # A weight of 0 has no derivative, however large the tangent: 0 * inf is NaN.
    none = p == 0
    moved = jnp.where(none, 0, tangents[1])
    mean = (p * moved).sum(-1)
    return (p, lse), (jnp.where(none, 0, p * (moved - mean[..., None])), mean)


# --- weights @ value, with what is not finite -----------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weigh(
    products: Products, weights: Array, value: Array, key: Array, seen: Array | None
) -> Float[Array, "B ..."]:
    """`weights @ value` over visible pairs; `key` says which rows are not to be differentiated."""

    def with_nonfinite() -> Array:
        # The product is that of the other branch, so that it rounds in the same way.
        by_head = products.layout.with_heads_first(value)
        found = nonfinite_sums(seen, by_head, weights.shape[1], weights.dtype)
        found = products.layout.with_heads_first(found)
        return _values(products, weights, base.finite(value)) + found

    N, T, S = weights.shape[1:]
    if base.symbolic(T, S) or value.shape[1] * value.shape[2] <= N * T:
        return lax.cond(
            base.anywhere(~base.surely_finite(value)),
            with_nonfinite,
            lambda: _values(products, weights, value),
        )
    # With few queries the result is checked, which is smaller.
    out = _values(products, weights, value)
    return lax.cond(base.anywhere(~jnp.isfinite(out)), with_nonfinite, lambda: out)


@_weigh.defjvp
def _weigh_jvp(products: Products, primals: Any, tangents: Any) -> tuple[Array, Array]:
    weights, value, key, seen = primals
    out = _weigh(products, *primals)
    given = (weights, value, key, out) + (() if seen is None else (seen,))
    (moved,) = operation(_weighing(products), given, tuple(tangents[:2]), (out,))
    return out, moved


@lru_cache(maxsize=64)
def _weighing(products: Products) -> Rules:
    """The tangent of `_weigh` in weights and values, and its transpose."""

    def apply(fixed: Any, operands: Any) -> Any:
        weights, value, *_ = fixed
        d_weights, d_value = operands
        by_weights = _values(products, d_weights, base.finite(value))
        return (by_weights + _values(products, weights, d_value),)

    def slope(fixed: Any, operands: Any, _: Any, moved: Any) -> Any:
        def of(weights: Array, value: Array) -> Any:
            return apply((weights, value), operands)

        return jax.jvp(of, tuple(fixed[:2]), tuple(moved[:2]))[1]

    def pulled(weights: Array, value: Array, d_out: Array) -> tuple[Array, Array]:
        _, back = jax.vjp(partial(_values, products), weights, value)
        return back(d_out)

    def with_nonfinite(
        seen: Array, bad: Array, keys: Array, weights: Array, value: Array, d_out: Array
    ) -> tuple[Array, Array]:
        bad, keys = products.layout.with_heads_first(bad), products.layout.with_heads_first(keys)
        rows, reached = (found[..., None] for found in _without_gradient(seen, bad, keys))
        good = products.layout.with_heads_first(seen.any(-1, keepdims=True) & ~rows)
        d_weights, d_value = pulled(
            jnp.where(rows, 0, weights), base.finite(value), jnp.where(good, d_out, 0)
        )
        nan = jnp.asarray(jnp.nan, value.dtype)
        return (
            jnp.where(rows, jnp.nan, d_weights),
            jnp.where(products.layout.with_heads_first(reached), nan, d_value),
        )

    def transpose(fixed: Any, cotangents: Any) -> Any:
        weights, value, key, out, *seen = fixed
        # XLA would evaluate a constant, such as the cotangent of a plain sum, while it compiles.
        d_out = lax.optimization_barrier(cotangents[0])
        # Of what is visible, values that are not finite are in the output; keys need not be.
        bad = ~jnp.isfinite(out).all(-1) | ~jnp.isfinite(d_out).all(-1)
        keys = ~jnp.isfinite(key).all(-1)
        shown = seen[0] if seen else jnp.ones((1, 1, *weights.shape[2:]), bool)
        return lax.cond(
            base.anywhere(bad.any() | keys.any()),
            lambda: with_nonfinite(shown, bad, keys, weights, value, d_out),
            lambda: pulled(weights, value, d_out),
        )

    return Rules(apply, slope, transpose)


# --- what is not finite ---------------------------------------------------------------------------


def _without_gradient(
    seen: Bool[Array, "#B #N T S"], bad: Bool[Array, "B N T"], keys: Bool[Array, "B K S"]
) -> tuple[Bool[Array, "B N T"], Bool[Array, "B K S"]]:
    """Queries that have no finite gradient, and the keys that they see.

    These are the queries with a visible key that are `bad`, or for which one of `keys` is visible.
    """
    B, N, T = bad.shape
    K, S = keys.shape[1:]
    rows = (seen.any(-1) & bad) | reach(seen, keys[..., None], N)[..., 0]
    shown = jnp.broadcast_to(seen, (B, N, T, S)).reshape(B, K, -1, S)
    return rows, _counted("bkts,bkt->bks", shown, rows.reshape(B, K, -1))


def reach(
    seen: Bool[Array, "#B #N T S"], flags: Bool[Array, "B K S C"], N: int
) -> Bool[Array, "B N T C"]:
    """For each query, which flags any of its visible keys has."""
    B, K, S, C = flags.shape
    T = seen.shape[2]
    if seen.shape[1] == 1:
        found = _counted("bts,bksc->bktc", jnp.broadcast_to(seen, (B, 1, T, S))[:, 0], flags)
        return jnp.repeat(found, N // K, 1)
    shown = jnp.broadcast_to(seen, (B, N, T, S)).reshape(B, K, -1, S)
    return _counted("bkts,bksc->bktc", shown, flags).reshape(B, N, T, C)


def _counted(layout: str, a: Array, b: Array) -> Bool[Array, "..."]:
    """Whether any term of a product of flags is True."""
    return jnp.einsum(layout, a.astype(jnp.float32), b.astype(jnp.float32)) > 0


def nonfinite_sums(
    seen: Bool[Array, "#B #N T S"] | None, value: Float[Array, "B K S Hv"], N: int, dtype: Any
) -> Float[Array, "B N #T Hv"]:
    """What visible values that are not finite add to the sums of queries: 0, NaN, inf or -inf."""
    if seen is None:
        same = added(kinds(value).any(2, keepdims=True), dtype)
        return jnp.repeat(same, N // value.shape[1], 1)

    def some(value: Array) -> Array:
        return added(reach(seen, kinds(value), N), dtype)

    # Some channels at a time: XLA reserves memory for them, though they are rarely computed.
    groups = math.gcd(value.shape[-1], _GROUPS)
    parts = jnp.moveaxis(value.reshape(*value.shape[:-1], groups, -1), -2, 0)
    found = jnp.moveaxis(lax.map(some, parts), 0, -2)
    return found.reshape(*found.shape[:-2], -1)


def kinds(value: Float[Array, "B K S Hv"]) -> Bool[Array, "B K S kinds"]:
    """Where values are NaN, inf, and -inf: the flags that `reach` takes, and `added` adds."""
    # Not three arrays, joined: XLA compiles that as a loop for each and one for joining them.
    which = jnp.where(value == jnp.inf, 1, jnp.where(value == -jnp.inf, 2, 3))
    which = jnp.where(jnp.isnan(value), 0, which)[..., None, :]
    *lead, _, width = which.shape
    flags = which == lax.broadcasted_iota(which.dtype, (*lead, 3, width), len(lead))
    return flags.reshape(*lead, 3 * width)


def added(kinds: Bool[Array, "B N T kinds"], dtype: Any) -> Float[Array, "B N T Hv"]:
    """What values that are not finite add to the sums of queries: 0, NaN, inf or -inf."""
    nan, up, down = jnp.split(kinds, 3, -1)
    zero = jnp.zeros((), dtype)
    found = jnp.where(up, jnp.asarray(jnp.inf, dtype), zero)
    found = found + jnp.where(down, jnp.asarray(-jnp.inf, dtype), zero)
    return jnp.where(nan, jnp.asarray(jnp.nan, dtype), found)

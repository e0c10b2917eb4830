"""Attention on whole rows of logits, some batch rows at a time: what short rows cost least.

    forward   s = q k'              p = e^(s - max)         out = p v / sum(p)
    backward  s' = k q'             p' = e^(s' - lse)
              dv = p' do            dp' = v do'             ds' = p' (dp' - delta)
              dk = ds' q            dq' = k' ds'

The logits of a step stay in the caches, and every step uses the memory of the one before. XLA would
otherwise set aside fresh pages in every call.

Products have heads in front, and no transposed left factor: these go to the fastest library that
XLA has on CPU. The copies in that order are made of a step's part alone, and numbers that are not
finite are replaced on the way, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..mesh import constant
from ..shapes import Array, Bool, Float
from ..tracing.dependence import Kind
from ..tracing.split import as_tile, skewed
from . import base, bfloat16, formula, problem
from .base import Call, unchanged
from .flash import transforms
from .flash.operands import cleaned, learned, replaced
from .flash.tile_sizes import largest_divisor
from .problem import DROPOUT, Config, Engine, Gradients, Inputs, Keeping, joined

WHY = "whole rows of logits, a few batch rows at a time, so that they stay in the caches"

LIMITS: tuple[str, ...] = ()

STATISTICS = base.Statistics()

prepare = unchanged

# Numbers that a step works on, in all its arrays: 8 MB of float32. With half as many, rows of 16 to
# 77 took up to a quarter longer; with twice as many, a tenth.
STEP_NUMBERS = 2**21

# Numbers up to which all rows are one step: 20 MB of float32. Beyond, both passes of rows of 128
# took nearly twice as long: temporary arrays of more than 32 MB are fresh pages in every call.
WHOLE_NUMBERS = 5 * 2**20


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: sizes are 0, or lengths are symbolic."""
    return STATISTICS.missing(call) or base.nothing_to_cut(call)


def footprint(call: Call) -> int:
    """Bytes of the arrays of one step."""
    B, T, S, N, K, H, Hv = call.sizes
    each = _numbers(T, S, N, K, H + Hv)
    width = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    return int(_rows_of_step(B, each) * each * width)


def _rows_of_step(B: int, each: int) -> int:
    """The batch rows of a step, where each has so many numbers."""
    if not base.symbolic(B) and B * each <= WHOLE_NUMBERS:
        return B
    return largest_divisor(B, STEP_NUMBERS // each)


def _numbers(T: int, S: int, N: int, K: int, widths: int) -> int:
    """Numbers that a batch row takes: of logits and weights, and of copies of the inputs."""
    return 2 * N * T * S + (N * T + K * S) * widths


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    return transforms.attend(*build(call))


def build(call: Call) -> tuple[Config, Inputs]:
    """What the steps are compiled for, and what they are given."""
    lengths = (call.sizes.T, call.sizes.S)
    engine = KEEPING if _keeps(call) else ENGINE
    return problem.build(call, engine, bfloat16.factors(call), lambda known, heads: lengths)


def _keeps(call: Call) -> bool:
    """Whether the forward keeps weights for the backward, instead of computing them again.

    They take no more memory than inputs and outputs then. With more than one step they would not
    stay in the caches, and a score is differentiated at its logits, which are computed anyway.
    """
    B, T, S, N, K, H, Hv = call.sizes
    if call.score is not None or call.shards is not None or base.symbolic(B):
        return False
    width = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    others = (N * T + K * S) * (H + Hv) * jnp.dtype(call.query.dtype).itemsize
    whole = B * _numbers(T, S, N, K, H + Hv) <= WHOLE_NUMBERS
    return bool(whole and N * T * S * width <= others)


# --- forward and backward -------------------------------------------------------------------------


def forward(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    return _over_keys(config, x, whole=False)


def decided(config: Config, x: Inputs) -> tuple[Array, Array]:
    """The same, NaN where a query sees keys, and all its logits are -inf."""
    return _over_keys(config, x, whole=True)


def with_weights(config: Config, x: Inputs) -> tuple[Array, Array, Array]:
    """The same, and the weights `[B, K, G, T, S]` before dropout."""
    mask = _mask_of_all(config, x)
    found, _ = _by_rows(1, x, x, lambda x: (_forward(config, x, mask, True, True), ()))
    out, lse, weights = found
    return out, lse, weights


def _over_keys(config: Config, x: Inputs, *, whole: bool) -> tuple[Array, Array]:
    mask = _mask_of_all(config, x)
    found, _ = _by_rows(1, x, x, lambda x: (_forward(config, x, mask, whole)[:2], ()))
    out, lse = found
    return out, lse


def _forward(
    config: Config, x: Inputs, mask: Array | None, whole: bool, kept: bool = False
) -> tuple[Array, Array, Array]:
    """Output, LSE and weights of some rows. Weights are those of the softmax if they are kept."""
    B, T, K, G, _ = x.query.shape
    shown = visible(config, x) if mask is None else mask
    logits = where(shown, logits_of(config, x, shown)[0], -jnp.inf)
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    # From here on without any `where`, which XLA can't fuse with products. Rows without any weight
    # are measured from a finite number: -inf - -inf is NaN.
    least = jnp.asarray(jnp.finfo(top.dtype).min, top.dtype)
    if whole and shown is not None:
        least = where(shown.any(-1, keepdims=True), jnp.full_like(least, -jnp.inf), least)
    if not whole or shown is not None:
        top = jnp.maximum(top, least)
    p = jnp.exp(logits - top if config.score is None else formula.below(logits, top))
    total = p.sum(-1, keepdims=True)
    # It is at least 1, as the largest logit adds 1, or 0.
    empty = total == 0
    total = jnp.maximum(total, jnp.asarray(0.5, total.dtype))
    # Weights of 16 bits are rounded before the product, where XLA computes them with the softmax.
    early = kept or _narrow(config, x)
    p = p / total if early else p
    weights = p
    if config.dropout:
        p = p * dropout_factors(x, p.dtype)
    value = keys(config, base.finite(x.value))
    out = dot(config, factor(config, p), value, 2).reshape(B, K, G, T, -1)
    out = out if early else out / total
    lse = where(~empty, top + jnp.log(total), -jnp.inf)[..., 0]
    out = out.astype(x.query.dtype).transpose(0, 3, 1, 2, 4)
    return out, lse.transpose(0, 3, 1, 2), weights


def backward(
    config: Config,
    groups: int,
    x: Inputs,
    far: Float[Array, "B K G T"],
    delta: Float[Array, "B K G T"],
    d_out: Float[Array, "B T K G Hv"],
) -> Gradients:
    """Cotangents of the inputs; see `Engine`."""
    mask = _mask_of_all(config, x, across=True)
    which = learned(config.score)
    shared = [x.score[n].shape[0] == 1 for n in which]

    def some(given: tuple[Any, ...]) -> tuple[Any, Any]:
        """The gradients of the step's rows, and its terms of gradients that all rows share."""
        g, score = _backward(config, mask, *given)
        own = [None if yes else a for yes, a in zip(shared, score, strict=True)]
        sums = [a if yes else None for yes, a in zip(shared, score, strict=True)]
        return (g, own), sums

    (g, own), sums = _by_rows(groups, x, (x, far, delta, d_out), some)
    found = [b if yes else a for yes, a, b in zip(shared, own, sums, strict=True)]
    none: list[Any] = [None] * len(x.score)
    return g._replace(score=tuple(replaced(none, which, found)))


def _backward(
    config: Config,
    mask: Array | None,
    x: Inputs,
    far: Array,
    delta: Array,
    d_out: Array,
) -> tuple[Gradients, list[Array]]:
    """Gradients of some rows, and of the operands of their score that learn."""
    (B, T, K, G, H), S = x.query.shape, x.key.shape[1]
    x, d_out = cleaned(x, far.transpose(0, 3, 1, 2), d_out)
    # The barrier keeps XLA from computing them for every pair.
    far, delta = lax.optimization_barrier((far[:, :, None], delta[:, :, None]))
    zero = jnp.zeros((), far.dtype)
    shown = visible(config, x, across=True) if mask is None else mask
    query, given = _queries(config, _scaled(config, x)), _queries(config, d_out)
    logits, pull = logits_of(config, x, shown, across=True)
    if shown is None:
        # No weight is more than 1, also where logits round in another way than in the forward. And
        # XLA fuses exponentials with products only beside such a maximum. What exceeds is added: a
        # fused maximum passes over NaN.
        more = logits.max(2, keepdims=True) - far
        far = far + jnp.maximum(more, jnp.zeros((), far.dtype))
    # The barrier keeps XLA from computing it again for each of its uses.
    p = lax.optimization_barrier(jnp.exp(where(shown, logits - far, -jnp.inf)))
    kept, dp = p, dot(config, keys(config, x.value), given, 3).reshape(p.shape)
    if config.dropout:
        factors = dropout_factors(x, p.dtype, across=True)
        kept, dp = p * factors, dp * factors
    # A weight of 0 has no derivative, however large the product: 0 * inf is NaN.
    ds, score = pull(jnp.where(p == zero, zero, p * (dp - delta)))
    ds = _factor_across(config, where(shown, ds, 0))
    d_value = dot(config, _factor_across(config, kept), given, 2)
    d_key = dot(config, ds, query, 2)
    # A product with a transposed left factor is slow. The smaller of two other ways moves: ds, or
    # the key and the result.
    if G * T * S <= (G * T + S) * H:
        turned = lax.optimization_barrier(jnp.swapaxes(ds, 2, 3))
        d_query = dot(config, turned, keys(config, x.key), 2)
        d_query = d_query.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    else:
        d_query = dot(config, _keys_across(config, x.key), ds, 2)
        d_query = d_query.reshape(B, K, H, G, T).transpose(0, 4, 1, 3, 2)
    return _gradients(config, x, d_query, d_key, d_value), score


def _gradients(
    config: Config,
    x: Inputs,
    d_query: Float[Array, "B T K G H"],
    d_key: Float[Array, "B K S H"],
    d_value: Float[Array, "B K S Hv"],
) -> Gradients:
    """Gradients of arrays as they are given, from those of the factors of products."""
    return Gradients(
        (d_query * x.scale.reshape(-1, 1, 1, 1, 1)).astype(x.query.dtype),
        _scaled_after(config, x, d_key).transpose(0, 2, 1, 3).astype(x.key.dtype),
        d_value.transpose(0, 2, 1, 3).astype(x.value.dtype),
        (x.query.astype(d_query.dtype) * d_query).sum((1, 2, 3, 4)),
        (),
    )


def from_weights(
    config: Config,
    groups: int,
    x: Inputs,
    weights: Float[Array, "B K G T S"],
    far: Float[Array, "B K G T"],
    delta: Float[Array, "B K G T"],
    d_out: Float[Array, "B T K G Hv"],
) -> Gradients:
    """The same from the weights that `with_weights` gave."""
    mask = _mask_of_all(config, x)

    def some(given: tuple[Any, ...]) -> tuple[Any, Any]:
        return _from_weights(config, mask, *given), ()

    g, _ = _by_rows(groups, x, (x, weights, far, delta, d_out), some)
    none: list[Any] = [None] * len(x.score)
    return g._replace(score=tuple(none))


def _from_weights(
    config: Config,
    mask: Array | None,
    x: Inputs,
    p: Array,
    far: Array,
    delta: Array,
    d_out: Array,
) -> Gradients:
    """Gradients of some rows."""
    B, T, K, G, H = x.query.shape
    x, d_out = cleaned(x, far.transpose(0, 3, 1, 2), d_out)
    nan = jnp.where(jnp.isnan(far), far, jnp.zeros((), far.dtype))
    nan, delta = lax.optimization_barrier((nan[..., None], delta[..., None]))
    zero = jnp.zeros((), far.dtype)
    shown = visible(config, x) if mask is None else mask
    p = lax.optimization_barrier(where(shown, p + nan, 0))
    query, given = _queries(config, _scaled(config, x)), _queries(config, d_out)
    key, value = keys(config, x.key), keys(config, x.value)
    kept, dp = p, dot(config, given, value, 3).reshape(p.shape)
    if config.dropout:
        factors = dropout_factors(x, p.dtype)
        kept, dp = p * factors, dp * factors
    # A weight of 0 has no derivative, however large the product: 0 * inf is NaN.
    ds = lax.optimization_barrier(factor(config, jnp.where(p == zero, zero, p * (dp - delta))))
    # A product with a transposed left factor is slow.
    kept, turned = (jnp.swapaxes(a, 2, 3) for a in (factor(config, kept), ds))
    kept, turned = lax.optimization_barrier((kept, turned))
    return _gradients(
        config,
        x,
        dot(config, ds, key, 2).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4),
        dot(config, turned, query, 2),
        dot(config, kept, given, 2),
    )


ENGINE = Engine(
    forward, backward, differentiable=forward, decided=decided, cleans=True, states=False
)
KEEPING = ENGINE._replace(keeping=Keeping(with_weights, from_weights))


# --- some batch rows at a time --------------------------------------------------------------------


def _by_rows(groups: int, x: Inputs, args: Any, fn: Callable[[Any], tuple[Any, Any]]) -> Any:
    """`fn` of some batch rows at a time.

    Args:
      groups: sums are added up for each of so many equal groups of batch rows.
      x: all inputs, grouped.
      args: arrays with an axis of batch rows, of extent 1 where these share them.
      fn: from the arrays of some rows to results `[rows, ...]` and to sums `[1, ...]`.

    Returns:
      Results `[B, ...]`, and sums `[groups, ...]`, each in its dtype.
    """
    B, T, K, G, H = x.query.shape
    each = B // groups
    S, widths = x.key.shape[1], H + x.value.shape[-1]
    rows = _rows_of_step(each, _numbers(T, S, K * G, K, widths))
    if rows == B:
        return fn(args)
    leaves, tree = jax.tree.flatten(args)
    shared = [a.shape[0] == 1 for a in leaves]
    cut = [
        a.reshape(-1, rows, *a.shape[1:]) for a, yes in zip(leaves, shared, strict=True) if not yes
    ]

    def given(parts: Any) -> Any:
        following = iter(parts)
        pairs = zip(leaves, shared, strict=True)
        return jax.tree.unflatten(tree, [a if yes else next(following) for a, yes in pairs])

    def step(carry: Any, parts: Any) -> Any:
        n, sums = carry
        found, more = fn(given(parts))
        at = lax.div(n * rows, jnp.int32(each))
        sums = jax.tree.map(lambda a, b: a.at[at].add(b[0].astype(a.dtype)), sums, more)
        return (n + 1, sums), found

    _, like = jax.eval_shape(fn, given([a[0] for a in cut]))
    sums = jax.tree.map(
        lambda a: constant(x.query, (groups, *a.shape[1:]), base.accumulator(a.dtype)), like
    )
    first = constant(x.query, (), jnp.int32)
    (_, sums), found = lax.scan(step, (first, sums), cut)
    found = jax.tree.map(lambda a: a.reshape(B, *a.shape[2:]), found)
    return found, jax.tree.map(lambda a, b: a.astype(b.dtype), sums, like)


# --- mask, score and dropout ----------------------------------------------------------------------


# Logits are `[B, K, G, T, S]`, or `[B, K, S, G, T]` where a function says `across`.


def visible(config: Config, x: Inputs, *, across: bool = False) -> Bool[Array, "..."] | None:
    """The mask, as it broadcasts to the logits."""
    if config.mask is None:
        return None
    found = config.mask.evaluated(*_tiles(config.mask.kinds, x, x.mask, across=across))
    return found if found.ndim else found.reshape(1, 1, 1, 1, 1)


def _mask_of_all(config: Config, x: Inputs, *, across: bool = False) -> Array | None:
    """The mask if all batch rows share it, so that it is evaluated once; or else None."""
    return None if any(a.shape[0] != 1 for a in x.mask) else visible(config, x, across=across)


def _tiles(kinds: Sequence[Kind], x: Inputs, arrays: Any, *, across: bool) -> list[Array]:
    """Operands, as they broadcast to the logits."""
    T, S = x.query.shape[1], x.key.shape[1]

    def tile(kind: Kind, array: Array) -> Array:
        if across and kind == "diagonal":
            # Skewed the other way: transposing a skewed tile would move every element.
            return jnp.moveaxis(skewed(array, S, T), 3, 2)
        found = as_tile(kind, array, 3, T, S)
        return jnp.moveaxis(found, 4, 2) if across else found

    return [tile(kind, array) for kind, array in zip(kinds, arrays, strict=True)]


def logits_of(
    config: Config, x: Inputs, shown: Array | None, *, across: bool = False
) -> tuple[Float[Array, "..."], Callable[[Array], tuple[Array, list[Array]]]]:
    """Logits after the score, and the way back to those before, and to operands that learn."""
    B, T, K, G, _ = x.query.shape
    query, key = _queries(config, _scaled(config, x)), keys(config, x.key)
    logits = dot(config, key, query, 3) if across else dot(config, query, key, 3)
    logits = logits.reshape((B, K, -1, G, T) if across else (B, K, G, T, -1))
    logits = _scaled_after(config, x, logits)
    score = config.score
    if score is None:
        return logits, lambda ds: (ds, [])
    which = learned(score)

    def scored(logits: Array, some: list[Array]) -> Array:
        operands = replaced(x.score, which, some)
        return score.scored(logits, _tiles(score.kinds, x, operands, across=across))

    return jax.vjp(scored, where(shown, logits, 0), [x.score[n] for n in which])


def dropout_factors(x: Inputs, dtype: Any, *, across: bool = False) -> Float[Array, "..."]:
    """What weights are multiplied by: 0, or 1 / (1 - rate)."""
    first, second, k, rate = _tiles(DROPOUT, x, x.dropout, across=across)
    keep = base.keeps((first, second), k, rate)
    return jnp.where(keep, base.kept_scale(rate, dtype), jnp.zeros((), dtype))


def where(flags: Array | None, array: Array, other: float | Array) -> Array:
    """The array, with another number where flags are False; without flags the array."""
    return array if flags is None else jnp.where(flags, array, jnp.asarray(other, array.dtype))


# --- products -------------------------------------------------------------------------------------


def _scaled(config: Config, x: Inputs) -> Float[Array, "B T K G H"]:
    """Queries times the scale: as exact as scaled logits, and fewer products."""
    if _narrow(config, x):
        return x.query
    wide = base.accumulator(x.query.dtype)
    return x.query.astype(wide) * x.scale.reshape(-1, 1, 1, 1, 1)


def _scaled_after(config: Config, x: Inputs, product: Array) -> Array:
    """A product with queries, times the scale where these are not: it would be rounded there."""
    if not _narrow(config, x):
        return product
    return product * x.scale.reshape(-1, *(1,) * (product.ndim - 1))


def _narrow(config: Config, x: Inputs) -> bool:
    """Whether factors of products have fewer bits than sums."""
    return bool(config.dtype != base.accumulator(x.query.dtype))


def _queries(config: Config, array: Float[Array, "B T K G width"]) -> Float[Array, "B K GT width"]:
    B, T, K, G, width = array.shape
    return array.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, width).astype(config.dtype)


def keys(config: Config, array: Float[Array, "B S K width"]) -> Float[Array, "B K S width"]:
    """Keys or values as a factor of a product: heads in front."""
    return array.transpose(0, 2, 1, 3).astype(config.dtype)


def _keys_across(config: Config, array: Float[Array, "B S K width"]) -> Array:
    """`[B, K, width, S]`, transposed here: in the product XLA would compute it more slowly."""
    return array.transpose(0, 2, 3, 1).astype(config.dtype)


def factor(config: Config, array: Float[Array, "B K G T S"]) -> Float[Array, "B K GT S"]:
    """Weights as a factor of a product."""
    B, K, G, T, S = array.shape
    return array.reshape(B, K, G * T, S).astype(config.dtype)


def _factor_across(config: Config, array: Float[Array, "B K S G T"]) -> Float[Array, "B K S GT"]:
    B, K, S, G, T = array.shape
    return array.reshape(B, K, S, G * T).astype(config.dtype)


def dot(config: Config, a: Array, b: Array, axis: int) -> Array:
    """Products of stacks of matrices: over the last axis of a, and this one of b."""
    precision = lax.Precision.HIGHEST if config.precision is None else config.precision
    if a.dtype != jnp.bfloat16:
        dims: Any = (((3,), (axis,)), ((0, 1), (0, 1)))
        return bfloat16.dot(a, b, dims, precision)
    # One axis of stacks: with two XLA converts factors of 16 bits, if they were transposed.
    dims = (((2,), (axis - 1,)), ((0,), (0,)))
    found = bfloat16.dot(joined(a, 0), joined(b, 0), dims, precision)
    return found.reshape(*a.shape[:2], *found.shape[1:])

"""The forward and the backward, and those of calls whose weights are kept between them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from ...shapes import Array, Float
from .. import base, formula
from ..flash.operands import cleaned, learned, replaced
from ..problem import Config, Gradients, Inputs
from .parts import (
    dot,
    dropout_factors,
    factor,
    factor_across,
    keys,
    keys_across,
    logits_of,
    mask_of_all,
    narrow,
    queries,
    scaled,
    scaled_after,
    visible,
    where,
)
from .steps import by_rows

# Logits up to which starting operations takes most of the time, if there is no mask.
SMALL = 2**14


def forward(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    return _over_keys(config, x, whole=False)


def decided(config: Config, x: Inputs) -> tuple[Array, Array]:
    """The same, NaN where a query sees keys, and all its logits are -inf."""
    return _over_keys(config, x, whole=True)


def with_weights(config: Config, x: Inputs) -> tuple[Array, Array, Array]:
    """The same, and the weights `[B, K, G, T, S]` before dropout."""
    mask = mask_of_all(config, x)
    found, _ = by_rows(1, x, x, lambda x: (_forward(config, x, mask, True, True), ()))
    out, lse, weights = found
    return out, lse, weights


def _over_keys(config: Config, x: Inputs, *, whole: bool) -> tuple[Array, Array]:
    mask = mask_of_all(config, x)
    found, _ = by_rows(1, x, x, lambda x: (_forward(config, x, mask, whole)[:2], ()))
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
    # And where all is small, a sum beside the product would wake up another thread.
    small = shown is None and B * K * G * T * x.key.shape[1] <= SMALL
    early = kept or small or narrow(config, x)
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
    mask = mask_of_all(config, x, across=True)
    which = learned(config.score)
    shared = [x.score[n].shape[0] == 1 for n in which]

    def some(given: tuple[Any, ...]) -> tuple[Any, Any]:
        """The gradients of the step's rows, and its terms of gradients that all rows share."""
        g, score = _backward(config, mask, *given)
        own = [None if yes else a for yes, a in zip(shared, score, strict=True)]
        sums = [a if yes else None for yes, a in zip(shared, score, strict=True)]
        return (g, own), sums

    (g, own), sums = by_rows(groups, x, (x, far, delta, d_out), some)
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
    query, given = queries(config, scaled(config, x)), queries(config, d_out)
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
    ds = factor_across(config, where(shown, ds, 0))
    d_value = dot(config, factor_across(config, kept), given, 2)
    d_key = dot(config, ds, query, 2)
    # A product with a transposed left factor is slow. The smaller of two other ways moves: ds, or
    # the key and the result.
    if G * T * S <= (G * T + S) * H:
        turned = lax.optimization_barrier(jnp.swapaxes(ds, 2, 3))
        d_query = dot(config, turned, keys(config, x.key), 2)
        d_query = d_query.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    else:
        d_query = dot(config, keys_across(config, x.key), ds, 2)
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
        scaled_after(config, x, d_key).transpose(0, 2, 1, 3).astype(x.key.dtype),
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
    mask = mask_of_all(config, x)

    def some(given: tuple[Any, ...]) -> tuple[Any, Any]:
        return _from_weights(config, mask, *given), ()

    g, _ = by_rows(groups, x, (x, weights, far, delta, d_out), some)
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
    # The barriers keep XLA from computing weights and ds once for each order that is read below.
    p = lax.optimization_barrier(where(shown, p + nan, 0))
    query, given = queries(config, scaled(config, x)), queries(config, d_out)
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

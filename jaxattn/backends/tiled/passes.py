"""The forward and backward pass of the tiled engine: flash attention in plain XLA.

    forward   s = q k'          p = e^(s - m)     l, acc rescaled, acc += p v
    backward  s' = k q'         p' = e^(s' - lse)
              dv += p' do       dp' = v do'       ds' = p' (dp' - delta)
              dk += ds' q       dq' += k' ds'

Both are loops over lists of steps (`schedule.py`); each step adds to sums for its queries and keys.
The backward computes transposed tiles, because then no product has a large transposed left factor,
which XLA multiplies at half speed on CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...mesh import constant
from ...shapes import Array, Bool, Float
from .. import base
from ..flash.operands import backward_rows, cropped_gradient, learned, padded, replaced
from ..problem import Config, Gradients, Inputs
from . import bfloat16
from .exponential import exp
from .schedule import Step, StepSizes, loop, states_of, step_lists
from .tile_step import TileStep, add, heads_first, padded_inputs, read, write


def _dot(config: Config, a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Products of stacks of matrices over one axis of each, in the dtype of accumulation."""
    precision = lax.Precision.HIGHEST if config.precision is None else config.precision
    dims = (((axis_a,), (axis_b,)), ((0,), (0,)))
    return bfloat16.dot(a, b, dims, precision)


# --- forward --------------------------------------------------------------------------------------


def forward(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    sizes = StepSizes.chosen(config, x)
    dtype = base.accumulator(x.query.dtype)
    lists = step_lists(sizes, states_of(config, sizes, x))
    given = padded_inputs(config, sizes, x)

    def compute(at: Step, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        return _forward_step(TileStep(config, sizes, given, at, transposed=False), *sums)

    B, K, G, T, Tp = sizes.B, sizes.K, sizes.G, sizes.T, sizes.Tp
    acc = constant(given.query, (B * K * G, Tp, sizes.Hv), dtype)
    m = constant(given.query, (B * K, G, Tp), dtype, -jnp.inf)
    # One array of m and l: two would be copied in every step.
    acc, ml = loop(sizes, lists, compute, (acc, jnp.concatenate([m, jnp.zeros_like(m)], 1)))
    acc = acc.reshape(B, K, G, Tp, sizes.Hv)[..., :T, :]
    ml = ml.reshape(B, K, 2, G, Tp)[..., :T]
    m, l = ml[:, :, 0], ml[:, :, 1]
    seen = l != 0
    total = jnp.where(seen, l, jnp.ones((), dtype))
    out = jnp.where(seen[..., None], acc / total[..., None], jnp.zeros((), dtype))
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    return out.astype(x.query.dtype).transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2)


def _forward_step(
    tile: TileStep, acc: Float[Array, "BN Tp Hv"], ml: Float[Array, "BK GG Tp"]
) -> tuple[Array, Array]:
    """The sums of all queries after one more step.

    Args:
      tile: the step.
      acc: sums of weights times values, measured from the largest logits so far.
      ml: the largest logits so far, and the sums of weights measured from them.
    """
    config, sizes, at = tile.config, tile.sizes, tile.at
    values = tile.keys(tile.x.value)
    s, c = _forward_logits(tile)
    units, rows = s.shape[:2]

    place = [tile.unit, 0, at.q], [units, 2 * sizes.G, at.tq]
    old = lax.optimization_barrier(read(ml, *place))
    m, l = (a[:, 0] for a in jnp.split(old.reshape(units, 2, rows), 2, 1))
    top = lax.stop_gradient(jnp.maximum(m, s.max(2) * (c[..., 0] if c.ndim else c)))
    # Rows without any visible key so far are measured from a finite number: -inf - -inf is NaN.
    level = lax.max(top, lax.full_like(top, jnp.finfo(top.dtype).min))
    p = exp((s if at.masked else s * c) - level[..., None])
    fade = exp(m - level)
    l = l * fade + p.sum(2)
    if config.dropout:
        factors = tile.dropout_factors(p.dtype)
        p = (p.reshape(tile.logits_shape) * factors).reshape(s.shape)
    ml = write(ml, jnp.stack([top, l], 1).reshape(old.shape), place[0])

    place = [tile.unit * sizes.G, at.q, 0], [units * sizes.G, at.tq, sizes.Hv]
    part = read(acc, *place).reshape(units, rows, sizes.Hv)
    part = part * fade[..., None] + _dot(config, p.astype(values.dtype), values, 2, 1)
    return write(acc, part.reshape(place[1]), place[0]), ml


def _forward_logits(tile: TileStep) -> tuple[Float[Array, "units rows tk"], Array]:
    """Logits of a step, -inf where masked, and what they are still to be multiplied by.

    That is the scale in FULL tiles without a score, where its product comes last; or else 1.
    """
    config, at, x = tile.config, tile.at, tile.x
    dtype = base.accumulator(x.query.dtype)
    c = tile.scale()
    # A negative scale reverses the order of logits, so queries take the sign, for the maximum.
    queries = tile.queries(x.query) * jnp.where(c < 0, -1, 1).astype(x.query.dtype)
    s = _dot(config, queries, tile.keys(x.key), 2, 2)
    flat, one = s.shape, jnp.ones((), dtype)
    c = jnp.abs(c)
    shown = tile.visible() if at.masked else None
    if config.score is not None:
        s = (s * c).reshape(tile.logits_shape)
        if shown is not None:
            s = jnp.where(shown, s, jnp.zeros((), dtype))
        s = tile.scored(s, tile.parts(config.score, x.score)).reshape(flat)
        c = one
    if shown is not None:
        s = jnp.where(shown, (s * c).reshape(tile.logits_shape), -jnp.inf).reshape(flat)
        c = one
    return s, c


# --- backward -------------------------------------------------------------------------------------


class BackwardInputs(NamedTuple):
    """What the backward reads beside the padded inputs.

    Attributes:
      d_out: `[B * N, Tp, Hv]`, in the dtype of the products.
      rows: `[B * K, 2 * G, Tp]`, the `lse` and `delta` of `backward_rows`.
      keys: `[B * K, H, Sp]`, the keys transposed.
    """

    d_out: Float[Array, "BN Tp Hv"]
    rows: Float[Array, "BK GG Tp"]
    keys: Float[Array, "BK H Sp"]


class Parts(NamedTuple):
    """What one step of the backward reads; `rows` are its `G * tq` queries."""

    query: Float[Array, "units rows H"]
    d_out: Float[Array, "units rows Hv"]
    key: Float[Array, "units tk H"]
    value: Float[Array, "units tk Hv"]
    key_across: Float[Array, "units H tk"]
    lse: Float[Array, "units 1 rows"]
    delta: Float[Array, "units 1 rows"]
    scale: Float[Array, "..."]

    @classmethod
    def of(cls, tile: TileStep, more: BackwardInputs) -> Parts:
        """The parts of the arrays that belong to a step."""
        sizes, at, x = tile.sizes, tile.at, tile.x
        rows = read(more.rows, [tile.unit, 0, at.q], [sizes.units, 2 * sizes.G, at.tq])
        lse, delta = jnp.split(rows.reshape(sizes.units, 2, sizes.G * at.tq), 2, 1)
        return cls(
            tile.queries(x.query),
            tile.queries(more.d_out),
            tile.keys(x.key),
            tile.keys(x.value),
            read(more.keys, [tile.unit, 0, at.k], [sizes.units, sizes.H, at.tk]),
            lse,
            delta,
            tile.scale(),
        )


class Sums(NamedTuple):
    """Gradients of the padded arrays, summed over the steps so far.

    Attributes:
      query: `[B * K, H * G, Tp]`, before the scale.
      key, value: `[B * K, Sp, H]` and `[B * K, Sp, Hv]`, the key's before a scale that is shared.
      score: of the operands that learn, in their shapes.
    """

    query: Float[Array, "BK HG Tp"]
    key: Float[Array, "BK Sp H"]
    value: Float[Array, "BK Sp Hv"]
    score: tuple[Array, ...]


def backward(
    config: Config,
    groups: int,
    x: Inputs,
    out: Float[Array, "B T K G Hv"],
    lse: Float[Array, "B T K G"],
    d_out: Float[Array, "B T K G Hv"],
    d_lse: Float[Array, "B T K G"],
) -> Gradients:
    """Cotangents of the inputs, in one pass; see `Engine`."""
    sizes = StepSizes.chosen(config, x)
    if groups > 1:
        sizes = replace(sizes, step_rows=1)
    lists = step_lists(sizes, states_of(config, sizes, x))
    given = padded_inputs(config, sizes, x)
    rows = jnp.stack(backward_rows(out, lse, d_out, d_lse), 2)
    more = BackwardInputs(
        heads_first(config, d_out, sizes.Tp),
        padded(rows.reshape(sizes.B * sizes.K, 2 * sizes.G, sizes.T), {2: sizes.Tp}),
        # Transposed here, not in the product, which XLA would then compute at half speed.
        jnp.swapaxes(given.key, 1, 2),
    )

    def compute(at: Step, sums: Sums) -> Sums:
        tile = TileStep(config, sizes, given, at, transposed=True)
        parts = Parts.of(tile, more)
        weights = _recompute(tile, parts)
        slopes = _logit_gradients(tile, parts, weights)
        return _accumulate(tile, parts, weights, slopes, sums, groups)

    sums = loop(sizes, lists, compute, _no_sums(sizes, groups, config, given))
    return _gradients(config, sizes, x, sums)


class Weights(NamedTuple):
    """The weights of a step, recomputed: `[units, tk, G * tq]`.

    Attributes:
      p: before dropout.
      shown: the mask, as it broadcasts to the logits; None in a FULL tile.
      dropout: the factors of dropout; None without.
      pull: from the cotangents of the score's results to those of its logits, and of the parts
        of its operands that learn; None without a score.
    """

    p: Float[Array, "units tk rows"]
    shown: Bool[Array, "..."] | None
    dropout: Array | None
    pull: Callable[[Array], tuple[Array, list[Array]]] | None


def _recompute(tile: TileStep, parts: Parts) -> Weights:
    """The weights of a step, from the LSE that the forward returned."""
    config = tile.config
    shown = tile.visible() if tile.at.masked else None
    exponent = _dot(config, parts.key, parts.query, 2, 2) * parts.scale
    flat, pull = exponent.shape, None
    if config.score is not None:
        logits = exponent.reshape(tile.logits_shape)
        if shown is not None:
            logits = jnp.where(shown, logits, jnp.zeros((), logits.dtype))
        operands, which = tile.parts(config.score, tile.x.score), learned(config.score)

        def scored(logits: Array, some: list[Array]) -> Array:
            return tile.scored(logits, replaced(operands, which, some))

        scores, pull = jax.vjp(scored, logits, [operands[n] for n in which])
        exponent = scores.reshape(flat)
    exponent = exponent - parts.lse
    if shown is not None:
        # Before the exponential, not after: a masked logit may be too large for it.
        exponent = jnp.where(shown, exponent.reshape(tile.logits_shape), -jnp.inf).reshape(flat)
    # The barrier keeps XLA from computing it twice, for dropped weights and for their gradients. In
    # front of a conversion JAX 0.10 would lose it: weights are kept in the dtype of the products.
    p = lax.optimization_barrier(exp(exponent).astype(config.dtype)).astype(exponent.dtype)
    factors = tile.dropout_factors(p.dtype) if config.dropout else None
    return Weights(p, shown, factors, pull)


def _dropped(tile: TileStep, weights: Weights, array: Array) -> Array:
    """The weights, or their cotangents, after dropout."""
    if weights.dropout is None:
        return array
    return (array.reshape(tile.logits_shape) * weights.dropout).reshape(array.shape)


class Slopes(NamedTuple):
    """Cotangents of a step's scaled products, and of the score's parts that learn."""

    logits: Float[Array, "units tk rows"]
    operands: list[Array]


def _logit_gradients(tile: TileStep, parts: Parts, weights: Weights) -> Slopes:
    """`ds = p * (dp - delta)`, taken back through the score."""
    p = weights.p
    dp = _dropped(tile, weights, _dot(tile.config, parts.value, parts.d_out, 2, 2))
    # A weight of 0 has no derivative, however large the product: 0 * inf is NaN.
    ds = lax.select(p == 0, lax.full_like(p, 0), p * (dp - parts.delta))
    if weights.pull is None:
        return Slopes(ds, [])
    d_logits, d_operands = weights.pull(ds.reshape(tile.logits_shape))
    if weights.shown is not None:
        d_logits = jnp.where(weights.shown, d_logits, jnp.zeros((), p.dtype))
    return Slopes(d_logits.reshape(ds.shape), d_operands)


def _accumulate(
    tile: TileStep, parts: Parts, weights: Weights, slopes: Slopes, sums: Sums, groups: int
) -> Sums:
    """The sums after one more step."""
    config, sizes, at, unit = tile.config, tile.sizes, tile.at, tile.unit
    kept = _dropped(tile, weights, weights.p)
    ds = slopes.logits.astype(parts.query.dtype)
    d_value = _dot(config, kept.astype(parts.d_out.dtype), parts.d_out, 2, 1)
    d_key = _dot(config, ds, parts.query, 2, 1)
    d_query = _dot(config, parts.key_across, ds, 2, 1)
    d_query = d_query.reshape(sizes.units, sizes.H * sizes.G, at.tq)
    if parts.scale.ndim:
        # The scale of d_query, and of d_key where it is one for all, is multiplied at the end.
        d_key = d_key * parts.scale
    score = list(sums.score)
    if config.score is not None:
        pairs = zip(learned(config.score), slopes.operands, strict=True)
        for i, (n, part) in enumerate(pairs):
            starts, _ = tile.place(config.score.kinds[n], score[i], groups)
            score[i] = add(score[i], part, starts)
    return Sums(
        add(sums.query, d_query, [unit, 0, at.q]),
        add(sums.key, d_key, [unit, at.k, 0]),
        add(sums.value, d_value, [unit, at.k, 0]),
        tuple(score),
    )


def _no_sums(sizes: StepSizes, groups: int, config: Config, x: Inputs) -> Sums:
    """Zeros in the shapes of the sums."""
    dtype, units = base.accumulator(x.query.dtype), sizes.B * sizes.K

    def zeros(*shape: int, dtype: Any = dtype) -> Array:
        return constant(x.query, shape, dtype)

    def of_operand(array: Array) -> Array:
        rows = groups if array.shape[0] == 1 else sizes.B
        return zeros(rows, *array.shape[1:], dtype=base.accumulator(array.dtype))

    return Sums(
        zeros(units, sizes.H * sizes.G, sizes.Tp),
        zeros(units, sizes.Sp, sizes.H),
        zeros(units, sizes.Sp, sizes.Hv),
        tuple(of_operand(x.score[n]) for n in learned(config.score)),
    )


def _gradients(config: Config, sizes: StepSizes, x: Inputs, sums: Sums) -> Gradients:
    """The gradients of the inputs, from the sums of all steps."""
    B, T, S, K, G = sizes.B, sizes.T, sizes.S, sizes.K, sizes.G
    d_query = sums.query.reshape(B, K, sizes.H, G, sizes.Tp)[..., :T].transpose(0, 4, 1, 3, 2)
    d_scale = (x.query.astype(d_query.dtype) * d_query).sum((1, 2, 3, 4))
    d_key = sums.key * x.scale[:, None, None] if x.scale.shape[0] == 1 else sums.key

    def by_length(array: Array, like: Array) -> Array:
        return jnp.moveaxis(array.reshape(B, K, sizes.Sp, -1)[:, :, :S].astype(like.dtype), 1, 2)

    score: list[Array | None] = [None] * len(x.score)
    if config.score is not None:
        for n, array in zip(learned(config.score), sums.score, strict=True):
            found = cropped_gradient(sizes, config.score.kinds[n], array)
            score[n] = found.astype(x.score[n].dtype)
    return Gradients(
        (d_query * x.scale.reshape(-1, 1, 1, 1, 1)).astype(x.query.dtype),
        by_length(d_key, x.key),
        by_length(sums.value, x.value),
        d_scale,
        tuple(score),
    )

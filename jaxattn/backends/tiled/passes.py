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
from .. import base, bfloat16
from ..flash.operands import cropped_gradient, padded, replaced
from ..problem import Config, Gradients, Inputs
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
    least = constant(given.query, (B * K, G, Tp), dtype, -jnp.inf)
    none = jnp.zeros_like(least)
    begin = [least, none, *(none + column.first for column in config.columns)]
    # One array of all numbers of a row: two would be copied in every step.
    acc, numbers = loop(sizes, lists, compute, (acc, jnp.concatenate(begin, 1)))
    acc = acc.reshape(B, K, G, Tp, sizes.Hv)[..., :T, :]
    numbers = numbers.reshape(B, K, len(begin), G, Tp)[..., :T]
    m, l, *columns = (numbers[:, :, n] for n in range(len(begin)))
    seen = l != 0
    total = jnp.where(seen, l, jnp.ones((), dtype))
    out = jnp.where(seen[..., None], acc / total[..., None], jnp.zeros((), dtype))
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    if config.columns:
        pairs = zip(columns, config.columns, strict=True)
        found = [sums / total if column.mean else sums for sums, column in pairs]
        out = jnp.concatenate([out, jnp.stack(found, -1)], -1)
    else:
        out = out.astype(x.query.dtype)
    return out.transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2)


def _forward_step(
    tile: TileStep, acc: Float[Array, "BN Tp Hv"], numbers: Float[Array, "BK numbers Tp"]
) -> tuple[Array, Array]:
    """The sums of all queries after one more step.

    Args:
      tile: the step.
      acc: sums of weights times values, measured from the largest logits so far.
      numbers: of each query, G for each: the largest logits so far, the sums of weights measured
        from them, and the columns.
    """
    config, sizes, at = tile.config, tile.sizes, tile.at
    values = tile.keys(tile.x.value)
    s, c, shown = _forward_logits(tile)
    units, rows = s.shape[:2]

    count = 2 + len(config.columns)
    place = [tile.unit, 0, at.q], [units, count * sizes.G, at.tq]
    old = lax.optimization_barrier(read(numbers, *place))
    m, l, *columns = (a[:, 0] for a in jnp.split(old.reshape(units, count, rows), count, 1))
    top = lax.stop_gradient(jnp.maximum(m, s.max(2) * (c[..., 0] if c.ndim else c)))
    # Rows without any visible key so far are measured from a finite number: -inf - -inf is NaN.
    level = lax.max(top, lax.full_like(top, jnp.finfo(top.dtype).min))
    p = exp((s if at.masked else s * c) - level[..., None])
    fade = exp(m - level)
    l = l * fade + p.sum(2)
    columns = _columns(tile, Row(s, c, shown, p, fade, m, top), columns)
    if config.dropout:
        factors = tile.dropout_factors(p.dtype)
        p = (p.reshape(tile.logits_shape) * factors).reshape(s.shape)
    numbers = write(numbers, jnp.stack([top, l, *columns], 1).reshape(old.shape), place[0])

    place = [tile.unit * sizes.G, at.q, 0], [units * sizes.G, at.tq, sizes.Hv]
    part = read(acc, *place).reshape(units, rows, sizes.Hv)
    part = part * fade[..., None] + _dot(config, p.astype(values.dtype), values, 2, 1)
    return write(acc, part.reshape(place[1]), place[0]), numbers


class Row(NamedTuple):
    """What a step knows of its rows.

    Attributes:
      s, c, shown: see `_forward_logits`.
      p: weights, measured from the largest logits so far.
      fade: what sums of earlier steps are multiplied by.
      before, top: the largest logits of earlier steps, and with this one's.
    """

    s: Float[Array, "units rows tk"]
    c: Array
    shown: Bool[Array, "..."] | None
    p: Float[Array, "units rows tk"]
    fade: Float[Array, "units rows"]
    before: Float[Array, "units rows"]
    top: Float[Array, "units rows"]


def _columns(tile: TileStep, row: Row, sums: list[Array]) -> list[Float[Array, "units rows"]]:
    """The columns after one more step."""
    config, p, shown = tile.config, row.p, row.shown
    given = (row.s * row.c).reshape(tile.logits_shape)
    if shown is not None:
        # As the formula gives them to functions: not -inf where they are masked.
        given = jnp.where(shown, given, jnp.zeros((), p.dtype))
    found = []
    _, operands = config.split(tile.x.score)
    for column, arrays, old in zip(config.columns, operands, sums, strict=True):
        parts = tile.parts(column.residue, arrays)
        if column.reduce == "max" and column.residue.identity:
            found.append(row.top)
            continue
        values = tile.scored(column.residue, given, parts)
        if column.reduce == "max" and shown is not None:
            values = jnp.where(shown, values, -jnp.inf)
        values = values.reshape(p.shape)
        if column.mean:
            values = jnp.where(p == 0, jnp.zeros((), p.dtype), values) * p
            found.append(old * row.fade + values.sum(2))
            continue
        values = lax.stop_gradient(values)
        if column.reduce == "max":
            found.append(jnp.maximum(old, values.max(2)))
            continue
        own = row.s.max(2)
        here = jnp.where(row.s == own[..., None], values, jnp.inf).min(2)
        own = own * (row.c[..., 0] if row.c.ndim else row.c)
        kept = jnp.where(own == row.before, jnp.minimum(old, here), old)
        found.append(jnp.where(own > row.before, here, kept))
    return found


def _forward_logits(
    tile: TileStep,
) -> tuple[Float[Array, "units rows tk"], Array, Bool[Array, "..."] | None]:
    """Logits of a step, -inf where masked, what they are still to be multiplied by, and the mask.

    That is the scale in FULL tiles without a score, where its product comes last; or else 1. The
    mask is as it broadcasts to the logits, and None in a FULL tile.
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
        parts = tile.parts(config.score, config.split(x.score)[0])
        s = tile.scored(config.score, s, parts).reshape(flat)
        c = one
    if shown is not None:
        s = jnp.where(shown, (s * c).reshape(tile.logits_shape), -jnp.inf).reshape(flat)
        c = one
    return s, c, shown


# --- backward -------------------------------------------------------------------------------------


class BackwardInputs(NamedTuple):
    """What the backward reads beside the padded inputs.

    Attributes:
      d_out: `[B * N, Tp, Hv]`, in the dtype of the products.
      rows: `[B * K, numbers * G, Tp]`: `far` and `delta`, and the cotangents of the
        columns.
      keys: `[B * K, H, Sp]`, the keys transposed.
    """

    d_out: Float[Array, "BN Tp Hv"]
    rows: Float[Array, "BK numbers Tp"]
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
    columns: list[Float[Array, "units 1 rows"]]
    scale: Float[Array, "..."]

    @classmethod
    def of(cls, tile: TileStep, more: BackwardInputs) -> Parts:
        """The parts of the arrays that belong to a step."""
        sizes, at, x = tile.sizes, tile.at, tile.x
        count = 2 + len(tile.config.columns)
        rows = read(more.rows, [tile.unit, 0, at.q], [sizes.units, count * sizes.G, at.tq])
        rows = rows.reshape(sizes.units, count, sizes.G * at.tq)
        lse, delta, *columns = jnp.split(rows, count, 1)
        return cls(
            tile.queries(x.query),
            tile.queries(more.d_out),
            tile.keys(x.key),
            tile.keys(x.value),
            read(more.keys, [tile.unit, 0, at.k], [sizes.units, sizes.H, at.tk]),
            lse,
            delta,
            columns,
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
    far: Float[Array, "B K G T"],
    delta: Float[Array, "B K G T"],
    d_out: Float[Array, "B T K G Hv"],
) -> Gradients:
    """Cotangents of the inputs, in one pass; see `Engine`."""
    sizes = StepSizes.chosen(config, x)
    if groups > 1:
        sizes = replace(sizes, step_rows=1)
    lists = step_lists(sizes, states_of(config, sizes, x))
    given = padded_inputs(config, sizes, x)
    d_columns = [jnp.moveaxis(d_out[..., n], 1, -1) for n in range(sizes.Hv, d_out.shape[-1])]
    rows = jnp.stack([far, delta, *d_columns], 2)
    more = BackwardInputs(
        heads_first(config, d_out[..., : sizes.Hv], sizes.Tp),
        padded(rows.reshape(sizes.B * sizes.K, -1, sizes.T), {2: sizes.Tp}),
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
      columns: of each column that is a mean its function, of each other None.
      pull: from the cotangents of the score's results and of the columns' functions to those of
        the logits, and of the parts of operands that learn; None without a score or a column.
    """

    p: Float[Array, "units tk rows"]
    shown: Bool[Array, "..."] | None
    dropout: Array | None
    columns: list[Float[Array, "units tk rows"] | None]
    pull: Callable[..., tuple[Array, list[Array]]] | None


def _recompute(tile: TileStep, parts: Parts) -> Weights:
    """The weights of a step, from the LSE that the forward returned."""
    config = tile.config
    shown = tile.visible() if tile.at.masked else None
    exponent = _dot(config, parts.key, parts.query, 2, 2) * parts.scale
    flat, pull = exponent.shape, None
    columns: list[Array | None] = []
    if config.residues:
        logits = exponent.reshape(tile.logits_shape)
        operands, which = tile.all_parts(config.kinds, tile.x.score), config.learned

        def inside(array: Array) -> Array:
            return array if shown is None else jnp.where(shown, array, jnp.zeros((), array.dtype))

        def scored(logits: Array, some: list[Array]) -> tuple[Array, list[Array | None]]:
            of_score, of_columns = config.split(replaced(operands, which, some))
            if config.score is not None:
                logits = tile.scored(config.score, inside(logits), of_score)
            pairs = zip(config.columns, of_columns, strict=True)
            return logits, [
                tile.scored(column.residue, inside(logits), own) if column.mean else None
                for column, own in pairs
            ]

        (scores, columns), pull = jax.vjp(scored, logits, [operands[n] for n in which])
        exponent = scores.reshape(flat)
    exponent = exponent - parts.lse
    if shown is not None:
        # Before the exponential, not after: a masked logit may be too large for it.
        exponent = jnp.where(shown, exponent.reshape(tile.logits_shape), -jnp.inf).reshape(flat)
    # The barrier keeps XLA from computing it twice, for dropped weights and for their gradients. In
    # front of a conversion JAX 0.10 would lose it: weights are kept in the dtype of the products.
    p = lax.optimization_barrier(exp(exponent).astype(config.dtype)).astype(exponent.dtype)
    factors = tile.dropout_factors(p.dtype) if config.dropout else None
    return Weights(p, shown, factors, columns, pull)


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
    """`ds = p * (dp - delta)`, taken back through the score and the columns' functions.

    A column is a value that depends on the pair: `dp` is the sum over both.
    """
    p, shape = weights.p, tile.logits_shape
    dp = _dropped(tile, weights, _dot(tile.config, parts.value, parts.d_out, 2, 2))
    pairs = list(zip(parts.columns, weights.columns, strict=True))
    for cotangent, function in pairs:
        if function is not None:
            dp = dp + cotangent * function.reshape(p.shape)
    # A weight of 0 has no derivative, however large the product: 0 * inf is NaN.
    ds = lax.select(p == 0, lax.full_like(p, 0), p * (dp - parts.delta))
    if weights.pull is None:
        return Slopes(ds, [])
    d_columns = [None if f is None else (p * c).reshape(shape) for c, f in pairs]
    d_logits, d_operands = weights.pull((ds.reshape(shape), d_columns))
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
    for i, (n, part) in enumerate(zip(config.learned, slopes.operands, strict=True)):
        starts, _ = tile.place(config.kinds[n], score[i], groups)
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
        tuple(of_operand(x.score[n]) for n in config.learned),
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
    for n, array in zip(config.learned, sums.score, strict=True):
        score[n] = cropped_gradient(sizes, config.kinds[n], array).astype(x.score[n].dtype)
    return Gradients(
        (d_query * x.scale.reshape(-1, 1, 1, 1, 1)).astype(x.query.dtype),
        by_length(d_key, x.key),
        by_length(sums.value, x.value),
        d_scale,
        tuple(score),
    )

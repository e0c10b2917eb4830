"""The loops of the tiled backend: flash-style attention over lists of active tiles, in plain XLA.

    forward   s = q k'          p = e^(s - m)     l, acc rescaled, acc += p v
    backward  s' = k q'         p' = e^(s' - lse)
              dv += p' do       dp' = v do'       ds' = p' (dp' - delta)
              dk += ds' q       dq' += k' ds'

The backward works on transposed tiles because no product then has a large transposed left factor,
which XLA multiplies at half speed on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...mesh import constant
from ...shapes import Array, Float
from .. import base
from ..problem import Config, Gradients, Inputs
from . import steps
from .steps import Tile

# --- e^x ------------------------------------------------------------------------------------------

# e^r for |r| <= log(2) / 2, the largest relative error 1e-7 (a least-squares fit, reweighted to be
# minimax, with the constant term fixed to 1).
_EXP = (8.29030613e-3, 4.18979763e-2, 0.166676366, 0.499991492, 0.999999707, 1.0)


@jax.custom_jvp
def exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`e ** x` for x <= 0: in float32 a tenth faster than XLA's, to 5e-6; exactly 0 below -87.

    Relative to 1, which is what weights are added to, to 2e-7. NaN is NaN.
    """
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    # e^x = 2^n e^r. Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits; taken
    # from there, as XLA may simplify adding and subtracting the same number.
    shifted = x * jnp.float32(1 / math.log(2)) + jnp.float32(12582912)
    shifted = lax.bitcast_convert_type(shifted, jnp.int32)
    n = (shifted - jnp.int32(0x4B400000)).astype(jnp.float32)
    rest = x - n * jnp.float32(math.log(2))
    power = jnp.full_like(x, _EXP[0])
    for c in _EXP[1:]:
        power = power * rest + jnp.float32(c)
    bits = lax.bitcast_convert_type(power, jnp.int32) + (shifted << 23)
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(x >= jnp.float32(-87), power, jnp.maximum(x, jnp.float32(0)))


@exp.defjvp
def _exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    power = exp(*primals)
    return power, power * tangents[0]


def _dot(config: Config, dtype: Any) -> Callable[..., Any]:
    precision = lax.Precision.HIGHEST if config.precision is None else config.precision

    def dot(a: Array, b: Array, ca: int, cb: int) -> Array:
        """Products of stacks of matrices, contracting axis `ca` of one with `cb` of the other."""
        dims = (((ca,), (cb,)), ((0,), (0,)))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)

    return dot


# --- forward --------------------------------------------------------------------------------------


def forward(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    z = steps.shape_of(config, x)
    dtype = base.accumulator(x.query.dtype)
    low, nothing = jnp.asarray(-jnp.inf, dtype), jnp.zeros((), dtype)
    dot = _dot(config, dtype)
    work = steps.work(config, z, x.states)
    whole, x = x, steps.pad_inputs(config, z, x)
    units = z.cb * z.ck

    def step(at: Tile, carry: Any) -> Any:
        acc, ml = carry
        rows = z.G * at.tq
        grid = (units, z.G, at.tq, at.tk)
        c = steps.scale_of(z, x, at)
        # A negative scale turns the order of logits around, and their maximum with it.
        qt = steps.rows_of(z, x.query, at) * jnp.where(c < 0, -1, 1).astype(x.query.dtype)
        vt = steps.columns_of(z, x.value, at)
        s = dot(qt, steps.columns_of(z, x.key, at), 2, 2)
        c = jnp.abs(c)
        if at.masked:
            shown = steps.visible(config, z, x, at, transposed=False)
        if config.score is not None:
            s = (s * c).reshape(grid)
            if at.masked:
                s = jnp.where(shown, s, nothing)
            parts = steps.parts_of(z, config.score, x.score, at)
            s = steps.scored(config, z, parts, at, False, s).reshape(units, rows, at.tk)
            c = jnp.ones((), dtype)
        if at.masked:
            s = jnp.where(shown, (s * c).reshape(grid), low).reshape(s.shape)
            c = jnp.ones((), dtype)

        u = at.b * z.K + at.h
        old = lax.optimization_barrier(steps.cut_out(ml, [u, 0, at.i], [units, 2 * z.G, at.tq]))
        m, l = (a[:, 0] for a in jnp.split(old.reshape(units, 2, rows), 2, 1))
        top = lax.stop_gradient(jnp.maximum(m, s.max(2) * (c[..., 0] if c.ndim else c)))
        # Rows that have seen nothing so far are measured from 0: -inf - -inf is NaN.
        level = jnp.where(top == low, nothing, top)
        p = exp((s if at.masked else s * c) - level[..., None])
        fade = exp(m - level)
        l = l * fade + p.sum(2)
        if config.dropout:
            keep = steps.kept(config, z, x, at, False, p)
            p = (p.reshape(grid) * keep).reshape(s.shape)
        here = [u * z.G, at.i, 0], [units * z.G, at.tq, z.Hv]
        part = steps.cut_out(acc, *here).reshape(units, rows, z.Hv)
        part = part * fade[..., None] + dot(p.astype(vt.dtype), vt, 2, 1)
        acc = steps.put_in(acc, part.reshape(here[1]), here[0])
        new = jnp.stack([top, l], 1).reshape(old.shape)
        return acc, steps.put_in(ml, new, [u, 0, at.i])

    acc = constant(x.query, (z.B * z.K * z.G, z.Tp, z.Hv), dtype)
    # One array of m and l: two would be copied in every step.
    m = constant(x.query, (z.B * z.K, z.G, z.Tp), dtype, -jnp.inf)
    acc, ml = steps.loop(z, work, step, (acc, jnp.concatenate([m, jnp.zeros_like(m)], 1)))
    acc = acc.reshape(z.B, z.K, z.G, z.Tp, z.Hv)[..., : z.T, :]
    ml = ml.reshape(z.B, z.K, 2, z.G, z.Tp)[..., : z.T]
    m, l = ml[:, :, 0], ml[:, :, 1]
    seen = l != 0
    total = jnp.where(seen, l, jnp.ones((), dtype))
    out = jnp.where(seen[..., None], acc / total[..., None], nothing).astype(whole.query.dtype)
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    return out.transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2)


# --- backward -------------------------------------------------------------------------------------


def backward(
    config: Config,
    groups: int,
    x: Inputs,
    out: Float[Array, "B T K G Hv"],
    lse: Float[Array, "B T K G"],
    d_out: Float[Array, "B T K G Hv"],
    d_lse: Float[Array, "B T K G"],
) -> Gradients:
    """Cotangents of the inputs, in one pass.

    Operands that the batch rows share get one gradient for each of `groups` equal groups of rows.
    """
    z = steps.shape_of(config, x)
    if groups > 1:
        z = z._replace(cb=1)
    dtype = base.accumulator(x.query.dtype)
    dot = _dot(config, dtype)
    work = steps.work(config, z, x.states)
    units = z.cb * z.ck
    zero = jnp.zeros((), dtype)

    # Rows that see nothing take no part: all that they are given is 0.
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse
    lines = [jnp.where(lse == -jnp.inf, zero, lse), delta]
    line = jnp.stack([steps.padded(a.transpose(0, 2, 3, 1), 3, z.Tp) for a in lines], 2)
    line = line.reshape(z.B * z.K, 2 * z.G, z.Tp)
    whole, x = x, steps.pad_inputs(config, z, x)
    d_out = steps.heads_first(config, d_out, z.Tp)
    # Transposed here, not in the product: XLA would fold that into its slow kind.
    key_across = jnp.swapaxes(x.key, 1, 2)
    learned = [n for n, a in enumerate(x.score) if jnp.issubdtype(a.dtype, jnp.floating)]

    def step(at: Tile, carry: Any) -> Any:
        dq, dk, dv, ds_parts = carry
        u = at.b * z.K + at.h
        rows = z.G * at.tq
        grid = (units, at.tk, z.G, at.tq)
        qt, dt = steps.rows_of(z, x.query, at), steps.rows_of(z, d_out, at)
        kt, vt = steps.columns_of(z, x.key, at), steps.columns_of(z, x.value, at)
        across = steps.cut_out(key_across, [u, 0, at.j], [units, z.H, at.tk])
        block = steps.cut_out(line, [u, 0, at.i], [units, 2 * z.G, at.tq])
        lse_t, delta_t = jnp.split(block.reshape(units, 2, rows), 2, 1)
        if at.masked:
            shown = steps.visible(config, z, x, at, transposed=True)
        s = dot(kt, qt, 2, 2)
        c = steps.scale_of(z, x, at)
        exponent = s * c
        if config.score is not None:
            logits = exponent.reshape(grid)
            if at.masked:
                logits = jnp.where(shown, logits, zero)
            parts = steps.parts_of(z, config.score, x.score, at)

            def scored(logits: Array, learnt: list[Array]) -> Array:
                given = list(parts)
                for n, part in zip(learned, learnt, strict=True):
                    given[n] = part
                return steps.scored(config, z, given, at, True, logits)

            scores, pull = jax.vjp(scored, logits, [parts[n] for n in learned])
            exponent = scores.reshape(s.shape)
        exponent = exponent - lse_t
        if at.masked:
            # Before the exponential, not after: what is masked may be too large for it.
            exponent = jnp.where(shown, exponent.reshape(grid), -jnp.inf).reshape(s.shape)
        # The barrier keeps XLA from computing it twice, for kept weights and for ds.
        p = lax.optimization_barrier(exp(exponent))
        dp = dot(vt, dt, 2, 2)
        kept = p
        if config.dropout:
            keep = steps.kept(config, z, x, at, True, p)
            kept = (p.reshape(grid) * keep).reshape(s.shape)
            dp = (dp.reshape(grid) * keep).reshape(s.shape)
        dv_part = dot(kept.astype(dt.dtype), dt, 2, 1)
        # What has no weight has no slope, however large the product.
        ds = jnp.where(p == 0, zero, p * (dp - delta_t))
        if config.score is not None:
            d_logits, d_parts = pull(ds.reshape(grid))
            if at.masked:
                d_logits = jnp.where(shown, d_logits, zero)
            ds = d_logits.reshape(s.shape)
            ds_parts = tuple(
                steps.add_to(z, config.score.kinds[n], total, part, at, groups)
                for n, total, part in zip(learned, ds_parts, d_parts, strict=True)
            )
        ds = ds.astype(qt.dtype)
        dk_part, dq_part = dot(ds, qt, 2, 1), dot(across, ds, 2, 1)
        if c.ndim:
            # The scale of dq, and of dk where it is one for all, waits until the end.
            dk_part = dk_part * c
        dq = steps.accumulate(dq, dq_part.reshape(units, z.H * z.G, at.tq), [u, 0, at.i])
        dk = steps.accumulate(dk, dk_part, [u, at.j, 0])
        dv = steps.accumulate(dv, dv_part, [u, at.j, 0])
        return dq, dk, dv, ds_parts

    def shared(n: int) -> Array:
        array = x.score[n]
        extent = groups if array.shape[0] == 1 else z.B
        return constant(x.query, (extent, *array.shape[1:]), base.accumulator(array.dtype))

    dq, dk, dv, parts = steps.loop(
        z,
        work,
        step,
        (
            constant(x.query, (z.B * z.K, z.H * z.G, z.Tp), dtype),
            constant(x.query, (z.B * z.K, z.Sp, z.H), dtype),
            constant(x.query, (z.B * z.K, z.Sp, z.Hv), dtype),
            tuple(map(shared, learned)),
        ),
    )
    dq = dq.reshape(z.B, z.K, z.H, z.G, z.Tp)[..., : z.T].transpose(0, 4, 1, 3, 2)
    d_scale = (whole.query.astype(dtype) * dq).sum((1, 2, 3, 4))
    by_row = x.scale.reshape(-1, 1, 1, 1)
    if x.scale.shape[0] == 1:
        dk = dk * x.scale[:, None, None]
    dk, dv = (
        jnp.moveaxis(a.reshape(z.B, z.K, z.Sp, -1)[:, :, : z.S].astype(like.dtype), 1, 2)
        for a, like in ((dk, whole.key), (dv, whole.value))
    )
    score: list[Array | None] = [None] * len(x.score)
    for n, part in zip(learned, parts, strict=True):
        assert config.score is not None
        like = whole.score[n]
        if config.score.kinds[n] == "diagonal":
            part = part[..., z.Sp - z.S :]
        score[n] = part[(..., *map(slice, like.shape[3:]))].astype(like.dtype)
    return Gradients(
        (dq * by_row[..., None]).astype(whole.query.dtype),
        dk,
        dv,
        d_scale,
        tuple(score),
    )

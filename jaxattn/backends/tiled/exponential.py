"""`e ** x` of numbers that are at most 0, by which XLA's loops on CPU compute weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from ...shapes import Array, Float

# e^r for |r| <= log(2) / 2, the largest relative error 1e-7 (a least-squares fit, reweighted to be
# minimax, with the constant term fixed to 1).
_EXP = (8.29030613e-3, 4.18979763e-2, 0.166676366, 0.499991492, 0.999999707, 1.0)


@jax.custom_jvp
def exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`e ** x` for x <= 0, in float32 10% faster than `jnp.exp`; in other dtypes `jnp.exp` itself.

    The error is at most 2e-7, and at most 5e-6 of the result. Below -87 the result is exactly 0.
    NaN stays NaN.
    """
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    # e^x = 2^n e^r. Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits. It is
    # read from the bits, as XLA may simplify adding and then subtracting the same number.
    shifted = x * jnp.float32(1 / math.log(2)) + jnp.float32(12582912)
    shifted = lax.bitcast_convert_type(shifted, jnp.int32)
    n = (shifted - jnp.int32(0x4B400000)).astype(jnp.float32)
    rest = x - n * jnp.float32(math.log(2))
    power = lax.full_like(x, _EXP[0])
    for c in _EXP[1:]:
        power = power * rest + jnp.float32(c)
    bits = lax.bitcast_convert_type(power, jnp.int32) + (shifted << 23)
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return lax.select(x >= jnp.float32(-87), power, lax.max(x, lax.full_like(x, 0)))


@exp.defjvp
def _exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    power = exp(*primals)
    return power, power * tangents[0]

"""The definition of masked attention: the formula, on all logits at once.

Differentiable any number of times, in both modes; O(T * S) memory.
"""

from __future__ import annotations

import jax.numpy as jnp

from ..shapes import Array, Float
from . import base, formula, problem
from .base import Call, unchanged

WHY = "the definition"

LIMITS: tuple[str, ...] = ()

prepare = unchanged


def refuse(call: Call) -> str | None:
    """None, unless devices share the sequence: this backend computes every other call."""
    return base.shared(call)


def footprint(call: Call) -> int:
    """Bytes of the logits and the weights."""
    B, T, S, N, _, _, _ = call.sizes
    return 2 * B * N * T * S * jnp.dtype(base.accumulator(call.query.dtype)).itemsize


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    out, lse, _ = formula.attend(*problem.whole(call))
    return out, lse


def received(
    call: Call, lse: Float[Array, "B T N"], weight: Float[Array, "B T N"]
) -> Float[Array, "B S N"]:
    """The sum over queries of a weight of each times the weights of attention."""
    config, x = problem.whole(call)
    given = formula.attend(config, x).weights * jnp.swapaxes(weight, 1, 2)[..., None]
    seen = formula.visible(config, x, 0, call.sizes.T)
    if seen is not None:
        # NaN is given to the keys that a query sees, and to no others.
        given = jnp.where(seen, given, 0)
    return jnp.swapaxes(given.sum(2), 1, 2)


STATISTICS = base.Statistics(columns=True, received=received)


def weights(call: Call) -> tuple[Float[Array, "B N T S"], Float[Array, "B T N"]]:
    """The weights `[B, N, T, S]` in the dtype of accumulation, and LSE `[B, T, N]`."""
    _, lse, found = formula.attend(*problem.whole(call))
    return found, lse

"""Attention of few queries to many keys, as in decoding: keys and values are read in place.

The formula of `dense` for arrays with heads first in memory, as a `KVCache` holds them.
"""

from __future__ import annotations

import jax.numpy as jnp

from ..shapes import Array, Float
from . import base, formula, problem
from .base import Call, unchanged

WHY = "keys and values are read where they are"

LIMITS: tuple[str, ...] = ()

prepare = unchanged

# The largest number of queries of one key head. The logits, O(T * S), are then a fraction of the
# keys themselves.
MOST = 16


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: there are many queries, or none."""
    _, T, _, N, K, _, _ = call.sizes
    nothing = base.nothing_to_compute(call)
    if nothing is not None:
        return nothing
    if base.symbolic(T):
        return "the number of queries is symbolic, and this backend is for few"
    if T * (N // K) > MOST:
        return f"{T * (N // K)} queries for each key head; this backend takes at most {MOST}"
    return None


def footprint(call: Call) -> int:
    """Bytes of the logits and the weights, and of keys and values where heads do not come first."""
    B, T, S, N, K, H, Hv = call.sizes
    logits = 2 * B * N * T * S * jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    return int(logits + B * S * K * (H + Hv) * jnp.dtype(call.key.dtype).itemsize)


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    out, lse, _ = formula.attend(*problem.whole(call), layout=formula.HEADS_FIRST)
    return out, lse

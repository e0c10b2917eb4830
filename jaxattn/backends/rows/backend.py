"""What is refused, what is kept, and how a call becomes steps."""

from __future__ import annotations

import jax.numpy as jnp

from ...shapes import Array, Float
from .. import base, bfloat16, problem
from ..base import Call, unchanged
from ..flash import transforms
from ..problem import Config, Engine, Inputs, Keeping
from . import passes
from .steps import numbers, rows_of_step

WHY = "whole rows of logits, a few batch rows at a time, so that they stay in the caches"

LIMITS: tuple[str, ...] = ()

STATISTICS = base.Statistics()

prepare = unchanged

# Weights up to which they are kept: 4 MB of float32. With 5 MB both passes took a fifth longer.
MOST_KEPT = 2**20

ENGINE = Engine(
    passes.forward,
    passes.backward,
    differentiable=passes.forward,
    decided=passes.decided,
    cleans=True,
    states=False,
)
KEEPING = ENGINE._replace(keeping=Keeping(passes.with_weights, passes.from_weights))


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: sizes are 0, or lengths are symbolic."""
    return STATISTICS.missing(call) or base.nothing_to_cut(call)


def footprint(call: Call) -> int:
    """Bytes of the arrays of one step."""
    B, T, S, N, K, H, Hv = call.sizes
    each = numbers(T, S, N, K, H + Hv)
    width = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    return int(rows_of_step(B, each) * each * width)


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

    They take no more memory than inputs and outputs then. If they are more, or rows are more than
    one step, they do not stay in the caches, and computing them again takes as long or less. A
    score is differentiated at its logits, which are computed anyway.
    """
    B, T, S, N, K, H, Hv = call.sizes
    if call.score is not None or call.shards is not None or base.symbolic(B):
        return False
    width = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    others = (N * T + K * S) * (H + Hv) * jnp.dtype(call.query.dtype).itemsize
    few = B * N * T * S <= MOST_KEPT and rows_of_step(B, numbers(T, S, N, K, H + Hv)) == B
    return bool(few and N * T * S * width <= others)

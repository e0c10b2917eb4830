"""The definition of masked attention: one head as the formula, `vmap`ped over heads and batches.

Differentiable any number of times, in both modes; O(T * S) memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..masks import full
from ..shapes import Array, Float
from . import base
from .base import Call


def refuse(call: Call) -> str | None:
    """Nothing is refused: this is the definition."""
    return None


def footprint(call: Call) -> int:
    """Bytes of the logits and the weights."""
    B, T, S, N, _, _, _ = call.sizes
    return 2 * B * N * T * S * jnp.dtype(base.accumulator(call.query.dtype)).itemsize


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    out, lse, _ = _over_heads(call)
    return jnp.moveaxis(out, 1, 2).astype(call.query.dtype), jnp.moveaxis(lse, 1, 2)


def weights(call: Call) -> tuple[Float[Array, "B N T S"], Float[Array, "B T N"]]:
    """The weights `[B, N, T, S]` in the dtype of accumulation, and LSE `[B, T, N]`."""
    _, lse, p = _over_heads(call)
    return p, jnp.moveaxis(lse, 1, 2)


def head(call: Call, q: Any, k: Any, v: Any, b: Any, h: Any, q_at: Any, k_at: Any) -> Any:
    """One head: `q [T, H]`, `k [S, H]`, `v [S, Hv]` at positions `b`, `h`, `q_at [T]`, `k_at [S]`.

    Returns output `[T, Hv]`, LSE `[T]` and weights `[T, S]`.
    """
    dtype, precision = base.accumulator(q.dtype), call.precision or jax.lax.Precision.HIGHEST
    dot = partial(jnp.matmul, precision=precision, preferred_element_type=dtype)

    mask = full() if call.mask is None else call.mask
    seen = cells(mask)(b, h, q_at, k_at)  # [T, S]
    row_seen, key_seen = seen.any(1), seen.any(0)
    # 0 * NaN is NaN, in the products of the backward pass too: what nobody sees becomes 0 here.
    q = jnp.where(row_seen[:, None], q, 0)
    k, v = (jnp.where(key_seen[:, None], x, 0) for x in (k, v))

    logits = jnp.where(seen, dot(q, k.T) * jnp.asarray(call.scale, dtype), 0)
    if call.score is not None:
        logits = cells(call.score, logits)(b, h, q_at, k_at)

    p, lse = base.softmax(seen, logits)
    if call.dropout is not None:
        keys = call.dropout.rows(b, h, q_at[:, None])
        keep = base.keeps(keys, k_at[None, :], call.dropout.rate)
        p = jnp.where(keep, p * base.kept_scale(call.dropout.rate, dtype), 0)
    # The row's own `where`: whatever cotangent its zero receives, nothing comes of it.
    out = jnp.where(lse[:, None] > -jnp.inf, dot(p, v.astype(dtype)), 0)
    return out, lse, p


def cells(fn: Callable[..., Any], *logits: Any) -> Callable[..., Any]:
    """A mask, or a score of `[T, S]` logits, over scalars `b`, `h` and vectors of q and k."""
    first = (0,) * len(logits)
    over_k = jax.vmap(fn, (*first, None, None, None, 0))
    over_q = jax.vmap(over_k, (*first, None, None, 0, None))
    return partial(over_q, *logits)


def _over_heads(call: Call) -> Any:
    """`head` over batches and query heads, a key head shared by its group: `[B, N, T, ...]`."""
    B, T, S, N, K, H, _ = call.sizes
    at = call.positions.filled(B, N, T, S)
    groups = call.query.reshape(B, T, K, N // K, H)
    over_group = jax.vmap(partial(head, call), (1, None, None, None, 0, None, None))
    over_kv = jax.vmap(over_group, (1, 1, 1, None, 0, None, None))
    # Positions that the rows share stay out of the batch's vmap, so that masks are computed once.
    q, k = ((x[0], None) if x.shape[0] == 1 else (x, 0) for x in (at.q, at.k))
    over_batch = jax.vmap(over_kv, (0, 0, 0, 0, None, q[1], k[1]))
    results = over_batch(groups, call.key, call.value, at.b, at.h.reshape(K, N // K), q[0], k[0])
    return jax.tree.map(lambda x: x.reshape(B, N, *x.shape[3:]), results)

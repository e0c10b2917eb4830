"""Attention of few queries to many keys, as in decoding: keys and values are read once, in place.

The formula of `dense`, on whole arrays. That one makes what nobody sees 0 first, as 0 * NaN is NaN,
which copies all keys and values; here that is done only where the result turns out not to be
finite. Keys whose heads come first in memory, as a `KVCache` holds them, are not even transposed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..algebra import over_grid
from ..masks import full
from ..shapes import Array, Float
from . import base
from .base import Call

# Queries of one key head. With so few the logits, O(T * S), are a fraction of the keys themselves.
MOST = 16


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: it is for few queries."""
    _, T, _, N, K, _, _ = call.sizes
    if 0 in call.sizes:
        return f"nothing to compute: the sizes are {call.sizes}"
    if T * (N // K) > MOST:
        return f"{T * (N // K)} queries for each key head, and it is made for up to {MOST}"
    return None


def footprint(call: Call) -> int:
    """Bytes of the logits and the weights, and of keys and values where heads do not come first."""
    B, T, S, N, K, H, Hv = call.sizes
    logits = 2 * B * N * T * S * jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    return int(logits + B * S * K * (H + Hv) * jnp.dtype(call.key.dtype).itemsize)


@jax.custom_jvp
def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    # Turned out here: a branch that turned them would be given a copy to turn.
    arrays = _heads_first(call)
    out, lse, finite = _attend(call, *arrays, careful=False)
    return jax.lax.cond(
        finite, lambda: (out, lse), lambda: _attend(call, *arrays, careful=True)[:2]
    )


@run.defjvp
def _differentiated(primals: tuple[Call], tangents: tuple[Call]) -> Any:
    # The backward multiplies keys too, by zeros where nobody sees them.
    def careful(call: Call) -> Any:
        return _attend(call, *_heads_first(call), careful=True)[:2]

    return jax.jvp(careful, primals, tangents)


def _heads_first(call: Call) -> tuple[Array, Array, Array]:
    query, key, value = (jnp.moveaxis(x, 1, 2) for x in (call.query, call.key, call.value))
    return query, key, value


def _attend(
    call: Call, query: Array, key: Array, value: Array, *, careful: bool
) -> tuple[Array, Array, Array]:
    """Output, LSE, and whether all is finite; with care, whatever those hold whom nobody sees."""
    B, T, S, N, K, _, _ = call.sizes
    at = call.positions.filled(B, N, T, S)
    seen = over_grid(full() if call.mask is None else call.mask, at)  # [B, N, T, S]
    if careful:
        nothing = jnp.zeros((), query.dtype)
        query = jnp.where(seen.any(-1)[..., None], query, nothing)
        by_key = seen.reshape(B, K, -1, S).any(2)[..., None]
        key, value = (jnp.where(by_key, x, nothing) for x in (key, value))
    dtype, precision = base.accumulator(query.dtype), call.precision or jax.lax.Precision.HIGHEST
    product = partial(jnp.einsum, precision=precision, preferred_element_type=dtype)
    zero = jnp.zeros((), dtype)

    # A key head's queries together: one product reads its keys once.
    raw = product("bkth,bksh->bkts", query.reshape(B, K, -1, query.shape[-1]), key)
    logits = jnp.where(seen, raw.reshape(seen.shape) * jnp.asarray(call.scale, dtype), zero)
    if call.score is not None:
        logits = _scored(call.score, logits, at)
    p, lse = base.softmax(seen, logits)
    if call.dropout is not None:
        keys = call.dropout.rows(
            at.b[:, None, None, None], at.h[None, :, None, None], at.q[:, None, :, None]
        )
        keep = base.keeps(keys, at.k[:, None, None, :], call.dropout.rate)
        p = jnp.where(keep, p * base.kept_scale(call.dropout.rate, dtype), zero)
    out = product("bkts,bksh->bkth", p.reshape(B, K, -1, S), value.astype(dtype))
    finite = jnp.isfinite(raw).all() & jnp.isfinite(out).all()
    # The row's own `where`: whatever cotangent its zero receives, nothing comes of it.
    out = jnp.where(lse[..., None] > -jnp.inf, out.reshape(B, N, T, -1), zero).astype(
        call.query.dtype
    )
    return jnp.moveaxis(out, 1, 2), jnp.moveaxis(lse, 1, 2), finite


def _scored(score: Any, logits: Array, at: Any) -> Array:
    """The score of `[B, N, T, S]` logits."""
    over_k = jax.vmap(score, (0, None, None, None, 0))
    over_q = jax.vmap(over_k, (0, None, None, 0, None))
    over_h = jax.vmap(over_q, (0, None, 0, None, None))
    q, k = (jnp.broadcast_to(x, (len(logits), x.shape[1])) for x in (at.q, at.k))
    return jax.vmap(over_h, (0, 0, None, 0, 0))(logits, at.b, at.h, q, k)

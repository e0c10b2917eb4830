"""Attention of few queries to many keys, as in decoding: keys and values are read once, in place.

Reading them is nearly all of the work. XLA on CPU multiplies 32-bit matrices with heads first where
they are, as a `KVCache` holds them. Of all others it first makes whole copies: transposed, and in
float32. Here such keys and values are copied a block at a time, into memory that stays in the
caches of the processor, and blocks after the last visible key are not read. The softmax is online:
sums over the blocks so far are scaled down when a larger logit comes.

The backward of blocks is that of whole rows: with few queries all logits together are small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ..mesh import constant
from ..shapes import Array, Bool, Float, Int
from ..stats import statistics
from ..tracing.split import cut
from . import base, dense, formula, problem
from .base import Call, unchanged
from .flash import transforms
from .problem import DROPOUT, Config, Engine, Inputs, joined
from .rows import parts, passes

WHY = "keys and values are read where they are"

LIMITS: tuple[str, ...] = ()

STATISTICS = base.Statistics(columns=True, received=dense.received)

prepare = unchanged

# The largest number of queries of one key head. The logits, O(T * S), are then a fraction of the
# keys themselves.
MOST = 16

# Numbers of keys in a block: 2 MB of float32. With half of that one query took a fifth longer, with
# twice as many up to two fifths.
BLOCK = 2**19


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: many queries, none, or a shared sequence."""
    _, T, _, N, K, _, _ = call.sizes
    nothing = base.nothing_to_compute(call) or base.shared(call)
    if nothing is not None:
        return nothing
    if base.symbolic(T):
        return "the number of queries is symbolic, and this backend is for few"
    if T * (N // K) > MOST:
        return f"{T * (N // K)} queries for each key head; this backend takes at most {MOST}"
    return None


def footprint(call: Call) -> int:
    """Bytes of logits and weights, and of the float32 copy of a block, or copies of all keys."""
    B, T, S, N, K, H, Hv = call.sizes
    wide = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    block = _block(call)
    if block is not None:
        return int(B * block * (2 * N * T + K * (H + Hv)) * wide)
    logits = 2 * B * N * T * S * wide
    return int(logits + B * S * K * (H + Hv) * jnp.dtype(call.key.dtype).itemsize)


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    block = _block(call)
    if block is None:
        config, x = problem.whole(call)
        out, lse, _ = formula.attend(config, x, layout=formula.HEADS_FIRST)
        return out, lse
    tile = (call.sizes.T, block)
    engine = HEADS_FIRST if call.heads_first else LENGTH_FIRST
    return transforms.attend(
        *problem.build(call, engine, base.factors(call), lambda known, heads: tile)
    )


def _block(call: Call) -> int | None:
    """The number of keys in a block; None where all are multiplied at once."""
    B, _, S, _, K, H, Hv = call.sizes
    # With statistics the logits of all keys are looked at together.
    if base.platform(call) != "cpu" or base.symbolic(S) or statistics(call.stats):
        return None
    if call.heads_first and jnp.dtype(call.key.dtype).itemsize >= 4:
        return None
    width = (1 if base.symbolic(B) else B) * K * max(H, Hv)
    # At least 16, so that a step of the loop does more than begin and end.
    return min(max(16, BLOCK // width), S)


class Sums(NamedTuple):
    """What the blocks so far add up to, `[B, K, G, T, ..]`.

    Attributes:
      top: the largest logit.
      total: of `e^(logit - top)`.
      out: of these times the values, `[.., Hv]`.
      kinds: which values that are not finite were visible, `[B, N, T, 3 * Hv]`; see
        `formula.kinds`. None where values are taken as they are.
    """

    top: Float[Array, "B K G T 1"]
    total: Float[Array, "B K G T 1"]
    out: Float[Array, "B K G T Hv"]
    kinds: Bool[Array, "B N T kinds"] | None


def forward(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    B, T, K, G, _ = x.query.shape
    S, Hv = x.value.shape[1], x.value.shape[-1]
    wide = base.accumulator(x.query.dtype)
    block = config.tile[1]
    assert config.engine is not None
    heads_first = config.engine.heads_first
    seen = parts.visible(config, x)
    if seen is not None:
        seen = jnp.broadcast_to(seen, (*(1, 1, 1, *seen.shape[:-2])[-3:], T, S))
    last = S if seen is None else _last(seen)
    # As they lie, before anything else: a loop or a branch would be given copies.
    key, value = (jnp.swapaxes(a, 1, 2) if heads_first else a for a in (x.key, x.value))

    def part(array: Array, at: Any) -> Array:
        found = lax.dynamic_slice_in_dim(array, at, block, 2 if heads_first else 1)
        return jnp.swapaxes(found, 1, 2) if heads_first else found

    def operands(kinds: Any, arrays: Any, at: Any) -> tuple[Array, ...]:
        pairs = zip(kinds, arrays, strict=True)
        return tuple(cut(kind, array, 3, (0, at), (T, block), S) for kind, array in pairs)

    def add(n: Any, sums: Sums) -> Sums:
        # The last block is a whole one too: it begins with keys of the block before.
        at = jnp.minimum(n * block, S - block)
        shown = None
        if S % block:
            shown = at + lax.broadcasted_iota(jnp.int32, (1, 1, 1, T, block), 4) >= n * block
        if seen is not None:
            here = lax.dynamic_slice_in_dim(seen, at, block, 4)
            shown = here if shown is None else here & shown
        some = x._replace(
            key=part(key, at),
            value=part(value, at),
            score=operands(config.score.kinds if config.score else (), x.score, at),
            dropout=operands(DROPOUT if config.dropout else (), x.dropout, at),
        )
        logits = parts.where(shown, parts.logits_of(config, some, shown)[0], -jnp.inf)
        top = jnp.maximum(sums.top, logits.max(-1, keepdims=True))
        # Rows without any visible key are measured from 0: -inf - -inf is NaN.
        level = jnp.where(top == -jnp.inf, jnp.zeros((), wide), top)
        fade, p = jnp.exp(sums.top - level), jnp.exp(logits - level)
        kept = p * parts.dropout_factors(some, wide) if config.dropout else p
        kinds, taken = sums.kinds, some.value
        if kinds is not None:
            all_shown = jnp.ones((1, 1, 1, T, block), bool) if shown is None else shown
            flags = formula.kinds(jnp.swapaxes(some.value, 1, 2))
            kinds = kinds | formula.reach(joined(all_shown, 1), flags, K * G)
            taken = base.finite(some.value)
        product = parts.dot(config, parts.factor(config, kept), parts.keys(config, taken), 2)
        return Sums(
            top,
            sums.total * fade + p.sum(-1, keepdims=True),
            sums.out * fade + product.reshape(sums.out.shape),
            kinds,
        )

    def over_blocks(kinds: Array | None) -> Sums:
        line = (B, K, G, T, 1)
        start = Sums(
            constant(key, line, wide, -jnp.inf),
            constant(key, line, wide),
            constant(key, (*line[:-1], Hv), wide),
            kinds,
        )
        return lax.fori_loop(0, (last + block - 1) // block, add, start)

    def with_nonfinite() -> Array:
        sums = over_blocks(constant(value, (B, K * G, T, 3 * Hv), jnp.bool_))
        assert sums.kinds is not None
        found = formula.added(sums.kinds, wide)
        return sums.out + found.reshape(sums.out.shape)

    sums = over_blocks(None)
    # Any value that is not finite makes a sum that is not: 0 * NaN and 0 * inf are NaN.
    out = lax.cond(jnp.isfinite(sums.out).all(), lambda: sums.out, with_nonfinite)
    empty = jnp.zeros((), bool) if seen is None else ~seen.any(-1, keepdims=True)
    # Rows whose visible logits are all -inf are NaN, as in any softmax.
    total = jnp.where(sums.total == 0, jnp.where(empty, 1, jnp.nan).astype(wide), sums.total)
    lse = jnp.where(empty, -jnp.asarray(jnp.inf, wide), sums.top + jnp.log(total))[..., 0]
    out = (out / total).astype(x.query.dtype)
    return out.transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2)


def _last(seen: Bool[Array, "... S"]) -> Int[Array, ""]:
    """The number of keys up to the last that any query sees."""
    some = seen.any(range(seen.ndim - 1))
    return jnp.where(some, jnp.arange(1, seen.shape[-1] + 1, dtype=jnp.int32), 0).max()


LENGTH_FIRST, HEADS_FIRST = (
    Engine(forward, passes.backward, cleans=True, exact=True, heads_first=flag, states=False)
    for flag in (False, True)
)

"""Attention of few queries to many keys, as in decoding: keys and values are read once, in place.

Reading them is nearly all of the work. XLA on CPU multiplies 32-bit matrices with heads first where
they are, as a `KVCache` holds them. Of all others it first makes whole copies: transposed, and in
float32. Here such keys are copied a block at a time, into memory that stays in the caches of the
processor, and blocks after the last visible key are not read.

Derivatives are those of the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from ..mesh import constant, varying_alike
from ..shapes import Array, Bool, Float, Int
from . import base, formula, problem
from .base import Call, unchanged
from .operation import Rules, operation
from .problem import Config, Inputs

WHY = "keys and values are read where they are"

LIMITS: tuple[str, ...] = ()

prepare = unchanged

# The largest number of queries of one key head. The logits, O(T * S), are then a fraction of the
# keys themselves.
MOST = 16

# Numbers of keys in a block: 1 MB of float32. Blocks of a quarter of that took twice as long with
# four queries of each key head, and as long with one.
BLOCK = 2**18


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
    """Bytes of the logits and the weights, and of a block or copies of keys and values."""
    B, T, S, N, K, H, Hv = call.sizes
    wide = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    logits = 2 * B * N * T * S * wide
    block = _block(call)
    if block is not None:
        return int(logits + B * block * K * max(H, Hv) * wide)
    return int(logits + B * S * K * (H + Hv) * jnp.dtype(call.key.dtype).itemsize)


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    config, x = problem.whole(call)
    block = _block(call)
    if block is None:
        out, lse, _ = formula.attend(config, x, layout=formula.HEADS_FIRST)
        return out, lse
    leaves, tree = jax.tree.flatten(x)
    leaves = varying_alike(leaves)
    B, T, _, N, _, _, Hv = call.sizes
    like = (
        constant(leaves[0], (B, T, N, Hv), x.query.dtype),
        constant(leaves[0], (B, T, N), base.accumulator(x.query.dtype)),
    )
    out, lse = operation(_rules(config, tree, call.heads_first, block), leaves, (), like)
    return out, lse


def converts_in_blocks(call: Call) -> bool:
    """Whether this backend reads 16-bit keys a block at a time, faster than any other on CPU."""
    return jnp.dtype(call.key.dtype).itemsize < 4 and _block(call) is not None


def _block(call: Call) -> int | None:
    """The number of keys in a block; None where all are multiplied at once."""
    B, _, S, _, K, H, Hv = call.sizes
    if base.platform(call) != "cpu" or base.symbolic(S):
        return None
    if call.heads_first and jnp.dtype(call.key.dtype).itemsize >= 4:
        return None
    rows = (1 if base.symbolic(B) else B) * K
    # At least 16, so that a step of the loop does more than begin and end.
    size = max(16, BLOCK // (rows * max(H, Hv)))
    return size if size < S else None


@lru_cache(maxsize=1024)
def _rules(config: Config, tree: Any, heads_first: bool, block: int) -> Rules:
    """Attention of the leaves of inputs: output and LSE."""

    def apply(leaves: Any, _: Any) -> Any:
        return _attend(config, jax.tree.unflatten(tree, leaves), heads_first, block)

    def slope(leaves: Any, _: Any, __: Any, moved: Any) -> Any:
        x: Inputs = jax.tree.unflatten(tree, leaves)
        others: Inputs = jax.tree.unflatten(tree, moved)

        def by_formula(*floats: Array) -> tuple[Array, Array]:
            return formula.attend(config, x.with_floats(floats))[:2]

        return jax.jvp(by_formula, x.floats(), x.floats(others))[1]

    return Rules(apply, slope)


def _attend(config: Config, x: Inputs, heads_first: bool, block: int) -> tuple[Array, Array]:
    B, T, N, H = x.query.shape
    S, K, Hv = x.value.shape[1:]
    dtype = base.accumulator(x.query.dtype)
    key, value = x.key, x.value
    if heads_first:
        # As they lie, before anything else: a loop or a branch would be given copies.
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    axis, keys = (2, "bksh") if heads_first else (1, "bskh")
    product = partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST if config.precision is None else config.precision,
        preferred_element_type=dtype,
    )
    seen = formula.visible(config, x, 0, T)
    last = S if seen is None else _last(seen)
    blocks = partial(_over_blocks, S, block, last)

    query = jnp.swapaxes(x.query, 1, 2).reshape(B, K, -1, H).astype(dtype)

    def multiplied(found: Array, start: Any, size: int) -> Array:
        part = lax.dynamic_slice_in_dim(key, start, size, axis).astype(dtype)
        some = product(f"{keys},bkrh->bksr", part, query)
        return lax.dynamic_update_slice_in_dim(found, some, start, 2)

    logits = blocks(multiplied, constant(key, (B, K, S, query.shape[2]), dtype))
    logits = jnp.swapaxes(logits, 2, 3).reshape(B, N, T, S)
    weights, _, lse = formula.weigh(config, x, seen, logits, 0, T)
    by_key = weights.reshape(B, K, -1, S)

    def weighed(clean: Callable[[Array], Array]) -> Array:
        def add(total: Array, start: Any, size: int) -> Array:
            part = lax.dynamic_slice_in_dim(value, start, size, axis).astype(dtype)
            some = lax.dynamic_slice_in_dim(by_key, start, size, 3)
            return total + product(f"bkrs,{keys}->bkrh", some, clean(part))

        found = blocks(add, constant(value, (*by_key.shape[:3], Hv), dtype))
        return found.reshape(B, N, T, Hv)

    def reached(found: Array, start: Any, size: int) -> Array:
        part = lax.dynamic_slice_in_dim(value, start, size, axis)
        part = part if heads_first else jnp.swapaxes(part, 1, 2)
        shown = jnp.ones((1, 1, T, S), bool) if seen is None else seen
        shown = lax.dynamic_slice_in_dim(shown, start, size, 3)
        return found | formula.reach(shown, formula.kinds(part), N)

    def with_nonfinite() -> Array:
        # In blocks like the others, so that it rounds in the same way.
        found = blocks(reached, constant(value, (B, N, T, 3 * Hv), jnp.bool_))
        return weighed(base.finite) + formula.added(found, dtype)

    out = weighed(lambda part: part)
    out = lax.cond(base.anywhere(~jnp.isfinite(out)), with_nonfinite, lambda: out)
    return jnp.swapaxes(out, 1, 2).astype(x.query.dtype), jnp.moveaxis(lse, 1, 2)


def _over_blocks(
    S: int, block: int, last: Any, step: Callable[[Any, Any, int], Any], found: Any
) -> Any:
    """`step(found, start, size)` for blocks up to the first `last` of S keys, and a shorter one."""
    count = jnp.minimum((last + block - 1) // block, S // block)
    found = lax.fori_loop(0, count, lambda i, found: step(found, i * block, block), found)
    return step(found, S - S % block, S % block) if S % block else found


@custom_vmap
def _last(seen: Bool[Array, "... S"]) -> Int[Array, ""]:
    """The number of keys up to the last that any query sees; under `vmap` in any element.

    With a number for each element a loop would select what it computes, a block at a time.
    """
    some = seen.any(range(seen.ndim - 1))
    return jnp.where(some, jnp.arange(1, seen.shape[-1] + 1, dtype=jnp.int32), 0).max()


@_last.def_vmap
def _last_rule(size: int, batched: Any, seen: Array) -> tuple[Array, bool]:
    return _last(seen), False

"""Some batch rows at a time: what a step works on stays in the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...mesh import constant
from .. import base
from ..flash.tile_sizes import largest_divisor
from ..problem import Inputs

# Numbers that a step works on, in all its arrays: 8 MB of float32. With half as many, rows of 16 to
# 77 took up to a quarter longer; with twice as many, a tenth.
STEP_NUMBERS = 2**21

# Numbers up to which all rows are one step: 20 MB of float32. Beyond, both passes of rows of 128
# took nearly twice as long: temporary arrays of more than 32 MB are fresh pages in every call.
WHOLE_NUMBERS = 5 * 2**20


def rows_of_step(B: int, each: int) -> int:
    """The batch rows of a step, where each has so many numbers."""
    if not base.symbolic(B) and B * each <= WHOLE_NUMBERS:
        return B
    return largest_divisor(B, STEP_NUMBERS // each)


def numbers(T: int, S: int, N: int, K: int, widths: int) -> int:
    """Numbers that a batch row takes: of logits and weights, and of copies of the inputs."""
    return 2 * N * T * S + (N * T + K * S) * widths


def by_rows(groups: int, x: Inputs, args: Any, fn: Callable[[Any], tuple[Any, Any]]) -> Any:
    """`fn` of some batch rows at a time.

    Args:
      groups: sums are added up for each of so many equal groups of batch rows.
      x: all inputs, grouped.
      args: arrays with an axis of batch rows, of extent 1 where these share them.
      fn: from the arrays of some rows to results `[rows, ...]` and to sums `[1, ...]`.

    Returns:
      Results `[B, ...]`, and sums `[groups, ...]`, each in its dtype.
    """
    B, T, K, G, H = x.query.shape
    each = B // groups
    S, widths = x.key.shape[1], H + x.value.shape[-1]
    rows = rows_of_step(each, numbers(T, S, K * G, K, widths))
    if rows == B:
        return fn(args)
    leaves, tree = jax.tree.flatten(args)
    shared = [a.shape[0] == 1 for a in leaves]
    cut = [
        a.reshape(-1, rows, *a.shape[1:]) for a, yes in zip(leaves, shared, strict=True) if not yes
    ]

    def given(parts: Any) -> Any:
        following = iter(parts)
        pairs = zip(leaves, shared, strict=True)
        return jax.tree.unflatten(tree, [a if yes else next(following) for a, yes in pairs])

    def step(carry: Any, parts: Any) -> Any:
        n, sums = carry
        found, more = fn(given(parts))
        at = lax.div(n * rows, jnp.int32(each))
        sums = jax.tree.map(lambda a, b: a.at[at].add(b[0].astype(a.dtype)), sums, more)
        return (n + 1, sums), found

    _, like = jax.eval_shape(fn, given([a[0] for a in cut]))
    sums = jax.tree.map(
        lambda a: constant(x.query, (groups, *a.shape[1:]), base.accumulator(a.dtype)), like
    )
    first = constant(x.query, (), jnp.int32)
    (_, sums), found = lax.scan(step, (first, sums), cut)
    found = jax.tree.map(lambda a: a.reshape(B, *a.shape[2:]), found)
    return found, jax.tree.map(lambda a, b: a.astype(b.dtype), sums, like)

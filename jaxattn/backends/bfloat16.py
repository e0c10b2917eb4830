"""Products of bfloat16 matrices on CPU, accumulated in float32: where they pay, and how to ask.

A processor with a unit for them multiplies at nearly twice the rate of float32; without one XLA is
slower than in float32. And XLA chooses the library that has the unit before it has simplified its
program. If it then merges a transpose or a conversion into a product, no library is left that
multiplies it, and the program fails when it runs. A barrier before each factor prevents that.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..mesh import evaluated
from ..shapes import Array
from . import base
from .base import Call

# What Linux calls the unit. A processor with tiles (AMX) has it too.
UNIT = "avx512_bf16"


def factors(call: Call) -> Any:
    """The dtype of the factors of products: on CPU bfloat16 where that pays, or else as others."""
    narrow = jnp.bfloat16
    dtypes = {call.query.dtype, call.key.dtype, call.value.dtype}
    # Algorithms of products, unlike precisions, say themselves what their factors are.
    named = isinstance(call.precision, lax.DotAlgorithmPreset | lax.DotAlgorithm)
    if dtypes == {jnp.dtype(narrow)} and not named and base.platform(call) == "cpu" and pays():
        return narrow
    return base.factors(call)


def dot(a: Array, b: Array, dims: Any, precision: Any) -> Array:
    """`lax.dot_general` in the dtype of accumulation, each factor computed before, as it is."""
    if a.dtype == jnp.bfloat16:
        a, b = lax.optimization_barrier((a, b))
    dtype = base.accumulator(a.dtype)
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)


@cache
def pays() -> bool:
    """Whether products of bfloat16 are right on CPU, and faster than those of float32.

    The same for the whole process. It is found out when first asked, in some tenths of a second.
    """
    return has_unit() and multiplies()


def has_unit(described: str = "/proc/cpuinfo") -> bool:
    """Whether the processor multiplies bfloat16 itself. Only Linux says so in a file: else False.

    A measurement in its place would give another program from one run to the next.
    """
    try:
        lines = Path(described).read_text().splitlines()
    except OSError:
        return False
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return bool(flags) and all(UNIT in each for each in flags)


def multiplies() -> bool:
    """Whether this JAX multiplies bfloat16 as it is, and a program like an engine's runs."""

    def look() -> bool:
        cpu = jax.local_devices(backend="cpu")[0]
        with jax.default_device(cpu), jax.disable_jit(False):
            return _as_it_is() and _is_right()

    # Whatever the failure is, products of float32 remain.
    try:
        return evaluated(look)
    except Exception:
        return False


# Products over the last axis of the first factor, with the second one as it is and transposed.
_PLAIN = (((2,), (1,)), ((0,), (0,)))
_ACROSS = (((2,), (2,)), ((0,), (0,)))
# Numbers of queries, and of keys in a step.
_ROWS, _STEP = 32, 16


def _as_it_is() -> bool:
    """Whether XLA leaves factors as they are: where it has no library, it converts them."""

    def heads_first(a: Array) -> Array:
        return a.reshape(2, _ROWS, 2, -1).swapaxes(1, 2).reshape(4, _ROWS, -1)

    def products(a: Array, b: Array) -> list[Array]:
        plain = [dot(a, b, dims, None) for dims in (_PLAIN, _ACROSS)]
        return [*plain, dot(heads_first(a), heads_first(b), _ACROSS, None)]

    square = jax.ShapeDtypeStruct((2, _ROWS, _ROWS), jnp.bfloat16)
    program = jax.jit(products).lower(square, square).compile().as_text()
    return program is not None and "convert(" not in program


def _is_right() -> bool:
    """Whether a small backward runs, with all that XLA might merge into its products.

    That is parts of arrays, an array transposed before the loop, and weights computed in float32.
    The numbers are integers so small that every sum is exact.
    """
    draw = np.random.default_rng(0)
    query, key = (
        draw.integers(-2, 3, (2, n, 8)).astype(np.float32) for n in (_ROWS, 2 * _STEP)
    )  # fmt: skip
    narrow = [jnp.bfloat16(a) for a in (query, key)]
    d_query, d_key = jax.jit(_backward).lower(*narrow).compile()(*narrow)
    weights = key @ query.swapaxes(1, 2) + 1
    return bool(
        np.array_equal(d_key, weights @ query)
        and np.array_equal(d_query, key.swapaxes(1, 2) @ weights)
    )


def _backward(query: Array, key: Array) -> tuple[Array, Array]:
    across = lax.transpose(key, (0, 2, 1))

    def step(n: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        d_query, d_key = sums
        here = lax.dynamic_slice_in_dim(key, n * _STEP, _STEP, 1)
        turned = lax.dynamic_slice_in_dim(across, n * _STEP, _STEP, 2)
        weights = (dot(here, query, _ACROSS, None) + 1).astype(query.dtype)
        part = dot(weights, query, _PLAIN, None)
        d_key = lax.dynamic_update_slice_in_dim(d_key, part, n * _STEP, 1)
        return d_query + dot(turned, weights, _PLAIN, None), d_key

    shapes = (*across.shape[:2], query.shape[1]), key.shape
    d_query, d_key = (lax.full(shape, 0, np.float32) for shape in shapes)
    # A loop, and one of a single step, which XLA writes out and then merges into what surrounds it.
    return lax.fori_loop(1, 2, step, lax.fori_loop(0, 1, step, (d_query, d_key)))

"""Residues of masks and scores as programs of operations that kernels have, on tiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...shapes import Array
from ...tracing.hashing import Const
from ...tracing.program import Program, Step, trace
from ..problem import Residue
from .operands import learned, replaced

# --- the programs of kernels ----------------------------------------------------------------------


@lru_cache(maxsize=1024)
def scored(residue: Residue, slopes: bool) -> Program:
    """A score in float32; with `slopes` also its derivatives.

    These are by the logit, and by each operand that learns.
    """
    program = residue.program
    which = learned(residue)

    def score(logit: Array, *operands: Array) -> Any:
        def of(logit: Array, some: Sequence[Array]) -> Array:
            return program(logit, *replaced(operands, which, some)).astype(jnp.float32)

        if not slopes:
            return of(logit, [operands[n] for n in which])
        value, pull = jax.vjp(of, logit, [operands[n] for n in which])
        by_logit, by_operands = pull(np.float32(1))
        return value, by_logit, *(d.astype(jnp.float32) for d in by_operands)

    args = [jax.ShapeDtypeStruct((), program.types[ref].dtype) for ref in program.inputs]
    traced, captured = trace(score, args, "score")
    assert not captured
    return traced


# --- evaluating them ------------------------------------------------------------------------------

# Operations that leave a single element as it is. Sums over no axes come from gradients under a
# mesh.
SAME = frozenset(["reshape", "squeeze", "broadcast_in_dim", "copy", "reduce_sum"])

TYPES = frozenset(map(np.dtype, (np.bool_, np.int32, np.uint32, np.float32)))


def unsupported(program: Program, operations: frozenset[str], where: str) -> str | None:
    """What in a program can't be evaluated in a kernel, or None.

    Args:
      program: of single elements.
      operations: the names of those that the kernel has.
      where: what the kernel is called.
    """
    for step in program.steps:
        name = step.prim.name
        if name not in operations:
            return f"`{name}` has no counterpart in a {where} kernel"
    used = {ref for step in program.steps for ref in (*step.args, *step.outs)}
    for ref in (*program.inputs, *(ref for ref in used if isinstance(ref, int))):
        shape, dtype = program.types[ref]
        if shape:
            return "its tile is not computed element by element"
        if np.dtype(dtype) not in TYPES:
            return f"it computes with {np.dtype(dtype).name}"
    return None


def _filled(value: Any, shape: tuple[int, ...]) -> Array:
    """A value for all of a tile."""
    if np.shape(value) == shape:
        return value
    return jnp.full(shape, value, np.asarray(value).dtype if np.isscalar(value) else value.dtype)


def evaluate(program: Program, inputs: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    """The results of a program of single elements on a tile; scalars where no input is a tile.

    Args:
      program: the program.
      inputs: tiles, and scalars where all elements are the same.
      shape: of the tile.
    """
    values: dict[int, Any] = dict(zip(program.inputs, inputs, strict=True))

    def read(ref: Any) -> Any:
        if not isinstance(ref, Const):
            return values[ref]
        value = np.asarray(ref.value)
        return value.astype(jax.dtypes.canonicalize_dtype(value.dtype))[()]

    for step in program.steps:
        args = [read(ref) for ref in step.args]
        # Scalar instructions compute once what all elements have in common.
        if any(np.shape(arg) for arg in args):
            args = [_filled(arg, shape) for arg in args]
        (out,) = step.outs
        values[out] = _operation(step, args, program.types[out].dtype)
    return [read(ref) for ref in program.outputs]


def _operation(step: Step, args: list[Any], dtype: Any) -> Any:
    """One operation. Those on booleans that no Mosaic compiles are replaced by others."""
    name, first = step.prim.name, args[0]
    boolean = first.dtype == jnp.bool_

    if name in SAME:
        return first
    if name == "add_any":
        return first + args[1]
    if name == "not" and boolean:
        return first ^ jnp.ones_like(first)
    if name in ("max", "min") and boolean:
        return first | args[1] if name == "max" else first & args[1]
    if name == "convert_element_type":
        if dtype == first.dtype:
            return first
        if dtype == jnp.bool_:
            return first != jnp.zeros_like(first)
        if boolean:
            return jnp.where(first, jnp.ones(first.shape, dtype), jnp.zeros(first.shape, dtype))
    if name == "integer_pow":
        return _power(first, step.params["y"])
    if name == "select_n":
        which, *cases = args
        chosen = cases[0]
        for n, case in enumerate(cases[1:], 1):
            here = which if boolean else which == jnp.full_like(which, n)
            if dtype == jnp.bool_:
                chosen = (here & case) | ((here ^ jnp.ones_like(here)) & chosen)
            else:
                chosen = jnp.where(here, case, chosen)
        return chosen
    return step.prim.bind(*args, **step.params)


def _power(x: Array, n: int) -> Array:
    """`x ** n` by products: kernels have few of the exponents themselves."""
    if n < 0:
        return jnp.ones_like(x) / _power(x, -n)
    if n == 0:
        return jnp.ones_like(x)
    half = _power(x, n // 2)
    return half * half * x if n % 2 else half * half

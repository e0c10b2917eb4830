"""Residues of masks and scores on a tile that lies in the registers of a warpgroup.

A tile is `[rows, columns]` in the layout in which wgmma leaves its results. Its rows are queries,
or keys in the kernel of dK and dV. What goes with rows is laid out as a sum over columns would be,
and the other way round: spreading it over the tile then moves nothing between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from ...shapes import Array
from ...tracing.hashing import Const
from ...tracing.program import Program, Step, trace
from ..problem import Residue

# Untyped: it changes from one version of JAX to the next.
plgpu: Any = mosaic_gpu

WGMMA = plgpu.Layout.WGMMA

# --- the programs of kernels ----------------------------------------------------------------------


def learns(residue: Residue | None) -> tuple[int, ...]:
    """Which operands of a score have gradients."""
    if residue is None:
        return ()
    program = residue.program
    types = [program.types[ref].dtype for ref in program.inputs[1:]]
    return tuple(n for n, dtype in enumerate(types) if jnp.issubdtype(dtype, jnp.floating))


@lru_cache(maxsize=1024)
def scored(residue: Residue, slopes: bool) -> Program:
    """A score in float32; with `slopes` also its derivatives by the logit and by what learns."""
    program = residue.program
    learned = learns(residue)

    def score(logit: Array, *operands: Array) -> Any:
        def of(logit: Array, learnt: Sequence[Array]) -> Array:
            given = list(operands)
            for n, value in zip(learned, learnt, strict=True):
                given[n] = value
            return program(logit, *given).astype(jnp.float32)

        if not slopes:
            return of(logit, [operands[n] for n in learned])
        value, pull = jax.vjp(of, logit, [operands[n] for n in learned])
        by_logit, by_learnt = pull(np.float32(1))
        return value, by_logit, *(d.astype(jnp.float32) for d in by_learnt)

    args = [jax.ShapeDtypeStruct((), program.types[ref].dtype) for ref in program.inputs]
    traced, captured = trace(score, args, "score")
    assert not captured
    return traced


# --- evaluating them ------------------------------------------------------------------------------

# What leaves a single element as it is. Sums over no axes come from gradients under a mesh.
_SAME = frozenset(["reshape", "squeeze", "broadcast_in_dim", "copy", "reduce_sum"])

# What Mosaic GPU compiles on tiles, with one warpgroup to a tile.
OPERATIONS = _SAME | {
    "abs",
    "add",
    "add_any",
    "and",
    "clamp",
    "convert_element_type",
    "cos",
    "div",
    "eq",
    "exp",
    "exp2",
    "ge",
    "gt",
    "integer_pow",
    "le",
    "log",
    "log2",
    "logistic",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "neg",
    "not",
    "one_minus_square",
    "or",
    "rem",
    "round",
    "rsqrt",
    "select_n",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "sign",
    "sin",
    "sqrt",
    "square",
    "sub",
    "tanh",
    "xor",
}

TYPES = frozenset(map(np.dtype, (np.bool_, np.int32, np.uint32, np.float32)))


def unsupported(program: Program) -> str | None:
    """What in a program can't be evaluated here."""
    for step in program.steps:
        name = step.prim.name
        if name not in OPERATIONS:
            return f"`{name}` has no counterpart in a Mosaic kernel"
        # Of what is inlined later on, the types are asked then.
    used = {ref for step in program.steps for ref in (*step.args, *step.outs)}
    for ref in (*program.inputs, *(ref for ref in used if isinstance(ref, int))):
        shape, dtype = program.types[ref]
        if shape:
            return "its tile is not computed element by element"
        if np.dtype(dtype) not in TYPES:
            return f"it computes with {np.dtype(dtype).name}"
    return None


def spread(value: Any, shape: tuple[int, ...]) -> Array:
    """A value for all of a tile."""
    if np.shape(value) == shape:
        return value
    return jnp.full(shape, value, np.asarray(value).dtype if np.isscalar(value) else value.dtype)


def evaluate(program: Program, inputs: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    """The results of a program of single elements on a tile, or scalars where all are the same.

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
        # What is the same for all elements is computed once, by scalar instructions.
        if any(np.shape(arg) for arg in args):
            args = [spread(arg, shape) for arg in args]
        (out,) = step.outs
        values[out] = _operation(step, args, program.types[out].dtype)
    return [read(ref) for ref in program.outputs]


def _operation(step: Step, args: list[Any], dtype: Any) -> Any:
    """One operation; those on booleans that Mosaic can't compile are spelled otherwise."""
    name, first = step.prim.name, args[0]
    boolean = first.dtype == jnp.bool_

    if name in _SAME:
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
    """`x ** n` by products; Mosaic has few of the exponents."""
    if n < 0:
        return jnp.ones_like(x) / _power(x, -n)
    if n == 0:
        return jnp.ones_like(x)
    half = _power(x, n // 2)
    return half * half * x if n % 2 else half * half


# --- operands -------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """Operands of a residue in global memory, as a kernel is told of them.

    Attributes:
      kinds: of the operands.
      types: of their elements, which may be narrower than the arrays'.
      rows: the kind that goes with the rows of a tile.
    """

    kinds: tuple[str, ...]
    types: tuple[Any, ...]
    rows: str


def stored(kind: str, array: Array) -> Array:
    """An operand as a kernel reads it: booleans as integers, single bytes only for whole tiles."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.int8 if kind == "grid" else jnp.int32)
    return array


def held(op: Operands, refs: Sequence[Any], b: Any, h: Any, row: Any, n: int) -> list[Any]:
    """What stays the same for a warpgroup: operands of its `n` rows from `row` on, and of the head.

    None for the others.
    """
    parts: list[Any] = []
    for kind, dtype, ref in zip(op.kinds, op.types, refs, strict=True):
        part = None
        if kind == "head":
            part = ref[_lead(ref, b, h)]
        elif kind == op.rows:
            part = _load(ref.at[(*_lead(ref, b, h), pl.ds(row, n))], WGMMA.reduce(1))
        parts.append(None if part is None else _typed(part, dtype))
    return parts


def parts(
    op: Operands,
    refs: Sequence[Any],
    fixed: Sequence[Any],
    b: Any,
    h: Any,
    row: Any,
    column: Any,
    shape: tuple[int, ...],
) -> list[Array]:
    """The operands of a tile, as `evaluate` takes them.

    Args:
      op, refs: the operands.
      fixed: what `held` found.
      b, h: batch row and query head.
      row, column: where the tile starts.
      shape: of the tile.
    """
    tiles: list[Any] = []
    for kind, dtype, ref, part in zip(op.kinds, op.types, refs, fixed, strict=True):
        if kind == "head":
            tile = part
        elif kind == op.rows:
            tile = lax.broadcast_in_dim(part, shape, (0,))
        elif kind == "grid":
            cells = pl.ds(row, shape[0]), pl.ds(column, shape[1])
            tile = _typed(_load(ref.at[(*_lead(ref, b, h), *cells)], WGMMA), dtype)
        else:
            along = pl.ds(column, shape[1])
            part = _typed(_load(ref.at[(*_lead(ref, b, h), along)], WGMMA.reduce(0)), dtype)
            tile = lax.broadcast_in_dim(part, shape, (1,))
        tiles.append(tile)
    return tiles


def _lead(ref: Any, b: Any, h: Any) -> tuple[Any, Any]:
    return b if ref.shape[0] != 1 else 0, h if ref.shape[1] != 1 else 0


def _load(ref: Any, layout: Any) -> Array:
    # From global memory there is no load that counts as optimized.
    return plgpu.load(ref, layout=layout, optimized=False)


def _typed(part: Array, dtype: Any) -> Array:
    if dtype == jnp.bool_ and part.dtype != jnp.bool_:
        return part != jnp.zeros_like(part)
    return part

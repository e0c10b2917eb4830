"""States of tiles that are known when a program is traced, computed by NumPy.

A mask such as `causal()` holds no arrays. At positions counted from 0 its states are the same in
every call, and a program that is given them as constants has less to compile. JAX would compile a
program to find them, which takes longer than NumPy to run the same operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from ..masks.positions import Positions
from ..tracing.hashing import Const
from ..tracing.program import Program, trace
from ..tracing.split import Split
from . import intervals

# With more tiles, lists of them would make programs large, once in every layer of a model.
MOST = 2**14


def states(
    parts: Split[Any],
    positions: Positions,
    sizes: tuple[int, int, int, int],
    tile: tuple[int, int],
) -> tuple[bytes, ...] | None:
    """The states of a mask that are the same for all batch rows, heads and values of its arrays.

    Args:
      parts: the mask, split.
      positions: of the call.
      sizes: `(B, N, T, S)`, all known.
      tile: queries and keys of a tile.

    Returns:
      Those of `intervals.states`, an int8 for each tile, a row of tiles each; None where they are
      not known, or are too many.
    """
    _, _, T, S = sizes
    if jax.tree.leaves((parts, positions)) or -(-T // tile[0]) * -(-S // tile[1]) > MOST:
        return None
    return _states(jax.tree.structure((parts, positions)), sizes, tile)


@lru_cache(maxsize=256)
def _states(
    tree: Any, sizes: tuple[int, int, int, int], tile: tuple[int, int]
) -> tuple[bytes, ...] | None:
    parts, positions = jax.tree.unflatten(tree, ())

    def find() -> Any:
        return intervals.states(parts, parts.operands(positions, *sizes), *tile, *sizes[2:])

    program, captured = trace(find, (), "states")
    found = None if captured else _evaluated(program)
    if found is None or found.shape[:2] != (1, 1):
        return None
    return tuple(row.tobytes() for row in found[0, 0])


def _evaluated(program: Program) -> np.ndarray | None:
    """The result of a program without inputs; None if it has an operation that is not below."""
    values: dict[Any, np.ndarray] = {}
    for step in program.steps:
        run = _OPERATIONS.get(step.prim.name)
        if run is None:
            return None
        args = [np.asarray(a.value) if isinstance(a, Const) else values[a] for a in step.args]
        (out,) = step.outs
        # Integers wrap around, as XLA's do.
        with np.errstate(all="ignore"):
            values[out] = np.asarray(run(*args, **step.params), program.types[out].dtype)
    return values[program.outputs[0]]


def _elementwise(ufunc: np.ufunc) -> Callable[..., Any]:
    return lambda *args, **_: ufunc(*args)


def _reduction(ufunc: np.ufunc) -> Callable[..., Any]:
    return lambda array, *, axes, **_: ufunc.reduce(array, axis=tuple(axes))


def _iota(*, shape: Any, dimension: int, **_: Any) -> Any:
    return np.indices(shape, np.int32, sparse=True)[dimension] + np.zeros(shape, np.int32)


def _broadcast(array: Any, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Any:
    extents = [1] * len(shape)
    for axis, extent in zip(broadcast_dimensions, array.shape, strict=True):
        extents[axis] = extent
    return np.broadcast_to(array.reshape(extents), shape)


def _slice(array: Any, *, start_indices: Any, limit_indices: Any, strides: Any, **_: Any) -> Any:
    steps = strides or [None] * array.ndim
    return array[tuple(map(slice, start_indices, limit_indices, steps))]


# The operations of which the states of most masks without arrays are made, in NumPy.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _elementwise(np.add),
    "sub": _elementwise(np.subtract),
    "mul": _elementwise(np.multiply),
    "neg": _elementwise(np.negative),
    "abs": _elementwise(np.abs),
    "max": _elementwise(np.maximum),
    "min": _elementwise(np.minimum),
    "eq": _elementwise(np.equal),
    "ne": _elementwise(np.not_equal),
    "lt": _elementwise(np.less),
    "le": _elementwise(np.less_equal),
    "gt": _elementwise(np.greater),
    "ge": _elementwise(np.greater_equal),
    "and": _elementwise(np.bitwise_and),
    "or": _elementwise(np.bitwise_or),
    "xor": _elementwise(np.bitwise_xor),
    "not": _elementwise(np.invert),
    "is_finite": _elementwise(np.isfinite),
    "reduce_max": _reduction(np.maximum),
    "reduce_min": _reduction(np.minimum),
    "reduce_and": _reduction(np.bitwise_and),
    "reduce_or": _reduction(np.bitwise_or),
    "select_n": lambda which, *cases, **_: np.choose(which.astype(np.intp), cases),
    "convert_element_type": lambda array, **_: array,
    "optimization_barrier": lambda array, **_: array,
    "reshape": lambda array, *, new_sizes, **_: array.reshape(new_sizes),
    "squeeze": lambda array, *, dimensions, **_: np.squeeze(array, tuple(dimensions)),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *arrays, dimension, **_: np.concatenate(arrays, dimension),
    "slice": _slice,
    "iota": _iota,
}

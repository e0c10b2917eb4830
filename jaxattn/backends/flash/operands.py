"""The operands of a `Split` as the tile engines read them, and the gradients of those that learn.

Engines hold an operand as `[B|1, K|1, G|1, ...]` (`Inputs.grouped`). What follows these axes goes
with queries, keys, both or neither, as `tracing.split.along` says for each kind:

    kind        axes after those of heads    a tile's part
    row         [Tp]                         [tq]
    column      [Sp]                         [tk]
    grid        [Tp, Sp]                     [tq, tk]
    diagonal    [Tp + Sp - 1]                [tq + tk - 1], then skewed to [tq, tk]
    head        []                           []

Here are the steps around a kernel or a loop: operands are padded to whole tiles before it, and the
gradients are cropped, and summed over what shares the operand, after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ...shapes import Array, Float
from ...tracing.dependence import Kind
from ...tracing.split import along
from .. import base
from ..problem import Inputs, Residue
from .tile_sizes import TileSizes

# --- before the kernels ---------------------------------------------------------------------------


def padded(array: Array, lengths: dict[int, int], value: float = 0) -> Array:
    """An array whose axes, those in `lengths`, are grown to these lengths with a value."""
    widths = [(0, lengths.get(axis, n) - n) for axis, n in enumerate(array.shape)]
    if not any(after for _, after in widths):
        return array
    return jnp.pad(array, widths, constant_values=jnp.asarray(value, array.dtype))


def padded_operand(sizes: TileSizes, kind: Kind, array: Array) -> Array:
    """An operand for whole tiles. Padding repeats the last values, which a score can compute with.

    Args:
      sizes: of the problem and its tiles.
      kind, array: the operand, `[B|1, K|1, G|1, ...]`.
    """
    after_q, after_k = sizes.Tp - sizes.T, sizes.Sp - sizes.S
    # Distances `q - k` begin with the last key.
    ends = along(kind, (0, after_q), (0, after_k), (after_k, after_q))
    widths = [(0, 0)] * 3 + list(ends)
    widths += [(0, 0)] * (array.ndim - len(widths))
    return jnp.pad(array, widths, mode="edge") if any(map(any, widths)) else array


def padded_operands(
    sizes: TileSizes, kinds: Sequence[Kind], arrays: Sequence[Array]
) -> tuple[Array, ...]:
    """All operands of a residue for whole tiles; see `padded_operand`."""
    pairs = zip(kinds, arrays, strict=True)
    return tuple(padded_operand(sizes, kind, array) for kind, array in pairs)


def head_index(extents: Sequence[int], *at: Any) -> tuple[Any, ...]:
    """Where the part of a batch row and head is in an array: at 0 along axes of extent 1."""
    leading = zip(extents[: len(at)], at, strict=True)
    return tuple(0 if extent == 1 else n for extent, n in leading)


# --- operands that learn --------------------------------------------------------------------------


def learned(score: Residue | None) -> tuple[int, ...]:
    """Which operands of a score have gradients: those of floats."""
    if score is None:
        return ()
    types = [score.program.types[ref].dtype for ref in score.program.inputs[1:]]
    return tuple(n for n, dtype in enumerate(types) if jnp.issubdtype(dtype, jnp.floating))


def replaced(parts: Sequence[Any], which: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The parts of operands, with `values` in the places `which`."""
    found = list(parts)
    for n, value in zip(which, values, strict=True):
        found[n] = value
    return found


def cropped_gradient(sizes: TileSizes, kind: Kind, array: Array) -> Array:
    """The gradient of an operand without the padding of `padded_operand`."""
    before = sizes.Sp - sizes.S
    distances = slice(before, before + sizes.T + sizes.S - 1)
    return array[(..., *along(kind, slice(sizes.T), slice(sizes.S), distances))]


def summed_gradient(array: Array, operand: Array, groups: int) -> Array:
    """A gradient `[B, K, G, ...]` summed over the batch rows and heads that share an operand.

    Args:
      array: the gradient, in the dtype of accumulation; extents may be the operand's already.
      operand: what it is the gradient of, `[B|1, K|1, G|1, ...]`.
      groups: an operand that the batch rows share gets one gradient for each of this number of
        equal groups of rows.
    """
    extents = (groups if operand.shape[0] == 1 else array.shape[0], *operand.shape[1:3])
    for axis, extent in enumerate(extents):
        if array.shape[axis] != extent:
            shape = (*array.shape[:axis], extent, -1, *array.shape[axis + 1 :])
            array = array.reshape(shape).sum(axis + 1)
    return array.astype(operand.dtype)


# --- what the backward needs of each query --------------------------------------------------------


def cleaned(x: Inputs, lse: Array, d_out: Array) -> tuple[Inputs, Array]:
    """Inputs and cotangents of a backward with 0 in place of what is not finite.

    In rows whose LSE is not finite, which take no part or get NaN, all is 0.
    """
    good = jnp.isfinite(lse)[..., None]

    def rows(array: Array) -> Array:
        return jnp.where(good, array, jnp.zeros((), array.dtype))

    given = x._replace(query=rows(x.query), key=base.finite(x.key), value=base.finite(x.value))
    return given, rows(d_out)


def backward_rows(
    lse: Float[Array, "B T K G"], delta: Float[Array, "B T K G"]
) -> tuple[Float[Array, "B K G T"], Float[Array, "B K G T"]]:
    """The two numbers of each query that a backward is given; see `Engine`.

    Where the LSE is not finite, `delta` is 0.
    """
    delta = jnp.where(jnp.isfinite(lse), delta, jnp.zeros((), delta.dtype))
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    return far.transpose(0, 2, 3, 1), delta.transpose(0, 2, 3, 1)

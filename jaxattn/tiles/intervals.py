"""Intervals: what a residue can be on a whole tile, from the bounds of its operands.

Every value of the residue is held between two bounds for each tile, by the rules of
`elementwise_rules` and `array_rules`. The result of an operation without a rule may be anything;
`and`, `or` and `select` may still decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..shapes import Array, Int
from ..tracing.hashing import Const, Type
from ..tracing.program import Program, Step
from ..tracing.split import Operand, Split
from .array_rules import REARRANGING
from .elementwise_rules import (
    ELEMENTWISE,
    Interval,
    anything,
    exactly,
    finite,
    greatest_of,
    is_float,
    is_ordered,
    least_of,
)

# Tiles are cut into blocks while there are no more than this many: where bounds of two conditions
# are loose together, smaller blocks decide. 2^17 blocks are interpreted in about a millisecond,
# and it is the number of 256 x 512 tiles of 131072 queries and keys.
_BLOCKS = 2**17

RULES = ELEMENTWISE | REARRANGING


@runtime_checkable
class HasResidue(Protocol):
    """A mask that is split, or its residue alone."""

    @property
    def program(self) -> Program:
        """The residue: a program from one element of each operand."""


def states(
    split: HasResidue, operands: Sequence[Operand], tile_q: int, tile_k: int, T: int, S: int
) -> Int[Array, "B N nq nk"]:
    """What a mask allows in every tile: 0 (EMPTY) nothing, 2 (FULL) everything, 1 (PARTIAL) maybe.

    Args:
      split: the mask, split, or its residue.
      operands: its operands.
      tile_q, tile_k: queries and keys in a tile; the last ones may be ragged.
      T, S: numbers of queries and of keys.

    Returns:
      int8 `[B|1, N|1, ceil(T / tile_q), ceil(S / tile_k)]`; extents are 1 where the mask does not
      depend on `b` or `h`. EMPTY and FULL are certain, PARTIAL may be pessimistic.
    """
    # An array that a program holds as a constant would be reduced by XLA's compiler, in seconds.
    operands = [op._replace(array=lax.optimization_barrier(op.array)) for op in operands]
    cut_q, cut_k = _cuts(split, operands, tile_q, tile_k, T, S)
    block_q, block_k = tile_q // cut_q, tile_k // cut_k
    bounds = [bounds_of(op, block_q, block_k, T, S) for op in operands]
    some, all_ = interpret(split, bounds)[::-1]
    shape = (-(-T // block_q), -(-S // block_k))

    def tiles(flags: Any, reduce: Any) -> Any:
        flags = jnp.broadcast_to(flags, (*flags.shape[:2], *shape))
        return merged(merged(flags, cut_q, 2, reduce), cut_k, 3, reduce)

    return tiles(some, jnp.any).astype(jnp.int8) + tiles(all_, jnp.all).astype(jnp.int8)


def unruled(split: Split[Any]) -> tuple[str, ...]:
    """The operations of a residue that have no rule, by name: they make tiles PARTIAL."""
    names = (step.prim.name for step in split.program.steps)
    return tuple(dict.fromkeys(name for name in names if name not in RULES))


def interpret(split: HasResidue, bounds: Sequence[Interval | None]) -> Interval:
    """The residue on intervals: bounds of its result from bounds of its operands."""
    program = split.program
    values: dict[Any, Interval | None] = dict(zip(program.inputs, bounds, strict=True))

    def read(ref: Any) -> Interval | None:
        return exactly(ref.value) if isinstance(ref, Const) else values[ref]

    for step in program.steps:
        types = [_type(program.types, ref) for ref in step.args]
        outs = [program.types[ref] for ref in step.outs]
        found = _apply(step, [read(ref) for ref in step.args], types, outs[0])
        values.update((ref, anything(out)) for ref, out in zip(step.outs, outs, strict=True))
        if found is not None:
            values[step.outs[0]] = found
    result = read(program.outputs[0])
    assert result is not None
    return result


def _type(types: Sequence[Type], ref: Any) -> Type:
    return Type((), np.asarray(ref.value).dtype) if isinstance(ref, Const) else types[ref]


def _apply(
    step: Step, args: Sequence[Interval | None], types: Sequence[Type], out: Type
) -> Interval | None:
    """The bounds of a step's result, or `None` if nothing is known."""
    rule = RULES.get(step.prim.name)
    if rule is None or any(arg is None for arg in args) or not is_ordered(out.dtype):
        return None
    known = [arg for arg in args if arg is not None]
    if step.prim.name in REARRANGING:
        return rule(out, step.params, types, *known)
    # Elementwise operations may mix scalars with arrays.
    rank = len(out.shape)
    aligned = []
    for arg, type in zip(known, types, strict=True):
        missing = range(4 + len(type.shape), 4 + rank)
        aligned.append(Interval(*(lax.expand_dims(bound, missing) for bound in arg)))
    found = rule(out, step.params, *aligned)
    if found is None or not jnp.issubdtype(out.dtype, jnp.floating):
        return found
    # What might be NaN before might be NaN after, whatever the bounds say.
    dirty = [~(jnp.isfinite(a.lo) & jnp.isfinite(a.hi)) for a in aligned if is_float(a.lo.dtype)]
    dirty = dirty if step.prim.name != "select_n" else []
    return finite(found, *dirty)


# --- bounds of operands ---------------------------------------------------------------------------


def _cuts(
    split: HasResidue, operands: Sequence[Operand], tile_q: int, tile_k: int, T: int, S: int
) -> tuple[int, int]:
    """Into how many blocks a tile is cut along queries and keys."""
    # A batch of unknown size, as in `jax.export`, counts for one row.
    lead = [math.prod(n for n in op.array.shape[:2] if isinstance(n, int)) for op in operands]
    elements = [math.prod(type.shape) for type in _inner(split)]
    budget = _BLOCKS // max([1, *lead]) // max([1, *elements])
    cut = [1, 1]
    while True:
        block = [tile_q // cut[0], tile_k // cut[1]]
        axis = 0 if block[0] >= block[1] else 1
        if block[axis] % 2:
            return cut[0], cut[1]
        block[axis] //= 2
        if -(-T // block[0]) * -(-S // block[1]) > budget:
            return cut[0], cut[1]
        cut[axis] *= 2


def _inner(split: HasResidue) -> list[Type]:
    """The types of what the residue computes."""
    return [split.program.types[ref] for step in split.program.steps for ref in step.outs]


def bounds_of(operand: Operand, block_q: int, block_k: int, T: int, S: int) -> Interval | None:
    """Bounds of an operand on every block, or `None` where it has no order."""
    kind, array = operand
    if not is_ordered(array.dtype):
        return None
    lo = hi = array
    if is_float(array.dtype):
        known = jnp.isfinite(array)
        lo, hi = jnp.where(known, array, -jnp.inf), jnp.where(known, array, jnp.inf)
    if kind == "head":
        return Interval(lax.expand_dims(lo, (2, 3)), lax.expand_dims(hi, (2, 3)))
    if kind == "diagonal":
        found = Interval(
            _diagonal(lo, jnp.minimum, block_q, block_k, T, S),
            _diagonal(hi, jnp.maximum, block_q, block_k, T, S),
        )
    else:
        if kind in ("row", "grid"):
            lo, hi = merged(lo, block_q, 2, least_of), merged(hi, block_q, 2, greatest_of)
        else:
            lo, hi = lax.expand_dims(lo, (2,)), lax.expand_dims(hi, (2,))
        if kind == "row":
            lo, hi = lax.expand_dims(lo, (3,)), lax.expand_dims(hi, (3,))
        else:
            lo, hi = merged(lo, block_k, 3, least_of), merged(hi, block_k, 3, greatest_of)
        found = Interval(lo, hi)
    return finite(found) if is_float(array.dtype) else found


def merged(array: Any, block: int, axis: int, reduce: Any) -> Any:
    """`reduce` over every `block` elements of an axis; a ragged end is filled with its last."""
    n = array.shape[axis]
    count = -(-n // block)
    if count * block != n:
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, count * block - n)
        array = jnp.pad(array, pad, mode="edge")
    if block == 1:
        return array
    shape = (*array.shape[:axis], count, block, *array.shape[axis + 1 :])
    return reduce(array.reshape(shape), axis=axis + 1)


def _diagonal(vector: Any, join: Any, block_q: int, block_k: int, T: int, S: int) -> Any:
    """`join` over the distances that occur in every block.

    The distances of block (i, j) begin after `i * block_q - (j + 1) * block_k` and are
    `block_q + block_k - 1`: all but the first of one piece of g elements, g the greatest common
    divisor, and a fixed number of pieces after it.
    """
    nq, nk = -(-T // block_q), -(-S // block_k)
    g = math.gcd(block_q, block_k)
    before, after = nk * block_k - (S - 1), nq * block_q - T
    padded = jnp.pad(vector, ((0, 0), (0, 0), (before, after)), mode="edge")
    pieces = padded.reshape(*padded.shape[:2], -1, g)
    first = pieces[..., 0]
    reduce = least_of if join is jnp.minimum else greatest_of
    rest = reduce(pieces[..., 1:], axis=3) if g > 1 else None
    window = first if rest is None else join(first, rest)
    width = (block_q + block_k) // g - 1
    reached, total = 0, None
    for bit in range(width.bit_length()):
        if width >> bit & 1:
            part = window[..., reached:]
            n = part.shape[-1]
            total = part if total is None else join(total[..., :n], part)
            reached += 1 << bit
        n = window.shape[-1] - (1 << bit)
        if n > 0:
            window = join(window[..., :n], window[..., (1 << bit) :])
    assert total is not None
    total = total[..., 1:]
    if rest is not None:
        total = join(total, rest[..., : total.shape[-1]])
    starts = np.arange(nq)[:, None] * block_q - (np.arange(nk) + 1) * block_k + nk * block_k
    return jnp.take(total, jnp.asarray(starts // g, jnp.int32), axis=2)

"""Intervals: what a residue can be on a whole tile, from the least and the greatest of its operands.

Every value of the residue is held between two bounds for each tile; a boolean is an interval of
0 and 1, which is Kleene's logic. The law is soundness: a value never leaves its interval.

- Integers: an operation that might wrap around gives the whole range.
- Floats: bounds are finite and rounded outward; where they can't be, the interval is
  (-inf, inf), which stands for anything, NaN included.
- An operation without a rule gives anything; `and`, `or` and `select` may still decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from .program import Const, Step, Type, varying_alike
from .reads import READ
from .shapes import Array, Int
from .split import Operand, Split, pointwise

# Tiles are cut into blocks while there are no more than this many: where bounds of two conditions
# are loose together, smaller blocks decide. 2^17 blocks are interpreted in about a millisecond,
# and it is the number of 256 x 512 tiles of 131072 queries and keys.
_BLOCKS = 2**17


class Interval(NamedTuple):
    """Bounds `[B|1, N|1, nq|1, nk|1, ...]` of a value on every block, both inclusive."""

    lo: Any
    hi: Any


Rule = Callable[..., Interval | None]


def states(
    split: Split, operands: Sequence[Operand], tile_q: int, tile_k: int, T: int, S: int
) -> Int[Array, "B N nq nk"]:
    """What a mask allows in every tile: 0 (EMPTY) nothing, 2 (FULL) everything, 1 (PARTIAL) maybe.

    Args:
      split: the mask, split.
      operands: its operands.
      tile_q, tile_k: queries and keys in a tile; the last ones may be ragged.
      T, S: numbers of queries and of keys.

    Returns:
      int8 `[B|1, N|1, ceil(T / tile_q), ceil(S / tile_k)]`; extents are 1 where the mask does not
      depend on `b` or `h`. EMPTY and FULL are certain, PARTIAL may be pessimistic.
    """
    cut_q, cut_k = _cuts(split, operands, tile_q, tile_k, T, S)
    block_q, block_k = tile_q // cut_q, tile_k // cut_k
    bounds = [_bounds(op, block_q, block_k, T, S) for op in operands]
    some, all_ = interpret(split, bounds)[::-1]
    shape = (-(-T // block_q), -(-S // block_k))

    def tiles(flags: Any, reduce: Any) -> Any:
        flags = jnp.broadcast_to(flags, (*flags.shape[:2], *shape))
        return merged(merged(flags, cut_q, 2, reduce), cut_k, 3, reduce)

    return tiles(some, jnp.any).astype(jnp.int8) + tiles(all_, jnp.all).astype(jnp.int8)


def unruled(split: Split) -> tuple[str, ...]:
    """The operations of a residue that have no rule, by name: they make tiles PARTIAL."""
    names = (step.prim.name for step in split.program.steps)
    return tuple(dict.fromkeys(name for name in names if name not in RULES))


def interpret(split: Split, bounds: Sequence[Interval]) -> Interval:
    """The residue on intervals: bounds of its result from bounds of its operands."""
    program = split.program
    values: dict[Any, Interval | None] = dict(zip(program.inputs, bounds, strict=True))

    def read(ref: Any) -> Interval | None:
        return _exactly(ref.value) if isinstance(ref, Const) else values[ref]

    for step in program.steps:
        types = [_type(program.types, ref) for ref in step.args]
        outs = [program.types[ref] for ref in step.outs]
        found = _apply(step, [read(ref) for ref in step.args], types, outs[0])
        values.update((ref, _anything(out)) for ref, out in zip(step.outs, outs, strict=True))
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
    if rule is None or any(arg is None for arg in args) or not _ordered(out.dtype):
        return None
    known = [arg for arg in args if arg is not None]
    if rule in _SHAPED:
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
    dirty = [~(jnp.isfinite(a.lo) & jnp.isfinite(a.hi)) for a in aligned if _float(a.lo.dtype)]
    dirty = dirty if step.prim.name != "select_n" else []
    return _finite(found, *dirty)


# --- bounds of operands ---------------------------------------------------------------------------


def _cuts(
    split: Split, operands: Sequence[Operand], tile_q: int, tile_k: int, T: int, S: int
) -> tuple[int, int]:
    """Into how many blocks a tile is cut along queries and keys."""
    lead = [math.prod(op.array.shape[:2]) for op in operands]
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


def _inner(split: Split) -> list[Type]:
    """The types of what the residue computes."""
    return [split.program.types[ref] for step in split.program.steps for ref in step.outs]


def _bounds(operand: Operand, block_q: int, block_k: int, T: int, S: int) -> Interval | None:
    """Bounds of an operand on every block, or `None` where it has no order."""
    kind, array = operand
    if not _ordered(array.dtype):
        return None
    lo = hi = array
    if _float(array.dtype):
        finite = jnp.isfinite(array)
        lo, hi = jnp.where(finite, array, -jnp.inf), jnp.where(finite, array, jnp.inf)
    if kind == "head":
        return Interval(lax.expand_dims(lo, (2, 3)), lax.expand_dims(hi, (2, 3)))
    if kind == "diagonal":
        found = Interval(
            _diagonal(lo, jnp.minimum, block_q, block_k, T, S),
            _diagonal(hi, jnp.maximum, block_q, block_k, T, S),
        )
    else:
        if kind in ("row", "grid"):
            lo, hi = merged(lo, block_q, 2, _least), merged(hi, block_q, 2, _greatest)
        else:
            lo, hi = lax.expand_dims(lo, (2,)), lax.expand_dims(hi, (2,))
        if kind == "row":
            lo, hi = lax.expand_dims(lo, (3,)), lax.expand_dims(hi, (3,))
        else:
            lo, hi = merged(lo, block_k, 3, _least), merged(hi, block_k, 3, _greatest)
        found = Interval(lo, hi)
    return _finite(found) if _float(array.dtype) else found


def _least(array: Any, axis: int) -> Any:
    return array.all(axis) if array.dtype == jnp.bool_ else array.min(axis)


def _greatest(array: Any, axis: int) -> Any:
    return array.any(axis) if array.dtype == jnp.bool_ else array.max(axis)


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
    reduce = _least if join is jnp.minimum else _greatest
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


# --- bounds by dtype ------------------------------------------------------------------------------


def _float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _integer(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))


def _unsigned(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.unsignedinteger))


def _ordered(dtype: Any) -> bool:
    return _float(dtype) or _integer(dtype) or dtype == np.bool_


def _range(dtype: Any) -> tuple[Any, Any]:
    """The least and the greatest that a dtype holds."""
    if dtype == np.bool_:
        return np.bool_(False), np.bool_(True)
    if _float(dtype):
        return np.asarray(-np.inf, dtype), np.asarray(np.inf, dtype)
    return np.asarray(jnp.iinfo(dtype).min, dtype), np.asarray(jnp.iinfo(dtype).max, dtype)


def _anything(type: Type) -> Interval | None:
    if not _ordered(type.dtype):
        return None
    shape = (1,) * (4 + len(type.shape))
    return Interval(*(jnp.full(shape, bound, type.dtype) for bound in _range(type.dtype)))


def _exactly(value: Any) -> Interval | None:
    array = np.asarray(value)
    if not _ordered(array.dtype):
        return None
    if _float(array.dtype) and not np.isfinite(array):
        return _anything(Type((), array.dtype))
    bound = jnp.asarray(array)[None, None, None, None]
    return Interval(bound, bound)


def _unless(bad: Any, found: Interval, dtype: Any) -> Interval:
    """`found`, or anything where `bad`."""
    least, most = _range(dtype)
    return Interval(jnp.where(bad, least, found.lo), jnp.where(bad, most, found.hi))


def _finite(found: Interval, *dirty: Any) -> Interval:
    bad = ~(jnp.isfinite(found.lo) & jnp.isfinite(found.hi))
    for flag in dirty:
        bad = bad | flag
    return _unless(bad, found, found.lo.dtype)


def _outward(found: Interval, ulps: float = 4.0, smallest: float = 1.0) -> Interval:
    """Floats, rounded outward by more than they and what they bound may have been rounded."""
    info = jnp.finfo(found.lo.dtype)
    step = np.asarray(ulps * float(info.eps), found.lo.dtype)
    least = np.asarray(smallest * float(info.tiny), found.lo.dtype)
    return Interval(
        found.lo - (jnp.abs(found.lo) * step + least), found.hi + (jnp.abs(found.hi) * step + least)
    )


def _corners(op: Any, a: Interval, b: Interval) -> Interval:
    ends = [op(x, y) for x in a for y in b]
    return Interval(
        jnp.minimum(jnp.minimum(ends[0], ends[1]), jnp.minimum(ends[2], ends[3])),
        jnp.maximum(jnp.maximum(ends[0], ends[1]), jnp.maximum(ends[2], ends[3])),
    )


def _magnitude(interval: Interval) -> Any:
    """The greatest absolute value, as a float."""
    wide = jnp.float64 if interval.lo.dtype.itemsize == 8 else jnp.float32
    return jnp.maximum(jnp.abs(interval.lo.astype(wide)), jnp.abs(interval.hi.astype(wide)))


def _too_large(magnitude: Any, dtype: Any) -> Any:
    # Floats round: stay below the greatest integer by more than they may be off.
    return magnitude > float(jnp.iinfo(dtype).max) * (1 - 2.0**-20)


# --- rules: arithmetic ----------------------------------------------------------------------------


def _add(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    found = Interval(a.lo + b.lo, a.hi + b.hi)
    if _float(out.dtype):
        return _outward(found)
    if _unsigned(out.dtype):
        return _unless(found.hi < a.hi, found, out.dtype)
    wraps = [((x ^ s) & (y ^ s)) < 0 for x, y, s in zip(a, b, found, strict=True)]
    return _unless(wraps[0] | wraps[1], found, out.dtype)


def _sub(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    b = Interval(b.hi, b.lo)
    found = Interval(*(x - y for x, y in zip(a, b, strict=True)))
    if _float(out.dtype):
        return _outward(found)
    if _unsigned(out.dtype):
        return _unless(a.lo < b.lo, found, out.dtype)
    wraps = [((x ^ y) & (x ^ s)) < 0 for x, y, s in zip(a, b, found, strict=True)]
    return _unless(wraps[0] | wraps[1], found, out.dtype)


def _mul(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    found = _corners(jnp.multiply, a, b)
    if _float(out.dtype):
        return _outward(found)
    return _unless(_too_large(_magnitude(a) * _magnitude(b), out.dtype), found, out.dtype)


def _neg(out: Type, params: Any, a: Interval) -> Interval:
    found = Interval(-a.hi, -a.lo)
    if _float(out.dtype):
        return found
    least = _range(out.dtype)[0]
    # Unsigned, -0 is 0 and all others wrap around in order.
    wraps = (a.lo == 0) & (a.hi != 0) if _unsigned(out.dtype) else a.lo == least
    return _unless(wraps, found, out.dtype)


def _abs(out: Type, params: Any, a: Interval) -> Interval:
    if _unsigned(out.dtype):
        return a
    zero = (a.lo <= 0) & (a.hi >= 0)
    ends = jnp.abs(a.lo), jnp.abs(a.hi)
    least = jnp.where(zero, np.zeros((), out.dtype), jnp.minimum(*ends))
    found = Interval(least, jnp.maximum(*ends))
    return found if _float(out.dtype) else _unless(a.lo == _range(out.dtype)[0], found, out.dtype)


def _div(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    zero = (b.lo <= 0) & (b.hi >= 0)
    one = np.ones((), out.dtype)
    safe = Interval(jnp.where(zero, one, b.lo), jnp.where(zero, one, b.hi))
    if _float(out.dtype):
        return _unless(zero, _finite(_outward(_corners(lax.div, a, safe))), out.dtype)
    if not _unsigned(out.dtype):
        zero = zero | ((a.lo == _range(out.dtype)[0]) & (b.lo <= -1) & (b.hi >= -1))
        safe = Interval(jnp.where(zero, one, b.lo), jnp.where(zero, one, b.hi))
    return _unless(zero, _corners(lax.div, a, safe), out.dtype)


def _rem(out: Type, params: Any, a: Interval, b: Interval) -> Interval | None:
    if _float(out.dtype):
        return None
    least, one = _range(out.dtype)[0], np.ones((), out.dtype)
    bad = (b.lo <= 0) & (b.hi >= 0)
    if not _unsigned(out.dtype):
        bad = bad | (b.lo == least) | (a.lo == least)
    by = Interval(jnp.where(bad, one, b.lo), jnp.where(bad, one, b.hi))
    most = jnp.maximum(jnp.abs(by.lo), jnp.abs(by.hi)) - one
    # The sign is the dividend's, and |a rem b| is at most |a| and below |b|.
    zero = np.zeros((), out.dtype)
    hi = jnp.where(a.hi <= 0, zero, jnp.minimum(most, a.hi))
    lo = jnp.where(a.lo >= 0, zero, jnp.maximum(zero - most, a.lo))
    # Between two multiples of one divisor the remainder only grows.
    alike = (by.lo == by.hi) & (lax.div(*_same(a.lo, by.lo)) == lax.div(*_same(a.hi, by.lo)))
    lo = jnp.where(alike, lax.rem(*_same(a.lo, by.lo)), lo)
    hi = jnp.where(alike, lax.rem(*_same(a.hi, by.lo)), hi)
    return _unless(bad, Interval(lo, hi), out.dtype)


def _same(x: Any, y: Any) -> tuple[Any, Any]:
    x, y = jnp.broadcast_arrays(x, y)
    return x, y


def _integer_pow(out: Type, params: Any, a: Interval) -> Interval | None:
    power = params.get("y", 2)
    if power < 1:
        return None
    base = _abs(out, params, a) if power % 2 == 0 else a
    found = Interval(lax.integer_pow(base.lo, power), lax.integer_pow(base.hi, power))
    if _float(out.dtype):
        return _outward(found, 4.0 * power)
    bad = _too_large(_magnitude(a) ** power, out.dtype)
    if power % 2 == 0 and not _unsigned(out.dtype):
        bad = bad | (a.lo == _range(out.dtype)[0])
    return _unless(bad, found, out.dtype)


def _monotone(fn: Any, ulps: float = 32.0, falling: bool = False) -> Rule:
    """A function that only rises (or falls), accurate to a few units in the last place."""

    def rule(out: Type, params: Any, a: Interval) -> Interval:
        lo, hi = fn(a.lo), fn(a.hi)
        found = Interval(hi, lo) if falling else Interval(lo, hi)
        # Near 0 an error relative to 1 is allowed for: log(1 + x) is a difference.
        eps = float(jnp.finfo(out.dtype).eps)
        return _outward(found, ulps, ulps * eps / float(jnp.finfo(out.dtype).tiny)) if ulps else found

    return rule


def _sign(out: Type, params: Any, a: Interval) -> Interval:
    return Interval(jnp.sign(a.lo), jnp.sign(a.hi))


def _shift(fn: Any) -> Rule:
    def rule(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
        bits = jnp.iinfo(out.dtype).bits
        bad = (b.lo < 0) | (b.hi >= bits)
        by = Interval(*(jnp.where(bad, np.zeros((), out.dtype), bound) for bound in b))
        if fn is lax.shift_left:
            growth = jnp.exp2(by.hi.astype(_magnitude(a).dtype))
            bad = bad | _too_large(_magnitude(a) * growth, out.dtype)
        elif fn is lax.shift_right_logical and not _unsigned(out.dtype):
            bad = bad | (a.lo < 0)
        return _unless(bad, _corners(lambda x, y: fn(*_same(x, y)), a, by), out.dtype)

    return rule


# --- rules: comparisons and logic -------------------------------------------------------------------


def _less(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    return Interval(a.hi < b.lo, a.lo < b.hi)


def _less_equal(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    return Interval(a.hi <= b.lo, a.lo <= b.hi)


def _equal(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    alike = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)
    return Interval(alike, (a.lo <= b.hi) & (b.lo <= a.hi))


def _not(out: Type, params: Any, a: Interval) -> Interval:
    return Interval(~a.hi, ~a.lo)


def _swapped(rule: Rule) -> Rule:
    return lambda out, params, a, b: rule(out, params, b, a)


def _not_equal(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    return _not(out, params, _equal(out, params, a, b))


def _bitwise(fn: Any, within: Callable[[Interval, Interval], Interval]) -> Rule:
    """Bits of integers: exact for single values, else `within` for those that are not negative."""

    def rule(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
        if out.dtype == np.bool_:
            if fn is not jnp.bitwise_xor:
                return Interval(fn(a.lo, b.lo), fn(a.hi, b.hi))
            return _not_equal(out, params, a, b)
        found = within(a, b)
        alike = (a.lo == a.hi) & (b.lo == b.hi)
        exact = fn(a.lo, b.lo)
        bad = ((a.lo < 0) | (b.lo < 0)) & ~alike
        chosen = Interval(jnp.where(alike, exact, found.lo), jnp.where(alike, exact, found.hi))
        return _unless(bad, chosen, out.dtype)

    return rule


def _ones(bound: Any) -> Any:
    """The least number of the form 111...1 in binary that is not below."""
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < jnp.iinfo(bound.dtype).bits:
            bound = bound | (bound >> shift)
    return bound


def _max(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    return Interval(jnp.maximum(a.lo, b.lo), jnp.maximum(a.hi, b.hi))


def _min(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    return Interval(jnp.minimum(a.lo, b.lo), jnp.minimum(a.hi, b.hi))


def _clamp(out: Type, params: Any, least: Interval, a: Interval, most: Interval) -> Interval:
    return _min(out, params, _max(out, params, a, least), most)


def _select(out: Type, params: Any, which: Interval, *cases: Interval) -> Interval:
    least, most = _range(out.dtype)
    lo, hi = most, least
    for i, case in enumerate(cases):
        if which.lo.dtype == np.bool_:
            possible = which.hi if i else ~which.lo
        else:
            possible = (which.lo <= i) & (which.hi >= i)
        lo = jnp.where(possible, jnp.minimum(lo, case.lo), lo)
        hi = jnp.where(possible, jnp.maximum(hi, case.hi), hi)
    if which.lo.dtype == np.bool_:
        return Interval(lo, hi)
    return _unless((which.lo < 0) | (which.hi >= len(cases)), Interval(lo, hi), out.dtype)


def _convert(out: Type, params: Any, a: Interval) -> Interval:
    old, new = a.lo.dtype, out.dtype
    if new == np.bool_:
        zero = jnp.zeros((1, 1, 1, 1), old)
        return _not_equal(out, params, a, Interval(zero, zero))
    if _float(new):
        # Rounding keeps the order; but a narrowing may be left out by the compiler.
        narrows = _float(old) and jnp.finfo(new).bits < jnp.finfo(old).bits
        found = Interval(a.lo.astype(new), a.hi.astype(new))
        return _outward(found) if narrows else found
    if old == np.bool_:
        return Interval(a.lo.astype(new), a.hi.astype(new))
    if _float(old):
        # Exact powers of two, so that the comparison is exact; the fraction is cut off.
        bits = jnp.iinfo(new).bits - (not _unsigned(new))
        least = -(2.0**bits) if not _unsigned(new) else 0.0
        fits = (a.lo >= least) & (a.hi < 2.0**bits)
        safe = [jnp.where(fits, bound, np.zeros((), old)).astype(new) for bound in a]
        return _unless(~fits, Interval(*safe), new)
    found = Interval(a.lo.astype(new), a.hi.astype(new))
    back = [bound.astype(old) for bound in found]
    fits = (back[0] == a.lo) & (back[1] == a.hi)
    fits = fits & ((found.lo < 0) == (a.lo < 0)) & ((found.hi < 0) == (a.hi < 0))
    return _unless(~fits, found, new)


def _is_finite(out: Type, params: Any, a: Interval) -> Interval:
    known = jnp.isfinite(a.lo) & jnp.isfinite(a.hi)
    return Interval(known, jnp.ones_like(known))


def _identity(out: Type, params: Any, a: Interval) -> Interval:
    return a


# --- rules: shapes ----------------------------------------------------------------------------------


def _whole(interval: Interval, type: Type) -> Interval:
    """Bounds with every axis of the value in full."""
    return Interval(*(jnp.broadcast_to(x, (*x.shape[:4], *type.shape)) for x in interval))


def _lifted(fn: Callable[..., Any]) -> Rule:
    """An operation on the shape of a value, for bounds, which have four axes before it."""

    def rule(out: Type, params: Any, types: Sequence[Type], *args: Interval) -> Interval:
        whole = [_whole(arg, type) for arg, type in zip(args, types, strict=True)]
        lead = [np.broadcast_shapes(*(arg[i].shape[:4] for arg in whole)) for i in (0, 1)]
        bounds = [
            fn(out, params, [jnp.broadcast_to(arg[i], (*lead[i], *arg[i].shape[4:])) for arg in whole])
            for i in (0, 1)
        ]
        return Interval(*bounds)

    return rule


def _broadcast(out: Type, params: Any, arrays: Any) -> Any:
    (x,) = arrays
    axes = (0, 1, 2, 3, *(4 + axis for axis in params["broadcast_dimensions"]))
    return lax.broadcast_in_dim(x, (*x.shape[:4], *out.shape), axes)


def _reshape(out: Type, params: Any, arrays: Any) -> Any:
    (x,) = arrays
    return x.reshape((*x.shape[:4], *out.shape))


def _concatenate(out: Type, params: Any, arrays: Any) -> Any:
    return jnp.concatenate(arrays, 4 + params["dimension"])


def _stack(out: Type, params: Any, arrays: Any) -> Any:
    return jnp.stack(arrays, 4 + params["axis"])


def _reduced(reduce: Any) -> Callable[..., Any]:
    return lambda out, params, arrays: reduce(arrays[0], tuple(4 + a for a in params["axes"]))


def _read(out: Type, params: Any, types: Sequence[Type], *args: Interval) -> Interval | None:
    """The least and the greatest of an array where its indices can be."""
    table, *index = args
    if table.lo.shape[2:4] != (1, 1):
        return None
    table = _whole(table, types[0])
    moving = [tuple(int(n > 1) for n in np.broadcast_shapes(*(x.shape[2:4] for x in at))) for at in index]
    along = [where for where in moving if where != (0, 0)]
    if (1, 1) in along or len(set(along)) < len(along):
        return _read_points(out, params, types, table, index)
    bounds = Interval(*(x[:, :, 0, 0] for x in table))
    shape = bounds.lo.shape[2:]
    for axis, at in zip(params["axes"], index, strict=True):
        last = np.asarray(shape[axis] - 1, at.lo.dtype)
        least = np.zeros((), at.lo.dtype)
        at = Interval(*(jnp.clip(x, least, last).astype(jnp.int32) for x in at))
        at = Interval(*(x.reshape(*x.shape[:2], -1) for x in at))
        bounds = _range_along(bounds, at, 2 + axis)
    order = {where: 2 + axis for axis, where in zip(params["axes"], moving, strict=True)}
    dims = [order.get((1, 0)), order.get((0, 1))]
    kept = [2 + axis for axis in range(len(shape)) if axis not in params["axes"]]
    flat = [2 + a for a, where in zip(params["axes"], moving, strict=True) if where == (0, 0)]

    def arrange(x: Any) -> Any:
        present = [d for d in dims if d is not None]
        x = jnp.transpose(x, (0, 1, *present, *kept, *flat))
        x = x.reshape(x.shape[: x.ndim - len(flat)])
        return lax.expand_dims(x, [2 + i for i, d in enumerate(dims) if d is None])

    return Interval(*map(arrange, bounds))


def _read_points(
    out: Type, params: Any, types: Sequence[Type], table: Interval, index: Sequence[Interval]
) -> Interval:
    """What is read at indices that are known exactly; anything elsewhere."""
    ranks = [len(types[0].shape), *(0 for _ in index)]
    read = partial(READ.bind, **params)
    found = [pointwise(read, [x, *(at.lo for at in index)], ranks) for x in table]
    inexact = reduce(jnp.logical_or, (at.lo != at.hi for at in index))
    inexact = lax.expand_dims(inexact, range(4, 4 + len(out.shape)))
    return _unless(inexact, Interval(found[0], found[1]), out.dtype)


def _range_along(table: Interval, at: Interval, axis: int) -> Interval:
    """The least and greatest of `table [B|1, N|1, ...]` from `at.lo` to `at.hi [B|1, N|1, L]`."""
    lo, hi, first, last = varying_alike([*table, *at])
    lo, hi = (jnp.moveaxis(x, axis, 2) for x in (lo, hi))
    lead = np.broadcast_shapes(lo.shape[:2], first.shape[:2])
    first, last = (jnp.broadcast_to(x, (*lead, x.shape[2])) for x in (first, last))
    lo, hi = (jnp.broadcast_to(x, (*lead, *x.shape[2:])) for x in (lo, hi))
    longest = (last - first).max() + 1
    # One step an element costs least where a few blocks of a table meet a tile; doubling is for
    # the rest.
    args = (lo, hi, first, last, longest)
    least, greatest = lax.cond(longest <= 8, _one_by_one, _by_doubling, *args)
    return Interval(jnp.moveaxis(least, 2, axis), jnp.moveaxis(greatest, 2, axis))


def _pick(x: Any, i: Any) -> Any:
    return jnp.take_along_axis(x, lax.expand_dims(i, range(3, x.ndim)), 2)


def _one_by_one(lo: Any, hi: Any, first: Any, last: Any, longest: Any) -> tuple[Any, Any]:
    def extend(n: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
        i = jnp.minimum(first + n, last)
        return jnp.minimum(found[0], _pick(lo, i)), jnp.maximum(found[1], _pick(hi, i))

    return lax.fori_loop(1, longest, extend, (_pick(lo, first), _pick(hi, first)))


def _by_doubling(lo: Any, hi: Any, first: Any, last: Any, longest: Any) -> tuple[Any, Any]:
    """A range of 2^l to 2^(l+1) - 1 elements is covered by two of 2^l."""
    level = 31 - lax.clz(last - first + 1)

    def double(l: Any, state: Any) -> Any:
        lo, hi, least, greatest = state
        # What comes round at the end is never looked up.
        lo = jnp.minimum(lo, jnp.roll(lo, -(1 << (l - 1)), 2))
        hi = jnp.maximum(hi, jnp.roll(hi, -(1 << (l - 1)), 2))
        now = lax.expand_dims(level == l, range(3, lo.ndim))
        end = jnp.maximum(last - (1 << l) + 1, 0)
        least = jnp.where(now, jnp.minimum(_pick(lo, first), _pick(lo, end)), least)
        greatest = jnp.where(now, jnp.maximum(_pick(hi, first), _pick(hi, end)), greatest)
        return lo, hi, least, greatest

    start = (lo, hi, _pick(lo, first), _pick(hi, first))
    return lax.fori_loop(1, level.max() + 1, double, start)[2:]


_SHAPED: set[Rule] = set()


def _shaped(fn: Callable[..., Any]) -> Rule:
    rule = _lifted(fn)
    _SHAPED.add(rule)
    return rule


RULES: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "neg": _neg,
    "abs": _abs,
    "div": _div,
    "rem": _rem,
    "integer_pow": _integer_pow,
    "square": _integer_pow,
    "sign": _sign,
    "floor": _monotone(jnp.floor, 0),
    "ceil": _monotone(jnp.ceil, 0),
    "exp": _monotone(jnp.exp),
    "exp2": _monotone(jnp.exp2),
    "expm1": _monotone(jnp.expm1),
    "log": _monotone(jnp.log),
    "log1p": _monotone(jnp.log1p),
    "sqrt": _monotone(jnp.sqrt),
    "tanh": _monotone(jnp.tanh),
    "logistic": _monotone(lax.logistic),
    "shift_left": _shift(lax.shift_left),
    "shift_right_arithmetic": _shift(lax.shift_right_arithmetic),
    "shift_right_logical": _shift(lax.shift_right_logical),
    "lt": _less,
    "le": _less_equal,
    "gt": _swapped(_less),
    "ge": _swapped(_less_equal),
    "eq": _equal,
    "ne": _not_equal,
    "not": _not,
    "and": _bitwise(jnp.bitwise_and, lambda a, b: Interval(a.lo * 0, jnp.minimum(a.hi, b.hi))),
    "or": _bitwise(
        jnp.bitwise_or, lambda a, b: Interval(jnp.maximum(a.lo, b.lo), _ones(a.hi | b.hi))
    ),
    "xor": _bitwise(jnp.bitwise_xor, lambda a, b: Interval(a.lo * 0, _ones(a.hi | b.hi))),
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "select_n": _select,
    "convert_element_type": _convert,
    "is_finite": _is_finite,
    "copy": _identity,
    "stop_gradient": _identity,
    "broadcast_in_dim": _shaped(_broadcast),
    "reshape": _shaped(_reshape),
    "squeeze": _shaped(_reshape),
    "concatenate": _shaped(_concatenate),
    "stack": _shaped(_stack),
    "reduce_or": _shaped(_reduced(lambda x, axes: jnp.any(x, axes))),
    "reduce_and": _shaped(_reduced(lambda x, axes: jnp.all(x, axes))),
    "reduce_max": _shaped(_reduced(lambda x, axes: jnp.max(x, axes))),
    "reduce_min": _shaped(_reduced(lambda x, axes: jnp.min(x, axes))),
    "read": _read,
}
_SHAPED.add(_read)

"""Rules: the bounds of an elementwise operation's result, from the bounds of its arguments.

Every value has two bounds, and is never outside of them:

- Integers: an operation that might wrap around gives the whole range of the dtype.
- Floats: bounds are finite and rounded outward; where they can't be, they are (-inf, inf), which
  stands for anything, NaN included.
- Booleans are integers 0 and 1, which is Kleene's logic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..tracing.hashing import Type


class Interval(NamedTuple):
    """Bounds `[B|1, N|1, nq|1, nk|1, ...]` of a value on every block, both inclusive."""

    lo: Any
    hi: Any


Rule = Callable[..., Interval | None]


def least_of(array: Any, axis: int) -> Any:
    """The least along an axis; for booleans, whether all are True."""
    return array.all(axis) if array.dtype == jnp.bool_ else array.min(axis)


def greatest_of(array: Any, axis: int) -> Any:
    """The greatest along an axis; for booleans, whether any is True."""
    return array.any(axis) if array.dtype == jnp.bool_ else array.max(axis)


# --- bounds by dtype ------------------------------------------------------------------------------


def is_float(dtype: Any) -> bool:
    """Whether a dtype is of floats."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def is_integer(dtype: Any) -> bool:
    """Whether a dtype is of integers, signed or not."""
    return bool(jnp.issubdtype(dtype, jnp.integer))


def is_unsigned(dtype: Any) -> bool:
    """Whether a dtype is of unsigned integers."""
    return bool(jnp.issubdtype(dtype, jnp.unsignedinteger))


def is_ordered(dtype: Any) -> bool:
    """Whether values of a dtype can be held between bounds."""
    return is_float(dtype) or is_integer(dtype) or dtype == np.bool_


def range_of(dtype: Any) -> tuple[Any, Any]:
    """The least and the greatest that a dtype holds."""
    if dtype == np.bool_:
        return np.bool_(False), np.bool_(True)
    if is_float(dtype):
        return np.asarray(-np.inf, dtype), np.asarray(np.inf, dtype)
    return np.asarray(jnp.iinfo(dtype).min, dtype), np.asarray(jnp.iinfo(dtype).max, dtype)


def anything(type: Type) -> Interval | None:
    """Bounds of a value of which only its type is known; None if it has no order."""
    if not is_ordered(type.dtype):
        return None
    shape = (1,) * (4 + len(type.shape))
    return Interval(*(jnp.full(shape, bound, type.dtype) for bound in range_of(type.dtype)))


def exactly(value: Any) -> Interval | None:
    """Bounds of a constant: itself, twice; anything for NaN and infinities."""
    array = np.asarray(value)
    if not is_ordered(array.dtype):
        return None
    if is_float(array.dtype) and not np.isfinite(array):
        return anything(Type((), array.dtype))
    bound = jnp.asarray(array)[None, None, None, None]
    return Interval(bound, bound)


def unless(bad: Any, found: Interval, dtype: Any) -> Interval:
    """`found`, or anything where `bad`."""
    least, most = range_of(dtype)
    return Interval(jnp.where(bad, least, found.lo), jnp.where(bad, most, found.hi))


def finite(found: Interval, *dirty: Any) -> Interval:
    """Bounds that hold only where they are finite and no flag is raised; anything elsewhere."""
    bad = ~(jnp.isfinite(found.lo) & jnp.isfinite(found.hi))
    for flag in dirty:
        bad = bad | flag
    return unless(bad, found, found.lo.dtype)


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


# --- arithmetic ----------------------------------------------------------------------------


def _add(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    found = Interval(a.lo + b.lo, a.hi + b.hi)
    if is_float(out.dtype):
        return _outward(found)
    if is_unsigned(out.dtype):
        return unless(found.hi < a.hi, found, out.dtype)
    wraps = [((x ^ s) & (y ^ s)) < 0 for x, y, s in zip(a, b, found, strict=True)]
    return unless(wraps[0] | wraps[1], found, out.dtype)


def _sub(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    b = Interval(b.hi, b.lo)
    found = Interval(*(x - y for x, y in zip(a, b, strict=True)))
    if is_float(out.dtype):
        return _outward(found)
    if is_unsigned(out.dtype):
        return unless(a.lo < b.lo, found, out.dtype)
    wraps = [((x ^ y) & (x ^ s)) < 0 for x, y, s in zip(a, b, found, strict=True)]
    return unless(wraps[0] | wraps[1], found, out.dtype)


def _mul(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    found = _corners(jnp.multiply, a, b)
    if is_float(out.dtype):
        return _outward(found)
    return unless(_too_large(_magnitude(a) * _magnitude(b), out.dtype), found, out.dtype)


def _neg(out: Type, params: Any, a: Interval) -> Interval:
    found = Interval(-a.hi, -a.lo)
    if is_float(out.dtype):
        return found
    least = range_of(out.dtype)[0]
    # Unsigned, -0 is 0 and all others wrap around in order.
    wraps = (a.lo == 0) & (a.hi != 0) if is_unsigned(out.dtype) else a.lo == least
    return unless(wraps, found, out.dtype)


def _abs(out: Type, params: Any, a: Interval) -> Interval:
    if is_unsigned(out.dtype):
        return a
    zero = (a.lo <= 0) & (a.hi >= 0)
    ends = jnp.abs(a.lo), jnp.abs(a.hi)
    least = jnp.where(zero, np.zeros((), out.dtype), jnp.minimum(*ends))
    found = Interval(least, jnp.maximum(*ends))
    return (
        found if is_float(out.dtype) else unless(a.lo == range_of(out.dtype)[0], found, out.dtype)
    )


def _div(out: Type, params: Any, a: Interval, b: Interval) -> Interval:
    zero = (b.lo <= 0) & (b.hi >= 0)
    one = np.ones((), out.dtype)
    safe = Interval(jnp.where(zero, one, b.lo), jnp.where(zero, one, b.hi))
    if is_float(out.dtype):
        return unless(zero, finite(_outward(_corners(lax.div, a, safe))), out.dtype)
    if not is_unsigned(out.dtype):
        zero = zero | ((a.lo == range_of(out.dtype)[0]) & (b.lo <= -1) & (b.hi >= -1))
        safe = Interval(jnp.where(zero, one, b.lo), jnp.where(zero, one, b.hi))
    return unless(zero, _corners(lax.div, a, safe), out.dtype)


def _rem(out: Type, params: Any, a: Interval, b: Interval) -> Interval | None:
    if is_float(out.dtype):
        return None
    least, one = range_of(out.dtype)[0], np.ones((), out.dtype)
    bad = (b.lo <= 0) & (b.hi >= 0)
    if not is_unsigned(out.dtype):
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
    return unless(bad, Interval(lo, hi), out.dtype)


def _same(x: Any, y: Any) -> tuple[Any, Any]:
    x, y = jnp.broadcast_arrays(x, y)
    return x, y


def _integer_pow(out: Type, params: Any, a: Interval) -> Interval | None:
    power = params.get("y", 2)
    if power < 1:
        return None
    base = _abs(out, params, a) if power % 2 == 0 else a
    found = Interval(lax.integer_pow(base.lo, power), lax.integer_pow(base.hi, power))
    if is_float(out.dtype):
        return _outward(found, 4.0 * power)
    bad = _too_large(_magnitude(a) ** power, out.dtype)
    if power % 2 == 0 and not is_unsigned(out.dtype):
        bad = bad | (a.lo == range_of(out.dtype)[0])
    return unless(bad, found, out.dtype)


def _monotone(fn: Any, ulps: float = 32.0, falling: bool = False) -> Rule:
    """A function that only rises (or falls), accurate to a few units in the last place."""

    def rule(out: Type, params: Any, a: Interval) -> Interval:
        lo, hi = fn(a.lo), fn(a.hi)
        found = Interval(hi, lo) if falling else Interval(lo, hi)
        # Near 0 an error relative to 1 is allowed for: log(1 + x) is a difference.
        eps = float(jnp.finfo(out.dtype).eps)
        return (
            _outward(found, ulps, ulps * eps / float(jnp.finfo(out.dtype).tiny)) if ulps else found
        )

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
        elif fn is lax.shift_right_logical and not is_unsigned(out.dtype):
            bad = bad | (a.lo < 0)
        return unless(bad, _corners(lambda x, y: fn(*_same(x, y)), a, by), out.dtype)

    return rule


# --- comparisons and logic -------------------------------------------------------------------


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
        return unless(bad, chosen, out.dtype)

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
    least, most = range_of(out.dtype)
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
    return unless((which.lo < 0) | (which.hi >= len(cases)), Interval(lo, hi), out.dtype)


def _convert(out: Type, params: Any, a: Interval) -> Interval:
    old, new = a.lo.dtype, out.dtype
    if new == np.bool_:
        zero = jnp.zeros((1, 1, 1, 1), old)
        return _not_equal(out, params, a, Interval(zero, zero))
    if is_float(new):
        # Rounding keeps the order; but a narrowing may be left out by the compiler.
        narrows = is_float(old) and jnp.finfo(new).bits < jnp.finfo(old).bits
        found = Interval(a.lo.astype(new), a.hi.astype(new))
        return _outward(found) if narrows else found
    if old == np.bool_:
        return Interval(a.lo.astype(new), a.hi.astype(new))
    if is_float(old):
        # Exact powers of two, so that the comparison is exact; the fraction is cut off.
        bits = jnp.iinfo(new).bits - (not is_unsigned(new))
        least = -(2.0**bits) if not is_unsigned(new) else 0.0
        fits = (a.lo >= least) & (a.hi < 2.0**bits)
        safe = [jnp.where(fits, bound, np.zeros((), old)).astype(new) for bound in a]
        return unless(~fits, Interval(*safe), new)
    found = Interval(a.lo.astype(new), a.hi.astype(new))
    back = [bound.astype(old) for bound in found]
    fits = (back[0] == a.lo) & (back[1] == a.hi)
    fits = fits & ((found.lo < 0) == (a.lo < 0)) & ((found.hi < 0) == (a.hi < 0))
    return unless(~fits, found, new)


def _is_finite(out: Type, params: Any, a: Interval) -> Interval:
    known = jnp.isfinite(a.lo) & jnp.isfinite(a.hi)
    return Interval(known, jnp.ones_like(known))


def _identity(out: Type, params: Any, a: Interval) -> Interval:
    return a


ELEMENTWISE: dict[str, Rule] = {
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
}

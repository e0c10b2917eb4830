"""Positions beyond an array: where a mask or a score has no entry for a given position.

An array that is read at a bare position has to reach as far as the positions do. Where the
positions are known, an array that does not raises an error. Where they are traced there is no one
to raise it to: a pair is then masked, and a logit is NaN, if it depends on a missing entry.

Kleene's logic decides what depends on a missing entry. `a & b` does not if `a` is known to be
False, `a | b` does not if `a` is known to be True, and a selection does only where the case that is
taken does. So `causal() & segments(ids)` may be used where later keys have no ids yet,
`sliding_window(w) | global_tokens(flags)` is a window beyond the flags, and
`jnp.where(k < n, valid[k], True)` gives its own answer beyond the array.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives

from ..checks.integers import concrete
from ..masks.mask import Mask, Predicate
from ..masks.positions import Filled, Positions, over_grid
from ..scores import Score, Scored
from ..shapes import Array, Bool
from .array_reads import AxisRead, ReadBuilder
from .canonical import canonicalize, constant
from .dependence import Signature, signature_of, trace_signature
from .hashing import Const, Ref, Type
from .program import Program, Step, needed

M = TypeVar("M", bound=Mask | Score)

_FLAG = Type((), np.dtype(bool))
_FALSE = Const(np.bool_(False))


def guarded(
    given: M,
    positions: Positions,
    sizes: tuple[int, int, int, int],
    *,
    mask: Mask | None = None,
    logit: Any = False,
) -> M:
    """The same mask or score, but False or NaN where it depends on a missing entry of an array.

    Args:
      given: the mask or score; returned as it is where no positions are given, and where they are
        known.
      positions: as the user gave them.
      sizes: numbers `(B, N, T, S)` of batch rows, query heads, queries and keys.
      mask: for a score, the mask of the call: masked pairs may depend on anything.
      logit: for a score, the dtype of the logits.

    Raises:
      ValueError: where positions are known, and a pair depends on a missing entry.
    """
    if all(getattr(positions, letter) is None for letter in "bhqk"):
        return given
    canonical = canonicalize(given, np.float32 if isinstance(logit, bool) else logit)
    found = _out_of_range(signature_of(canonical, positions, logit))
    if found is None:
        return given
    leaves = (*jax.tree.leaves(canonical), *found.captured)
    values = {e.position: concrete(getattr(positions, e.position)) for _, e in found.axis_reads}
    beyond = [(name, e) for name, e in found.axis_reads if _leaves(values[e.position], e.extent)]
    settled = not beyond
    if beyond:
        args = tuple(leaf if i in found.read else None for i, leaf in enumerate(leaves))
        depends = Predicate(found.depends, args)
        asked, letters = (depends, found.letters) if mask is None else (mask & depends, "bhqk")
        settled = not found.depends_on_logit and _is_known(asked, positions, letters)
        pair = _first(asked, positions, letters, sizes) if settled else None
        if pair is not None:
            raise ValueError(_message(beyond, pair))
    if settled and all(value is not None for value in values.values()):
        return given
    program = replace(found.guarded, name=repr(given))
    if isinstance(given, Score):
        return cast(M, Scored(program, leaves))
    return cast(M, Predicate(program, tuple(map(constant, leaves))))


def _leaves(values: np.ndarray | None, extent: int) -> bool:
    """Whether positions that are known leave 0 to `extent`."""
    return values is not None and bool(((values < 0) | (values >= extent)).any())


def _message(beyond: list[tuple[str, AxisRead]], pair: dict[str, int]) -> str:
    """The error message for the first pair that depends on a missing entry."""
    name, read = next((name, e) for name, e in beyond if not 0 <= pair[e.position] < e.extent)
    return missing_entry(name, read, pair)


def missing_entry(name: str, read: AxisRead, pair: dict[str, int]) -> str:
    """The error message for an array that has no entry for a pair."""
    _, axis, n, at = read
    return (
        f"{name}: got position {at} = {pair[at]}, expected 0 to {n - 1}: axis {axis} is read at "
        f"`{at}` and has extent {n}, and the answer for query {pair['q']} and key {pair['k']} "
        f"(row {pair['b']}, head {pair['h']}) depends on that entry; give an array that covers "
        "all positions, or a function of positions, such as masks.key_padding(lengths=...) or "
        "jnp.where(k < n, array[k], ...)"
    )


# --- where positions are known --------------------------------------------------------------------


def _is_known(mask: Mask, positions: Positions, letters: str) -> bool:
    """Whether the values of a mask at these positions can be computed here and now."""
    asked = [*jax.tree.leaves(mask), *(getattr(positions, letter) for letter in letters)]
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    traced = any(isinstance(each, jax.core.Tracer) for each in asked)
    return not (inside or traced) and all(
        getattr(each, "is_fully_addressable", True) for each in asked
    )


def _first(
    mask: Mask, positions: Positions, letters: str, sizes: tuple[int, int, int, int]
) -> dict[str, int] | None:
    """The positions of the first pair, by query, for which a mask is True."""
    extents = dict(zip("bhqk", sizes, strict=True))

    def values(at: str) -> Any:
        # A position that the mask does not depend on need not be known.
        given = getattr(positions, at) if at in letters else None
        found = None if given is None else concrete(given)
        found = np.arange(extents[at]) if found is None else found
        return np.atleast_2d(found.astype(np.int32)) if at in "qk" else found.astype(np.int32)

    b, h, q, k = map(values, "bhqk")
    alike = "b" not in letters and len(q) == len(k) == 1
    at = Filled(b[:1] if alike else b, h if "h" in letters else h[:1], q, k)
    with jax.ensure_compile_time_eval():
        rows = np.asarray(_rows(mask, at))
        if not rows.any():
            return None
        t = int(rows.argmax())
        pairs = np.asarray(over_grid(mask, at._replace(q=at.q[:, t : t + 1])))
    rows_at, heads, queries, keys = at
    i, j, _, s = (int(n) for n in np.argwhere(pairs)[0])
    return {
        "b": int(rows_at[i]),
        "h": int(heads[j]),
        "q": int(queries[min(i, len(queries) - 1), t]),
        "k": int(keys[min(i, len(keys) - 1), s]),
    }


@jax.jit
def _rows(mask: Mask, at: Filled) -> Bool[Array, "T"]:
    """Which queries may see any key in any row and head: O(T * S) time, O(S) memory."""
    return lax.map(lambda q: over_grid(mask, at._replace(q=q[:, None])).any(), at.q.T)


# --- what depends on a missing entry --------------------------------------------------------------


class _OutOfRange(NamedTuple):
    """How a mask or score reads arrays at positions that are given.

    Attributes:
      axis_reads: the axes that are read, and what to call the arrays.
      guarded: the program that gives False or NaN where it depends on a missing entry.
      depends: `(b, h, q, k, *leaves, *captured)`: whether it does.
      letters, read: the positions and the leaves that `depends` reads.
      depends_on_logit: whether `depends` reads the logit too; then no value is known here.
      captured: the arrays that the function closes over.
    """

    axis_reads: tuple[tuple[str, AxisRead], ...]
    guarded: Program
    depends: Program
    letters: str
    read: frozenset[int]
    depends_on_logit: bool
    captured: tuple[Any, ...]


@lru_cache(maxsize=256)
def _out_of_range(signature: Signature) -> _OutOfRange | None:
    """How a mask or score reads arrays at positions that are given; None where it does not."""
    traced = trace_signature(signature)
    builder = traced.builder
    flag = MissingEntries(builder).of(traced.out)
    if flag is None:
        return None
    given = set(builder.given.values())
    reads = tuple(dict.fromkeys((traced.label(e.array), e) for e in builder.axis_reads))
    out = builder.array(traced.out)
    dtype = builder.type(out).dtype
    nothing = Const(np.zeros((), dtype) if signature.logit is None else np.full((), np.nan, dtype))
    chosen = builder.bind(primitives.select_n_p, {}, [flag, out, nothing], builder.type(out))
    kept, unknown = needed(builder.steps, [chosen]), needed(builder.steps, [flag])
    types = tuple(builder.types)
    used = {flag, *(arg for step in unknown for arg in step.args)}
    inputs = [ref for ref in builder.inputs if ref not in traced.logits]
    rest = inputs[4:]
    return _OutOfRange(
        tuple((name, e) for name, e in reads if e.position in given),
        Program(tuple(builder.inputs), kept, (chosen,), types),
        Program(tuple(inputs), unknown, (flag,), types),
        "".join(at for at, ref in zip("bhqk", traced.positions, strict=True) if ref in used),
        frozenset(i for i, ref in enumerate(rest) if ref in used),
        bool(used.intersection(traced.logits)),
        tuple(builder.captured),
    )


class MissingEntries:
    """For every value, whether it depends on a missing entry: a boolean value, or None for never.

    The flags become steps of the same program.
    """

    def __init__(self, builder: ReadBuilder) -> None:
        self.builder = builder
        self.flags: dict[Ref, Ref] = {}
        for step in list(builder.steps):
            flag = self._flag(step)
            if flag is not None:
                self.flags.update(dict.fromkeys(step.outs, flag))

    def of(self, ref: Ref) -> Ref | None:
        """The flag of a value."""
        return self.flags.get(ref)

    def _flag(self, step: Step) -> Ref | None:
        name, flags = step.prim.name, [self.of(arg) for arg in step.args]
        own = self._outside(step)
        if own is None and not any(flag is not None for flag in flags):
            return None
        scalar = all(self.builder.type(arg).shape == () for arg in step.args)
        boolean = self.builder.type(step.outs[0]).dtype == np.bool_
        if name in ("and", "or") and boolean and scalar:
            return self._decided(step.args, name == "and")
        if name == "select_n" and self.builder.type(step.args[0]).shape == ():
            which, *cases = flags
            case = None
            if any(each is not None for each in cases):
                filled = [_FALSE if each is None else each for each in cases]
                case = self._op("select_n", step.args[0], *filled)
            return self._either(which, case)
        return self._either(own, *flags)

    def _outside(self, step: Step) -> Ref | None:
        """Whether a read at given positions lies beyond its array."""
        found = None
        for at, extent in self.builder.bounds.get(step.outs[0], ()):
            below = self._op("lt", at, Const(np.int32(0)))
            above = self._op("ge", at, Const(np.int32(extent)))
            found = self._either(found, below, above)
        return found

    def _decided(self, args: tuple[Ref, ...], conjunction: bool) -> Ref | None:
        """Of `a & b` (or `a | b`): whether one depends on a missing entry, and the other does not
        decide."""
        found = None
        for mine, other in (args, args[::-1]):
            flag = self.of(mine)
            if flag is None:
                continue
            undecided = other if conjunction else self._op("not", other)
            theirs = self.of(other)
            undecided = undecided if theirs is None else self._op("or", undecided, theirs)
            found = self._either(found, self._op("and", flag, undecided))
        return found

    def _either(self, *flags: Ref | None) -> Ref | None:
        found = None
        for flag in flags:
            if flag is not None:
                found = flag if found is None or found == flag else self._op("or", found, flag)
        return found

    def _op(self, name: str, *args: Ref) -> Ref:
        prim = getattr(primitives, f"{name}_p")
        return cast(Ref, self.builder.bind(prim, {}, list(args), _FLAG))

"""What lies beyond an array: positions that are given may be where a mask or a score has no entry.

An array read at a bare position has to reach as far as the positions do. Where they are known, one
that does not is an error. Where they are traced nobody is asked: a cell of the mask is then not
visible, and a logit is NaN, if what they are hangs on an entry that is not there.

What hangs on it is decided by Kleene's logic: `a & b` does not if `a` is known to be False, `a | b`
does not if `a` is known to be True, and a selection does where the case that is taken does. So
`causal() & segments(ids)` may be asked about keys that nobody sees yet, `sliding_window(w) |
global_tokens(flags)` goes on as a window, and `jnp.where(k < n, valid[k], True)` says itself what
stands beyond.
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
from .array_reads import Extent, Recogniser
from .captures import canonicalize, constant
from .dependence import Signature, code_of, signature_of
from .hashing import Const, Ref, Type
from .program import Program, Step, needed

M = TypeVar("M", bound=Mask | Score)

_FLAG = Type((), np.dtype(bool))
_FALSE = Const(np.bool_(False))


def within(
    given: M,
    positions: Positions,
    sizes: tuple[int, int, int, int],
    *,
    mask: Mask | None = None,
    logit: Any = False,
) -> M:
    """A mask or score whose answers never hang on what lies beyond its arrays.

    Args:
      given: the mask or score; itself the answer where no positions are given, and where they are
        known.
      positions: as the user gave them.
      sizes: numbers `(B, N, T, S)` of batch rows, query heads, queries and keys.
      mask: for a score, the mask of the call: what nobody sees may hang on anything.
      logit: for a score, the dtype of the logits.

    Raises:
      ValueError: where positions are known, and an answer hangs on an entry that is not there.
    """
    if all(getattr(positions, letter) is None for letter in "bhqk"):
        return given
    canonical = canonicalize(given)
    reach = _reach(signature_of(canonical, positions, logit))
    if reach is None:
        return given
    leaves = (*jax.tree.leaves(canonical), *reach.captured)
    values = {e.position: concrete(getattr(positions, e.position)) for _, e in reach.extents}
    beyond = [(label, e) for label, e in reach.extents if _leaves(values[e.position], e.extent)]
    settled = not beyond
    if beyond:
        args = tuple(leaf if i in reach.read else None for i, leaf in enumerate(leaves))
        hangs = Predicate(reach.hangs, args)
        asked, letters = (hangs, reach.letters) if mask is None else (mask & hangs, "bhqk")
        settled = not reach.hangs_on_logit and _tellable(asked, positions, letters)
        cell = _first(asked, positions, letters, sizes) if settled else None
        if cell is not None:
            raise ValueError(_message(beyond, cell))
    if settled and all(value is not None for value in values.values()):
        return given
    guarded = replace(reach.guarded, name=repr(given))
    if isinstance(given, Score):
        return cast(M, Scored(guarded, leaves))
    return cast(M, Predicate(guarded, tuple(map(constant, leaves))))


def _leaves(values: np.ndarray | None, extent: int) -> bool:
    """Whether positions that are known leave 0 to `extent`."""
    return values is not None and bool(((values < 0) | (values >= extent)).any())


def _message(beyond: list[tuple[str, Extent]], cell: dict[str, int]) -> str:
    """What to say of the first cell that hangs on an entry that is not there."""
    label, extent = next((label, e) for label, e in beyond if not 0 <= cell[e.position] < e.extent)
    return missing(label, extent, cell)


def missing(label: str, extent: Extent, cell: dict[str, int]) -> str:
    """What to say of an array that has no entry for a cell."""
    _, axis, n, at = extent
    return (
        f"{label}: got position {at} = {cell[at]}, expected 0 to {n - 1}: axis {axis} is read at "
        f"`{at}` and has extent {n}, and the answer for query {cell['q']} and key {cell['k']} "
        f"hangs on it (row {cell['b']}, head {cell['h']}); grow the array to the positions that "
        "are to come, or use a function of positions, such as masks.key_padding(lengths=...) or "
        "jnp.where(k < n, array[k], ...)"
    )


# --- asking where positions are known -------------------------------------------------------------


def _tellable(mask: Mask, positions: Positions, letters: str) -> bool:
    """Whether a mask can be asked about positions here and now."""
    asked = [*jax.tree.leaves(mask), *(getattr(positions, letter) for letter in letters)]
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    traced = any(isinstance(each, jax.core.Tracer) for each in asked)
    return not (inside or traced) and all(
        getattr(each, "is_fully_addressable", True) for each in asked
    )


def _first(
    mask: Mask, positions: Positions, letters: str, sizes: tuple[int, int, int, int]
) -> dict[str, int] | None:
    """The first cell, by query, that a mask allows, as its positions."""
    extents = dict(zip("bhqk", sizes, strict=True))

    def values(at: str) -> Any:
        # What the mask does not ask for is the same everywhere, traced or not.
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
        cells = np.asarray(over_grid(mask, at._replace(q=at.q[:, t : t + 1])))
    rows_at, heads, queries, keys = at
    i, j, _, s = (int(n) for n in np.argwhere(cells)[0])
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


# --- what hangs on what ---------------------------------------------------------------------------


class _Reach(NamedTuple):
    """How a mask or score reads arrays at positions that are given.

    Attributes:
      extents: the axes that are read, and what to call the arrays.
      guarded: the program that gives False or NaN where its answer hangs on what is not there.
      hangs: `(b, h, q, k, *leaves, *captured)`: whether it does.
      letters, read: the positions and the leaves that `hangs` depends on.
      hangs_on_logit: whether it depends on the logit too; then it can't be asked.
      captured: the arrays that the function closes over.
    """

    extents: tuple[tuple[str, Extent], ...]
    guarded: Program
    hangs: Program
    letters: str
    read: frozenset[int]
    hangs_on_logit: bool
    captured: tuple[Any, ...]


@lru_cache(maxsize=256)
def _reach(signature: Signature) -> _Reach | None:
    """How a mask or score reads arrays at positions that are given; None where it does not."""
    traced = code_of(signature)
    code = traced.steps
    flag = Flags(code).of(traced.out)
    if flag is None:
        return None
    given = set(code.given.values())
    extents = tuple(dict.fromkeys((traced.label(e.array), e) for e in code.extents))
    out = code.array(traced.out)
    dtype = code.type(out).dtype
    nothing = Const(np.zeros((), dtype) if signature.logit is None else np.full((), np.nan, dtype))
    chosen = code.bind(primitives.select_n_p, {}, [flag, out, nothing], code.type(out))
    kept, unknown = needed(code.steps, [chosen]), needed(code.steps, [flag])
    types = tuple(code.types)
    used = {flag, *(arg for step in unknown for arg in step.args)}
    inputs = [ref for ref in code.inputs if ref not in traced.logits]
    rest = inputs[4:]
    return _Reach(
        tuple((label, e) for label, e in extents if e.position in given),
        Program(tuple(code.inputs), kept, (chosen,), types),
        Program(tuple(inputs), unknown, (flag,), types),
        "".join(at for at, ref in zip("bhqk", traced.positions, strict=True) if ref in used),
        frozenset(i for i, ref in enumerate(rest) if ref in used),
        bool(used.intersection(traced.logits)),
        tuple(code.captured),
    )


class Flags:
    """For every value, whether it hangs on what is not there: a value too, or None for never."""

    def __init__(self, code: Recogniser) -> None:
        self.code = code
        self.flags: dict[Ref, Ref] = {}
        for step in list(code.steps):
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
        scalar = all(self.code.type(arg).shape == () for arg in step.args)
        boolean = self.code.type(step.outs[0]).dtype == np.bool_
        if name in ("and", "or") and boolean and scalar:
            return self._decided(step.args, name == "and")
        if name == "select_n" and self.code.type(step.args[0]).shape == ():
            which, *cases = flags
            case = None
            if any(each is not None for each in cases):
                filled = [_FALSE if each is None else each for each in cases]
                case = self._op("select_n", step.args[0], *filled)
            return self._either(which, case)
        return self._either(own, *flags)

    def _outside(self, step: Step) -> Ref | None:
        """Whether a read at given positions is beyond its array."""
        found = None
        for at, extent in self.code.within.get(step.outs[0], ()):
            below = self._op("lt", at, Const(np.int32(0)))
            above = self._op("ge", at, Const(np.int32(extent)))
            found = self._either(found, below, above)
        return found

    def _decided(self, args: tuple[Ref, ...], conjunction: bool) -> Ref | None:
        """Of `a & b` (or `a | b`): one hangs, and the other does not decide."""
        found = None
        for mine, other in (args, args[::-1]):
            flag = self.of(mine)
            if flag is None:
                continue
            open_ = other if conjunction else self._op("not", other)
            theirs = self.of(other)
            open_ = open_ if theirs is None else self._op("or", open_, theirs)
            found = self._either(found, self._op("and", flag, open_))
        return found

    def _either(self, *flags: Ref | None) -> Ref | None:
        found = None
        for flag in flags:
            if flag is not None:
                found = flag if found is None or found == flag else self._op("or", found, flag)
        return found

    def _op(self, name: str, *args: Ref) -> Ref:
        prim = getattr(primitives, f"{name}_p")
        return cast(Ref, self.code.bind(prim, {}, list(args), _FLAG))

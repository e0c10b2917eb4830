"""`mask.why(q, k)`: which parts of a mask allow a pair, which forbid it, and the numbers compared.

The explanation is not written by hand for any mask: each part is traced and run for the pair, and
its comparisons are read from the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.integers import MOST
from ..masks.mask import (
    And,
    BuiltInMask,
    Mask,
    MaskLike,
    Not,
    Or,
    PerHead,
    Predicate,
    Xor,
    as_mask,
)
from ..masks.positions import Positions
from ..masks.results import Why
from ..shapes import Int
from ..tiles.tile_map import TileMap
from ..tracing import out_of_range
from ..tracing.array_reads import AxisRead
from ..tracing.canonical import canonicalize
from ..tracing.dependence import TracedSteps, signature_of, trace_signature
from ..tracing.hashing import Const, Ref
from ..tracing.labels import labels
from ..tracing.program import run

_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "//", "rem": "%"}
# Operations whose result is the same number as their argument.
_SAME = ("convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "stop_gradient")
_HERE = np.zeros((), np.int32)
# A longer expression is harder to read than its value.
_LONGEST = 40


def why(mask: MaskLike, q: int, k: int, b: int = 0, h: int = 0) -> Why:
    """Why the query at position `q` may see the key at position `k`, or may not.

    Args:
      mask: a mask, a callable `(b, h, q, k) -> bool`, or a boolean array.
      q, k: positions of the query and of the key.
      b, h: batch row and query head.

    Raises:
      TypeError: for positions that are not integers, and for a mask whose arrays are traced.
      ValueError: for negative positions and those beyond int32, and where the answer depends on
        an entry that an array of the mask does not have.

    Example:
      >>> from jaxattn import masks
      >>> print((masks.causal() & masks.sliding_window(2)).why(q=3, k=7))
      query 3 may not see key 7 (row 0, head 0)
        causal forbids it: q >= k: 3 >= 7 is false
        sliding_window forbids it: k - q <= right: 4 <= 0 is false
    """
    at = {"q": q, "k": k, "b": b, "h": h}
    for name, value in at.items():
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"why({name}): got {value!r}, expected an integer")
        if not 0 <= value <= MOST:
            raise ValueError(
                f"why({name}): got {value}, expected a position, at least 0 and below 2**31"
            )
    asked = Asked(mask, np.array([q]), np.array([k]), b, h)
    return asked.why(0, 0)


class Asked:
    """The explanations of all pairs of some queries and keys: run once, read pair by pair."""

    def __init__(
        self, mask: MaskLike, q: Int[np.ndarray, "T"], k: Int[np.ndarray, "S"], b: int, h: int
    ) -> None:
        self.mask = as_mask(mask)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self.mask)):
            raise TypeError("why(mask): got traced arrays, expected values; call why outside jit")
        self.q, self.k, self.b, self.h = q, k, b, h
        self._readers: dict[int, _Reader] = {}
        self._missing = ""

    def why(self, i: int, j: int) -> Why:
        """Why the i-th query may see the j-th key, or may not."""
        lines: list[str] = []
        self._missing = ""
        allowed = self._walk(self.mask, (i, j), 1, lines)
        if allowed is None:
            raise ValueError(self._missing)
        verb = "may" if allowed else "may not"
        pair = f"query {self.q[i]} {verb} see key {self.k[j]} (row {self.b}, head {self.h})"
        return Why(allowed, (pair, *lines))

    def _walk(self, part: Mask, at: tuple[int, int], depth: int, lines: list[str]) -> bool | None:
        """Whether a part allows the pair, or None if an array of it has no entry for the pair.

        Its reasons are added to `lines`.
        """
        indent = "  " * depth
        match part:
            case TileMap():
                return self._walk(part.mask, at, depth, lines)
            case PerHead():
                mine = part.parts[self.h] if self.h < len(part.parts) else None
                if mine is None:
                    lines.append(f"{indent}per_head forbids it: there are {len(part.parts)} heads")
                    return False
                lines.append(f"{indent}head {self.h} has its own:")
                return self._walk(mine, at, depth + 1, lines)
            case And():
                return _all([self._walk(e, at, depth, lines) for e in (part.left, part.right)])
            case Or() | Xor() | Not():
                parts = (part.part,) if isinstance(part, Not) else (part.left, part.right)
                opening = {Or: "one is enough", Xor: "exactly one of these", Not: "the opposite of"}
                lines.append(f"{indent}{opening[type(part)]}:")
                results = [self._walk(each, at, depth + 1, lines) for each in parts]
                if isinstance(part, Or):
                    return _opposite(_all([_opposite(result) for result in results]))
                if None in results:
                    return None
                return results[0] != results[1] if isinstance(part, Xor) else not results[0]
        if id(part) not in self._readers:
            self._readers[id(part)] = self._run(part)
        reader = self._readers[id(part)]
        if (missing := reader.missing(at)) is not None:
            cell = {"b": self.b, "h": self.h, "q": int(self.q[at[0]]), "k": int(self.k[at[1]])}
            label, extent = next(m for m in missing if not 0 <= cell[m[1].position] < m[1].extent)
            self._missing = out_of_range.missing_entry(label, extent, cell)
            lines.append(f"{indent}{title(part)} has no entry for it")
            return None
        allowed, reasons = reader.read(at)
        verb = "allows" if allowed else "forbids"
        said = f": {'; '.join(reasons)}" if reasons else ""
        lines.append(f"{indent}{title(part)} {verb} it{said}")
        return allowed

    def _run(self, part: Mask) -> _Reader:
        """Runs a part that is a function for all pairs."""
        if jax.tree_util.all_leaves([part]):
            # Otherwise the arrays that a user's class holds are no leaves.
            part = canonicalize(part)
        leaves = jax.tree.leaves(part)
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        traced = trace_signature(signature_of(part, Positions(b=_HERE, h=_HERE, q=_HERE, k=_HERE)))
        code = traced.builder
        flag = out_of_range.MissingEntries(code).of(traced.out)
        # Arrays are printed by name only, so that their values are not needed.
        said = [ref for ref, type in enumerate(code.types) if type.shape == ()]
        row, head = jnp.int32(self.b), jnp.int32(self.h)

        def values(q: Any, k: Any) -> list[Any]:
            given = row, head, q, k, *arrays, *code.captured
            found = run(code.steps, dict(zip(code.inputs, given, strict=True)))
            return [found[ref] for ref in said]

        over = jax.vmap(jax.vmap(values, (None, 0)), (0, None))
        found = over(jnp.asarray(self.q, jnp.int32), jnp.asarray(self.k, jnp.int32))
        names = labels(part, own=True)
        return _Reader(
            traced,
            flag,
            dict(zip(said, map(np.asarray, found), strict=True)),
            dict(
                zip((*traced.positions, *traced.leaves), ("b", "h", "q", "k", *names), strict=True)
            ),
        )


def _all(results: Sequence[bool | None]) -> bool | None:
    """Whether all hold; None if that depends on one that is not known."""
    return False if False in results else None if None in results else True


def _opposite(result: bool | None) -> bool | None:
    return None if result is None else not result


def title(part: Mask) -> str:
    """What the lines of `why` call a mask without parts."""
    if not isinstance(part, (BuiltInMask, Predicate)):
        return type(part).__name__
    constructor = repr(part).partition("(")[0]
    if constructor != "predicate":
        return constructor
    name = str(getattr(getattr(part, "fn", None), "__name__", "<"))
    return "the function" if name[0] == "<" else name


class _Reader:
    """Reads from a program that has run what decided its result, pair by pair."""

    def __init__(
        self,
        traced: TracedSteps,
        flag: Ref | None,
        values: dict[int, np.ndarray],
        names: dict[int, str],
    ) -> None:
        self.code, self.out, self.flag = traced.builder, traced.out, flag
        self.extents = [(traced.label(e.array), e) for e in traced.builder.axis_reads]
        self.values, self.names = values, names
        self.at = (0, 0)

    def missing(self, at: tuple[int, int]) -> list[tuple[str, AxisRead]] | None:
        """The axes that are read, if the answer depends on an entry that one of them lacks."""
        self.at = at
        return self.extents if self.flag is not None and bool(self.value(self.flag)) else None

    def read(self, at: tuple[int, int]) -> tuple[bool, list[str]]:
        """Whether the pair is visible, and what decided it."""
        self.at = at
        return bool(self.value(self.out)), self.reasons(self.out)

    def value(self, ref: Ref) -> Any:
        return np.asarray(ref.value)[()] if isinstance(ref, Const) else self.values[ref][self.at]

    def reasons(self, ref: Ref) -> list[str]:
        """What decided a boolean, in words."""
        step = None if isinstance(ref, Const) else self.code.source.get(ref, (None, 0))[0]
        holds = bool(self.value(ref))
        if step is None:
            name = self.names.get(ref) if isinstance(ref, int) else None
            return [f"{name} is {str(holds).lower()}"] if name else []
        name, args = step.prim.name, step.args
        if name in ("and", "or"):
            # One false argument decides `and`; one true argument decides `or`.
            decisive = [arg for arg in args if bool(self.value(arg)) == holds]
            chosen = args if holds == (name == "and") else decisive
            return list(dict.fromkeys(reason for arg in chosen for reason in self.reasons(arg)))
        if name == "not" or name in _SAME:
            return self.reasons(args[0])
        if name == "select_n":
            which = int(self.value(args[0]))
            both = (*self.reasons(args[0]), *self.reasons(args[1 + which]))
            return list(dict.fromkeys(both))
        if name in _COMPARED and len(args) == 2:
            return [self._compared(_COMPARED[name], args, holds)]
        said = self.expression(ref)
        return [f"{said} is {str(holds).lower()}"] if said else []

    def _compared(self, sign: str, args: Sequence[Ref], holds: bool) -> str:
        said = [self.expression(arg) for arg in args]
        numbers = [self._number(arg) for arg in args]
        known = f"{said[0]} {sign} {said[1]}: " if all(said) and said != numbers else ""
        verdict = "" if holds else " is false"
        return f"{known}{numbers[0]} {sign} {numbers[1]}{verdict}"

    def _number(self, ref: Ref) -> str:
        if self.code.type(ref).shape:
            return "..."
        value = self.value(ref)
        return f"{value:g}" if isinstance(value, np.floating) else str(value).lower()

    def expression(self, ref: Ref) -> str:
        """How a value is computed, or an empty string if that is long."""
        if isinstance(ref, Const):
            return self._number(ref)
        if ref in self.names:
            return self.names[ref]
        if ref not in self.code.source:
            return "an array"
        step = self.code.source[ref][0]
        name, args = step.prim.name, step.args
        if name in _SAME:
            return self.expression(args[0])
        if name == "read":
            array = self.expression(args[0])
            index = ", ".join(map(self._number, args[1:]))
            return f"{array}[{index}]" if array else ""
        if name in _ARITHMETIC and len(args) == 2:
            left, right = map(self.expression, args)
            said = f"{left} {_ARITHMETIC[name]} {right}" if left and right else ""
            return said if len(said) <= _LONGEST else ""
        return ""

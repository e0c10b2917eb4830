"""`mask.why(q, k)`: which parts of a mask allow a pair, which forbid it, and by what numbers.

No mask has words of its own: a part is traced, run for one pair, and what it compared is read off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .algebra import And, Mask, MaskLike, Not, Or, PerHead, Predicate, Xor, as_mask
from .hoist import struct
from .plan import labels
from .program import Const, Ref, Type, run
from .reads import Recogniser
from .tiles import TileMap

_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "//", "rem": "%"}
# What is a number as its argument is, for whoever reads it.
_SAME = ("convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "stop_gradient")
# Longer expressions say less than their value.
_LONGEST = 40


@dataclass(frozen=True)
class Why:
    """The answer of `Mask.why`, to be printed.

    Attributes:
      allowed: whether the query may see the key.
      lines: what each part says, indented by how deep it stands.
    """

    allowed: bool
    lines: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.allowed

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__


def why(mask: MaskLike, q: int, k: int, b: int = 0, h: int = 0) -> Why:
    """Why the query at position `q` may see the key at position `k`, or may not.

    Args:
      mask: a mask, a callable `(b, h, q, k) -> bool`, or a boolean array.
      q, k: positions of the query and of the key.
      b, h: batch row and query head.

    Raises:
      TypeError: for positions that are not integers, and for a mask whose arrays are traced.
      ValueError: for negative positions.

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
        if value < 0:
            raise ValueError(f"why({name}): got {value}, expected a position, at least 0")
    whole = as_mask(mask)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(whole)):
        raise TypeError("why(mask): got arrays that are traced, expected values; ask outside jit")
    lines: list[str] = []
    allowed = _walk(whole, (b, h, q, k), 1, lines)
    verb = "may" if allowed else "may not"
    return Why(allowed, (f"query {q} {verb} see key {k} (row {b}, head {h})", *lines))


def _walk(part: Mask, at: tuple[int, ...], depth: int, lines: list[str]) -> bool:
    """Whether a part allows the pair; its reasons are added to `lines`."""
    indent = "  " * depth
    match part:
        case TileMap():
            return _walk(part.mask, at, depth, lines)
        case PerHead():
            mine = part.parts[at[1]] if at[1] < len(part.parts) else None
            if mine is None:
                lines.append(f"{indent}per_head forbids it: there are {len(part.parts)} heads")
                return False
            lines.append(f"{indent}head {at[1]} has its own:")
            return _walk(mine, at, depth + 1, lines)
        case And():
            results = [_walk(each, at, depth, lines) for each in (part.left, part.right)]
            return all(results)
        case Or() | Xor() | Not():
            parts = (part.part,) if isinstance(part, Not) else (part.left, part.right)
            title = {Or: "one is enough", Xor: "exactly one of these", Not: "the opposite of"}
            lines.append(f"{indent}{title[type(part)]}:")
            results = [_walk(each, at, depth + 1, lines) for each in parts]
            return {Or: any(results), Xor: sum(results) == 1, Not: not results[0]}[type(part)]
    allowed, reasons = _reasons(part, at)
    verb = "allows" if allowed else "forbids"
    said = f": {'; '.join(reasons)}" if reasons else ""
    lines.append(f"{indent}{_name(part)} {verb} it{said}")
    return allowed


def _name(part: Mask) -> str:
    fn = getattr(part, "fn", None)
    if isinstance(part, Predicate) and fn is not None:
        name = getattr(fn, "__name__", "predicate").lstrip("_")
        return "the function" if name.startswith("<") else name
    return type(part).__name__


def _reasons(part: Mask, at: tuple[int, ...]) -> tuple[bool, list[str]]:
    """Whether a part that is a function allows the pair, and what decided it."""
    leaves, tree = jax.tree.flatten(part)
    arrays = [jnp.asarray(leaf) for leaf in leaves]

    def call(*args: Any) -> Any:
        return jax.tree.unflatten(tree, args[4:])(*args[:4])

    positions = [jnp.asarray(each, jnp.int32) for each in at]
    jaxpr = jax.make_jaxpr(call)(*map(struct, (*positions, *arrays)))
    code = Recogniser()
    inputs = [code.input(Type(v.shape, v.dtype)) for v in jaxpr.in_avals]
    code.bare.update(zip(inputs[:4], "bhqk", strict=True))
    (out,) = code.inline(jaxpr, inputs)
    values = run(
        code.steps, dict(zip(code.inputs, (*positions, *arrays, *code.captured), strict=True))
    )
    names = [label.partition("(")[2].rstrip(")") or label for label in labels(part)]
    reader = _Reader(code, values, dict(zip(inputs, ("b", "h", "q", "k", *names), strict=True)))
    return bool(reader.value(out)), reader.reasons(out)


class _Reader:
    """Reads off a program that has run what decided its result."""

    def __init__(self, code: Recogniser, values: dict[int, Any], names: dict[int, str]) -> None:
        self.code, self.values, self.names = code, values, names

    def value(self, ref: Ref) -> Any:
        found = ref.value if isinstance(ref, Const) else self.values[ref]
        return np.asarray(found)[()]

    def reasons(self, ref: Ref) -> list[str]:
        """What made a boolean what it is, in words."""
        step = None if isinstance(ref, Const) else self.code.source.get(ref, (None, 0))[0]
        holds = bool(self.value(ref))
        if step is None:
            name = self.names.get(ref) if isinstance(ref, int) else None
            return [f"{name} is {str(holds).lower()}"] if name else []
        name, args = step.prim.name, step.args
        if name in ("and", "or"):
            # One that fails is enough against `and`, one that holds enough for `or`.
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
        value = self.value(ref)
        if np.ndim(value):
            return "..."
        return f"{value:g}" if isinstance(value, np.floating) else str(value).lower()

    def expression(self, ref: Ref) -> str:
        """How a value is computed, while that is short; else nothing."""
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

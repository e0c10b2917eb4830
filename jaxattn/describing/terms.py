"""Terms: expressions of constructors, with the cells that they allow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ..shapes import Bool

# A constructor costs the most. A list with an entry for each token costs a third as much again, and
# what can say almost anything (segments with two lists, trees, tables) about two constructors, so
# that `chunked(4)` comes before the segments that mean the same. An opposite, a number as large as
# the array, and what is less plain cost a little: they decide between expressions of as many
# constructors.
CALL, LIST, PAIR, LISTS, ODD = 16, 6, 30, 40, 1


@dataclass(frozen=True, eq=False)
class Term:
    """An expression.

    Attributes:
      text: the expression, in the names of `jaxattn.masks`, and `np`.
      weight: what the expression costs; the cheapest is called the shortest. See `CALL`.
      cells: what it allows; broadcasts to `[B, N, T, S]`.
      sign: `&` or `|` between its parts; empty for one constructor, or its opposite.
      parts: what the sign joins.
      opposite: the opposite as a call, if there is one.
    """

    text: str
    weight: int
    cells: Bool[np.ndarray, "#B #N #T #S"]
    sign: str = ""
    parts: tuple[Term, ...] = ()
    opposite: str = ""

    @property
    def cost(self) -> tuple[int, int]:
        """What is compared to find the shortest: the weight, then the length of the text."""
        return self.weight, len(self.text)

    def __invert__(self) -> Term:
        if self.parts:
            return joined("|" if self.sign == "&" else "&", (~part for part in self.parts))
        if self.opposite:
            return Term(self.opposite, self.weight, ~self.cells, opposite=self.text)
        if self.text.startswith("~"):
            return Term(self.text[1:], self.weight - ODD, ~self.cells)
        return Term(f"~{self.text}", self.weight + ODD, ~self.cells)


def joined(sign: str, terms: Iterable[Term]) -> Term:
    """Terms with `&` or `|` between them, the cheapest first; one term is itself."""
    flat = (part for term in terms for part in (term.parts if term.sign == sign else (term,)))
    parts = tuple(sorted(flat, key=lambda part: part.cost))
    if len(parts) == 1:
        return parts[0]
    texts = (f"({part.text})" if part.parts else part.text for part in parts)
    combine = np.logical_and if sign == "&" else np.logical_or
    return Term(
        f" {sign} ".join(texts),
        sum(part.weight for part in parts),
        reduce(combine, (part.cells for part in parts)),
        sign,
        parts,
    )


def call(name: str, cells: Any, *args: Any, extra: int = 0, **options: Any) -> Term:
    """The term of one constructor, from its arguments.

    Args:
      name: the constructor.
      cells: what it allows.
      *args, **options: its arguments: numbers, tuples and arrays; None for what is left out.
      extra: what it costs besides the call.
    """
    given = [literal(value) for value in args]
    given += [f"{word}={literal(value)}" for word, value in options.items() if value is not None]
    wide = np.reshape(cells, (1,) * (4 - np.ndim(cells)) + np.shape(cells))
    return Term(f"{name}({', '.join(given)})", CALL + extra, wide)


def literal(value: Any) -> str:
    """A number, a tuple or an array as it is written; runs of equal entries by `np.repeat`."""
    if not isinstance(value, np.ndarray):
        return repr(value if isinstance(value, tuple) else int(value))
    flags = value.dtype == np.bool_
    plain = f"np.array({value.astype(int).tolist()}{', bool' * flags})"
    if value.ndim != 1 or not value.size:
        return plain
    begins = np.flatnonzero(np.r_[True, value[1:] != value[:-1]])
    counts = np.diff(np.r_[begins, value.size])
    runs = f"np.repeat({value[begins].tolist()}, {counts.tolist()})"
    return min(plain, runs, key=len)

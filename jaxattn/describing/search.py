"""The search: the shortest expression of an array, or the nearest one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import combinations

import numpy as np

from ..shapes import Bool
from .closures import closures
from .cover import as_bits, cover
from .fits import fits, grids, lists
from .terms import CALL, LIST, LISTS, ODD, Term, joined

_ALL = Term("full()", CALL, np.ones((1, 1, 1, 1), bool), opposite="empty()")

# The cheapest expressions, in which a fit is tried in the place of several parts.
_REFITTED = 4
_LONG = 100 * CALL

# Terms of the nearest expression: more would describe the noise.
_NEAREST = 3


def described(array: Bool[np.ndarray, "B N T S"]) -> Term | None:
    """The shortest expression found that equals an array exactly, or None.

    It is the shortest of one conjunction or disjunction, and of what has one more operation inside.
    Where heads differ, each head has its own expression, unless one for all is as short.
    """
    heads = array.shape[1]
    found = _shortest(_between(array, ~array))
    if heads > 1 and (found is None or found.weight > CALL * heads):
        parts = [described(array[:, h : h + 1]) for h in range(heads)]
        if (split := _per_head(parts)) is not None:
            return _shortest(term for term in (found, split) if term is not None)
    return found


def _per_head(parts: list[Term | None]) -> Term | None:
    """`per_head` of the expression of each head, if all have one."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    batch = np.broadcast_arrays(*(part.cells for part in known))
    text = f"per_head([{', '.join(part.text for part in known)}])"
    return Term(text, CALL + sum(part.weight for part in known), np.concatenate(batch, axis=1))


def _shortest(terms: Iterable[Term]) -> Term | None:
    return min(terms, key=lambda term: term.cost, default=None)


def _between(seen: np.ndarray, hidden: np.ndarray) -> Iterator[Term]:
    """Expressions that allow all of `seen` and nothing of `hidden`."""
    if not hidden.any() or not seen.any():
        yield _ALL if seen.any() else ~_ALL
        return
    alone = [*closures(seen), *(~term for term in closures(hidden))]
    found = [term for term in alone if (term.cells == seen).all()]
    if found and min(found, key=lambda term: term.cost).weight <= CALL + ODD:
        yield from found
        return
    found = [*_conjunctions(seen, hidden), *_disjunctions(seen, hidden)]
    # One operation inside another takes three constructors or more.
    for constructors, deep in ((3, False), (4, True)):
        if deep and _least(found) >= constructors * CALL:
            for term in sorted(found, key=lambda term: term.cost)[:_REFITTED]:
                if term.sign == "&":
                    found += _refitted(term, seen, hidden)
                elif term.sign == "|":
                    found += (~each for each in _refitted(~term, hidden, seen))
        if _least(found) >= constructors * CALL:
            found += _mixed(seen, hidden, deep=deep)
            found += (~term for term in _mixed(hidden, seen, opposite=True, deep=deep))
    yield from found


def _least(terms: list[Term]) -> int:
    """The least weight; without terms, that of a long expression."""
    return min((term.weight for term in terms), default=_LONG)


def _conjunctions(seen: np.ndarray, hidden: np.ndarray, opposite: bool = False) -> Iterator[Term]:
    """Closures, and one fit or the opposite of a fit with closures around it.

    Args:
      seen, hidden: what is to be allowed, and what not.
      opposite: whether the caller negates what comes out, so that its opposite is to be cheap.
    """
    terms = [*closures(seen), *grids(seen)]
    if chosen := cover(terms, hidden, opposite=opposite):
        yield joined("&", chosen)
    for beside, left in _levels(terms, hidden):
        inner = [*fits(seen, left), *(~term for term in fits(left, seen))]
        yield from _around(beside, hidden, inner, opposite)


def _refitted(term: Term, seen: np.ndarray, hidden: np.ndarray) -> Iterator[Term]:
    """A fit beside one or two of the parts of a conjunction, in the place of all the others.

    A fit beside all closures may be too small: what they hide as well, it need not hide.
    """
    for count in (1, 2):
        for kept in combinations(term.parts if len(term.parts) > count + 1 else (), count):
            rest = hidden
            for part in kept:
                rest = rest & part.cells
            if (seen & ~reduce(np.logical_and, (part.cells for part in kept))).any():
                continue
            for fit in (*fits(seen, rest), *(~fit for fit in fits(rest, seen))):
                yield joined("&", [*kept, fit])


def _disjunctions(seen: np.ndarray, hidden: np.ndarray) -> Iterator[Term]:
    """The opposites of what hides all of `seen`, and allows all of `hidden`."""
    return (~term for term in _conjunctions(hidden, seen, opposite=True))


def _mixed(
    seen: np.ndarray, hidden: np.ndarray, *, opposite: bool = False, deep: bool = False
) -> Iterator[Term]:
    """Conjunctions of closures and a disjunction.

    The arguments are those of `_conjunctions`; `deep` says whether the disjunction may hold fits.
    """
    terms = [*closures(seen), *grids(seen)]
    for beside, left in _levels(terms, hidden):
        if left.any():
            yield from _around(beside, hidden, _disjunctions(seen, left), opposite)
    for term in terms:
        rest = hidden & term.cells
        if rest.any() and (rest != hidden).any():
            if deep:
                yield from (joined("&", [term, each]) for each in _disjunctions(seen, rest))
                continue
            if inner := cover(closures(rest), seen, opposite=not opposite):
                yield joined("&", [term, ~joined("&", inner)])
            for fit in (*lists(seen, rest), *(~fit for fit in lists(rest, seen))):
                yield joined("&", [term, fit])


def _levels(terms: list[Term], hidden: np.ndarray) -> Iterator[tuple[list[Term], np.ndarray]]:
    """What may stand beside a fit, and what that leaves to hide: no lists, one list each, all."""
    done: set[int] = set()
    for extra in (0, LIST, LISTS):
        beside = [term for term in terms if term.weight < 2 * CALL + extra]
        left = hidden
        for term in beside:
            left = left & term.cells
        if (bits := as_bits(left)) not in done:
            done.add(bits)
            yield beside, left


def _around(
    terms: list[Term], hidden: np.ndarray, inner: Iterable[Term], opposite: bool
) -> Iterator[Term]:
    """Each inner term, with the fewest others that hide the rest."""
    for term in inner:
        if (chosen := cover(terms, hidden, opposite=opposite, first=term)) is not None:
            yield joined("&", [*chosen, term])


def nearest(array: Bool[np.ndarray, "B N T S"]) -> Term:
    """An expression that differs from an array in few cells.

    Members are guessed by the most frequent number of all rows, and joined as long as that brings
    the expression nearer.
    """
    if array.shape[1] > 1:
        parts = [described(array[:, h : h + 1]) or nearest(array[:, h : h + 1])
                 for h in range(array.shape[1])]  # fmt: skip
        split = _per_head([*parts])
    else:
        split = None
    guesses = [_ALL, ~_ALL]
    for negated, cells in ((False, array), (True, ~array)):
        if cells.any():
            found = closures(cells) + closures(cells, most=_usual, least=_usual)
            guesses += [~term for term in found] if negated else found
    wanted = as_bits(array)
    bits = [as_bits(np.broadcast_to(term.cells, array.shape)) for term in guesses]
    missed, best, mine = min(
        (((each ^ wanted).bit_count(), i, each) for i, each in enumerate(bits))
    )
    term = guesses[best]
    for _ in range(_NEAREST - 1):
        options = []
        for i, each in enumerate(bits):
            options.append((((mine & each) ^ wanted).bit_count(), i, "&", mine & each))
            options.append((((mine | each) ^ wanted).bit_count(), i, "|", mine | each))
        fewer, i, sign, joint = min(options)
        if fewer >= missed:
            break
        term, mine, missed = joined(sign, [term, guesses[i]]), joint, fewer
    if split is not None and (split.cells != array).sum() < missed:
        return split
    return term


def _usual(numbers: np.ndarray) -> int:
    """The most frequent number; of several the largest."""
    values, counts = np.unique(numbers, return_counts=True)
    return int(values[counts.size - 1 - counts[::-1].argmax()])

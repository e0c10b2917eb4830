"""The cheapest terms that together hide given cells: a set cover, by branch and bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..shapes import Bool
from .terms import Term

# An expression of more terms explains nothing.
_TERMS = 5


def as_bits(cells: Bool[np.ndarray, "..."]) -> int:
    """An array as one integer, a bit a cell."""
    return int.from_bytes(np.packbits(cells).tobytes(), "big")


def cover(
    terms: Sequence[Term],
    hidden: Bool[np.ndarray, "B N T S"],
    *,
    opposite: bool,
    first: Term | None = None,
) -> list[Term] | None:
    """The cheapest of the terms whose conjunction hides all cells of `hidden`, or None.

    Args:
      terms: what may be chosen.
      hidden: the cells to hide.
      opposite: whether the opposites of the terms are to be cheap: the conjunction is negated.
      first: a term that is chosen already.
    """
    need = as_bits(hidden)
    if first is not None:
        need &= as_bits(np.broadcast_to(first.cells, hidden.shape))
    priced = sorted(((~term if opposite else term).cost, i) for i, term in enumerate(terms))
    hides = _useful([(cost, terms[i]) for cost, i in priced], need, hidden.shape)
    best: tuple[tuple[int, int], list[Term] | None] = ((1 << 30, 0), None)

    def search(need: int, chosen: list[Term], weight: int, length: int) -> None:
        nonlocal best
        if (weight, length) >= best[0] or len(chosen) > _TERMS:
            return
        if not need:
            best = (weight, length), chosen
            return
        lowest = need & -need
        for cost, term, mine in hides:
            if mine & lowest:
                search(need & ~mine, [*chosen, term], weight + cost[0], length + cost[1])

    search(need, [], 0, 0)
    return best[1]


def _useful(
    priced: list[tuple[tuple[int, int], Term]], need: int, shape: tuple[int, ...]
) -> list[tuple[tuple[int, int], Term, int]]:
    """Terms that hide some of the cells, and which; without those that a cheaper one contains."""
    found: list[tuple[tuple[int, int], Term, int]] = []
    for cost, term in priced:
        mine = need & as_bits(np.broadcast_to(~term.cells, shape))
        if mine and not any(mine & other == mine for _, _, other in found):
            found.append((cost, term, mine))
    return found

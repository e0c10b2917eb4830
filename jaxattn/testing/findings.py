"""What `visible` finds: a mask that says what is strange about it, and how sure it is."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import numpy as np

from ..masks.door import views
from ..masks.mask import Dense
from ..pytrees import pytree, static
from ..shapes import Bool

# Finding words takes seconds beyond this many pairs.
_DESCRIBED = 2**17


@pytree
class Visible(Dense):
    """The mask that a model really applies; `print` says what was found.

    It goes wherever a mask goes: `show`, `plot`, `html`, `why`, `dense`, `masks.diff`,
    `masks.describe`.

    Attributes:
      array: the mask, `[B, 1, T, S]`; a pair is visible if any head sees it.
      reach: on which inputs the outputs depend through all layers, `[B, 1, T, S]`: the mask itself
        for one layer.
      determined: whether the mask of one layer follows from `reach`.
      across: `[i, j]`: whether row i of the outputs depends on another row j of the inputs, `[B,
        B]`.
      real: which inputs are not padding, `[B, S]`; None if that was not said.
      depth: what is known of one layer, in words; empty for one.
      sure: how it was found, and what could have been missed, in words.
    """

    reach: Any = field(repr=False)
    across: Any = field(repr=False)
    real: Any = field(default=None, repr=False)
    determined: bool = static(default=True, repr=False)
    depth: str = static(default="", repr=False)
    sure: tuple[str, ...] = static(default=(), repr=False)

    @property
    def empty_rows(self) -> Bool[np.ndarray, "B T"]:
        """The queries that see no key."""
        return np.asarray(~np.asarray(self.array)[:, 0].any(2))

    @property
    def unseen_keys(self) -> Bool[np.ndarray, "B S"]:
        """The keys that no query sees."""
        return np.asarray(~np.asarray(self.array)[:, 0].any(1))

    @property
    def padding_felt(self) -> Bool[np.ndarray, "B S"] | None:
        """The padding that a real query's output depends on; None if padding was not said."""
        if self.real is None:
            return None
        reach, real = np.asarray(self.reach)[:, 0], np.asarray(self.real)
        # Queries of another number than keys have no padding of their own.
        asks = real if real.shape[1] == reach.shape[1] else np.ones(reach.shape[:2], bool)
        return (reach & asks[:, :, None]).any(1) & ~real

    def __str__(self) -> str:
        lines = [*self._words(), *([self.depth] if self.depth else [])]
        lines += _told("queries that see no key", self.empty_rows)
        lines += _told("keys that no query sees", self.unseen_keys)
        across = np.asarray(self.across)
        lines += [
            f"row {i} of the batch depends on row{'s' * (len(others) > 1)} {_numbers(others)}"
            for i, others in enumerate(map(np.flatnonzero, across))
            if len(others)
        ]
        if not across.any() and len(across) > 1:
            lines.append("rows of the batch do not depend on each other")
        if (felt := self.padding_felt) is not None:
            lines += _told("padding that real queries feel", felt) or ["padding is not felt"]
        return "\n".join((*lines, *self.sure))

    def _words(self) -> list[str]:
        """The mask as an expression, and how well that fits."""
        if self.array.size > _DESCRIBED:
            return [
                f"{self!r}: masks.describe(seen.array[:, :, :128, :128]) finds words for a part"
            ]
        found = views().describe(np.asarray(self.array))
        missed = "" if found.exact else f" (the nearest: it misses {len(found.cells)} pairs)"
        return [found.expression + missed]


def _told(what: str, flags: np.ndarray) -> list[str]:
    """A line for the positions that are flagged, row by row; rows that are alike have one."""
    if not flags.any():
        return []
    if (flags == flags[0]).all():
        return [f"{what}: {_numbers(np.flatnonzero(flags[0]))}"]
    rows = enumerate(map(np.flatnonzero, flags))
    return [f"{what}: " + "; ".join(f"{_numbers(at)} (row {b})" for b, at in rows if len(at))]


def _numbers(numbers: np.ndarray) -> str:
    """Numbers in order, neighbours as a range: `0, 3-7`."""
    runs: list[list[int]] = []
    for n in map(int, numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)

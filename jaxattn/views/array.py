"""A mask as an array: every pair of a query and a key."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checks.arrays import described
from ..checks.integers import MOST
from ..masks.mask import Mask, check_tokens
from ..masks.positions import Positions, as_positions, over_grid
from ..shapes import Array, Bool
from ..tracing.out_of_range import guarded
from ..tracing.split import split


def dense(
    mask: Mask, T: int, S: int, batch: int, heads: int, positions: Positions | None
) -> Bool[Array, "batch heads T S"]:
    """What `Mask.dense` returns; its docstring has the arguments."""
    for name, size in {"T": T, "S": S, "batch": batch, "heads": heads}.items():
        number = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not number or not 0 <= size <= MOST:
            raise ValueError(
                f"Mask.dense({name}=): got {described(size)}, expected an integer >= 0, and below "
                "2**31"
            )
    given: Any = as_positions(positions)
    check_tokens(mask, given, T, S)
    parts = split(mask, given)
    parts.check_extents(batch, heads, T, S)
    found = guarded(parts.given, given, (batch, heads, T, S))
    return over_grid(found, given.filled(batch, heads, T, S))

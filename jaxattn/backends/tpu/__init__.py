"""Kernels for TPUs, written in Pallas and compiled by Mosaic.

A `Call` comes in, output and LSE go out. The forward is one kernel; the backward has a kernel for
queries, one for keys, and one for each operand of a score that is a grid and learns.

Two documents of 4 tokens, mask `ids[b, q] == ids[b, k] & (q >= k)`, as if tiles were 2 x 2: the
forward visits six tiles in six steps, row by row. Tile (0, 0) is PARTIAL and alone in its row: it
begins and ends it. Tile (1, 0) begins row 1, FULL, and tile (1, 1) ends it. The other ten are never
visited, nor copied to the core. The kernel of keys does the same by columns.

Read in this order: `backend` (what is refused, which tile is taken), `steps` (the order of tiles),
`tiles` (what is read and evaluated there), `kernels` (forward and backward).
"""

from ..flash.fused import interpreted
from .backend import (
    LIMITS,
    STATISTICS,
    WHY,
    footprint,
    not_compiled,
    prepare,
    refuse,
    run,
)

__all__ = [
    "LIMITS",
    "STATISTICS",
    "WHY",
    "footprint",
    "interpreted",
    "not_compiled",
    "prepare",
    "refuse",
    "run",
]

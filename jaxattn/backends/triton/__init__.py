"""Kernels for NVIDIA GPUs, written in Pallas and compiled by Triton.

A `Call` comes in, output and LSE go out. The forward is one kernel; the backward has a kernel for
queries, one for keys, and one for each operand of a score that is a grid or a diagonal and learns.

Two documents of 4 tokens, mask `ids[b, q] == ids[b, k] & (q >= k)`, as if tiles were 2 x 2: the
forward starts four programs, one for each two queries. The second one visits tile 1, PARTIAL, where
it evaluates `(r == c) & (q >= k)` on two numbers of the row and two of the column, then tile 0,
FULL, without a mask. It never visits tiles 2 and 3. The kernel of keys does the same by columns:
the first program visits the rows 0, PARTIAL, and 1, FULL. Real tiles are 16 x 16 and larger.

Read in this order: `backend` (what is refused, which tile is taken), `tiles` (sizes of tiles, what
a tile reads and evaluates, which operations Triton has), `kernels` (forward and backward).
"""

from ..flash.fused import interpreted
from .backend import (
    LIMITS,
    STATISTICS,
    WHY,
    footprint,
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
    "prepare",
    "refuse",
    "run",
]

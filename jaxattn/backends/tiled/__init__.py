"""The engine in plain XLA, for any device and the fastest here on CPUs.

A `Call` comes in, output and LSE go out. Time follows the number of active tiles, memory is
O(T + S). Loops run over lists of *steps*, each of one tile or a few that lie side by side.

Two documents of 4 tokens, mask `ids[b, q] == ids[b, k] & (q >= k)`, in tiles of 2 x 2: the six
active tiles are six steps, which start at the queries and keys (0, 0), (2, 0), (2, 2), (4, 4),
(6, 4) and (6, 6). A step reads two numbers `ids[b, q]` of the row, two `ids[b, k]` of the column
and the positions, and evaluates `(r == c) & (q >= k)` on them. There is no group of 2 x 2 FULL
tiles, in which the mask would be left out, and no run of three active tiles side by side.

Read in this order: `backend` (what is refused, which tile is taken), `schedule` (the lists of
steps), `tile_step` (what a step reads and evaluates), `passes` (forward and backward),
`exponential` (`e ** x`).
"""

from .backend import (
    LIMITS,
    STATISTICS,
    WHY,
    build,
    footprint,
    prepare,
    refuse,
    run,
)

__all__ = [
    "LIMITS",
    "STATISTICS",
    "WHY",
    "build",
    "footprint",
    "prepare",
    "refuse",
    "run",
]

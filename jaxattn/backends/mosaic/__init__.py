"""Kernels for Hopper GPUs, written in Pallas Mosaic GPU, from JAX 0.11 on.

A `Call` comes in, output and LSE go out: one kernel forward, one for the gradients of queries, one
for those of keys and values. They have not been timed on a GPU yet, so "auto" does not take them.

Two documents of 4 tokens, mask `ids[b, q] == ids[b, k] & (q >= k)`, as if tiles were 2 x 2: a block
owns two queries. One of its warpgroups loads the keys and values of the active tiles, ahead of the
others, which compute. For queries 2 and 3 these are tile 1, PARTIAL, and tile 0, FULL. The numbers
`ids[b, q]` of its rows stay in registers for the whole list, those of the columns `ids[b, k]` are
read with each PARTIAL tile, for `(r == c) & (q >= k)`. Real tiles are 64 or 128 each way.

Read in this order: `backend` (what is refused, what kernels are given), `programs` (residues as
operations that Mosaic compiles), `memory` (buffers that are filled ahead, matrix products), `tiles`
(mask, score and dropout of a tile), `kernels`.
"""

from .backend import (
    ENGINE,
    INTERPRETED,
    LIMITS,
    STATISTICS,
    WHY,
    build,
    footprint,
    obstacle,
    prepare,
    refuse,
    run,
)

__all__ = [
    "ENGINE",
    "INTERPRETED",
    "LIMITS",
    "STATISTICS",
    "WHY",
    "build",
    "footprint",
    "obstacle",
    "prepare",
    "refuse",
    "run",
]

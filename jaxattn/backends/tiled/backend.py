"""Attention in plain XLA that computes only the tiles a mask allows: the engine on CPU.

Time follows the active tiles, memory is O(T + S), forward and backward (`passes.py`).
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from ...shapes import Array, Float
from ...tiles.tile_map import TileStates
from .. import base, bfloat16, problem
from ..base import Call, unchanged
from ..flash import transforms
from ..problem import Config, Engine, Inputs
from . import passes, schedule

WHY = "loops of plain XLA over the tiles that the mask allows, in O(T + S) memory"

LIMITS: tuple[str, ...] = ()

prepare = unchanged

ENGINE = Engine(passes.forward, passes.backward, differentiable=passes.forward, known=True)


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: sizes are 0, or lengths are symbolic."""
    return base.nothing_to_cut(call)


def footprint(call: Call) -> int:
    """Bytes of the inputs in the layout of the loops, of the sums, and of the tiles of one step."""
    B, T, S, N, K, H, Hv = call.sizes
    width = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    copies = (B * T * N * H + B * S * K * (H + Hv)) * jnp.dtype(bfloat16.factors(call)).itemsize
    sums = B * T * N * (Hv + 2 + call.columns) * width
    return int(copies + sums + 2 * schedule.STEP_CELLS * width)


def run(
    call: Call, tile: tuple[int, int] | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`.

    Args:
      call: what to compute.
      tile: queries and keys of a tile; by default chosen by the shapes.
    """
    return transforms.attend(*build(call, tile))


def received(
    call: Call, lse: Float[Array, "B T N"], weight: Float[Array, "B T N"]
) -> Float[Array, "B S N"]:
    """The sum over queries of a weight of each times the weights of attention."""
    return transforms.received(*build(call), lse, weight)


STATISTICS = base.Statistics(columns=True, received=received)


def build(call: Call, tile: tuple[int, int] | None = None) -> tuple[Config, Inputs]:
    """What the loops are compiled for, and what they are given."""
    return problem.build(call, ENGINE, bfloat16.factors(call), partial(tile_of, call, tile))


def tile_of(
    call: Call, tile: tuple[int, int] | None, known: TileStates | None, heads: int
) -> tuple[int, int]:
    """The requested tile, else that of the call's tile map if it has a usual size, else one chosen
    by the shapes."""
    T, S = call.sizes.T, call.sizes.S
    if tile is None and known is not None and all(64 <= n <= 1024 for n in known.tile):
        tile = known.tile
    tile = tile or schedule.tile_size(T, S, heads)
    return min(tile[0], T), min(tile[1], S)

"""Kernels in Pallas Triton for NVIDIA GPUs: almost every call, in O(T + S) memory.

The kernels are imported where they are used: Pallas would triple the time of `import jaxattn`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ...shapes import Array, Float
from ...tiles.tile_map import TileStates
from ...tracing.split import Split
from .. import base, problem
from ..base import Call, unchanged
from ..flash import fused, transforms
from ..problem import Config, Inputs

if TYPE_CHECKING:
    from .tiles import KernelOptions

WHY, LIMITS = fused.WHY, fused.LIMITS

prepare = unchanged


# The largest tile of a given map that is used as it is. With larger ones every kernel would compute
# more than a new map costs.
_COARSEST = 256


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: platform, sizes, dtype, mask or score."""
    unknown = STATISTICS.missing(call) or fused.unknown_sizes(call)
    if unknown is not None:
        return unknown
    if not fused.is_interpreted():
        elsewhere = base.not_on_nvidia(call)
        if elsewhere is not None:
            return elsewhere
        age = base.capability(call)
        if age is not None and age < (8, 0):
            return f"needs compute capability 8.0 or newer; this GPU's is {age[0]}.{age[1]}"
    if call.query.dtype == jnp.float64:
        return "has no kernels for float64"
    from . import tiles

    widest = max(call.sizes.H, call.sizes.Hv)
    if widest > tiles.WIDEST:
        return f"head dimensions up to {tiles.WIDEST} fit in its kernels; got {widest}"
    return fused.unfit(call, _unfit)


def _unfit(parts: Split[Any], learns: bool) -> str | None:
    from . import tiles

    if not parts.elementwise:
        return "; ".join(parts.reasons)
    missing = tiles.unknown(parts.program, learns)
    return f"no kernel has {', '.join(missing)}" if missing else None


def footprint(call: Call) -> int:
    """Bytes of the sums of rows, of the lists of tiles, and of inputs that have to be padded."""
    from . import tiles

    tile = _smallest(call, tiles.KernelOptions(fused.is_interpreted()))
    return fused.footprint(call, tile, tiles.width)


def run(
    call: Call, tile: tuple[int, int] | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`.

    Args:
      call: what to compute.
      tile: queries and keys of a tile, powers of 2 of at least 16; by default
        chosen by the head dimension and the dtype.
    """
    return transforms.attend(*build(call, tile))


def received(
    call: Call, lse: Float[Array, "B T N"], weight: Float[Array, "B T N"]
) -> Float[Array, "B S N"]:
    """The sum over queries of a weight of each times the weights of attention."""
    return transforms.received(*build(call), lse, weight)


STATISTICS = base.Statistics(columns=True, received=received)


def build(call: Call, tile: tuple[int, int] | None = None) -> tuple[Config, Inputs]:
    """What the kernels are compiled for, and what they are given."""
    from . import kernels
    from .tiles import KernelOptions

    options = KernelOptions(fused.is_interpreted(), tile)
    return problem.build(
        call, kernels.engine(options), call.query.dtype, partial(_tile, call, options)
    )


def _tile(
    call: Call, options: KernelOptions, known: TileStates | None, heads: int
) -> tuple[int, int]:
    """The tile of the call's map, if it divides those of the kernels, or the reverse."""
    from . import tiles

    tile = _smallest(call, options)
    if known is not None and all(
        tiles.LEAST <= n <= _COARSEST and n & (n - 1) == 0 for n in known.tile
    ):
        tile = known.tile
    return min(tile[0], call.sizes.T), min(tile[1], call.sizes.S)


def _smallest(call: Call, options: KernelOptions) -> tuple[int, int]:
    """The size of tiles from whose states those of every kernel's tiles follow."""
    from . import tiles

    _, T, S, _, _, H, Hv = call.sizes
    return tiles.tile_of(options, H, Hv, T, S, call.query.dtype)

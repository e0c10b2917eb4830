"""Kernels in Pallas for TPUs: almost every call, in O(T + S) memory.

The kernels are imported where they are used: Pallas would triple the time of `import jaxattn`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

from ...shapes import Array, Float
from ...tiles.tile_map import TileStates
from ...tracing.split import Split
from .. import base, problem
from ..base import Call, unchanged
from ..flash import fused, transforms
from ..problem import Config, Inputs, Residue

if TYPE_CHECKING:
    from .tiles import KernelOptions

WHY = fused.WHY

LIMITS: tuple[str, ...] = (
    "these kernels were interpreted and compiled, and have never run on a TPU; if they fail or are "
    "slow, backend='tiled' is the way out",
)

prepare = unchanged

# The kinds of TPU that the kernels have been compiled for: v5e, v5p and v6e.
COMPILED = ("TPU v5 lite", "TPU v5", "TPU v6 lite")


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: platform, sizes, dtype, mask or score."""
    where = base.platform(call)
    if where != "tpu" and not fused.is_interpreted():
        return f"runs on TPUs; inputs are on {where}"
    unknown = STATISTICS.missing(call) or fused.unknown_sizes(call)
    if unknown is not None:
        return unknown
    dtypes = {jnp.dtype(a.dtype).name for a in (call.query, call.key, call.value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"its matrix products take bfloat16 or float32; got {', '.join(sorted(dtypes))}"
    if call.precision not in (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST):
        return f"its kernels have no products of precision={call.precision}"
    from . import tiles

    widest = max(call.sizes.H, call.sizes.Hv)
    if widest > tiles.WIDEST:
        return f"head dimensions up to {tiles.WIDEST} fit in its kernels; got {widest}"
    return fused.unfit(call, _unfit)


def not_compiled(call: Call) -> str | None:
    """Why "auto" leaves a call to others that these kernels could compute, or None."""
    kind = base.device_kind(call)
    if kind in COMPILED or fused.is_interpreted():
        return None
    return f"its kernels were compiled for {', '.join(COMPILED)}; this is {kind}"


def _unfit(parts: Split[Any], learns: bool) -> str | None:
    from ..flash import programs
    from . import tiles

    if parts.reasons:
        return parts.reasons[0]
    program = parts.program
    if parts.scores:
        program = programs.scored(Residue(program, parts.kinds), slopes=learns)
    return programs.unsupported(program, tiles.OPERATIONS, "TPU")


def footprint(call: Call) -> int:
    """Bytes of the sums of rows, of the lists of tiles, and of inputs that have to be padded."""
    return fused.footprint(call, _tile(call, _options(None), None, 1), lambda n: n)


def run(
    call: Call, tile: tuple[int, int] | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`.

    Args:
      call: what to compute.
      tile: queries and keys of a tile, multiples of 128; by default 512 each, fewer for short
        lengths.
    """
    return transforms.attend(*build(call, tile))


def received(
    call: Call, lse: Float[Array, "B T N"], weight: Float[Array, "B T N"]
) -> Float[Array, "B S N"]:
    """The sum over queries of a weight of each times the weights of attention."""
    return transforms.received(*build(call), lse, weight)


STATISTICS = base.Statistics(columns=True, received=received)


def build(
    call: Call, tile: tuple[int, int] | None = None, interpreter: Any = None
) -> tuple[Config, Inputs]:
    """What the kernels are compiled for, and what they are given.

    Args:
      call: what to compute.
      tile: queries and keys of a tile.
      interpreter: parameters of Pallas' interpreter of TPUs, where that runs the kernels.
    """
    from . import kernels

    options = _options(tile)
    if interpreter is not None:
        options = options._replace(interpret=interpreter)
    return problem.build(
        call, kernels.engine(options), call.query.dtype, partial(_tile, call, options)
    )


def _options(tile: tuple[int, int] | None) -> KernelOptions:
    from .tiles import KernelOptions

    return KernelOptions(fused.is_interpreted(), tile)


def _tile(
    call: Call, options: KernelOptions, known: TileStates | None, heads: int
) -> tuple[int, int]:
    """The tile of the call's map if kernels can have it, else the default; at most everything."""
    from . import tiles

    T, S = call.sizes.T, call.sizes.S
    tile = options.chosen
    if known is not None and all(n % options.least == 0 for n in known.tile):
        tile = min(known.tile[0], tiles.TILE[0]), min(known.tile[1], tiles.TILE[1])
    if any("diagonal" in part.kinds for part in fused.functions(call)):
        # Distances of a tile are read, and summed, as two blocks of its length.
        side = min(*tile, options.whole(T), options.whole(S))
        side = 1 << (side.bit_length() - 1)
        tile = side, side
    return min(tile[0], T), min(tile[1], S)

"""Kernels for NVIDIA GPUs that compute only the tiles a mask allows, in O(T + S) memory.

Two engines have them: Triton's (`triton.py`), which takes almost every call, and Mosaic GPU's
(`mosaic.py`), made for Hopper. Which one computes a call is decided in one place, `_prepare`. They
are imported where a GPU is used: Pallas would treble the time of `import jaxattn`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from ..shapes import Array, Float
from ..split import Split, split
from ..tiles import TileMap
from . import base, inputs, mosaic, transforms
from .base import Call
from .inputs import Inputs, Plan

if TYPE_CHECKING:
    from .triton_tiles import How

WHY = "kernels that compute only the tiles that the mask allows, in O(T + S) memory"

LIMITS = ("logits are held in powers of 2: below -2.3e38 they are -inf",)

ENGINES = ("triton", "mosaic")
# The engine that computes what it can; the rest is Triton's. Mosaic's kernels have been interpreted
# and compiled, and never run on a GPU: until they are measured on one, they compute only where this
# was changed, before anything was traced.
ENGINE = "triton"

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)

# Maps of tiles up to this size are used as they are. Coarser ones would have every kernel compute
# more than a new map costs.
_COARSEST = 256


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, the kernels run on any platform, interpreted by JAX in tiles of 16: for tests."""
    token = _interpreted.set(True)
    try:
        # A label, as labels are part of the key under which JAX keeps what it has traced: nothing
        # that was compiled on the other side of this line is taken for ours.
        with set_xla_metadata(jaxattn="interpreted"):
            yield
    finally:
        _interpreted.reset(token)


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: platform, sizes, dtype, or what is on a tile."""
    if 0 in call.sizes:
        return f"nothing to compute: the sizes are {call.sizes}"
    if base.symbolic(*call.sizes):
        return "sizes are symbolic, and kernels are compiled for known ones"
    if not _interpreted.get():
        where = base.platform(call)
        if where not in ("gpu", "cuda"):
            return f"runs on NVIDIA GPUs; inputs are on {where}"
        age = base.capability(call)
        if age is not None and age < (8, 0):
            return f"needs compute capability 8.0 or newer; this GPU's is {age[0]}.{age[1]}"
    if call.query.dtype == jnp.float64:
        return "has no kernels for float64"
    from . import triton_tiles

    widest = max(call.sizes.H, call.sizes.Hv)
    if widest > triton_tiles.WIDEST:
        return f"head dimensions up to {triton_tiles.WIDEST} fit; got {widest}"
    for name, part, logit in (("mask", call.mask, False), ("score", call.score, jnp.float32)):
        if part is not None:
            given = part.mask if isinstance(part, TileMap) else part
            reason = _unfit(split(given, call.positions, logit=logit))
            if reason is not None:
                return f"the {name} can't be computed in a kernel: {reason}"
    return None


def _unfit(parts: Split) -> str | None:
    from . import triton_tiles

    if not parts.elementwise:
        return "; ".join(parts.reasons)
    missing = triton_tiles.unknown(parts.program, learns=parts.scores)
    return f"no kernel has {', '.join(missing)}" if missing else None


def footprint(call: Call) -> int:
    """Bytes of the sums of rows, of the lists of tiles, and of inputs that have to be padded."""
    from . import triton_tiles

    B, T, S, N, K, H, Hv = call.sizes
    tq, tk = _smallest(call, triton_tiles.How(_interpreted.get()))
    lists = 4 * B * N * -(-T // tq) * -(-S // tk) if call.mask is not None else 0
    padded = 0
    if (triton_tiles.width(H), triton_tiles.width(Hv)) != (H, Hv) or T % tq or S % tk:
        numbers = B * T * N * triton_tiles.width(H) + B * S * K * (
            triton_tiles.width(H) + triton_tiles.width(Hv)
        )
        padded = numbers * jnp.dtype(call.query.dtype).itemsize
    return int(4 * B * T * N + lists + padded)


def run(
    call: Call, tile: tuple[int, int] | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`.

    Args:
      call: what to compute.
      tile: queries and keys of a tile, powers of 2 from 16 on (Mosaic's: 64 or 128); by default
        chosen by the head dimension and the dtype.
    """
    return transforms.attend(*_prepare(call, tile))


def _prepare(call: Call, tile: tuple[int, int] | None) -> tuple[Plan, Inputs]:
    """The kernels for a call that is not refused, and what they are given."""
    interpret = _interpreted.get()
    hopper = base.capability(call) in (None, (9, 0))
    if ENGINE == "mosaic" and hopper and not interpret and mosaic.refuse(call) is None:
        return mosaic.prepare(call, tile=tile)
    from . import triton
    from .triton_tiles import How

    how = How(interpret, tile)
    return inputs.prepare(call, triton.engine(how), call.query.dtype, partial(_tile, call, how))


def _tile(call: Call, how: How, known: TileMap | None, heads: int) -> tuple[int, int]:
    """The tile of the map that came along, if it divides those of the kernels, or the reverse."""
    from . import triton_tiles

    tile = _smallest(call, how)
    if known is not None and all(
        triton_tiles.LEAST <= n <= _COARSEST and n & (n - 1) == 0 for n in known.tile
    ):
        tile = known.tile
    return min(tile[0], call.sizes.T), min(tile[1], call.sizes.S)


def _smallest(call: Call, how: How) -> tuple[int, int]:
    """The size of tiles whose states serve those of all of Triton's kernels."""
    from . import triton_tiles

    _, T, S, _, _, H, Hv = call.sizes
    return triton_tiles.tile_of(how, H, Hv, T, S, call.query.dtype)


__all__ = ["ENGINE", "ENGINES", "LIMITS", "WHY", "footprint", "interpreted", "refuse", "run"]

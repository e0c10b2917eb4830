"""Kernels for NVIDIA GPUs that compute only the tiles a mask allows, in O(T + S) memory.

Which kernels compute a call is decided in one place, `_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from ..shapes import Array, Float
from ..split import Split, split
from ..tiles import TileMap
from . import base, inputs, transforms, triton, triton_tiles
from .base import Call
from .inputs import Engine

WHY = "kernels that compute only the tiles that the mask allows, in O(T + S) memory"

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


class Kernels(NamedTuple):
    """Kernels that can compute a call, and the tiles whose states they want."""

    engine: Engine
    tile: tuple[int, int]


def _kernels(call: Call) -> Kernels:
    """The kernels for a call that is not refused."""
    interpret = _interpreted.get()
    _, T, S, _, _, H, Hv = call.sizes
    engine = triton.INTERPRETED if interpret else triton.ENGINE
    return Kernels(engine, triton_tiles.tile_of(interpret, H, Hv, T, S, call.query.dtype))


def refuse(call: Call) -> str | None:
    """Why this backend can't compute the call: platform, sizes, dtype, or what is on a tile."""
    if 0 in call.sizes:
        return f"nothing to compute: the sizes are {call.sizes}"
    if not _interpreted.get():
        where = base.platform(call)
        if where not in ("gpu", "cuda"):
            return f"runs on NVIDIA GPUs; inputs are on {where}"
        age = base.capability(call)
        if age is not None and age < (8, 0):
            return f"needs compute capability 8.0 or newer; this GPU's is {age[0]}.{age[1]}"
    if call.query.dtype == jnp.float64:
        return "has no kernels for float64"
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
    if not parts.elementwise:
        return "; ".join(parts.reasons)
    missing = triton_tiles.unknown(parts.program, learns=parts.scores)
    return f"no kernel has {', '.join(missing)}" if missing else None


def footprint(call: Call) -> int:
    """Bytes of the sums of rows, of the lists of tiles, and of inputs that have to be padded."""
    B, T, S, N, K, H, Hv = call.sizes
    tq, tk = _kernels(call).tile
    lists = 4 * B * N * -(-T // tq) * -(-S // tk) if call.mask is not None else 0
    padded = 0
    if (triton_tiles.width(H), triton_tiles.width(Hv)) != (H, Hv) or T % tq or S % tk:
        numbers = B * T * N * triton_tiles.width(H) + B * S * K * (
            triton_tiles.width(H) + triton_tiles.width(Hv)
        )
        padded = numbers * jnp.dtype(call.query.dtype).itemsize
    return int(4 * B * T * N + lists + padded)


def run(call: Call) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`."""
    kernels = _kernels(call)
    choose = partial(_tile, call, kernels.tile)
    plan, x = inputs.prepare(call, kernels.engine, call.query.dtype, choose)
    out, lse = transforms.attend(plan, x)
    B, T, _, N, _, _, Hv = call.sizes
    return out.reshape(B, T, N, Hv), lse.reshape(B, T, N)


def _tile(call: Call, tile: tuple[int, int], known: TileMap | None, heads: int) -> tuple[int, int]:
    """The tile of the map that came along, if it divides those of the kernels, or the reverse."""
    if known is not None and all(
        triton_tiles.LEAST <= n <= _COARSEST and n & (n - 1) == 0 for n in known.tile
    ):
        tile = known.tile
    return min(tile[0], call.sizes.T), min(tile[1], call.sizes.S)


__all__ = ["WHY", "footprint", "interpreted", "refuse", "run"]

"""What the two engines for NVIDIA GPUs share, beside what all tile engines do.

Both are kernels that keep logits in powers of 2, as GPUs compute `2^x` faster than `e^x`, and that
see arrays whose lengths and head dimensions are rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ...shapes import Array, Float
from ...tracing.split import Split
from .. import base
from ..base import Call
from .tile_sizes import TileSizes

WHY = "kernels that compute only the tiles that the mask allows, in O(T + S) memory"

LIMITS: tuple[str, ...] = ("logits are held in powers of 2: below -2.3e38 they are -inf",)

LOG2E = math.log2(math.e)


def unknown_sizes(call: Call) -> str | None:
    """The reason of kernels for calls whose sizes are 0 or symbolic."""
    if base.symbolic(*call.sizes):
        return "sizes are symbolic, and kernels are compiled for known ones"
    return base.nothing_to_compute(call)


def unfit(call: Call, reason: Callable[[Split[Any]], str | None]) -> str | None:
    """Why a kernel can't compute the mask or the score of a call, by `reason` of each."""
    for name, part in (("mask", call.mask), ("score", call.score)):
        found = None if part is None else reason(part)
        if found is not None:
            return f"the {name} can't be computed in a kernel: {found}"
    return None


def footprint(call: Call, tile: tuple[int, int], width: Callable[[int], int]) -> int:
    """Bytes of the sums of rows, of the lists of tiles, and of inputs that have to be padded.

    Args:
      call: what to compute.
      tile: queries and keys of a tile.
      width: what a head dimension is rounded up to.
    """
    B, T, S, N, K, H, Hv = call.sizes
    rows, columns = -(-T // tile[0]), -(-S // tile[1])
    lists = 4 * B * N * rows * columns if call.mask is not None else 0
    padded = 0
    if (width(H), width(Hv)) != (H, Hv) or T % tile[0] or S % tile[1]:
        numbers = B * rows * tile[0] * N * width(H)
        numbers += B * columns * tile[1] * K * (width(H) + width(Hv))
        padded = numbers * jnp.dtype(call.query.dtype).itemsize
    return int(4 * B * T * N + lists + padded)


def forward_results(
    sizes: TileSizes, out: Float[Array, "B Tp N Hvp"], lse: Float[Array, "B N Tp"]
) -> tuple[Float[Array, "B T K G Hv"], Float[Array, "B T K G"]]:
    """Output and LSE of a kernel without padding, as an `Engine` returns them."""
    B, T, K, G, Hv = sizes.B, sizes.T, sizes.K, sizes.G, sizes.Hv
    out = out[:, :T, :, :Hv].reshape(B, T, K, G, Hv)
    return out, lse[..., :T].reshape(B, K, G, T).transpose(0, 3, 1, 2)

"""Masks of positions and a few numbers: order, distance, chunks, grids.

Every constructor returns a class of one line of maths, its `formula`. The numbers are leaves: they
may be traced, and new values reuse the compiled program. Where a number may differ by batch row or
by head its shape says so (`[B]`, `[N]`). Numbers that meet positions become int32 as these are; a
number beyond int32 becomes the nearest int32, which means the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..checks.integers import MOST, integers, plain
from ..pytrees import pytree, static
from ..shapes import ArrayLike, Int
from .mask import BuiltInMask, Mask, Scalar, entry

# --- everything and nothing -----------------------------------------------------------------------


@pytree
class Full(BuiltInMask):
    """The mask that `full` makes."""

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return True


def full() -> Mask:
    """Every query sees every key: `True`."""
    return Full()


@pytree
class Empty(BuiltInMask):
    """The mask that `empty` makes."""

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return False


def empty() -> Mask:
    """No query sees any key: `False`. Attention under it is 0, and its LSE is -inf."""
    return Empty()


# --- order and distance ---------------------------------------------------------------------------


@pytree
class Causal(BuiltInMask):
    """The mask that `causal` makes."""

    offset: Any = None

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        if self.offset is None:
            return q >= k
        # Not q + offset >= k: the sum of two large numbers would wrap around.
        return k - q <= entry(self.offset, b)


def causal(offset: Int[ArrayLike, "*B"] | int = 0) -> Mask:
    """A query sees itself and what came before: `q + offset >= k`.

    Args:
      offset: int or `[B]`; how many keys come before the first query. With the default the first
        query meets the first key (top-left, as in `jax.nn`), also where T != S; `S - T` aligns
        the last query with the last key (bottom-right). `positions=` does the same for every mask
        of a call at once.

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """
    if isinstance(offset, int) and not isinstance(offset, bool) and offset == 0:
        return Causal()
    return Causal(integers(offset, "causal(offset)", ("[]", "[B]")))


@pytree
class SlidingWindow(BuiltInMask):
    """The mask that `sliding_window` makes."""

    left: Any
    right: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return (q - k <= entry(self.left, h)) & (k - q <= entry(self.right, h))


def sliding_window(
    left: Int[ArrayLike, "*Nl"] | int, right: Int[ArrayLike, "*Nr"] | int = 0
) -> Mask:
    """A query sees `left` keys before itself, itself, and `right` after: `-right <= q - k <= left`.

    Args:
      left: int or, one a head, `[N]`; at least 0.
      right: the same; 0 (the default) sees no future.

    Sources: Longformer, arXiv 2004.05150; Mistral 7B, arXiv 2310.06825 (its window of W tokens
    counts the query itself: `left = W - 1`).
    """
    allowed = ("[]", "[N]")
    return SlidingWindow(
        integers(left, "sliding_window(left)", allowed, 0),
        integers(right, "sliding_window(right)", allowed, 0),
    )


@pytree
class PrefixLm(BuiltInMask):
    """The mask that `prefix_lm` makes."""

    lengths: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return (k < entry(self.lengths, b)) | (q >= k)


def prefix_lm(lengths: Int[ArrayLike, "*B"] | int) -> Mask:
    """Every query sees the prefix; the rest is causal: `(k < lengths[b]) | (q >= k)`.

    Args:
      lengths: int or `[B]`, the number of prefix tokens, at least 0.

    Sources: T5, arXiv 1910.10683, section 3.2.1; UniLM, arXiv 1905.03197.
    """
    return PrefixLm(integers(lengths, "prefix_lm(lengths)", ("[]", "[B]"), 0))


@pytree
class Chunked(BuiltInMask):
    """The mask that `chunked` makes."""

    size: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return q // self.size == k // self.size


def chunked(size: Int[ArrayLike, ""] | int) -> Mask:
    """Positions are cut in chunks, each sees its own: `q // size == k // size`.

    With `& causal()` this is the local attention of Llama 4; alone, the blockwise attention of
    arXiv 1911.02972.
    """
    return Chunked(integers(size, "chunked(size)", ("[]",), 1))


@pytree
class Dilated(BuiltInMask):
    """The mask that `dilated` makes."""

    rate: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return (q - k) % self.rate == 0


def dilated(rate: Int[ArrayLike, ""] | int) -> Mask:
    """Every `rate`-th key, counted from the query: `(q - k) % rate == 0`.

    With `& causal()`, the strided head of the Sparse Transformer (arXiv 1904.10509); with
    `& sliding_window(rate * w, rate * w)`, Longformer's dilated window (arXiv 2004.05150).
    """
    return Dilated(integers(rate, "dilated(rate)", ("[]",), 1))


# --- grids and halves -----------------------------------------------------------------------------


@pytree
class Neighborhood(BuiltInMask):
    """The mask that `neighborhood` makes."""

    grid: tuple[Any, ...] = field(metadata={"argument": "shape"})
    radius: tuple[Any, ...]
    prefix: Any = field(default=None, kw_only=True)
    tile: tuple[Any, ...] | None = field(default=None, kw_only=True)
    tokens: int = static(kw_only=True, repr=False)

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        near = self._near(q, k)
        if self.prefix is not None:
            near = (
                (q < self.prefix) | (k < self.prefix) | self._near(q - self.prefix, k - self.prefix)
            )
        return near & (q >= 0) & (q < self.tokens) & (k >= 0) & (k < self.tokens)

    def _near(self, q: Scalar, k: Scalar) -> Any:
        near, stride, sides = True, 1, self.grid
        if self.tile is not None:
            volume = math.prod(self.tile)
            q, k = q // volume, k // volume
            sides = tuple(n // side for n, side in zip(self.grid, self.tile, strict=True))
        for extent, reach in zip(reversed(sides), reversed(self.radius), strict=True):
            x_q, x_k = q // stride % extent, k // stride % extent
            near &= jnp.abs(jnp.clip(x_q, reach, extent - 1 - reach) - x_k) <= reach
            stride = stride * extent
        return near

    def required_length(self) -> int:
        return self.tokens


def neighborhood(
    shape: Sequence[int],
    radius: int | Sequence[int],
    *,
    prefix: int = 0,
    tile: Sequence[int] | None = None,
) -> Mask:
    """Tokens of a grid see the nearest `2 * radius + 1` along every axis.

    With x the coordinates of a position in a row-major grid:
    `|clip(x_q, radius, shape - 1 - radius) - x_k| <= radius` on every axis, so that a token at the
    border sees as many neighbours as one in the middle.

    Args:
      shape: extents of the grid, as in `(height, width)`.
      radius: one for all axes, or one an axis; `2 * radius + 1` fits in the extent.
      prefix: tokens before the grid that see all and are seen by all, as the class token of a ViT.
      tile: extents of the tiles into which the grid is cut, as in `(height, width)`: the mask is
        then a neighborhood of tiles, and `radius` counts tiles. Tokens come tile by tile, in
        row-major order of the tiles and within each. It divides the extents of the grid.

    With `tile`, the window slides by whole tiles (Sliding Tile Attention), so that no tile of pairs
    is partly visible where attention computes tiles of `prod(tile)` tokens. To order a
    video `[B, T, Y, X, C]` tile by tile: `einops.rearrange(video, "b (t i) (y j) (x k) c ->
    b (t y x i j k) c", i=tile[0], j=tile[1], k=tile[2])`.

    The mask is for `prefix + prod(shape)` queries and keys: another T or S is an error, and where
    `positions=` lie beyond, nothing is seen.

    Sources: Neighborhood Attention (NATTEN), arXiv 2204.07143; Sliding Tile Attention, arXiv
    2502.04507.
    """
    axes = tuple(shape) if isinstance(shape, (Sequence, np.ndarray)) else (shape,)
    extents = tuple(plain(n, f"neighborhood(shape[{i}])", 1) for i, n in enumerate(axes))
    radii = tuple(radius) if isinstance(radius, (Sequence, np.ndarray)) else (radius,) * len(axes)
    if len(radii) != len(extents) or not extents:
        raise ValueError(
            f"neighborhood(radius): got {radius!r}, expected one integer or one for each axis of "
            f"shape {extents}"
        )
    reach = tuple(plain(r, "neighborhood(radius)", 0) for r in radii)
    sides = None if tile is None else _tile_sides(tile, extents)
    for extent, r, side in zip(extents, reach, sides or (1,) * len(extents), strict=True):
        if 2 * r + 1 > extent // side:
            unit = "" if sides is None else " tiles"
            raise ValueError(
                f"neighborhood(radius): got {r} for an axis of extent {extent // side}{unit}, "
                f"expected 0 <= radius and 2 * radius + 1 <= extent"
            )
    before = plain(prefix, "neighborhood(prefix)", 0)
    tokens = before + math.prod(extents)
    if tokens > MOST:
        raise ValueError(
            f"neighborhood(shape): got {extents}, {tokens} tokens, expected less than 2**31: "
            "positions are int32"
        )
    return Neighborhood(extents, reach, prefix=before or None, tile=sides, tokens=tokens)


def _tile_sides(tile: Sequence[int], extents: tuple[int, ...]) -> tuple[int, ...]:
    axes = tuple(tile) if isinstance(tile, (Sequence, np.ndarray)) else (tile,)
    sides = tuple(plain(n, f"neighborhood(tile[{i}])", 1) for i, n in enumerate(axes))
    if len(sides) != len(extents) or any(n % s for n, s in zip(extents, sides, strict=True)):
        raise ValueError(
            f"neighborhood(tile): got {sides}, expected a divisor of each extent of shape {extents}"
        )
    return sides


@pytree
class BlockDiffusion(BuiltInMask):
    """The mask that `block_diffusion` makes."""

    length: Any
    block: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        q_clean, k_clean = q >= self.length, k >= self.length
        q_block = jnp.where(q_clean, q - self.length, q) // self.block
        k_block = jnp.where(k_clean, k - self.length, k) // self.block
        same_block = (q_block == k_block) & (q_clean == k_clean)
        earlier = (q_block > k_block) & k_clean
        return same_block | earlier


def block_diffusion(length: Int[ArrayLike, ""] | int, block: Int[ArrayLike, ""] | int) -> Mask:
    """Training mask of block diffusion: `length` noisy tokens, then the same tokens clean.

    With `blk` the block of a token within its half:
    `(blk_q == blk_k and same half) or (blk_q > blk_k and k is clean)`: a noisy block sees itself
    and the clean blocks before it; a clean block sees itself and the clean blocks before it.

    Args:
      length: tokens in each half; T = S = 2 * length.
      block: tokens in a block.

    Source: Block Diffusion, arXiv 2503.09573, section 3.2 and appendix B.6.
    """
    return BlockDiffusion(
        integers(length, "block_diffusion(length)", ("[]",), 1),
        integers(block, "block_diffusion(block)", ("[]",), 1),
    )

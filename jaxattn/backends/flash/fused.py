"""What the engines that are kernels share, beside what all tile engines do.

Those for NVIDIA GPUs keep logits in powers of 2, as GPUs compute `2^x` faster than `e^x`. All see
arrays whose lengths are rounded up to whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from ...shapes import Array, Float
from ...tracing.split import Split
from .. import base
from ..base import Call
from ..problem import Config
from .tile_sizes import TileSizes

WHY = "kernels that compute only the tiles that the mask allows, in O(T + S) memory"

LIMITS: tuple[str, ...] = ("logits are held in powers of 2: below -2.3e38 they are -inf",)

LOG2E = math.log2(math.e)

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, kernels run on any platform, interpreted by JAX in tiles of 16: for tests."""
    token = _interpreted.set(True)
    try:
        # JAX keeps what it has traced under a key that contains this label: interpreted kernels and
        # compiled ones are then never mistaken for each other.
        with set_xla_metadata(jaxattn="interpreted"):
            yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether kernels are interpreted here."""
    return _interpreted.get()


def unknown_sizes(call: Call) -> str | None:
    """The reason of kernels for calls whose sizes are 0 or symbolic."""
    if base.symbolic(*call.sizes):
        return "sizes are symbolic, and kernels are compiled for known ones"
    return base.nothing_to_compute(call)


def functions(call: Call) -> Iterator[Split[Any]]:
    """The mask, the score and the functions of statistics of a call."""
    for part in (call.mask, call.score, *call.means, *call.maxima, *call.largest):
        if part is not None:
            yield part


def unfit(call: Call, reason: Callable[[Split[Any], bool], str | None]) -> str | None:
    """Why a kernel can't compute a function of a call: `reason(function, learns)` of any."""
    statistic = "function of a statistic"
    for name, part, learns in (
        ("mask", call.mask, False),
        ("score", call.score, True),
        *((statistic, part, True) for part in call.means),
        *((statistic, part, False) for part in (*call.maxima, *call.largest)),
    ):
        found = None if part is None else reason(part, learns)
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
    return int(4 * B * T * N * (1 + call.columns) + lists + padded)


def forward_results(
    sizes: TileSizes,
    out: Float[Array, "B Tp N Hvp"],
    lse: Float[Array, "B N Tp"],
    columns: Sequence[Float[Array, "B N Tp"]],
) -> tuple[Float[Array, "B T K G width"], Float[Array, "B T K G"]]:
    """Output with columns, and LSE of a kernel without padding, as an `Engine` returns them."""
    B, T, K, G, Hv = sizes.B, sizes.T, sizes.K, sizes.G, sizes.Hv

    def by_length(line: Array) -> Array:
        return line[..., :T].reshape(B, K, G, T).transpose(0, 3, 1, 2)

    out = out[:, :T, :, :Hv].reshape(B, T, K, G, Hv)
    if columns:
        parts = [by_length(column)[..., None] for column in columns]
        out = jnp.concatenate([out.astype(lse.dtype), *parts], -1)
    return out, by_length(lse)


# --- columns of statistics ------------------------------------------------------------------------


class Weighed(NamedTuple):
    """What the forward of a tile knows, and of its queries.

    Arrays of the tile are `[tq, tk]` and those of its queries `[tq]`, or, with keys first,
    `[tk, tq]` and `[1, tq]`.

    Attributes:
      shown: the mask; None in a FULL tile.
      s: logits, -inf where masked.
      p: weights, measured from the largest logits so far.
      fade: what sums of earlier tiles are multiplied by.
      before, top: the largest logits of earlier tiles, and those with this one.
    """

    shown: Array | None
    s: Array
    p: Array
    fade: Array
    before: Array
    top: Array

    def over_keys(self, reduce: Callable[..., Array], values: Array) -> Array:
        """`reduce` over the keys: a number for each query."""
        keys_first = self.top.ndim == values.ndim
        return reduce(values, axis=0, keepdims=True) if keys_first else reduce(values, axis=1)

    def spread(self, line: Array) -> Array:
        """A number of each query, in all of its places of the tile."""
        axes = tuple(range(line.ndim))
        return lax.broadcast_in_dim(line, self.s.shape, axes)


def added(
    config: Config, tile: Weighed, functions: Sequence[Array], columns: Sequence[Array]
) -> list[Array]:
    """The columns after one more tile, on which their functions have these values."""
    found = []
    for column, values, old in zip(config.columns, functions, columns, strict=True):
        if column.mean:
            # A weight of 0 takes no part, whatever the function is there: 0 * inf is NaN.
            none = tile.p == jnp.zeros_like(tile.p)
            values = jnp.where(none, jnp.zeros_like(values), values) * tile.p
            found.append(old * tile.fade + tile.over_keys(jnp.sum, values))
        elif column.reduce == "max":
            if tile.shown is not None:
                values = jnp.where(tile.shown, values, jnp.full_like(values, -jnp.inf))
            # Triton's maximum passes over NaN, a sum does not.
            nan = jnp.where(jnp.isnan(values), values, jnp.zeros_like(values))
            most = jnp.maximum(old, tile.over_keys(jnp.max, values))
            most = most + tile.over_keys(jnp.sum, nan)
            found.append(jnp.where(jnp.isnan(old), old, most))
        else:
            far = jnp.full_like(old, jnp.inf)
            here = tile.s == tile.spread(tile.top)
            least = tile.over_keys(jnp.min, jnp.where(here, values, jnp.full_like(values, jnp.inf)))
            least = jnp.minimum(least, jnp.where(tile.before == tile.top, old, far))
            found.append(jnp.where(tile.top == -far, old, least))
    return found


def reduced(
    config: Config, columns: Sequence[Array], total: Float[Array, "..."]
) -> list[Float[Array, "..."]]:
    """The columns after the last tile, from the sums of weights."""
    pairs = zip(config.columns, columns, strict=True)
    return [sums / total if column.mean else sums for column, sums in pairs]


def cotangents_of_means(
    config: Config, Hv: int, d_out: Float[Array, "B T K G width"]
) -> list[Float[Array, "B K G T"]]:
    """The cotangents of the columns that are means; of others there is no gradient."""
    means = [Hv + n for n, column in enumerate(config.columns) if column.mean]
    return [d_out[..., n].transpose(0, 2, 3, 1) for n in means]

"""An engine for Hopper GPUs: kernels in Pallas Mosaic GPU, from JAX 0.11 on.

This module prepares what the kernels are given (lists of active tiles, arrays for whole tiles) and
reads what they return. The kernels are in `kernels.py`, imported where they are used: Pallas takes
a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ...shapes import Array, Float, Int
from ...tiles.tile_map import TileStates
from ...tracing.dependence import Kind
from ...tracing.split import Split
from .. import base, problem
from ..base import Call, unchanged
from ..flash import fused, tile_lists, transforms
from ..flash.operands import (
    cropped_gradient,
    learned,
    padded,
    padded_operand,
    summed_gradient,
)
from ..flash.programs import scored
from ..problem import Config, Engine, Gradients, Inputs, Residue

if TYPE_CHECKING:
    from .tiles import KernelInputs, KernelSizes

# Queries and keys of a tile: two warpgroups of 64 rows each way.
TILE = 128, 128

# The largest head dimension.
WIDEST = 128

WHY, LIMITS = fused.WHY, fused.LIMITS

# Sums over queries are gradients of values, which are written in 16 bits.
STATISTICS = base.Statistics(columns=True)

prepare = unchanged


def refuse(call: Call) -> str | None:
    """Why the kernels can't compute the call, or None if they can."""
    elsewhere = base.not_on_nvidia(call)
    if elsewhere is not None:
        return elsewhere
    age = base.capability(call)
    if age not in (None, (9, 0)):
        return f"needs compute capability 9.0 (Hopper); this GPU's is {age[0]}.{age[1]}"
    return obstacle(call)


def obstacle(call: Call) -> str | None:
    """Why no device could compute the call with these kernels, or None."""
    if jax.__version_info__ < (0, 11):
        return f"Mosaic GPU kernels need JAX 0.11 or later; this is {jax.__version__}"
    if _miscompiled():
        return "CUDA 12.8.0 to 12.9.0 compile masks in Mosaic GPU kernels wrongly"
    unknown = STATISTICS.missing(call) or fused.unknown_sizes(call)
    if unknown is not None:
        return unknown
    dtypes = {jnp.dtype(a.dtype).name for a in (call.query, call.key, call.value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"its matrix products take bfloat16 or float16; got {', '.join(sorted(dtypes))}"
    if call.precision is not None:
        return f"its matrix products have one precision; got precision={call.precision}"
    widest = max(call.sizes.H, call.sizes.Hv)
    if widest > WIDEST:
        return (
            f"head dimensions wider than {WIDEST} leave no registers for the backward; got {widest}"
        )
    return fused.unfit(call, _unfit)


def _miscompiled() -> bool:
    """Whether ptxas is one that JAX's own attention kernel refuses under a causal mask."""
    from jax._src.lib import cuda_versions  # it has no public name

    return cuda_versions is not None and 12080 <= cuda_versions.cuda_runtime_get_version() < 12091


def _unfit(parts: Split[Any], learns: bool) -> str | None:
    from . import programs

    if parts.reasons:
        return parts.reasons[0]
    residue = Residue(parts.program, parts.kinds)
    if "diagonal" in residue.kinds:
        return "values that depend on q - k alone are a table, which the kernels can't read"
    if not parts.scores:
        return programs.unsupported(residue.program)
    if learns and any(residue.kinds[n] == "grid" for n in learned(residue)):
        return "the gradient of an array [.., T, S] is not computed by the kernels"
    return programs.unsupported(scored(residue, slopes=learns))


def footprint(call: Call) -> int:
    """Bytes of the sums of rows, of the lists of tiles, and of inputs that have to be padded."""
    from . import tiles

    return fused.footprint(call, TILE, tiles.width)


def run(
    call: Call, tile: tuple[int, int] | None = None
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output `[B, T, N, Hv]` in the query's dtype, and LSE `[B, T, N]`.

    Args:
      call: what to compute.
      tile: queries and keys of a tile, each 64 or 128; by default chosen by the lengths.
    """
    return transforms.attend(*build(call, tile=tile))


def build(
    call: Call, engine: Engine | None = None, tile: tuple[int, int] | None = None
) -> tuple[Config, Inputs]:
    """What the kernels are compiled for, and what they are given.

    Args:
      call: what to compute.
      engine: `ENGINE`, or `INTERPRETED` where there is no GPU.
      tile: queries and keys of a tile, each 64 or 128.
    """
    chosen = partial(_tile, call, tile)
    return problem.build(call, engine or ENGINE, call.query.dtype, chosen)


def _tile(
    call: Call, tile: tuple[int, int] | None, known: TileStates | None, heads: int
) -> tuple[int, int]:
    """The requested tile, else that of the call's tile map if kernels have it, else the usual."""
    if tile is None and known is not None and all(n in (64, 128) for n in known.tile):
        tile = known.tile
    if tile is None:
        tile = 64 if call.sizes.T <= 64 else TILE[0], 64 if call.sizes.S <= 64 else TILE[1]
    return tile


# --- forward --------------------------------------------------------------------------------------


def forward(interpret: bool, config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` with the columns, and natural-log LSE `[B, T, K, G]`."""
    from . import kernels

    sizes = _sizes(config, x)
    given = _kernel_inputs(config, sizes, x, False)
    out, lse, columns = kernels.forward(config, interpret, sizes, given)
    return fused.forward_results(sizes, out.astype(x.query.dtype), lse, columns)


def _sizes(config: Config, x: Inputs) -> KernelSizes:
    from .tiles import KernelSizes

    return KernelSizes.of(x, config.tile, dtype=jnp.dtype(config.dtype))


def _kernel_inputs(config: Config, sizes: KernelSizes, x: Inputs, transposed: bool) -> KernelInputs:
    """What kernels are given: heads in one axis, whole tiles, lists of rows of tiles or of columns.

    `transposed` for the kernel whose tiles have keys as rows.
    """
    from .tiles import DROPOUT, KernelInputs, stored

    def operands(kinds: Sequence[Kind], arrays: Sequence[Array]) -> tuple[Array, ...]:
        given = []
        for kind, array in zip(kinds, arrays, strict=True):
            whole = _one_head_axis(padded_operand(sizes, kind, stored(kind, array)))
            given.append(jnp.swapaxes(whole, 2, 3) if transposed and kind == "grid" else whole)
        return tuple(given)

    dropout: tuple[Array, ...] = ()
    if config.dropout:
        *words, rate = x.dropout
        scale = base.kept_scale(rate, jnp.float32)
        dropout = operands(DROPOUT, [*words, rate, scale])
    score, columns = config.split(x.score)
    tiles, counts = _lists(sizes, x.states, transposed)
    return KernelInputs(
        _matrix(sizes, x.query, sizes.Tp, sizes.Hp),
        _matrix(sizes, x.key, sizes.Sp, sizes.Hp),
        _matrix(sizes, x.value, sizes.Sp, sizes.Hvp),
        x.scale.astype(jnp.float32),
        tiles,
        counts,
        () if config.mask is None else operands(config.mask.kinds, x.mask),
        () if config.score is None else operands(config.score.kinds, score),
        tuple(
            operands(column.residue.kinds, own)
            for column, own in zip(config.columns, columns, strict=True)
        ),
        dropout,
    )


def _matrix(sizes: KernelSizes, array: Array, length: int, width: int) -> Array:
    """`[B, T, .., H]` as `[B, length, heads, width]`."""
    heads = array.reshape(*array.shape[:2], -1, array.shape[-1])
    return padded(heads.astype(sizes.dtype), {1: length, 3: width})


def _one_head_axis(array: Array) -> Array:
    """`[B|1, K|1, G|1, ...]` as `[B|1, N|1, ...]`: one of a head's extents may be 1 by sharding."""
    b, k, g, *rest = array.shape
    return array.reshape(b, k * g, *rest)


def _lists(
    sizes: KernelSizes, states: Int[Array, "..."] | None, transposed: bool
) -> tuple[Int[Array, "b n rows columns"], Int[Array, "b n rows 2"]]:
    """For each row of tiles the PARTIAL ones, then the FULL ones, and the numbers of both."""
    tile = sizes.tq, sizes.tk
    # Padded queries have weights of 0 without a mask. Padded keys need one, so their tiles are
    # PARTIAL.
    found = tile_lists.states_of(states, tile, tile, sizes.Tp, sizes.S)
    columns, ends = tile_lists.rows(jnp.swapaxes(found, 3, 4) if transposed else found)
    counts = jnp.diff(ends, axis=-1, prepend=jnp.zeros_like(ends[..., :1]))
    return _one_head_axis(columns), _one_head_axis(counts)


# --- backward -------------------------------------------------------------------------------------


def backward(
    interpret: bool,
    config: Config,
    groups: int,
    x: Inputs,
    far: Float[Array, "B K G T"],
    delta: Float[Array, "B K G T"],
    d_out: Float[Array, "B T K G Hv"],
) -> Gradients:
    """Cotangents of the inputs, by a kernel over rows of tiles and one over columns."""
    from . import kernels
    from .tiles import BackwardInputs, learned_kinds

    sizes = _sizes(config, x)
    B, T, S, K, G, H, Hv = sizes.B, sizes.T, sizes.S, sizes.K, sizes.G, sizes.H, sizes.Hv

    def line(array: Array, value: float) -> Array:
        return padded(array.reshape(B, sizes.N, T), {2: sizes.Tp}, value)

    means = fused.cotangents_of_means(config, Hv, d_out)
    d_out = d_out[..., :Hv] if config.columns else d_out
    # Padded queries take no part.
    far, *others = line(far * fused.LOG2E, math.inf), *(line(each, 0) for each in (delta, *means))
    lines = jnp.stack([far, *others], 2)
    more = BackwardInputs(_matrix(sizes, d_out, sizes.Tp, sizes.Hvp), lines)

    by_rows, by_columns = (_kernel_inputs(config, sizes, x, flag) for flag in (False, True))
    dq, row_sums = kernels.d_query(config, interpret, sizes, by_rows, more)
    dk, dv, column_sums = kernels.d_keys(config, interpret, sizes, by_columns, more)

    dq = dq[:, :T, :, :H].reshape(x.query.shape)
    d_scale = (x.query.astype(dq.dtype) * dq).sum((1, 2, 3, 4))
    score: list[Array | None] = [None] * len(x.score)
    for n, kind in zip(config.learned, learned_kinds(config), strict=True):
        total = (column_sums if kind == "column" else row_sums).pop(0)
        total = total.reshape(B, K, G, -1)
        total = total[..., :T].sum(-1) if kind == "head" else cropped_gradient(sizes, kind, total)
        score[n] = summed_gradient(total, x.score[n], groups)
    return Gradients(
        (dq * x.scale.reshape(-1, 1, 1, 1, 1)).astype(x.query.dtype),
        dk[:, :S, :, :H].astype(x.key.dtype),
        dv[:, :S, :, :Hv].astype(x.value.dtype),
        d_scale,
        tuple(score),
    )


ENGINE = Engine(partial(forward, False), partial(backward, False))
# The same kernels interpreted on any platform, much slower. The interpreter also looks for races.
INTERPRETED = Engine(partial(forward, True), partial(backward, True))

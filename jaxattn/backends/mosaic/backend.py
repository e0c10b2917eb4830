"""An engine for Hopper GPUs: kernels in Pallas Mosaic GPU, from JAX 0.11 on.

Here is what lies around the kernels: what they take, the lists of active tiles, whole tiles of
padding. The kernels are in `mosaic_kernels.py`, imported only when needed: Pallas takes a while.
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
from ...tracing.split import Split
from .. import base, problem
from ..base import Call, unchanged
from ..flash import tile_lists, transforms
from ..problem import Config, Engine, Gradients, Inputs, Residue

if TYPE_CHECKING:
    from .parts import Arrays, Extents

# Queries and keys of a tile: two warpgroups of 64 rows each way.
TILE = 128, 128

# Widths of heads that matrices in shared memory have; others are padded to the next.
WIDTHS = 64, 128


WHY = "kernels that compute only the tiles that the mask allows, in O(T + S) memory"

LIMITS: tuple[str, ...] = ("logits are held in powers of 2: below -2.3e38 they are -inf",)

prepare = unchanged


def refuse(call: Call) -> str | None:
    """Why the kernels can't compute the call, or None if they can."""
    where = base.platform(call)
    if where not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs; inputs are on {where}"
    age = base.capability(call)
    if age not in (None, (9, 0)):
        return f"needs compute capability 9.0 (Hopper); this GPU's is {age[0]}.{age[1]}"
    return obstacle(call)


def obstacle(call: Call) -> str | None:
    """What in the call the kernels can't compute on any device, or None."""
    if jax.__version_info__ < (0, 11):
        return f"Mosaic GPU kernels need JAX 0.11 or later; this is {jax.__version__}"
    if _miscompiled():
        return "CUDA 12.8.0 to 12.9.0 compile masks in Mosaic GPU kernels wrongly"
    if 0 in call.sizes:
        return f"nothing to compute: the sizes are {call.sizes}"
    if base.symbolic(*call.sizes):
        return "sizes are symbolic, and kernels are compiled for known ones"
    dtypes = {jnp.dtype(a.dtype).name for a in (call.query, call.key, call.value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"its matrix products take bfloat16 or float16; got {', '.join(sorted(dtypes))}"
    if call.precision is not None:
        return f"its matrix products have one precision; got precision={call.precision}"
    if max(call.sizes.H, call.sizes.Hv) > max(WIDTHS):
        return f"heads wider than {max(WIDTHS)} leave no registers for the backward"
    for name, part in (("mask", call.mask), ("score", call.score)):
        reason = None if part is None else _unfit(part)
        if reason is not None:
            return f"the {name}: {reason}"
    return None


def _miscompiled() -> bool:
    """Whether ptxas is one that JAX's own attention kernel refuses under a causal mask."""
    from jax._src.lib import cuda_versions  # it has no public name

    return cuda_versions is not None and 12080 <= cuda_versions.cuda_runtime_get_version() < 12091


def _unfit(parts: Split[Any]) -> str | None:
    from . import tiles

    if parts.reasons:
        return parts.reasons[0]
    residue = Residue(parts.program, parts.kinds)
    if "diagonal" in residue.kinds:
        return "what depends on q - k alone is a table, which the kernels can't read"
    if not parts.scores:
        return tiles.unsupported(residue.program)
    if any(residue.kinds[n] == "grid" for n in tiles.learns(residue)):
        return "the gradient of an array [.., T, S] is not computed by the kernels"
    return tiles.unsupported(tiles.scored(residue, slopes=True))


def footprint(call: Call) -> int:
    """Bytes of the sums of rows, of the lists of tiles, and of inputs that have to be padded."""
    B, T, S, N, K, H, Hv = call.sizes
    rows, columns = -(-T // TILE[0]), -(-S // TILE[1])
    lists = 4 * B * N * rows * columns if call.mask is not None else 0
    padded = 0
    if (_width(H), _width(Hv)) != (H, Hv) or T % TILE[0] or S % TILE[1]:
        numbers = B * rows * TILE[0] * N * _width(H)
        numbers += B * columns * TILE[1] * K * (_width(H) + _width(Hv))
        padded = numbers * jnp.dtype(call.query.dtype).itemsize
    return int(4 * B * T * N + lists + padded)


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
    """The tile asked for, or that of the map that came along, if it suits, or what suits."""
    if tile is None and known is not None and all(n in (64, 128) for n in known.tile):
        tile = known.tile
    if tile is None:
        tile = 64 if call.sizes.T <= 64 else TILE[0], 64 if call.sizes.S <= 64 else TILE[1]
    return tile


# --- forward --------------------------------------------------------------------------------------


def forward(interpret: bool, config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    from . import kernels

    z = _extents(config, x)
    arrays = _arrays(config, z, x, transposed=False)
    out, lse = kernels.forward(config, interpret, z, arrays)
    B, T, K, G, _ = x.query.shape
    out = out[:, :T, :, : x.value.shape[-1]].reshape(B, T, K, G, -1).astype(x.query.dtype)
    return out, lse[:, :, :T].reshape(B, K, G, T).transpose(0, 3, 1, 2)


def _extents(config: Config, x: Inputs) -> Extents:
    from .parts import Extents

    B, T, K, G, H = x.query.shape
    _, S, _, Hv = x.value.shape
    tq, tk = config.tile
    return Extents(
        B,
        K * G,
        K,
        -(-T // tq) * tq,
        -(-S // tk) * tk,
        _width(H),
        _width(Hv),
        S,
        tq,
        tk,
        jnp.dtype(config.dtype),
    )


def _width(n: int) -> int:
    return next(width for width in WIDTHS if n <= width)


def _arrays(config: Config, z: Extents, x: Inputs, transposed: bool) -> Arrays:
    """What kernels are given: heads in one axis, whole tiles, lists of rows of tiles or of columns.

    `transposed` for the kernel whose tiles have keys as rows.
    """
    from .parts import Arrays
    from .tiles import stored

    def operands(kinds: Sequence[str], arrays: Sequence[Array]) -> tuple[Array, ...]:
        along = {"row": {2: z.T}, "column": {2: z.S}, "head": {}, "grid": {2: z.T, 3: z.S}}
        given = []
        for kind, array in zip(kinds, arrays, strict=True):
            # Edges repeat values that are there, which scores can take.
            array = _padded(stored(kind, _flat(array)), along[kind], "edge")
            given.append(jnp.swapaxes(array, 2, 3) if transposed and kind == "grid" else array)
        return tuple(given)

    dropout: tuple[Array, ...] = ()
    if config.dropout:
        *words, rate = x.dropout
        scale = base.kept_scale(rate, jnp.float32)
        dropout = operands(("row", "row", "column", "head", "head"), [*words, rate, scale])
    tiles, counts = _lists(z, x.states, transposed)
    return Arrays(
        _matrix(z, x.query, z.T, z.H),
        _matrix(z, x.key, z.S, z.H),
        _matrix(z, x.value, z.S, z.Hv),
        x.scale.astype(jnp.float32),
        tiles,
        counts,
        () if config.mask is None else operands(config.mask.kinds, x.mask),
        () if config.score is None else operands(config.score.kinds, x.score),
        dropout,
    )


def _matrix(z: Extents, array: Array, length: int, width: int) -> Array:
    """`[B, T, .., H]` as `[B, length, heads, width]`."""
    heads = array.reshape(*array.shape[:2], -1, array.shape[-1])
    return _padded(heads.astype(z.dtype), {1: length, 3: width}, "constant")


def _padded(array: Array, lengths: dict[int, int], mode: str) -> Array:
    widths = [(0, lengths.get(axis, n) - n) for axis, n in enumerate(array.shape)]
    return jnp.pad(array, widths, mode=mode) if any(after for _, after in widths) else array


def _flat(array: Array) -> Array:
    """`[B|1, K|1, G|1, ...]` as `[B|1, N|1, ...]`: one of a head's extents may be 1 by sharding."""
    b, k, g, *rest = array.shape
    return array.reshape(b, k * g, *rest)


def _lists(
    z: Extents, states: Int[Array, "..."] | None, transposed: bool
) -> tuple[Int[Array, "b n rows columns"], Int[Array, "b n rows 2"]]:
    """For each row of tiles the PARTIAL ones, then the FULL ones, and how many of each."""
    # Queries beyond the last are made harmless; the mask says nothing of keys beyond theirs.
    found = tile_lists.states_of(states, (z.tq, z.tk), (z.tq, z.tk), z.T, z.keys)
    tile, ends = tile_lists.rows(jnp.swapaxes(found, 3, 4) if transposed else found)
    counts = jnp.diff(ends, axis=-1, prepend=jnp.zeros_like(ends[..., :1]))
    return _flat(tile), _flat(counts)


# --- backward -------------------------------------------------------------------------------------


def backward(
    interpret: bool,
    config: Config,
    groups: int,
    x: Inputs,
    out: Float[Array, "B T K G Hv"],
    lse: Float[Array, "B T K G"],
    d_out: Float[Array, "B T K G Hv"],
    d_lse: Float[Array, "B T K G"],
) -> Gradients:
    """Cotangents of the inputs, by a kernel over rows of tiles and one over columns."""
    from . import kernels
    from .parts import Backward
    from .tiles import learns

    z = _extents(config, x)
    B, T, K, G, H = x.query.shape
    _, S, _, Hv = x.value.shape
    wide = jnp.float32

    # Queries that take no part: of so large an LSE every weight is 0.
    delta = (d_out.astype(wide) * out.astype(wide)).sum(-1) - d_lse
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse * math.log2(math.e))
    lines = jnp.stack([far, delta]).transpose(1, 3, 4, 0, 2).reshape(B, K * G, 2, T)
    beyond = jnp.full((B, K * G, 1, z.T - T), jnp.inf, wide)
    beyond = jnp.concatenate([beyond, jnp.zeros_like(beyond)], 2)
    more = Backward(_matrix(z, d_out, z.T, z.Hv), jnp.concatenate([lines, beyond], 3))

    by_rows, by_columns = (_arrays(config, z, x, transposed) for transposed in (False, True))
    dq, row_sums = kernels.d_query(config, interpret, z, by_rows, more)
    dk, dv, column_sums = kernels.d_keys(config, interpret, z, by_columns, more)

    dq = dq[:, :T, :, :H].reshape(x.query.shape)
    d_scale = (x.query.astype(wide) * dq).sum((1, 2, 3, 4))
    score: list[Array | None] = [None] * len(x.score)
    for n in learns(config.score):
        assert config.score is not None
        kind, like = config.score.kinds[n], x.score[n]
        total = (column_sums if kind == "column" else row_sums).pop(0)
        total = total[..., :S] if kind == "column" else total[..., :T]
        if kind == "head":
            total = total.sum(-1)
        total = total.reshape(B, K, G, *total.shape[2:])
        total = total.sum([axis for axis in (1, 2) if like.shape[axis] == 1], keepdims=True)
        if like.shape[0] == 1:
            total = total.reshape(groups, -1, *total.shape[1:]).sum(1)
        score[n] = total.astype(like.dtype)
    return Gradients(
        (dq * x.scale.reshape(-1, 1, 1, 1, 1)).astype(x.query.dtype),
        dk[:, :S, :, :H].astype(x.key.dtype),
        dv[:, :S, :, :Hv].astype(x.value.dtype),
        d_scale,
        tuple(score),
    )


ENGINE = Engine(partial(forward, False), partial(backward, False))
# The same kernels where there is no GPU, much slower; it also looks for races.
INTERPRETED = Engine(partial(forward, True), partial(backward, True))

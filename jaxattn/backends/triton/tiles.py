"""What a Triton kernel knows of a tile: its size, operands, mask, score and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ...mesh import varying
from ...shapes import Array
from ...tracing.pointwise import pointwise
from ...tracing.program import Program
from .. import base
from ..problem import Config, Inputs, Residue

LOG2E = math.log2(math.e)

# --- sizes ----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Queries and keys of a tile, warps of a program, and loads that are under way at a time."""

    tq: int
    tk: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """The tiles of each kind of kernel."""

    forward: Block
    queries: Block
    keys: Block
    tables: Block


# By bytes of a number and by head dimension, rounded up. Defaults, not measured on hardware yet:
# from what an H100's assembler says of spilled registers: with JAX 0.12 nothing, for plain masks in
# 16 bits. True float32 products run on the ordinary units, whose factors fill the registers:
# some spill from 128 on.
_BLOCKS: dict[tuple[int, int], Blocks] = {
    (2, 64): Blocks(
        Block(128, 64, 8, 3), Block(64, 64, 4, 3), Block(64, 64, 8, 3), Block(64, 64, 8, 2)
    ),
    (2, 128): Blocks(
        Block(128, 64, 8, 2), Block(64, 64, 8, 2), Block(32, 64, 8, 2), Block(64, 64, 8, 2)
    ),
    (2, 256): Blocks(
        Block(64, 64, 8, 2), Block(32, 32, 8, 2), Block(32, 32, 8, 2), Block(32, 32, 8, 2)
    ),
    (4, 64): Blocks(
        Block(64, 32, 8, 2), Block(32, 32, 8, 2), Block(32, 32, 8, 2), Block(32, 32, 8, 2)
    ),
    (4, 128): Blocks(
        Block(32, 16, 8, 2), Block(16, 32, 8, 2), Block(32, 32, 8, 1), Block(32, 32, 8, 1)
    ),
    (4, 256): Blocks(
        Block(32, 32, 8, 1), Block(16, 16, 8, 2), Block(32, 32, 8, 1), Block(16, 16, 8, 1)
    ),
}
# Tensor cores multiply 16 x 16 at least, and blocks of Triton are powers of two.
LEAST, WIDEST = 16, 256


def width(n: int) -> int:
    """A head dimension, or a length, as blocks have them: the next power of two from 16 on."""
    return max(LEAST, 1 << (max(n, 1) - 1).bit_length())


class How(NamedTuple):
    """How kernels are run.

    Attributes:
      interpret: by JAX, on any platform, in the smallest tiles there are.
      tile: queries and keys of a tile in all kernels, powers of 2 from 16 on; None for the table's.
    """

    interpret: bool = False
    tile: tuple[int, int] | None = None


def blocks_of(how: How, H: int, Hv: int, T: int, S: int, dtype: Any) -> Blocks:
    """The tiles for these extents."""
    wide = max(64, width(max(H, Hv)))
    most_q, most_k = (LEAST, LEAST) if how.interpret else (width(T), width(S))
    fitted = []
    for block in _BLOCKS[jnp.dtype(dtype).itemsize, wide]:
        tq, tk = how.tile or (block.tq, block.tk)
        fitted.append(block._replace(tq=min(tq, most_q), tk=min(tk, most_k)))
    # Square, as those along a diagonal of the table are added up.
    side = min(fitted[-1].tq, fitted[-1].tk)
    fitted[-1] = fitted[-1]._replace(tq=side, tk=side)
    return Blocks(*fitted)


def tile_of(how: How, H: int, Hv: int, T: int, S: int, dtype: Any) -> tuple[int, int]:
    """The size of tiles whose states serve those of every kernel."""
    blocks = blocks_of(how, H, Hv, T, S, dtype)
    return min(block.tq for block in blocks), min(block.tk for block in blocks)


class Shape(NamedTuple):
    """The extents of a problem as one kernel sees them: padded to whole tiles and powers of two."""

    B: int
    T: int
    S: int
    K: int
    G: int
    H: int
    Hv: int
    Tp: int
    Sp: int
    Hp: int
    Hvp: int
    tq: int
    tk: int
    # Whether tiles are `[tk, tq]`: products of weights with queries then need no transposition.
    across: bool

    @property
    def tile(self) -> tuple[int, int]:
        """The shape of a tile of logits."""
        return (self.tk, self.tq) if self.across else (self.tq, self.tk)

    def of_queries(self, line: Array) -> Array:
        """A number for each query, as it broadcasts in a tile."""
        return line[None, :] if self.across else line[:, None]

    def of_keys(self, line: Array) -> Array:
        """A number for each key, as it broadcasts in a tile."""
        return line[:, None] if self.across else line[None, :]

    def counted(self, axis: str) -> Array:
        """0, 1, 2, ... along the queries or the keys of a tile."""
        return lax.broadcasted_iota(jnp.int32, self.tile, (axis == "keys") != self.across)

    @property
    def N(self) -> int:
        return self.K * self.G

    @property
    def ragged(self) -> bool:
        return self.Tp != self.T or self.Sp != self.S


def shape_of(x: Inputs, block: Block, across: bool = False) -> Shape:
    """The extents of a problem, up to whole tiles of a kernel's size."""
    B, T, K, G, H = x.query.shape
    _, S, _, Hv = x.value.shape
    Tp, Sp = -(-T // block.tq) * block.tq, -(-S // block.tk) * block.tk
    return Shape(B, T, S, K, G, H, Hv, Tp, Sp, width(H), width(Hv), block.tq, block.tk, across)


# --- what kernels are given -----------------------------------------------------------------------


def grown(array: Array, sizes: dict[int, int], value: Any = 0) -> Array:
    """An array with zeros, or another value, behind the ends of some axes."""
    widths = [(0, sizes.get(axis, n) - n) for axis, n in enumerate(array.shape)]
    if not any(after for _, after in widths):
        return array
    return jnp.pad(array, widths, constant_values=jnp.asarray(value, array.dtype))


def _grown_operand(z: Shape, kind: str, array: Array) -> Array:
    """An operand up to whole tiles; edges repeat values that are there, which scores can take."""
    before, after = z.Sp - z.S, z.Tp - z.T
    ends: dict[str, list[tuple[int, int]]] = {
        "row": [(0, after)],
        "column": [(0, before)],
        "grid": [(0, after), (0, before)],
        "diagonal": [(before, after)],
        # A scalar of each head is read as the one element of a vector.
        "head": [(0, 0)],
    }
    if kind == "head":
        array = array[..., None]
    widths = [(0, 0)] * 3 + ends[kind]
    return jnp.pad(array, widths, mode="edge") if z.ragged and any(map(any, widths)) else array


def given_to(config: Config, z: Shape, x: Inputs) -> dict[str, Any]:
    """The arrays that every kernel reads, whole: `[B, Tp, K, G, Hp]` and so on."""

    def operands(residue: Residue | None, arrays: Sequence[Array]) -> tuple[Array, ...]:
        kinds = () if residue is None else residue.kinds
        return tuple(_grown_operand(z, c, a) for c, a in zip(kinds, arrays, strict=True))

    dropout = x.dropout
    if dropout:
        kinds = ("row", "row", "column", "head")
        dropout = tuple(_grown_operand(z, c, a) for c, a in zip(kinds, dropout, strict=True))
    return {
        "q": grown(x.query, {1: z.Tp, 4: z.Hp}),
        "k": grown(x.key, {1: z.Sp, 3: z.Hp}),
        "v": grown(x.value, {1: z.Sp, 3: z.Hvp}),
        "scale": x.scale,
        "mask": operands(config.mask, x.mask),
        "score": operands(config.score, x.score),
        "dropout": dropout,
    }


class Cotangents(NamedTuple):
    """What the backward kernels read beside the inputs; rows that see nothing have lse inf."""

    d_out: Array  # [B, T, K, G, Hv]
    lse: Array  # [B, K, G, T], in powers of 2
    delta: Array  # [B, K, G, T]

    def given(self, z: Shape) -> dict[str, Array]:
        return {
            "do": grown(self.d_out, {1: z.Tp, 4: z.Hvp}),
            "lse": grown(self.lse, {3: z.Tp}, jnp.inf),
            "delta": grown(self.delta, {3: z.Tp}),
        }


class Head(NamedTuple):
    """Batch row, key head and query head of its group."""

    b: Any
    k: Any
    g: Any


def own_of(ref: Any, at: Head) -> tuple[Any, ...]:
    """Where a head's part is in an array `[B|1, K|1, G|1, ...]`."""
    return tuple(0 if n == 1 else i for n, i in zip(ref.shape[:3], at, strict=True))


def part_of(z: Shape, kind: str, ref: Any, at: Head, i: Any, j: Any) -> Array:
    """A tile's part of an operand, as it broadcasts to the tile: a line, a tile, or a scalar."""
    own = own_of(ref, at)
    rows, columns = pl.ds(i * z.tq, z.tq), pl.ds(j * z.tk, z.tk)
    match kind:
        case "row":
            return z.of_queries(ref[(*own, rows)])
        case "column":
            return z.of_keys(ref[(*own, columns)])
        case "grid":
            part = ref[(*own, rows, columns)]
            return part.T if z.across else part
        case "diagonal":
            away = z.counted("queries") - z.counted("keys")
            return ref[(*own, away + (i * z.tq - j * z.tk + (z.Sp - 1)))]
    return ref[(*own, 0)]


def parts_of(z: Shape, residue: Residue, refs: Any, at: Head, i: Any, j: Any) -> list[Array]:
    """A tile's parts of a residue's operands, as they broadcast to the tile."""
    return [part_of(z, c, ref, at, i, j) for c, ref in zip(residue.kinds, refs, strict=True)]


def _evaluated(residue: Residue, *tiles: Array) -> Array:
    return pointwise(residue.program, tiles, [0] * len(tiles))


def visible(config: Config, z: Shape, refs: Any, at: Head, i: Any, j: Any) -> Array:
    """The mask on a tile, False beyond the ends."""
    shown = None
    if config.mask is not None:
        found = _evaluated(config.mask, *parts_of(z, config.mask, refs["mask"], at, i, j))
        shown = jnp.broadcast_to(found, z.tile)
    for axis, left, ragged in (
        ("queries", z.T - i * z.tq, z.Tp != z.T),
        ("keys", z.S - j * z.tk, z.Sp != z.S),
    ):
        if ragged:
            within = z.counted(axis) < left
            shown = within if shown is None else shown & within
    assert shown is not None
    return shown


def dropped(z: Shape, refs: Any, at: Head, i: Any, j: Any, weights: Array) -> Array:
    """Weights, or their cotangents, after dropout."""
    kinds = ("row", "row", "column", "head")
    first, second, k, rate = (
        part_of(z, c, ref, at, i, j) for c, ref in zip(kinds, refs["dropout"], strict=True)
    )
    factor = base.kept_scale(rate, weights.dtype)
    return jnp.where(base.keeps((first, second), k, rate), weights * factor, 0)


def dot(config: Config, a: Array, b: Array, ca: int, cb: int) -> Array:
    """The product of two matrices over axis `ca` of one and `cb` of the other, in float32."""
    precision = lax.Precision.HIGHEST if config.precision is None else config.precision
    return lax.dot_general(
        a, b, (((ca,), (cb,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def scored(config: Config, parts: Sequence[Array], logits: Array) -> Array:
    """The score of the logits of a tile, in their shape and dtype."""
    assert config.score is not None
    found = _evaluated(config.score, logits, *parts)
    return jnp.broadcast_to(found, logits.shape).astype(logits.dtype)


def over_list(refs: Any, at: Head, row: Any, step: Any, carry: Any, masked: bool) -> Any:
    """Runs `step(masked, tile, carry)` over the list of a row of tiles."""
    own = (*own_of(refs["tile"], at), row)
    middle, end = refs["ends"][(*own, 0)], refs["ends"][(*own, 1)]

    def loop(masked: bool, first: Any, last: Any, carry: Any) -> Any:
        return lax.fori_loop(
            first, last, lambda n, c: step(masked, refs["tile"][(*own, n)], c), carry
        )

    if masked:
        carry = loop(True, jnp.int32(0), middle, carry)
    return loop(False, middle, end, carry)


def has_masks(config: Config, z: Shape) -> bool:
    """Whether there are tiles that need a mask."""
    return config.mask is not None or z.ragged


def launch(
    kernel: Callable[..., None], name: str, interpret: bool, block: Block,
    grid: tuple[int, ...], given: dict[str, Any], outs: Sequence[tuple[Any, Any, Any, Any]],
) -> tuple[Array, ...]:  # fmt: skip
    """Runs a kernel; `outs` are shapes, dtypes, blocks and index maps of its results."""
    axes = varying(given["q"])
    like = jax.typeof(given["q"])
    kinds = {"manual_axis_type": like.manual_axis_type} if axes and hasattr(like, "mat") else {}
    if axes and not kinds:
        kinds = {"vma": axes}
    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=(jax.tree.map(lambda _: pl.BlockSpec(), given),),
        out_specs=tuple(pl.BlockSpec(cut, at) for _, _, cut, at in outs),
        out_shape=tuple(jax.ShapeDtypeStruct(s, d, **kinds) for s, d, _, _ in outs),
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
        name=f"jaxattn_{name}",
    )
    return tuple(run(given))


def programs(z: Shape) -> tuple[Any, Head]:
    """The tile and the head of a program in a grid `[tiles, N, B]`."""
    i, n, b = (pl.program_id(axis) for axis in range(3))
    k, g = (n, jnp.int32(0)) if z.G == 1 else (lax.div(n, z.G), lax.rem(n, z.G))
    return i, Head(b, k, g)


# --- what kernels can compute ---------------------------------------------------------------------

# What Pallas can give Triton of the operations on numbers, in JAX 0.10 already.
_KNOWN = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh broadcast_in_dim cbrt ceil clamp
    convert_element_type cos cosh custom_jvp_call div eq erf_inv exp exp2 expm1 floor ge gt
    integer_pow is_finite jit le log log1p logistic lt max min mul ne neg nextafter not
    one_minus_square or pow reduce_sum rem reshape rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square squeeze stop_gradient sub tan tanh xor
    """.split()  # noqa: SIM905
)


@lru_cache(maxsize=1024)
def unknown(program: Program, learns: bool) -> tuple[str, ...]:
    """The operations of a residue, or of its derivative where it `learns`, that kernels lack."""
    structs = [jax.ShapeDtypeStruct(*program.types[ref]) for ref in program.inputs]
    floats = [n for n, s in enumerate(structs) if jnp.issubdtype(s.dtype, jnp.floating)]

    def slopes(*args: Any) -> Any:
        def of(*some: Any) -> Any:
            given = dict(zip(floats, some, strict=True))
            return program(*(given.get(n, arg) for n, arg in enumerate(args)))

        out, pull = jax.vjp(of, *(args[n] for n in floats))
        return out, pull(out)

    return tuple(sorted(_names(jax.make_jaxpr(slopes if learns else program)(*structs)) - _KNOWN))


def _names(jaxpr: Any) -> set[str]:
    names: set[str] = set()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        names.add(eqn.primitive.name)
        for param in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(getattr(param, "jaxpr", param), "eqns"):
                names |= _names(param)
    return names

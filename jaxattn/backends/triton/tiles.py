"""What a Triton kernel knows of a tile: its size, operands, mask, score and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ...mesh import varying
from ...shapes import Array
from ...tracing.dependence import Kind
from ...tracing.program import Program
from ...tracing.split import along
from .. import base
from ..flash.operands import head_index, padded, padded_operand
from ..flash.tile_sizes import TileSizes
from ..problem import DROPOUT, Config, Inputs

# --- sizes ----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Queries and keys of a tile, warps of a program, and the number of loads at the same time."""

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


# By bytes of a number and by head dimension, rounded up. These are defaults that have not been
# measured on hardware yet. They are chosen by the registers that an H100's assembler spills: with
# JAX 0.12 none, for plain masks in 16 bits. True float32 products run on the ordinary units, whose
# factors fill the registers: some spill from a head dimension of 128 on.
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
    """The next power of two, at least 16: what blocks round head dimensions and lengths up to."""
    return max(LEAST, 1 << (max(n, 1) - 1).bit_length())


class KernelOptions(NamedTuple):
    """How kernels are run.

    Attributes:
      interpret: by JAX, on any platform, in tiles of 16 x 16.
      tile: queries and keys of a tile in all kernels, powers of 2 of at least 16; None for those
        of the table of blocks.
    """

    interpret: bool = False
    tile: tuple[int, int] | None = None


def blocks_of(options: KernelOptions, H: int, Hv: int, T: int, S: int, dtype: Any) -> Blocks:
    """The tiles for these extents."""
    wide = max(64, width(max(H, Hv)))
    most_q, most_k = (LEAST, LEAST) if options.interpret else (width(T), width(S))
    fitted = []
    for block in _BLOCKS[jnp.dtype(dtype).itemsize, wide]:
        tq, tk = options.tile or (block.tq, block.tk)
        fitted.append(block._replace(tq=min(tq, most_q), tk=min(tk, most_k)))
    # Square, as those along a diagonal of the table are added up.
    side = min(fitted[-1].tq, fitted[-1].tk)
    fitted[-1] = fitted[-1]._replace(tq=side, tk=side)
    return Blocks(*fitted)


def tile_of(options: KernelOptions, H: int, Hv: int, T: int, S: int, dtype: Any) -> tuple[int, int]:
    """The size of tiles from whose states those of every kernel's tiles follow."""
    blocks = blocks_of(options, H, Hv, T, S, dtype)
    return min(block.tq for block in blocks), min(block.tk for block in blocks)


@dataclass(frozen=True)
class KernelSizes(TileSizes):
    """The sizes of a problem, and of the tiles of one kernel.

    Attributes:
      across: whether a tile of logits is `[tk, tq]`. Products of weights with queries then need no
        transposition.
    """

    across: bool

    @classmethod
    def chosen(cls, x: Inputs, block: Block, across: bool = False) -> KernelSizes:
        """The sizes for a kernel with such blocks."""
        return cls.of(x, (block.tq, block.tk), across=across)

    @property
    def Hp(self) -> int:
        """The width of blocks of queries and keys."""
        return width(self.H)

    @property
    def Hvp(self) -> int:
        """The width of blocks of values."""
        return width(self.Hv)

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
        """0, 1, 2, ... along the "queries" or the "keys" of a tile."""
        return lax.broadcasted_iota(jnp.int32, self.tile, (axis == "keys") != self.across)


# --- what kernels are given -----------------------------------------------------------------------


def given_to(config: Config, sizes: KernelSizes, x: Inputs) -> dict[str, Any]:
    """The arrays that every kernel reads, whole: `[B, Tp, K, G, Hp]` and so on."""

    def operands(kinds: Sequence[Kind], arrays: Sequence[Array]) -> tuple[Array, ...]:
        # A number of each head is read as the one element of a vector.
        return tuple(
            array[..., None] if kind == "head" else padded_operand(sizes, kind, array)
            for kind, array in zip(kinds, arrays, strict=True)
        )

    query, key, value = (array.astype(config.dtype) for array in (x.query, x.key, x.value))
    return {
        "q": padded(query, {1: sizes.Tp, 4: sizes.Hp}),
        "k": padded(key, {1: sizes.Sp, 3: sizes.Hp}),
        "v": padded(value, {1: sizes.Sp, 3: sizes.Hvp}),
        "scale": x.scale,
        "mask": () if config.mask is None else operands(config.mask.kinds, x.mask),
        "score": operands(config.kinds, x.score),
        "dropout": operands(DROPOUT if x.dropout else (), x.dropout),
    }


class Cotangents(NamedTuple):
    """What the backward kernels read beside the inputs; see `Engine`."""

    d_out: Array  # [B, T, K, G, Hv]
    lse: Array  # [B, K, G, T], in powers of 2
    delta: Array  # [B, K, G, T]
    columns: list[Array]  # of those that are means, [B, K, G, T]

    def given(self, sizes: KernelSizes) -> dict[str, Any]:
        """The arrays for whole tiles; queries beyond the end take no part."""
        return {
            "do": padded(self.d_out, {1: sizes.Tp, 4: sizes.Hvp}),
            "lse": padded(self.lse, {3: sizes.Tp}, math.inf),
            "delta": padded(self.delta, {3: sizes.Tp}),
            "columns": [padded(column, {3: sizes.Tp}) for column in self.columns],
        }


class Head(NamedTuple):
    """Batch row, key head and query head of its group."""

    b: Any
    k: Any
    g: Any


class KernelTile(NamedTuple):
    """A tile of a kernel: what is read and evaluated there.

    Attributes:
      config, sizes: of the problem.
      refs: the arrays of `given_to`, and what a kernel adds to them.
      at: the batch row and heads.
      i, j: the number of the tile of queries, and of the tile of keys.
    """

    config: Config
    sizes: KernelSizes
    refs: Any
    at: Head
    i: Any
    j: Any

    @property
    def queries(self) -> Any:
        """The tile's queries, as an index."""
        return pl.ds(self.i * self.sizes.tq, self.sizes.tq)

    @property
    def keys(self) -> Any:
        """The tile's keys, as an index."""
        return pl.ds(self.j * self.sizes.tk, self.sizes.tk)

    def of_queries(self, name: str) -> Array:
        """The tile's rows of an array `[B, Tp, K, G, width]`."""
        return self.refs[name][self.at.b, self.queries, self.at.k, self.at.g, :]

    def of_keys(self, name: str) -> Array:
        """The tile's rows of an array `[B, Sp, K, width]`."""
        return self.refs[name][self.at.b, self.keys, self.at.k, :]

    def line(self, ref: Any) -> Array:
        """The numbers of the tile's queries in an array `[B, K, G, Tp]`."""
        found: Array = ref[self.at.b, self.at.k, self.at.g, self.queries]
        return found

    def scale(self) -> Any:
        """The scale of the logits."""
        scale = self.refs["scale"]
        return scale[0 if scale.shape[0] == 1 else self.at.b]

    def parts(self, kinds: Sequence[Kind], name: str) -> list[Array]:
        """The tile's parts of operands, as they broadcast to the tile."""
        pairs = zip(kinds, self.refs[name], strict=True)
        return [self._part(kind, ref) for kind, ref in pairs]

    def _part(self, kind: Kind, ref: Any) -> Array:
        sizes, head = self.sizes, head_index(ref.shape, *self.at)
        if kind == "head":
            return ref[(*head, 0)]
        if kind == "diagonal":
            away = sizes.counted("queries") - sizes.counted("keys")
            return ref[(*head, away + (self.i * sizes.tq - self.j * sizes.tk + (sizes.Sp - 1)))]
        part = ref[(*head, *along(kind, self.queries, self.keys, None))]
        if kind == "grid":
            return part.T if sizes.across else part
        return sizes.of_queries(part) if kind == "row" else sizes.of_keys(part)

    def visible(self) -> Array:
        """The mask on the tile, False beyond the ends."""
        config, sizes, shown = self.config, self.sizes, None
        if config.mask is not None:
            found = config.mask.evaluated(*self.parts(config.mask.kinds, "mask"))
            shown = jnp.broadcast_to(found, sizes.tile)
        for axis, left, ragged in (
            ("queries", sizes.T - self.i * sizes.tq, sizes.Tp != sizes.T),
            ("keys", sizes.S - self.j * sizes.tk, sizes.Sp != sizes.S),
        ):
            if ragged:
                within = sizes.counted(axis) < left
                shown = within if shown is None else shown & within
        assert shown is not None
        return shown

    def dropped(self, weights: Array) -> Array:
        """Weights, or their cotangents, after dropout."""
        first, second, k, rate = self.parts(DROPOUT, "dropout")
        factor = base.kept_scale(rate, weights.dtype)
        # A factor, so that dropping a weight of NaN does not hide it.
        return weights * jnp.where(base.keeps((first, second), k, rate), factor, 0)


def dot(config: Config, a: Array, b: Array, ca: int, cb: int) -> Array:
    """The product of two matrices over axis `ca` of one and `cb` of the other, in float32."""
    precision = lax.Precision.HIGHEST if config.precision is None else config.precision
    return lax.dot_general(
        a, b, (((ca,), (cb,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def over_list(refs: Any, at: Head, row: Any, step: Any, carry: Any, masked: bool) -> Any:
    """Runs `step(masked, tile, carry)` over the list of a row of tiles."""
    own = (*head_index(refs["tile"].shape, *at), row)
    middle, end = refs["ends"][(*own, 0)], refs["ends"][(*own, 1)]

    def loop(masked: bool, first: Any, last: Any, carry: Any) -> Any:
        return lax.fori_loop(
            first, last, lambda n, c: step(masked, refs["tile"][(*own, n)], c), carry
        )

    if masked:
        carry = loop(True, jnp.int32(0), middle, carry)
    return loop(False, middle, end, carry)


def has_masks(config: Config, sizes: KernelSizes) -> bool:
    """Whether there are tiles that need a mask."""
    return config.mask is not None or sizes.ragged


class Result(NamedTuple):
    """An array that a kernel writes, the block of one program, and where that is."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    where: Callable[..., tuple[Any, ...]]


def launch(
    kernel: Callable[..., None],
    name: str,
    options: KernelOptions,
    block: Block,
    grid: tuple[int, ...],
    given: dict[str, Any],
    results: Sequence[Result],
) -> tuple[Array, ...]:
    """Runs a kernel: a program for each place of a grid."""
    axes = varying(given["q"])
    like = jax.typeof(given["q"])
    kinds = {"manual_axis_type": like.manual_axis_type} if axes and hasattr(like, "mat") else {}
    if axes and not kinds:
        kinds = {"vma": axes}
    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=(jax.tree.map(lambda _: pl.BlockSpec(), given),),
        out_specs=tuple(pl.BlockSpec(r.block, r.where) for r in results),
        out_shape=tuple(jax.ShapeDtypeStruct(r.shape, r.dtype, **kinds) for r in results),
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=options.interpret,
        name=f"jaxattn_{name}",
    )
    return tuple(run(given))


def programs(sizes: KernelSizes) -> tuple[Any, Head]:
    """The tile and the head of a program in a grid `[tiles, N, B]`."""
    i, n, b = (pl.program_id(axis) for axis in range(3))
    k, g = (n, jnp.int32(0)) if sizes.G == 1 else (lax.div(n, sizes.G), lax.rem(n, sizes.G))
    return i, Head(b, k, g)


# --- what kernels can compute ---------------------------------------------------------------------

# The operations on numbers that Pallas can lower to Triton, from JAX 0.10 on.
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
    """The operations that kernels lack, of a residue, and of its derivative where it `learns`."""
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

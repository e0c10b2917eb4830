"""What the Mosaic kernels are made of: buffers filled ahead, matrix products, masks and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...shapes import Array
from ...tracing.program import Program
from .. import base
from ..problem import Config
from .tiles import WGMMA, Operands, evaluate, held, learns, parts, plgpu, scored

# Rows that a warpgroup computes: as many as one wgmma instruction does.
ROWS = 64

# Keys (in the kernel of dK and dV: queries) of a step of the backward: as many as leave registers
# for two accumulators of 128 columns, or nearly.
STEP = 64

# Bytes of shared memory that a block may have, less those of barriers and reductions.
SHARED = 227 * 1024 - 8 * 1024

# The deepest that loading runs ahead.
DEEPEST = 4

LOG2E = math.log2(math.e)
LOW = float("-inf")


class Extents(NamedTuple):
    """The extents of a problem; those of arrays are whole tiles."""

    B: int
    N: int
    K: int
    T: int
    S: int
    H: int
    Hv: int
    # Keys that there are.
    keys: int
    tq: int
    tk: int
    dtype: Any

    @property
    def groups(self) -> tuple[int, int]:
        """Warpgroups that compute, by rows of queries and by rows of keys."""
        return self.tq // ROWS, self.tk // ROWS


class Arrays(NamedTuple):
    """What kernels are given, in global memory.

    Attributes:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`.
      scale: `[B|1]`.
      tiles: for each row of tiles, the columns of the PARTIAL ones, then of the FULL ones.
      counts: how many of each.
      mask, score, dropout: operands, `[B|1, N|1, ...]`.
    """

    query: Any
    key: Any
    value: Any
    scale: Any
    tiles: Any
    counts: Any
    mask: Any
    score: Any
    dropout: Any


class Backward(NamedTuple):
    """What the backward is given more.

    Attributes:
      d_out: `[B, T, N, Hv]`.
      lines: `[B, N, 2, T]`: the LSE as an exponent of 2, and what is taken from d_p.
    """

    d_out: Any
    lines: Any


# --- memory and matrix products -------------------------------------------------------------------


def buffer(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices, as wgmma and the copy engine want them."""
    wide = 128 // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def products(*factors: tuple[Any, Any]) -> list[Array]:
    """`a @ b` of pairs of matrices in shared memory, all under way at once."""

    def fresh(*outs: Any) -> list[Array]:
        for out, (a, b) in zip(outs, factors, strict=True):
            plgpu.wgmma(out, a, b)
        return [out[...] for out in outs]

    shapes = [(a.shape[0], b.shape[1]) for a, b in factors]
    return pl.run_scoped(fresh, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def added(interpret: bool, *sums: tuple[Array, Any, Any]) -> list[Array]:
    """`acc + a @ b` of triples, all under way at once; `a` in registers or in shared memory."""
    if interpret:
        # Accumulators that start with a value are what the interpreter does not know. A plain read
        # has to be committed before a copy may write there; that of a wgmma does not.
        results = [
            acc + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for acc, a, b in sums
        ]
        plgpu.commit_smem()
        return results

    def add(outs: Any) -> None:
        for out, (_, a, b) in zip(outs, sums, strict=True):
            plgpu.wgmma(out, a, b)

    return pl.run_state(add)([plgpu.ACC.init(acc) for acc, _, _ in sums])


class Ring(NamedTuple):
    """Buffers that are filled and used in turn.

    Attributes:
      buffers: each `[stages, ...]`.
      ready: a barrier for each stage, at which every copy arrives.
      free: a barrier for each stage, at which every computing warpgroup arrives.
    """

    buffers: Any
    ready: Any
    free: Any

    def fill(self, n: Any, *sources: Any) -> None:
        """Loads what step n needs, as soon as there is room."""
        stages = self.ready.shape[0]
        slot = lax.rem(n, jnp.int32(stages))

        @pl.when(n >= stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for source, into in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, into.at[slot], self.ready.at[slot])

    def take(self, n: Any) -> list[Any]:
        """What was loaded for step n, once it is there."""
        slot = lax.rem(n, jnp.int32(self.ready.shape[0]))
        plgpu.barrier_wait(self.ready.at[slot])
        return [each.at[slot] for each in self.buffers]

    def release(self, n: Any) -> None:
        """This warpgroup needs what was loaded for step n no more."""
        plgpu.barrier_arrive(self.free.at[lax.rem(n, jnp.int32(self.ready.shape[0]))])

    def drain(self, total: Any) -> None:
        """Waits until all that was loaded has been used: no barrier ends with news unheard."""
        stages = self.ready.shape[0]
        for last in range(1, stages + 1):
            n = total - last

            @pl.when(n >= 0)
            def _(n: Any = n) -> None:
                plgpu.barrier_wait(self.free.at[lax.rem(n, jnp.int32(stages))])


def ring(stages: int, computing: int, *buffers: Any) -> Ring:
    """The scratch memory of a ring; `buffers` are the shapes of one stage."""
    return Ring(
        buffers,
        plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    )


def stages_for(fixed: int, each: int) -> int:
    """How many stages of `each` bytes fit beside `fixed` ones."""
    return min(DEEPEST, (SHARED - fixed) // each)


def zeros(*shape: int, fill: float = 0) -> Array:
    """An accumulator: a tile, or a value for each of its rows."""
    layout = WGMMA if len(shape) == 2 else WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def across(rows: Array, width: int) -> Array:
    """A value of each row, for all its columns."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], width), (0,))


def own_rows(ref: Any) -> Array:
    """Values of the rows of this warpgroup, from global memory."""
    return plgpu.load(ref, layout=WGMMA.reduce(1), optimized=False)


def put(ref: Any, value: Array) -> None:
    """Stores a tile, or values of rows, in global memory."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # JAX 0.11
        ref[...] = value


def columns(ref: Any, shape: tuple[int, ...]) -> Array:
    """A value of each column, for all its rows."""
    part = plgpu.load(ref, layout=WGMMA.reduce(0))
    return lax.broadcast_in_dim(part, shape, (1,))


def registers(computing: int, loads: bool) -> None:
    """Takes registers from the warpgroup that loads, for two that compute; one has its fill."""
    if computing == 2:
        # 2 x 240 + 24 of the 3 x 168 that there are.
        plgpu.set_max_registers(24 if loads else 240, action="decrease" if loads else "increase")


# --- element by element ---


class Elements(NamedTuple):
    """What is computed element by element: the mask, the score and dropout, with their operands."""

    mask: tuple[Program, Operands] | None
    score: tuple[Program, Operands] | None
    dropout: Operands | None
    keys: int | None  # that there are, if they end within a tile
    rows: str

    @classmethod
    def of(cls, config: Config, z: Extents, rows: str, slopes: bool) -> Elements:
        """For a kernel whose tiles have queries (`"row"`) or keys (`"column"`) as their rows."""

        def told(residue: Any, skip: int) -> Operands:
            program = residue.program
            types = tuple(program.types[ref].dtype for ref in program.inputs[skip:])
            return Operands(residue.kinds, types, rows)

        mask, score = config.mask, config.score
        words = (jnp.uint32, jnp.uint32, jnp.int32, jnp.float32, jnp.float32)
        return cls(
            None if mask is None else (mask.program, told(mask, 0)),
            None if score is None else (scored(score, slopes), told(score, 1)),
            Operands(("row", "row", "column", "head", "head"), words, rows)
            if config.dropout
            else None,
            None if z.keys == z.S else z.keys,
            rows,
        )

    def at(self, x: Arrays, b: Any, h: Any, row: Any) -> Place:
        """With what stays the same for a warpgroup and a head."""

        def fixed(op: Operands | None, refs: Any) -> Any:
            return None if op is None else held(op, refs, b, h, row, ROWS)

        return Place(
            self,
            x,
            b,
            h,
            row,
            fixed(self.mask and self.mask[1], x.mask),
            fixed(self.score and self.score[1], x.score),
            fixed(self.dropout, x.dropout),
        )


class Place(NamedTuple):
    """The 64 rows that a warpgroup computes."""

    own: Elements
    x: Arrays
    b: Any
    h: Any
    row: Any
    mask: Any
    score: Any
    dropout: Any

    def _tiles(self, op: Operands, name: str, column: Any, shape: tuple[int, ...]) -> list[Array]:
        refs, fixed = getattr(self.x, name), getattr(self, name)
        return parts(op, refs, fixed, self.b, self.h, self.row, column, shape)

    def seen(self, column: Any, shape: tuple[int, ...]) -> Array | None:
        """The mask on the tile from `column` on; None where all is seen."""
        own, shown = self.own, None
        if own.mask is not None:
            program, op = own.mask
            (found,) = evaluate(program, self._tiles(op, "mask", column, shape), shape)
            shown = found if found.shape else jnp.full(shape, found)
        if own.keys is not None:
            axis = int(own.rows == "row")
            at = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)
            within = at + (column if axis else self.row) < own.keys
            shown = within if shown is None else shown & within
        return shown

    def scores(self, logits: Array, column: Any) -> list[Array]:
        """The score of logits, and what else its program computes."""
        assert self.own.score is not None
        program, op = self.own.score
        tiles = self._tiles(op, "score", column, logits.shape)
        return [
            spread_all(v, logits.shape) for v in evaluate(program, [logits, *tiles], logits.shape)
        ]

    def kept(self, column: Any, shape: tuple[int, ...]) -> Array:
        """The factors of dropout: 0, or 1 / (1 - rate)."""
        assert self.own.dropout is not None
        first, second, k, rate, scale = self._tiles(self.own.dropout, "dropout", column, shape)
        keep = base.keeps((first, second), k, rate)
        return jnp.where(keep, jnp.full(shape, scale), jnp.zeros(shape, jnp.float32))


def spread_all(value: Any, shape: tuple[int, ...]) -> Array:
    """A result that may be the same for all elements, as a tile."""
    return value if value.shape else jnp.full(shape, value)


def weights(
    place: Place,
    masked: bool,
    s: Array,
    scale: Any,
    column: Any,
    offset: Callable[[], Array] | None,
) -> tuple[Array, list[Array]]:
    """Logits as exponents of 2, or weights where there is an `offset` to subtract; slopes."""
    shown = place.seen(column, s.shape) if masked else None
    slopes: list[Array] = []
    if place.own.score is None:
        s = s * (scale * LOG2E)
    else:
        s = s * scale
        if shown is not None:
            s = jnp.where(shown, s, jnp.zeros_like(s))
        s, *slopes = place.scores(s, column)
        s = s * LOG2E
    if offset is not None:
        s = s - offset()
    if shown is not None:
        s = jnp.where(shown, s, jnp.full_like(s, LOW))
    return (s if offset is None else jnp.exp2(s)), slopes


def d_logits(
    config: Config, masked: bool, p: Array, dp: Array, keep: Array | None, slopes: list[Array],
    delta: Callable[[], Array],
) -> tuple[Array, list[Array]]:  # fmt: skip
    """Gradient of logits before the score, and the terms of that of each operand."""
    if keep is not None:
        dp = dp * keep
    ds = p * (dp - delta())
    terms = [ds * slope for slope in slopes]
    if masked or terms:
        # What is not seen may be too large for the products, or a score infinitely steep there.
        felt = p != jnp.zeros_like(p)
        ds, *terms = (jnp.where(felt, d, jnp.zeros_like(d)) for d in (ds, *terms))
    return (terms[0], terms[1:]) if terms else (ds, [])


def learned_kinds(config: Config) -> list[str]:
    """The kinds of the operands that learn."""
    return [] if config.score is None else [config.score.kinds[n] for n in learns(config.score)]


# --- loops ---


def row_of(x: Arrays, b: Any, h: Any, i: Any) -> tuple[Any, tuple[Any, Any]]:
    """The list of a row of tiles, and how many of it are PARTIAL and FULL."""
    eb, eh = x.tiles.shape[:2]
    at = b if eb != 1 else 0, h if eh != 1 else 0, i
    return x.tiles.at[at], (x.counts[(*at, 0)], x.counts[(*at, 1)])


def two_loops(counts: Any, step: Callable[..., Any], carry: Any, first: Any = 0) -> Any:
    """The PARTIAL tiles of a list, then the FULL ones: `step(masked, n, carry)`."""
    partial_, full = counts
    carry = lax.fori_loop(jnp.int32(0), partial_, partial(step, True), carry)
    return lax.fori_loop(partial_, partial_ + full, partial(step, False), carry)


def compiled(config: Config, interpret: bool, **options: Any) -> Callable[..., Any]:
    """A kernel; a score's functions are computed exactly, and so then is everything."""
    # tanh.approx has 11 bits; ex2.approx and lg2.approx are nearly exact.
    params = plgpu.CompilerParams(approx_math=config.score is None)
    how = plgpu.InterpretGPUParams(detect_races=True) if interpret else None
    return plgpu.kernel(compiler_params=params, thread_name="wg", interpret=how, **options)

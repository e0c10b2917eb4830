"""What a kernel for TPUs knows of a tile: its size, operands, mask, score and dropout.

Tiles of logits are `[tk, tq]`, keys first. Numbers of queries then lie along lanes, `[1, tq]`, as
they do in memory, and sums over keys need no exchange between lanes. Where a product wants a factor
transposed, that is a block of keys or values, never a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...mesh import varying
from ...shapes import Array
from ...tiles.tile_map import FULL, PARTIAL
from ...tracing.dependence import Kind
from .. import base
from ..flash.operands import head_index, padded, padded_operand
from ..flash.programs import SAME, evaluate, scored
from ..flash.tile_sizes import TileSizes
from ..problem import DROPOUT, Config, Inputs, Residue
from .steps import MOST, Place, SharedWalk, Walk

# --- sizes ----------------------------------------------------------------------------------------

# Queries and keys of a tile: the largest of which the backward's temporary values, a dozen arrays
# of 1 MB, fit beside what is copied in advance. Not timed.
TILE = 512, 512
# A vector register is 8 x 128 numbers of 32 bits, or 32 x 128 of 8 bits.
LANES = 128
# Queries and keys of a tile where kernels are interpreted.
INTERPRETED = 16
# The largest head dimension.
WIDEST = 256
# Of 128 MB that a core has (v5e, v5p, v6e).
VMEM = 64 * 2**20


class KernelOptions(NamedTuple):
    """How kernels are run.

    Attributes:
      interpret: by JAX on any platform, in tiles of 16 x 16: True, or the parameters of Pallas'
        interpreter for TPUs, which sees races and reads of what was never written.
      tile: queries and keys of a tile; None for the default.
    """

    interpret: Any = False
    tile: tuple[int, int] | None = None

    @property
    def least(self) -> int:
        """What lengths of tiles are multiples of."""
        return INTERPRETED if self.interpret else LANES

    @property
    def chosen(self) -> tuple[int, int]:
        """Queries and keys of a tile in long sequences."""
        return self.tile or ((INTERPRETED, INTERPRETED) if self.interpret else TILE)

    def whole(self, n: int) -> int:
        """A length rounded up to what tiles can have."""
        return -(-n // self.least) * self.least

    def sizes(self, config: Config, x: Inputs) -> KernelSizes:
        """The sizes of a problem. A tile that covers all of a length is rounded up."""
        return KernelSizes.of(x, (self.whole(config.tile[0]), self.whole(config.tile[1])))


@dataclass(frozen=True)
class KernelSizes(TileSizes):
    """The sizes of a problem, and of its tiles."""

    @property
    def tile(self) -> tuple[int, int]:
        """The shape of a tile of logits."""
        return self.tk, self.tq

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of tiles along queries and along keys."""
        return self.Tp // self.tq, self.Sp // self.tk


# --- what kernels are given -----------------------------------------------------------------------


class Given(NamedTuple):
    """An array `[B|1, heads, ..., ...]` that a kernel reads, and which block of it a tile needs.

    The kind says which: "queries" `[T, H]`, "keys" `[S, H]`, "lines" `[n, T]`; an operand "row"
    `[1, T]`, "column" `[1, S]`, "head" `[1, 1]`, "grid" `[S, T]`, and "diagonal", of which two
    blocks of `[1, T + S]` follow each other.
    """

    array: Array
    kind: str
    after: int = 0

    def spec(self, sizes: KernelSizes, place: Callable[..., Place]) -> pl.BlockSpec:
        """The block of a program; `place` takes what an index map is given."""
        *extents, height, width = self.array.shape
        tq, tk = sizes.tq, sizes.tk
        block = {
            "queries": (tq, width),
            "keys": (tk, width),
            "lines": (height, tq),
            "row": (1, tq),
            "column": (1, tk),
            "head": (1, 1),
            "grid": (tk, tq),
            "diagonal": (1, tk),
        }[self.kind]

        def where(*args: Any) -> tuple[Any, ...]:
            at = place(*args)
            head = at.k if self.kind == "keys" else at.n
            tail = {
                "queries": (at.i, 0),
                "keys": (at.j, 0),
                "lines": (0, at.i),
                "row": (0, at.i),
                "column": (0, at.j),
                "head": (0, 0),
                "grid": (at.j, at.i),
                "diagonal": (0, at.i - at.j + (sizes.counts[1] - 1 + self.after)),
            }[self.kind]
            return (*head_index(extents, at.b, head), *tail)

        return pl.BlockSpec((None, None, *block), where)


def heads_first(array: Array, length: int, dtype: Any) -> Array:
    """`[B, T, ..., H]` as `[B, heads, length, H]`."""
    whole = array.reshape(*array.shape[:2], -1, array.shape[-1]).astype(dtype)
    return padded(jnp.swapaxes(whole, 1, 2), {2: length})


def given_to(config: Config, sizes: KernelSizes, x: Inputs) -> dict[str, Any]:
    """The arrays that every kernel reads: queries, keys, values, and operands of functions."""

    def heads(array: Array, kind: str, length: int) -> Given:
        return Given(heads_first(array, length, config.dtype), kind)

    def operands(kinds: Sequence[Kind], arrays: Sequence[Array]) -> tuple[tuple[Given, ...], ...]:
        pairs = zip(kinds, arrays, strict=True)
        return tuple(_operand(sizes, kind, array) for kind, array in pairs)

    scale = x.scale.astype(jnp.float32).reshape(-1, 1, 1, 1)
    return {
        "q": heads(x.query, "queries", sizes.Tp),
        "k": heads(x.key, "keys", sizes.Sp),
        "v": heads(x.value, "keys", sizes.Sp),
        "scale": Given(scale, "head"),
        "mask": () if config.mask is None else operands(config.mask.kinds, x.mask),
        "score": operands(config.kinds, x.score),
        "dropout": operands(DROPOUT if x.dropout else (), x.dropout),
    }


def _operand(sizes: KernelSizes, kind: Kind, array: Array) -> tuple[Given, ...]:
    """An operand `[B|1, K|1, G|1, ...]` as kernels read it: booleans as integers."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.int8 if kind == "grid" else jnp.int32)
    array = padded_operand(sizes, kind, array)
    b, k, g, *rest = array.shape
    if kind == "grid":
        whole = jnp.swapaxes(array.reshape(b, k * g, *rest), 2, 3)
    else:
        whole = array.reshape(b, k * g, 1, *(rest or (1,)))
    if kind != "diagonal":
        return (Given(whole, kind),)
    whole = padded(whole, {3: sizes.Tp + sizes.Sp})
    return Given(whole, kind), Given(whole, kind, 1)


# --- a tile ---------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Logits of a tile, and what follows from them.

    Attributes:
      logits: after the score.
      functions: the values of the functions of columns; in the backward, of those that are means.
      pull: from cotangents of logits and of these functions to those of scaled products, and of
        the operands that learn, all as large as the tile.
    """

    logits: Array
    functions: list[Array]
    pull: Callable[[Array, list[Array]], tuple[Array, dict[int, Array]]]


class KernelTile(NamedTuple):
    """A tile of a kernel: what is read and evaluated there.

    Attributes:
      config, sizes: of the problem.
      refs: blocks of the arrays of `given_to`, and of what a kernel adds to them.
      at: where it is.
    """

    config: Config
    sizes: KernelSizes
    refs: Any
    at: Place

    def when_active(self, step: Callable[[bool], None]) -> None:
        """Runs `step(masked)`, unless the tile is EMPTY."""
        if self.config.mask is not None or self.sizes.Sp != self.sizes.S:
            pl.when(self.at.state == PARTIAL)(lambda: step(True))
        pl.when(self.at.state == FULL)(lambda: step(False))

    def counted(self, axis: str) -> Array:
        """0, 1, 2, ... along the "queries" or the "keys" of the tile."""
        return lax.broadcasted_iota(jnp.int32, self.sizes.tile, int(axis == "queries"))

    def _parts(self, residue_kinds: Sequence[Kind], refs: Any, types: Sequence[Any]) -> list[Array]:
        return [
            self._part(kind, own, dtype)
            for kind, own, dtype in zip(residue_kinds, refs, types, strict=True)
        ]

    def _part(self, kind: Kind, refs: Any, dtype: Any) -> Array:
        """An operand on the whole tile."""
        part = refs[0][...]
        if kind == "grid" and part.dtype == jnp.int8:
            part = part.astype(jnp.int32)
        if kind == "column":
            part = jnp.swapaxes(part, 0, 1)
        if kind == "diagonal":
            part = skewed(jnp.concatenate([part, refs[1][...]], 1), self.sizes.tile)
        part = jnp.broadcast_to(part, self.sizes.tile)
        return part != jnp.zeros_like(part) if dtype == jnp.bool_ else part

    def _evaluated(self, residue: Residue, refs: Any, logits: Array | None, slopes: bool) -> Any:
        """The results of a residue on the tile; those of a score in float32."""
        program = residue.program if logits is None else scored(residue, slopes)
        first: list[Array] = [] if logits is None else [logits]
        types = [program.types[ref].dtype for ref in program.inputs[len(first) :]]
        found = evaluate(
            program, [*first, *self._parts(residue.kinds, refs, types)], self.sizes.tile
        )
        return [jnp.broadcast_to(array, self.sizes.tile) for array in found]

    def visible(self) -> Array:
        """The mask on the tile, False beyond the last key.

        Queries beyond the last one may see keys: their results are cut off.
        """
        config, sizes, shown = self.config, self.sizes, None
        if config.mask is not None:
            (shown,) = self._evaluated(config.mask, self.refs["mask"], None, False)
        if sizes.Sp != sizes.S:
            within = self.counted("keys") < sizes.S - self.at.j * sizes.tk
            shown = within if shown is None else shown & within
        assert shown is not None
        return shown

    def scored(self, products: Array, shown: Array | None, slopes: bool) -> Scores:
        """Logits from products of queries and keys; with `slopes` for the backward."""
        config = self.config
        logits = products * self.refs["scale"][...]
        of_score, of_columns = config.split(self.refs["score"])

        def inside(logits: Array) -> Array:
            return logits if shown is None else jnp.where(shown, logits, 0.0)

        by_logit, of_operands = None, list[Array]()
        if config.score is not None:
            logits, *rest = self._evaluated(config.score, of_score, inside(logits), slopes)
            if slopes:
                by_logit, *of_operands = rest
        functions, of_functions = list[Array](), list[list[Array]]()
        for column, own in zip(config.columns, of_columns, strict=True):
            if column.mean or not slopes:
                value, *rest = self._evaluated(column.residue, own, inside(logits), slopes)
                functions.append(value)
                of_functions.append(rest)

        def pull(ds: Array, d_functions: list[Array]) -> tuple[Array, dict[int, Array]]:
            parts = list[Array]()
            d_logits = ds
            for d, (slope, *others) in zip(d_functions, of_functions, strict=True):
                d_logits = d_logits + d * slope
                parts += [d * other for other in others]
            parts = [d_logits * other for other in of_operands] + parts
            if by_logit is not None:
                d_logits = d_logits * by_logit
            if shown is not None and config.residues:
                d_logits, *parts = (jnp.where(shown, d, 0.0) for d in (d_logits, *parts))
            return d_logits, dict(zip(config.learned, parts, strict=True))

        return Scores(logits, functions, pull)

    def dropped(self, *weights: Array) -> list[Array]:
        """Weights, or their cotangents, after dropout."""
        types = (jnp.uint32, jnp.uint32, jnp.int32, jnp.float32)
        first, second, k, rate = self._parts(DROPOUT, self.refs["dropout"], types)
        # A factor, so that dropping a weight of NaN does not hide it.
        factor = jnp.where(base.keeps((first, second), k, rate), base.kept_scale(rate), 0.0)
        return [each * factor for each in weights]


def skewed(distances: Array, tile: tuple[int, int]) -> Array:
    """`[1, 2 t]` numbers of distances, from that of the first query and last key on, on a tile."""
    t, _ = tile
    wide = jnp.broadcast_to(distances, (t, 2 * t))
    return pltpu.roll(wide, 1, 1, stride=1, stride_axis=0)[:, t:]


def along_diagonals(tile: Array) -> Array:
    """The sums `[1, 2 t]` of a tile by distance: the transpose of `skewed`. `t` is a power of 2."""
    t, _ = tile.shape
    sums = jnp.concatenate([jnp.zeros_like(tile), tile], 1)
    # Row n has to move n + 1 places to the left: in halves, so that few rows are moved many times.
    for half in (t >> n for n in range(1, t.bit_length())):
        sums = sums[:half] + pltpu.roll(sums[half:], 2 * t - half, 1)
    return pltpu.roll(sums, 2 * t - 1, 1)


def dot(config: Config, a: Array, b: Array, ca: int, cb: int) -> Array:
    """The product of two matrices over axis `ca` of one and `cb` of the other, in float32."""
    precision = config.precision
    if precision is None and a.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST
    return lax.dot_general(
        a, b, (((ca,), (cb,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


# Operations that Mosaic compiles on tiles, from JAX 0.10 on.
OPERATIONS = SAME | frozenset(
    """
    abs add add_any and atan2 ceil clamp convert_element_type cos div eq erf exp exp2 expm1 floor ge
    gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not one_minus_square or pow
    rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sqrt
    square sub tan tanh xor
    """.split()  # noqa: SIM905
)

# --- running a kernel -----------------------------------------------------------------------------


class Result(NamedTuple):
    """An array that a kernel writes, and the block of a program.

    Attributes:
      shape, dtype: of the array, whose axis `rows` goes with rows of tiles.
      block: the block's shape, None for axes of which it has one element.
      where: from the program's batch row and head in the grid, and its place, to the block.
      rows: that axis, or None if programs of all rows of tiles add to the same block.
    """

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int | None, ...]
    where: Callable[[Any, Any, Place], tuple[Any, ...]]
    rows: int | None


def launch(
    kernel: Callable[[Place, Any, Any, Any], None],
    name: str,
    options: KernelOptions,
    sizes: KernelSizes,
    path: Walk | SharedWalk,
    states: Array,
    heads: tuple[int, int],
    given: dict[str, Any],
    results: Sequence[Result],
    scratch: Sequence[tuple[int, int]] = (),
) -> tuple[Array, ...]:
    """Runs `kernel(place, refs, results, scratch)` for every step of every row of tiles.

    Args:
      kernel: what one program does.
      name: of the kernel.
      options, sizes: of the kernel.
      path: how a program finds its place.
      states: of tiles by rows of tiles, `[b, heads, rows, columns]`.
      heads: the numbers of batch rows and heads of the grid.
      given: what the kernel reads.
      results: what it writes.
      scratch: the shapes of float32 arrays that it keeps from step to step.
    """
    b, h, rows, columns = states.shape
    most = min(max(MOST // (b * h * columns), 1), rows)
    path = replace(path, length=most * columns)

    def of_given(fn: Callable[[Given], Any]) -> Any:
        return jax.tree.map(fn, given, is_leaf=lambda leaf: isinstance(leaf, Given))

    arrays = of_given(lambda leaf: leaf.array)

    def where(result: Result) -> Callable[..., tuple[Any, ...]]:
        return lambda b, head, *rest: result.where(b, head, path.place(b, head, *rest))

    def body(words: Any, first: Any, refs: Any, *rest: Any) -> None:
        b, head, step, inner = (pl.program_id(axis) for axis in range(4))
        at = path.place(b, head, step, inner, words, first)
        kernel(at, refs, rest[: len(results)], rest[len(results) :])

    def struct(result: Result) -> jax.ShapeDtypeStruct:
        shape = list(result.shape)
        if result.rows is not None:
            shape[result.rows] = shape[result.rows] // rows * most
        return jax.ShapeDtypeStruct(tuple(shape), result.dtype, **_varying_as(arrays["scale"]))

    def some(first: Any, states: Array) -> tuple[Array, ...]:
        words, most_steps = path.steps(states)
        run = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(*heads, most_steps, path.inner),
                in_specs=[of_given(lambda leaf: leaf.spec(sizes, path.place))],
                out_specs=[pl.BlockSpec(result.block, where(result)) for result in results],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[struct(result) for result in results],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=VMEM,
            ),
            interpret=options.interpret,
            name=f"jaxattn_{name}",
        )
        return tuple(run(words, first.reshape(1), arrays))

    if most == rows:
        return some(jnp.int32(0), states)
    # Each call computes some rows of tiles.
    parts = -(-rows // most)
    states = padded(states, {2: parts * most}).reshape(b, h, parts, most, columns)
    firsts = jnp.arange(parts, dtype=jnp.int32) * most
    found = lax.map(lambda each: some(*each), (firsts, jnp.moveaxis(states, 2, 0)))
    return tuple(_joined(array, result) for array, result in zip(found, results, strict=True))


def _joined(parts: Array, result: Result) -> Array:
    """The results of several calls as one; rows of tiles beyond the last are cut off."""
    if result.rows is None:
        return parts.sum(0)
    whole = jnp.moveaxis(parts, 0, result.rows)
    shape = (*result.shape[: result.rows], -1, *result.shape[result.rows + 1 :])
    return lax.slice_in_dim(whole.reshape(shape), 0, result.shape[result.rows], axis=result.rows)


def _varying_as(array: Array) -> dict[str, Any]:
    """What says that a result varies over the mesh axes that an array does."""
    axes, like = varying(array), jax.typeof(array)
    if not axes:
        return {}
    return {"manual_axis_type": like.manual_axis_type} if hasattr(like, "mat") else {"vma": axes}

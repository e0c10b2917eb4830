"""A tile in a Mosaic kernel: what a kernel is given, and the mask, score and dropout of a tile.

A tile is `[rows, columns]` in the layout in which wgmma leaves its results. Its rows are queries,
or keys in the kernel of dK and dV. A number of each row is laid out as a sum over columns is, and
a number of each column as a sum over rows: broadcasting it to the tile then moves no data between
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...shapes import Array
from ...tracing.dependence import Kind
from ...tracing.program import Program
from .. import base
from ..flash.fused import LOG2E
from ..flash.operands import head_index
from ..flash.programs import evaluate, scored
from ..flash.tile_sizes import TileSizes
from ..problem import Config, Residue
from .memory import ROWS, WGMMA, across, load, plgpu

LOW = float("-inf")

# Head dimensions of matrices in shared memory; others are padded to the next.
WIDTHS = 64, 128

# The operands of dropout: those of `DROPOUT`, and `1 / (1 - rate)`.
DROPOUT: tuple[Kind, ...] = ("row", "row", "column", "head", "head")
_DROPOUT_TYPES = jnp.uint32, jnp.uint32, jnp.int32, jnp.float32, jnp.float32


def width(n: int) -> int:
    """What a head dimension is padded to."""
    return next(width for width in WIDTHS if n <= width)


@dataclass(frozen=True)
class KernelSizes(TileSizes):
    """The sizes of a problem, and of the arrays and tiles of a kernel.

    Attributes:
      dtype: of matrices.
    """

    dtype: Any

    @property
    def Hp(self) -> int:
        """The width of queries and keys in memory."""
        return width(self.H)

    @property
    def Hvp(self) -> int:
        """The width of values in memory."""
        return width(self.Hv)

    @property
    def warpgroups(self) -> tuple[int, int]:
        """The numbers of warpgroups that compute, by rows of queries and by rows of keys."""
        return self.tq // ROWS, self.tk // ROWS


class KernelInputs(NamedTuple):
    """What kernels are given, in global memory.

    Attributes:
      query, key, value: `[B, Tp, N, Hp]`, `[B, Sp, K, Hp]`, `[B, Sp, K, Hvp]`.
      scale: `[B|1]`.
      tiles: for each row of tiles, the columns of the PARTIAL ones, then of the FULL ones.
      counts: the numbers of both.
      mask, score, dropout: operands, `[B|1, N|1, ...]`.
      columns: those of each column.
    """

    query: Any
    key: Any
    value: Any
    scale: Any
    tiles: Any
    counts: Any
    mask: Any
    score: Any
    columns: Any
    dropout: Any


class BackwardInputs(NamedTuple):
    """What the backward kernels are given beside that.

    Attributes:
      d_out: `[B, Tp, N, Hvp]`.
      lines: `[B, N, 2 + means, Tp]`, `far` and `delta` (see `Engine`), `far` in powers of
        2, and the cotangents of columns that are means.
    """

    d_out: Any
    lines: Any


def row_of(x: KernelInputs, b: Any, h: Any, i: Any) -> tuple[Any, tuple[Any, Any]]:
    """The list of a row of tiles, and the numbers of PARTIAL and FULL ones."""
    at = (*head_index(x.tiles.shape, b, h), i)
    return x.tiles.at[at], (x.counts[(*at, 0)], x.counts[(*at, 1)])


# --- operands -------------------------------------------------------------------------------------


def stored(kind: Kind, array: Array) -> Array:
    """An operand as a kernel reads it: booleans as integers, single bytes only for whole tiles."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.int8 if kind == "grid" else jnp.int32)
    return array


def _typed(part: Array, dtype: Any) -> Array:
    """A part of an operand in its dtype, before it was `stored`."""
    if dtype == jnp.bool_ and part.dtype != jnp.bool_:
        return part != jnp.zeros_like(part)
    return part


class Operands(NamedTuple):
    """The operands of a residue in global memory: what a kernel has to know to read them.

    Attributes:
      kinds: of the operands.
      dtypes: of their elements, before they were `stored`.
      rows: the kind that goes with the rows of a tile.
    """

    kinds: tuple[Kind, ...]
    dtypes: tuple[Any, ...]
    rows: str

    @classmethod
    def of(cls, residue: Residue, rows: str, first: int) -> Operands:
        """The operands of a residue; `first` is the first of its program's inputs that is one."""
        program = residue.program
        dtypes = tuple(program.types[ref].dtype for ref in program.inputs[first:])
        return cls(residue.kinds, dtypes, rows)

    def fixed(self, refs: Sequence[Any], b: Any, h: Any, row: Any) -> list[Any]:
        """The parts that are the same for all tiles of a warpgroup and a head; None for others.

        These are the operands of the warpgroup's rows, from `row` on, and of the head.
        """
        parts: list[Any] = []
        for kind, dtype, ref in zip(self.kinds, self.dtypes, refs, strict=True):
            part, head = None, head_index(ref.shape, b, h)
            if kind == "head":
                part = _typed(ref[head], dtype)
            elif kind == self.rows:
                part = _typed(load(ref.at[(*head, pl.ds(row, ROWS))], WGMMA.reduce(1)), dtype)
            parts.append(part)
        return parts

    def tiles(
        self, refs: Sequence[Any], fixed: Sequence[Any], b: Any, h: Any, row: Any, column: Any,
        shape: tuple[int, ...],
    ) -> list[Any]:  # fmt: skip
        """The operands of a tile, as `evaluate` takes them.

        Args:
          refs: the operands in global memory.
          fixed: what the method of that name returned.
          b, h: batch row and query head.
          row, column: where the tile starts.
          shape: of the tile.
        """
        rows, columns = pl.ds(row, shape[0]), pl.ds(column, shape[1])
        parts: list[Any] = []
        for kind, dtype, ref, part in zip(self.kinds, self.dtypes, refs, fixed, strict=True):
            if kind == self.rows:
                part = across(part, shape[1])
            elif kind != "head":
                grid = kind == "grid"
                at = (rows, columns) if grid else (columns,)
                layout = WGMMA if grid else WGMMA.reduce(0)
                part = _typed(load(ref.at[(*head_index(ref.shape, b, h), *at)], layout), dtype)
                part = part if grid else lax.broadcast_in_dim(part, shape, (1,))
            parts.append(part)
        return parts


def learned_kinds(config: Config) -> list[Kind]:
    """The kinds of the operands that learn."""
    return [config.kinds[n] for n in config.learned]


# --- mask, score and dropout ----------------------------------------------------------------------


class TileFunctions(NamedTuple):
    """The mask, the score, columns and dropout of a kernel, with their operands.

    Attributes:
      mask, score: programs of single elements; None without.
      columns: likewise; in the backward those that are means.
      dropout: its operands; None without.
      keys: the number of keys, if they end within a tile.
      rows: what the rows of a tile are, "row" for queries or "column" for keys.
    """

    mask: tuple[Program, Operands] | None
    score: tuple[Program, Operands] | None
    columns: tuple[tuple[Program, Operands], ...]
    dropout: Operands | None
    keys: int | None
    rows: str

    @classmethod
    def of(cls, config: Config, sizes: KernelSizes, rows: str, slopes: bool) -> TileFunctions:
        """For a kernel with such rows; in the backward, with `slopes`, with derivatives."""
        mask, score = config.mask, config.score

        def of(residue: Residue) -> tuple[Program, Operands]:
            return scored(residue, slopes), Operands.of(residue, rows, 1)

        return cls(
            None if mask is None else (mask.program, Operands.of(mask, rows, 0)),
            None if score is None else of(score),
            tuple(of(each.residue) for each in config.columns if each.mean or not slopes),
            Operands(DROPOUT, _DROPOUT_TYPES, rows) if config.dropout else None,
            None if sizes.Sp == sizes.S else sizes.S,
            rows,
        )

    def at(self, x: KernelInputs, b: Any, h: Any, row: Any) -> TileRow:
        """For the rows of one warpgroup, from `row` on, and one head."""

        def fixed(operands: Operands | None, refs: Any) -> Any:
            return None if operands is None else operands.fixed(refs, b, h, row)

        return TileRow(
            self,
            x,
            b,
            h,
            row,
            fixed(self.mask and self.mask[1], x.mask),
            fixed(self.score and self.score[1], x.score),
            # Means come first: the backward takes no others.
            [fixed(own, refs) for (_, own), refs in zip(self.columns, x.columns, strict=False)],
            fixed(self.dropout, x.dropout),
        )


class TileRow(NamedTuple):
    """The functions of the tiles of one warpgroup, whose rows and head do not change.

    Attributes:
      functions, x: what is evaluated, and of which arrays.
      b, h, row: batch row, query head, and the first row.
      mask, score, columns, dropout: the parts of operands that do not change.
    """

    functions: TileFunctions
    x: KernelInputs
    b: Any
    h: Any
    row: Any
    mask: Any
    score: Any
    columns: Any
    dropout: Any

    def _tiles(
        self, operands: Operands, refs: Any, fixed: Any, column: Any, shape: Any
    ) -> list[Any]:
        return operands.tiles(refs, fixed, self.b, self.h, self.row, column, shape)

    def visible(self, column: Any, shape: tuple[int, ...]) -> Array | None:
        """The mask on the tile from `column` on; None where every pair is visible."""
        functions, shown = self.functions, None
        if functions.mask is not None:
            program, operands = functions.mask
            (found,) = evaluate(
                program, self._tiles(operands, self.x.mask, self.mask, column, shape), shape
            )
            shown = found if found.shape else jnp.full(shape, found)
        if functions.keys is not None:
            axis = int(functions.rows == "row")
            at = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)
            within = at + (column if axis else self.row) < functions.keys
            shown = within if shown is None else shown & within
        return shown

    def scores(self, logits: Array, column: Any) -> list[Array]:
        """The score of logits, and its derivatives if the functions have them."""
        assert self.functions.score is not None
        return self._scored(self.functions.score, self.x.score, self.score, logits, column)

    def values(self, logits: Array, column: Any) -> list[list[Array]]:
        """The functions of columns at final logits, with their derivatives likewise."""
        given = zip(self.functions.columns, self.x.columns, self.columns, strict=False)
        return [self._scored(each, refs, fixed, logits, column) for each, refs, fixed in given]

    def _scored(
        self, function: tuple[Program, Operands], refs: Any, fixed: Any, logits: Array, column: Any
    ) -> list[Array]:
        program, operands = function
        shape = logits.shape
        tiles = self._tiles(operands, refs, fixed, column, shape)
        found = evaluate(program, [logits, *tiles], shape)
        return [value if value.shape else jnp.full(shape, value) for value in found]

    def dropout_factors(self, column: Any, shape: tuple[int, ...]) -> Array:
        """What weights are multiplied by: 0, or 1 / (1 - rate)."""
        operands = self.functions.dropout
        assert operands is not None
        first, second, k, rate, scale = self._tiles(
            operands, self.x.dropout, self.dropout, column, shape
        )
        keep = base.keeps((first, second), k, rate)
        return jnp.where(keep, jnp.full(shape, scale), jnp.zeros(shape, jnp.float32))


class Weights(NamedTuple):
    """A tile of logits or weights, and what follows from it.

    Attributes:
      s: logits in powers of 2, or weights.
      shown: the mask; None in a FULL tile.
      slopes: derivatives of a score by the logit and by each operand that learns.
      values: of each column the function, and in the backward such derivatives of it.
    """

    s: Array
    shown: Array | None
    slopes: list[Array]
    values: list[list[Array]]


def weights(
    tile_row: TileRow,
    masked: bool,
    s: Array,
    scale: Any,
    column: Any,
    offset: Callable[[], Array] | None,
) -> Weights:
    """Logits in powers of 2, or weights where an `offset` is to be subtracted.

    Args:
      tile_row: the functions of the tile.
      masked: whether the mask is evaluated.
      s: the tile of products.
      scale: of the products.
      column: the first column of the tile.
      offset: the LSE in powers of 2, as large as the tile, read where it is needed.
    """
    functions = tile_row.functions
    shown = tile_row.visible(column, s.shape) if masked else None
    slopes: list[Array] = []
    values: list[list[Array]] = []

    def inside(s: Array) -> Array:
        return s if shown is None else jnp.where(shown, s, jnp.zeros_like(s))

    if functions.score is None and not functions.columns:
        s = s * (scale * LOG2E)
    else:
        s = s * scale
        if functions.score is not None:
            s, *slopes = tile_row.scores(inside(s), column)
        if functions.columns:
            values = tile_row.values(inside(s), column)
        s = s * LOG2E
    if offset is not None:
        s = s - offset()
    if shown is not None:
        s = jnp.where(shown, s, jnp.full_like(s, LOW))
    return Weights(s if offset is None else jnp.exp2(s), shown, slopes, values)


def d_logits(
    masked: bool,
    found: Weights,
    dp: Array,
    factors: Array | None,
    delta: Callable[[], Array],
    means: Sequence[Callable[[], Array]],
) -> tuple[Array, list[Array]]:
    """Gradient of logits before the score, and the terms of that of each operand.

    Args:
      masked: whether the mask was evaluated.
      found: weights, and what follows.
      dp: the cotangents of dropped weights.
      factors: of dropout.
      delta: that of each query, as large as the tile, read where it is needed.
      means: cotangents of the columns, likewise.
    """
    p = found.s
    if factors is not None:
        dp = dp * factors
    for mean, (value, *_) in zip(means, found.values, strict=True):
        # A weight of 0 takes no part, whatever the function is there: 0 * inf is NaN.
        dp = dp + mean() * jnp.where(p == jnp.zeros_like(p), jnp.zeros_like(p), value)
    ds = p * (dp - delta())
    more: list[Array] = []
    for mean, (_, by_logit, *by_operands) in zip(means, found.values, strict=True):
        weighed = p * mean()
        ds = ds + weighed * by_logit
        more += [weighed * slope for slope in by_operands]
    terms = [ds * slope for slope in found.slopes] + more
    if masked or terms or found.values:
        # A masked logit may be too large for the products, or a score infinitely steep there.
        weighted = p != jnp.zeros_like(p)
        ds, *terms = (jnp.where(weighted, d, jnp.zeros_like(d)) for d in (ds, *terms))
    return (terms[0], terms[1:]) if found.slopes else (ds, terms)

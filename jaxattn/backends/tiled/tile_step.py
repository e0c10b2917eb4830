"""What one step of the tiled engine reads and evaluates.

Logits of a step are `[units, G, tq, tk]`, where a unit is a batch row and a key head. In the
backward they are transposed, `[units, tk, G, tq]`. All that is evaluated on the step broadcasts to
this shape. Matrix products take `[units, G * tq, tk]`, or `[units, tk, G * tq]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from ...shapes import Array, Bool, Float
from ...tracing.dependence import Kind
from ...tracing.split import as_tile, skewed, tile_slice
from .. import base
from ..flash.operands import head_index, padded, padded_operands
from ..problem import DROPOUT, Config, Inputs, Residue
from .schedule import Step, StepSizes

# --- before the loops -----------------------------------------------------------------------------


def padded_inputs(config: Config, sizes: StepSizes, x: Inputs) -> Inputs:
    """The inputs for whole tiles, heads before length in query, key and value."""

    def operands(residue: Residue | None, arrays: Any) -> Any:
        return padded_operands(sizes, () if residue is None else residue.kinds, arrays)

    return x._replace(
        query=heads_first(config, x.query, sizes.Tp),
        key=heads_first(config, x.key, sizes.Sp),
        value=heads_first(config, x.value, sizes.Sp),
        mask=operands(config.mask, x.mask),
        score=padded_operands(sizes, config.kinds, x.score),
        dropout=padded_operands(sizes, DROPOUT if x.dropout else (), x.dropout),
    )


def heads_first(config: Config, array: Array, length: int) -> Array:
    """`[B, T, .., H]` as `[B * heads, length, H]`, padded with zeros, in the dtype of the products.

    This is done once for all steps: rows of one head would lie a power of two apart in memory, of
    which a cache holds few.
    """
    array = padded(array, {1: length}).astype(config.dtype)
    width = array.shape[-1]
    return jnp.moveaxis(array, 1, -2).reshape(-1, length, width)


# --- parts of arrays ------------------------------------------------------------------------------


def read(array: Array, starts: Any, extents: Any) -> Array:
    """`lax.dynamic_slice` with starts of one dtype, with x64 enabled or not, none negative."""
    return lax.dynamic_slice(array, _starts(starts), extents, allow_negative_indices=False)


def write(array: Array, part: Array, starts: Any) -> Array:
    """`lax.dynamic_update_slice` with starts of one dtype, as `read`."""
    at = _starts(starts)
    return lax.dynamic_update_slice(array, part, at, allow_negative_indices=False)


def _starts(starts: Any) -> list[Any]:
    # `jnp.asarray` would be traced, as a function, for every number of every slice.
    return [
        np.int32(n) if isinstance(n, int) else lax.convert_element_type(n, np.int32) for n in starts
    ]


def add(total: Array, part: Array, starts: Any) -> Array:
    """`total` with a part added from `starts` on, in the total's dtype."""
    old = read(total, starts, part.shape)
    return write(total, old + part.astype(total.dtype), starts)


class TileStep(NamedTuple):
    """A step, with the arrays that it reads.

    Attributes:
      config, sizes: of the problem.
      x: the padded inputs.
      at: where the step is.
      transposed: whether logits are `[units, tk, G, tq]`, rather than `[units, G, tq, tk]`.
    """

    config: Config
    sizes: StepSizes
    x: Inputs
    at: Step
    transposed: bool

    @property
    def unit(self) -> Any:
        """The first pair of a batch row and a key head, in arrays `[B * K, ...]`."""
        return self.at.b * self.sizes.K + self.at.h

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """The shape of logits that masks and scores see."""
        units, G, tq, tk = self.sizes.units, self.sizes.G, self.at.tq, self.at.tk
        return (units, tk, G, tq) if self.transposed else (units, G, tq, tk)

    def queries(self, array: Float[Array, "heads T width"]) -> Float[Array, "units rows width"]:
        """The step's part of queries or their cotangents: `[units, G * tq, width]`."""
        units, G, width = self.sizes.units, self.sizes.G, array.shape[-1]
        part = read(array, [self.unit * G, self.at.q, 0], [units * G, self.at.tq, width])
        return part.reshape(units, G * self.at.tq, width)

    def keys(self, array: Float[Array, "heads S width"]) -> Float[Array, "units tk width"]:
        """The step's part of keys or values: `[units, tk, width]`."""
        extents = [self.sizes.units, self.at.tk, array.shape[-1]]
        return read(array, [self.unit, self.at.k, 0], extents)

    def scale(self) -> Array:
        """The scale of the logits: a scalar, or `[units, 1, 1]`."""
        if self.x.scale.shape[0] == 1:
            return self.x.scale[0]
        part = read(self.x.scale, [self.at.b], [self.sizes.step_rows])
        return jnp.repeat(part, self.sizes.step_heads)[:, None, None]

    # --- operands ---

    def place(self, kind: Kind, array: Array, groups: int = 1) -> tuple[list[Any], list[int]]:
        """Starts and extents of the step's part of an operand.

        With `groups`, of the gradient of an operand that the batch rows share, which has one row
        for each group of them.
        """
        sizes, at = self.sizes, self.at
        eb, ek, eg = array.shape[:3]
        grouped = groups > 1 and eb == groups
        b = at.b // (sizes.B // groups) if grouped else at.b
        starts, extents = tile_slice(kind, at.q, at.k, at.tq, at.tk, sizes.Sp)
        more = array.shape[3 + len(starts) :]
        rows = 1 if eb == 1 or grouped else sizes.step_rows
        heads = 1 if ek == 1 else sizes.step_heads
        return (
            [*head_index((eb, ek), b, at.h), 0, *starts, *[0] * len(more)],
            [rows, heads, eg, *extents, *more],
        )

    def parts(self, residue: Residue, arrays: Any) -> list[Array]:
        """The step's parts of a residue's operands."""
        return self.all_parts(residue.kinds, arrays)

    def all_parts(self, kinds: Any, arrays: Any) -> list[Array]:
        """The step's parts of operands."""
        return [self._part(kind, a) for kind, a in zip(kinds, arrays, strict=True)]

    def _part(self, kind: Kind, array: Array) -> Array:
        return read(array, *self.place(kind, array))

    def _as_tile(self, kind: Kind, part: Array) -> Array:
        """A part as it broadcasts to the logits."""
        sizes, at = self.sizes, self.at
        rows, heads, eg, *rest = part.shape
        if (rows, heads) not in ((1, 1), (sizes.step_rows, sizes.step_heads)):
            rows, heads = sizes.step_rows, sizes.step_heads
            part = jnp.broadcast_to(part, (rows, heads, *part.shape[2:]))
        part = part.reshape(rows * heads, eg, *rest)
        if self.transposed and kind == "diagonal":
            # Skewed the other way: transposing a skewed tile would move every element.
            return jnp.moveaxis(skewed(part, at.tk, at.tq), 1, 2)
        tile = as_tile(kind, part, 2, at.tq, at.tk)
        return jnp.moveaxis(tile, 3, 1) if self.transposed else tile

    def _as_tiles(self, residue: Residue, parts: Any) -> list[Array]:
        return [self._as_tile(kind, part) for kind, part in zip(residue.kinds, parts, strict=True)]

    # --- mask, score and dropout ---

    def visible(self) -> Bool[Array, "..."]:
        """The mask on the step, as it broadcasts to the logits; False beyond the ends."""
        config, sizes, at = self.config, self.sizes, self.at
        shown = jnp.ones((1, 1, 1, 1), bool)
        if config.mask is not None:
            tiles = self._as_tiles(config.mask, self.parts(config.mask, self.x.mask))
            found = config.mask.evaluated(*tiles)
            shown = found if found.ndim else found.reshape(1, 1, 1, 1)
        if sizes.Tp != sizes.T:
            q = at.q + jnp.arange(at.tq, dtype=jnp.int32) < sizes.T
            shown = shown & q.reshape((1, 1, 1, -1) if self.transposed else (1, 1, -1, 1))
        if sizes.Sp != sizes.S:
            k = at.k + jnp.arange(at.tk, dtype=jnp.int32) < sizes.S
            shown = shown & k.reshape((1, -1, 1, 1) if self.transposed else (1, 1, 1, -1))
        return shown

    def scored(self, residue: Residue, logits: Array, parts: Any) -> Array:
        """A score or a column of the step's logits, from the parts of its operands."""
        return residue.scored(logits, self._as_tiles(residue, parts))

    def dropout_factors(self, dtype: Any) -> Array:
        """What weights are multiplied by: 0, or 1 / (1 - rate)."""
        first, second, k, rate = (
            self._as_tile(kind, self._part(kind, array))
            for kind, array in zip(DROPOUT, self.x.dropout, strict=True)
        )
        keep = base.keeps((first, second), k, rate)
        return jnp.where(keep, base.kept_scale(rate, dtype), jnp.zeros((), dtype))

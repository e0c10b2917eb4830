"""The parts of a step: its mask, logits, score and dropout, and products as XLA has them fastest.

Logits are `[B, K, G, T, S]`, or `[B, K, S, G, T]` where a function says `across`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...shapes import Array, Bool, Float
from ...tracing.dependence import Kind
from ...tracing.split import as_tile, skewed
from .. import base, bfloat16
from ..flash.operands import learned, replaced
from ..problem import DROPOUT, Config, Inputs, joined

# --- mask, score and dropout ----------------------------------------------------------------------


def visible(config: Config, x: Inputs, *, across: bool = False) -> Bool[Array, "..."] | None:
    """The mask, as it broadcasts to the logits."""
    if config.mask is None:
        return None
    found = config.mask.evaluated(*_tiles(config.mask.kinds, x, x.mask, across=across))
    return found if found.ndim else found.reshape(1, 1, 1, 1, 1)


def mask_of_all(config: Config, x: Inputs, *, across: bool = False) -> Array | None:
    """The mask if all batch rows share it, so that it is evaluated once; or else None."""
    return None if any(a.shape[0] != 1 for a in x.mask) else visible(config, x, across=across)


def _tiles(kinds: Sequence[Kind], x: Inputs, arrays: Any, *, across: bool) -> list[Array]:
    """Operands, as they broadcast to the logits."""
    T, S = x.query.shape[1], x.key.shape[1]

    def tile(kind: Kind, array: Array) -> Array:
        if across and kind == "diagonal":
            # Skewed the other way: transposing a skewed tile would move every element.
            return jnp.moveaxis(skewed(array, S, T), 3, 2)
        found = as_tile(kind, array, 3, T, S)
        return jnp.moveaxis(found, 4, 2) if across else found

    return [tile(kind, array) for kind, array in zip(kinds, arrays, strict=True)]


def logits_of(
    config: Config, x: Inputs, shown: Array | None, *, across: bool = False
) -> tuple[Float[Array, "..."], Callable[[Array], tuple[Array, list[Array]]]]:
    """Logits after the score, and the way back to those before, and to operands that learn."""
    B, T, K, G, _ = x.query.shape
    query, key = queries(config, scaled(config, x)), keys(config, x.key)
    logits = dot(config, key, query, 3) if across else dot(config, query, key, 3)
    logits = logits.reshape((B, K, -1, G, T) if across else (B, K, G, T, -1))
    logits = scaled_after(config, x, logits)
    score = config.score
    if score is None:
        return logits, lambda ds: (ds, [])
    which = learned(score)

    def scored(logits: Array, some: list[Array]) -> Array:
        operands = replaced(x.score, which, some)
        return score.scored(logits, _tiles(score.kinds, x, operands, across=across))

    return jax.vjp(scored, where(shown, logits, 0), [x.score[n] for n in which])


def dropout_factors(x: Inputs, dtype: Any, *, across: bool = False) -> Float[Array, "..."]:
    """What weights are multiplied by: 0, or 1 / (1 - rate)."""
    first, second, k, rate = _tiles(DROPOUT, x, x.dropout, across=across)
    keep = base.keeps((first, second), k, rate)
    return jnp.where(keep, base.kept_scale(rate, dtype), jnp.zeros((), dtype))


def where(flags: Array | None, array: Array, other: float | Array) -> Array:
    """The array, with another number where flags are False; without flags the array."""
    return array if flags is None else jnp.where(flags, array, jnp.asarray(other, array.dtype))


# --- products -------------------------------------------------------------------------------------


def scaled(config: Config, x: Inputs) -> Float[Array, "B T K G H"]:
    """Queries times the scale: as exact as scaled logits, and fewer products."""
    if narrow(config, x):
        return x.query
    wide = base.accumulator(x.query.dtype)
    return x.query.astype(wide) * x.scale.reshape(-1, 1, 1, 1, 1)


def scaled_after(config: Config, x: Inputs, product: Array) -> Array:
    """A product with queries, times the scale where these are not: it would be rounded there."""
    if not narrow(config, x):
        return product
    return product * x.scale.reshape(-1, *(1,) * (product.ndim - 1))


def narrow(config: Config, x: Inputs) -> bool:
    """Whether factors of products have fewer bits than sums."""
    return bool(config.dtype != base.accumulator(x.query.dtype))


def queries(config: Config, array: Float[Array, "B T K G width"]) -> Float[Array, "B K GT width"]:
    """Queries, or cotangents, as a factor of a product: heads in front."""
    B, T, K, G, width = array.shape
    return array.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, width).astype(config.dtype)


def keys(config: Config, array: Float[Array, "B S K width"]) -> Float[Array, "B K S width"]:
    """Keys or values as a factor of a product: heads in front."""
    return array.transpose(0, 2, 1, 3).astype(config.dtype)


def keys_across(config: Config, array: Float[Array, "B S K width"]) -> Array:
    """`[B, K, width, S]`, transposed here: in the product XLA would compute it more slowly."""
    return array.transpose(0, 2, 3, 1).astype(config.dtype)


def factor(config: Config, array: Float[Array, "B K G T S"]) -> Float[Array, "B K GT S"]:
    """Weights as a factor of a product."""
    B, K, G, T, S = array.shape
    return array.reshape(B, K, G * T, S).astype(config.dtype)


def factor_across(config: Config, array: Float[Array, "B K S G T"]) -> Float[Array, "B K S GT"]:
    """The same of weights with keys on rows."""
    B, K, S, G, T = array.shape
    return array.reshape(B, K, S, G * T).astype(config.dtype)


def dot(config: Config, a: Array, b: Array, axis: int) -> Array:
    """Products of stacks of matrices: over the last axis of a, and this one of b."""
    precision = lax.Precision.HIGHEST if config.precision is None else config.precision
    if a.dtype != jnp.bfloat16:
        dims: Any = (((3,), (axis,)), ((0, 1), (0, 1)))
        return bfloat16.dot(a, b, dims, precision)
    # One axis of stacks: with two XLA converts factors of 16 bits, if they were transposed.
    dims = (((2,), (axis - 1,)), ((0,), (0,)))
    found = bfloat16.dot(joined(a, 0), joined(b, 0), dims, precision)
    return found.reshape(*a.shape[:2], *found.shape[1:])

"""From the text of an expression to the mask that it makes, and its cells in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import masks
from ..masks.mask import And, BuiltInMask, Mask, Not, Or, PerHead
from ..shapes import Bool

# What an expression may name.
NAMES = {name: getattr(masks, name) for name in masks.__all__} | {
    "jnp": jnp,
    "np": np,
    "bool": bool,
}


def evaluated(text: str) -> Mask:
    """The mask that an expression makes: what a reader gets who pastes it."""
    # The text was put together in `terms`, from names of constructors and numbers.
    made = eval(text, {"__builtins__": {}}, NAMES)
    assert isinstance(made, Mask)
    return made


def cells_of(mask: Mask, shape: tuple[int, int, int, int]) -> Bool[np.ndarray, "B N T S"]:
    """The cells that an expression's mask allows, by its formulas, without compiling anything."""
    known = jax.tree.map(np.asarray, mask)
    at = np.ogrid[tuple(slice(extent) for extent in shape)]
    return np.broadcast_to(_allowed(known, *(x.astype(np.int32) for x in at)), shape)


def _allowed(mask: Mask, b: Any, h: Any, q: Any, k: Any) -> Any:
    match mask:
        case And():
            return _allowed(mask.left, b, h, q, k) & _allowed(mask.right, b, h, q, k)
        case Or():
            return _allowed(mask.left, b, h, q, k) | _allowed(mask.right, b, h, q, k)
        case Not():
            return ~_allowed(mask.part, b, h, q, k)
        case PerHead():
            cases = [(h == i) & _allowed(part, b, h, q, k) for i, part in enumerate(mask.parts)]
            return np.logical_or.reduce(np.broadcast_arrays(*cases))
        case BuiltInMask():
            return np.asarray(mask.formula(b, h, q, k), bool)
    raise TypeError(f"describe: got {mask!r} in an expression, expected constructors")

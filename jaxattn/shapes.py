"""The vocabulary of shapes that signatures are written in.

Letters: `B` batch rows, `T` queries, `S` keys, `N` query heads, `K` key/value heads, `G = N / K`
query heads per key/value head, `H` head dimension, `Hv` value dimension.

The words are `jaxtyping`'s where it is installed (the tests check them at run time); without it
they stand for plain arrays, so that `import jaxattn` needs nothing but jax.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

if TYPE_CHECKING or importlib.util.find_spec("jaxtyping"):
    # `Int` of the signatures is any integer, unsigned ones included.
    from jaxtyping import Bool, Float, Shaped, UInt32
    from jaxtyping import Integer as Int
else:

    class _Plain:
        """Stands in for a jaxtyping word: any subscript means any array."""

        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    Bool = Float = Int = Shaped = UInt32 = _Plain

if TYPE_CHECKING:
    ArrayOrStruct = Array
else:
    # An array, or its shape and dtype alone: `explain` needs no more.
    ArrayOrStruct = Array | jax.ShapeDtypeStruct

ArrayLike = Array | np.ndarray
IntLike = int | np.integer | Array | np.ndarray

__all__ = [
    "Array",
    "ArrayLike",
    "ArrayOrStruct",
    "Bool",
    "Float",
    "Int",
    "IntLike",
    "Shaped",
    "UInt32",
]

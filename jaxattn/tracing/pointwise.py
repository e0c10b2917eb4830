"""Functions of single elements, over arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from ..shapes import Array, Shaped


def pointwise(
    fn: Callable[..., Any], arrays: Sequence[Shaped[Array, "..."]], ranks: Sequence[int]
) -> Shaped[Array, "..."]:
    """A function of single elements over arrays whose leading axes broadcast.

    Args:
      fn: takes one element of each array; an element has the last `ranks[i]` axes of array i.
      arrays: their other, leading axes are aligned at the last, and broadcast.
      ranks: the numbers of axes of the elements.
    """
    lead = max([np.ndim(a) - r for a, r in zip(arrays, ranks, strict=True)], default=0)
    shapes = [
        (1,) * (lead - np.ndim(a) + r) + np.shape(a)[: np.ndim(a) - r]
        for a, r in zip(arrays, ranks, strict=True)
    ]
    extents = lax.broadcast_shapes(*shapes) if shapes else ()
    over = fn
    for axis in reversed(range(lead)):
        if extents[axis] != 1:
            over = jax.vmap(over, [None if shape[axis] == 1 else 0 for shape in shapes])
    squeezed = [
        lax.squeeze(a, [axis for axis in range(np.ndim(a) - r) if np.shape(a)[axis] == 1])
        for a, r in zip(arrays, ranks, strict=True)
    ]
    return lax.expand_dims(over(*squeezed), [axis for axis, n in enumerate(extents) if n == 1])

"""Equality by structure: what was written alike is equal, and compiled once.

JAX and Flax compare what they take as static: `static_argnums`, the attributes of modules. There a
mask made anew has to equal the one before, or everything is traced again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np


class ByStructure:
    """A pytree that is equal to another, and hashes alike, if it was written alike.

    That is: by the same functions (a lambda written twice is two), of the same numbers, put
    together in the same way. What holds arrays is equal to itself alone and has no hash: its
    values belong among the arguments of a program.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, ByStructure):
            return NotImplemented
        mine = _structure(self)
        return mine is not None and mine == _structure(other)

    def __hash__(self) -> int:
        structure = _structure(self)
        if structure is None:
            name = repr(self).partition("\n")[0]
            raise TypeError(
                f"{name}: it holds arrays, so it has no hash and can't be a static argument or "
                "attribute; pass it as an argument of the compiled function, where its arrays are "
                "leaves, or pass a function that makes it"
            )
        return hash(structure)


def _structure(thing: Any) -> Hashable | None:
    """What is compared; `None` for what holds arrays."""
    leaves, tree = jax.tree.flatten(thing)
    if len(leaves) == 1 and leaves[0] is thing:
        # A class that is no pytree: nothing is known of it but which object it is.
        return id(thing)
    if any(map(_is_array, leaves)):
        return None
    return tree, tuple(map(_number, leaves))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and not isinstance(leaf, np.generic)


def _number(leaf: Any) -> Hashable:
    """A number apart from equal ones of other types, floats by their bits: NaN equals itself."""
    if isinstance(leaf, float):
        return float, leaf.hex()
    if isinstance(leaf, np.generic):
        return leaf.dtype, leaf.tobytes()
    return type(leaf), leaf

"""Questions about your own model, asked from the outside.

A wrong mask does not crash. The loss falls, often further than it should, and the model is wrong.
These functions treat a model as a black box: they change inputs, and compare bits of outputs. The
model under test need not use this library.

`visible` finds the mask that a model really applies. The assertions say whether a model keeps to
the mask that it should. Both change inputs by the same piece, `changes`.

>>> import jax.numpy as jnp, jaxattn as ja
>>> x = jnp.arange(12.0).reshape(1, 4, 3)
>>> ja.testing.visible(lambda x: x.cumsum(1), x).show(color=False)
visible(bool[1, 1, 4, 4]), 4 queries, 4 keys: 10 of 16 pairs, 62.5%
██ · · ·
████ · ·
██████ ·
████████
"""

from .assertions import assert_packing_invariant, assert_padding_invariant, assert_respects_mask
from .findings import Visible
from .visible import visible

__all__ = [
    "Visible",
    "assert_packing_invariant",
    "assert_padding_invariant",
    "assert_respects_mask",
    "visible",
]

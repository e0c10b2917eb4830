"""Masks: which query may attend to which key, as a pure function of positions.

What comes in: arrays and numbers that a user gives, or functions `(b, h, q, k) -> bool`. What goes
out: a `Mask`, a pytree whose leaves are these arrays and numbers. It answers for one query and one
key, composes with `&`, `|`, `~` and `^`, and has no length.

The files, in the order to read them:

- `positions`: what `b`, `h`, `q` and `k` are where they do not count from 0.
- `mask`: `Mask`, its algebra, and the masks that hold a function or a dense array.
- `by_position`, `by_array`, `by_table`: the constructors; each is a class of one line of maths.
- `by_function`: masks of functions and of other masks. `conventions`: arrays of other libraries.
- `door`: how the methods of a mask find their views, which are built on masks.

The example that every room carries on: two packed documents, each causal.

>>> import jax.numpy as jnp
>>> from jaxattn import masks
>>> ids = jnp.array([[0, 0, 0, 1, 1, 1]])
>>> mask = masks.segments(ids) & masks.causal()
>>> mask
segments(int32[1, 6], int32[1, 6]) & causal()

It is a tree of small classes, and its dense array is `(ids[b, q] == ids[b, k]) & (q >= k)`:

>>> type(mask).__name__, type(mask.left).__name__, type(mask.right).__name__
('And', 'Segments', 'Causal')
>>> bool(mask(0, 0, q=4, k=3)), bool(mask(0, 0, q=4, k=2))
(True, False)
>>> print(mask.dense(6, 6)[0, 0].astype(int))
[[1 0 0 0 0 0]
 [1 1 0 0 0 0]
 [1 1 1 0 0 0]
 [0 0 0 1 0 0]
 [0 0 0 1 1 0]
 [0 0 0 1 1 1]]

`jaxattn.tracing` takes the same mask apart.
"""

import sys
import typing

from ..checks.foreign_names import unknown_attribute
from .by_array import (
    from_array,
    global_tokens,
    key_padding,
    query_padding,
    segments,
    shared_prefix,
    spans,
)
from .by_function import describe, diff, per_head, predicate
from .by_position import (
    block_diffusion,
    causal,
    chunked,
    dilated,
    empty,
    full,
    neighborhood,
    prefix_lm,
    sliding_window,
)
from .by_table import block_sparse, random_blocks, top_blocks, tree
from .mask import Mask, dense
from .positions import Positions

__all__ = [
    "Mask",
    "Positions",
    "block_diffusion",
    "block_sparse",
    "causal",
    "chunked",
    "dense",
    "describe",
    "diff",
    "dilated",
    "empty",
    "from_array",
    "full",
    "global_tokens",
    "key_padding",
    "neighborhood",
    "per_head",
    "predicate",
    "prefix_lm",
    "query_padding",
    "random_blocks",
    "segments",
    "shared_prefix",
    "sliding_window",
    "spans",
    "top_blocks",
    "tree",
]


if not typing.TYPE_CHECKING:
    # Hidden from type checkers, for which every name would otherwise exist.
    def __getattr__(name: str) -> object:
        raise unknown_attribute(__name__, name, sys.modules[__name__])

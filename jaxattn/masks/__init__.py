"""TODO room."""

import sys
import typing

from ..checks.foreign_names import unknown_attribute
from .by_array import (
    block_sparse,
    from_array,
    global_tokens,
    key_padding,
    query_padding,
    random_blocks,
    segments,
    shared_prefix,
    tree,
)
from .by_function import diff, per_head, predicate
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
    "tree",
]


if not typing.TYPE_CHECKING:
    # Not seen by type checkers, to whom it would say that every mask exists.
    def __getattr__(name: str) -> object:
        raise unknown_attribute(__name__, name, sys.modules[__name__])

"""jaxattn: a mask is a pure function of positions; everything else is derived."""

import sys
import typing

from . import foreign, masks, nn, scores, testing
from .algebra import Mask
from .attention import attention, attention_weights
from .compat import dot_product_attention, scaled_dot_product_attention
from .explain import Explanation, explain
from .kv_cache import KVCache
from .paged import PagedKVCache
from .positions import Positions
from .scores import Score
from .tiles import TileMap, tile_map

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "KVCache",
    "Mask",
    "PagedKVCache",
    "Positions",
    "Score",
    "TileMap",
    "attention",
    "attention_weights",
    "dot_product_attention",
    "explain",
    "masks",
    "nn",
    "scaled_dot_product_attention",
    "scores",
    "testing",
    "tile_map",
]


def __dir__() -> list[str]:
    own = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, *own})


if not typing.TYPE_CHECKING:
    # Not seen by type checkers, to whom it would say that every name exists.
    def __getattr__(name: str) -> object:
        raise foreign.unknown_attribute(__name__, name, sys.modules[__name__])

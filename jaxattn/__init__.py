"""jaxattn: a mask is a pure function of positions; everything else is derived."""

from . import masks, nn, scores, testing
from .algebra import Mask, Positions
from .attention import attention, attention_weights
from .compat import dot_product_attention, scaled_dot_product_attention
from .explain import Explanation, explain
from .kv_cache import KVCache
from .paged import PagedKVCache
from .scores import Score
from .tiles import TileMap, tile_map

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

"""jaxattn: a mask is a pure function of positions; everything else is derived.

The words of the library, in its docstrings and error messages:

| word | meaning |
|---|---|
| position | where a pair stands: `b` batch row, `h` query head, `q` query, `k` key |
| mask | a function `(b, h, q, k) -> bool`; True means that the query may attend to the key |
| visible, masked | a pair of a query and a key for which the mask is True, or False |
| empty row | a query without any visible key; its output is 0 |
| score | a function that changes the logits of visible pairs |
| LSE | the natural logarithm of the sum of the exponentials of a row's logits |
| split | a mask or score, taken apart into operands and a residue |
| operand | what is computed once for each query (row), key (column), head, or distance (diagonal) |
| grid | an operand that is an array of all pairs, `[T, S]`, given by the user |
| residue | what is left to compute for each pair: elementwise operations on operands |
| tile | a rectangle of queries and keys; FlexAttention's block |
| tile map | the state of each tile: EMPTY, PARTIAL or FULL; FlexAttention's `BlockMask` |
| band | the pairs between two diagonals, as of a causal mask or a sliding window |
| backend | one way to compute attention; `explain` says which one runs, and why |
| engine | the forward and backward of a backend that computes tile by tile |
| rank | one of the devices that share a sequence, by number |
| schedule | how keys reach the ranks whose queries see them |
| layout | which blocks of the sequence each rank holds |
"""

import sys
import typing

from . import deprecated, masks, nn, parallel, scores, stats, testing, views
from .attention import attention, attention_weights
from .caches.kv_cache import KVCache
from .caches.paged import PagedKVCache
from .checks import foreign_names
from .compat import dot_product_attention, scaled_dot_product_attention
from .explain import Explanation, explain
from .masks.mask import Mask
from .masks.positions import Positions
from .scores import Score
from .tiles.tile_map import TileMap, tile_map

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
    "parallel",
    "scaled_dot_product_attention",
    "scores",
    "stats",
    "testing",
    "tile_map",
    "views",
]


deprecated.install()


def __dir__() -> list[str]:
    own = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, *own})


if not typing.TYPE_CHECKING:
    # Not seen by type checkers, to whom it would say that every name exists.
    def __getattr__(name: str) -> object:
        if name in deprecated.MOVED:
            return sys.modules[f"{__name__}.{name}"]
        raise foreign_names.unknown_attribute(__name__, name, sys.modules[__name__])

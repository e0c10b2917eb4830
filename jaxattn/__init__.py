"""jaxattn: a mask is a pure function of positions; everything else is derived."""

from . import masks, nn, scores, testing
from .algebra import Mask, Positions
from .attention import attention, attention_weights
from .compat import dot_product_attention, scaled_dot_product_attention
from .scores import Score

__all__ = [
    "Mask",
    "Positions",
    "Score",
    "attention",
    "attention_weights",
    "dot_product_attention",
    "masks",
    "nn",
    "scaled_dot_product_attention",
    "scores",
    "testing",
]

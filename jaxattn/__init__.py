"""jaxattn: a mask is a pure function of positions; everything else is derived."""

from . import masks, scores
from .algebra import Mask, Positions
from .attention import attention, attention_weights
from .scores import Score

__all__ = ["Mask", "Positions", "Score", "attention", "attention_weights", "masks", "scores"]

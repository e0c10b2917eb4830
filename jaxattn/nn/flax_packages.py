"""Flax's two dialects, linen and nnx; jaxattn itself works without Flax."""

from __future__ import annotations

try:
    from flax import linen, nnx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'jaxattn.nn.linen, jaxattn.nn.nnx: need flax; pip install "jaxattn[flax]" brings it',
        name=error.name,
    ) from error

__all__ = ["linen", "nnx"]

"""Flax modules on this library, in both of its dialects, linen and nnx.

In come features `[B, T, features]` and masks; out come features, and a cache where one was given.
What happens between the projections is the same in both dialects, and is written once. On the
example of all rooms, two documents under a causal mask:

>>> import jax, jax.numpy as jnp, jaxattn as ja
>>> from flax import nnx
>>> layer = ja.nn.nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=nnx.Rngs(0))
>>> mask = ja.masks.segments(jnp.array([0, 0, 0, 1, 1, 1])) & ja.masks.causal()
>>> layer(jnp.ones((1, 6, 8)), mask=mask).shape
(1, 6, 8)

Read `rope` (rotary position embeddings), `functional` (what lies between the projections), then
`linen` and `nnx`, which project; `attention_fn` puts this library inside Flax's own modules.
`linen` and `nnx` are imported when they are first used, so that jaxattn itself needs no Flax.
"""

from __future__ import annotations

import importlib
from typing import Any

from .attention_fn import attention_fn
from .rope import RoPE

__all__ = ["RoPE", "attention_fn", "linen", "nnx"]


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

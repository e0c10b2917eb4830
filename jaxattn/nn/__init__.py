"""Flax modules on this library; `linen` and `nnx` are imported where they are used."""

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

"""What modules keep of a call, in the way of their dialect, and whether anybody collects it."""

from __future__ import annotations

from typing import Any


def collects(module: Any) -> bool:
    """Whether what a module sows in this call is collected; else it need not be computed.

    In linen: whether "intermediates" is mutable, and the module is not being initialised. In nnx:
    whether the call is inside `nnx.capture(..., nnx.Intermediate)`.
    """
    from .flax_packages import linen, nnx

    if isinstance(module, linen.Module):
        return module.is_mutable_collection("intermediates") and not module.is_initializing()
    # Here nnx.capture puts what it collects, and from here `sow` takes it.
    found = getattr(module, "__captures__", ())
    return any(type(each) is nnx.Intermediate for each in found)


def sow(module: Any, name: str, value: Any) -> None:
    """Keeps a value among the intermediates of the module."""
    from .flax_packages import linen, nnx

    where = "intermediates" if isinstance(module, linen.Module) else nnx.Intermediate
    module.sow(where, name, value)

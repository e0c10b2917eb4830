"""The function of one layer, inside of a model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from ..checks.arrays import described
from .changes import Model


class Layer:
    """A layer of a model as a function of its own inputs, with the inputs that it really gets.

    The whole model runs, and the first argument of the layer's first call is replaced; the same
    array among its other arguments (self-attention given three times `x`) is replaced too.
    """

    def __init__(self, fn: Model, where: Any, inputs: Any) -> None:
        """Finds the layer at `where`: a path in linen or in `fn`, or the module itself."""
        if not isinstance(where, str) and not callable(where):
            raise TypeError(
                f"where: got {described(where)}, expected the path of a layer, or the module itself"
            )
        self._fn, self._where, self._model_inputs = fn, where, inputs
        self._module = _within(fn, where) if isinstance(where, str) else where
        self.inputs, _ = self._called(None)
        if isinstance(self.inputs, jax.core.Tracer):
            raise ValueError(
                f"where: got {where!r}, which is called inside jit, scan or another transformation "
                "of the model; expected a layer that is called directly: give the model without it"
            )

    def __call__(self, inputs: Any) -> Any:
        return self._called(inputs)[1]

    def _called(self, replacement: Any) -> tuple[Any, Any]:
        """The layer's inputs and its outputs."""
        caught: list[tuple[Any, Any]] = []

        def call(layer: Any, args: Any, kwargs: Any) -> Any:
            if caught or not (args or kwargs):
                return layer(*args, **kwargs)
            given = args[0] if args else next(iter(kwargs.values()))

            def swapped(value: Any) -> Any:
                return replacement if replacement is not None and value is given else value

            made = layer(*map(swapped, args), **{n: swapped(v) for n, v in kwargs.items()})
            caught.append((given, made))
            return made

        if self._module is None:
            calls = _linen_calls(tuple(re.split(r"[./]", self._where)), call)
        else:
            calls = _object_calls(self._module, call)
        with calls:
            self._fn(self._model_inputs)
        if not caught:
            raise ValueError(
                f"where: got {self._where!r}, which the model did not call; expected the path of a "
                "layer ('layers_0/attention'), or the module itself, and a model that is not "
                "compiled: jit does not call what it has traced before"
            )
        return caught[0]


def _within(fn: Any, path: str) -> Any:
    """The part of an object at a path of attributes and indices; None where there is none."""
    for name in re.split(r"[./]", path):
        try:
            fn = fn[int(name)] if name.isdigit() else getattr(fn, name)
        except (AttributeError, IndexError, TypeError):
            return None
    return fn


def _linen_calls(path: tuple[str, ...], call: Any) -> contextlib.AbstractContextManager[Any]:
    """Hands the calls of a linen module to `call`."""
    from flax import linen

    def intercept(layer: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.path == path and context.method_name == "__call__":
            return call(layer, args, kwargs)
        return layer(*args, **kwargs)

    return linen.intercept_methods(intercept)


@contextlib.contextmanager
def _object_calls(module: Any, call: Any) -> Iterator[None]:
    """Hands the calls of one object to `call`: Python looks `__call__` up in its class."""
    cls = type(module)
    own = vars(cls).get("__call__")
    original = cls.__call__

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            return call(lambda *a, **k: original(self, *a, **k), args, kwargs)
        return original(self, *args, **kwargs)

    cls.__call__ = patched
    try:
        yield
    finally:
        if own is None:
            del cls.__call__
        else:
            cls.__call__ = own

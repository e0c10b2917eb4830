"""Options that users give: flags, which are never read by their truth, precisions and dtypes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .arrays import described

_ALGORITHMS = lax.DotAlgorithm | lax.DotAlgorithmPreset


def flag(given: Any, name: str) -> bool:
    """An argument that is True or False; "False", 0 and None are neither.

    Raises:
      TypeError: for anything else.
    """
    if isinstance(given, (bool, np.bool_)):
        return bool(given)
    traced = isinstance(given, jax.core.Tracer)
    remedy = "; it decides what is compiled: make it a static argument" if traced else ""
    raise TypeError(
        f"{name}: got {'a traced ' * traced}{described(given)}, expected True or False{remedy}"
    )


def optional_flag(given: Any, name: str) -> bool | None:
    """An argument that is True, False, or None where it is left open.

    Raises:
      TypeError: for anything else.
    """
    return None if given is None else flag(given, name)


def precision(given: Any, name: str) -> Any:
    """The precision of matrix products: what `lax.dot_general` takes, names as what they name.

    Raises:
      ValueError: for a string that names no precision.
      TypeError: for anything else.
    """
    if given is None or isinstance(given, (lax.Precision, _ALGORITHMS)):
        return given
    names = "'default', 'high', 'highest'"
    expected = (
        f"None, one of {names}, a jax.lax.Precision, two of these for the two factors, or a "
        "jax.lax.DotAlgorithmPreset or its name"
    )
    if isinstance(given, str):
        found = _named(given)
        found = getattr(lax.DotAlgorithmPreset, given, None) if found is None else found
        if isinstance(found, (lax.Precision, _ALGORITHMS)):
            return found
        raise ValueError(f"{name}: got {given!r}, expected {expected}")
    if isinstance(given, (list, tuple)) and len(given) == 2:
        pair = tuple(_named(each) if isinstance(each, str) else each for each in given)
        if all(isinstance(each, lax.Precision) for each in pair):
            return pair
    raise TypeError(f"{name}: got {described(given)}, expected {expected}")


def _named(given: str) -> lax.Precision | None:
    """The precision of a name, also of another one, as "float32" is of the highest."""
    try:
        # JAX looks up its other names here too.
        return lax.Precision(given)
    except ValueError:
        return None


def dtype(given: Any, name: str, also: Any = None) -> Any:
    """A dtype of floats, or another one that is allowed, as it was given.

    Raises:
      TypeError: for anything else.
    """
    # NumPy would take None for float64, and an array for its own dtype.
    no_dtype = given is None or isinstance(given, (jax.Array, np.ndarray, np.generic))
    try:
        found = None if no_dtype else jnp.dtype(given)
    except (TypeError, ValueError):
        found = None
    if found is not None and (jnp.issubdtype(found, jnp.floating) or found == also):
        return given
    expected = "a float dtype, as jnp.float32" + (f", or {also.__name__}" if also else "")
    raise TypeError(
        f"{name}: got {described(given) if found is None else found.name}, expected {expected}"
    )

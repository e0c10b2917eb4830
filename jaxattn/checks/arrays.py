"""Arrays that users give, and what to say of what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The longest repr in an error; of what is longer, the type is said.
_LONGEST = 80


def array_of(
    given: Any, name: str, expected: str, convert: Callable[[Any], Any] = jnp.asarray
) -> Any:
    """An argument as an array.

    Args:
      given: what the user gave.
      name: of the argument, for errors.
      expected: what it should have been, for errors.
      convert: what makes an array of it.

    Raises:
      TypeError: for what is no array, such as None, a string, or rows of different lengths.
    """
    try:
        if given is None or isinstance(given, (str, bytes)):
            raise TypeError("not numbers")
        return convert(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: got {type(given).__name__}, expected {expected}") from error


def described(given: Any) -> str:
    """What a user gave, for errors: the dtype and shape of an array, of anything else the repr."""
    if isinstance(given, (jax.Array, np.ndarray)) and (
        isinstance(given, jax.core.Tracer) or given.ndim
    ):
        return f"{given.dtype}{list(given.shape)}"
    said = repr(given)
    return said if len(said) <= _LONGEST else type(given).__name__

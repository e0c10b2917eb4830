"""Arrays that users give, and what to say of what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


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

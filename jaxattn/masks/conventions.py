"""Arrays of other libraries that mean a mask: six conventions, each checked."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from ..checks.arrays import array_of
from ..checks.integers import concrete
from ..shapes import Array, Bool

Convention = Literal["attend", "ignore", "additive", "hf", "keras", "flax"]

# What an additive mask adds to remove a pair. Below it exp() is 0 in float32 for logits of any
# trained model; -1e4, the largest that float16 users chose, is the smallest in use.
_REMOVES = -1e4


def kept_pairs(array: Any, convention: str) -> Bool[Array, "..."]:
    """Which pairs an array of that convention keeps; see `jaxattn.masks.from_array`."""
    if convention not in get_args(Convention):
        expected = ", ".join(map(repr, get_args(Convention)))
        raise ValueError(f"from_array(convention): got {convention!r}, expected one of {expected}")
    values = array_of(array, "from_array(array)", f"an array of the {convention!r} convention")
    _check_dtype(values, convention)
    numbers = concrete(values)
    if numbers is not None:
        _check_values(numbers, convention)
    if convention == "additive":
        # A NaN compares False, and so removes the pair.
        return values > removes(values.dtype)
    nonzero = values if values.dtype == jnp.bool_ else values != 0
    return ~nonzero if convention == "ignore" else nonzero


def removes(dtype: Any) -> float:
    """The largest number that removes a pair: -1e4 as that dtype rounds it (bfloat16: -9984)."""
    return float(np.asarray(_REMOVES, dtype))


def _check_dtype(values: Array, convention: str) -> None:
    is_float = bool(jnp.issubdtype(values.dtype, jnp.floating))
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        wanted = "a real dtype"
    elif convention == "additive" and not is_float:
        wanted = "floats; a boolean or integer array is in the 'attend' or 'ignore' convention"
    elif convention in ("attend", "keras") and is_float:
        wanted = (
            "booleans or integers; floats are 'additive' (0 keeps, -inf removes), 'flax' (1 keeps) "
            "or 'hf' (1 keeps)"
        )
    else:
        return
    raise TypeError(
        f"from_array(array): got dtype {values.dtype} with convention {convention!r}, expected "
        f"{wanted}"
    )


def _check_values(values: Any, convention: str) -> None:
    if values.dtype == np.bool_:
        return
    numbers = np.asarray(values, np.float64)
    binary = bool(np.isin(numbers, (0.0, 1.0)).all())
    if convention != "additive":
        if not binary:
            worst = numbers[~np.isin(numbers, (0.0, 1.0))].flat[0]
            raise ValueError(
                f"from_array(array): got the value {worst} with convention {convention!r}, "
                "expected only 0 and 1; an array that is added to the logits is 'additive'"
            )
        return
    if binary and (numbers == 1.0).any():
        raise ValueError(
            "from_array(array): got a float array of only 0 and 1 with convention 'additive', "
            "expected 0 where a key is kept and -inf (or -1e9) where it is removed; say 'attend' "
            "after .astype(bool) if 1 keeps, 'ignore' if 1 removes"
        )
    odd = ~((numbers == 0.0) | (numbers <= removes(values.dtype)))
    if odd.any():
        raise ValueError(
            f"from_array(array): got the value {numbers[odd].flat[0]} with convention 'additive', "
            f"expected 0 (keeps) or at most {_REMOVES:g} (removes); what changes logits without "
            "removing them is a score: jaxattn.scores.bias(array)"
        )

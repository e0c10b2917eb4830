"""Integers that users give: exact where they are known, and never wrapped around.

Positions are int32. A number that is compared with positions becomes int32 too: a larger one, such
as a window of 2**40, is beyond every position, and so is the nearest int32. Ids are compared only
with each other: those of 64 bits are numbered, so that equal ones stay equal and others different.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..shapes import Array
from .arrays import array_of

LEAST, MOST = -(2**31), 2**31 - 1


def concrete(given: Any) -> np.ndarray | None:
    """The values of an argument where they are known here; `None` for a tracer.

    Values under `jit`, and of arrays spread over several hosts, are left for the caller to check.
    """
    if isinstance(given, jax.core.Tracer) or not getattr(given, "is_fully_addressable", True):
        return None
    return np.asarray(given)


def as_given(given: Any) -> Any:
    """An argument as an array: NumPy's where JAX has not made it narrower yet, else JAX's."""
    if isinstance(given, (int, np.generic, np.ndarray)):
        return np.asarray(given)
    if isinstance(given, (list, tuple)):
        plain = all(isinstance(each, (int, np.integer)) for each in jax.tree.leaves(given))
        return np.asarray(given) if plain else jnp.asarray(given)
    return jnp.asarray(given)


def _is_python(dtype: Any) -> bool:
    """Whether a dtype is that of Python's own integers, which NumPy keeps as objects."""
    return isinstance(dtype, np.dtype) and dtype.hasobject


def is_integer(array: Any) -> bool:
    """Whether an array holds integers, Python's own too."""
    if _is_python(array.dtype):
        return all(isinstance(each, int) for each in array.flat)
    return bool(jnp.issubdtype(array.dtype, jnp.integer))


def _range(dtype: Any) -> tuple[int, int] | None:
    """The least and the most that a dtype holds; `None` of Python's own integers."""
    if _is_python(dtype):
        return None
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)


def _wide(dtype: Any) -> bool:
    """Whether a dtype holds more than int32 does."""
    held = _range(dtype)
    return held is None or held[0] < LEAST or held[1] > MOST


def beyond(array: Any) -> int | None:
    """A value beyond int32, if there is one and the values are known."""
    values = concrete(array) if _wide(array.dtype) else None
    if values is None:
        return None
    far = values[(values < LEAST) | (values > MOST)]
    return int(far.flat[0]) if far.size else None


def narrowed(array: Any) -> Array:
    """Integers as int32; beyond, the nearest."""
    if _wide(array.dtype):
        least, most = _range(array.dtype) or (LEAST, MOST)
        where = np if isinstance(array, np.ndarray) else jnp
        array = where.minimum(where.maximum(array, max(LEAST, least)), min(MOST, most))
    return jnp.asarray(array.astype(np.int32))


def _read(given: Any, name: str, shapes: Sequence[str]) -> Any:
    """An integer argument as an array, its dtype and rank checked."""
    expected = f"integers {' or '.join(shapes)}"
    if isinstance(given, (bool, np.bool_)) or given is None:
        raise TypeError(f"{name}: got {given!r}, expected {expected}")
    array = array_of(given, name, expected, as_given)
    if not is_integer(array):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {expected}")
    ranks = [0 if shape == "[]" else shape.count(",") + 1 for shape in shapes]
    if array.ndim not in ranks:
        raise ValueError(f"{name}: got shape {list(array.shape)}, expected {' or '.join(shapes)}")
    return array


def integers(given: Any, name: str, shapes: Sequence[str], minimum: int | None = None) -> Any:
    """Numbers that are compared with positions: Python's stay as they are, others become int32.

    Args:
      given: what the user gave; beyond int32, the nearest int32 stands for it.
      name: of the argument, for errors.
      shapes: the allowed shapes, as in `("[]", "[B]")`.
      minimum: the least that is allowed, checked where values are known.

    Raises:
      TypeError: for what is no integer.
      ValueError: for other ranks, and for what is below the minimum.
    """
    if type(given) is int and "[]" in shapes and (minimum is None or given >= minimum):
        return min(max(given, LEAST), MOST)
    array = _read(given, name, shapes)
    values = concrete(array) if minimum is not None else None
    if values is not None and values.size and values.min() < minimum:
        raise ValueError(f"{name}: got {values.min()}, expected at least {minimum}")
    return int(narrowed(array)) if isinstance(given, (int, np.integer)) else narrowed(array)


def identifiers(*given: tuple[Any, str, Sequence[str]]) -> tuple[Array, ...]:
    """Numbers that are compared only with each other, in one dtype; equal ones stay equal.

    Args:
      *given: for each argument what the user gave, its name for errors, and what each allowed rank
        means.

    Returns:
      The arrays, as wide as they came. Where no dtype of JAX's holds all, as without x64 for ids of
      64 bits, int32 numbers stand for them, in the same order.

    Raises:
      TypeError: for what is no integer, and where ids would have to be numbered that are traced.
      ValueError: for other ranks.
    """
    arrays = [_fitting(_read(*argument)) for argument in given]
    dtype = _common([array.dtype for array in arrays])
    if dtype is not None:
        return tuple(jnp.asarray(array).astype(dtype) for array in arrays)
    values = [concrete(array) for array in arrays]
    if any(each is None for each in values):
        came = " and ".join(
            f"{name} of {'traced ' * (each is None)}{_named(array.dtype)}"
            for (_, name, _), array, each in zip(given, arrays, values, strict=True)
        )
        raise TypeError(
            f"{came}: no integer dtype of JAX holds both here; number the ids together before they "
            "are traced, as np.unique(ids, return_inverse=True)[1] does, or cast both to one dtype"
        )
    return _numbered([np.asarray(each) for each in values])


def _named(dtype: Any) -> str:
    return "integers of more than 64 bits" if _is_python(dtype) else str(dtype)


def _fitting(array: Any) -> Any:
    """The same array, as int32 where NumPy's is wider than its values need."""
    small = array.dtype.itemsize <= 4 and not _is_python(array.dtype)
    if small or not isinstance(array, np.ndarray):
        return array
    return array.astype(np.int32) if beyond(array) is None else array


def _common(dtypes: Sequence[Any]) -> Any:
    """The integer dtype that holds all values of these dtypes; None where JAX has none."""
    if all(dtype == dtypes[0] for dtype in dtypes):
        common = dtypes[0]
    else:
        try:
            common = reduce(np.promote_types, dtypes)
        except TypeError:
            # JAX's own dtypes of less than a byte.
            return None
    has = np.issubdtype(common, np.integer) or jnp.issubdtype(common, jnp.integer)
    return common if has and jax.dtypes.canonicalize_dtype(common) == common else None


def _numbered(arrays: Sequence[np.ndarray]) -> tuple[Array, ...]:
    """Each value's rank among all values that occur, from 0."""
    dtype = np.result_type(*arrays)
    # NumPy promotes int64 and uint64 to float64.
    exact = dtype if np.issubdtype(dtype, np.integer) else np.dtype(object)
    every = np.concatenate([array.astype(exact).ravel() for array in arrays])
    numbers = np.unique(every, return_inverse=True)[1].astype(np.int32)
    ends = np.cumsum([array.size for array in arrays])[:-1]
    parts = np.split(numbers, ends)
    return tuple(
        jnp.asarray(part.reshape(array.shape)) for part, array in zip(parts, arrays, strict=True)
    )


def plain(value: Any, name: str, minimum: int) -> int:
    """A number on which shapes depend, as an `int`.

    Raises:
      TypeError: for what is no integer, or is traced.
      ValueError: for what is below the minimum or beyond int32.
    """
    array = as_given(value) if isinstance(value, (int, np.generic, np.ndarray, jax.Array)) else None
    traced = isinstance(value, jax.core.Tracer)
    if array is None or traced or array.ndim or not is_integer(array):
        got = "a traced value" if traced else repr(value)
        raise TypeError(f"{name}: got {got}, expected one integer, at least {minimum}")
    if not minimum <= (number := int(value)) <= MOST:
        raise ValueError(f"{name}: got {number}, expected at least {minimum}, and below 2**31")
    return number


def check_exact(arguments: Any, name: str) -> None:
    """Checks that the integers among a function's arguments are not wrapped around by JAX.

    Raises:
      ValueError: for one that is.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
        if isinstance(leaf, (int, np.integer)) and not isinstance(leaf, np.generic):
            dtype: Any = np.dtype(np.int32)
        elif isinstance(leaf, (np.ndarray, np.generic)) and np.issubdtype(leaf.dtype, np.integer):
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        else:
            continue
        least, most = _range(dtype) or (LEAST, MOST)
        values = np.asarray(leaf)
        wrapped = values[(values < least) | (values > most)]
        if wrapped.size:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: got {wrapped.flat[0]}, which {dtype} does "
                "not hold (positions are int32); give the nearest number that it holds, number "
                "ids by np.unique(ids, return_inverse=True)[1], or enable JAX's 64 bits for arrays"
            )

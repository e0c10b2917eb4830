"""Errors in a user's function of positions, in the user's terms: its name, file and line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import CodeType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FIRST = "b, h, q and k stand for all positions at once"

# What JAX refuses to do with a position, and what to write instead; subclasses first.
_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (
        jax.errors.TracerBoolConversionError,
        f"`and`, `or`, `not`, `if` and `a < b < c` ask for one truth value, and {_FIRST}; write "
        "`&`, `|`, `~` with comparisons in parentheses, and jnp.where for `if`",
    ),
    (
        jax.errors.TracerIntegerConversionError,
        f"lists and `range` ask for one number, and {_FIRST}; read a JAX array instead: "
        "jnp.asarray(table)[...]",
    ),
    (
        jax.errors.TracerArrayConversionError,
        f"NumPy can't compute with a position, as {_FIRST}; write jnp for np, and "
        "jnp.asarray(table) for its arrays",
    ),
    (
        jax.errors.ConcretizationTypeError,
        f"`int`, `float` and `range` ask for one number, and {_FIRST}; write jnp.where and other "
        "functions of jax.numpy",
    ),
)


def code_object(fn: Any) -> CodeType | None:
    """The code object of a function, of a `partial`, or of an object's `__call__`."""
    while isinstance(fn, partial):
        fn = fn.func
    fn = inspect.unwrap(fn)
    fn = getattr(fn, "__func__", fn)
    # The calls of an object go to its class.
    fn = fn if hasattr(fn, "__code__") else getattr(type(fn), "__call__", None)  # noqa: B004
    return getattr(fn, "__code__", None)


def held_by(fn: Any) -> dict[str, Any]:
    """What a function reads besides its arguments, by name: what it closes over, its defaults, its
    globals, and the attributes of an object."""
    while isinstance(fn, partial):
        fn = fn.func
    code = getattr(fn, "__code__", None)
    if code is None:
        return dict(getattr(fn, "__dict__", {}))
    defaults = fn.__defaults__ or ()
    last = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    found = dict(zip(last, defaults, strict=True)) | {
        name: fn.__globals__[name] for name in code.co_names if name in fn.__globals__
    }
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        # A cell is empty as long as its name has no value.
        if (held := _content(cell)) is not None:
            found[name] = held
    return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def parameters(fn: Any, first: int) -> list[str]:
    """The names of a function's parameters from the `first` on."""
    return list(inspect.signature(fn).parameters)[first:]


def place(fn: Any, error: BaseException | None = None) -> str:
    """`file:line` of a function, or of the line in it that raised; "" for built-in functions."""
    code = code_object(fn)
    if code is None:
        return ""
    line, trace = code.co_firstlineno, None if error is None else error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == code.co_filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{code.co_filename}:{line}"


def named(name: str, fn: Any, error: BaseException | None = None) -> str:
    """A mask or score with its place: `predicate(near) (model.py:12)`."""
    where = place(fn, error)
    return f"{name} ({where})" if where else name


def explained(
    error: Exception, fn: Callable[..., Any], name: str, signature: str, args: Sequence[Any]
) -> TypeError | None:
    """A clearer error for one that a user's function raised; `None` where the first is clear.

    Args:
      error: what was raised.
      fn: the function.
      name: the repr of its mask or score.
      signature: the parameters it should have, as in "b, h, q, k".
      args: the arguments it was called with.
    """
    for kind, remedy in _REMEDIES:
        if isinstance(error, kind):
            return TypeError(f"{named(name, fn, error)}: {remedy}")
    if not isinstance(error, TypeError):
        return None
    try:
        taken = inspect.signature(fn)
    except (TypeError, ValueError):
        return None
    try:
        taken.bind(*args)
    except TypeError:
        more = len(args) - signature.count(",") - 1
        given = f"({signature}{', and its arguments' if more else ''})"
        return TypeError(
            f"{named(name, fn)}: it takes the arguments ({', '.join(taken.parameters)}) and is "
            f"called with {given}; a function of positions has the signature "
            f"({signature}{', *args' if more else ''})"
        )
    return None


def call_user(fn: Callable[..., Any], args: Sequence[Any], name: str, signature: str) -> Any:
    """The result of a user's function; its errors are explained where that is possible.

    Args:
      fn: the function.
      args: its arguments.
      name: what to call the mask or score in messages.
      signature: the names of the first arguments: "b, h, q, k".
    """
    try:
        return fn(*args)
    except Exception as error:
        clearer = explained(error, fn, name, signature, args)
        if clearer is None:
            raise
        raise clearer from error


def one_bool(result: Any, name: str) -> Any:
    """The result of a function for one query and one key, checked to be one bool.

    Raises:
      TypeError: for anything else.
    """
    return _one(
        result,
        np.bool_,
        f"{name}: for one query and one key it returned",
        "a single bool; a mask is True where the query may attend to the key; numbers belong in "
        "jaxattn.scores",
    )


def one_float(result: Any, name: str) -> Any:
    """The result of a function for one logit, checked to be one float.

    Raises:
      TypeError: for anything else.
    """
    return _one(
        result,
        np.floating,
        f"{name}: for one logit it returned",
        "a single float; a condition belongs in jaxattn.masks",
    )


def _one(result: Any, kind: Any, returned: str, expected: str) -> Any:
    try:
        answer = jnp.asarray(result)
    except (TypeError, ValueError):
        answer = None
    if answer is None or answer.shape != () or not jnp.issubdtype(answer.dtype, kind):
        got = type(result).__name__ if answer is None else f"{answer.dtype}{list(answer.shape)}"
        raise TypeError(f"{returned} {got}, expected {expected}")
    return answer


def uncalled(given: Any, where: str) -> None:
    """Raises for a constructor or a class that was passed without being called."""
    name = getattr(given, "__name__", "")
    if isinstance(given, type):
        raise TypeError(
            f"{where}: got the class {name}, expected an instance; call it: {name}(...)"
        )
    # The room of a constructor, `masks` or `scores`: `jaxattn.masks.by_array`, `jaxattn.scores`.
    package, _, module = (getattr(given, "__module__", None) or "").partition(".")
    if package == "jaxattn" and name.isidentifier():
        full = f"{module.partition('.')[0]}.{name}"
        raise TypeError(
            f"{where}: got the function {full}, expected what it returns; call it: "
            f"{full}({'...' * _required(given)})"
        )


def _required(fn: Callable[..., Any]) -> bool:
    """Whether a function can't be called without arguments."""
    return any(
        p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        for p in inspect.signature(fn).parameters.values()
    )

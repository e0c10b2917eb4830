"""A warning for functions that are compiled anew for every value of a number they capture.

A lambda written anew is compared by what it computes, and a Python number that it closes over is
part of that: `lambda b, h, q, k: q - k < w` compiles anew for each `w`, in about half a second and
a few MB that JAX keeps. An array, or an argument of `masks.predicate`, is data: new values reuse
the compiled program.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from ..checks.user_functions import code_object, held_by
from .program import Program

# A few values are intended, as for local and global layers; more come from a loop.
_FEW = 5
# The number of lines of code that are watched: the last ones.
_WATCHED = 256

_Line = tuple[str, int, int]
_seen: OrderedDict[_Line, set[int]] = OrderedDict()


def watch(fn: Callable[..., Any], name: str, maker: str, program: Program) -> None:
    """Warns, once a line of code, where a function becomes many programs that differ in numbers.

    Args:
      fn: the user's function, or an object that can be called.
      name: what to call it.
      maker: what takes numbers as arguments: "masks.predicate".
      program: what it computes.
    """
    code = code_object(fn)
    if code is None:
        return
    line = (code.co_filename, code.co_firstlineno, program.outline)
    programs = _seen.setdefault(line, set())
    _seen.move_to_end(line)
    if len(programs) < _FEW:
        programs.add(hash(program))
        if len(programs) == _FEW:
            warnings.warn_explicit(_message(fn, name, maker), UserWarning, *line[:2])
    while len(_seen) > _WATCHED:
        _seen.popitem(last=False)


def _message(fn: Callable[..., Any], name: str, maker: str) -> str:
    numbers = {
        name: value
        for name, value in held_by(fn).items()
        if isinstance(value, (bool, int, float, np.number))
    }
    said = ", ".join(f"`{name}`, now {value}" for name, value in numbers.items())
    first = next(iter(numbers), "w")
    code = code_object(fn)
    place = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
    return (
        f"{name}{place}: compiled for {_FEW} values of a Python number that it captures"
        f"{f' ({said})' if said else ''}, and once more for each new one; each takes time, and "
        f"memory that is kept. Make it an array, {first} = jnp.asarray({first}), or an argument, "
        f"{maker}(fn, {first}): new values then reuse the compiled program"
    )

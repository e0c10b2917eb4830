"""Functions of users as `Program`s: traced, and compared by what they compute.

The same lambda written anew is then compiled once, and the arrays it closes over, tracers
included, are leaves like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from types import CellType, FunctionType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .algebra import Mask, Predicate
from .program import Program, trace
from .scores import Score, Scored

M = TypeVar("M", bound=Mask | Score)


def hoist(given: M) -> M:
    """The same mask or score, its functions all the library's own or `Program`s.

    Arrays that a mask's functions close over carry no gradient; those of a score learn.
    """
    if _settled(given):
        return given
    found: list[Any] = []

    def find(array: Any) -> Any:
        found.append(array)
        return array

    _with_functions(given, partial(_opened, swap=find))
    leaves, tree = jax.tree.flatten(given)
    own = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    arrays = [leaves[i] for i in own] + found
    lead = arguments(jnp.float32 if isinstance(given, Score) else None)

    def call(*args: Any) -> Any:
        traced = iter(args[len(lead) :])
        filled = dict(enumerate(leaves)) | {i: next(traced) for i in own}
        part = jax.tree.unflatten(tree, filled.values())
        if found:
            part = _with_functions(part, partial(_opened, swap=lambda _: next(traced)))
        return part(*args[: len(lead)])

    structs = (*lead, *map(struct, arrays))
    program, captured = trace(call, structs, repr(given), differentiated=isinstance(given, Score))
    if isinstance(given, Score):
        return cast(M, Scored(program, (*arrays, *captured)))
    return cast(M, Predicate(program, tuple(map(constant, (*arrays, *captured)))))


def _settled(part: Any) -> bool:
    """Whether every function in a mask or score compares by what it computes."""
    if isinstance(part, (Mask, Score)):
        ours = type(part).__module__.startswith("jaxattn.")
        return ours and all(_settled(getattr(part, f.name)) for f in fields(part))  # type: ignore[arg-type]
    if isinstance(part, tuple):
        return all(map(_settled, part))
    if isinstance(part, FunctionType):
        return part.__module__.startswith("jaxattn.") and "<" not in part.__qualname__
    return isinstance(part, Program) or not callable(part)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float))


def arguments(logit: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a mask (`logit` None) or a score is traced with: int32 positions, after the logit."""
    positions = (jax.ShapeDtypeStruct((), jnp.int32),) * 4
    return positions if logit is None else (jax.ShapeDtypeStruct((), logit), *positions)


def struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf, without where it lies: a trace serves every sharding."""
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def constant(array: Any) -> Any:
    """An array that carries no gradient."""
    inexact = hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.inexact)
    return lax.stop_gradient(array) if inexact else array


# --- arrays on explicit mesh axes -----------------------------------------------------------------
#
# An array whose type says how it is sharded can't be indexed by one position: the type of the
# result would not be known. In leaves it is traced as an array that lies anywhere; in closures it
# has to be found first.


def _with_functions(part: Any, change: Callable[[Any], Any]) -> Any:
    """A mask or score with its static functions changed."""
    if isinstance(part, tuple):
        return tuple(_with_functions(each, change) for each in part)
    if not isinstance(part, (Mask, Score)):
        return part
    changed = {
        f.name: (change if f.metadata.get("static") else partial(_with_functions, change=change))(
            getattr(part, f.name)
        )
        for f in fields(part)  # type: ignore[arg-type]
    }
    return replace(part, **changed)  # type: ignore[type-var]


def _opened(thing: Any, swap: Callable[[Any], Any], within: tuple[int, ...] = ()) -> Any:
    """A function with the explicitly sharded arrays it closes over, directly or not, swapped."""
    again = partial(_opened, swap=swap, within=(*within, id(thing)))
    if isinstance(thing, jax.Array):
        return swap(thing) if any(jax.typeof(thing).sharding.spec) else thing
    if isinstance(thing, partial):
        keywords = {name: again(value) for name, value in thing.keywords.items()}
        return partial(again(thing.func), *map(again, thing.args), **keywords)
    if type(thing) in (tuple, list):
        return type(thing)(map(again, thing))
    if not isinstance(thing, FunctionType) or id(thing) in within:
        return thing
    cells, defaults = thing.__closure__, thing.__defaults__
    made = FunctionType(
        thing.__code__,
        thing.__globals__,
        thing.__name__,
        defaults and again(defaults),
        cells and tuple(CellType(again(cell.cell_contents)) for cell in cells),
    )
    made.__kwdefaults__ = thing.__kwdefaults__
    return made

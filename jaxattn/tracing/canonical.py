"""Masks and scores in canonical form: users' functions traced, compared by what they compute.

A lambda that is written anew in each call is then compiled once, and the arrays that it closes
over, tracers included, become leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import CellType, FunctionType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..checks.user_functions import held_by, one_bool, parameters
from ..masks.mask import Mask, Predicate
from ..pytrees import is_registered
from ..scores import Score, Scored
from .program import Program, trace
from .recompilation_warning import watch

M = TypeVar("M", bound=Mask | Score)


def canonicalize(given: M, logit: Any = jnp.float32) -> M:
    """The same mask or score, with every function of a user's as a `Program`.

    Arrays that a mask's functions close over carry no gradient; those of a score learn. A score is
    traced for logits of the dtype `logit`, and its parameters of 16 bits are float32 from here on:
    their gradients are sums over many cells, to be rounded once.
    """
    if _is_canonical(given):
        return jax.tree.map(_wide, given) if isinstance(given, Score) else given
    if is_registered(type(given)) and not isinstance(given, (Predicate, Scored)):
        # Its parts may hold functions of users.
        return _with_parts(given, partial(canonicalize, logit=logit))
    if jax.tree_util.all_leaves([given]):
        # A class that is no pytree is a function that closes over its attributes.
        given = cast(M, Scored(given) if isinstance(given, Score) else Predicate(given))
    return _traced(given, logit)


def _traced(given: M, logit: Any) -> M:
    """A mask or score as one `Program`."""
    found: list[Any] = []

    def find(array: Any) -> Any:
        found.append(array)
        return array

    _with_functions(given, partial(_with_captured, swap=find))
    leaves, tree = jax.tree.flatten(given)
    own = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    arrays = [leaves[i] for i in own] + found
    if isinstance(given, Score):
        arrays = list(map(_wide, arrays))
    lead = arguments(logit if isinstance(given, Score) else None)

    def call(*args: Any) -> Any:
        traced = iter(args[len(lead) :])
        filled = dict(enumerate(leaves)) | {i: next(traced) for i in own}
        part = jax.tree.unflatten(tree, filled.values())
        if found:
            part = _with_functions(part, partial(_with_captured, swap=lambda _: next(traced)))
        answer = part(*args[: len(lead)])
        return answer if isinstance(given, Score) else one_bool(answer, repr(given))

    fn = getattr(given, "fn", given)
    if isinstance(fn, (FunctionType, Mask, Score)):
        # JAX's messages then name the user's function, and not this one.
        call.__wrapped__ = fn if isinstance(fn, FunctionType) else fn.__call__  # type: ignore[attr-defined]
    structs = (*lead, *map(struct, arrays))
    program, captured = trace(call, structs, repr(given), differentiated=isinstance(given, Score))
    program = replace(program, labels=_names(given, (*arrays, *captured)))
    maker = "scores.score" if isinstance(given, Score) else "masks.predicate"
    watch(fn, repr(given), maker, program)
    if isinstance(given, Score):
        return cast(M, Scored(program, (*arrays, *captured)))
    return cast(M, Predicate(program, tuple(map(constant, (*arrays, *captured)))))


def _names(given: Any, arrays: tuple[Any, ...]) -> tuple[str, ...]:
    """The names that a user's function has for arrays it takes or closes over; "" for none."""
    fn = getattr(given, "fn", given)
    names = {id(value): name for name, value in held_by(fn).items()}
    taken = (*getattr(given, "args", ()), *getattr(given, "params", ()))
    if taken:
        named = zip(parameters(fn, 4 + isinstance(given, Score)), taken, strict=False)
        names |= {id(value): name for name, value in named}
    return tuple(names.get(id(array), "") for array in arrays)


def _is_canonical(part: Mask | Score) -> bool:
    """Whether a mask or score compares by what it computes."""
    if isinstance(part, (Predicate, Scored)):
        return isinstance(part.fn, Program)
    return is_registered(type(part)) and all(map(_is_canonical, _parts(part)))


def _parts(part: Mask | Score) -> Iterator[Mask | Score]:
    """The masks or scores that one is made of."""
    for held in vars(part).values():
        for each in held if isinstance(held, tuple) else (held,):
            if isinstance(each, (Mask, Score)):
                yield each


def _with_parts(part: M, change: Callable[[Any], Any]) -> M:
    """A mask or score with the masks or scores that it is made of changed."""

    def changed(held: Any) -> Any:
        if isinstance(held, tuple):
            return tuple(map(changed, held))
        return change(held) if isinstance(held, (Mask, Score)) else held

    held = {f.name: changed(getattr(part, f.name)) for f in fields(part)}  # type: ignore[arg-type]
    return replace(part, **held)  # type: ignore[type-var]


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


def _is_narrow(array: Any) -> bool:
    """Whether an array is of floats of 16 bits, or fewer."""
    floats = hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)
    return floats and array.dtype.itemsize < 4


def _wide(array: Any) -> Any:
    """An array, in float32 if it is of narrower floats."""
    if not _is_narrow(array):
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, jnp.float32)
    return jnp.asarray(array).astype(jnp.float32)


# --- arrays in closures ---------------------------------------------------------------------------
#
# An array on explicit mesh axes has a sharding in its type, and can't be indexed by one position.
# Leaves are traced without their sharding. Arrays in closures have to be found first; functions
# that make mesh axes automatic reach arguments only. Likewise floats of 16 bits, which scores
# compute with in float32.


def _with_functions(part: Any, change: Callable[[Any], Any]) -> Any:
    """A mask or score with its static functions changed."""
    if isinstance(part, tuple):
        return tuple(_with_functions(each, change) for each in part)
    if not isinstance(part, (Mask, Score)) or not is_dataclass(part):
        return part
    changed = {
        f.name: (change if f.metadata.get("static") else partial(_with_functions, change=change))(
            getattr(part, f.name)
        )
        for f in fields(part)
    }
    return replace(part, **changed)


def _with_captured(thing: Any, swap: Callable[[Any], Any], above: tuple[int, ...] = ()) -> Any:
    """A function with some of the arrays that it closes over, directly or not, replaced.

    Replaced are arrays on explicit mesh axes, and floats of 16 bits.
    """
    again = partial(_with_captured, swap=swap, above=(*above, id(thing)))
    if isinstance(thing, jax.Array):
        apart = any(jax.typeof(thing).sharding.spec) or _is_narrow(thing)
        return swap(thing) if apart else thing
    if isinstance(thing, partial):
        keywords = {name: again(value) for name, value in thing.keywords.items()}
        return partial(again(thing.func), *map(again, thing.args), **keywords)
    if type(thing) in (tuple, list):
        return type(thing)(map(again, thing))
    if isinstance(thing, (Mask, Score)) and hasattr(thing, "__dict__"):
        made = copy(thing)
        for name, value in vars(thing).items():
            object.__setattr__(made, name, again(value))
        return made
    if not isinstance(thing, FunctionType) or id(thing) in above:
        return thing
    cells, defaults = thing.__closure__, thing.__defaults__
    function = FunctionType(
        thing.__code__,
        thing.__globals__,
        thing.__name__,
        defaults and again(defaults),
        cells and tuple(CellType(again(cell.cell_contents)) for cell in cells),
    )
    function.__kwdefaults__ = thing.__kwdefaults__
    return function

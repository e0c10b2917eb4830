"""What a step of a program computes, as something that can be hashed and compared.

Constants are compared by their bits; the bodies of loops and branches, and functions with
derivatives of their own, by what they compute.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal


@dataclass(frozen=True, eq=False)
class Const:
    """A scalar written in the code, equal to others by dtype and bits (NaN included)."""

    value: Any

    @cached_property
    def _key(self) -> Hashable:
        value = np.asarray(self.value)
        return value.dtype, value.shape, value.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


Ref: TypeAlias = "int | Const"


class Type(NamedTuple):
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: Any


def type_of(const: Const) -> Type:
    """The type of a scalar written in the code."""
    value = np.asarray(const.value)
    return Type(value.shape, value.dtype)


# Calls with derivatives of their own, and what those are called in a step's parameters.
RULED = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def literal(atom: Any) -> Any:
    """The value of a literal in a jaxpr, as a NumPy scalar of its dtype."""
    return np.asarray(atom.val, atom.aval.dtype)[()]


def frozen(
    prim: Any, params: dict[str, Any], types: Iterable[Type], rules: bool = True
) -> Hashable:
    """A hashable stand-in for what a step computes, apart from its arguments."""
    if prim.name not in RULED:
        return _freeze(params, rules)
    if not rules:
        return _freeze(params[RULED[prim.name]], rules)
    # The rules are functions, made anew by every trace: what they compute tells them apart. (Once:
    # a rule may call the function that it is the rule of.)
    args = [jax.ShapeDtypeStruct(*type) for type in types]

    def call(*args: Any) -> Any:
        return bind(prim, params, args)

    def forward(*args: Any) -> Any:
        return jax.jvp(call, args, args)

    def backward(*args: Any) -> Any:
        out, back = jax.vjp(call, *args)
        return out, back(out)

    if not all(jnp.issubdtype(arg.dtype, jnp.floating) for arg in args):
        return _freeze(params)
    derivative = forward if prim.name == "custom_jvp_call" else backward
    return _freeze(jax.make_jaxpr(derivative)(*args), rules=False)


def bind(prim: Any, params: dict[str, Any], args: Sequence[Any]) -> Any:
    """Applies a primitive with the parameters of a step."""
    return prim.bind(*args, **(prim.get_bind_params(params) if prim.name in RULED else params))


def _freeze(thing: Any, rules: bool = True) -> Hashable:
    """A hashable stand-in for the parameters of a step; equal stand-ins compute the same."""
    body = getattr(thing, "jaxpr", thing)
    if hasattr(body, "eqns"):
        return _freeze_jaxpr(body, getattr(thing, "consts", ()), rules)
    if isinstance(thing, dict):
        return tuple((key, _freeze(value, rules)) for key, value in sorted(thing.items()))
    if isinstance(thing, (list, tuple)):
        return type(thing).__name__, tuple(_freeze(each, rules) for each in thing)
    if isinstance(thing, (float, np.ndarray, np.generic)):
        # By bits: NaN is equal to itself here, and 0.0 is not -0.0.
        value = np.asarray(thing)
        return type(thing).__name__, value.dtype, value.shape, value.tobytes()
    try:
        hash(thing)
    except TypeError:
        return _Identity(thing)
    return type(thing).__name__, thing


def has_body(thing: Any) -> bool:
    """Whether a parameter of a step holds code of its own."""
    if isinstance(thing, (list, tuple)):
        return any(map(has_body, thing))
    return hasattr(getattr(thing, "jaxpr", thing), "eqns")


@dataclass(frozen=True, eq=False)
class _Identity:
    """Equal only for the same object, which it keeps alive so that no other can take its id."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _freeze_jaxpr(jaxpr: Any, consts: Iterable[Any], rules: bool) -> Hashable:
    names: dict[Any, int] = {}

    def name(atom: Any) -> Hashable:
        if isinstance(atom, Literal):
            return Const(literal(atom))
        return names.setdefault(atom, len(names)), atom.aval.shape, atom.aval.dtype

    return (
        "jaxpr",
        tuple(map(_Identity, consts)),
        tuple(map(name, (*jaxpr.constvars, *jaxpr.invars))),
        tuple(
            (
                eqn.primitive.name,
                tuple(map(name, eqn.invars)),
                frozen(eqn.primitive, eqn.params, map(_aval_type, eqn.invars), rules),
                tuple(map(name, eqn.outvars)),
            )
            for eqn in jaxpr.eqns
        ),
        tuple(map(name, jaxpr.outvars)),
    )


def _aval_type(atom: Any) -> Type:
    return Type(atom.aval.shape, atom.aval.dtype)

"""Frozen dataclasses as pytrees, equal by structure, so that equal masks are compiled once.

JAX and Flax compare what they take as static: `static_argnums`, the attributes of modules. There a
mask that is made anew in each call has to equal the one before, or everything is traced again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

C = TypeVar("C")


def static(**options: Any) -> Any:
    """A dataclass field that is structure, not a leaf."""
    return field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, field))
def pytree(cls: type[C]) -> type[C]:
    """A frozen dataclass as a pytree; fields made by `static` are its structure."""
    # eq=False: equality of arrays is elementwise, so a generated __eq__ could only mislead; masks,
    # scores, positions and caches are compared `ByStructure`.
    made = dataclass(frozen=True, eq=False, repr=False)(cls)
    return registered(made)


def registered(cls: type[C]) -> type[C]:
    """A frozen dataclass registered as a pytree; fields made by `static` are its structure."""
    # Not jax.tree_util.register_dataclass: structures of its classes are equal where their fields
    # are, whatever the class, and a program compiled for `a & b` may then be run for `a | b`.
    leaves, structure = (
        tuple(each.name for each in fields(cls) if bool(each.metadata.get("static")) is fixed)  # type: ignore[arg-type]
        for fixed in (False, True)
    )
    names = leaves + structure
    keys = tuple(map(jax.tree_util.GetAttrKey, leaves))
    values_of, fixed_of = _getter(leaves), _getter(structure)

    def flatten(thing: C) -> tuple[Iterable[Any], tuple[Any, ...]]:
        return values_of(thing), fixed_of(thing)

    def flatten_with_keys(thing: C) -> tuple[Iterable[tuple[Any, Any]], tuple[Any, ...]]:
        return zip(keys, values_of(thing), strict=True), fixed_of(thing)

    def unflatten(fixed: tuple[Any, ...], values: Iterable[Any]) -> C:
        thing = object.__new__(cls)
        vars(thing).update(zip(names, (*values, *fixed), strict=True))
        return thing

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    _registered.add(cls)
    return cls


_registered: set[type] = set()


def is_registered(cls: type) -> bool:
    """Whether `registered` made it a pytree: then its type and its fields are all there is to it.

    A class of a user's may hold anything, and is compared by what it computes.
    """
    return cls in _registered


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """A fast function that reads attributes: masks are flattened many times in a call."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda thing: tuple([getattr(thing, name) for name in names])


class ByStructure:
    """A pytree that is equal to another, with the same hash, if both were written alike.

    That is: by the same functions (a lambda written twice is two), of the same numbers, put
    together in the same way. A pytree with arrays is equal only to itself and has no hash:
    arrays belong among the arguments of a compiled function.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, ByStructure):
            return NotImplemented
        mine = _structure(self)
        return mine is not None and mine == _structure(other)

    def __hash__(self) -> int:
        structure = _structure(self)
        if structure is None:
            name = repr(self).partition("\n")[0]
            raise TypeError(
                f"{name}: it holds arrays, so it has no hash and can't be a static argument or "
                "attribute; pass it as an argument of the compiled function, where its arrays are "
                "leaves, or pass a function that makes it"
            )
        return hash(structure)


def _structure(thing: Any) -> Hashable | None:
    """What is compared; `None` for what holds arrays."""
    leaves, tree = jax.tree.flatten(thing)
    if len(leaves) == 1 and leaves[0] is thing:
        # A class that is no pytree is compared as an object.
        return id(thing)
    if any(map(_is_array, leaves)):
        return None
    return tree, tuple(map(_number, leaves))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and not isinstance(leaf, np.generic)


def _number(leaf: Any) -> Hashable:
    """A number apart from equal ones of other types, floats by their bits: NaN equals itself."""
    if isinstance(leaf, float):
        return float, leaf.hex()
    if isinstance(leaf, np.generic):
        return leaf.dtype, leaf.tobytes()
    return type(leaf), leaf

"""What to call the arrays of a mask or score in messages, as their user wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import jax

from ..checks.user_functions import parameters
from ..masks.mask import BuiltInMask, Mask, Predicate, argument, constructor
from ..scores import BuiltInScore, Score, Scored
from .program import Program


def labels(given: Mask | Score, *, own: bool = False) -> list[str]:
    """What to call the leaves of a mask or score: `causal(offset)`, `` `table` of predicate(f) ``.

    With `own`, a leaf's name in the formula alone: `offset`, `table`.
    """
    return [_label(given, path, own) for path, _ in jax.tree_util.tree_flatten_with_path(given)[0]]


def _label(given: Any, path: Sequence[Any], own: bool) -> str:
    """What to call the leaf at a path: a field of the innermost mask or score, or what it holds."""
    at, owner, rest = given, given, path
    for i, key in enumerate(path):
        if isinstance(at, (Mask, Score)):
            owner, rest = at, path[i:]
        if isinstance(key, jax.tree_util.GetAttrKey):
            at = getattr(at, key.name)
        elif isinstance(key, (jax.tree_util.SequenceKey, jax.tree_util.DictKey)):
            at = at[getattr(key, "idx", getattr(key, "key", None))]
        else:
            break  # a user's class that says no more
    name = _argument(owner, rest, own)
    if own:
        return name or "an array"
    if isinstance(owner, (Predicate, Scored)):
        return f"`{name}` of {owner!r}" if name else f"an array of {owner!r}"
    built_in = isinstance(owner, (BuiltInMask, BuiltInScore))
    maker = constructor(type(owner)) if built_in else type(owner).__name__
    return f"{maker}({name})" if name else f"an array of {maker}"


def _argument(owner: Any, path: Sequence[Any], own: bool) -> str:
    """The argument that a leaf of a mask or score is a part of; "" where it has no name."""
    if not isinstance(path[0], jax.tree_util.GetAttrKey):
        return ""
    if not isinstance(owner, (Predicate, Scored)):
        named = {each.name: each for each in fields(owner)} if is_dataclass(owner) else {}
        name = path[0].name
        return argument(named[name]) if name in named and not own else name
    if isinstance(owner.fn, Program):
        names = list(owner.fn.labels)
    else:
        names = parameters(owner.fn, 4 + isinstance(owner, Score))
    index = path[1].idx
    return names[index] if index < len(names) else ""

"""Arguments that go by another name elsewhere: refused, with the name that they have here."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Of what looks at a mask: the letters of a predicate.
ROW_AND_HEAD = dict.fromkeys(("row", "rows", "batch"), "b=, the batch row, as in a predicate")
ROW_AND_HEAD |= dict.fromkeys(("head", "heads"), "h=, the query head, as in a predicate")


def spelled(name: str, **ours: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function that users call: an argument that it does not have is refused in its words.

    Args:
      name: the function, as users write it.
      **ours: how an argument of that other name is written here.

    The call then raises `TypeError`, which says the spelling, or which arguments there are.
    """

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        named = [
            each.name
            for each in signature(fn).parameters.values()
            if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        ]

        @wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for given in kwargs:
                if given in ours:
                    raise TypeError(f"{name}({given}): no such argument; write {ours[given]}")
                if given not in named:
                    raise TypeError(
                        f"{name}({given}): no such argument, expected one of {', '.join(named)}"
                    )
            return fn(*args, **kwargs)

        return call

    return decorate

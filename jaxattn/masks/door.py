"""The door from a mask to its views.

Users look for `mask.show()` and `mask.why()` on the mask itself. What these do is built on tile
maps and traces, which are built on masks: an import from here would close a circle. So
`jaxattn.views`, which is imported last, attaches its functions here, as JAX attaches the methods of
its arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..shapes import Array
from .results import Description, Diff, Html, Why


@dataclass(frozen=True)
class Views:
    """The functions behind the methods of `Mask`; each takes the mask first."""

    dense: Callable[..., Array]
    text: Callable[..., str]
    plot: Callable[..., Any]
    html: Callable[..., Html]
    notebook: Callable[..., str | None]
    why: Callable[..., Why]
    diff: Callable[..., Diff]
    describe: Callable[..., Description]


_attached: list[Views] = []


def attach(views: Views) -> None:
    """Makes the views known to all masks; `jaxattn.views` calls it as it is imported."""
    _attached[:] = [views]


def views() -> Views:
    """The views that are attached."""
    return _attached[0]

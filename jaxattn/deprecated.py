"""Import paths of earlier versions: they still work, and say what to write instead."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

# Modules of before, and those that have their names now.
MOVED = {
    "show": ("views.text", "views.diff"),
    "plot": ("views.plot",),
    "html": ("views.html",),
    "why": ("views.why",),
}


class Moved(ModuleType):
    """A module that hands on its names from where they are now, with a warning."""

    def __init__(self, old: str, new: tuple[str, ...]) -> None:
        super().__init__(f"jaxattn.{old}", f"Moved to {', '.join(f'`jaxattn.{n}`' for n in new)}.")
        self._new = new

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__"):
            for new in self._new:
                module = importlib.import_module(f"jaxattn.{new}")
                if hasattr(module, name):
                    warnings.warn(
                        f"{self.__name__}.{name}: it has moved; write jaxattn.{new}.{name}",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def install() -> None:
    """Makes the old paths importable."""
    for old, new in MOVED.items():
        sys.modules[f"jaxattn.{old}"] = Moved(old, new)

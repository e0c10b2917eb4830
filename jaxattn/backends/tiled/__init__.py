"""TODO room."""

from .backend import (
    LIMITS,
    WHY,
    build,
    footprint,
    prepare,
    refuse,
    run,
)

__all__ = [
    "LIMITS",
    "WHY",
    "build",
    "footprint",
    "prepare",
    "refuse",
    "run",
]

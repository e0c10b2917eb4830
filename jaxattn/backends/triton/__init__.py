"""TODO room."""

from .backend import (
    LIMITS,
    WHY,
    footprint,
    interpreted,
    prepare,
    refuse,
    run,
)

__all__ = [
    "LIMITS",
    "WHY",
    "footprint",
    "interpreted",
    "prepare",
    "refuse",
    "run",
]

"""TODO room."""

from .backend import (
    ENGINE,
    INTERPRETED,
    LIMITS,
    WHY,
    build,
    footprint,
    obstacle,
    prepare,
    refuse,
    run,
)

__all__ = [
    "ENGINE",
    "INTERPRETED",
    "LIMITS",
    "WHY",
    "build",
    "footprint",
    "obstacle",
    "prepare",
    "refuse",
    "run",
]

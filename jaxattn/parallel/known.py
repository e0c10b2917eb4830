"""What is known of a mask when a program is traced."""

from __future__ import annotations

from typing import Any

import jax

from ..masks.mask import And, Mask, as_mask
from ..masks.positions import Positions
from ..tiles.tile_map import TileMap
from ..tracing.canonical import canonicalize
from ..tracing.split import split

COUNTED = Positions()


def is_known(tree: Any) -> bool:
    """Whether the values of all arrays, of a mask for example, are known, on every host."""
    return not any(map(_is_unknown, jax.tree.leaves(tree)))


def _is_unknown(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return True
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def plain(given: Any) -> Mask | None:
    """The mask of an argument, its functions traced: without states of tiles. None without one."""
    if given is None:
        return None
    return canonicalize(as_mask(given.mask if isinstance(given, TileMap) else given))


def known_part(mask: Mask, positions: Positions = COUNTED) -> Mask | None:
    """What is certain of a canonical mask: its conjuncts that are known. None if there are none.

    A conjunct that reads batch rows or heads is not known where `positions` has traced ones.
    """
    if isinstance(mask, And):
        found = (known_part(part, positions) for part in (mask.left, mask.right))
        parts = [part for part in found if part is not None]
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]
    if not is_known(mask):
        return None
    traced = {name for name in "bh" if not is_known(getattr(positions, name))}
    return None if traced and traced & split(mask, positions).plan.reads else mask

"""What is known of a mask when a program is traced."""

from __future__ import annotations

from typing import Any

import jax

from ..masks.mask import And, Mask


def is_known(tree: Any) -> bool:
    """Whether the values of all arrays, of a mask for example, are known, on every host."""
    return not any(map(_is_unknown, jax.tree.leaves(tree)))


def _is_unknown(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return True
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def known_part(mask: Mask) -> Mask | None:
    """What is certain of a mask: its conjuncts that are known. None if there are none."""
    if isinstance(mask, And):
        parts = [part for part in map(known_part, (mask.left, mask.right)) if part is not None]
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1]
    return mask if is_known(mask) else None

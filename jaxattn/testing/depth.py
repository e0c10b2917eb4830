"""What several layers reach, and the mask of one of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..shapes import Bool


def power(step: Bool[np.ndarray, "B T T"], layers: int) -> Bool[np.ndarray, "B T T"]:
    """Which inputs are reached by paths of exactly `layers` steps."""
    reach, wide = step, step.astype(np.float32)
    for _ in range(layers - 1):
        reach = reach.astype(np.float32) @ wide > 0
    return reach


class OneLayer(NamedTuple):
    """The mask of one layer, as far as what all layers reach determines it.

    Attributes:
      mask: `[B, T, T]`; the reach itself where nothing was found.
      determined: whether it is the only one among the candidates.
      told: a sentence about it.
    """

    mask: Bool[np.ndarray, "B T T"]
    determined: bool
    told: str


def one_layer(reach: Bool[np.ndarray, "B T T"], layers: int) -> OneLayer:
    """Solves `power(mask, layers) == reach` for a mask that is the reach within a band.

    On each side of the diagonal the band is as wide as the reach, or its width divided by
    `layers`: relations that are transitive (causal, segments, chunks, prefixes) stay as they are,
    and a window of `layers * w` comes from one of `w`. The first that fits is the largest. Each is
    checked by its power.
    """
    lag = np.subtract.outer(np.arange(reach.shape[-1]), np.arange(reach.shape[-1]))
    seen = lag[reach.any(0)]
    left, right = int(seen.max(initial=0)), int(-seen.min(initial=0))
    # The least lag that `layers` steps may add up from: in a dilated mask not every lag is seen.
    narrow_left = int(seen[seen * layers >= left].min(initial=left))
    narrow_right = -int(seen[seen * layers <= -right].max(initial=-right))
    bands = [
        (left, right), (left, narrow_right), (narrow_left, right), (narrow_left, narrow_right),
    ]  # fmt: skip
    fits: list[tuple[np.ndarray, str]] = []
    for least, most in dict.fromkeys((-right, left) for left, right in bands):
        mask = reach & (lag >= least) & (lag <= most)
        if (power(mask, layers) == reach).all() and not any((mask == m).all() for m, _ in fits):
            fits.append((mask, f"{least} <= q - k <= {most}"))
    if not fits:
        return OneLayer(
            reach,
            False,
            f"the mask of one layer is not determined by what {layers} layers reach, which is "
            "what is shown; where= measures one layer",
        )
    mask, band = fits[0]
    kept = "what all layers reach is transitive, and one layer may see as much"
    cut = f"one layer is what all layers reach, within {band}"
    told = kept if (mask == reach).all() else cut
    told += f" (checked: {layers} of them reach the same)"
    if len(fits) == 1:
        return OneLayer(mask, True, told)
    return OneLayer(
        mask,
        False,
        f"{told}; a narrower one, {fits[-1][1]}, reaches the same at this length: longer inputs, "
        "or where=, tell them apart",
    )

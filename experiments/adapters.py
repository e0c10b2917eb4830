"""Low-rank adapters: what a pretrained model learns beside its frozen weights.

LoRA, Hu et al. 2021, arXiv 2106.09685: a projection `x W` becomes `x W + scale * (x down) up`,
where `down` has few columns and `up` few rows. `up` begins at zero, so the model begins as it was.

Axes: D features of the input, R the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import weights
from data import DataError
from flax import nnx
from llama import Llama

from jaxattn.shapes import Array, Float

# Projections of a block that may have an adapter; the first four are of its attention.
PROJECTIONS = ("query", "key", "value", "out", "mlp_gate", "mlp_in", "mlp_out")
# What of a model is an adapter, for `nnx.split`.
ADAPTERS = nnx.Any(nnx.PathContains("down"), nnx.PathContains("up"))


class LowRank(nnx.Module):
    """A projection, and its adapter.

    Args:
      base: the projection; it may have several axes on either side, as those of attention do.
      rank: R.
      scale: of what the adapter adds.
      rngs: for `down`.
    """

    def __init__(self, base: Any, rank: int, scale: float, *, rngs: nnx.Rngs) -> None:
        self.base, self.scale = base, scale
        given = {"axis": base.axis} if isinstance(base, nnx.LinearGeneral) else {}
        self.down = nnx.LinearGeneral(base.in_features, rank, use_bias=False, rngs=rngs, **given)
        zeros = nnx.initializers.zeros_init()
        self.up = nnx.LinearGeneral(
            rank, base.out_features, use_bias=False, kernel_init=zeros, rngs=rngs
        )

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B features"]:
        return self.base(x) + self.scale * self.up(self.down(x))

    def merged(self) -> Any:
        """The projection with the adapter in its weights: nothing more to compute."""
        added = jnp.tensordot(self.down.kernel[...], self.up.kernel[...], 1)
        self.base.kernel[...] += self.scale * added
        return self.base


def _projections(model: Llama) -> Iterator[tuple[nnx.Module, str]]:
    """Each projection as the attribute of a module."""
    for block in model.blocks:
        for name in PROJECTIONS:
            yield (block.attention if name in PROJECTIONS[:4] else block), name


def check(names: Sequence[str]) -> None:
    """Refuses names of projections that there are not."""
    if unknown := set(names) - set(PROJECTIONS):
        raise DataError(
            f"no projection {', '.join(sorted(unknown))}; there are {', '.join(PROJECTIONS)}"
        )


def adapt(model: Llama, names: Sequence[str], rank: int, scale: float, seed: int) -> None:
    """Puts adapters beside the named projections of each block."""
    rngs = nnx.Rngs(seed)
    for owner, name in _projections(model):
        if name in names:
            setattr(owner, name, LowRank(getattr(owner, name), rank, scale, rngs=rngs))


def merge(model: Llama) -> None:
    """Adds the adapters to the weights beside them; the model is then an ordinary one."""
    for owner, name in _projections(model):
        if isinstance(found := getattr(owner, name), LowRank):
            setattr(owner, name, found.merged())


def save(path: Path, adapters: nnx.State) -> None:
    """Writes adapters as a safetensors file, by the names of their places in the model."""
    named = {
        ".".join(map(str, place)): np.asarray(variable[...])
        for place, variable in nnx.to_flat_state(adapters)
    }
    safetensors.numpy.save_file(named, path)


def load(path: Path, adapters: nnx.State) -> None:
    """Reads adapters of the same places and shapes.

    Raises:
      DataError: for a file that can't be read, or has others.
    """
    try:
        found = weights.read_safetensors(path, path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; train first: make tune") from None
    for place, variable in nnx.to_flat_state(adapters):
        variable[...] = jnp.asarray(found.take(".".join(map(str, place)), *variable.shape))
    found.finish()

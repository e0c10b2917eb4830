"""Rotary position embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ..checks.arrays import array_of, described
from ..shapes import Array, Float, Int


@dataclass(frozen=True)
class RoPE:
    """Rotary position embeddings: pairs of features turn with the position.

    `x[i], x[i + d/2]` turn by the angle `position * theta ** (-2 i / d)`, so that `q . k` depends
    on the positions through `q - k` alone. Pairs are halves apart, as in Llama and `flax.nnx.RoPE`.

    Attributes:
      theta: the base of the frequencies.
      fraction: of the head dimension that turns; the rest stays (GPT-NeoX).

    Source: Su et al. 2021, arXiv 2104.09864.
    """

    theta: float = 10_000.0
    fraction: float = 1.0

    def __post_init__(self) -> None:
        real = (int, float, np.integer, np.floating)
        for name, most in (("theta", np.inf), ("fraction", 1)):
            given = getattr(self, name)
            number = isinstance(given, real) and not isinstance(given, bool)
            if not number or not 0 < given <= most or given == np.inf:
                raise ValueError(
                    f"RoPE({name}): got {described(given)}, expected a number above 0"
                    + " and at most 1" * (name == "fraction")
                )

    def __call__(
        self, x: Float[Array, "*B T N H"], positions: Int[Array, "*Bp T"]
    ) -> Float[Array, "*B T N H"]:
        """`x` turned by `positions`, `[T]` or `[B, T]`; angles are float32."""
        x = array_of(x, "x", "floats [B, T, N, H]")
        if x.ndim < 3:
            raise ValueError(f"x: got shape {list(x.shape)}, expected [B, T, N, H] or [T, N, H]")
        positions = array_of(positions, "positions", "integers [T] or [B, T]")
        shape, lead = positions.shape, x.shape[:-2]
        pairs = zip(shape[-2::-1], lead[-2::-1], strict=False)
        shared = len(shape) <= len(lead) and all(n in (1, size) for n, size in pairs)
        if shape[-1:] != lead[-1:] or not shared:
            raise ValueError(
                f"positions: got shape {list(shape)}, expected {list(lead[-1:])}"
                + f" or {list(lead)}" * (len(lead) > 1)
            )
        d = int(x.shape[-1] * self.fraction)
        if d % 2 or d < 2:
            raise ValueError(
                f"RoPE(fraction): got {self.fraction}, {d} features of a head dimension of "
                f"{x.shape[-1]}, expected an even number"
            )
        rates = float(self.theta) ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
        # [(B,) T, 1, d / 2]
        at = positions.reshape(*(1,) * (x.ndim - 2 - positions.ndim), *positions.shape, 1, 1)
        angles = at.astype(jnp.float32) * rates.reshape(*(1,) * (at.ndim - 1), -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        turning = x[..., :d].astype(jnp.float32)
        first, second = turning[..., : d // 2], turning[..., d // 2 :]
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return jnp.concatenate([turned.astype(x.dtype), x[..., d:]], -1)

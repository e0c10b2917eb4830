"""The positions that masks, scores and dropout see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..checks.arrays import array_of
from ..checks.integers import as_given, beyond, is_integer, narrowed
from ..pytrees import ByStructure, registered
from ..shapes import Array, ArrayLike, Int


class Filled(NamedTuple):
    """Positions of everything, int32: `b [B]`, `h [N]`, `q [B|1, T]`, `k [B|1, S]`."""

    b: Array
    h: Array
    q: Array
    k: Array


@registered
@dataclass(frozen=True, eq=False)
class Positions(ByStructure):
    """The positions that masks, scores and dropout see; `None` means 0, 1, 2, ...

    Attributes:
      b: batch rows, int `[B]`.
      h: query heads, int `[N]`.
      q: queries, int `[T]` or `[B, T]`.
      k: keys, int `[S]` or `[B, S]`.

    Any of them may be traced. They describe decoding (`q = length + arange(T)`), ragged batches,
    ring buffers (`k` in storage order), chunked prefill, shards of a longer sequence, and
    bottom-right alignment (`q = arange(T) + S - T`).

    Positions are int32, and so are their differences: results are exact where all of them are at
    least 0, or none is further from 0 than 2**30.

    An array that a mask or score reads at a bare `b`, `h`, `q` or `k` has to have an entry for each
    position given. Where it has none, known positions raise a `ValueError`. With traced positions
    the pair is masked, whatever the mask does with the entry (`~` and `|` included), and a score is
    NaN; the last entry never stands in. An entry may be missing if nothing depends on it: that of a
    later key under `causal()`; where the other part of `|` allows the pair; where
    `jnp.where(k < n, array[k], ...)` takes its other case. Computed indices follow JAX's rules.
    """

    b: Int[ArrayLike, "B"] | None = None
    h: Int[ArrayLike, "N"] | None = None
    q: Int[ArrayLike, "*Bq T"] | None = None
    k: Int[ArrayLike, "*Bk S"] | None = None

    def checked(self, B: int, N: int, T: int, S: int) -> Positions:
        """The same positions with `q` as `[B|1, T]` and `k` as `[B|1, S]`, all int32.

        Raises:
          TypeError: for positions that are not integers.
          ValueError: for positions whose shape does not fit, or beyond int32 (where they are
            traced, the nearest int32 is taken).
        """

        def check(name: str, given: Any, *shapes: tuple[int, ...]) -> Array | None:
            if given is None:
                return None
            expected = " or ".join(str(list(shape)) for shape in shapes)
            array = array_of(given, f"positions.{name}", f"integers {expected}", as_given)
            if not is_integer(array):
                raise TypeError(
                    f"positions.{name}: got dtype {array.dtype}, expected integers: use "
                    ".astype(jnp.int32)"
                )
            if array.shape not in shapes:
                raise ValueError(
                    f"positions.{name}: got shape {list(array.shape)}, expected {expected}"
                )
            if (far := beyond(array)) is not None:
                raise ValueError(
                    f"positions.{name}: got {far}, expected numbers from -2**31 to 2**31 - 1: "
                    "positions are int32; subtract the same number from all of them"
                )
            return narrowed(array)

        b, h = check("b", self.b, (B,)), check("h", self.h, (N,))
        # `[1, T]`, one row for all, is what `checked` returns: it may be checked again.
        q = check("q", self.q, (T,), (B, T), (1, T))
        k = check("k", self.k, (S,), (B, S), (1, S))
        return Positions(
            b,
            h,
            q if q is None or q.ndim == 2 else q[None],
            k if k is None or k.ndim == 2 else k[None],
        )

    def filled(self, B: int, N: int, T: int, S: int) -> Filled:
        """Checked positions, the missing ones counted from 0."""
        given = self.checked(B, N, T, S)

        def count(array: Any, n: int) -> Array:
            return jnp.arange(n, dtype=jnp.int32) if array is None else array

        # Not reshape(-1, T), which does not work for T = 0.
        q, k = (jnp.atleast_2d(count(x, n)) for x, n in ((given.q, T), (given.k, S)))
        return Filled(count(given.b, B), count(given.h, N), q, k)


def as_positions(given: Any) -> Positions:
    """The argument `positions`; without one, those that are counted.

    Raises:
      TypeError: for anything else.
    """
    if given is not None and not isinstance(given, Positions):
        raise TypeError(
            f"positions: got {type(given).__name__}, expected Positions(b=, h=, q=, k=)"
        )
    return given or Positions()


def over_grid(fn: Callable[..., Any], positions: Filled) -> Any:
    """`fn(b, h, q, k)` for every pair: results `[B, N, T, S, ...]`."""
    q, k = positions.q, positions.k
    # An extent of 1 is left out of the batch's vmap, so that it is computed once.
    axes = [None if x.shape[0] == 1 else 0 for x in (q, k)]
    q, k = (x[0] if axis is None else x for x, axis in zip((q, k), axes, strict=True))
    over_k = jax.vmap(fn, (None, None, None, 0))
    over_q = jax.vmap(over_k, (None, None, 0, None))
    over_h = jax.vmap(over_q, (None, 0, None, None))
    return jax.vmap(over_h, (0, None, *axes))(positions.b, positions.h, q, k)

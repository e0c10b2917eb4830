"""The sizes of a problem and of the tiles that it is cut into, as every tile engine needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from .. import base
from ..problem import Inputs

Z = TypeVar("Z", bound="TileSizes")


@dataclass(frozen=True)
class TileSizes:
    """The sizes of a problem, and of its tiles. Engines add their own.

    Attributes:
      B, T, S, K, G, H, Hv: as in `jaxattn.shapes`.
      tq, tk: numbers of queries and keys of a tile.
    """

    B: int
    T: int
    S: int
    K: int
    G: int
    H: int
    Hv: int
    tq: int
    tk: int

    @classmethod
    def of(cls: type[Z], x: Inputs, tile: tuple[int, int], **more: Any) -> Z:
        """The sizes of grouped inputs; `more` are the fields that an engine adds."""
        B, T, K, G, H = x.query.shape
        _, S, _, Hv = x.value.shape
        return cls(B, T, S, K, G, H, Hv, *tile, **more)

    @property
    def N(self) -> int:
        """The number of query heads."""
        return self.K * self.G

    @property
    def Tp(self) -> int:
        """The number of queries, rounded up to whole tiles."""
        return -(-self.T // self.tq) * self.tq

    @property
    def Sp(self) -> int:
        """The number of keys, rounded up to whole tiles."""
        return -(-self.S // self.tk) * self.tk

    @property
    def ragged(self) -> bool:
        """Whether any tile reaches beyond the last query or the last key."""
        return (self.Tp, self.Sp) != (self.T, self.S)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`; 1 if n is symbolic."""
    if base.symbolic(n):
        return 1
    return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)

"""`parallel.explain`: what moves between ranks, how even their work is, and why."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..checks.foreign_names import unexpected
from ..dispatch import choose
from ..masks import full
from ..masks.mask import as_mask
from ..masks.positions import Positions
from ..tiles.tile_map import EMPTY, TileMap, tile_map
from ..tracing.canonical import canonicalize
from . import plan
from .attention import attention, call_of, check_layout, met, reordered
from .known import evaluated, is_known
from .layouts import Layout
from .plan import Sent

# Queries and keys of the tiles that are counted: those of the engine on CPU, and near those of
# kernels.
_TILE = 128

_OPTIONS = frozenset(inspect.signature(attention).parameters) - {"axis"}


@dataclass(frozen=True)
class Plan:
    """What a call of `parallel.attention` does.

    Attributes:
      schedule: how keys reach the queries that see them.
      reason: why this schedule was chosen.
      others: why the others were not, by name.
      backend: what computes a part.
      ranks: the number of ranks.
      sent: bytes that a rank sends, forward and backward.
      tiles: the number of tiles of at most 128 x 128 that each rank computes, over
        all batch rows and heads; None if the mask's arrays are traced.
    """

    schedule: str
    reason: str
    others: dict[str, str]
    backend: str
    ranks: int
    sent: Sent
    tiles: tuple[int, ...] | None

    @property
    def balance(self) -> float | None:
        """The most tiles of a rank, divided by their mean: 1 is even."""
        if self.tiles is None:
            return None
        mean = sum(self.tiles) / len(self.tiles)
        return max(self.tiles) / mean if mean else 1.0

    def __str__(self) -> str:
        lines = [f"schedule: {self.schedule}: {self.reason}"]
        lines += [f"      not {name}: {why}" for name, why in self.others.items()]
        forward, backward = map(plan.as_text, self.sent)
        lines += [
            f"backend:  {self.backend}",
            f"sent:     {forward} a rank forward, {backward} backward",
        ]
        if self.tiles is None:
            return "\n".join([*lines, "tiles:    unknown: the mask's arrays are traced here"])
        counts = ", ".join(map(str, self.tiles[:16])) + ", ..." * (self.ranks > 16)
        return "\n".join(
            [*lines, f"tiles:    {counts} by rank: the most are {self.balance:.2f} of the mean"]
        )


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    ranks: int,
    schedule: str = "auto",
    layout: Layout | None = None,
    backend: str = "auto",
    **options: Any,
) -> Plan:
    """What `parallel.attention` would do, without devices, without doing it.

    Args:
      query, key, value: of the whole sequence: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`, or
        without B; arrays, or `jax.ShapeDtypeStruct`s.
      ranks: the number of devices that share it.
      schedule, layout, backend, **options: as in `parallel.attention`.

    Returns:
      A `Plan`, to print or to read by field.

    Raises:
      TypeError, ValueError: as `parallel.attention`; for lengths that the ranks don't divide.

    Example:
      >>> import jax
      >>> from jaxattn import masks, parallel
      >>> x = jax.ShapeDtypeStruct((1, 16384, 8, 64), "float32")
      >>> print(parallel.explain(x, x, x, ranks=8, mask=masks.causal()).schedule)
      heads
    """
    unknown = {name: given for name, given in options.items() if name not in _OPTIONS}
    if unknown:
        raise unexpected("parallel.explain", unknown, _OPTIONS)
    options.pop("return_lse", None)
    parts = [_part(name, a, ranks) for name, a in zip(_NAMES, (query, key, value), strict=True)]
    lengths = query.shape[-3], key.shape[-3]
    if layout is not None:
        check_layout(layout, ranks, lengths)
    contiguous = layout is None or layout.contiguous
    positions = options.pop("positions", None)
    at = positions if contiguous else reordered(positions, layout)
    mask = options.pop("mask", None)
    given = mask.mask if isinstance(mask, TileMap) and not contiguous else mask
    call = call_of(parts, ranks, {**options, "mask": given, "positions": at})
    chosen = plan.choose(call, schedule, ranks, contiguous)
    local = met(call, chosen, (), ranks)
    return Plan(
        chosen.name,
        chosen.reason,
        chosen.others,
        choose(local, backend).backend,
        ranks,
        chosen.sent[chosen.name],
        _tiles(mask, at, call.sizes, chosen.name, ranks),
    )


_NAMES = ("query", "key", "value")


def _part(name: str, array: Any, ranks: int) -> Any:
    """The shape of one rank's part."""
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) not in (3, 4):
        # Left for the check of arguments, which says what is expected.
        return array
    if ranks < 1 or shape[-3] % ranks:
        raise ValueError(
            f"{name}: got {shape[-3]} tokens, expected a multiple of ranks = {ranks}: pad the "
            "sequence, and mask the padding"
        )
    return jax.ShapeDtypeStruct((*shape[:-3], shape[-3] // ranks, *shape[-2:]), array.dtype)


def _tiles(
    mask: Any, positions: Positions | None, sizes: Any, schedule: str, ranks: int
) -> tuple[int, ...] | None:
    """The number of tiles that each rank computes; None where they are not known.

    Args:
      mask: as given.
      positions: in the order in which ranks hold them.
      sizes: of a rank.
      schedule: its name.
      ranks: their number.
    """
    plain = full() if mask is None else mask.mask if isinstance(mask, TileMap) else mask
    known = canonicalize(as_mask(plain))
    if not (is_known(known) and is_known(positions)):
        return None
    B, T, S, N, *_ = sizes
    at = (positions or Positions()).checked(B, N, T * ranks, S * ranks)
    q, k = (
        np.arange(n, dtype=np.int32)[None] if given is None else np.asarray(given)
        for given, n in ((at.q, T * ranks), (at.k, S * ranks))
    )

    def count(rows: slice, length: int) -> np.ndarray:
        """The active tiles of some queries, for each head."""
        states = tile_map(
            known,
            (B, length, N, 1),
            (B, S * ranks, N, 1),
            positions=Positions(b=at.b, h=at.h, q=q[:, rows], k=k),
            tile=(min(_TILE, T), min(_TILE, S)),
        ).states
        found = (np.asarray(states) != EMPTY).sum((2, 3))
        return np.broadcast_to(found, (B, N)).sum(0)

    if schedule == "heads":
        heads = evaluated(lambda: count(slice(None), T * ranks))
        return tuple(int(n) for n in heads.reshape(ranks, -1).sum(1))
    return evaluated(
        lambda: tuple(int(count(slice(r * T, (r + 1) * T), T).sum()) for r in range(ranks))
    )

"""`parallel.explain`: what moves between ranks, how even their work is, and why."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

from ..checks import integers
from ..checks.arrays import array_of
from ..checks.foreign_names import unexpected
from ..checks.options import flag
from ..dispatch import choose
from ..masks import full
from ..masks.positions import Positions
from ..mesh import evaluated
from ..tiles.tile_map import EMPTY, TileMap, tile_map
from . import plan
from .attention import (
    attention,
    by_heads,
    call_of,
    check_layout,
    lengths,
    met,
    reordered,
    schedules_of,
)
from .known import is_known, plain
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
    """

    schedule: str
    reason: str
    others: dict[str, str]
    backend: str
    ranks: int
    sent: Sent
    _count: Callable[[], tuple[int, ...]] | None = field(repr=False)

    @cached_property
    def tiles(self) -> tuple[int, ...] | None:
        """The number of tiles, of 128 x 128 or of short parts, that each rank computes.

        Over all batch rows and heads; None if the mask's arrays are traced.
        """
        return None if self._count is None else self._count()

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
    ranks: int | Sequence[int],
    schedule: str | Sequence[str] = "auto",
    layout: Layout | None = None,
    backend: str = "auto",
    **options: Any,
) -> Plan:
    """What `parallel.attention` would do, without devices, without doing it.

    Args:
      query, key, value: of the whole sequence: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`, or
        without B; arrays, or `jax.ShapeDtypeStruct`s.
      ranks: the number of devices that share it, or the sizes of several mesh axes.
      schedule, layout, backend, **options: as in `parallel.attention`.

    Returns:
      A `Plan`, to print or to read by field.

    Raises:
      TypeError, ValueError: as `parallel.attention`; for ranks that are no positive integers, or
        that don't divide the lengths.

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
    flag(options.pop("return_lse", False), "return_lse")
    sizes = _sizes(ranks)
    schedules = schedules_of(schedule, len(sizes))
    total = math.prod(sizes)
    arrays = zip(("query", "key", "value"), (query, key, value), strict=True)
    parts = [_part(name, array, total) for name, array in arrays]
    if layout is not None:
        check_layout(layout, total, lengths(parts, total))
    in_order = layout is None or layout.contiguous
    positions = options.pop("positions", None)
    at = positions if in_order else reordered(positions, layout)
    mask = options.pop("mask", None)
    given = mask.mask if isinstance(mask, TileMap) and not in_order else mask
    call = call_of(parts, total, {**options, "mask": given, "positions": at})
    whole = call.sizes
    sent = Sent(0, 0)
    # The axes that exchange heads, from the last on.
    for n in reversed(range(1, len(schedules))):
        why = plan.refuse("heads", call.sizes.N, sizes[n])
        if why is not None:
            raise ValueError(f"schedule: 'heads' can't compute this call: {why}")
        sent = _sum(sent, plan.sent_by("heads", call, sizes[n]))
        call = by_heads(call, sizes[n])
    outer = math.prod(sizes[:1] if len(schedules) > 1 else sizes)
    chosen = plan.choose(call, plain(mask), schedules[0], outer, in_order)
    sent = _sum(sent, chosen.sent[chosen.name])
    names = (chosen.name, *schedules[1:])
    return Plan(
        ", ".join(names),
        chosen.reason,
        chosen.others,
        choose(met(call, chosen, (), outer), backend).backend,
        total,
        sent,
        _counting(
            mask, at, whole, total, total // outer * (outer if chosen.name == "heads" else 1)
        ),
    )


def _sizes(ranks: Any) -> tuple[int, ...]:
    """The sizes of the mesh axes, the first of which may be the only one."""
    if not isinstance(ranks, (tuple, list)):
        return (integers.plain(ranks, "parallel.explain(ranks)", 1),)
    if not ranks:
        raise ValueError(
            "parallel.explain(ranks): got no sizes, expected a number of devices, or one for each "
            "mesh axis"
        )
    return tuple(
        integers.plain(size, f"parallel.explain(ranks[{i}])", 1) for i, size in enumerate(ranks)
    )


def _sum(a: Sent, b: Sent) -> Sent:
    return Sent(a.forward + b.forward, a.backward + b.backward)


def _part(name: str, array: Any, ranks: int) -> Any:
    """The shape of one rank's part."""
    if not isinstance(array, jax.ShapeDtypeStruct):
        array = array_of(array, name, "an array, or a jax.ShapeDtypeStruct")
    shape = tuple(array.shape)
    if len(shape) not in (3, 4):
        # Left for the check of arguments, which says what is expected.
        return array
    if shape[-3] % ranks:
        raise ValueError(
            f"{name}: got {shape[-3]} tokens, expected a multiple of ranks = {ranks}: pad the "
            "sequence, and mask the padding"
        )
    return jax.ShapeDtypeStruct((*shape[:-3], shape[-3] // ranks, *shape[-2:]), array.dtype)


def _counting(
    mask: Any, positions: Positions | None, sizes: Any, ranks: int, by_heads: int
) -> Callable[[], tuple[int, ...]] | None:
    """What counts the tiles that each rank computes; None where they are not known.

    Args:
      mask: as given.
      positions: in the order in which ranks hold them.
      sizes: of a rank.
      ranks: their number.
      by_heads: how many ranks, one after the other, compute the same queries of different heads.
    """
    given = plain(mask)
    known = full() if given is None else given
    if not (is_known(known) and is_known(positions)):
        return None
    B, T, S, N, *_ = sizes
    at = (positions or Positions()).checked(B, N, T * ranks, S * ranks)
    q, k = (
        np.arange(n, dtype=np.int32)[None] if given is None else np.asarray(given)
        for given, n in ((at.q, T * ranks), (at.k, S * ranks))
    )
    rows = T * by_heads

    def count(first: int) -> Any:
        """The active tiles of some queries, in the heads of each rank that computes them."""
        states = tile_map(
            known,
            (B, rows, N, 1),
            (B, S * ranks, N, 1),
            positions=Positions(b=at.b, h=at.h, q=q[:, first : first + rows], k=k),
            tile=(min(_TILE, T), min(_TILE, S)),
        ).states
        found = (np.asarray(states) != EMPTY).sum((2, 3))
        return np.broadcast_to(found, (B, N)).sum(0).reshape(by_heads, -1).sum(1).tolist()

    def counts() -> tuple[int, ...]:
        return tuple(n for first in range(0, T * ranks, rows) for n in count(first))

    return lambda: evaluated(counts)

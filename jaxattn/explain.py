"""`explain`: what a call of attention would do, and why."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from . import masks
from .arguments import checked_call, swapped
from .attention import attention
from .backends.base import Call, symbolic
from .checks.foreign_names import unexpected
from .checks.options import flag
from .dispatch import BACKENDS, choose
from .masks.positions import Positions
from .stats import statistics
from .tiles import intervals
from .tiles.tile_map import EMPTY, FULL, PARTIAL, TileMap, tile_map
from .tracing.split import split

# With at most this many pairs, all are searched for empty rows; with more, only tiles are.
_LOOKED_AT = 2**22


_OPTIONS = frozenset(inspect.signature(attention).parameters)


@dataclass(frozen=True)
class Explanation:
    """What a call of `attention` does.

    Attributes:
      backend: the backend that runs.
      reason: why this backend was chosen.
      others: why the others were not, by name.
      mask, score: their reprs; "none" without.
      tiles: the tile map of the mask; `None` if its leaves are traced.
      empty, partial, full: numbers of tiles by state, over all batch rows and heads; `None` if
        they are traced.
      density: the share of pairs in tiles that have to be computed.
      flops: floating-point operations of the forward pass in those tiles: 2 for each pair and
        feature of a product.
      dense_flops: the same over all pairs.
      bytes: memory that the chosen backend needs beside inputs and output in the forward pass.
      dense_bytes: the same for the dense backend: logits and weights. These three are `None` if
        sizes are symbolic, as in `jax.export`.
      notes: queries that see no key, keys that no query sees, operations without a rule, which make
        tiles PARTIAL, and limits of the backend.
    """

    backend: str
    reason: str
    others: dict[str, str]
    mask: str
    score: str
    tiles: TileMap | None
    empty: int | None
    partial: int | None
    full: int | None
    density: float | None
    flops: float | None
    dense_flops: float | None
    bytes: int | None
    dense_bytes: int | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}: {self.reason}"]
        lines += [f"     not {name}: {why}" for name, why in self.others.items()]
        lines += [f"mask:    {self.mask}", f"score:   {self.score}"]
        if self.bytes is None or self.dense_bytes is None or self.dense_flops is None:
            return "\n".join([*lines, "sizes:   symbolic, so tiles, FLOPs and memory are unknown"])
        if self.density is None or self.flops is None:
            lines.append("tiles:   unknown: the mask's arrays are traced here")
        else:
            lines += [
                f"tiles:   {self.full} full, {self.partial} partial, {self.empty} empty: "
                f"{self.density:.1%} of all pairs to compute",
                f"flops:   {_scaled(self.flops, 1e3)}FLOP forward, dense "
                f"{_scaled(self.dense_flops, 1e3)}FLOP",
            ]
        lines.append(
            f"memory:  {_scaled(self.bytes, 1024)}B beside inputs and output, dense "
            f"{_scaled(self.dense_bytes, 1024)}B"
        )
        return "\n".join(lines + [f"note:    {note}" for note in self.notes])


def explain(
    query: Any, key: Any, value: Any, *, backend: str = "auto", **options: Any
) -> Explanation:
    """What `attention` would do with the same arguments, without doing it.

    Args:
      query, key, value, backend, **options: those of `attention`. Arrays may be
        `jax.ShapeDtypeStruct`s, or traced: inside `jit`, tiles are counted if the mask is known.

    Returns:
      An `Explanation`, to print or to read by field.

    Raises:
      TypeError, ValueError: as `attention`.

    Example:
      >>> import jax, jaxattn as ja
      >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), "float32")
      >>> print(ja.explain(x, x, x, mask=ja.masks.causal()).density)
      0.53125
    """
    unknown = {name: given for name, given in options.items() if name not in _OPTIONS}
    if unknown:
        raise unexpected("explain", unknown, _OPTIONS)
    flag(options.pop("return_lse", False), "return_lse")
    call = checked_call(query, key, value, **options)
    choice = choose(call, backend)
    B, T, S, N, _, H, Hv = call.sizes
    if call.mask is None:
        # Split outside the next block, inside which its constants would become arrays.
        split(masks.full(), call.positions)
    # A mask of known values is evaluated now, under `jit` too.
    with jax.ensure_compile_time_eval():
        tiles, blind = _looked_at(call, options.get("mask"), options.get("positions"))
    pairs = B * N * T * S
    found: dict[str, Any] = {"empty": None, "partial": None, "full": None, "density": None}
    if tiles is not None:
        states = np.asarray(tiles.states)
        copies = B * N // (states.shape[0] * states.shape[1])
        for name, state in (("empty", EMPTY), ("partial", PARTIAL), ("full", FULL)):
            found[name] = int((states == state).sum()) * copies
        area = np.minimum(tiles.tile[0], T - tiles.tile[0] * np.arange(states.shape[2]))[:, None]
        area = area * np.minimum(tiles.tile[1], S - tiles.tile[1] * np.arange(states.shape[3]))
        found["density"] = float(((states != EMPTY) * area).sum() * copies / max(pairs, 1))
    density = found["density"]
    abstract = symbolic(B, T, S)
    return Explanation(
        backend=choice.backend,
        reason=choice.reason,
        others=choice.others,
        mask="none" if call.mask is None else repr(call.mask.given),
        score="none" if call.score is None else repr(call.score.given),
        tiles=tiles,
        **found,
        flops=None if density is None else 2.0 * density * pairs * (H + Hv),
        dense_flops=None if abstract else 2.0 * pairs * (H + Hv),
        bytes=None if abstract else BACKENDS[choice.backend].footprint(call),
        dense_bytes=None if abstract else BACKENDS["dense"].footprint(call),
        notes=(
            *_layout(call, options),
            *blind,
            *_notes(call),
            *_devices(call),
            *BACKENDS[choice.backend].LIMITS,
        ),
    )


def _layout(call: Call, options: dict[str, Any]) -> tuple[str, ...]:
    said = swapped(call) if options.get("positions") is None else None
    return () if said is None else (said,)


def _looked_at(
    call: Call, given: Any, positions: Positions | None
) -> tuple[TileMap | None, tuple[str, ...]]:
    """The tile map of a call, and notes on queries and keys that see or are seen by none."""
    B, T, S, N, K, H, _ = call.sizes
    unknown = symbolic(B, T, S) or _traced((call.mask, call.tiles, positions))
    if unknown or jax.sharding.get_abstract_mesh().manual_axes:
        return None, ()
    at = (positions or Positions()).checked(B, N, T, S)
    if call.tiles is not None and isinstance(given, TileMap):
        tiles = given
    else:
        mask = masks.full() if call.mask is None else call.mask.given
        tiles = tile_map(mask, (B, T, N, H), (B, S, K, H), positions=at)
    return tiles, () if call.mask is None else _blind(call, tiles, at)


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _blind(call: Call, tiles: TileMap, at: Positions) -> tuple[str, ...]:
    """Notes on queries that see no key, and on keys that no query sees."""
    B, T, S, N, *_ = call.sizes
    states = np.asarray(tiles.states)
    if B * N * T * S <= _LOOKED_AT:
        seen, least = np.asarray(tiles.mask.dense(T, S, B, N, at)), ""
    else:
        # An EMPTY tile is certain; a PARTIAL one may contain more.
        seen, least = states != EMPTY, "at least "
    notes = []
    for axis, name, said, extent in (
        (3, "queries", "see no key: their output is 0", (T, tiles.tile[0])),
        (2, "keys", "are seen by no query", (S, tiles.tile[1])),
    ):
        blind = ~seen.any(axis)
        if not blind.any():
            continue
        b, h, first = (int(n) for n in np.argwhere(blind)[0])
        if least:
            length, tile = extent
            size = np.minimum(tile, length - tile * np.arange(blind.shape[2]))
            count = int((blind * size).sum()) * (B * N // (blind.shape[0] * blind.shape[1]))
            first *= tile
        else:
            count = int(blind.sum())
        notes.append(
            f"{least}{count} of {B * N * extent[0]} {name} {said} (the first: row {b}, head {h}, "
            f"{first})"
        )
    return tuple(notes)


def _notes(call: Call) -> tuple[str, ...]:
    notes = []
    if call.mask is not None:
        loose = intervals.unruled(call.mask)
        if loose:
            notes.append(
                f"the mask computes {', '.join(loose)} from queries and keys together, and there "
                "are no bounds for that: tiles that depend on it are PARTIAL; "
                "tile_map(..., exact=True) evaluates every pair"
            )
        notes += [f"mask: {reason}" for reason in call.mask.reasons]
    if call.score is not None:
        notes += [f"score: {reason}" for reason in call.score.reasons]
    passes = sum(len(stat.queries) for stat in statistics(call.stats))
    if passes:
        notes.append(f"stats: received takes another pass over the tiles ({passes} in all)")
    return tuple(notes)


def _devices(call: Call) -> tuple[str, ...]:
    """Notes on query heads and lengths that are split over devices."""
    sharding = getattr(call.query, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return ()
    _, lengths, heads = (*sharding.spec, None, None, None)[:3]

    def parts(axes: Any) -> int:
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        return math.prod(sharding.mesh.shape[name] for name in names)

    notes = []
    if call.sizes.K % parts(heads):
        notes.append(
            f"query heads are split over {parts(heads)} devices, and there are {call.sizes.K} key "
            "heads: each device receives all keys and values, and uses those of its query heads"
        )
    if parts(lengths) > 1:
        even = call.sizes.T == call.sizes.S
        how = "travel around a ring of them" if even else "are gathered on each"
        notes.append(
            f"lengths are split over {parts(lengths)} devices: with tiled, rows, triton, mosaic "
            f"and tpu, keys and values {how}; parallel.explain says what moves"
        )
    return tuple(notes)


def _scaled(number: float, base: float) -> str:
    for prefix in ("", "K", "M", "G"):
        if abs(number) < base:
            return f"{number:.3g} {prefix}"
        number /= base
    return f"{number:.3g} T"

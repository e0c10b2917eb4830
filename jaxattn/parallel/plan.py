"""How keys reach the queries that see them: what each schedule sends, and the choice of one."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..backends import base
from ..backends.base import Call, Shards
from ..masks.mask import Mask
from ..masks.positions import Positions
from ..mesh import evaluated
from ..tiles.tile_map import EMPTY, tile_map
from .known import is_known, known_part

SCHEDULES = ("ring", "heads", "halo", "gather")

# Bytes of keys and values of all ranks up to which "auto" gathers them: one collective instead of
# one for each rank, and no more memory than a step of an engine takes.
_SMALL = 2**22


class Sent(NamedTuple):
    """Bytes that a rank sends in a forward pass, and in its backward."""

    forward: int
    backward: int


class Schedule(NamedTuple):
    """The schedule that runs, the reason, the reasons against others, and what each sends.

    Attributes:
      before, after: for "halo", how many keys before and after its own a rank needs.
    """

    name: str
    reason: str
    others: dict[str, str]
    sent: dict[str, Sent]
    before: int
    after: int


def refuse(name: str, N: int, ranks: int) -> str | None:
    """Why a schedule can't divide this number of query heads, or None if it can."""
    if name == "heads" and N % ranks:
        return f"{ranks} ranks don't divide the {N} query heads"
    return None


def _refuse(name: str, call: Call, ranks: int, in_order: bool) -> str | None:
    """Why a schedule can't compute a call, or None if it can."""
    if name == "halo" and not in_order:
        return "tokens of a layout have no neighbours; it takes contiguous parts"
    if name == "halo" and call.sizes.T != call.sizes.S:
        return "queries and keys have different lengths, so their parts are not neighbours"
    return refuse(name, call.sizes.N, ranks)


def choose(call: Call, mask: Mask | None, asked: str, ranks: int, in_order: bool) -> Schedule:
    """The schedule that is named, or with "auto" the one that sends least and fits in memory.

    The choice depends on shapes, dtypes and known values only, so that it is the same on all hosts.

    Args:
      call: with this rank's arrays, and the positions of the whole sequence.
      mask: as given; the call's own may be guarded against positions without an entry.
      asked: the name of a schedule, or "auto".
      ranks: their number.
      in_order: whether tokens lie in their order.

    Raises:
      ValueError: for a schedule that can't compute the call.
    """
    refused = {name: _refuse(name, call, ranks, in_order) for name in SCHEDULES}
    halo = None
    if refused["halo"] is None:
        halo = _halo(call, mask, ranks)
        if halo is None:
            refused["halo"] = (
                "no window is known: the conjuncts of the mask that are known when it is traced "
                "ask for keys of all ranks"
            )
    if asked != "auto" and refused[asked] is not None:
        raise ValueError(f"schedule: {asked!r} can't compute this call: {refused[asked]}")
    before, after = halo or (0, 0)
    sent = {
        name: sent_by(name, call, ranks, before + after)
        for name, why in refused.items()
        if why is None
    }
    others = {name: why for name, why in refused.items() if why is not None}
    said = {name: f"sends {as_text(sum(each))} a rank, both passes" for name, each in sent.items()}
    if asked != "auto":
        others |= {name: "another was asked for" for name in sent if name != asked}
        return Schedule(asked, f"asked for; {said[asked]}", others, sent, before, after)
    whole = ranks * _keys(call, 0)
    fit = {name: sum(each) for name, each in sent.items()}
    if whole > _SMALL:
        others["gather"] = f"holds all keys and values, {as_text(whole)}, on every rank"
        del fit["gather"]
    name = min(fit, key=lambda name: fit[name])
    others |= {each: said[each] for each in fit if each != name}
    return Schedule(name, f"{_WHY[name]}; {said[name]}", others, sent, before, after)


_WHY = {
    "ring": "keys go from rank to rank, in memory for one part of them",
    "heads": "each rank computes some heads of the whole sequence",
    "halo": "the mask asks for no more than neighbouring keys",
    "gather": "there are few keys: all come at once",
}


def _keys(call: Call, least: int) -> int:
    """Bytes of this rank's keys and values, of at least so many bytes a number."""
    B, _, S, _, K, H, Hv = call.sizes
    return B * S * K * (H + Hv) * max(jnp.dtype(call.key.dtype).itemsize, least)


def sent_by(name: str, call: Call, ranks: int, halo: int = 0) -> Sent:
    """What a rank sends by a schedule; gradients of keys in the dtype in which they are summed."""
    B, T, S, N, K, H, Hv = call.sizes
    width = jnp.dtype(call.query.dtype).itemsize
    keys = _keys(call, 0)
    gradients = _keys(call, jnp.dtype(base.accumulator(call.query.dtype)).itemsize)
    others = ranks - 1
    if not others:
        return Sent(0, 0)
    match name:
        case "ring":
            return Sent(others * keys, others * keys + ranks * gradients)
        case "gather":
            return Sent(others * keys, others * (keys + gradients))
        case "halo":
            return Sent(halo * keys // S, halo * (keys + gradients) // S)
    heads = math.lcm(K, ranks)
    numbers = B * (T * N * (H + Hv) + S * heads * (H + Hv))
    lse = B * T * N * jnp.dtype(base.accumulator(call.query.dtype)).itemsize
    each = (numbers * width + lse) * others // ranks
    return Sent(each, each)


def _halo(call: Call, mask: Mask | None, ranks: int) -> tuple[int, int] | None:
    """How many keys before and after its own a rank needs at most, or None for all."""
    if mask is None or call.positions.q is not None or call.positions.k is not None:
        return None
    known = known_part(mask, call.positions)
    if known is None:
        return None
    B, T, S, N, *_ = call.sizes
    at = {name: given for name in "bh" if is_known(given := getattr(call.positions, name))}
    # Every key for itself, and all queries of a rank together.
    seen = evaluated(
        lambda: (
            np.asarray(
                tile_map(
                    known,
                    (B, T * ranks, N, 1),
                    (B, S * ranks, N, 1),
                    positions=Positions(**at),
                    tile=(T, 1),
                ).states
            )
            != EMPTY
        )
    ).any((0, 1))
    rank, key = np.nonzero(seen)
    before = int(max(0, (rank * S - key).max(initial=0)))
    after = int(max(0, (key - (rank + 1) * S + 1).max(initial=0)))
    return None if before + after >= (ranks - 1) * S else (before, after)


def shards_of(schedule: Schedule, axis: tuple[str, ...], ranks: int) -> Shards:
    """What the engines are told of a schedule."""
    mesh = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return Shards(axis, ranks, schedule.name, mesh, schedule.before, schedule.after)


def as_text(count: int) -> str:
    """A number of bytes, to read."""
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"

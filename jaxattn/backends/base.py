"""What a backend is given (`Call`), what it promises (`Backend`), and numbers that all share.

A backend is a module or a package with the members of `Backend`. `dense` is the definition; every
other backend computes the same up to rounding, or refuses the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from ..masks.mask import Mask
from ..masks.positions import Positions
from ..pytrees import pytree, static
from ..scores import Score
from ..shapes import Array, ArrayOrStruct, Bool, Float, Int, UInt32
from ..stats import statistics
from ..tiles.tile_map import TileStates
from ..tracing.split import Split


@pytree
class Dropout:
    """Dropout on the weights.

    Attributes:
      rate: the probability that a weight is dropped.
      seed: two words.
      shared: whether the same pairs `(q, k)` are dropped in all batch rows and heads.
    """

    rate: Any
    seed: UInt32[Array, "2"]
    shared: bool = static(default=False)

    def rows(
        self, b: Int[Array, "..."], h: Int[Array, "..."], q: Int[Array, "..."]
    ) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
        """Two words for each row of weights at positions that broadcast; see `row_keys`."""
        nowhere = jnp.zeros((), jnp.int32)
        return row_keys(self.seed, *((nowhere, nowhere) if self.shared else (b, h)), q)


class Shards(NamedTuple):
    """How devices share a sequence: each has an equal part of the queries, keys and values.

    Attributes:
      axis: the mesh axes over which lengths are split, the first the slowest.
      ranks: the number of parts. The part of rank r begins at query `r * T` and key `r * S`, for
        the `T` queries and `S` keys that a device has.
      schedule: how keys reach the queries that see them: "ring", "gather", "halo", or "whole" if
        every device has all keys; see `flash/exchange.py`.
      mesh: all mesh axes of the program. What devices send under a condition, all of them have to
        send, or they would wait for each other.
      before, after: for "halo", how many keys before and after its own a device needs.
    """

    axis: tuple[str, ...]
    ranks: int
    schedule: str
    mesh: tuple[str, ...]
    before: int = 0
    after: int = 0


@pytree
class Call:
    """One call of attention, its arguments checked: what every backend is given.

    Attributes:
      query, key, value: with a batch axis; the arrays, or their shapes and dtypes for `explain`.
      mask, score: already split; None without.
      scale: what `query . key` is multiplied by.
      sinks: one for each query head. Backends ignore it: `dispatch` applies sinks to their results.
      positions: each `None` where it is 0, 1, 2, ...; `q` and `k` have a batch axis, of extent 1
        where the batch rows share them.
      dropout: the rate and the seed; None without.
      stats: a pytree of `Stat`, the statistics that are asked for, without their functions; None
        where nobody asks.
      means, maxima, largest: functions of the final logit and the positions, of which each query
        wants the mean by the weights, the maximum over visible pairs, and the value at the pair
        with the largest logit: columns after the output's own. With any `largest` the last of
        `maxima` is that of the logit.
      tiles: the states of tiles, if the mask was given as a `TileMap`.
      heads_first: whether keys and values lie in memory with heads first, transposed views of what
        a `KVCache` holds. XLA does not show where arrays lie, and copies them if it is guessed.
      shards: how devices share the sequence, inside a `shard_map`. Then query, key and value are
        this device's part; mask, score, positions and tiles are those of the whole sequence.
      prepared: what the backend's own `prepare` puts there; None before.
      precision: of matrix products; None for the highest.
    """

    query: Float[ArrayOrStruct, "B T N H"]
    key: Float[ArrayOrStruct, "B S K H"]
    value: Float[ArrayOrStruct, "B S K Hv"]
    mask: Split[Mask] | None
    score: Split[Score] | None
    scale: Any
    sinks: Float[Array, "N"] | None
    positions: Positions
    dropout: Dropout | None
    stats: Any = None
    means: tuple[Split[Score], ...] = ()
    maxima: tuple[Split[Score], ...] = ()
    largest: tuple[Split[Score], ...] = ()
    tiles: TileStates | None = None
    prepared: Any = None
    precision: Any = static(default=None)
    heads_first: bool = static(default=False)
    shards: Shards | None = static(default=None)

    @property
    def sizes(self) -> Sizes:
        """The sizes of the call, on this device."""
        B, T, N, H = self.query.shape
        _, S, K, Hv = self.value.shape
        return Sizes(B, T, S, N, K, H, Hv)

    @property
    def columns(self) -> int:
        """How many columns statistics add to the output's own."""
        return len(self.means) + len(self.maxima) + len(self.largest)

    @property
    def lengths(self) -> tuple[int, int]:
        """The numbers of queries and keys of the whole sequence."""
        ranks = 1 if self.shards is None else self.shards.ranks
        return self.sizes.T * ranks, self.sizes.S * ranks


class Sizes(NamedTuple):
    """The sizes of a call, named as in `jaxattn.shapes`."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int


class Statistics(NamedTuple):
    """The statistics that a backend computes.

    Attributes:
      columns: whether it computes those of functions: `Call.means`, `maxima` and `largest`.
      received: `(call, lse, weight) -> [B, S, N]`, the sum over queries of a weight of each,
        `[B, T, N]`, times the weights of attention; None where it can't.
    """

    columns: bool = False
    received: Callable[[Call, Array, Array], Array] | None = None

    def missing(self, call: Call) -> str | None:
        """The reason of a backend that lacks any of the statistics that are asked for."""
        names = [
            type(stat).__name__.lower()
            for stat in statistics(call.stats)
            if (stat.queries and self.received is None)
            or (not self.columns and (stat.means or stat.maxima or stat.largest))
        ]
        if not names:
            return None
        return f"does not compute {', '.join(names)} (stats=); 'dense' and 'tiled' compute all"


class Backend(Protocol):
    """The members of a backend.

    `refuse` is called first, then `prepare` once, then `run`, which may be traced.

    Attributes:
      WHY: why "auto" chooses it; `explain` shows it.
      LIMITS: where it deviates from the definition; `explain` shows them.
      STATISTICS: which statistics it computes; it refuses others.
    """

    WHY: str
    LIMITS: tuple[str, ...]
    STATISTICS: Statistics

    def refuse(self, call: Call) -> str | None:
        """Why this backend can't compute the call, or None if it can."""

    def footprint(self, call: Call) -> int:
        """The bytes that a forward pass needs besides inputs and output, about."""

    def prepare(self, call: Call) -> Call:
        """The call, with what its kernels are compiled for in `prepared`.

        This is called outside `jit`, where concrete values of arguments are still known.
        """

    def run(self, call: Call) -> tuple[Array, Array]:
        """The output `[B, T, N, Hv]` in the query's dtype and the natural-log LSE `[B, T, N]` in
        the dtype of accumulation, without sinks. With statistics the output is in the dtype of
        accumulation too, and their columns follow it."""


def unchanged(call: Call) -> Call:
    """The `prepare` of backends that need nothing prepared."""
    return call


def symbolic(*sizes: Any) -> bool:
    """Whether any size is symbolic, as in `jax.export`."""
    return not all(isinstance(size, int) for size in sizes)


def nothing_to_compute(call: Call) -> str | None:
    """The reason of backends that need at least one element along every axis."""
    return f"nothing to compute: the sizes are {call.sizes}" if 0 in call.sizes else None


def nothing_to_cut(call: Call) -> str | None:
    """The reason of backends that cut the work by its lengths."""
    if symbolic(call.sizes.T, call.sizes.S):
        return "lengths are symbolic, and the work is cut by known ones; 'dense' takes any"
    return nothing_to_compute(call)


def shared(call: Call) -> str | None:
    """The reason of backends that compute whole rows."""
    if call.shards is None:
        return None
    return "the sequence is shared by devices, and this backend needs all keys of a query at once"


def not_on_nvidia(call: Call) -> str | None:
    """The reason of backends that run on NVIDIA GPUs alone."""
    where = platform(call)
    if where in ("gpu", "cuda"):
        return None
    return f"runs on NVIDIA GPUs; inputs are on {where}"


def platform(call: Call) -> str:
    """The platform of the inputs; for traced ones, the one on which JAX computes by default."""
    device = _device(call)
    return str(getattr(device, "platform", device))


def capability(call: Call) -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPU that the inputs are on, if that is known."""
    found = getattr(_device(call), "compute_capability", None)
    if not isinstance(found, str) or not found.replace(".", "", 1).isdigit():
        return None
    major, _, minor = found.partition(".")
    return int(major), int(minor or 0)


def device_kind(call: Call) -> str:
    """What the device of the inputs is called; the name of a platform where that is all we know."""
    device = _device(call)
    return str(getattr(device, "device_kind", device))


def _device(call: Call) -> Any:
    """The device of the inputs, or the name of a platform."""
    if not isinstance(call.query, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        (device, *_) = call.query.devices()
        return device
    # A device that is described for lowering, and need not exist on this machine.
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described
    device = jax.default_device.value
    return jax.devices()[0] if device is None else device


def accumulator(dtype: Any) -> Any:
    """The dtype of logits, softmax, LSE and sums: float64 for float64, float32 for the others."""
    # Not promote_types: it refuses under strict dtype promotion.
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def factors(call: Call) -> Any:
    """The dtype in which products of XLA are given their factors."""
    # On CPU it multiplies 16-bit floats slowly, and in some layouts not at all.
    on_cpu = platform(call) == "cpu"
    return accumulator(call.query.dtype) if on_cpu else call.query.dtype


def finite(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array with 0 in place of NaN and infinities; its derivative is 1 everywhere."""
    return _finite(array)


@jax.custom_jvp
def _finite(array: Array) -> Array:
    return lax.select(lax.is_finite(array), array, lax.full_like(array, 0))


@_finite.defjvp
def _finite_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Also 1 where the array is not finite, so that derivatives do not depend on values.
    return _finite(*primals), tangents[0]


def all_finite(array: Float[Array, "..."], axis: int) -> Bool[Array, "..."]:
    """Whether all numbers along an axis are finite.

    A finite number less itself is 0, any other NaN. XLA has a fast way to sum on CPU, and compiles
    it sooner than `isfinite` and `all`.
    """
    wide = array.astype(accumulator(array.dtype))
    return (wide - wide).sum(axis) == 0


def surely_finite(array: Float[Array, "..."]) -> Bool[Array, ""]:
    """Whether the sum of all numbers is finite: then all are.

    It takes half as long as to look at each. Where finite numbers are so large that their sum is
    not, it is False too.
    """
    return jnp.isfinite(array.astype(accumulator(array.dtype)).sum())


@custom_vmap
def anywhere(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether any flag is True; under `vmap` in any element, so that a `cond` of it stays one."""
    return flags.any()


@anywhere.def_vmap
def _anywhere_rule(size: int, batched: Any, flags: Array) -> tuple[Array, bool]:
    return anywhere(flags), False


# --- dropout: a counter-based hash of (seed, b, h, q, k) -----------------------------------------


def _mix(x: Array) -> Array:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain): every bit depends on every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def row_keys(
    seed: UInt32[Array, "2"], b: Int[Array, "..."], h: Int[Array, "..."], q: Int[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Two words for each row of weights, from the seed and absolute positions that broadcast.

    Two, because with one word of 32 bits shifted pieces of one row would appear in others.
    """
    first, second = seed[0], seed[1] ^ jnp.uint32(0x9E3779B9)
    for position in (b, h, q):
        word = position.astype(jnp.uint32)
        first = _mix(first * jnp.uint32(0x9E3779B1) + word)
        second = _mix(second * jnp.uint32(0x85EBCA77) ^ word)
    return first, second | jnp.uint32(1)


def keeps(
    keys: tuple[UInt32[Array, "..."], UInt32[Array, "..."]], k: Int[Array, "..."], rate: Any
) -> Bool[Array, "..."]:
    """Whether the weight of key position `k` is kept in these rows: probability 1 - rate."""
    first, second = keys
    draw = _mix((k.astype(jnp.uint32) + first) * second)
    # 24 bits, exact in float32: a rate of 0 keeps every weight, a rate of 1 none.
    return (draw >> 8).astype(jnp.float32) >= jnp.asarray(rate, jnp.float32) * 2.0**24


def kept_scale(rate: Any, dtype: Any = jnp.float32) -> Any:
    """What kept weights are multiplied by: `1 / (1 - rate)`, and 0 for a rate of 1."""
    rate = jnp.asarray(rate, dtype)
    return jnp.where(rate < 1, 1 / jnp.where(rate < 1, 1 - rate, 1), 0)

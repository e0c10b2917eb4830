"""The one door to the backends: choose one, prepare the call for it, run it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from .backends import base, costs, cudnn, decode, dense, mosaic, rows, tiled, tpu, triton
from .backends.base import Backend, Call
from .checks import foreign_names
from .mesh import automatic
from .shapes import Array
from .stats import Rows, statistics
from .stats import results as results_of
from .tracing.program import Program
from .tracing.split import Split

# On accelerators, 256 MB of logits is a bound on memory, for calls that no kernel takes. Their
# speed was not measured.
_SMALL_ACCELERATED = 2**26
# From this many logits in a head on, a kernel that can compute the call is taken. Nothing was
# measured here: published figures have such kernels ahead from a few hundred tokens on
# (FlashAttention-2, arXiv 2307.08691, figures 4 to 6: 3 to 4 times on an A100 at 512).
_FUSED = 2**16

BACKENDS: dict[str, Backend] = {
    "dense": dense,
    "decode": decode,
    "rows": rows,
    "tiled": tiled,
    "cudnn": cudnn,
    "triton": triton,
    "mosaic": mosaic,
    "tpu": tpu,
}
# Those that only an accelerator has.
ACCELERATED = ("cudnn", "triton", "mosaic", "tpu")
# "auto" takes the first of these that can compute a call. Mosaic's kernels have been interpreted
# and compiled, but never timed on a GPU. Until they are, "auto" takes Triton's, which are older.
_AUTOMATIC = ("cudnn", "triton", "tpu")
_UNTIMED = "not yet timed on a GPU: 'auto' takes triton until it is"
# Old names of backends, and the backends that run for them.
_RENAMED = {"pallas_gpu": "triton"}


def dispatch(call: Call, backend: str = "auto", *, with_lse: bool = True) -> tuple[Any, ...]:
    """Chooses a backend for a checked call, prepares the call for it, and runs it.

    Args:
      call: what to compute.
      backend: the name of a backend, or "auto".
      with_lse: whether the LSE is returned too. Without it, `jax_debug_infs` does not stop at the
        LSE's -inf.

    Returns:
      The output `[B, T, N, Hv]`, with `with_lse` the LSE `[B, T, N]`, and with statistics these.

    Raises:
      ValueError: as `choose`.
    """
    name = choose(call, backend).backend
    if not _is_empty(call):
        call = BACKENDS[name].prepare(call)
    parts = (call.mask, call.score, *call.means, *call.maxima, *call.largest)
    return _compiled(tuple(each for part in parts for each in _traced(part)))(call, name, with_lse)


def _traced(part: Split[Any] | None) -> Iterator[Program]:
    """The user's functions in a mask or score."""
    return iter(()) if part is None else _programs(part.given)


def _programs(part: Any) -> Iterator[Program]:
    fn = getattr(part, "fn", None)
    if isinstance(fn, Program):
        yield fn
    elif fn is None and is_dataclass(part):
        for field in fields(part):
            held = getattr(part, field.name)
            for each in held if isinstance(held, tuple) else (held,):
                yield from _programs(each)


# JAX keeps a compiled program as long as the function that it was compiled for. The library's own
# masks are few. A user's function may be new in every call, and its program takes a few MB; so the
# least recently used ones are dropped with their functions.
@lru_cache(maxsize=64)
def _compiled(programs: tuple[Program, ...]) -> Callable[..., tuple[Any, ...]]:
    """The function that computes calls whose masks and scores hold these functions of users."""

    def attention(call: Call, backend: str, with_lse: bool) -> tuple[Any, ...]:
        return _attend(call, backend, with_lse)

    return jax.jit(attention, static_argnums=(1, 2))


def _attend(call: Call, backend: str, with_lse: bool) -> tuple[Any, ...]:
    call = _learnable(call)
    B, T, _, N, _, _, Hv = call.sizes
    wide = base.accumulator(call.query.dtype)
    if _is_empty(call):
        ends = [0.0] * (Hv + len(call.means)) + [-jnp.inf] * len(call.maxima)
        ends += [-1.0] * len(call.largest)
        out = jnp.broadcast_to(jnp.asarray(ends, wide), (B, T, N, len(ends)))
        lse = jnp.full((B, T, N), -jnp.inf, wide)
    else:
        out, lse = _over_mesh(BACKENDS[backend].run, call)
    out, columns = out[..., :Hv], jnp.moveaxis(out[..., Hv:], -1, 0)
    share: Any = None
    if call.sinks is not None:
        share = _share(lse, call.sinks)
        out = out.astype(lse.dtype) * share
    results = (out.astype(call.query.dtype), *((lse,) if with_lse else ()))
    if call.stats is None:
        return results
    return (*results, _statistics(call, backend, lse, columns, share))


def _statistics(call: Call, backend: str, lse: Array, columns: Array, share: Any) -> Any:
    """The values of the statistics, from the columns of their functions."""
    means, others = columns[: len(call.means)], columns[len(call.means) :]
    rest = iter((*means, *jax.lax.stop_gradient(others)))
    of_means, maxima, largest = (
        iter([next(rest) for _ in part]) for part in (call.means, call.maxima, call.largest)
    )
    sinks = None if call.sinks is None else call.sinks.astype(lse.dtype)[None, None]
    left = jnp.ones((), lse.dtype) if share is None else share[..., 0]
    found = []
    for stat in statistics(call.stats):
        received = [_received(call, backend, lse, left, weight) for weight in stat.queries]
        rows = Rows(
            lse,
            sinks,
            left,
            [next(of_means) for _ in stat.means],
            [next(maxima) for _ in stat.maxima],
            [next(largest) for _ in stat.largest],
            received,
        )
        found.append(stat.of(rows))
    return results_of(call.stats, found)


def _received(call: Call, backend: str, lse: Array, left: Array, weight: Array) -> Array:
    """The sum over queries of `left * weight * p`, `[B, S, N]`."""
    B, T, S, N, *_ = call.sizes
    if _is_empty(call):
        return jnp.zeros((B, S, N), lse.dtype)
    call = replace(call, dropout=None, stats=None, means=(), maxima=(), largest=())
    weight = left * jnp.broadcast_to(weight.astype(lse.dtype), (B, T, N))
    received = BACKENDS[backend].STATISTICS.received
    assert received is not None
    b, *_ = _axes(call.query)
    _, s, k = _axes(call.key)
    found: Array = automatic(received, (call, lse, weight), P(b, s, k))
    return found


def _is_empty(call: Call) -> bool:
    """Whether there are no pairs of a query and a key."""
    B, T, S, N, *_ = call.sizes
    return 0 in (B, T, S, N)


def _learnable(call: Call) -> Call:
    """The call as it is differentiated: without a gradient for the dropout rate."""
    dropout = call.dropout
    if dropout is not None:
        rate, query = jax.lax.stop_gradient((dropout.rate, call.query))
        dropout = replace(dropout, rate=rate, seed=_own_seed(query, dropout.seed))
    return replace(call, dropout=dropout)


@custom_vmap
def _own_seed(query: Array, seed: Array) -> Array:
    """The seed; under `vmap`, an error if many queries would share one."""
    return seed


@_own_seed.def_vmap
def _own_seed_rule(size: int, batched: Any, query: Array, seed: Array) -> Any:
    if batched[0] and not batched[1]:
        raise ValueError(
            f"dropout_seed: got one seed for all {size} elements of a vmapped axis, which would "
            "drop the same weights in each; expected one for each: vmap over "
            "jax.random.split(key, n) too, or over jnp.broadcast_to(seed, (n,)) if the same "
            "weights are to drop"
        )
    return _own_seed(query, seed), batched[1]


def _over_mesh(run: Any, call: Call) -> Any:
    """`run(call)`; on a mesh of explicit axes, partitioned by batch and by head."""
    found = P(*_axes(call.query))
    return automatic(run, (call,), (found, found))


def _axes(array: Any) -> tuple[Any, Any, Any]:
    """The mesh axes of batch rows, lengths and heads."""
    sharding: Any = jax.typeof(array).sharding
    b, t, n = (*sharding.spec, None, None, None)[:3]
    return b, t, n


@jax.jit
def weights_of(call: Call) -> Array:
    """The weights `[B, N, T, S]` of a checked call."""
    if _is_empty(call):
        B, T, S, N, *_ = call.sizes
        return jnp.zeros((B, N, T, S), base.accumulator(call.query.dtype))
    weights, lse = dense.weights(call)
    if call.sinks is None:
        return weights
    left = weights * jnp.swapaxes(_share(lse, call.sinks), 1, 2)
    # Where a query may not see, its weight is 0 also if the share is NaN.
    return jnp.where(weights == 0, 0, left)


def _share(lse: Array, sinks: Array) -> Array:
    """The share of the weight that sinks leave: `sigmoid(lse - sinks)`, `[B, T, N, 1]`.

    0 for an empty row, of which nothing is felt by the sinks, also if its cotangent is NaN.
    """
    empty = lse == -jnp.inf
    # -inf would make the gradient of an empty row NaN.
    finite = jnp.where(empty, 0, lse)
    share = jax.nn.sigmoid(finite - sinks.astype(lse.dtype)[None, None, :])
    return jnp.where(empty, 0, share)[..., None]


def check_backend(name: str, given: Any) -> str:
    """The backend that an argument names, or "auto".

    Raises:
      ValueError: for an unknown name; the message has the equivalent of another library's name.
    """
    names = ["auto", *BACKENDS]
    if isinstance(given, str) and given in names:
        return given
    if isinstance(given, str) and given in _RENAMED:
        now = _RENAMED[given]
        warnings.warn(
            f"{name}={given!r}: it is two backends now; write {now!r} for what it ran, or 'mosaic'",
            DeprecationWarning,
            stacklevel=5,
        )
        return now
    message = f"{name}: got {given!r}, expected one of {', '.join(map(repr, names))}"
    meant = foreign_names.BACKENDS.get(given) if given is None or isinstance(given, str) else None
    raise ValueError(f"{message}; here it is {meant}" if meant else message)


class Choice(NamedTuple):
    """The backend that runs, the reason, and the reasons against the others."""

    backend: str
    reason: str
    others: dict[str, str]


def choose(call: Call, backend: str) -> Choice:
    """The backend that runs: the one that is named, or with "auto" the fastest that can.

    The choice depends on structure, shapes, dtypes, platform and known values, never on the value
    of a tracer.

    Raises:
      ValueError: for an unknown name, and for a backend that refuses, with its reason.
    """
    backend = check_backend("backend", backend)
    if _is_empty(call):
        name = "dense" if backend == "auto" else backend
        others = {each: "there are no pairs to compute" for each in BACKENDS if each != name}
        return Choice(name, "there are no pairs to compute, so nothing runs", others)
    if backend != "auto":
        reason = BACKENDS[backend].refuse(call)
        if reason is not None:
            raise ValueError(f"backend: {backend!r} can't compute this call: {reason}")
        others = {name: "another was asked for" for name in BACKENDS if name != backend}
        return Choice(backend, "asked for", others)
    B, T, S, N, *_ = call.sizes
    logits, each = B * N * T * S, T * S
    platform = base.platform(call)
    others = {
        "rows": rows.refuse(call) or f"not timed on {platform}",
        "decode": decode.refuse(call) or "faster from a KVCache, which asks for it",
        "mosaic": mosaic.refuse(call) or _UNTIMED,
    }
    here = {name: BACKENDS[name].refuse(call) for name in _AUTOMATIC}
    here["tpu"] = here["tpu"] or tpu.not_compiled(call)
    others |= {
        name: why or f"slower below {_FUSED} logits a head, by published figures"
        for name, why in here.items()
    }
    refused = tiled.refuse(call)
    if refused is not None:
        return Choice("dense", f"nothing else can: {refused}", {"tiled": refused, **others})
    if base.symbolic(logits):
        return Choice(
            "tiled",
            "the size of the batch is symbolic, and O(T + S) memory is enough for any size",
            others | dict.fromkeys(("dense", "rows"), "O(T * S) memory for each row of the batch"),
        )
    if platform == "cpu":
        return _cheapest(call, others)
    fit = [name for name in _AUTOMATIC if here[name] is None]
    if fit and (each >= _FUSED or logits > _SMALL_ACCELERATED):
        name, *second = fit
        why = f"faster from {_FUSED} logits a head on by published figures; not measured here"
        if name == "tpu":
            why = f"taken from {_FUSED} logits a head on; compiled for this TPU, and never timed"
        others |= dict.fromkeys(second, f"{name} comes first; neither was timed on a GPU")
        others["tiled"] = f"loops of plain XLA, slower on {platform}"
        others["dense"] = f"O(T * S) memory; {name} is {why}"
        rest = {other: reason for other, reason in others.items() if other != name}
        return Choice(name, f"{BACKENDS[name].WHY}; {why}", rest)
    if logits <= _SMALL_ACCELERATED:
        why = f"there are few logits ({logits}): they fit into memory up to {_SMALL_ACCELERATED}"
        loops = f"loops of plain XLA; their speed on {platform} was not measured"
        return Choice(
            "dense", f"{why}; no speed was measured on {platform}", {"tiled": loops, **others}
        )
    others["dense"] = f"O(T * S) memory: {logits} logits"
    return Choice("tiled", f"{tiled.WHY} ({logits} logits)", others)


def _cheapest(call: Call, others: dict[str, str]) -> Choice:
    """The backend of plain XLA with the least estimate, on CPU."""
    found = costs.estimates(call)
    name = min(found, key=lambda name: found[name])
    said = {each: f"estimated at {_duration(ms)}" for each, ms in found.items()}
    logits = call.sizes.N * call.sizes.T * call.sizes.S
    others |= {
        "dense": "sets aside memory for all logits, and is slower on cpu",
        "rows": rows.refuse(call) or f"O(T * S) memory: {logits} logits for each row of the batch",
        **said,
    }
    del others[name]
    return Choice(name, f"{BACKENDS[name].WHY}; {said[name]} (2 cores, AVX2)", others)


def _duration(ms: float) -> str:
    return f"{ms:.2g} ms" if ms < 100 else f"{ms / 1e3:.2g} s"

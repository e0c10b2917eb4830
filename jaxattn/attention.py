"""`attention`, the one entry point: check, choose a backend, run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from . import foreign
from .backends import base, cudnn, decode, dense, pallas_gpu, tiled
from .backends.base import Call
from .foreign import answers
from .positions import Positions
from .program import Program
from .request import request, swapped
from .shapes import Array, ArrayLike, Float

# Up to so many logits the dense backend is faster. On 2 CPU cores its times cross those of the
# tiled one between 0.5 and 1.2 million, forward and backward, for masks of every density: 4 MB of
# float32, about where logits leave the caches. On accelerators 256 MB of logits is a bound on
# memory, not a measured crossing: kernels may well be ahead before.
_SMALL = 2**20
_SMALL_ACCELERATED = 2**26
# Few queries of many keys: from 0.25 to 0.5 million numbers on the tiled backend was ahead in
# float32, for 1 to 64 queries, of a definition that copied all keys and values; in 16 bits it was
# not. The definition reads them as they lie now, and the two have not been compared since.
_SMALL_CACHE = 2**19

BACKENDS: dict[str, ModuleType] = {
    "dense": dense,
    "decode": decode,
    "tiled": tiled,
    "cudnn": cudnn,
    "pallas_gpu": pallas_gpu,
}
# Those that a kind of accelerator alone has, the fastest first: "auto" takes the first that can.
ACCELERATED = ("cudnn", "pallas_gpu")


@answers()
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    sinks: Float[ArrayLike, "N"] | None = None,
    positions: Positions | None = None,
    dropout_rate: Any = 0.0,
    dropout_seed: Any = None,
    precision: Any = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Masked attention, `softmax(score(scale * query . key), where=mask) . value`.

    Args:
      query: `[B, T, N, H]`, or `[T, N, H]` without a batch; float16, bfloat16, float32, float64.
      key: `[B, S, K, H]` with N a multiple of K: query head `n` uses key head `n // (N / K)`.
      value: `[B, S, K, Hv]`.
      mask: which query may see which key, True where it may: a `Mask`, a callable
        `(b, h, q, k) -> bool`, or a boolean array `[T, S]` or `[B|1, N|1, T|1, S|1]`.
      score: what changes the logits of visible cells: a `Score`, or a callable
        `(logit, b, h, q, k) -> logit`.
      scale: of the logits; by default `H ** -0.5`.
      sinks: learnable `[N]`: a logit that takes weight and gives no value; the output is
        multiplied by `sigmoid(lse - sinks)` (gpt-oss, arXiv 2508.10925).
      positions: what masks, scores and dropout see as `b`, `h`, `q`, `k`; by default 0, 1, 2, ...
      dropout_rate: probability with which a weight becomes 0; the kept ones are divided by
        `1 - dropout_rate`.
      dropout_seed: a uint32 or a typed `jax.random.key`; the weights that drop depend on it and
        on absolute positions alone.
      precision: of the matrix products, as in `jax.lax.dot_general`; by default float32 inputs
        are multiplied as true float32 on every platform.
      backend: "auto", or the name of one, which then runs or raises its reason.
      return_lse: also return the LSE.

    Returns:
      The output `[B, T, N, Hv]` in the query's dtype; with `return_lse`, also the natural-log sum
      of exponentials of the final logits (after scale and scores, without sinks), `[B, T, N]`,
      float32 (float64 for float64). A query that sees no key has output 0 and LSE -inf.

    Logits, softmax and sums are float32 (float64 for float64). Differentiable in query, key,
    value, score parameters, sinks, and through the LSE, in both modes and any number of times
    (once and in reverse by `cudnn`); masks and the dropout rate carry no gradient.

    NaN and infinities at a key that a query may not see change no bit of its output and LSE (but
    for `cudnn`, which `explain` says of each call). Those
    that it may see, and in the query itself, reach them as in a plain softmax: an infinite value is
    infinite in the output, whatever its weight; a logit of inf, or nothing but -inf, makes the row
    NaN. In gradients, a query without a finite result or cotangent, or that sees a key or value
    that is not finite, makes NaN of its own gradient and of those of all that it sees.

    Raises:
      TypeError: for arguments of the wrong type, a float array as mask among them.
      ValueError: for shapes that do not fit, and for a backend that refuses.

    Warns where lengths and heads look mixed up, as in `[B, N, T, H]`; `positions=Positions()` says
    that they are not.

    Example:
      >>> import jax, jaxattn as ja
      >>> q = k = v = jax.numpy.ones([1, 4, 2, 8])
      >>> ja.attention(q, k, v, mask=ja.masks.causal()).shape
      (1, 4, 2, 8)

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """
    call = request(
        query,
        key,
        value,
        mask=mask,
        score=score,
        scale=scale,
        sinks=sinks,
        positions=positions,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        precision=precision,
    )
    if positions is None:
        _check_layout(call)
    chosen = choose(call, backend).backend
    results = run(_settled(call, chosen), chosen, return_lse)
    if np.ndim(query) == 3:
        results = tuple(each[0] for each in results)
    return results if return_lse else results[0]


@answers()
def attention_weights(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    *,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    sinks: Float[ArrayLike, "N"] | None = None,
    positions: Positions | None = None,
    precision: Any = None,
) -> Float[Array, "*B N T S"]:
    """The weights that `attention` gives to values, for looking at: O(T * S) memory.

    Arguments are those of `attention`.

    Returns:
      `[B, N, T, S]` (or `[N, T, S]` without a batch), float32 (float64 for float64). Rows sum to
      1, or less with sinks; the rows of queries that see no key are 0.
    """
    call = request(
        query,
        key,
        key,
        mask=mask,
        score=score,
        scale=scale,
        sinks=sinks,
        positions=positions,
        precision=precision,
    )
    if positions is None:
        _check_layout(call)
    weights = _run_weights(call)
    return weights[0] if np.ndim(query) == 3 else weights


def _check_layout(call: Call) -> None:
    """Warns of lengths and heads that look mixed up; Python says it once a line of code."""
    if (said := swapped(call)) is not None:
        # The caller of `attention`, which is wrapped.
        warnings.warn(said, stacklevel=4)


def _settled(call: Call, backend: str) -> Call:
    """The call as its backend wants it; this side of `jit`, where values are still known."""
    if _is_empty(call):
        return call
    settle = getattr(BACKENDS[backend], "settle", None)
    return call if settle is None else settle(call)


def run(call: Call, backend: str, with_lse: bool = True) -> tuple[Array, ...]:
    """The output of a checked call by the backend of that name, and the LSE if it is asked for.

    An LSE that nobody asked for is no result, so that `jax_debug_infs` does not stop for its -inf.
    """
    return _compiled((*_traced(call.mask), *_traced(call.score)))(call, backend, with_lse)


def _traced(part: Any) -> Iterator[Program]:
    """The functions of users in a mask or score."""
    fn = getattr(part, "fn", None)
    if isinstance(fn, Program):
        yield fn
    elif fn is None and is_dataclass(part):
        for field in fields(part):
            held = getattr(part, field.name)
            for each in held if isinstance(held, tuple) else (held,):
                yield from _traced(each)


# JAX keeps what it compiled as long as the function that it was compiled for. The library's own
# masks are few; functions of users may come new with every call, a few MB each.
@lru_cache(maxsize=64)
def _compiled(programs: tuple[Program, ...]) -> Callable[..., tuple[Array, ...]]:
    """What computes calls whose masks and scores have these functions of users."""

    def attention(call: Call, backend: str, with_lse: bool) -> tuple[Array, ...]:
        return _attend(call, backend, with_lse)

    return jax.jit(attention, static_argnums=(1, 2))


def _attend(call: Call, backend: str, with_lse: bool) -> tuple[Array, ...]:
    call = _learnable(call)
    if _is_empty(call):
        B, T, _, N, _, _, Hv = call.sizes
        out = jnp.zeros((B, T, N, Hv), call.query.dtype)
        lse = jnp.full((B, T, N), -jnp.inf, base.accumulator(call.query.dtype))
    else:
        out, lse = _over_mesh(BACKENDS[backend].run, call)
    if call.sinks is not None:
        out = (out.astype(lse.dtype) * _share(lse, call.sinks)).astype(out.dtype)
    return (out, lse) if with_lse else (out,)


def _is_empty(call: Call) -> bool:
    """Whether there are no pairs of a query and a key."""
    B, T, S, N, *_ = call.sizes
    return 0 in (B, T, S, N)


def _learnable(call: Call) -> Call:
    """The call as derivatives see it: parameters of scores in float32, none in the dropout rate."""
    dropout = call.dropout
    if dropout is not None:
        rate, query = jax.lax.stop_gradient((dropout.rate, call.query))
        dropout = replace(dropout, rate=rate, seed=_own_seed(query, dropout.seed))
    return replace(call, dropout=dropout)


@custom_vmap
def _own_seed(query: Array, seed: Array) -> Array:
    """The seed, unless `vmap` is about to use one for many queries."""
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
    """`run(call)`; on a mesh of explicit axes, with the shardings of the results said here.

    Inside, the axes are automatic: XLA or the backend partitions the work by batch and by head.
    """
    sharding: Any = jax.typeof(call.query).sharding
    mesh = sharding.mesh
    if mesh.empty or jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return run(call)
    b, t, n = (*sharding.spec, None, None, None)[:3]
    P = jax.sharding.PartitionSpec
    # The arrays' own mesh: nobody need have set one.
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(run, out_sharding=(P(b, t, n), P(b, t, n)))(call)


@jax.jit
def _run_weights(call: Call) -> Array:
    weights, lse = dense.weights(call)
    return weights if call.sinks is None else weights * jnp.swapaxes(_share(lse, call.sinks), 1, 2)


def _share(lse: Array, sinks: Array) -> Array:
    """What sinks leave to the keys: `sigmoid(lse - sinks)`, `[B, T, N, 1]`."""
    # The output of a row that sees nothing is 0 already; -inf would make its gradient NaN.
    finite = jnp.where(lse == -jnp.inf, 0, lse)
    return jax.nn.sigmoid(finite - sinks.astype(lse.dtype)[None, None, :])[..., None]


def check_backend(name: str, given: Any) -> None:
    """Checks that "auto" or a backend is named.

    Raises:
      ValueError: for another name, with what is meant by it, if that is known.
    """
    names = ["auto", *BACKENDS]
    if isinstance(given, str) and given in names:
        return
    message = f"{name}: got {given!r}, expected one of {', '.join(map(repr, names))}"
    meant = foreign.BACKENDS.get(given) if given is None or isinstance(given, str) else None
    raise ValueError(f"{message}; here it is {meant}" if meant else message)


class Choice(NamedTuple):
    """A backend, why it was chosen, and why the others were not."""

    backend: str
    reason: str
    others: dict[str, str]


def choose(call: Call, backend: str) -> Choice:
    """The backend that runs: the one asked for, or the fastest that can.

    Chosen by structure, shapes, dtypes and platform alone, never by a traced value.

    Raises:
      ValueError: for an unknown name, and for a backend that refuses, with its reason.
    """
    check_backend("backend", backend)
    if _is_empty(call):
        name = "dense" if backend == "auto" else backend
        others = {each: "there are no pairs to compute" for each in BACKENDS if each != name}
        return Choice(name, "there are no pairs to compute: nothing runs", others)
    if backend != "auto":
        reason = BACKENDS[backend].refuse(call)
        if reason is not None:
            raise ValueError(f"backend: {backend!r} can't compute this call: {reason}")
        others = {name: "another was asked for" for name in BACKENDS if name != backend}
        return Choice(backend, "asked for", others)
    logits = call.sizes.B * call.sizes.N * call.sizes.T * call.sizes.S
    platform = base.platform(call)
    most = _SMALL if platform == "cpu" else _SMALL_ACCELERATED
    held = call.key.size + call.value.size
    others = {"decode": decode.refuse(call) or "faster only from a KVCache, which asks for it"}
    here = {name: BACKENDS[name].refuse(call) for name in ACCELERATED}
    others |= {name: why or f"slower up to {most} logits" for name, why in here.items()}
    refused = tiled.refuse(call)
    if refused is not None:
        return Choice("dense", f"nothing else can: {refused}", {"tiled": refused, **others})
    if base.symbolic(logits):
        return Choice(
            "tiled",
            "the batch is symbolic, and in O(T + S) memory any size will do",
            {"dense": "O(T * S) memory for each row of the batch", **others},
        )
    wide = call.query.dtype.itemsize >= 4
    if logits <= most and platform == "cpu" and wide and held > _SMALL_CACHE:
        return Choice(
            "tiled",
            f"{logits} logits are few, but keys and values are many ({held} numbers)",
            {"dense": f"slower above {_SMALL_CACHE} numbers in keys and values on cpu", **others},
        )
    if logits <= most:
        why = f"{logits} logits are few: up to {most} dense is faster on {platform}"
        return Choice("dense", why, {"tiled": "slower for so few logits", **others})
    others["dense"] = f"O(T * S) memory, and slower above {most} logits on {platform}"
    for name in ACCELERATED:
        # Kernels that are interpreted, in tests, run where they are asked for.
        if here[name] is None and platform != "cpu":
            others["tiled"] = f"loops of plain XLA, slower on {platform}"
            rest = {other: why for other, why in others.items() if other != name}
            return Choice(name, BACKENDS[name].WHY, rest)
    return Choice(
        "tiled",
        f"computes only the tiles that the mask allows, in O(T + S) memory ({logits} logits)",
        others,
    )

"""`attention`, the one entry point: check, choose a backend, run."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .algebra import Mask, Positions, as_mask
from .backends import base, dense
from .backends.base import Call
from .scores import as_score
from .shapes import Array, ArrayLike, Float
from .split import check_extents, hoist

BACKENDS: dict[str, ModuleType] = {"dense": dense}


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
    value, score parameters, sinks, and through the LSE; masks carry no gradient.

    Raises:
      TypeError: for arguments of the wrong type, a float array as mask among them.
      ValueError: for shapes that do not fit, and for a backend that refuses.

    Example:
      >>> import jax, jaxattn as ja
      >>> q = k = v = jax.numpy.ones([1, 4, 2, 8])
      >>> ja.attention(q, k, v, mask=ja.masks.causal()).shape
      (1, 4, 2, 8)

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """
    call, batched = checked(
        query, key, value, mask, score, scale, positions, dropout_rate, dropout_seed, precision
    )
    out, lse = _run(call, _sinks(sinks, call.sizes.N), choose(call, backend))
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


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
    call, batched = checked(
        query, key, key, mask, score, scale, positions, 0.0, None, precision
    )
    weights = _run_weights(call, _sinks(sinks, call.sizes.N))
    return weights if batched else weights[0]


@partial(jax.jit, static_argnums=2)
def _run(call: Call, sinks: Array | None, backend: str) -> tuple[Array, Array]:
    out, lse = _over_mesh(BACKENDS[backend].run, call)
    if sinks is not None:
        out = (out.astype(lse.dtype) * _share(lse, sinks)).astype(out.dtype)
    return out, lse


def _over_mesh(run: Any, call: Call) -> Any:
    """`run(call)`; on a mesh of explicit axes, with the shardings of the results said here.

    Inside, the axes are automatic: XLA or the backend partitions the work by batch and by head.
    """
    sharding = jax.typeof(call.query).sharding
    mesh = sharding.mesh
    if mesh.empty or jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return run(call)
    b, t, n, _ = (*sharding.spec, *(None,) * (4 - len(sharding.spec)))
    P = jax.sharding.PartitionSpec
    return jax.sharding.auto_axes(run, out_sharding=(P(b, t, n), P(b, t, n)))(call)


@jax.jit
def _run_weights(call: Call, sinks: Array | None) -> Array:
    weights, lse = dense.weights(call)
    return weights if sinks is None else weights * jnp.swapaxes(_share(lse, sinks), 1, 2)


def _share(lse: Array, sinks: Array) -> Array:
    """What sinks leave to the keys: `sigmoid(lse - sinks)`, `[B, T, N, 1]`."""
    # The output of a row that sees nothing is 0 already; -inf would make its gradient NaN.
    finite = jnp.where(lse > -jnp.inf, lse, 0)
    return jax.nn.sigmoid(finite - sinks.astype(lse.dtype)[None, None, :])[..., None]


def _sinks(given: Any, heads: int) -> Array | None:
    if given is None:
        return None
    array = jnp.asarray(given)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"sinks: got dtype {array.dtype}, expected floats [N] = [{heads}]")
    if array.shape != (heads,):
        raise ValueError(f"sinks: got shape {list(array.shape)}, expected [N] = [{heads}]")
    return array


def choose(call: Call, backend: str) -> str:
    """The name of the backend that runs: the one asked for, or the fastest that can.

    Raises:
      ValueError: for an unknown name, and for a backend that refuses, with its reason.
    """
    if backend == "auto":
        return "dense"
    if backend not in BACKENDS:
        known = ", ".join(map(repr, ["auto", *BACKENDS]))
        raise ValueError(f"backend: got {backend!r}, expected one of {known}")
    reason = BACKENDS[backend].refuse(call)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} can't compute this call: {reason}")
    return backend


def checked(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    score: Any,
    scale: Any,
    positions: Any,
    dropout_rate: Any,
    dropout_seed: Any,
    precision: Any,
) -> tuple[Call, bool]:
    """The `Call` that these arguments mean, and whether they came with a batch axis."""
    arrays = {"query": query, "key": key, "value": value}
    query, key, value = (_array(name, given) for name, given in arrays.items())
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"key, value: got dtypes {key.dtype}, {value.dtype}, expected {query.dtype}, the "
            "query's; cast them"
        )
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    for name, array, expected in (
        ("key", key, [B, "S", "K", H]),
        ("value", value, [B, S, K, "Hv"]),
    ):
        fits = all(isinstance(e, str) or e == n for n, e in zip(array.shape, expected, strict=True))
        if not fits:
            raise ValueError(
                f"{name}: got shape {_shown(array, batched)}, expected "
                f"[{', '.join(map(str, expected if batched else expected[1:]))}] with a query of "
                f"shape {_shown(query, batched)}; axes are [batch, length, heads, head dimension]"
            )
    if K == 0 or N % K:
        raise ValueError(
            f"key: got {K} heads, expected a divisor of the query's {N}: every key head serves "
            "N / K query heads"
        )
    if positions is not None and not isinstance(positions, Positions):
        raise TypeError(
            f"positions: got {type(positions).__name__}, expected Positions(b=, h=, q=, k=)"
        )
    at = (positions or Positions()).checked(B, N, T, S)
    if mask is not None:
        mask = hoist(_mask(mask, B, N, T, S))
        check_extents(mask, at, B, N, T, S)
    if score is not None:
        score = hoist(as_score(score))
        check_extents(score, at, B, N, T, S)
    call = Call(
        query=query,
        key=key,
        value=value,
        mask=mask,
        score=score,
        scale=_scale(scale, H),
        positions=at,
        dropout=_dropout(dropout_rate, dropout_seed),
        precision=precision,
    )
    return call, batched


def _shown(array: Any, batched: bool) -> list[int]:
    return list(array.shape if batched else array.shape[1:])


def _array(name: str, given: Any) -> Array:
    try:
        array = jnp.asarray(given)
    except TypeError as error:
        raise TypeError(f"{name}: got {type(given).__name__}, expected an array") from error
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise TypeError(
            f"{name}: got dtype {array.dtype}, expected float16, bfloat16, float32 or float64"
        )
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{name}: got shape {list(array.shape)}, expected [batch, length, heads, head "
            "dimension] or, without a batch, [length, heads, head dimension]"
        )
    return array


def _mask(given: Any, B: int, N: int, T: int, S: int) -> Mask:
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        mask, shape = as_mask(given), tuple(given.shape)
        full = (T, S) if len(shape) == 2 else (B, N, T, S)
        broadcasts = len(shape) == 4
        allowed = all(n == e or (broadcasts and n == 1) for n, e in zip(shape, full, strict=True))
        if not allowed:
            expected = f"[T, S] = [{T}, {S}]" if len(shape) == 2 else (
                f"[{B}|1, {N}|1, {T}|1, {S}|1]"
            )
            raise ValueError(
                f"mask: got a boolean array of shape {list(shape)}, expected {expected}; for "
                "[B, S] padding use masks.key_padding(valid)"
            )
        return mask
    return as_mask(given)


def _scale(given: Any, H: int) -> Any:
    if given is None:
        return float(max(H, 1) ** -0.5)
    if isinstance(given, (bool, str)) or np.ndim(given) != 0:
        raise ValueError(f"scale: got {given!r}, expected one number")
    if not isinstance(given, jax.core.Tracer) and not np.isfinite(given):
        raise ValueError(f"scale: got {given}, expected a finite number")
    return given


def _dropout(rate: Any, seed: Any) -> base.Dropout | None:
    known = not isinstance(rate, jax.core.Tracer)
    if np.ndim(rate) != 0 or (known and not 0 <= float(rate) <= 1):
        raise ValueError(f"dropout_rate: got {rate!r}, expected a probability from 0 to 1")
    if known and float(rate) == 0:
        return None
    if seed is None:
        raise ValueError(
            f"dropout_seed: got None with dropout_rate={rate}, expected a uint32 or a "
            "jax.random.key; for no dropout say dropout_rate=0.0"
        )
    if hasattr(seed, "dtype") and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        if seed.shape != ():
            raise ValueError(f"dropout_seed: got keys of shape {list(seed.shape)}, expected one")
        words = jax.random.key_data(seed).reshape(-1, 2)
        return base.Dropout(rate, words[0] if len(words) == 1 else words[0] ^ words[1])
    array = seed if hasattr(seed, "dtype") else np.asarray(seed)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape not in ((), (2,)):
        raise TypeError(
            f"dropout_seed: got {array.dtype}{list(array.shape)}, expected a uint32 or a "
            "jax.random.key"
        )
    words = jnp.asarray(array.astype(np.uint32))
    return base.Dropout(rate, words if words.ndim else jnp.stack([words, jnp.zeros_like(words)]))

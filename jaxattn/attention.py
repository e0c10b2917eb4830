"""`attention`, the one entry point: checked arguments, then `dispatch`."""

from __future__ import annotations

import warnings
from typing import Any, Literal, Unpack, overload

import jax
import numpy as np

from .arguments import Options, checked_call, swapped
from .backends.base import Call
from .checks.foreign_names import with_remedies
from .checks.options import flag
from .dispatch import dispatch, weights_of
from .masks.positions import Positions
from .shapes import Array, ArrayLike, Float


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Float[Array, "*B T N Hv"]: ...


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]: ...


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    return_lse: bool,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]: ...


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    stats: Any,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> tuple[Any, ...]: ...


@with_remedies()
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
    stats: Any = None,
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
      scale: the factor of the logits; by default `H ** -0.5`.
      sinks: a learnable logit for each head, `[N]`, that takes weight and has no value: the output
        is multiplied by `sigmoid(lse - sinks)` (gpt-oss, arXiv 2508.10925).
      positions: the values of `b`, `h`, `q`, `k` in masks, scores and dropout; by default 0, 1,
        2, ...
      dropout_rate: the probability with which a weight becomes 0; the kept weights are divided
        by `1 - dropout_rate`.
      dropout_seed: a uint32 or a typed `jax.random.key`. Which weights drop depends only on the
        seed and on absolute positions.
      precision: the precision of matrix products, as in `jax.lax.dot_general`; by default float32
        inputs are multiplied in true float32 on every platform.
      stats: a pytree of statistics of the weights (`jaxattn.stats`).
      backend: "auto", or the name of a backend. A named backend runs, or raises its reason.
      return_lse: also return the LSE.

    Returns:
      The output `[B, T, N, Hv]` in the query's dtype; with `return_lse`, also the natural-log sum
      of exponentials of the final logits (after scale and scores, without sinks), `[B, T, N]`,
      float32 (float64 for float64). A query that sees no key has output 0 and LSE -inf. With
      `stats`, their pytree of values is the last result.

    Logits, softmax and sums are float32 (float64 for float64). Differentiable in query, key,
    value, score parameters, sinks, and through the LSE, in both modes and any number of times
    (once and in reverse by `cudnn`); masks and the dropout rate carry no gradient.

    NaN and infinities at a key that a query may not see change no bit of its output and LSE (but
    for `cudnn`, which `explain` says of each call). Those
    that it may see, and in the query itself, reach them as in a plain softmax: an infinite value is
    infinite in the output, whatever its weight; a logit of inf, or nothing but -inf, makes the row
    NaN. In gradients, a query without a finite result or cotangent, or that sees a key or value
    that is not finite, makes NaN of its own gradient and of those of all that it sees (on `dense`,
    a key of weight 0 may have 0).

    Raises:
      TypeError: for arguments of the wrong type, a float array as mask among them.
      ValueError: for shapes that do not fit, and for a backend that refuses.

    Warns if lengths and heads look exchanged, as in `[B, N, T, H]`; `positions=Positions()` says
    that they are not.

    Example:
      >>> import jax, jaxattn as ja
      >>> q = k = v = jax.numpy.ones([1, 4, 2, 8])
      >>> ja.attention(q, k, v, mask=ja.masks.causal()).shape
      (1, 4, 2, 8)

    Source: Vaswani et al. 2017, arXiv 1706.03762.
    """
    with_lse = flag(return_lse, "return_lse")
    call = checked_call(
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
        stats=stats,
    )
    if positions is None:
        _check_layout(call)
    results = dispatch(call, backend, with_lse=with_lse)
    if np.ndim(query) == 3:
        results = jax.tree.map(lambda each: each[0], results)
    return results if len(results) > 1 else results[0]


@with_remedies()
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
    """The weights by which `attention` multiplies values, to look at: O(T * S) memory.

    The arguments are those of `attention`.

    Returns:
      `[B, N, T, S]` (or `[N, T, S]` without a batch), float32 (float64 for float64). Rows sum to
      1, or to less with sinks; empty rows are 0.
    """
    call = checked_call(
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
    weights = weights_of(call)
    return weights[0] if np.ndim(query) == 3 else weights


def _check_layout(call: Call) -> None:
    """Warns if lengths and heads look exchanged; Python shows it once for each line of code."""
    if (said := swapped(call)) is not None:
        # 4: the caller of `attention`, which is wrapped.
        warnings.warn(said, stacklevel=4)

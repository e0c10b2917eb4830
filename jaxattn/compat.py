"""Functions with the signatures of others: of the Transformer tutorial, and of `jax.nn`."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp

from . import masks, scores
from .attention import attention, attention_weights
from .checks.arrays import array_of, described
from .checks.foreign_names import with_remedies
from .checks.integers import integers
from .checks.options import flag
from .dispatch import check_backend
from .masks.mask import Mask, as_mask
from .masks.positions import Positions
from .shapes import Array, ArrayLike, Float, Int


def scaled_dot_product_attention(
    q: Float[ArrayLike, "*q T d"],
    k: Float[ArrayLike, "*k S d"],
    v: Float[ArrayLike, "*v S dv"],
    mask: Any = None,
) -> tuple[Float[Array, "*leading T dv"], Float[Array, "*leading T S"]]:
    """`softmax(q k^T / sqrt(d)) v` over the keys that the mask allows, and the weights.

    The function of the tutorial "Transformer model for language understanding": lengths and
    features are the last two axes (heads come before lengths, unlike in `jax.nn`), any axes lead.

    Args:
      q, k, v: queries `(..., T, d)`, keys `(..., S, d)`, values `(..., S, dv)`;
        leading axes broadcast.
      mask: a `Mask` or a callable (axis -3 is its `h` where there is one, earlier axes flatten to
        its `b`), or booleans that broadcast to `(..., T, S)`. True means *may attend*; the
        tutorial's own masks, 1 where a key is ignored, are
        `masks.from_array(mask, "ignore")`.

    Returns:
      The output `(..., T, dv)` in q's dtype and the weights `(..., T, S)` in float32 (float64 for
      float64). A query that may see nothing has output and weights 0.

    Example:
      >>> import jax.numpy as jnp, jaxattn as ja
      >>> k = jnp.array([[10., 0, 0], [0, 10, 0], [0, 0, 10], [0, 0, 10]])
      >>> v = jnp.array([[1., 0], [10, 0], [100, 5], [1000, 6]])
      >>> output, weights = ja.scaled_dot_product_attention(jnp.array([[0., 0, 10]]), k, v)
      >>> output.tolist(), weights.round(3).tolist()
      ([[550.0, 5.5]], [[0.0, 0.0, 0.5, 0.5]])
    """
    arrays = []
    for name, given in (("q", q), ("k", k), ("v", v)):
        array = array_of(given, name, "floats (..., length, d)")
        if array.ndim < 2:
            raise ValueError(f"{name}: got shape {list(array.shape)}, expected (..., length, d)")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}: got dtype {array.dtype}, expected floats (..., length, d)")
        arrays.append(array)
    query, key, value = arrays
    leads = [array.shape[:-2] for array in arrays]
    try:
        lead = jnp.broadcast_shapes(*leads)
    except ValueError as error:
        raise ValueError(
            f"q, k, v: got leading axes {', '.join(map(str, leads))}, expected axes that broadcast"
        ) from error
    rows, heads = math.prod(lead[:-1]), lead[-1] if lead else 1

    def layout(array: Array) -> Array:
        """(..., T, d) as [B, T, N, d]."""
        full = jnp.broadcast_to(array, (*lead, *array.shape[-2:]))
        return jnp.moveaxis(full.reshape(rows, heads, *array.shape[-2:]), 1, 2)

    T, S = query.shape[-2], key.shape[-2]
    if hasattr(mask, "dtype") and hasattr(mask, "shape"):
        if mask.dtype == jnp.bool_:
            try:
                mask = jnp.broadcast_to(mask, (*lead, T, S)).reshape(rows, heads, T, S)
            except ValueError as error:
                raise ValueError(
                    f"mask: got shape {list(mask.shape)}, expected one that broadcasts to "
                    f"(..., T, S) = {[*lead, T, S]}"
                ) from error
        mask = as_mask(mask)
    # Positions are given so that `attention` does not warn: the layout is right here.
    at = Positions()
    call = {"query": layout(query), "key": layout(key), "mask": mask, "positions": at}
    weights = attention_weights(**call)
    # All weights are computed anyway, so the dense backend costs only one product more.
    output = attention(**call, value=layout(value), backend="dense")
    output = jnp.moveaxis(output, 2, 1).reshape(*lead, T, value.shape[-1])
    return output, weights.reshape(*lead, T, S)


@with_remedies()
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    bias: ArrayLike | None = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, "B"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """The twin of `jax.nn.dot_product_attention`: same signature, so that an import swap is enough.

    Arguments and results are those of `jax.nn.dot_product_attention`. If every query sees a key,
    the results are the same. They differ here:

    | | `jax.nn` | here |
    |---|---|---|
    | an empty row | the mean of all values, or of all visible heads' | output 0, LSE -inf, \
gradient 0 |
    | NaN or inf in masked keys and values | NaN everywhere | changes nothing |
    | float64 | softmax in float32 | softmax in float64 |
    | gradient of the residual | stopped | flows |
    | float32 products on GPU and TPU | the platform's default precision | true float32 |
    | 16-bit weights | rounded to 16 bits before the sum over values | not rounded by the \
definition |
    | `value` | of the key's shape | may have a head dimension of its own |
    | `mask` | anything that broadcasts | also a `Mask` or a callable `(b, h, q, k) -> bool` |
    | lengths | int32 | any integers |
    | `implementation` | `None`, "xla", "cudnn" | also the name of a backend; `None` and "xla" let \
`backend="auto"` choose |

    Raises:
      TypeError, ValueError: for what does not fit, naming the argument.
    """
    if implementation not in (None, "xla"):
        check_backend("implementation", implementation)
    named = {"query": query, "key": key, "value": value}
    arrays = [array_of(given, name, "an array") for name, given in named.items()]
    shape = arrays[0].shape
    query, key, value = map(_at_least_4d, arrays)
    B = key.shape[0]
    parts: list[Mask] = []
    if mask is not None:
        is_array = hasattr(mask, "dtype") and hasattr(mask, "shape")
        parts.append(as_mask(_at_least_4d(_array("mask", mask, "booleans")) if is_array else mask))
    if flag(is_causal, "is_causal"):
        parts.append(masks.causal())
    if local_window_size is not None:
        parts.append(_window(local_window_size))
    for name, lengths, padding in (
        ("query_seq_lengths", query_seq_lengths, masks.query_padding),
        ("key_value_seq_lengths", key_value_seq_lengths, masks.key_padding),
    ):
        if lengths is not None:
            counts = integers(lengths, name, ("[B]",))
            if counts.shape != (B,):
                raise ValueError(f"{name}: got shape {list(counts.shape)}, expected [B] = [{B}]")
            parts.append(padding(lengths=jnp.maximum(counts, 0)))
    score = None
    if bias is not None:
        # Not scores.bias(), which refuses -inf: here -inf is common, and the definition takes it.
        array = _at_least_4d(_array("bias", bias, "numbers"))
        array = array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
        score = scores.Bias(array)
    found = attention(
        query,
        key,
        value,
        mask=functools.reduce(operator.and_, parts) if parts else None,
        score=score,
        scale=scale,
        backend="auto" if implementation in (None, "xla") else implementation,
        return_lse=flag(return_residual, "return_residual"),
    )
    whole = (*shape[:-1], value.shape[-1])
    if isinstance(found, tuple):
        out, lse = found
        return out.reshape(whole), lse.astype(key.dtype).reshape(shape[:-1])
    return found.reshape(whole)


def _array(name: str, given: Any, expected: str) -> Array:
    """A real array of at most four axes, of which the leading ones may be missing."""
    array: Array = array_of(given, name, f"{expected} that broadcast to [B, N, T, S]")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {expected}")
    if array.ndim > 4:
        raise ValueError(
            f"{name}: got shape {list(array.shape)}, expected one that broadcasts to [B, N, T, S]"
        )
    return array


def _window(given: Any) -> Mask:
    """The window of `local_window_size`: as far on both sides, or `(left, right)`."""
    sides = given if isinstance(given, (tuple, list)) else (given, given)
    if len(sides) != 2:
        raise ValueError(
            f"local_window_size: got {described(given)}, expected one integer, or (left, right)"
        )
    left, right = (integers(side, "local_window_size", ("[]",), 0) for side in sides)
    return masks.sliding_window(left, right)


def _at_least_4d(array: Array) -> Array:
    """Missing leading axes of extent 1, as `jax.nn.dot_product_attention` adds them."""
    return jnp.expand_dims(array, tuple(range(4 - array.ndim)))

"""The arguments of `attention`, checked: wrong ones are named, right ones become a `Call`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .algebra import Mask, PerHead, Positions, as_mask
from .backends import base
from .backends.base import Call
from .beyond import within
from .scores import as_score
from .shapes import Array
from .split import check_extents, hoist
from .tiles import TileMap


def request(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    sinks: Any = None,
    positions: Any = None,
    dropout_rate: Any = 0.0,
    dropout_seed: Any = None,
    precision: Any = None,
) -> Call:
    """The `Call` that the arguments of `attention` mean; without a batch, of one row.

    Raises:
      TypeError, ValueError: for what does not fit, naming the argument, what came, what was
        expected, and the remedy.
    """
    arrays = {"query": query, "key": key, "value": value}
    query, key, value = (_array(name, given) for name, given in arrays.items())
    batched = query.ndim == 4
    for name, array in (("key", key), ("value", value)):
        if array.ndim != query.ndim:
            raise ValueError(
                f"{name}: got shape {list(array.shape)}, expected rank {query.ndim} as of the "
                f"query, {list(query.shape)}"
            )
    if not batched:
        query, key, value = map(_one_row, (query, key, value))
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
        if isinstance(mask, TileMap):
            mask = mask.for_call(B, N, T, S, positions)
        mask = _mask(mask, B, N, T, S)
        if at.h is None:
            _check_heads(mask, N)
        mask = hoist(mask)
        check_extents(mask, at, B, N, T, S)
        if positions is not None and not isinstance(mask, TileMap):
            mask = within(mask, positions, (B, N, T, S))
    if score is not None:
        logit = base.accumulator(query.dtype)
        score = hoist(as_score(score), logit)
        check_extents(score, at, B, N, T, S, logit)
        if positions is not None:
            score = within(score, positions, (B, N, T, S), mask=mask, logit=logit)
    return Call(
        query=query,
        key=key,
        value=value,
        mask=mask,
        score=score,
        scale=_scale(scale, H),
        sinks=_sinks(sinks, N),
        positions=at,
        dropout=_dropout(dropout_rate, dropout_seed),
        precision=precision,
    )


def _shown(array: Any, batched: bool) -> list[int]:
    return list(array.shape if batched else array.shape[1:])


def _one_row(array: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1, *array.shape), array.dtype)
    return array[None]


def _array(name: str, given: Any) -> Any:
    try:
        if given is None or isinstance(given, (str, bytes)):
            raise TypeError("not numbers")
        array = given if isinstance(given, jax.ShapeDtypeStruct) else jnp.asarray(given)
    except (TypeError, ValueError) as error:
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
            expected = (
                f"[T, S] = [{T}, {S}]" if len(shape) == 2 else (f"[{B}|1, {N}|1, {T}|1, {S}|1]")
            )
            raise ValueError(
                f"mask: got a boolean array of shape {list(shape)}, expected {expected}; for "
                "[B, S] padding use masks.key_padding(valid)"
            )
        return mask
    return as_mask(given)


def _check_heads(mask: Mask, N: int) -> None:
    """A mask for each head means as many masks as heads."""
    if isinstance(mask, PerHead) and len(mask.parts) != N:
        raise ValueError(
            f"mask: got per_head of {len(mask.parts)} masks, expected {N}, one for each query head"
        )
    if not dataclasses.is_dataclass(mask):
        return
    for field in dataclasses.fields(mask):
        held = getattr(mask, field.name)
        for part in held if isinstance(held, tuple) else (held,):
            if isinstance(part, Mask):
                _check_heads(part, N)


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
    if isinstance(seed, (int, np.integer)) and not 0 <= seed < 2**32:
        raise ValueError(
            f"dropout_seed: got {seed}, expected 0 <= seed < 2**32 or a jax.random.key; "
            "jax.random.key(seed) takes larger ones"
        )
    array = seed if hasattr(seed, "dtype") else np.asarray(seed)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape not in ((), (2,)):
        raise TypeError(
            f"dropout_seed: got {array.dtype}{list(array.shape)}, expected a uint32 or a "
            "jax.random.key"
        )
    words = jnp.asarray(array.astype(np.uint32))
    return base.Dropout(rate, words if words.ndim else jnp.stack([words, jnp.zeros_like(words)]))


def _sinks(given: Any, heads: int) -> Array | None:
    if given is None:
        return None
    array = jnp.asarray(given)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"sinks: got dtype {array.dtype}, expected floats [N] = [{heads}]")
    if array.shape != (heads,):
        raise ValueError(f"sinks: got shape {list(array.shape)}, expected [N] = [{heads}]")
    return array

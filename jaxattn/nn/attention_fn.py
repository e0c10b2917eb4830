"""`attention_fn`: jaxattn inside Flax's own attention modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks, scores
from ..arguments import checked_call
from ..attention import attention_weights
from ..checks import options as checks
from ..checks.arrays import array_of, described
from ..dispatch import check_backend, dispatch
from ..masks.mask import Mask, as_mask
from ..masks.positions import Positions
from ..scores import as_score
from ..shapes import Array
from ..stats import check_statistics
from .functional import both
from .sowing import collects, sow


def attention_fn(
    mask: Any = None,
    score: Any = None,
    *,
    stats: Any = None,
    backend: str = "auto",
    decode: bool | None = None,
) -> Callable[..., Array]:
    """The `attention_fn` of Flax's `MultiHeadDotProductAttention` and `nnx.MultiHeadAttention`.

    Args:
      mask: which query may see which key, in every call. It is combined by `&` with the mask of
        the call, which is a `Mask`, or Flax's array: `[batch..., N|1, T|1, S|1]`, boolean or
        float32 of 0 and 1.
      score: what changes the logits, as in `jaxattn.attention`.
      stats: statistics of the weights (`jaxattn.stats`), in any pytree. A call with `sow_weights`
        then sows their values as "attention_stats" where they are collected, and no weights.
      backend: as in `jaxattn.attention`.
      decode: whether the module decodes from Flax's cache, one token at a time. The query's
        position is then that of the last key that Flax's mask shows. It has to be given if there
        is a mask or score and a call has one query for several keys: Flax does not say which of
        the two it is.

    It does what Flax's own function does, with these exceptions:

    | | Flax | here |
    |---|---|---|
    | an empty row | the mean of all values | output 0 |
    | NaN or inf in masked keys and values | NaN everywhere | changes nothing |
    | softmax of 16-bit inputs | in 16 bits, unless `force_fp32_for_softmax` | float32 |
    | weights and output of 16 bits | float32 if `force_fp32_for_softmax` | the same |
    | float32 products on GPU and TPU | the platform's default precision | true float32 |
    | dropout | bits of `jax.random` | bits of a hash of positions; `broadcast_dropout` as there |
    | `sow_weights` | after the softmax | the same, by the dense backend; or `stats` |
    | einsums of the module's choice | used | refused |

    Example:
      >>> from flax import linen as nn
      >>> import jaxattn as ja
      >>> layer = nn.MultiHeadDotProductAttention(
      ...     num_heads=8, attention_fn=ja.nn.attention_fn(mask=ja.masks.causal())
      ... )
    """
    fixed = None if mask is None else as_mask(mask)
    own_score = None if score is None else as_score(score)
    check_statistics(stats)
    check_backend("attention_fn(backend)", backend)
    decode = checks.optional_flag(decode, "attention_fn(decode)")

    def positions(flax_mask: Any, at: Any, B: int, T: int, S: int) -> Positions | None:
        if at is not None and T != 1:
            raise ValueError(
                f"attention_fn(input_positions): got positions for {T} queries, expected None: "
                "Flax uses them for rotary embeddings, which are "
                "ja.nn.nnx.MultiHeadAttention(rope=ja.nn.RoPE()) here"
            )
        if at is not None:
            return Positions(q=jnp.broadcast_to(jnp.asarray(at, jnp.int32), (B, 1)))
        if (fixed is None and own_score is None) or T != 1 or S == 1:
            return None
        if decode is None:
            raise ValueError(
                f"attention_fn(decode): got None with one query for {S} keys, expected True if the "
                "module decodes from Flax's cache, so that the query stands at its end, or "
                "False if queries count from 0"
            )
        if not decode:
            return None
        if not hasattr(flax_mask, "shape"):
            raise ValueError(
                "attention_fn(decode): got True without the mask of Flax's cache, expected the "
                "module to decode (decode=True there too), or positions as input_positions"
            )
        # Flax's mask shows the keys up to its index: the query stands at the last of them.
        shown = jnp.broadcast_to(flax_mask != 0, (*flax_mask.shape[:-1], S))
        shown = shown.reshape(-1, shown.shape[-3], S).any(1)
        last = S - 1 - jnp.argmax(shown[:, ::-1], axis=1)
        return Positions(q=jnp.broadcast_to(last[:, None], (B, 1)))

    # Every name is written out: linen drops arguments that the signature does not name.
    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        promote_dtype: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Array:
        for name, given in (
            ("einsum_dot_general", einsum_dot_general),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum),
            ("attn_weights_value_einsum", attn_weights_value_einsum),
        ):
            if given is not None:
                raise ValueError(
                    f"attention_fn({name}): got {given!r}, expected None: the products are "
                    "jaxattn's own; for quantised products use Flax's own attention_fn"
                )
        flags = {
            "broadcast_dropout": broadcast_dropout,
            "force_fp32_for_softmax": force_fp32_for_softmax,
            "is_causal": is_causal,
        }
        for name, given in flags.items():
            checks.flag(given, f"attention_fn({name})")
        deterministic = checks.optional_flag(deterministic, "attention_fn(deterministic)") or False
        if dtype is not None:
            checks.dtype(dtype, "attention_fn(dtype)")
        named = {"query": query, "key": key, "value": value}
        query, key, value = (_heads(name, given) for name, given in named.items())
        promoted = _promoted if promote_dtype is None else promote_dtype
        if not callable(promoted):
            raise TypeError(
                f"attention_fn(promote_dtype): got {described(promoted)}, expected a function, or "
                "None"
            )
        query, key, value = promoted((query, key, value), dtype=dtype)
        if force_fp32_for_softmax:
            # Flax's weights are then float32, and so are the values they are multiplied by.
            query, key, value = _promoted(
                (query, key, value), jnp.promote_types(query.dtype, jnp.float32)
            )
        lead = query.shape[:-3]
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        B, T, N, _ = query.shape
        S = key.shape[1]
        given = _mask(mask, lead, N, T, S)
        whole = both(fixed, given)
        if is_causal:
            whole = both(whole, masks.causal())
        parts = [] if own_score is None else [own_score]
        if bias is not None:
            array = _rank_4("bias", bias, lead, N, T, S)
            parts.insert(0, scores.bias(array))
        options = {
            "mask": whole,
            "score": scores.chain(*parts) if parts else None,
            "positions": positions(mask, input_positions, B, T, S),
            "precision": precision,
        }
        rate = 0.0 if deterministic else dropout_rate
        sows = module is not None and stats is not None
        asked = stats if sows and collects(module) else None
        call = checked_call(
            query, key, value, dropout_rate=rate, dropout_seed=dropout_rng, stats=asked, **options
        )
        if call.dropout is not None:
            dropout = dataclasses.replace(call.dropout, shared=broadcast_dropout)
            call = dataclasses.replace(call, dropout=dropout)
        weigh = module is not None and stats is None
        if weigh:
            if backend not in ("auto", "dense"):
                raise ValueError(
                    f"attention_fn(backend): got {backend!r} with sow_weights, expected 'dense' or "
                    "'auto': only the dense backend computes all weights"
                )
            weights = attention_weights(query, key, **options).astype(query.dtype)
            sow(module, "attention_weights", weights.reshape(*lead, N, T, S))
        results = dispatch(call, "dense" if weigh else backend, with_lse=False)
        out, *seen = jax.tree.map(lambda each: each.reshape(*lead, *each.shape[1:]), results)
        if seen:
            sow(module, "attention_stats", *seen)
        return out

    return attend


def _heads(name: str, given: Any) -> Array:
    array: Array = array_of(given, name, "an array [batch..., length, heads, head dimension]")
    if array.ndim < 3:
        raise ValueError(
            f"{name}: got shape {list(array.shape)}, expected [batch..., length, heads, head "
            "dimension]"
        )
    return array


def _promoted(arrays: tuple[Array, ...], dtype: Any) -> tuple[Array, ...]:
    common = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(a.astype(common) for a in arrays)


def _mask(given: Any, lead: tuple[int, ...], N: int, T: int, S: int) -> Mask | None:
    if given is None or not hasattr(given, "shape"):
        return None if given is None else as_mask(given)
    return masks.from_array(_rank_4("mask", given, lead, N, T, S), "flax")


def _rank_4(name: str, array: Any, lead: tuple[int, ...], N: int, T: int, S: int) -> Array:
    """`[batch..., N|1, T|1, S|1]` as `[B|1, N|1, T|1, S|1]`."""
    full = (*lead, N, T, S)
    values = array_of(array, name, f"an array that broadcasts to {list(full)}")
    shape = (1,) * (len(full) - values.ndim) + values.shape
    fits = len(shape) == len(full) and all(n in (1, e) for n, e in zip(shape, full, strict=True))
    if not fits:
        raise ValueError(
            f"{name}: got shape {list(values.shape)}, expected one that broadcasts to "
            f"[batch..., N, T, S] = {list(full)}"
        )
    batch, rest = shape[:-3], shape[-3:]
    if any(n != 1 for n in batch):
        batch = lead
    values = jnp.broadcast_to(values.reshape(shape), (*batch, *rest))
    return values.reshape(math.prod(batch), *rest)

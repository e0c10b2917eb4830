"""What a type checker sees of the public functions; `make check` runs mypy on this file."""

from typing import assert_type

import jax

import jaxattn as ja
from jaxattn.nn import linen, nnx


def of_functions(x: jax.Array, flag: bool) -> None:
    assert_type(ja.attention(x, x, x, mask=ja.masks.causal()), jax.Array)
    assert_type(ja.attention(x, x, x, return_lse=False), jax.Array)
    assert_type(ja.attention(x, x, x, return_lse=True, scale=1.0), tuple[jax.Array, jax.Array])
    assert_type(ja.attention(x, x, x, return_lse=flag), jax.Array | tuple[jax.Array, jax.Array])
    ja.attention(x, x, x, maks=None)  # type: ignore[call-overload]
    assert_type(ja.attention_weights(x, x), jax.Array)
    assert_type(ja.masks.causal() & (lambda b, h, q, k: q - k < 4), ja.Mask)
    assert_type(ja.masks.causal().dense(4, 4), jax.Array)


def of_parallel(x: jax.Array, flag: bool) -> None:
    parts = ja.parallel.attention
    assert_type(parts(x, x, x, axis="seq", mask=ja.masks.causal()), jax.Array)
    assert_type(
        parts(x, x, x, schedule=("ring", "heads"), return_lse=True), tuple[jax.Array, jax.Array]
    )
    assert_type(parts(x, x, x, return_lse=flag), jax.Array | tuple[jax.Array, jax.Array])
    parts(x, x, x, schedules="ring")  # type: ignore[call-overload]
    assert_type(ja.parallel.layout(ja.masks.causal(), 64, 4), ja.parallel.Layout)
    assert_type(ja.parallel.explain(x, x, x, ranks=4).sent.forward, int)


def of_modules(
    x: jax.Array, cache: ja.KVCache, one: linen.MultiHeadAttention, other: nnx.MultiHeadAttention
) -> None:
    assert_type(one(x, mask=ja.masks.causal()), jax.Array)
    assert_type(one(x, cache=cache), tuple[jax.Array, ja.KVCache])
    assert_type(one(x, stats={"top": ja.stats.max()}), jax.Array)
    assert_type(other(x, mask=ja.masks.causal()), jax.Array)
    assert_type(other(x, cache=cache), tuple[jax.Array, ja.KVCache])


def of_blocks(
    x: jax.Array, cache: ja.KVCache, one: linen.TransformerBlock, other: nnx.TransformerBlock
) -> None:
    assert_type(one(x, memory=x), jax.Array)
    assert_type(one(x, cache=cache), tuple[jax.Array, ja.KVCache])
    assert_type(other(x, memory=x), jax.Array)
    assert_type(other(x, cache=cache), tuple[jax.Array, ja.KVCache])

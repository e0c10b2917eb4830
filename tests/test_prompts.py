"""Prompts of different lengths in one batch: padded on either side, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import nnx

import jaxattn as ja
from jaxattn import masks

# Three prompts in six columns, and what is generated after them, given here.
B, T, MORE, F, N, H = 3, 6, 3, 16, 4, 4
LENGTHS = np.asarray([6, 2, 4])

CACHES: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: ja.KVCache.create(B, T + MORE, N, H),
    "paged": lambda: ja.PagedKVCache.create(B, 9, 3, N, H),
    "ring": lambda: ja.KVCache.rolling(B, 3, N, H, chunk=T),
}


@lru_cache
def layer() -> Any:
    """A layer that sees positions: causal, with rotary embeddings."""
    return ja.nn.nnx.MultiHeadAttention(
        N, F, mask=masks.causal(), rope=ja.nn.RoPE(), rngs=nnx.Rngs(0)
    )


@lru_cache
def tokens() -> tuple[Any, Any]:
    """Prompts with what must not be felt after the real tokens, and the tokens that follow."""
    x = jnp.asarray(rng(97).normal(size=(B, T + MORE, F)), jnp.float32)
    real = np.arange(T) < LENGTHS[:, None]
    return jnp.where(real[..., None], x[:, :T], 1e3), x[:, T:]


@nnx.jit
def stepped(layer: Any, x: Any, cache: Any, counts: Any, mask: Any) -> Any:
    return layer(x, cache=cache, counts=counts, mask=mask)


@lru_cache
def alone(window: int | None) -> np.ndarray:
    """Outputs of each row without padding, in one pass over its prompt and what follows.

    In a batch with zeros at the ends, which nothing before them sees; the row that has most of them
    is really run alone.
    """
    prompt, more = tokens()
    mask = masks.full() if window is None else masks.sliding_window(window)
    rows = jnp.zeros((B, T + MORE, F))
    for b, n in enumerate(LENGTHS):
        rows = rows.at[b, : n + MORE].set(jnp.concatenate([prompt[b, :n], more[b]]))
    out = layer()(rows, mask=mask)
    b = int(LENGTHS.argmin())
    end = LENGTHS[b] + MORE
    single = layer()(rows[b, None, :end], mask=mask)[0]
    np.testing.assert_allclose(out[b, :end], single, rtol=1e-5, atol=1e-5)
    return np.asarray(out)


@pytest.mark.parametrize("kind", CACHES)
def test_padding_after_the_prompts(kind: str) -> None:
    """`counts` says it all: no mask of the prompts' padding is needed, then or later."""
    prompt, more = tokens()
    want = alone(3 if kind == "ring" else None)
    out, cache = stepped(layer(), prompt, CACHES[kind](), jnp.asarray(LENGTHS), None)
    for b, n in enumerate(LENGTHS):
        np.testing.assert_allclose(out[b, :n], want[b][:n], rtol=1e-5, atol=1e-5)
    for i in range(MORE):
        out, cache = stepped(layer(), more[:, i : i + 1], cache, None, None)
        for b, n in enumerate(LENGTHS):
            np.testing.assert_allclose(out[b, 0], want[b][n + i], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.length, LENGTHS + MORE)


@pytest.mark.parametrize("turned", [True, False], ids=["turned", "a mask"])
def test_padding_before_the_prompts(turned: bool) -> None:
    """Turned to the other side, or hidden by a function of positions that has no end."""
    prompt, more = tokens()
    pads = jnp.asarray(T - LENGTHS)
    left = jax.vmap(partial(jnp.roll, axis=0))(prompt, pads)
    cache, mask, counts = CACHES["contiguous"](), None, None
    if turned:
        left = jax.vmap(partial(jnp.roll, axis=0))(left, -pads)
        counts = jnp.asarray(LENGTHS)
    else:
        mask = masks.predicate(lambda b, h, q, k, pads: k >= pads[b], pads)
    want = alone(None)
    out, cache = stepped(layer(), left, cache, counts, mask)
    for b, n in enumerate(LENGTHS):
        real = out[b, :n] if turned else out[b, T - n :]
        np.testing.assert_allclose(real, want[b][:n], rtol=1e-4, atol=1e-4)
    for i in range(MORE):
        out, cache = stepped(layer(), more[:, i : i + 1], cache, None, mask)
        for b, n in enumerate(LENGTHS):
            np.testing.assert_allclose(out[b, 0], want[b][n + i], rtol=1e-4, atol=1e-4)


def test_an_array_of_padding_has_an_end() -> None:
    """It has no entry for what is generated: one that is as long as the cache has."""
    prompt, more = tokens()
    real = jnp.asarray(np.arange(T) < LENGTHS[:, None])
    whole = jnp.concatenate([real, jnp.ones((B, MORE), bool)], axis=1)
    # The prompts fill their rows, and what follows stands behind the padding.
    want = layer()(jnp.concatenate([prompt, more], 1), mask=masks.key_padding(whole))
    _, cache = stepped(layer(), prompt, CACHES["contiguous"](), None, masks.key_padding(whole))
    out, _ = stepped(layer(), more, cache, None, masks.key_padding(whole))
    np.testing.assert_allclose(out, want[:, T:], rtol=1e-4, atol=1e-4)

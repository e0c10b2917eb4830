"""A decoder-only Transformer in Flax nnx: rotary positions, windows in most layers, caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxattn as ja
from jaxattn.nn.nnx import MultiHeadAttention, TransformerBlock
from jaxattn.shapes import Array, Bool, Float, Int


class Decoder(nnx.Module):
    """Token ids to logits of the next one.

    Every `full_every`-th layer attends to all earlier tokens, the others to `window` of them. The
    call says which tokens belong to one document, so a row may hold many. `attention` makes the
    attention of a layer.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        layers: int,
        heads: int,
        kv_heads: int,
        d_ff: int,
        window: int,
        full_every: int,
        *,
        attention: Callable[..., nnx.Module] = MultiHeadAttention,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(d_model**-0.5)
        self.embedding = nnx.Embed(vocabulary, d_model, embedding_init=init, rngs=rngs)

        def block(i: int) -> TransformerBlock:
            is_full = (i + 1) % full_every == 0
            mask = ja.masks.causal() if is_full else ja.masks.sliding_window(window)
            made = partial(attention, heads, num_kv_heads=kv_heads, mask=mask, rope=ja.nn.RoPE())
            return TransformerBlock(d_model, made, d_ff, rngs=rngs)

        self.blocks = nnx.List([block(i) for i in range(layers)])
        self.norm = nnx.LayerNorm(d_model, rngs=rngs)
        self.windows = tuple(None if (i + 1) % full_every == 0 else window for i in range(layers))
        self.kv_heads, self.head_dim = kv_heads, d_model // heads

    def __call__(
        self, tokens: Int[Array, "B T"], ids: Any = None, places: Any = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token that follows each token in its document.

        Args:
          tokens: rows of documents.
          ids: the document of each token; by default each row is one document.
          places: the position of each token in its document, for the rotary embeddings.
        """
        mask = None if ids is None else ja.masks.segments(ids)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask=mask, rope_positions=places)
        return self.embedding.attend(self.norm(x))

    def caches(self, rows: int, length: int, chunk: int) -> tuple[ja.KVCache, ...]:
        """An empty cache for each layer, for `length` tokens in chunks of at most `chunk`.

        Layers with a window hold only as many tokens as the window.
        """
        size = {"heads": self.kv_heads, "head_dim": self.head_dim}
        return tuple(
            ja.KVCache.create(rows, length, **size)
            if window is None or window + chunk > length
            else ja.KVCache.rolling(rows, window, chunk=chunk, **size)
            for window in self.windows
        )

    def proceed(
        self, tokens: Int[Array, "B T"], caches: tuple[ja.KVCache, ...]
    ) -> tuple[Float[Array, "B T V"], tuple[ja.KVCache, ...]]:
        """Logits of the tokens that follow some more tokens, and the caches with them."""
        x, after = self.embedding(tokens), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache=cache)
            after.append(cache)
        return self.embedding.attend(self.norm(x)), tuple(after)


def sample(
    model: Decoder,
    prompt: Int[Array, "B T"],
    length: int,
    temperature: float,
    key: Array,
) -> Int[Array, "B length"]:
    """Continues the prompt, one token at a time, from `softmax(logits / temperature)`."""
    rows, given = prompt.shape
    logits, caches = model.proceed(prompt, model.caches(rows, given + length, given))

    def draw(key: Array, logits: Float[Array, "B V"]) -> Int[Array, "B"]:
        if temperature == 0:
            return jnp.argmax(logits, -1)
        return jax.random.categorical(key, logits / temperature)

    def step(carry: Any, key: Array) -> Any:
        token, caches = carry
        logits, caches = model.proceed(token[:, None], caches)
        return (draw(key, logits[:, 0]), caches), token

    first, *others = jax.random.split(key, length + 1)
    start = draw(first, logits[:, -1]), caches
    _, tokens = jax.lax.scan(step, start, jnp.stack(others))
    return tokens.T


def loss_of(
    model: Decoder, tokens: Int[Array, "B T"], ids: Int[Array, "B T"], places: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed cross entropy in nats of each token given those before it in its document, and the
    number of tokens. The first token of a document is given, not predicted."""
    logits = model(tokens[:, :-1], ids[:, :-1], places[:, :-1])
    same = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    return cross_entropy(logits, tokens[:, 1:], same), jnp.sum(same)


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """The sum over the counted tokens, in nats."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.sum(picked * counted)

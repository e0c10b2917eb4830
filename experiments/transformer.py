"""The encoder-decoder Transformer of "Attention Is All You Need" (1706.03762), in Flax linen.

Sinusoidal positions and one embedding for both languages and the output, as in the paper. Every
attention is `jaxattn`'s. All masks are made in two functions, `source_mask` and `target_mask`;
cross-attention uses the mask of the source.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from data import PAD

import jaxattn as ja
from jaxattn.nn.linen import MultiHeadAttention, TransformerBlock
from jaxattn.shapes import Array, Float, Int

Params = dict[str, Any]


def lengths(tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
    """The number of tokens of each row that are not padding."""
    return jnp.sum(tokens != PAD, axis=1)


def source_mask(source: Int[Array, "B S"]) -> ja.Mask:
    """No query, of the encoder or of the decoder, sees the source's padding."""
    return ja.masks.key_padding(lengths=lengths(source))


def target_mask(target: Int[Array, "B T"]) -> ja.Mask:
    """A target token sees itself and the tokens before it, and no padding."""
    return ja.masks.causal() & ja.masks.key_padding(lengths=lengths(target))


def sinusoids(positions: Int[Array, "T"], features: int) -> Float[Array, "T features"]:
    """sin and cos of position / 10000 ** (2i / features), in the two halves of the features."""
    rates = 10_000.0 ** (-np.arange(features // 2) / (features // 2))
    angles = positions[:, None] * jnp.asarray(rates, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Transformer(nn.Module):
    """Token ids of both languages to logits of the next target token."""

    vocabulary: int
    d_model: int
    layers: int
    heads: int
    d_ff: int
    dropout: float  # of embeddings, and of what layers add
    attention_dropout: float
    norm: Literal["pre", "post"] = "post"
    dtype: Any = jnp.float32  # of the computation; weights and logits are float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.d_model**-0.5)
        self.embedding = nn.Embed(self.vocabulary, self.d_model, embedding_init=init)
        self.dropper = nn.Dropout(self.dropout)
        layer = partial(
            TransformerBlock,
            partial(
                MultiHeadAttention,
                num_heads=self.heads,
                dropout_rate=self.attention_dropout,
                dtype=self.dtype,
            ),
            self.d_ff,
            norm=self.norm,
            activation=nn.relu,
            dropout_rate=self.dropout,
            dtype=self.dtype,
        )
        self.encoder = [layer(name=f"encoder_{i}") for i in range(self.layers)]
        self.decoder = [layer(name=f"decoder_{i}") for i in range(self.layers)]
        if self.norm == "pre":
            # The sum of all layers has not been normalised yet.
            self.encoder_norm = nn.LayerNorm(dtype=self.dtype)
            self.decoder_norm = nn.LayerNorm(dtype=self.dtype)

    def embed(
        self, tokens: Int[Array, "B T"], train: bool = False, first: Int[Array, ""] | int = 0
    ) -> Float[Array, "B T D"]:
        """Embeddings of tokens whose positions count from `first`."""
        x = self.embedding(tokens) * self.d_model**0.5
        x = x + sinusoids(first + jnp.arange(tokens.shape[1]), self.d_model)
        return self.dropper(x, deterministic=not train).astype(self.dtype)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = self.decoder_norm(x) if self.norm == "pre" else x
        return self.embedding.attend(x.astype(jnp.float32))

    def encode(self, source: Int[Array, "B S"], train: bool = False) -> Float[Array, "B S D"]:
        x = self.embed(source, train)
        for layer in self.encoder:
            x = layer(x, mask=source_mask(source), deterministic=not train)
        return self.encoder_norm(x) if self.norm == "pre" else x

    def decode(
        self,
        target: Int[Array, "B T"],
        source: Int[Array, "B S"],
        memory: Float[Array, "B S D"],
        train: bool = False,
        sow_weights: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits of the token that follows each target token."""
        x = self.embed(target, train)
        for layer in self.decoder:
            x = layer(
                x,
                mask=target_mask(target),
                memory=memory,
                memory_mask=source_mask(source),
                deterministic=not train,
                sow_weights=sow_weights,
            )
        return self.logits(x)

    def __call__(
        self, source: Int[Array, "B S"], target: Int[Array, "B T"], train: bool = False
    ) -> Float[Array, "B T V"]:
        return self.decode(target, source, self.encode(source, train), train)

    def begin(
        self, source: Int[Array, "B S"], beams: int, length: int
    ) -> tuple[tuple[ja.KVCache, ...], tuple[ja.KVCache, ...]]:
        """The start of decoding: keys and values of the source in each layer, and empty caches.

        Each source has as many rows as beams, next to each other; a row can hold `length` tokens.
        """
        memory = self.encode(source)
        kept = tuple(layer.remember(memory) for layer in self.decoder)
        kept = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), kept)
        rows, head_dim = len(source) * beams, self.d_model // self.heads
        empty = ja.KVCache.create(rows, length, self.heads, head_dim, dtype=self.dtype)
        return kept, (empty,) * self.layers

    def proceed(
        self,
        token: Int[Array, "B 1"],
        source: Int[Array, "B S"],
        memories: tuple[ja.KVCache, ...],
        caches: tuple[ja.KVCache, ...],
    ) -> tuple[Float[Array, "B V"], tuple[ja.KVCache, ...]]:
        """Logits of the token that follows one more token of each row, and the caches with it."""
        x = self.embed(token, first=caches[0].length[0])
        after = []
        for layer, memory, cache in zip(self.decoder, memories, caches, strict=True):
            x, cache = layer(
                x,
                mask=ja.masks.causal(),
                cache=cache,
                memory=memory,
                memory_mask=source_mask(source),
                deterministic=True,
            )
            after.append(cache)
        return self.logits(x)[:, 0], tuple(after)


# --------------------------------------------------------------------------- what it is trained for


def masked_loss_and_accuracy(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], smoothing: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean label-smoothed cross entropy and mean token accuracy, without padding.

    loss = -sum_v p_v log softmax(logits)_v with p = (1 - smoothing) onehot + smoothing / V.
    """
    # Reductions of the logits alone: no second array of [B, T, V], and half the time.
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    likely = (1 - smoothing) * picked + smoothing * jnp.mean(logits, axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - likely
    real = labels != PAD
    count = jnp.maximum(jnp.sum(real), 1)
    right = picked == jnp.max(logits, axis=-1)
    return jnp.sum(loss * real) / count, jnp.sum(right & real) / count


def inverse_sqrt(d_model: int, warmup: int, factor: float) -> Callable[[Any], Array]:
    """factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5), the paper's schedule."""

    def schedule(count: Any) -> Array:
        step = jnp.asarray(count, jnp.float32) + 1
        return factor * d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup**-1.5)

    return schedule


# --------------------------------------------------------------------------------- looking at it


def attention_maps(
    model: Transformer, params: Params, source: Int[Array, "B S"], target: Int[Array, "B T"]
) -> Float[Array, "B layers N T S"]:
    """The weight of each source token for each target token, in every decoder layer and head."""
    bound = model.bind({"params": params}, mutable=["intermediates"])
    bound.decode(target, source, bound.encode(source), sow_weights=True)
    found = bound.variables["intermediates"]
    layers = [found[f"decoder_{i}"]["cross_attention"] for i in range(model.layers)]
    return jnp.stack([layer["attention_weights"][0] for layer in layers], 1)

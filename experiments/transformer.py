"""The encoder-decoder Transformer of "Attention Is All You Need" (1706.03762), in Flax linen.

Post-norm, sinusoidal positions and one embedding for both languages and the output, as in the
paper. Every attention is `jaxattn`'s, and who may see whom is said once, in `source_mask` and
`target_mask`; the cross mask is the source's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from data import BOS, EOS, PAD

import jaxattn as ja
from jaxattn.nn.linen import MultiHeadAttention, TransformerBlock
from jaxattn.shapes import Array, Bool, Float, Int

Params = dict[str, Any]


def lengths(tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
    """How many tokens of each row are not padding."""
    return jnp.sum(tokens != PAD, axis=1)


def source_mask(source: Int[Array, "B S"]) -> ja.Mask:
    """No query, of the encoder or of the decoder, sees the source's padding."""
    return ja.masks.key_padding(lengths=lengths(source))


def target_mask(target: Int[Array, "B T"]) -> ja.Mask:
    """A target token sees itself and what stands before it, and no padding."""
    return ja.masks.causal() & ja.masks.key_padding(lengths=lengths(target))


def sinusoids(length: int, features: int) -> Float[np.ndarray, "length features"]:
    """sin and cos of position / 10000 ** (2i / features), in the two halves of the features."""
    rates = 10_000.0 ** (-np.arange(features // 2) / (features // 2))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Transformer(nn.Module):
    """Token ids of both languages to logits of the next target token."""

    vocabulary: int
    d_model: int
    layers: int
    heads: int
    d_ff: int
    dropout: float

    def setup(self) -> None:
        init = nn.initializers.normal(self.d_model**-0.5)
        self.embedding = nn.Embed(self.vocabulary, self.d_model, embedding_init=init)
        self.dropper = nn.Dropout(self.dropout)
        attention = partial(MultiHeadAttention, num_heads=self.heads, dropout_rate=self.dropout)
        layer = partial(
            TransformerBlock,
            attention,
            self.d_ff,
            norm="post",
            activation=nn.relu,
            dropout_rate=self.dropout,
        )
        self.encoder = [layer(name=f"encoder_{i}") for i in range(self.layers)]
        self.decoder = [layer(name=f"decoder_{i}") for i in range(self.layers)]

    def embed(self, tokens: Int[Array, "B T"], train: bool) -> Float[Array, "B T D"]:
        x = self.embedding(tokens) * self.d_model**0.5
        x = x + sinusoids(tokens.shape[1], self.d_model)
        return self.dropper(x, deterministic=not train)

    def encode(self, source: Int[Array, "B S"], train: bool = False) -> Float[Array, "B S D"]:
        x = self.embed(source, train)
        for layer in self.encoder:
            x = layer(x, mask=source_mask(source), deterministic=not train)
        return x

    def decode(
        self,
        target: Int[Array, "B T"],
        source: Int[Array, "B S"],
        memory: Float[Array, "B S D"],
        train: bool = False,
        only: Int[Array, ""] | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits of what follows each target token, or the one at index `only` (then T = 1)."""
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
        if only is not None:
            x = jax.lax.dynamic_slice_in_dim(x, only, 1, axis=1)
        return self.embedding.attend(x)

    def __call__(
        self, source: Int[Array, "B S"], target: Int[Array, "B T"], train: bool = False
    ) -> Float[Array, "B T V"]:
        return self.decode(target, source, self.encode(source, train), train)


# --------------------------------------------------------------------------- what it is trained for


def masked_loss_and_accuracy(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], smoothing: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean label-smoothed cross entropy and mean token accuracy over what is not padding.

    loss = -sum_v p_v log softmax(logits)_v with p = (1 - smoothing) onehot + smoothing / V.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing) * picked - smoothing * jnp.mean(log_probabilities, axis=-1)
    real = labels != PAD
    count = jnp.maximum(jnp.sum(real), 1)
    right = jnp.argmax(logits, axis=-1) == labels
    return jnp.sum(loss * real) / count, jnp.sum(right & real) / count


def inverse_sqrt(d_model: int, warmup: int, factor: float) -> Callable[[Any], Array]:
    """factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5), the paper's schedule."""

    def schedule(count: Any) -> Array:
        step = jnp.asarray(count, jnp.float32) + 1
        return factor * d_model**-0.5 * jnp.minimum(step**-0.5, step * warmup**-1.5)

    return schedule


# -------------------------------------------------------------------------------------- using it


def greedy(
    model: Transformer, params: Params, source: Int[Array, "B S"], length: int
) -> Int[Array, "B length"]:
    """The likeliest next token, again and again, until every row has ended or is full.

    Args:
      source: padded token ids; a row of padding only is not translated.
      length: how many target tokens there may be, the end among them.

    Returns:
      Target tokens without the start; after its end a row holds padding.
    """
    memory = model.apply({"params": params}, source, method="encode")

    def proceed(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        _, ended, i = carry
        return (i < length) & ~jnp.all(ended)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        target, ended, i = carry
        inputs = target[:, :-1], source, memory
        logits = model.apply({"params": params}, *inputs, only=i, method="decode")
        token = jnp.where(ended, PAD, jnp.argmax(logits[:, 0], axis=-1)).astype(target.dtype)
        return target.at[:, i + 1].set(token), ended | (token == EOS), i + 1

    start = jnp.full((source.shape[0], length + 1), PAD, jnp.int32).at[:, 0].set(BOS)
    carry = start, lengths(source) == 0, jnp.array(0)
    target, _, _ = jax.lax.while_loop(proceed, step, carry)
    return target[:, 1:]


def attention_maps(
    model: Transformer, params: Params, source: Int[Array, "B S"], target: Int[Array, "B T"]
) -> Float[Array, "B N T S"]:
    """How much each target token looks at each source token, in the last decoder layer's heads."""
    bound = model.bind({"params": params}, mutable=["intermediates"])
    bound.decode(target, source, bound.encode(source), sow_weights=True)
    last = bound.variables["intermediates"][f"decoder_{model.layers - 1}"]
    return last["cross_attention"]["attention_weights"][0]

"""Search for the best translation: greedy, or with beams, from caches of keys and values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from data import BOS, EOS, PAD
from transformer import Params, Transformer, lengths

from jaxattn.shapes import Array, Bool, Float, Int


def search(
    model: Transformer,
    params: Params,
    source: Int[Array, "B S"],
    length: int,
    beams: int = 1,
    penalty: float = 0.6,
) -> Int[Array, "B length"]:
    """The best translation that beam search finds, by `log p / ((5 + n) / 6) ** penalty`.

    One beam is greedy search: it takes the likeliest next token at each step. Every step computes
    one token of each beam. Earlier tokens are in the caches, which follow the beams that survive.

    Args:
      source: padded token ids; a row of padding only is not translated.
      length: the largest number of target tokens, with the end.
      beams: the number of prefixes of each row that are kept.
      penalty: of length, as in Wu et al. 2016, arXiv 1609.08144; n counts the tokens.

    Returns:
      Target tokens without the start; after the end a row holds padding.
    """
    B = len(source)
    bound = model.bind({"params": params})
    memories, caches = bound.begin(source, beams, length)
    repeated = jnp.repeat(source, beams, axis=0)

    def rank(score: Float[Array, "..."], count: Int[Array, "..."]) -> Float[Array, "..."]:
        return score / ((5 + count) / 6) ** penalty

    def unfinished(carry: Any) -> Bool[Array, ""]:
        _, _, ended, _, i, _ = carry
        return (i < length) & ~jnp.all(ended)

    def step(carry: Any) -> Any:
        target, score, ended, count, i, caches = carry
        last = jax.lax.dynamic_slice_in_dim(target, i, 1, axis=2).reshape(B * beams, 1)
        logits, caches = bound.proceed(last, repeated, memories, caches)
        gain = jax.nn.log_softmax(logits).reshape(B, beams, -1)
        # A beam that has ended continues with padding, at no cost.
        nothing = jnp.where(jnp.arange(gain.shape[-1]) == PAD, 0.0, -jnp.inf)
        gain = jnp.where(ended[..., None], nothing, gain)
        total, counts = score[..., None] + gain, count + ~ended
        ranked = rank(total, counts[..., None]).reshape(B, -1)
        _, best = jax.lax.top_k(ranked, beams)
        beam, token = best // gain.shape[-1], best % gain.shape[-1]

        def follow(x: Array) -> Array:
            return jnp.take_along_axis(x, beam.reshape(B, beams, *(1,) * (x.ndim - 2)), axis=1)

        score = jnp.take_along_axis(total.reshape(B, -1), best, axis=1)
        target = follow(target).at[:, :, i + 1].set(token)
        ended = follow(ended) | (token == EOS)
        rows = (jnp.arange(B)[:, None] * beams + beam).reshape(-1)
        caches = caches if beams == 1 else tuple(cache.reorder(rows) for cache in caches)
        return target, score, ended, follow(counts), i + 1, caches

    target = jnp.full((B, beams, length + 1), PAD, jnp.int32).at[:, :, 0].set(BOS)
    # In the first step all beams are equal, so all are taken from the first.
    score = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) + jnp.zeros((B, 1))
    ended = jnp.broadcast_to((lengths(source) == 0)[:, None], (B, beams))
    carry = target, score, ended, jnp.zeros((B, beams), jnp.int32), jnp.array(0), caches
    target, score, _, count, _, _ = jax.lax.while_loop(unfinished, step, carry)
    best = jnp.argmax(rank(score, count), axis=1)
    return jnp.take_along_axis(target, best[:, None, None], axis=1)[:, 0, 1:]


def recomputed(
    model: Transformer, params: Params, source: Int[Array, "B S"], length: int
) -> Int[Array, "B length"]:
    """The result of `search` with one beam, without caches: each token computes the prefix anew.

    The gain from caches is measured against it.
    """
    bound = model.bind({"params": params})
    memory = bound.encode(source)

    def step(i: Array, target: Int[Array, "B length"]) -> Int[Array, "B length"]:
        logits = bound.decode(target[:, :-1], source, memory)
        token = jnp.argmax(jnp.take(logits, i, axis=1), axis=-1)
        before = jnp.take(target, i, axis=1)
        over = (before == EOS) | (before == PAD)
        return target.at[:, i + 1].set(jnp.where(over, PAD, token))

    target = jnp.full((len(source), length + 1), PAD, jnp.int32)
    target = target.at[:, 0].set(jnp.where(lengths(source) == 0, PAD, BOS))
    return jax.lax.fori_loop(0, length, step, target)[:, 1:]

"""Every known way that masking goes wrong: the naive code that does, and what happens here.

The names of these tests are the rows of the table in docs/pitfalls.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.dispatch import BACKENDS

T, N, H = 6, 2, 4
Q, K, V = jax.random.normal(jax.random.key(0), (3, 1, T, N, H))
LOGITS = jnp.einsum("btnh,bsnh->bnts", Q, K) * H**-0.5
LENGTH = 4
VALID = jnp.arange(T) < LENGTH


def close(a: Any, b: Any, atol: float = 1e-6) -> bool:
    return bool(np.allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol))


def weighted(logits: Any) -> Any:
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), V)


PADDED = ja.attention(Q, K, V, mask=masks.key_padding(VALID))


def test_inverted_convention() -> None:
    ignored = jnp.broadcast_to(~VALID, (T, T))  # 1 where a key is ignored, as in the tutorial
    assert not close(ja.attention(Q, K, V, mask=ignored), PADDED)
    assert close(ja.attention(Q, K, V, mask=masks.from_array(ignored, "ignore")), PADDED)


@pytest.mark.usefixtures("own_errors")
def test_additive_array_passed_as_mask() -> None:
    additive = jnp.where(VALID, 0.0, -1e9)[None, None, None]
    with pytest.raises(TypeError, match="from_array"):
        ja.attention(Q, K, V, mask=additive)
    assert close(ja.attention(Q, K, V, mask=masks.from_array(additive, "additive")), PADDED)


def test_zeros_and_ones_taken_as_additive() -> None:
    keep = jnp.where(VALID, 1.0, 0.0)[None, None, None]
    assert not close(weighted(LOGITS + keep), PADDED)
    with pytest.raises(ValueError, match="only 0 and 1"):
        masks.from_array(keep, "additive")


def test_minus_1e9_in_float16() -> None:
    # The constant is -inf there; the tutorial's product with a mask of 0 and 1 is then NaN at
    # cells that are allowed.
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.float16(-1e9) * np.asarray([0, 1], np.float16)
    assert np.isnan(product[0])
    half = [x.astype(jnp.float16) for x in (Q, K, V)]
    out = ja.attention(*half, mask=masks.key_padding(VALID))
    assert close(out, PADDED, 1e-2)


def test_lowest_number_added_in_float16() -> None:
    lowest = np.finfo(np.float16).min
    with np.errstate(over="ignore"):
        assert np.isneginf(lowest + np.float16(-100))  # a row of these is NaN after softmax
    half = [x.astype(jnp.float16) * 20 for x in (Q, K, V)]
    assert jnp.isfinite(ja.attention(*half, mask=masks.key_padding(lengths=1))).all()


def test_two_additive_masks_summed() -> None:
    lowest = np.finfo(np.float32).min
    with np.errstate(over="ignore"):
        assert np.isneginf(lowest + lowest)
    both = masks.key_padding(VALID) & masks.causal()
    dense = both.dense(T, T)[0, 0]
    assert (dense == (VALID[None] & (jnp.arange(T)[:, None] >= jnp.arange(T)[None]))).all()


def test_too_small_a_constant() -> None:
    loud = LOGITS.at[..., LENGTH:].set(2e4)
    leaked = jax.nn.softmax(loud + jnp.where(VALID, 0.0, -1e4)[None, None, None])
    assert leaked[..., LENGTH:].sum(-1).min() > 0.99
    big = K.at[:, LENGTH:].multiply(1e6)
    assert (ja.attention_weights(Q, big, mask=masks.key_padding(VALID))[..., LENGTH:] == 0).all()


def test_multiplying_by_a_mask() -> None:
    zeroed = jax.nn.softmax(LOGITS * VALID.astype(jnp.float32)[None, None, None])
    assert (zeroed[..., LENGTH:] > 0).all()  # a logit of 0 is as good as any
    assert (ja.attention_weights(Q, K, mask=masks.key_padding(VALID))[..., LENGTH:] == 0).all()


def test_a_row_that_sees_nothing() -> None:
    assert jnp.isnan(jax.nn.softmax(jnp.full(4, -jnp.inf))).all()
    # float32 has an ulp of 64 at 1e9: all logits round to the same number, and what was masked
    # gets equal weights; or, where logits are larger, all of it goes to one.
    assert close(jax.nn.softmax(LOGITS[0, 0, 0] - 1e9), jnp.full(T, 1 / T))
    assert jax.nn.softmax(jnp.array([0.0, 0, 500, 0]) - 1e9).max() == 1
    out, lse = ja.attention(Q, K, V, mask=masks.empty(), return_lse=True)
    assert (out == 0).all()
    assert jnp.isneginf(lse).all()


def test_left_padding_with_causal() -> None:
    mask = masks.causal() & ~masks.key_padding(lengths=2)  # two pads before the first token
    seen = mask.dense(T, T)[0, 0]
    assert not seen[:2].any()  # the pads' own rows see nothing: NaN, or an average, elsewhere
    out = ja.attention(Q, K, V, mask=mask)
    assert (out[:, :2] == 0).all()
    # The tokens come out as without the pads.
    assert close(out[:, 2:], ja.attention(Q[:, 2:], K[:, 2:], V[:, 2:], mask=masks.causal()))


def test_nan_gradients_though_the_loss_excludes_the_row() -> None:
    rows = jnp.arange(T) >= 2

    def naive(q: Any) -> Any:
        logits = jnp.einsum("btnh,bsnh->bnts", q, K)
        out = weighted(logits + jnp.where(rows, 0, -jnp.inf)[None, None, :, None])
        return jnp.where(rows[None, :, None, None], out, 0).sum()

    def ours(q: Any) -> Any:
        out = ja.attention(q, K, V, mask=~masks.query_padding(lengths=2))
        return jnp.where(rows[None, :, None, None], out, 0).sum()

    assert jnp.isnan(jax.grad(naive)(Q)).any()
    gradient = jax.grad(ours)(Q)
    assert jnp.isfinite(gradient).all()
    assert (gradient[:, :2] == 0).all()


def test_gradients_of_softmax_where() -> None:
    seen = jnp.array([True, False, True, False])
    x = jnp.array([0.0, 1e30, 1.0, 3.0])  # a large logit where nobody looks

    def naive(x: Any) -> Any:
        # `where=` in the sums and a `where` on the result, and the exp of a masked cell is inf.
        e = jnp.exp(x - jnp.max(x, where=seen, initial=-jnp.inf))
        return jnp.where(seen, e / e.sum(where=seen), 0) @ jnp.arange(4.0)

    assert jnp.isfinite(naive(x))
    assert jnp.isnan(jax.grad(naive)(x)).any()  # jax.nn.softmax(where=) knows better

    def ours(x: Any) -> Any:
        q, k = jnp.ones((1, 1, 1)), x[:, None, None]
        weights = ja.attention_weights(q, k, mask=masks.key_padding(seen), scale=1.0)
        return weights[0, 0] @ jnp.arange(4.0)

    assert jnp.isfinite(jax.grad(ours)(x)).all()
    assert (jax.grad(ours)(x)[~seen] == 0).all()


def test_nan_in_masked_keys_and_values() -> None:
    dirty_k, dirty_v = (x.at[:, LENGTH:].set(jnp.nan) for x in (K, V))
    weights = jnp.where(VALID[None, None, None], 0.25, 0.0)
    assert jnp.isnan(jnp.einsum("bnts,bsnh->bnth", weights, dirty_v)).all()  # 0 * NaN is NaN
    mask = masks.key_padding(VALID)

    def gradient(k: Any, v: Any) -> Any:
        return jax.grad(lambda q: ja.attention(q, k, v, mask=mask).sum())(Q)

    assert (ja.attention(Q, dirty_k, dirty_v, mask=mask) == PADDED).all()
    assert (gradient(dirty_k, dirty_v) == gradient(K, V)).all()


@pytest.mark.usefixtures("own_errors")
def test_padding_that_broadcasts_by_luck() -> None:
    B = 4
    q = jnp.ones((B, T, B, H))  # as many heads as batch rows
    padding = jnp.ones((B, T), bool)  # [B, S] against [B, N, T, S]: the batch would meet T
    for wrong in (padding, padding[:, None]):
        with pytest.raises(ValueError, match="key_padding"):
            ja.attention(q, q, q, mask=wrong)
    assert ja.attention(q, q, q, mask=masks.key_padding(padding)).shape == q.shape


def test_padding_on_the_wrong_axis() -> None:
    # [B, 1, S, 1] hides queries, not keys: the outputs of real tokens are those without a mask.
    wrong = ja.attention(Q, K, V, mask=VALID[None, None, :, None])
    assert close(wrong[:, :LENGTH], ja.attention(Q, K, V)[:, :LENGTH])
    assert not close(wrong[:, :LENGTH], PADDED[:, :LENGTH])
    # Names say which: key_padding and query_padding.
    named = ja.attention(Q, K, V, mask=masks.query_padding(VALID))
    assert (named == wrong).all()


def test_causal_with_unequal_lengths() -> None:
    last = Q[:, -2:]
    whole = ja.attention(Q, K, V, mask=masks.causal())[:, -2:]
    assert not close(ja.attention(last, K, V, mask=masks.causal()), whole)  # top-left
    assert close(ja.attention(last, K, V, mask=masks.causal(T - 2)), whole)
    at = ja.Positions(q=jnp.arange(2) + T - 2)
    assert close(ja.attention(last, K, V, mask=masks.causal(), positions=at), whole)


def test_softmax_in_low_precision() -> None:
    long = 4096
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, long, 1, 8), jnp.bfloat16)
    weights = jnp.full(long, 1.0, jnp.bfloat16)
    total = jax.lax.fori_loop(0, long, lambda i, s: s + weights[i], jnp.bfloat16(0))
    assert total == 256  # 256 + 1 is 256 in bfloat16
    assert close(ja.attention(q, v, v), jnp.ones((1, 1, 1, 8)))


def test_padded_queries_leak_through_pooling() -> None:
    mask = masks.key_padding(VALID) & masks.query_padding(VALID)
    dirty = Q.at[:, LENGTH:].add(1)
    naive = [ja.attention(q, K, V, mask=masks.key_padding(VALID)).mean(1) for q in (Q, dirty)]
    ours = [ja.attention(q, K, V, mask=mask).sum(1) / LENGTH for q in (Q, dirty)]
    assert not close(*naive)
    assert (ours[0] == ours[1]).all()


def test_a_loss_mask_is_not_an_attention_mask() -> None:
    def loss(v: Any, mask: Any) -> Any:
        out = ja.attention(Q, K, v, mask=mask)
        return jnp.where(VALID[None, :, None, None], out, 0).sum()  # the loss leaves out the pads

    felt = [jax.grad(loss)(V, mask)[:, LENGTH:] for mask in (None, masks.key_padding(VALID))]
    assert (felt[0] != 0).any()  # and the model sees them all the same
    assert (felt[1] == 0).all()


def test_dropout_and_weights() -> None:
    many = jnp.zeros((1, 64, 4, 8))
    ones = jnp.ones((1, 64, 4, 8))
    out = ja.attention(many, many, ones, dropout_rate=0.5, dropout_seed=1)
    # Weights drop after softmax: rows no longer sum to 1, and their mean still does.
    assert (out != 1).any()
    assert abs(float(out.mean()) - 1) < 0.02
    with pytest.raises(ValueError, match="dropout_seed"):
        ja.attention(Q, K, V, dropout_rate=0.5)


def test_packed_sequences_contaminate_each_other() -> None:
    ids = jnp.array([0, 0, 0, 1, 1, 1])
    alone = ja.attention(Q[:, 3:], K[:, 3:], V[:, 3:], mask=masks.causal())
    packed = ja.attention(Q, K, V, mask=masks.causal())[:, 3:]
    assert not close(packed, alone)
    assert close(ja.attention(Q, K, V, mask=masks.causal() & masks.segments(ids))[:, 3:], alone)


def test_positions_in_packed_sequences() -> None:
    ids, at = jnp.array([0, 0, 0, 1, 1, 1]), jnp.array([0, 1, 2, 0, 1, 2])
    prefix = masks.prefix_lm(2)
    alone = ja.attention(Q[:, 3:], K[:, 3:], V[:, 3:], mask=prefix)
    wrong = ja.attention(Q, K, V, mask=prefix & masks.segments(ids))[:, 3:]
    assert not close(wrong, alone)  # the second document's prefix is counted from the first's
    # `segments` reads its arrays at positions: with positions that begin anew, ids are compared
    # in a predicate over the whole row, and the prefix counts within the document.
    within = masks.predicate(
        lambda b, h, q, k, ids, at: (ids[q] == ids[k]) & ((at[k] < 2) | (at[q] >= at[k])), ids, at
    )
    assert close(ja.attention(Q, K, V, mask=within)[:, 3:], alone)


def test_python_lengths_baked_into_jit() -> None:
    traces = []

    @jax.jit
    def run(length: Any) -> Any:
        traces.append(length)
        return ja.attention(Q, K, V, mask=masks.key_padding(lengths=length))

    outs = [run(length) for length in (2, 3, 4)]
    assert len(traces) == 1
    assert close(outs[2], PADDED)


@pytest.mark.usefixtures("own_errors")
def test_masks_dropped_by_a_backend() -> None:
    # A backend named explicitly runs with the mask or raises: there is no third way.
    ran = 0
    for backend in BACKENDS:
        try:
            out = ja.attention(Q, K, V, mask=masks.key_padding(VALID), backend=backend)
        except ValueError as error:
            assert "can't compute this call" in str(error)  # noqa: PT017
        else:
            assert close(out, PADDED)
            ran += 1
    assert ran >= 3
    with pytest.raises(ValueError, match="backend: got 'flash'"):
        ja.attention(Q, K, V, mask=masks.causal(), backend="flash")


@pytest.mark.usefixtures("own_errors")
def test_a_mask_in_the_place_of_a_bias() -> None:
    with pytest.raises(ValueError, match="use a mask to remove pairs"):
        scores.bias(jnp.where(VALID, 0.0, -jnp.inf)[None, None, None])


def test_every_row_of_the_table_is_tested() -> None:
    guide = (Path(__file__).parent.parent / "docs/pitfalls.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", guide))
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_every_row_of_the_table_is_tested"}

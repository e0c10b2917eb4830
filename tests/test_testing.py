"""The assertions for users' models: silent on right models, and they name each planted leak."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, testing

B, T, N, H = 2, 12, 2, 4
LENGTHS = np.array([8, 12])
IDS = jnp.arange(T) // 5
X = jax.random.normal(jax.random.key(0), (B, T, N, H))
RIGHT = masks.causal() & masks.segments(IDS) & masks.key_padding(lengths=LENGTHS)


def model(mask: Any, layers: int = 2, post: Any = None) -> Any:
    def fn(x: Any) -> Any:
        for _ in range(layers):
            x = x + ja.attention(x, x, x, mask=mask)
        return x if post is None else post(x)

    return fn


@pytest.mark.parametrize("layers", [1, 2])
def test_right_models_pass(layers: int) -> None:
    testing.assert_respects_mask(model(RIGHT, layers), X, RIGHT, layers)
    blind = RIGHT & masks.query_padding(lengths=LENGTHS)
    testing.assert_respects_mask(model(blind, layers), X, blind, layers)


def test_window_layers_reach_further() -> None:
    window = masks.sliding_window(2)
    testing.assert_respects_mask(model(window, 3), X, window, 3)
    with pytest.raises(
        AssertionError, match="output 3 depends on input 0, which no path of the mask"
    ):
        testing.assert_respects_mask(model(window, 3), X, window, 1)


def time_normalised(x: Any) -> Any:
    return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)


def batch_normalised(x: Any) -> Any:
    return (x - x.mean((0, 1), keepdims=True)) / x.std((0, 1), keepdims=True)


@pytest.mark.parametrize(
    ("planted", "post", "says"),
    [
        (masks.causal(1) & masks.segments(IDS), None, "output 0 depends on input 1"),
        (masks.causal(), None, "output 5 depends on input 0"),
        (RIGHT, time_normalised, "output 1 depends on input 0|output 5 depends on input 0"),
        (~masks.causal(), None, "output 0 depends on input 1"),
    ],
    ids=["off-by-one causal", "no segment mask", "normalised over time", "inverted"],
)
def test_planted_leaks_are_named(planted: Any, post: Any, says: str) -> None:
    right = masks.causal() & masks.segments(IDS)
    with pytest.raises(AssertionError, match=says):
        testing.assert_respects_mask(model(planted, 1, post), X, right)


def test_rows_of_the_batch_are_apart() -> None:
    full = masks.full()
    with pytest.raises(AssertionError, match="batch row 1 of the output depends on batch row 0"):
        testing.assert_respects_mask(model(full, 1, batch_normalised), X, full)


def test_a_leak_of_gradients_alone_is_found() -> None:
    @jax.custom_vjp
    def leaky(x: Any) -> Any:
        return x

    leaky.defvjp(lambda x: (x, None), lambda _, g: (g.sum(1, keepdims=True) + 0 * g,))
    with pytest.raises(AssertionError, match="the gradient of output 0 reaches input 1"):
        testing.assert_respects_mask(lambda x: leaky(x), X, masks.causal())


def test_nan_in_padding_is_tried() -> None:
    keep = jnp.arange(T) < 8

    def additive(x: Any) -> Any:
        logits = jnp.einsum("btnh,bsnh->bnts", x, x) + jnp.where(keep, 0.0, -1e9)[None, None, None]
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), x)

    mask = masks.key_padding(lengths=8)
    testing.assert_respects_mask(additive, X, mask, nonfinite=False)
    with pytest.raises(AssertionError, match="depends on unseen inputs that are nan"):
        testing.assert_respects_mask(additive, X, mask)


def test_tokens_and_a_single_row() -> None:
    table = jax.random.normal(jax.random.key(1), (7, N, H))
    tokens = jax.random.randint(jax.random.key(2), (B, T), 0, 7)
    causal = masks.causal()
    testing.assert_respects_mask(lambda t: model(causal)(table[t]), tokens, causal, 2)
    with pytest.raises(AssertionError, match="output 0 depends on input 1"):
        testing.assert_respects_mask(lambda t: model(None, 1)(table[t]), tokens, causal)
    testing.assert_respects_mask(lambda t: model(causal, 1)(table[t]), tokens[0], causal)


def test_cross_attention_has_one_layer() -> None:
    query = jax.random.normal(jax.random.key(3), (B, 5, N, H))
    padding = masks.key_padding(lengths=LENGTHS)
    testing.assert_respects_mask(lambda x: ja.attention(query, x, x, mask=padding), X, padding)
    with pytest.raises(ValueError, match="layers: got 2 with T=5 and S=12"):
        testing.assert_respects_mask(
            lambda x: ja.attention(query, x, x, mask=padding), X, padding, 2
        )


def padded(x: Any, lengths: Any) -> Any:
    return ja.attention(x, x, x, mask=masks.key_padding(lengths=lengths))


def test_padding_invariance() -> None:
    testing.assert_padding_invariant(padded, X, LENGTHS)

    def pooled(x: Any, lengths: Any) -> Any:
        return padded(x, lengths).mean(1)

    def pooled_right(x: Any, lengths: Any) -> Any:
        real = (jnp.arange(x.shape[1])[None] < lengths[:, None])[:, :, None, None]
        return jnp.where(real, padded(x, lengths), 0).sum(1) / lengths[:, None, None].astype(
            x.dtype
        )

    testing.assert_padding_invariant(pooled_right, X, LENGTHS)
    with pytest.raises(
        AssertionError, match="the output of batch row 0 depends on the contents of padding"
    ):
        testing.assert_padding_invariant(pooled, X, LENGTHS)
    with pytest.raises(
        AssertionError, match="output 0 of batch row 0 depends on the contents of padding"
    ):
        testing.assert_padding_invariant(lambda x, lengths: model(None, 1)(x), X, LENGTHS)
    with pytest.raises(ValueError, match="without padding nothing is tested"):
        testing.assert_padding_invariant(padded, X, np.array([T, T]))


def test_how_much_padding_is_tried() -> None:
    def counts(x: Any, lengths: Any) -> Any:
        return padded(x, lengths) * float(x.shape[1])

    with pytest.raises(AssertionError, match="depends on the length of padding"):
        testing.assert_padding_invariant(counts, X, LENGTHS)


def test_packing_invariance() -> None:
    documents = [np.asarray(X[0, :5]), np.asarray(X[1, :4]), np.asarray(X[0, 9:])]

    def packed(x: Any, ids: Any, positions: Any) -> Any:
        turned = x * jnp.cos(positions.astype(x.dtype))[..., None, None]
        return ja.attention(turned, turned, x, mask=masks.causal() & masks.segments(ids))

    def contaminated(x: Any, ids: Any, positions: Any) -> Any:
        return ja.attention(x, x, x, mask=masks.causal())

    def misplaced(x: Any, ids: Any, positions: Any) -> Any:
        return packed(x, ids, jnp.arange(x.shape[1])[None])

    testing.assert_packing_invariant(packed, documents)
    with pytest.raises(
        AssertionError, match="output 0 of document 1 depends on the documents packed"
    ):
        testing.assert_packing_invariant(contaminated, documents)
    with pytest.raises(AssertionError, match="of document 1 depends"):
        testing.assert_packing_invariant(misplaced, documents)
    with pytest.raises(ValueError, match="at least 2"):
        testing.assert_packing_invariant(packed, documents[:1])

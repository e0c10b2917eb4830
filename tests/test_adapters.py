"""`attention_fn` inside Flax's own modules: what Flax does, but for what its docstring lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import linen as nn
from flax import nnx

import jaxattn as ja
from jaxattn import masks, scores

B, T, F, N = 2, 6, 16, 4
KEY = jax.random.key(0)
DIALECTS = ["linen", "nnx"]


def inputs(*lead: int) -> jax.Array:
    lead = lead or (B,)
    return jnp.asarray(rng(53, *lead).normal(size=(*lead, T, F)), jnp.float32)


def layer(dialect: str, fn: Any = None, **options: Any) -> Callable[..., Any]:
    """Flax's attention with an attention function, or its own; the same parameters every time."""
    own = {} if fn is None else {"attention_fn": fn}
    if dialect == "linen":
        module = nn.MultiHeadDotProductAttention(num_heads=N, **own, **options)
        plain = nn.MultiHeadDotProductAttention(num_heads=N, **{**options, "dropout_rate": 0.0})
        return partial(module.apply, plain.init(KEY, inputs()))
    return nnx.MultiHeadAttention(N, F, decode=False, rngs=nnx.Rngs(0, dropout=1), **own, **options)


# As `nn.make_causal_mask` and `nn.make_attention_mask` make them: [B, 1, T, T], 1.0 where seen.
CAUSAL = np.broadcast_to(np.tri(T, dtype=np.float32), (B, 1, T, T))
PADDING = np.broadcast_to(
    (np.arange(T) < np.asarray([[T], [3]]))[:, None, None].astype(np.float32), (B, 1, T, T)
)
DENSE = {
    "none": None,
    "causal": CAUSAL,
    "causal bool": CAUSAL.astype(bool),
    "padding": PADDING,
    "shared": np.tri(T, dtype=bool),
}


@pytest.fixture(autouse=True)
def as_users_run():
    """JAX's own defaults: Flax's modules promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_flax_does(dialect: str, name: str) -> None:
    """Values and gradients, for their float32 masks too."""
    x, mask = inputs(), DENSE[name]
    fn = ja.nn.attention_fn()
    want, got = layer(dialect)(x, mask=mask), layer(dialect, fn)(x, mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    slopes = [
        jax.grad(lambda x, f=f: (layer(dialect, f)(x, mask=mask) ** 2).sum())(x) for f in (None, fn)
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_masks_and_scores(dialect: str) -> None:
    """Of the function, of the call as a `Mask`, and both."""
    x = inputs()
    padding = masks.key_padding(lengths=jnp.asarray([T, 3]))
    want = layer(dialect)(x, mask=CAUSAL * PADDING)
    for fn, mask in (
        (ja.nn.attention_fn(), masks.causal() & padding),
        (ja.nn.attention_fn(masks.causal()), padding),
        (ja.nn.attention_fn(masks.causal()), PADDING),
        (ja.nn.attention_fn(masks.causal() & padding, backend="tiled"), None),
    ):
        np.testing.assert_allclose(layer(dialect, fn)(x, mask=mask), want, rtol=1e-5, atol=1e-5)
    alibi = ja.nn.attention_fn(masks.causal(), scores.alibi(scores.alibi_slopes(N)))
    changed = layer(dialect, alibi)(x, mask=padding)
    assert (np.abs(np.asarray(changed) - np.asarray(want)) > 1e-3).any()


def test_what_flax_means_by_bias_and_causal() -> None:
    """Called as Flax's function is, with a bias, `is_causal`, grouped heads, and more batch axes."""
    draw = rng(59)
    q, k, v = (jnp.asarray(draw.normal(size=(2, 3, T, n, 4)), jnp.float32) for n in (N, 2, 2))
    bias = jnp.asarray(draw.normal(size=(1, 3, N, T, T)), jnp.float32)
    got = ja.nn.attention_fn()(q, k, v, bias=bias, mask=jnp.ones((2, 1, 1, 1, T)), is_causal=True)
    full = [x.repeat(N // x.shape[-2], axis=-2) for x in (q, k, v)]
    want = nn.dot_product_attention(*full, bias=bias, mask=jnp.tri(T, dtype=bool))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_their_decoding(dialect: str) -> None:
    """Token by token through Flax's cache, with our window on top, equals one pass."""
    x = inputs()
    window = masks.sliding_window(2)
    want = layer(dialect, ja.nn.attention_fn(window))(x)
    plain = layer(dialect, ja.nn.attention_fn(masks.causal()))(x)
    for fn, expected in (
        (ja.nn.attention_fn(), plain),
        (ja.nn.attention_fn(window, decode=True), want),
        (ja.nn.attention_fn(score=scores.temperature(1.0), decode=True), plain),
    ):
        outs = []
        if dialect == "linen":
            module = nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=fn, decode=True)
            variables = dict(nn.MultiHeadDotProductAttention(num_heads=N).init(KEY, x))
            shapes = jax.eval_shape(lambda: module.init(KEY, x))
            variables["cache"] = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype), shapes["cache"]
            )
            step = jax.jit(lambda v, x: module.apply(v, x, mutable=["cache"]))
            for i in range(T):
                out, state = step(variables, x[:, i : i + 1])
                variables |= state
                outs.append(out)
        else:
            decoder = nnx.MultiHeadAttention(N, F, decode=True, attention_fn=fn, rngs=nnx.Rngs(0))
            decoder.init_cache(x.shape)
            run = nnx.jit(lambda m, x: m(x))
            outs = [run(decoder, x[:, i : i + 1]) for i in range(T)]
        np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dropout_follows_their_flags(dialect: str) -> None:
    x = inputs()
    still = layer(dialect, ja.nn.attention_fn())(x)
    dropped = layer(dialect, ja.nn.attention_fn(), dropout_rate=0.5)
    np.testing.assert_array_equal(dropped(x, deterministic=True), still)
    rngs = (
        {"rngs": {"dropout": jax.random.key(3)}}
        if dialect == "linen"
        else {"rngs": nnx.Rngs(dropout=3)}
    )
    out = dropped(x, deterministic=False, **rngs)
    assert (np.abs(np.asarray(out) - np.asarray(still)) > 1e-3).any()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_broadcast_dropout(backend: str, shared: bool) -> None:
    """The same cells drop in all rows and heads, or their own; a kept weight is doubled."""
    length = 64
    q = jnp.zeros((B, length, N, 8))
    value = jnp.broadcast_to(jnp.eye(length)[None, :, None], (B, length, N, length))
    weights = ja.nn.attention_fn(backend=backend)(
        q, q, value, broadcast_dropout=shared, dropout_rate=0.5, dropout_rng=jax.random.key(2)
    )
    kept = np.asarray(weights) > 0
    np.testing.assert_allclose(np.asarray(weights)[kept], 2 / length, rtol=1e-5)
    assert abs(kept.mean() - 0.5) < 0.02
    same = (kept == kept[:1, :, :1]).mean()
    assert same == 1 if shared else same < 0.7


@pytest.mark.parametrize("dialect", DIALECTS)
def test_weights_are_sown(dialect: str) -> None:
    x, mask = inputs(), PADDING
    found = []
    for fn in (None, ja.nn.attention_fn()):
        module = layer(dialect, fn)
        if dialect == "linen":
            _, state = module(x, mask=mask, sow_weights=True, mutable=["intermediates"])
            (weights,) = state["intermediates"]["attention_weights"]
        else:
            sown = nnx.capture(module, nnx.Intermediate)(x, mask=mask, sow_weights=True)[1]
            (weights,) = sown["attention_weights"].get_value()
        found.append(weights)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_what_differs() -> None:
    """A row that sees nothing is 0, and what nobody sees is not felt."""
    x = inputs()
    nothing = jnp.zeros((B, 1, T, T)).at[:, :, 1:, :2].set(1)
    fn = ja.nn.attention_fn()
    module = layer("linen", fn)
    bias = module(x, mask=jnp.zeros((B, 1, T, T)))
    np.testing.assert_array_equal(module(x, mask=nothing)[:, 0], bias[:, 0])
    q = x.reshape(B, T, N, 4)
    dirty = q.at[:, 2:].set(jnp.nan)
    np.testing.assert_array_equal(fn(q, q, q, mask=nothing), fn(q, dirty, dirty, mask=nothing))


X = jnp.ones((B, T, N, 4))


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ja.nn.attention_fn()(X, X, X, qk_attn_weights_einsum=jnp.einsum), r"attention_fn\(qk_attn_weights_einsum\)"),
        (lambda: ja.nn.attention_fn()(X, X, X, mask=jnp.ones((B, T))), r"mask: got shape \[2, 6\], expected one that broadcasts"),
        (lambda: ja.nn.attention_fn()(X, X, X, mask=jnp.full((T, T), -1e9)), "'flax', expected only 0 and 1"),
        (lambda: ja.nn.attention_fn()(X, X, X, input_positions=jnp.arange(T)), r"attention_fn\(input_positions\)"),
        (lambda: ja.nn.attention_fn(masks.causal())(X[:, :1], X, X), r"attention_fn\(decode\): got None with one query for 6 keys"),
        (lambda: ja.nn.attention_fn(masks.causal(), decode=True)(X[:, :1], X, X), r"attention_fn\(decode\): got True without the mask"),
        (lambda: ja.nn.attention_fn(backend="tiled")(X, X, X, module=nn.Module()), r"attention_fn\(backend\): got 'tiled' with sow_weights"),
        (lambda: ja.nn.attention_fn()(X, X, X, dropout_rate=0.5), "dropout_seed: got None"),
        (lambda: ja.nn.attention_fn(jnp.ones((T, T))), "mask: got an array of float32"),
        (lambda: ja.nn.attention_fn()(X, X, X, bias=jnp.ones((3, T, T))), "bias: got shape"),
    ],
    ids=range(10),
)  # fmt: skip
def test_errors(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call()

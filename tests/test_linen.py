"""Flax linen: the module against `flax.linen.MultiHeadDotProductAttention`, and its own features."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import linen as nn

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.nn import linen

B, T, S, F, N = 2, 5, 7, 12, 4


def inputs(length: int, features: int = F, *seed: int) -> jax.Array:
    return jnp.asarray(rng(31, length, *seed).normal(size=(B, length, features)), jnp.float32)


def test_same_parameters_same_output_as_flax() -> None:
    """With a boolean mask and with a Mask, from their parameters and from ours."""
    x = inputs(T)
    ours = linen.MultiHeadAttention(num_heads=N)
    theirs = nn.MultiHeadDotProductAttention(num_heads=N)
    params = theirs.init(jax.random.key(0), x)
    made = ours.init(jax.random.key(0), x)
    assert jax.tree.structure(params) == jax.tree.structure(made)
    jax.tree.map(np.testing.assert_array_equal, params, made)
    lengths = jnp.asarray([4, 2])
    dense = jnp.asarray(
        np.tri(T, dtype=bool)[None, None]
        & (np.arange(T)[None, None, None] < np.asarray(lengths)[:, None, None, None])
    )
    mask = masks.causal() & masks.key_padding(lengths=lengths)
    for given in (None, dense, mask):
        want = theirs.apply(params, x, mask=None if given is None else dense)
        np.testing.assert_allclose(ours.apply(params, x, mask=given), want, rtol=1e-5, atol=1e-5)

    def slopes(module: Any, given: Any) -> Any:
        return jax.jit(jax.grad(lambda p: (module.apply(p, x, mask=given) ** 2).sum()))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        slopes(ours, mask), slopes(theirs, dense),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"qkv_features": 16, "out_features": 6}, {"use_bias": False}, {"dtype": jnp.bfloat16}],
    ids=str,
)
def test_options_of_flax(options: dict[str, Any]) -> None:
    x, y = inputs(T), inputs(S, 9)
    ours = linen.MultiHeadAttention(num_heads=N, **options)
    theirs = nn.MultiHeadDotProductAttention(num_heads=N, **options)
    params = theirs.init(jax.random.key(1), x, y)
    got, want = ours.apply(params, x, y), theirs.apply(params, x, y)
    assert got.dtype == want.dtype
    tolerance = 2e-2 if got.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
    )


def test_cross_attention_and_unbatched() -> None:
    x, y = inputs(T), inputs(S, 9)
    module = linen.MultiHeadAttention(num_heads=N)
    params = module.init(jax.random.key(2), x, y)
    mask = masks.key_padding(lengths=jnp.asarray([7, 3]))
    out = module.apply(params, x, y, mask=mask)
    assert out.shape == (B, T, F)
    changed = module.apply(params, x, y.at[1, 3:].set(99.0), mask=mask)
    np.testing.assert_array_equal(out, changed)
    one = module.apply(params, x[0], y[0])
    np.testing.assert_allclose(one, out[0], rtol=1e-5, atol=1e-5)


def test_grouped_queries() -> None:
    """Shapes of the parameters, and the same as full heads with the key heads repeated."""
    x = inputs(T)
    module = linen.MultiHeadAttention(num_heads=N, num_kv_heads=2)
    params = module.init(jax.random.key(3), x)
    shapes = {k: v["kernel"].shape for k, v in params["params"].items()}
    assert shapes == {"query": (F, N, 3), "key": (F, 2, 3), "value": (F, 2, 3), "out": (N, 3, F)}
    repeated = {
        "params": params["params"]
        | {
            name: jax.tree.map(lambda p: p.repeat(2, axis=-2), params["params"][name])
            for name in ("key", "value")
        }
    }
    full = linen.MultiHeadAttention(num_heads=N).apply(repeated, x, mask=masks.causal())
    got = module.apply(params, x, mask=masks.causal())
    np.testing.assert_allclose(got, full, rtol=1e-5, atol=1e-5)


def test_dropout() -> None:
    x = inputs(T)
    module = linen.MultiHeadAttention(num_heads=N, dropout_rate=0.5)
    params = module.init(jax.random.key(4), x, deterministic=True)

    def run(seed: int | None = None, **options: Any) -> Any:
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return module.apply(params, x, rngs=rngs, **options)

    still = run(deterministic=True)
    plain = linen.MultiHeadAttention(num_heads=N).apply(params, x)
    np.testing.assert_array_equal(still, plain)
    np.testing.assert_array_equal(run(1, deterministic=False), run(1, deterministic=False))
    assert (
        np.asarray(run(1, deterministic=False)) != np.asarray(run(2, deterministic=False))
    ).any()
    assert (np.asarray(run(1, deterministic=False)) != np.asarray(still)).any()
    quiet = linen.MultiHeadAttention(num_heads=N, dropout_rate=0.5, deterministic=True)
    np.testing.assert_array_equal(quiet.apply(params, x), plain)
    with pytest.raises(Exception, match="dropout"):
        run(deterministic=False)
    with pytest.raises(ValueError, match="deterministic"):
        run(1)


def test_masks_and_scores_as_attributes() -> None:
    """Masks without leaves, factories, and both together with the mask of the call."""
    x = inputs(T)
    plain = linen.MultiHeadAttention(num_heads=N)
    params = plain.init(jax.random.key(5), x)
    padding = masks.key_padding(lengths=jnp.asarray([5, 2]))
    slopes = scores.alibi_slopes(N)
    want = plain.apply(params, x, mask=masks.causal() & padding, score=scores.alibi(slopes))
    for mask in (masks.causal(), masks.causal):
        module = linen.MultiHeadAttention(
            num_heads=N, mask=mask, score=lambda: scores.alibi(scores.alibi_slopes(N))
        )
        np.testing.assert_allclose(
            module.apply(params, x, mask=padding), want, rtol=1e-5, atol=1e-6
        )
        assert isinstance(repr(module), str)
    alone = linen.MultiHeadAttention(num_heads=N, mask=masks.causal())
    np.testing.assert_allclose(
        alone.apply(params, x), plain.apply(params, x, mask=masks.causal()), rtol=1e-6, atol=1e-6
    )


def test_a_mask_is_an_argument_under_jit(compilations: Any) -> None:
    x = inputs(T)
    module = linen.MultiHeadAttention(num_heads=N)
    params = module.init(jax.random.key(6), x)
    traced = []

    @jax.jit
    def step(params: Any, mask: Any) -> Any:
        traced.append(1)
        return jax.grad(lambda p: (module.apply(p, x, mask=mask) ** 2).sum())(params)

    def make(n: int) -> Any:
        return masks.causal() & masks.key_padding(lengths=jnp.asarray([n, 1]))

    first = step(params, make(5))
    second = step(params, make(2))
    assert len(traced) == 1
    different = jax.tree.map(lambda a, b: bool((a != b).any()), first, second)
    assert any(jax.tree.leaves(different))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(second))


def test_positions_and_a_stack_of_layers() -> None:
    """One layer scanned over depth, as Flax's own attention can be."""
    x = inputs(T)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, mask: Any) -> Any:
            return x + linen.MultiHeadAttention(num_heads=N)(x, mask=mask), None

    stack = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=nn.broadcast, length=2,
    )()  # fmt: skip
    mask = masks.causal() & masks.key_padding(lengths=jnp.asarray([5, 3]))
    params = stack.init(jax.random.key(7), x, mask)
    out, _ = stack.apply(params, x, mask)
    by_hand = x
    for i in range(2):
        layer = jax.tree.map(lambda p, i=i: p[i], params["params"]["MultiHeadAttention_0"])
        by_hand = by_hand + linen.MultiHeadAttention(num_heads=N).apply(
            {"params": layer}, by_hand, mask=mask
        )
    np.testing.assert_allclose(out, by_hand, rtol=1e-5, atol=1e-5)
    module = linen.MultiHeadAttention(num_heads=N)
    params = module.init(jax.random.key(8), x)
    last = module.apply(
        params, x[:, -1:], x, mask=masks.causal(), positions=ja.Positions(q=jnp.asarray([T - 1]))
    )
    whole = module.apply(params, x, mask=masks.causal())
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("options", "mask", "kind", "says"),
    [
        ({"num_heads": 5}, None, ValueError, r"qkv_features.*got 12, expected a multiple of num_h"),
        ({"num_heads": 4, "num_kv_heads": 3}, None, ValueError, "num_kv_heads.*got 3.*divisor"),
        ({"num_heads": 4}, jnp.zeros((T, T)), TypeError, "mask: got an array of float32"),
        ({"num_heads": 4}, jnp.ones((B, S), bool), ValueError, "mask: got"),
        ({"num_heads": 4, "backend": "flash"}, None, ValueError, "backend: got 'flash'"),
    ],
    ids=["heads", "kv heads", "additive", "shape", "backend"],
)
def test_errors(options: Any, mask: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        linen.MultiHeadAttention(**options).init(jax.random.key(0), inputs(T), mask=mask)

"""Scores: every formula, T5's buckets, parameters that learn, chains, errors."""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SCORES, attend, cells, close, everyday, grid, qkv, rng, t5_bucket

import jaxattn as ja
from jaxattn import masks, scores

B, N, T, S = 2, 4, 6, 9


def on_grid(score: Any, logits: Any) -> Any:
    """A score of every cell, `[B, N, T, S]`."""
    b, h, q, k = (jnp.asarray(x, jnp.int32) for x in np.broadcast_arrays(*grid(B, N, T, S)))
    flat = [x.reshape(-1) for x in (logits, b, h, q, k)]
    return jax.vmap(score)(*flat).reshape(logits.shape)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_its_formula(name: str) -> None:
    case = SCORES[name](B, N, T, S)
    logits = rng(1).normal(size=(B, N, T, S)).astype(np.float32) * 3
    params = [jnp.asarray(p, jnp.float32) for p in case.params]
    got = jax.jit(lambda params, x: on_grid(case.make(*params), x))(params, jnp.asarray(logits))
    assert got.dtype == jnp.float32
    gold = case.value(logits.astype(np.float64), *grid(B, N, T, S), *case.params)
    np.testing.assert_allclose(got, gold, rtol=1e-5, atol=1e-5)


def test_every_constructor_has_a_case() -> None:
    source = inspect.getsource(inspect.getmodule(SCORES["alibi"]))
    public = {n for n in scores.__all__ if inspect.isfunction(getattr(scores, n))}
    assert not {n for n in public - {"alibi_slopes"} if f"scores.{n}" not in source}


@pytest.mark.parametrize("name", SCORES)
def test_gradients_reach_the_parameters(name: str) -> None:
    """Against slopes of the formula in float64, through attention with masked cells."""
    case = SCORES[name](B, N, T, S)
    query, key, value = qkv(B, T, S, N, 2, 8)
    d_out = rng(2).normal(size=(B, T, N, 8)).astype(np.float32)
    seen = cells(lambda b, h, q, k: k <= q + 1, B, N, T, S)
    params = [jnp.asarray(p, jnp.float32) for p in case.params]

    @jax.jit
    def slopes(params: Any, query: Any) -> Any:
        def loss(params: Any, query: Any) -> Any:
            out = ja.attention(query, key, value, mask=masks.causal(1), score=case.make(*params))
            return (out * d_out).sum()

        return jax.grad(loss, (0, 1))(params, query)

    got, got_query = slopes(params, query)
    gold, plain = (
        attend(query, key, value, seen, score=case, d_out=d_out, dtype=dtype).grads
        for dtype in (np.float64, np.float32)
    )
    close(got_query, gold["query"], plain["query"], jnp.float32, "query")
    for i, slope in enumerate(got):
        # Sums over all cells: the error grows with their number, not with the largest value.
        worst = np.abs(gold[f"param{i}"]).max() + 1e-3
        np.testing.assert_allclose(slope, gold[f"param{i}"], rtol=1e-4, atol=1e-5 * worst)


def test_python_floats_are_leaves() -> None:
    for score in (scores.alibi(0.5), scores.soft_cap(30.0), scores.temperature(2.0)):
        assert len(jax.tree.leaves(score)) == 1
    assert jax.tree.structure(scores.soft_cap(30.0)) == jax.tree.structure(scores.soft_cap(2.0))


# --- T5's buckets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "furthest", "both"),
    [(32, 128, True), (32, 128, False), (8, 20, True), (6, 100, False), (4, 3, True)],
)
def test_t5_buckets(buckets: int, furthest: int, both: bool) -> None:
    """The table holds its own indices, so that the added bias says the bucket."""
    table = jnp.arange(buckets, dtype=jnp.float32)[None]
    score = scores.relative_bias(table, max_distance=furthest, bidirectional=both)
    distances = np.arange(-300, 301)
    zero = jnp.zeros((), jnp.int32)
    got = jax.jit(jax.vmap(lambda d: score(jnp.float32(0), zero, zero, zero, d)))(
        jnp.asarray(distances, jnp.int32)
    )
    gold = [t5_bucket(int(d), buckets, furthest, both) for d in distances]
    np.testing.assert_array_equal(got, gold)


def test_t5_buckets_of_the_published_code() -> None:
    """Spot values of T5's `_relative_position_bucket(k - q)`, 32 buckets, 128 at most."""
    encoder = {
        0: 0,
        -1: 1,
        1: 17,
        -7: 7,
        -8: 8,
        8: 24,
        -11: 8,
        -12: 9,
        -127: 15,
        -128: 15,
        5000: 31,
    }
    decoder = {0: 0, 3: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -113: 31, -5000: 31}
    for both, expected in ((True, encoder), (False, decoder)):
        assert {d: t5_bucket(d, 32, 128, both) for d in expected} == expected


def test_alibi_slopes() -> None:
    np.testing.assert_allclose(scores.alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(scores.alibi_slopes(1), [2.0**-8])
    # 12 heads: the 8 of the paper, then every other one of 16.
    gold = [2.0**-i for i in range(1, 9)] + [2.0 ** (-0.5 * i) for i in (1, 3, 5, 7)]
    np.testing.assert_allclose(scores.alibi_slopes(12), gold, rtol=1e-6)


# --- order ----------------------------------------------------------------------------------------


def test_chain_applies_in_the_order_written() -> None:
    zero = jnp.zeros((), jnp.int32)
    double = scores.score(lambda x, b, h, q, k: x * 2)
    add = scores.score(lambda x, b, h, q, k: x + 3)
    assert float(scores.chain(double, add)(jnp.float32(5), zero, zero, zero, zero)) == 13
    assert float(scores.chain(add, double)(jnp.float32(5), zero, zero, zero, zero)) == 16
    nested = scores.chain(add, scores.chain(double, lambda x, b, h, q, k: -x))
    assert float(nested(jnp.float32(5), zero, zero, zero, zero)) == -16
    assert repr(scores.chain(scores.alibi(0.5), scores.soft_cap(2.0))) == (
        "chain(alibi(0.5), soft_cap(2.0))"
    )


def test_scores_are_pytrees() -> None:
    score = scores.chain(scores.alibi(jnp.ones(4)), scores.soft_cap(2.0))
    leaves, structure = jax.tree.flatten(score)
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    zero = jnp.zeros((), jnp.int32)
    got = again(jnp.float32(1), zero, zero, zero, zero + 3)
    assert math.isclose(float(got), 2 * math.tanh(-1), rel_tol=1e-6)


def test_a_score_runs_after_scale() -> None:
    query, key, value = qkv(1, 3, 4, 1, 1, 8)
    capped = ja.attention(query, key, value, score=scores.soft_cap(0.7), scale=3.0)
    cap = SCORES["soft_cap"](1, 1, 3, 4)
    gold = attend(query, key, value, score=cap._replace(params=(np.array(0.7),)), scale=3.0)
    np.testing.assert_allclose(capped, gold.out, rtol=1e-5, atol=1e-6)


def test_a_lambda_is_a_score_and_what_it_captures_learns() -> None:
    query, key, value = qkv(1, 3, 4, 1, 1, 8)

    def loss(gain: Any) -> Any:
        out = ja.attention(query, key, value, score=lambda x, b, h, q, k: x * gain)
        return (out**2).sum()

    gain, step = jnp.float32(0.8), 1e-2
    by_hand = (loss(gain + step) - loss(gain - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(gain), by_hand, rtol=2e-3)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(gain), by_hand, rtol=2e-3)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: scores.soft_cap(0.0), ValueError, r"soft_cap\(cap\): got 0.0.*above 0"),
        (lambda: scores.temperature(-1.0), ValueError, "temperature.*-1.0.*above 0"),
        (lambda: scores.soft_cap(float("nan")), ValueError, "soft_cap.*nan.*above 0"),
        (lambda: scores.alibi(jnp.ones((2, 2))), ValueError, r"alibi\(slopes\).*\[2, 2\].*\[N\]"),
        (lambda: scores.alibi(jnp.ones(2, int)), TypeError, "alibi.*int32.*floats"),
        (lambda: scores.alibi_slopes(0), ValueError, "heads.*got 0.*at least 1"),
        (lambda: scores.bias(jnp.ones(3)), ValueError, r"bias\(array\).*\[3\].*\[T, S\]"),
        (lambda: scores.bias(jnp.full((2, 2), -jnp.inf)), ValueError, "-inf.*from_array"),
        (lambda: scores.bias(jnp.ones((2, 2), bool)), TypeError, "bias.*bool.*floats"),
        (lambda: scores.relative_bias(jnp.ones(4)), ValueError, r"\[4\].*\[N, buckets\]"),
        (lambda: scores.relative_bias(jnp.ones((1, 5))), ValueError, "got 5 buckets.*even"),
        (lambda: scores.relative_bias(jnp.ones((1, 2))), ValueError, "got 2 buckets.*at least 4"),
        (
            lambda: scores.relative_bias(jnp.ones((1, 32)), max_distance=8),
            ValueError,
            "max_distance.*got 8.*more than 8",
        ),
        (scores.chain, ValueError, "no scores.*at least one"),
        (lambda: scores.chain(jnp.ones(3)), TypeError, r"chain\(scores\[0\]\)"),
        (lambda: scores.score(3), TypeError, r"score\(fn\): got int"),
    ],
    ids=lambda x: None,
)
def test_errors(make: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        make()


# --- parameters of 16 bits ------------------------------------------------------------------------

NARROW = {
    "slopes": lambda p: scores.alibi(p[:, 0]),
    "closure": lambda p: lambda logit, b, h, q, k: logit * p[h, k % 2].astype(logit.dtype),
    "argument": lambda p: scores.score(lambda x, b, h, q, k, p: x * p[h, 1].astype(x.dtype), p),
    "chain": lambda p: scores.chain(scores.soft_cap(30.0), scores.alibi(p[:, 1])),
    "table": lambda p: scores.relative_bias(p),
}


@pytest.mark.parametrize(
    ("kind", "backend"), everyday((k, b) for k in NARROW for b in ("dense", "tiled"))
)
def test_gradients_of_parameters_of_16_bits_are_summed_in_float32(backend: str, kind: str) -> None:
    """The gradient in bfloat16 is that of the same numbers in float32, rounded once."""
    draw = np.random.default_rng(5).normal
    query, key, value, cotangent = (
        jnp.asarray(draw(size=(4, 96, 2, 8)), jnp.bfloat16) for _ in range(4)
    )

    def loss(p: Any) -> Any:
        out = ja.attention(query, key, value, score=NARROW[kind](p), backend=backend)
        return (out.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum()

    given = jnp.asarray(draw(size=(2, 8)), jnp.bfloat16)
    narrow = jax.jit(jax.grad(loss))(given)
    exact = jax.jit(jax.grad(loss))(given.astype(jnp.float32))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)

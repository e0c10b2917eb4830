"""NaN and infinities reach those who may see them, and nobody else, on every backend.

Gold is a plain softmax in NumPy for one query at a time, over the keys that it sees and no others.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HERE, everyday, rng
from test_attention import attention, bits, many_tiles

import jaxattn as ja
from jaxattn import masks, scores

__all__ = ["many_tiles"]

B, T, S, N, K, H = 2, 35, 40, 4, 2, 4

MASKS = {
    "causal": lambda b, h, q, k: k <= q,
    "window": lambda b, h, q, k: (k <= q) & (k > q - 3) & (k % 7 != 2),
    "dead rows": lambda b, h, q, k: (q % 5 != 1) & (k <= q + 2),
    "by head": lambda b, h, q, k: (h % 2 == 0) & (q - k < 4) & (k - q < 4) & (b + k != 9),
    "full": lambda b, h, q, k: (q >= 0) & (k >= 0),
}


@pytest.fixture(params=[name for name in HERE if name != "decode"])
def backend(request: Any) -> str:
    return str(request.param)


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, H)}
    draws = enumerate(shapes.items())
    return {name: rng(seed, n).normal(size=s).astype(np.float32) for n, (name, s) in draws}


def poisoned(where: str, seed: int) -> dict[str, np.ndarray]:
    """Inputs with a few numbers that are none."""
    arrays = inputs(seed)
    draw = rng(seed, 7)
    for name in where.split(" & "):
        array = arrays[name]
        for poison in (np.nan, np.inf, -np.inf):
            array[draw.integers(0, B), draw.integers(3, 30), draw.integers(0, K), 1] = poison
    return arrays


def visible(name: str) -> np.ndarray:
    at = np.ogrid[:B, :N, :T, :S]
    return np.broadcast_to(MASKS[name](*at), (B, N, T, S))


def gold(seen: np.ndarray, query: Any, key: Any, value: Any, scale: float = 0.5) -> Any:
    """Output `[B, T, N, H]` and LSE `[B, T, N]`, a row at a time."""
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    with np.errstate(all="ignore"):
        for b, h, t in np.ndindex(B, N, T):
            keys = np.flatnonzero(seen[b, h, t])
            if keys.size:
                k, v = (a[b, keys, h // (N // K)].astype(np.float64) for a in (key, value))
                logits = (k @ query[b, t, h].astype(np.float64)) * scale
                # As the products round them.
                logits = np.where(np.isfinite(logits), logits, logits.astype(np.float32))
                e = np.exp(logits - logits.max())
                out[b, t, h] = (e / e.sum()) @ v
                lse[b, t, h] = logits.max() + np.log(e.sum())
    return out, lse


@pytest.mark.parametrize("name", MASKS)
def test_what_is_visible_is_felt_and_nothing_else(backend: str, name: str) -> None:
    seen, clean = visible(name), inputs(1)
    run = jax.jit(partial(attention, mask=MASKS[name], backend=backend, return_lse=True))
    before = run(**clean)
    for where in ("query", "key", "value", "query & key & value"):
        dirty = poisoned(where, 1)
        got = run(**dirty)
        for mine, expected in zip(got, gold(seen, **dirty), strict=True):
            np.testing.assert_array_equal(np.isnan(mine), np.isnan(expected), err_msg=where)
            np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5, err_msg=where)
        # Who sees none of it keeps every bit.
        bad = {n: ~np.isfinite(a).all(-1) for n, a in dirty.items()}
        feels = bad["query"] | (seen & by_head(bad)[:, :, None]).any(-1).transpose(0, 2, 1)
        assert feels.any()
        for mine, theirs in zip(got, before, strict=True):
            mine, theirs = np.asarray(mine)[~feels], np.asarray(theirs)[~feels]
            np.testing.assert_array_equal(bits(mine), bits(theirs), err_msg=where)


def by_head(bad: dict[str, np.ndarray]) -> np.ndarray:
    """Which keys are bad in key or value, for each query head: `[B, N, S]`."""
    return (bad["key"] | bad["value"]).repeat(N // K, 2).transpose(0, 2, 1)


def slopes(backend: str, mask: Any, arrays: dict[str, Any], cotangent: Any) -> Any:
    def run(arrays: Any, alibi: Any) -> Any:
        score = scores.alibi(alibi)
        return attention(**arrays, mask=mask, backend=backend, return_lse=True, score=score)

    _, back = jax.vjp(run, arrays, jnp.full(N, 0.1, jnp.float32))
    d_lse = jnp.asarray(rng(9).normal(size=(B, T, N)), jnp.float32)
    grads, d_alibi = back((cotangent, d_lse))
    return {**grads, "alibi": d_alibi}


@pytest.mark.parametrize("name", everyday(["causal", "dead rows", "by head"]))
def test_gradients_are_nan_for_what_sick_queries_see(backend: str, name: str) -> None:
    """A query without a finite result or cotangent, or that sees a key that is not finite, makes
    NaN of its own gradient and of those of all keys it sees; the rest is as if it were not there.
    """
    seen = visible(name)
    run = jax.jit(partial(slopes, backend, MASKS[name]))
    without = jax.jit(partial(slopes, "dense"))
    for where in ("key", "value", "query", "cotangent"):
        cotangent = rng(8).normal(size=(B, T, N, H)).astype(np.float32)
        arrays = inputs(2) if where == "cotangent" else poisoned(where, 2)
        if where == "cotangent":
            for b, t, h, poison in ((0, 6, 0, np.nan), (1, 20, 2, np.inf), (0, 11, 1, -np.inf)):
                cotangent[b, t, h, 1] = poison
        got = run(arrays, cotangent)

        bad = {n: ~np.isfinite(a).all(-1) for n, a in arrays.items()}
        sick = seen.any(-1).transpose(0, 2, 1) & (bad["query"] | ~np.isfinite(cotangent).all(-1))
        sick |= (seen & by_head(bad)[:, :, None]).any(-1).transpose(0, 2, 1)  # [B, T, N]
        felt = (seen & sick.transpose(0, 2, 1)[..., None]).any(2)  # [B, N, S]
        felt = felt.reshape(B, K, N // K, S).any(2).transpose(0, 2, 1)
        assert sick.any()
        assert not felt.all()
        # As if the sick queries were not there: each sees nothing, so nothing of it is felt.
        healthy = seen & ~sick.transpose(0, 2, 1)[..., None]
        calm = {n: np.where(np.isfinite(a), a, 0) for n, a in arrays.items()}
        alone = without(healthy, calm, np.where(np.isfinite(cotangent), cotangent, 0))
        for grad, expected in (("query", sick), ("key", felt), ("value", felt)):
            mine, theirs = np.asarray(got[grad]), np.asarray(alone[grad])
            np.testing.assert_array_equal(np.isnan(mine).all(-1), expected, err_msg=where + grad)
            np.testing.assert_array_equal(np.isnan(mine).any(-1), expected, err_msg=where + grad)
            np.testing.assert_allclose(mine[~expected], theirs[~expected], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.isnan(np.asarray(got["alibi"])), sick.any((0, 1)))


def test_scores_of_pairs_that_a_sick_query_may_not_see_are_not_felt(backend: str) -> None:
    """Each pair has a bias of its own: NaN is the gradient of those that the sick query sees."""
    arrays, seen, bias = inputs(5), visible("window"), jnp.zeros((1, N, T, S))
    for n, (t, h) in enumerate(((6, 0), (20, 3))):
        sick = arrays["query"].copy()
        sick[n, t, h, 1] = np.nan

        def loss(bias: Any, query: Any) -> Any:
            given = arrays | {"query": query}
            score = scores.bias(bias)
            return attention(**given, mask=MASKS["window"], score=score, backend=backend).sum()

        felt = np.zeros(bias.shape, bool)
        felt[0, h, t] = seen[n, h, t]
        np.testing.assert_array_equal(np.isnan(jax.grad(loss)(bias, sick)), felt)


def test_weights_of_a_sick_query_are_none_where_it_may_not_see() -> None:
    arrays, seen = inputs(5), visible("window")
    arrays["query"][1, 20, 3, 1] = np.nan
    for sinks in (None, jnp.zeros(N)):
        options = {"mask": MASKS["window"], "sinks": sinks}
        weights = ja.attention_weights(arrays["query"], arrays["key"], **options)
        felt = np.zeros(seen.shape, bool)
        felt[1, 3, 20] = seen[1, 3, 20]
        np.testing.assert_array_equal(np.isnan(weights), felt)
        np.testing.assert_array_equal(np.asarray(weights)[~seen], 0)


def test_dropout_does_not_hide_what_is_not_finite(backend: str) -> None:
    """Also where all weights of a sick query are dropped, as those of the first ones are here."""
    arrays = inputs(5)
    arrays["key"][0, 0, 0, 0] = np.nan

    def run(arrays: Any) -> Any:
        options = {"dropout_rate": 0.9, "dropout_seed": np.uint32(3), "backend": backend}
        return attention(**arrays, mask=MASKS["causal"], **options)

    out, back = jax.vjp(run, arrays)
    (grads,) = back(jnp.ones_like(out))
    sick, felt = np.zeros((B, T, N), bool), np.zeros((B, S, K), bool)
    sick[0, :, : N // K] = felt[0, :T, 0] = True
    for found, expected in (
        (out, sick),
        (grads["query"], sick),
        (grads["key"], felt),
        (grads["value"], felt),
    ):
        np.testing.assert_array_equal(np.isnan(found).all(-1), expected)
        np.testing.assert_array_equal(np.isnan(found).any(-1), expected)


def test_what_a_key_receives_is_nan_of_the_queries_that_see_it() -> None:
    """A weight of NaN, or with sinks a share of NaN, is given to no other key."""
    arrays, seen = inputs(5), visible("window")
    for backend, sinks, weight in itertools.product(
        ("dense", "tiled"), (None, jnp.zeros(N)), (1, np.nan)
    ):
        sick = arrays["query"].copy()
        sick[1, 20, 3, 1] *= 1 if np.isnan(weight) else np.nan
        of_queries = np.ones((B, T, N), np.float32)
        of_queries[1, 20, 3] = weight
        given = arrays | {"query": sick}
        asked = ja.stats.received(jnp.asarray(of_queries))
        options = {"mask": MASKS["window"], "sinks": sinks, "backend": backend}
        _, found = ja.attention(**given, **options, stats=asked)
        felt = np.zeros((B, S, N), bool)
        felt[1, :, 3] = seen[1, 3, 20]
        np.testing.assert_array_equal(np.isnan(found), felt)


@pytest.mark.parametrize("low", [-1e4, -np.inf])
def test_an_infinite_value_is_infinite_whatever_its_weight(backend: str, low: float) -> None:
    """Also where its weight is 0, and 0 times infinity NaN; without a mask as with a full one."""
    arrays = inputs(5)
    arrays["value"][1, 7, 0, 2], arrays["value"][0, 9, 1, 1] = np.inf, -np.inf
    expected = np.zeros((B, T, N, H))
    expected[1, :, : N // K, 2], expected[0, :, N // K :, 1] = np.inf, -np.inf

    def score(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return jnp.where(k % 2 == 1, jnp.asarray(low, x.dtype), x)

    for mask in (None, masks.full(), MASKS["full"]):
        found = np.asarray(attention(**arrays, mask=mask, score=score, backend=backend))
        np.testing.assert_array_equal(np.where(np.isfinite(found), 0, found), expected)


def test_hidden_values_of_any_size_change_no_bit(backend: str) -> None:
    """Finite numbers whose sum is not finite, and NaN; in gradients too."""
    arrays = {name: jnp.asarray(a) for name, a in inputs(6).items()}

    def both(key: Any, value: Any) -> Any:
        def attend(query: Any, key: Any, value: Any) -> Any:
            mask = masks.predicate(lambda b, h, q, k: (k <= q) & (k < 30))
            return ja.attention(query, key, value, mask=mask, return_lse=True, backend=backend)

        results, pull = jax.vjp(attend, arrays["query"], key, value)
        return results, pull((jnp.ones_like(results[0]), jnp.ones_like(results[1])))

    run = jax.jit(both)
    expected = run(arrays["key"], arrays["value"])
    for huge in (3e38, np.nan):
        found = run(*(arrays[name].at[:, 33:].set(huge) for name in ("key", "value")))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


def test_an_infinite_query_with_finite_logits_leaves_hidden_keys_alone(backend: str) -> None:
    """A cap makes them finite, the output too; products with the query in the backward are not."""
    arrays = {name: jnp.asarray(a) for name, a in inputs(4).items()}
    arrays["query"] = arrays["query"].at[1, 5, 2, 3].set(jnp.inf)

    def attend(query: Any, key: Any, value: Any) -> Any:
        score = scores.soft_cap(2.0)
        return ja.attention(query, key, value, mask=masks.causal(), score=score, backend=backend)

    out, pull = jax.vjp(attend, *arrays.values())
    assert jnp.isfinite(out).all()
    d_query, *of_keys = pull(jnp.ones_like(out))
    others = jnp.ones((B, T, N), bool).at[1, 5, 2].set(False)
    assert jnp.isfinite(d_query[others]).all()
    for found in of_keys:
        assert jnp.isfinite(found[0]).all()
        assert jnp.isfinite(found[1, 6:]).all()
        assert jnp.isfinite(found[1, :, 0]).all()


def test_logits_that_are_huge_are_visible(backend: str) -> None:
    """A row whose visible logits are all `finfo.min` is their mean, not an empty row."""
    arrays, seen = inputs(3), visible("dead rows")
    lowest = float(np.finfo(np.float32).min)
    # Added, and factors.
    tables = {
        "lowest": (np.full((T, S), lowest), 1),
        "very low": (np.full((T, S), -1e35), 1),
        "both": (np.where(np.arange(S) % 2, lowest, 1e20) * np.ones((T, 1)), 1),
        "minus infinity": (np.where(np.arange(T) == 7, -np.inf, 0)[:, None] * np.ones(S), 1),
        "product": (np.zeros((T, S)), 1e30),
    }

    @jax.jit
    def run(table: Any, factor: Any) -> Any:
        def add(logit: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return logit * factor + table[q, k]

        return attention(
            **arrays, mask=MASKS["dead rows"], score=add, backend=backend, return_lse=True
        )

    empty = ~seen.any(-1).transpose(0, 2, 1)
    plain = np.einsum("btnh,bsnh->bnts", arrays["query"], arrays["key"].repeat(N // K, 2)) / 2
    value = arrays["value"].repeat(N // K, 2)
    for kind, (table, factor) in tables.items():
        out, lse = map(np.asarray, run(jnp.float32(table), jnp.float32(factor)))
        with np.errstate(all="ignore"):
            logits = (plain.astype(np.float64) * factor + table).astype(np.float32)
            logits = np.where(seen, logits.astype(np.float64), -np.inf)
            e = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
            expected = np.einsum("bnts,bsnh->btnh", e / e.sum(-1, keepdims=True), value)
        np.testing.assert_array_equal(lse == -np.inf, empty, err_msg=kind)
        np.testing.assert_array_equal(out[empty], 0, err_msg=kind)
        np.testing.assert_allclose(
            out[~empty], expected[~empty], rtol=1e-3, atol=1e-4, err_msg=kind
        )
        if kind == "minus infinity":
            np.testing.assert_array_equal(np.isnan(lse), (np.arange(T)[:, None] == 7) & ~empty)


def test_a_large_scale_is_a_large_scale(backend: str) -> None:
    """Without a score: products that overflow, and rows of which nothing is left."""
    arrays = {n: np.abs(a) for n, a in inputs(6).items()}
    run = jax.jit(
        lambda scale: attention(
            **arrays, mask=MASKS["causal"], scale=scale, backend=backend, return_lse=True
        )
    )
    first = arrays["value"].repeat(N // K, 2)[:, 0]
    for scale in (1e20, -1e20, 1e37):
        out, lse = map(np.asarray, run(scale))
        np.testing.assert_allclose(out[:, 0], first, rtol=1e-6)
        assert np.isfinite(lse).all()
    out, lse = map(np.asarray, run(-3e38))
    # The first query sees one key, whose logit is -inf or nearly so.
    assert (np.isnan(out[:, 0]).all(-1) | np.isclose(out[:, 0], first).all(-1)).all()
    assert not (lse == -np.inf).any()


def test_hugging_face_rows_of_the_lowest_number(backend: str) -> None:
    """An additive mask of `finfo.min` over a whole row, as a bias, is the mean of the values."""
    arrays = inputs(4)
    with pytest.warns(UserWarning, match="from_array"):
        bias = scores.bias(jnp.full((T, S), jnp.finfo(jnp.float32).min))
    score = scores.chain(lambda logit, *_: logit * 0, bias)
    out = attention(**arrays, score=score, backend=backend)
    mean = arrays["value"].mean(1, keepdims=True).repeat(N // K, 2)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-5)


def test_the_first_example(backend: str) -> None:
    x = rng(5).normal(size=(1, 8, 2, 4)).astype(np.float32)
    x[0, 3] = np.nan
    out, lse = ja.attention(x, x, x, mask=masks.causal(), backend=backend, return_lse=True)
    after = np.arange(8) >= 3
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).all((0, 2, 3)), after)
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).any((0, 2, 3)), after)
    np.testing.assert_array_equal(np.isnan(np.asarray(lse)).all((0, 2)), after)

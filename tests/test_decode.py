"""Blocks of keys: few queries of many keys on CPU give what the formula gives on all at once."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.backends import decode

B, T, S, N, K, H = 2, 2, 100, 4, 2, 8

MASKS = {"none": None, "causal": masks.causal(97), "nothing": masks.empty()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six blocks of 16 keys, and one of 4 that are left."""
    monkeypatch.setattr(decode, "BLOCK", 16 * B * K * H)


def inputs(dtype: Any = jnp.float32) -> list[Any]:
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [jnp.asarray(rng(n).normal(size=shape), dtype) for n, shape in enumerate(shapes)]


def padding(lengths: Any = (37, 64)) -> Any:
    return masks.key_padding(lengths=jnp.asarray(lengths, jnp.int32))


def run(backend: str, mask: Any = None) -> Any:
    return jax.jit(partial(ja.attention, mask=mask, backend=backend, return_lse=True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", [*MASKS, "padding"])
def test_blocks_give_what_the_whole_gives(name: str, dtype: Any) -> None:
    x, mask = inputs(dtype), MASKS.get(name, padding())
    for got, expected in zip(run("decode", mask)(*x), run("dense", mask)(*x), strict=True):
        assert got.dtype == expected.dtype
        got, expected = (np.asarray(a, np.float32) for a in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6)


def test_what_is_unseen_changes_no_bit_and_what_is_seen_is_felt() -> None:
    query, key, value = inputs()
    one, other = run("decode", padding()), run("dense", padding())
    # Beyond the last block that is read, and in it.
    unseen = key.at[0, 99].set(jnp.nan).at[0, 40].set(jnp.nan), value.at[:, 64, 0, 2].set(jnp.inf)
    for got, expected in zip(one(query, *unseen), one(query, key, value), strict=True):
        np.testing.assert_array_equal(got, expected)
    seen = key.at[0, 30].set(jnp.nan), value.at[1, 50, 0, 2].set(jnp.inf)
    found = one(query, *seen)
    assert np.isnan(found[0]).any()
    assert np.isinf(found[0]).any()
    for got, expected in zip(found, other(query, *seen), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [jax.grad, jax.jacfwd])
def test_derivatives_of_both_modes_and_second_order(grad: Any) -> None:
    def loss(backend: str, *x: Any) -> Any:
        return jnp.sin(ja.attention(*x, mask=padding(), backend=backend)).sum()

    def squares(backend: str, *x: Any) -> Any:
        return sum((g**2).sum() for g in jax.grad(partial(loss, backend), (0, 1, 2))(*x))

    for fn in (loss, squares) if grad is jax.grad else (loss,):
        got, expected = (grad(partial(fn, b), (0, 1, 2))(*inputs()) for b in ("decode", "dense"))
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "bias, sinks and dropout": {
        "mask": masks.causal(97),
        "score": scores.bias(jnp.asarray(rng(5).normal(size=(1, N, T, S)), jnp.float32)),
        "sinks": jnp.arange(N, dtype=jnp.float32),
        "dropout_rate": 0.3,
        "dropout_seed": 7,
    },
    "slopes of distances, no mask": {"score": scores.alibi(jnp.linspace(0.1, 0.4, N))},
    "logits of minus infinity": {
        "mask": padding(),
        "score": scores.score(lambda logit, b, h, q, k: jnp.where(k < 40, -jnp.inf, logit)),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_blocks_take_scores_sinks_and_dropout(name: str) -> None:
    def run(backend: str, *x: Any) -> Any:
        return ja.attention(*x, **OPTIONS[name], backend=backend, return_lse=True)

    def both(backend: str) -> Any:
        out, back = jax.vjp(jax.jit(partial(run, backend)), *inputs())
        return (*out, *back((jnp.cos(out[0]), jnp.ones_like(out[1]))))

    for got, expected in zip(both("decode"), both("dense"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_what_is_not_finite_stay_with_what_sees_it() -> None:
    """NaN in a key that row 0 sees, inf in a value that no query of row 1 sees."""
    query, key, value = inputs()
    broken = query, key.at[0, 20].set(jnp.nan), value.at[1, 70].set(jnp.inf)

    def gradients(backend: str, x: Any) -> Any:
        def loss(*x: Any) -> Any:
            return jnp.sin(ja.attention(*x, mask=padding(), backend=backend)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*x)

    found, clean = gradients("decode", broken), gradients("decode", (query, key, value))
    for got, expected in zip(found, clean, strict=True):
        np.testing.assert_array_equal(got[1], expected[1])
    assert np.isnan(found[0][0]).all()
    for got in found[1:]:
        assert np.isnan(got[0, :37]).all()
        np.testing.assert_array_equal(got[0, 37:], 0)


def test_vmapped_lengths() -> None:
    def over(backend: str) -> Any:
        def one(query: Any, key: Any, value: Any, lengths: Any) -> Any:
            return ja.attention(query, key, value, mask=padding(lengths), backend=backend)

        x = [jnp.stack([a, a[::-1]]) for a in inputs()]
        return jax.jit(jax.vmap(one))(*x, jnp.asarray([[37, 64], [5, 100]]))

    np.testing.assert_allclose(over("decode"), over("dense"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cache_is_read_as_it_lies(dtype: Any) -> None:
    query, key, value = inputs(dtype)
    cache = ja.KVCache.create(B, 128, K, H, dtype=dtype).append(key, value)
    at = jnp.arange(S - T, S)
    got = jax.jit(lambda cache, query: cache.attend(query, at, mask=masks.causal()))(cache, query)
    expected = run("dense", masks.causal(S - T))(query, key, value)[0]
    got, expected = (np.asarray(a, np.float32) for a in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=1e-6)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="XLA takes the conversion out of the loop"
)
@pytest.mark.parametrize("vmapped", [False, True])
def test_a_cache_of_16_bits_is_never_copied(vmapped: bool) -> None:
    query, key, value = inputs(jnp.bfloat16)
    cache = ja.KVCache.create(B, S, K, H, dtype=jnp.bfloat16).append(key, value)

    def attend(cache: Any, query: Any) -> Any:
        return cache.attend(query, jnp.arange(S - T, S), mask=masks.causal())

    given: Any = (cache, query)
    if vmapped:
        attend, given = jax.vmap(attend), jax.tree.map(lambda a: jnp.stack([a, a]), given)
    text = jax.jit(attend).lower(*given).compile().as_text()
    whole = math.prod(given[0].key[0].shape)

    def sizes(pattern: str) -> list[int]:
        found = re.findall(pattern, text)
        assert found
        return [math.prod(map(int, shape.split(","))) for shape in found]

    assert max(sizes(r"f32\[([\d,]+)\]")) < whole
    assert all(n < whole for n in sizes(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|fusion)\("))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_auto_takes_it_for_long_rows_of_keys(dtype: Any) -> None:
    for keys, backend in ((4096, "decode"), (16, "rows")):
        query, key = (jax.ShapeDtypeStruct((4, n, 8, 64), dtype) for n in (1, keys))
        assert ja.explain(query, key, key).backend == backend

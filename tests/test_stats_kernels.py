"""Statistics in the kernels for GPUs and TPUs, interpreted here: those of the weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_stats as laws
from cases import rng
from test_stats import B, H, N, S, T

import jaxattn as ja
from jaxattn import masks, scores, stats
from jaxattn.arguments import checked_call
from jaxattn.backends import tpu, triton

pytestmark = pytest.mark.no_cover
ENGINES: dict[str, Any] = {"triton": triton, "tpu": tpu}


@pytest.fixture(params=ENGINES)
def backend(request: Any) -> Any:
    with ENGINES[request.param].interpreted():
        yield request.param


def test_statistics_are_those_of_the_weights(backend: str) -> None:
    laws.test_statistics_are_those_of_the_weights("sinks", backend)


def test_gradients_of_means_are_those_of_the_formula(backend: str) -> None:
    laws.test_gradients_of_means_are_those_of_the_formula("empty rows", backend)


def test_nothing_that_is_hidden_is_felt(backend: str) -> None:
    laws.test_nothing_that_is_hidden_is_felt(backend)


def test_arrays_in_functions_learn_under_vmap(backend: str) -> None:
    """Arrays of every kind, with a score that learns, and dropout, which statistics do not feel."""
    draw = rng(23)
    shapes = {"column": (S,), "row": (B, T), "head": (N,), "grid": (T, S), "diagonal": (64,)}
    learned = {name: jnp.asarray(draw.standard_normal(n), np.float32) for name, n in shapes.items()}
    learned["score"] = jnp.float32(1.5)
    weight = jnp.asarray(draw.standard_normal((5, B, T, N)), np.float32)
    q, k, v = inputs = laws.inputs()

    def functions(a: Any) -> Any:
        return [
            stats.mean(lambda x, b, h, q, k: a["column"][k] * x),
            stats.mean(lambda x, b, h, q, k: a["row"][b, q] + x),
            stats.mean(lambda x, b, h, q, k: jnp.sin(a["head"][h] * x)),
            stats.mean(lambda x, b, h, q, k: a["grid"][q, k]),
            stats.mean(lambda x, b, h, q, k: a["diagonal"][q - k + S]),
        ]

    def loss(name: str, query: Any, learned: Any, seed: Any) -> Any:
        out, seen = ja.attention(
            query, k, v, mask=masks.causal(5), score=scores.soft_cap(learned["score"]),
            stats=functions(learned), dropout_rate=0.3, dropout_seed=seed, backend=name,
        )  # fmt: skip
        return (out * out).sum() + sum((s * w).sum() for s, w in zip(seen, weight, strict=True))

    call = checked_call(*inputs, stats=functions(learned))
    assert {kind for part in call.means for kind in part.kinds} == set(shapes)
    two = (
        jnp.stack([q, -q]),
        jax.tree.map(lambda a: jnp.stack([a, a * 0.7]), learned),
        jnp.arange(2),
    )
    found = [
        jax.jit(jax.vmap(jax.grad(partial(loss, name), (0, 1))))(*two)
        for name in (backend, "dense")
    ]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=5e-5)


def test_sums_are_float32_for_16_bits(backend: str) -> None:
    arrays = laws.inputs(jnp.bfloat16)
    asked = laws.asked()
    out, seen = ja.attention(*arrays, stats=asked, backend=backend)
    _, exact = ja.attention(*(a.astype(np.float32) for a in arrays), stats=asked, backend="dense")
    assert out.dtype == jnp.bfloat16
    for name, array in seen.items():
        assert array.dtype == exact[name].dtype
        # Only what keys receive is a product of weights, which have 16 bits there.
        rtol = 4e-3 if name == "received" else 2e-5
        np.testing.assert_allclose(array, exact[name], rtol=rtol, atol=1e-5, err_msg=name)


def test_kernels_refuse_what_they_cannot_evaluate(backend: str) -> None:
    def reason(stat: stats.Stat) -> str:
        q, k, v = (jax.ShapeDtypeStruct((1, 4, n, H), np.float32) for n in (2, 1, 1))
        return ENGINES[backend].refuse(checked_call(q, k, v, stats=stat)) or ""

    def bent(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return jax.lax.lgamma(x)

    assert not reason(stats.received())
    assert "function of a statistic can't be computed in a kernel" in reason(stats.mean(bent))

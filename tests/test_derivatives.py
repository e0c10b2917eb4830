"""Derivatives in both modes, once and again, on every backend and under every transformation.

The definition is differentiated by JAX alone; `test_attention.py` holds it against float64. Here
every other backend is held against the definition, with tiles and groups of rows that are small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HERE, rng
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import many_tiles

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.backends import formula

__all__ = ["many_tiles"]

B, T, S, N, K, H = 2, 33, 40, 4, 2, 8


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 10 rows, and one of 3 that are left."""
    monkeypatch.setattr(formula, "CELLS", 10 * B * N * S)


@pytest.fixture(params=[name for name in HERE if name not in ("dense", "decode")])
def backend(request: Any) -> str:
    return str(request.param)


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(rng(seed, *shape).normal(size=shape), jnp.float32)


def given() -> dict[str, Any]:
    return {
        "query": normal(1, B, T, N, H),
        "key": normal(2, B, S, K, H),
        "value": normal(3, B, S, K, H),
        "scale": jnp.float32(0.4),
        "sinks": normal(4, N),
        "slopes": jnp.linspace(0.1, 0.4, N, dtype=jnp.float32),
        "table": normal(5, T, S) * 0.3,
    }


LENGTHS = jnp.array([S, 23])
WEIGHT, WEIGHT_LSE = normal(6, B, T, N, H), normal(7, B, T, N)


def loss(backend: str, x: dict[str, Any]) -> Any:
    """Of output and LSE, with all that learns; the last rows of one batch row see nothing."""
    x = dict(x)
    score = scores.chain(scores.alibi(x.pop("slopes")), scores.bias(x.pop("table")))
    mask = masks.causal() & masks.key_padding(lengths=LENGTHS) & (lambda b, h, q, k: q - k < 12)
    out, lse = ja.attention(**x, mask=mask, score=score, backend=backend, return_lse=True)
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    return (out * jnp.sin(out) * WEIGHT).sum() + (jnp.sin(lse) * WEIGHT_LSE).sum()


def norms(backend: str, x: Any) -> Any:
    return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(partial(loss, backend))(x)))


def stacked(x: Any) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a, a * 1.1, a * 0.9]), x)


def of_query(backend: str, x: Any) -> Callable[[Any], Any]:
    return lambda query: loss(backend, x | {"query": query})


def shared_vmap(backend: str, x: Any) -> Any:
    """A batch of queries over the keys and parameters of all."""
    many = jax.vmap(lambda query, rest: loss(backend, rest | {"query": query}), (0, None))
    return many(stacked(x["query"]), {n: a for n, a in x.items() if n != "query"}).sum()


def scanned(backend: str, x: Any) -> Any:
    def body(query: Any, _: Any) -> Any:
        out = ja.attention(
            query, x["key"], x["value"], score=scores.alibi(x["slopes"]), mask=masks.causal(),
            backend=backend,
        )  # fmt: skip
        return query + out, None

    return (jax.lax.scan(jax.checkpoint(body), x["query"], None, length=2)[0] * WEIGHT).sum()


CASES: dict[str, Callable[[str, Any], Any]] = {
    "jvp": lambda b, x: jax.jvp(partial(loss, b), (x,), (x,)),
    "linearize": lambda b, x: jax.linearize(partial(loss, b), x)[1](x),
    "jacfwd": lambda b, x: jax.jacfwd(lambda s: loss(b, x | {"slopes": s}))(x["slopes"]),
    "vmap of jvp": lambda b, x: jax.vmap(
        lambda moved: jax.jvp(of_query(b, x), (x["query"],), (moved,))[1]
    )(stacked(x["query"])),
    "hvp": lambda b, x: jax.jvp(jax.grad(partial(loss, b)), (x,), (x,)),
    "gradient of a gradient norm": lambda b, x: jax.grad(partial(norms, b))(x),
    "gradient of a jvp": lambda b, x: jax.grad(
        lambda x: jax.jvp(partial(loss, b), (x,), (given(),))[1]
    )(x),
    "hessian": lambda b, x: jax.hessian(lambda s: loss(b, x | {"slopes": s}))(x["slopes"]),
    "vmap of hvp": lambda b, x: jax.vmap(
        lambda moved: jax.jvp(jax.grad(of_query(b, x)), (x["query"],), (moved,))[1]
    )(stacked(x["query"])),
    "gradient of vmap": lambda b, x: jax.grad(partial(shared_vmap, b))(x),
    "jvp of vmap": lambda b, x: jax.jvp(partial(shared_vmap, b), (x,), (x,)),
    "scan and checkpoint": lambda b, x: jax.jvp(
        jax.value_and_grad(partial(scanned, b)), (x,), (x,)
    ),
}


# Every day: each mode once, and each way in which two of them meet.
EVERYDAY = (
    "jvp",
    "gradient of a gradient norm",
    "vmap of hvp",
    "jvp of vmap",
    "scan and checkpoint",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in EVERYDAY else pytest.mark.deep) for n in CASES]
)
def test_is_that_of_the_definition(backend: str, name: str) -> None:
    got, expected = (jax.jit(partial(CASES[name], each))(given()) for each in (backend, "dense"))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        size = 1 + np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=3e-5 * size)


def test_memory_of_derivatives_grows_with_the_length() -> None:
    """Forward mode and second order at a length at which logits would fill memory."""

    def temporaries(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

        def f(x: Any) -> Any:
            return (ja.attention(x, x, x, mask=masks.causal()) ** 2).sum()

        def both(x: Any) -> Any:
            return jax.jvp(f, (x,), (x,))[1], jax.jvp(jax.grad(f), (x,), (x,))[1]

        found = jax.jit(both).lower(x).compile().memory_analysis()
        return int(found.temp_size_in_bytes)

    short, long = temporaries(4096), temporaries(16384)
    assert long < 6 * short
    assert long < 16384**2 * 4 / 4


def test_forward_mode_of_shards_stays_where_they_are() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = {n: a for n, a in given().items() if n in ("query", "key", "value")}
    specs = {"query": P("data", None, "model"), "key": P("data"), "value": P("data")}
    placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in x.items()}

    def run(x: Any) -> Any:
        out, moved = jax.jvp(lambda x: ja.attention(**x, backend="tiled"), (x,), (x,))
        return out, moved

    fn = jax.jit(run)
    assert "all-gather" not in fn.lower(placed).compile().as_text()
    for mine, theirs in zip(fn(placed), fn(x), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)

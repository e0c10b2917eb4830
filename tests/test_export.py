"""`jax.export`: programs for sizes that are not known yet, written out and read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import everyday, rng
from jax import export

import jaxattn as ja
from jaxattn import masks, scores

# The types that tests check know no sizes but integers.
pytestmark = pytest.mark.usefixtures("own_errors")

T = 24


def given(B: int, T: int) -> dict[str, Any]:
    draw = rng(1, B, T)
    x = {n: jnp.asarray(draw.normal(size=(B, T, 2, 8)), jnp.float32) for n in ("q", "k", "v")}
    ids = np.sort(draw.integers(0, 3, (B, T)), 1)
    return x | {
        "ids": jnp.asarray(ids, jnp.int32),
        "lengths": jnp.asarray(draw.integers(1, T, B), jnp.int32),
    }


def function(backend: str) -> Callable[..., Any]:
    """Output, LSE and a gradient, with arrays of the batch and of the length in the mask."""

    def loss(q: Any, x: dict[str, Any]) -> Any:
        mask = masks.causal() & masks.segments(x["ids"]) & masks.key_padding(lengths=x["lengths"])
        out, lse = ja.attention(
            q, x["k"], x["v"], mask=mask, score=scores.soft_cap(5.0), backend=backend,
            return_lse=True,
        )  # fmt: skip
        return (out**2).sum(), (out, lse)

    return lambda x: jax.value_and_grad(loss, has_aux=True)(x["q"], x)


def described(B: str, T: str) -> dict[str, jax.ShapeDtypeStruct]:
    scope = export.SymbolicScope()
    shapes = dict.fromkeys("qkv", f"{B}, {T}, 2, 8") | {"ids": f"{B}, {T}", "lengths": B}
    return {
        n: jax.ShapeDtypeStruct(
            export.symbolic_shape(shape, scope=scope),
            jnp.int32 if n in ("ids", "lengths") else jnp.float32,
        )
        for n, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [
        pytest.param("auto", ("b", f"{T}"), marks=pytest.mark.deep),
        ("auto", ("b", "t")),
        ("dense", ("b", "t")),
        ("tiled", ("b", f"{T}")),
        pytest.param("tiled", ("3", f"{T}"), marks=pytest.mark.deep),
    ],
)
def test_round_trip(backend: str, sizes: tuple[str, str]) -> None:
    run = jax.jit(function(backend))
    written = export.export(run)(described(*sizes)).serialize()
    read = export.deserialize(written)
    for B, length in ((3, T), *([(2, 31)] if sizes == ("b", "t") else [])):
        x = given(B, length)
        pairs = zip(jax.tree.leaves(read.call(x)), jax.tree.leaves(run(x)), strict=True)
        for got, expected in pairs:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "platform"),
    everyday(((b, p) for b in ("auto", "dense", "tiled") for p in ("cpu", "cuda", "tpu")), every=2),
)
def test_every_platform(backend: str, platform: str) -> None:
    found = export.export(jax.jit(function(backend)), platforms=[platform])(described("b", f"{T}"))
    assert found.platforms == (platform,)
    assert export.deserialize(found.serialize()).platforms == (platform,)


def test_what_is_chosen_and_refused() -> None:
    x = described("b", "t")
    explained = ja.explain(x["q"], x["k"], x["v"])
    assert explained.backend == "dense"
    assert "lengths are symbolic" in explained.reason
    assert "sizes:   symbolic" in str(explained)
    x = described("b", f"{T}")
    explained = ja.explain(x["q"], x["k"], x["v"])
    assert explained.backend == "tiled"
    assert "the batch is symbolic" in explained.reason
    with pytest.raises(ValueError, match=r"lengths are symbolic.*'dense' takes any"):
        export.export(jax.jit(function("tiled")))(described("2", "t"))

"""Inputs spread over devices: heads over more of them than there are keys, masks that stay put."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import many_tiles

import jaxattn as ja
from jaxattn import masks, scores

__all__ = ["many_tiles"]

B, T, N, K, H = 4, 40, 12, 2, 8


def given() -> dict[str, Any]:
    draw = rng(3)
    normal = partial(draw.normal, size=(B, T, N, H))
    return {
        "query": jnp.asarray(normal(), jnp.float32),
        "key": jnp.asarray(normal()[:, :, :K], jnp.float32),
        "value": jnp.asarray(normal()[:, :, :K], jnp.float32),
        "ids": jnp.asarray(np.sort(draw.integers(0, 3, (B, T)), 1), jnp.int32),
        "slopes": jnp.linspace(0.1, 0.4, N, dtype=jnp.float32),
    }


def gradients(backend: str, x: dict[str, Any], weight: Any) -> Any:
    def loss(x: dict[str, Any]) -> Any:
        mask = masks.segments(x["ids"]) & masks.causal()
        out, lse = ja.attention(
            x["query"], x["key"], x["value"], mask=mask, score=scores.alibi(x["slopes"]),
            backend=backend, return_lse=True,
        )  # fmt: skip
        return (out * weight).sum() + jnp.sin(lse).sum()

    return jax.value_and_grad(loss, allow_int=True)(x)


@pytest.mark.parametrize("backend", ["dense", "rows", "tiled"])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param(AxisType.Auto, (2, 4), id="auto-2x4"),
        # 4 query heads on each device, the second of which need both key heads.
        pytest.param(AxisType.Explicit, (1, 3), id="explicit-1x3"),
        pytest.param(AxisType.Auto, (4, 1), id="auto-4x1", marks=pytest.mark.deep),
    ],
)
def test_heads_over_more_devices_than_keys(backend: str, kind: Any, sizes: Any) -> None:
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(kind, kind), devices=devices)
    specs = {"query": P("data", None, "model"), "ids": P("data"), "slopes": P()}
    whole = given()
    placed = {
        n: jax.device_put(a, NamedSharding(mesh, specs.get(n, P("data")))) for n, a in whole.items()
    }
    weight = jnp.asarray(rng(4).normal(size=(B, T, N, H)), jnp.float32)
    run = jax.jit(partial(gradients, backend))
    spread = jax.device_put(weight, NamedSharding(mesh, specs["query"]))
    if sizes[1] == 1:
        # Masks as well: their arrays are not wanted elsewhere.
        assert " all-gather(" not in run.lower(placed, spread).compile().as_text()
    got, expected = run(placed, spread), jax.jit(partial(gradients, "dense"))(whole, weight)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if theirs.dtype == jnp.float32:
            size = 1 + np.abs(theirs).max()
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5 * size)

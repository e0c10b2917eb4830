"""The tiled backend computes what the dense definition does, under every transformation.

Shapes are small and tiles smaller (16 x 16), so that every list of tiles is used and edges are
ragged. One compiled program costs seconds, so cases are few and each checks much: output, LSE and
every gradient at once.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import everyday, split_parts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import masks, scores
from jaxattn.backends import dense, tiled
from jaxattn.backends.base import Call
from jaxattn.backends.flash import transforms
from jaxattn.backends.tiled import exponential, schedule
from jaxattn.masks.positions import Positions
from jaxattn.tiles.tile_map import tile_map

B, T, S, N, K, H, HV = 2, 72, 88, 4, 2, 8, 6
TILE = (16, 16)


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make(mask: Any = None, score: Any = None, *, dtype: Any = np.float32, **more: Any) -> Call:
    b, t, s, n, k = (
        more.pop(name, size) for name, size in zip("BTSNK", (B, T, S, N, K), strict=True)
    )
    given = {
        "query": normal(0, b, t, n, H, dtype=dtype),
        "key": normal(1, b, s, k, H, dtype=dtype),
        "value": normal(2, b, s, k, HV, dtype=dtype),
        "scale": jnp.float32(0.4) if dtype != np.float64 else jnp.float64(0.4),
        "sinks": None,
        "positions": Positions(),
        "dropout": None,
        "precision": None,
    } | more
    parts = split_parts(mask, score, (b, n, t, s), given["positions"], dtype)
    return Call(**given | parts)


run = partial(tiled.run, tile=TILE)


def everything(run: Any, call: Call) -> Any:
    """Output, LSE, and the gradients in query, key, value, scale and score, as one function."""

    def loss(query: Any, key: Any, value: Any, scale: Any, score: Any) -> Any:
        new = dataclasses.replace(call, query=query, key=key, value=value, scale=scale, score=score)
        out, lse = run(new)
        weight = normal(5, *out.shape, dtype=lse.dtype)
        finite = jnp.where(lse == -jnp.inf, 0, lse)
        total = (out.astype(lse.dtype) * weight).sum()
        return total + (jnp.sin(finite) * normal(6, *lse.shape, dtype=lse.dtype)).sum(), (out, lse)

    grad = jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True, allow_int=True)
    return grad(call.query, call.key, call.value, call.scale, call.score)


tiled_all = jax.jit(partial(everything, run))
dense_all = jax.jit(partial(everything, dense.run))


def close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype == jax.dtypes.float0:
            continue
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()))


IDS = jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 4, (B, S)), 1), jnp.int32)

CASES = {
    "causal, rows that see nothing": make(masks.causal(-19)),
    "window and global, negative scale": make(
        masks.sliding_window(9) | masks.global_tokens(3), scale=jnp.float32(-0.3)
    ),
    "segments of each row": make(masks.segments(IDS[:, :T], IDS) & masks.causal(7)),
    "several rows in a step": make(masks.causal(), B=6, N=1, K=1, T=40, S=40),
}


@pytest.mark.parametrize("name", everyday(CASES))
def test_is_the_definition(name):
    call = CASES[name]
    close(tiled_all(call), dense_all(call))


def test_what_is_seen_is_felt():
    call = make(masks.causal(16))
    out, lse = jax.jit(run)(dataclasses.replace(call, query=call.query.at[0, 30, 1].set(np.nan)))
    assert np.isnan(out[0, 30, 1]).all()
    assert np.isnan(lse[0, 30, 1])
    assert np.isnan(out).sum() == HV


def test_a_tile_map_is_reused():
    mask = masks.causal(16)
    known = tile_map(mask, (B, T, N, H), (B, S, K, H), tile=64)
    plan, inputs = tiled.build(make(known))
    assert plan.tile == (64, 64)
    assert inputs.states is not None
    close(jax.jit(tiled.run)(make(known)), jax.jit(dense.run)(make(mask)))


# --- tiles and e^x --------------------------------------------------------------------------------


def test_exp():
    x = jnp.linspace(-100, 0, 100_001, dtype=jnp.float32)
    exact = np.exp(np.asarray(x, np.float64))
    got = np.asarray(jax.jit(exponential.exp)(x), np.float64)
    assert np.abs(got - exact).max() < 2e-7
    assert np.abs(got / exact - 1)[np.asarray(x) >= -87].max() < 5e-6
    assert (got[np.asarray(x) < -87] == 0).all()
    assert exponential.exp(jnp.float32(0)) == 1
    assert np.isnan(exponential.exp(jnp.array([np.nan, -np.nan], jnp.float32))).all()
    assert (exponential.exp(jnp.array([-np.inf, -3e38], jnp.float32)) == 0).all()


@pytest.mark.parametrize("length", [1, 7, 96, 128, 129, 300, 4096, 131072])
@pytest.mark.parametrize("heads", [1, 8])
def test_tiles_cover_with_little_left_over(length, heads):
    tq, tk = schedule.tile_size(length, length, heads)
    for tile in (tq, tk):
        assert 1 <= tile <= 1024
        assert -(-length // tile) * tile <= length * 1.1 + 8


# --- transformations ------------------------------------------------------------------------------


def vmap_case() -> tuple[Any, Any]:
    call = make(masks.segments(IDS[:, :T], IDS), scores.bias(normal(7, 1, N, T, S)))
    other = jax.tree.map(
        lambda x: x[::-1] if x.ndim and x.shape[0] == B else x + x.dtype.type(1), call
    )
    return call, jax.tree.map(lambda *x: jnp.stack(x), call, other)


# The contract has it every day, of fewer gradients.
@pytest.mark.deep
def test_vmap_is_a_loop():
    _, stacked = vmap_case()
    one, two = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in (0, 1))
    expected = jax.tree.map(lambda *x: jnp.stack(x), dense_all(one), dense_all(two))
    close(jax.jit(jax.vmap(partial(everything, run)))(stacked), expected, 5e-5)


def test_nested_vmap_with_shared_arguments():
    call, stacked = vmap_case()
    query = jnp.stack([stacked.query, 2 * stacked.query, -stacked.query])
    axes = dataclasses.replace(jax.tree.map(lambda _: None, call), value=0)

    def one(run: Any, q: Any, c: Call) -> Any:
        return everything(run, dataclasses.replace(c, query=q))

    def nested(run: Any) -> Any:
        inner = jax.vmap(partial(one, run), (0, axes))
        return jax.vmap(inner, (0, None))(query, dataclasses.replace(call, value=stacked.value))

    close(jax.jit(partial(nested, run))(), jax.jit(partial(nested, dense.run))(), 5e-5)


def test_grad_of_vmap_sums_what_is_shared():
    call, stacked = vmap_case()

    def loss(run: Any, score: Any, query: Any) -> Any:
        def one(q: Any) -> Any:
            return run(dataclasses.replace(call, query=q, score=score))[0]

        return (jax.vmap(one)(query) ** 2).sum()

    got, expected = (
        jax.jit(jax.grad(partial(loss, f)))(call.score, stacked.query) for f in (run, dense.run)
    )
    close(got, expected, 5e-5)


@pytest.mark.deep
def test_scan_and_checkpoint():
    call = make(masks.causal(16), K=N)
    policy = jax.checkpoint_policies.save_only_these_names(*transforms.SAVED)

    def model(run: Any, query: Any, ws: Any) -> Any:
        @partial(jax.checkpoint, policy=policy)
        def layer(x: Any, w: Any) -> Any:
            out, _ = run(dataclasses.replace(call, query=x * w))
            return x + jnp.pad(out, ((0, 0), (0, 0), (0, 0), (0, H - HV))), None

        return (jax.lax.scan(layer, query, ws)[0] ** 2).sum()

    ws = jnp.array([0.5, 1.0, 1.5], jnp.float32)
    got, expected = (
        jax.jit(jax.grad(partial(model, f), argnums=(0, 1)))(call.query, ws)
        for f in (run, dense.run)
    )
    close(got, expected, 5e-5)


# --- devices --------------------------------------------------------------------------------------

NAMES = ("data", "model")


@pytest.fixture(scope="module")
def sharded_case() -> tuple[Call, Any]:
    ids = jnp.tile(IDS[:, :T], (2, 1))
    call = make(masks.segments(ids), scores.bias(normal(7, 1, N, T, T)), B=4, S=T)
    return call, dense_all(call)


def shards(call: Call, mesh: Any, spec: Any) -> Call:
    put = partial(jax.device_put, device=NamedSharding(mesh, spec))
    return dataclasses.replace(
        call, query=put(call.query), key=put(call.key), value=put(call.value)
    )


@pytest.mark.deep
def test_sharded_inputs_stay_where_they_are(sharded_case):
    call, expected = sharded_case
    mesh = jax.make_mesh((4, 2), NAMES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    call = shards(call, mesh, P("data", None, "model"))
    compiled = jax.jit(partial(everything, run)).lower(call).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    got = compiled(call)
    close(got, expected)
    out = got[1][0]
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), 4)


@pytest.mark.parametrize("check", everyday([True, False]))
def test_shard_map(sharded_case, check):
    call, expected = sharded_case
    mesh = jax.make_mesh((4, 2), NAMES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = P("data", None, "model")
    at = Positions(b=jnp.arange(4), h=jnp.arange(N))

    def loss(query: Any, key: Any, value: Any, score: Any) -> Any:
        def local(query: Any, key: Any, value: Any, score: Any, b: Any, h: Any) -> Any:
            at = Positions(b=b, h=h)
            parts = split_parts(call.mask.given, score.given, (2, 2, T, T), at)
            new = dataclasses.replace(
                call, query=query, key=key, value=value, positions=at, **parts
            )
            return run(new)

        out, lse = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, spec, spec, P(), P("data"), P("model")),
            out_specs=(spec, spec),
            check_vma=check,
        )(query, key, value, score, at.b, at.h)
        return (out * normal(5, *out.shape)).sum() + (jnp.sin(lse) * normal(6, *lse.shape)).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    got = grad(call.query, call.key, call.value, call.score)
    gradients = expected[0]
    close(got, (*gradients[:3], gradients[4]))


@pytest.mark.parametrize("few", [schedule.FEW, 0, None], ids=["few tiles", "many tiles", "known"])
@pytest.mark.parametrize("grid", [(1, 1, 5, 7), (2, 3, 4, 6), (1, 2, 1, 9), (1, 1, 8, 1)])
def test_steps_cover_every_active_tile_once(grid, few, monkeypatch):
    """And those without the mask cover FULL tiles alone; in all ways of making the lists."""
    monkeypatch.setattr(schedule, "FEW", few)
    given = np.asarray if few is None else jnp.asarray
    B, K, nq, nk = grid
    tq, tk = 8, 4
    sizes = schedule.StepSizes(
        B=B, T=nq * tq, S=nk * tk, K=K, G=1, H=4, Hv=4, tq=tq, tk=tk, step_rows=1, step_heads=1
    )
    for seed in range(8):
        draw = np.random.default_rng(seed)
        states = draw.choice(3, (B, K, 1, nq, nk), p=draw.dirichlet([1, 1, 1])).astype(np.int8)

        def counted(n: Any, counts: Any) -> Any:
            """How often each tile was computed: with the mask, and without it."""
            b, h, q, k = (jnp.asarray(at, jnp.int32) for at in (n.b, n.h, n.q // tq, n.k // tk))
            wide = jnp.ones((1, 1, 1, n.tq // tq, n.tk // tk), jnp.int32)
            at = (jnp.int32(0 if n.masked else 1), b, h, q, k)
            old = jax.lax.dynamic_slice(counts, at, wide.shape)
            return jax.lax.dynamic_update_slice(counts, old + wide, at)

        lists = schedule.step_lists(sizes, given(states))
        # Steps may reach beyond the last tile, by less than their length.
        empty = jnp.zeros((2, B, K, nq + 1, nk + 2), jnp.int32)
        masked, full = np.asarray(schedule.loop(sizes, lists, counted, empty))
        cut = masked[:, :, :nq, :nk] + full[:, :, :nq, :nk]
        np.testing.assert_array_equal(cut, states[:, :, 0] != 0)
        assert (states[:, :, 0][full[:, :, :nq, :nk] > 0] == 2).all()
        assert not masked[:, :, nq:].any()
        assert not masked[:, :, :, nk:].any()


@pytest.mark.parametrize(
    ("mask", "loops"), [(masks.causal(), 2), (None, 1), (masks.full(), 1), (masks.empty(), 0)]
)
def test_lists_of_a_known_mask_are_not_computed(mask, loops):
    """Nor are loops compiled for lists without a step; two more put right what is not finite."""
    even = make(mask, T=64, S=64)
    text = jax.jit(run).lower(even).as_text()
    assert "stablehlo.sort" not in text
    assert text.count("stablehlo.while") == loops + 2


def test_nothing_is_evaluated_on_all_pairs_if_all_is_finite():
    """What puts right what is not finite stays in its loop, also where that has one round."""
    entry = jax.jit(run).lower(make(masks.causal())).compile().as_text().partition("\nENTRY")[2]
    assert entry
    assert f"{T},{S}]" not in entry
    assert f"{S},{T}]" not in entry

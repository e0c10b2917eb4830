"""explain says what runs, why, and what it costs; auto chooses by shapes alone."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, scores, stats
from jaxattn.arguments import checked_call
from jaxattn.backends import costs
from jaxattn.backends.tiled import backend as tiled
from jaxattn.dispatch import ACCELERATED, BACKENDS
from jaxattn.tiles.tile_map import EMPTY


def struct(B: int, T: int, N: int = 2, H: int = 8) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)


LARGE = struct(2, 2048)


def test_short_rows_are_computed_whole_and_long_ones_in_tiles() -> None:
    for small in (struct(1, 8), struct(1, 256, 8, 64), struct(128, 32, 4, 32)):
        found = ja.explain(*[small] * 3, mask=masks.causal())
        assert found.backend == "rows"
        assert set(found.others) == {*BACKENDS} - {"rows"}
    large = ja.explain(*[LARGE] * 3, mask=masks.causal())
    assert large.backend == "tiled"
    assert set(large.others) == {*BACKENDS} - {"tiled"}
    assert all(reason for each in (found, large) for reason in each.others.values())


SHAPES = [(8, 1, 2048), (16, 64, 64), (4, 512, 512), (1, 2048, 2048), (2, 4, 100)]
SHARES = [None, masks.causal(), masks.causal() & masks.sliding_window(32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", SHARES, ids=str)
def test_on_cpu_the_least_estimate_runs(shape: tuple[int, int, int], mask: Any) -> None:
    B, T, S = shape
    query, keys = struct(B, T, 8, 64), struct(B, S, 8, 64)
    found = ja.explain(query, keys, keys, mask=mask)
    estimates = costs.estimates(checked_call(query, keys, keys, mask=mask))
    assert found.backend == min(estimates, key=lambda name: estimates[name])
    for name in estimates.keys() - {found.backend}:
        assert "estimated at" in found.others[name]
    assert "estimated at" in found.reason


@pytest.mark.parametrize("T", [256, 1000, 4096])
def test_the_estimate_of_tiles_counts_the_pairs_in_them(
    T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a mask without numbers leaves; of others, a share that no value changes."""
    monkeypatch.setattr(costs, "TILED", costs.Price(1e6, 0, 0))
    monkeypatch.setattr(costs, "PRODUCT", 0)
    x = struct(1, T, 8, 64)

    def pairs(mask: Any) -> float:
        return costs.estimates(checked_call(x, x, x, mask=mask))["tiled"] / 8

    tile = tiled.tile_of(checked_call(x, x, x), None, None, 8)
    across = -(-T // min(tile))
    whole = -(-T // tile[0]) * tile[0] * -(-T // tile[1]) * tile[1]
    assert pairs(None) == whole
    for window in (1, T):
        assert pairs(masks.sliding_window(window)) == min(1, (across + 2) / (2 * across)) * whole
    for mask in (masks.causal(), ~masks.causal(), masks.full()):
        states = np.asarray(ja.tile_map(mask, x.shape, x.shape, tile=tile).states)
        assert pairs(mask) == pytest.approx((states != EMPTY).sum() * tile[0] * tile[1])


def test_a_long_row_of_many_heads_is_cut_into_tiles() -> None:
    """Its logits would leave the caches, though each head has few."""
    assert ja.explain(*[struct(1, 256, 64, 64)] * 3).backend == "tiled"


def test_the_backend_asked_for_is_the_one_that_runs() -> None:
    for name in BACKENDS.keys() - set(ACCELERATED):
        query = struct(2, 1, 2, 8) if name == "decode" else LARGE
        assert ja.explain(query, LARGE, LARGE, backend=name).backend == name
    with pytest.raises(ValueError, match="backend: got 'flash'"):
        ja.explain(*[LARGE] * 3, backend="flash")


@pytest.mark.parametrize("exact", [True, False])
def test_queries_and_keys_left_out_are_named(exact: bool, monkeypatch: Any) -> None:
    """Pair by pair in small calls; in large ones those that whole tiles leave out, at least."""
    module = sys.modules["jaxattn.explain"]
    monkeypatch.setattr(module, "_LOOKED_AT", 2**30 if exact else 0)
    B, T, N, _ = LARGE.shape
    lengths = jnp.asarray([T, 300])
    padding = masks.causal() & masks.key_padding(lengths=lengths)
    mask = padding & masks.query_padding(lengths=lengths)
    blind = (T - 300) * N
    found = ja.explain(*[LARGE] * 3, mask=mask).notes
    if exact:
        assert found == (
            f"{blind} of {B * N * T} queries see no key: their output is 0 (the first: row 1, "
            "head 0, 300)",
            f"{blind} of {B * N * T} keys are seen by no query (the first: row 1, head 0, 300)",
        )
    else:
        tiles = (T - 512) * N
        assert found[0].startswith(f"at least {tiles} of {B * N * T} queries see no key")
        assert found[1] == (
            f"at least {tiles} of {B * N * T} keys are seen by no query (the first: row 1, head 0, "
            "512)"
        )
    assert ja.explain(*[LARGE] * 3, mask=masks.causal()).notes == ()


def test_tiles_density_and_flops() -> None:
    B, T, N, H = LARGE.shape
    window = masks.sliding_window(100)
    found = ja.explain(*[LARGE] * 3, mask=window)
    tile = found.tiles.tile[0]
    near = window.dense(T, T)[0, 0].reshape(T // tile, tile, T // tile, tile)
    some, every = np.asarray(near.any((1, 3))), np.asarray(near.all((1, 3)))
    assert found.full == every.sum() * B * N
    assert found.partial == (some & ~every).sum() * B * N
    assert found.empty == (~some).sum() * B * N
    assert found.density == some.mean()
    assert found.flops == 4 * some.mean() * B * N * T * T * H
    assert found.dense_flops == 4 * B * N * T * T * H


def test_ragged_tiles_count_what_is_there() -> None:
    x = struct(1, 300, 1)
    assert ja.explain(x, x, x).density == 1
    assert ja.explain(x, x, x, mask=masks.empty()).flops == 0


def test_memory_is_of_the_chosen_backend() -> None:
    tiled, dense = (ja.explain(*[LARGE] * 3, backend=name) for name in ("tiled", "dense"))
    assert dense.bytes == tiled.dense_bytes == 2 * 2 * 2 * 2048**2 * 4
    twice = ja.explain(*[struct(2, 4096)] * 3, backend="tiled")
    assert tiled.bytes < dense.bytes / 4
    assert twice.bytes < 2.5 * tiled.bytes  # linear in T


def test_memory_holds_the_columns_of_statistics() -> None:
    asked = {"largest": stats.max(), "entropy": stats.entropy()}
    plain, more = (ja.explain(*[LARGE] * 3, backend="tiled", stats=s) for s in (None, asked))
    B, T, N, _ = LARGE.shape
    # A maximum, and the mean of the logit: a float32 number for each query and head.
    assert more.bytes - plain.bytes == 2 * B * T * N * 4


def test_traced_leaves_leave_the_tiles_unknown() -> None:
    seen = []

    @jax.jit
    def run(lengths: jax.Array) -> jax.Array:
        x = jnp.zeros(LARGE.shape)
        seen.append(ja.explain(x, x, x, mask=masks.key_padding(lengths=lengths)))
        return lengths

    run(jnp.array([5, 6]))
    assert seen[0].tiles is None
    assert seen[0].density is None
    assert "unknown: the mask" in str(seen[0])


def test_what_has_no_bounds_is_said() -> None:
    found = ja.explain(*[LARGE] * 3, mask=lambda b, h, q, k: jnp.sin((q * k).astype(float)) > 0)
    assert any("sin" in note for note in found.notes)
    assert not ja.explain(*[LARGE] * 3, mask=masks.causal()).notes


def test_it_prints() -> None:
    found = ja.explain(*[LARGE] * 3, mask=masks.causal(), score=scores.soft_cap(5.0))
    text = str(found)
    for part in ("backend: tiled", "not dense", "causal()", "soft_cap(5.0)", "full", "FLOP", "B "):
        assert part in text


def test_a_tile_map_is_shown_as_it_is() -> None:
    tiles = ja.tile_map(masks.causal(), LARGE.shape, LARGE.shape, tile=128)
    found = ja.explain(*[LARGE] * 3, mask=tiles)
    assert found.tiles is tiles
    assert found.mask == "causal()"


def test_inside_jit_tiles_are_said_of_masks_that_are_known():
    found = []

    @jax.jit
    def run(x, ids):
        at = ja.Positions(q=np.arange(512) + 512)
        found.append(ja.explain(x, x, x, mask=masks.causal()))
        found.append(ja.explain(x, x, x, mask=masks.causal(), positions=at))
        found.append(ja.explain(x, x, x, mask=ja.tile_map(lambda b, h, q, k: k > q, x, x)))
        found.append(ja.explain(x, x, x, mask=masks.segments(ids)))
        return x

    jax.vmap(run, (0, None))(jnp.ones((2, 1, 512, 1, 4)), jnp.zeros(512, int))
    assert [each.density for each in found] == [0.75, 1.0, None, None]
    assert found[0].notes == ()
    assert "are seen by no query" not in "".join(found[1].notes)
    assert all("traced here" in str(each) for each in found[2:])


def test_what_a_backend_does_not_promise_is_said():
    """And that keys are repeated, where more devices share the query heads than there are keys."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "model"))
    query = jax.device_put(jnp.ones((1, 8, 8, 4)), split)
    key = jnp.ones((1, 8, 2, 4))
    (note,) = ja.explain(query, key, key).notes
    assert "split over 4 devices, and there are 2 key heads" in note
    assert not ja.explain(query, query, query).notes
    for name in ("cudnn", "triton", "mosaic"):
        assert all(isinstance(limit, str) for limit in BACKENDS[name].LIMITS)

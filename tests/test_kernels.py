"""The kernels of `triton` and `tpu`: interpreted here, against the contract.

Tiles are 16 x 16 where kernels are interpreted, so that small shapes have lists of every kind.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import test_attention as contract
import test_nonfinite as nonfinite
import test_tiled as small
from cases import MASKS

from jaxattn import masks, scores
from jaxattn.backends import dense, tpu, triton
from jaxattn.tiles.tile_map import tile_map

pytestmark = pytest.mark.no_cover
ENGINES: dict[str, Any] = {"triton": triton, "tpu": tpu}


@pytest.fixture(params=ENGINES)
def backend(request: Any) -> Any:
    with ENGINES[request.param].interpreted():
        yield request.param


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.deep] if n % 7 != 3 else [])
        for n, name in enumerate(MASKS)
    ],
)
def test_every_mask(backend: str, name: str) -> None:
    contract.test_every_mask(backend, name)


ROWS = [
    ((23, 35), 8, (4, 2), "float32", "padding_left", "t5_both", "sinks"),
    ((32, 48), 64, (2, 2), "bfloat16", None, "chain", "dropout"),
    ((40, 17), 80, (3, 1), "bfloat16", "window_per_head", None, "positions"),
    ((17, 33), 96, (4, 2), "float32", "nobody_sees_some", "bias_full", "scale"),
    ((1, 40), 31, (8, 2), "float32", "dense_full", "alibi", "dropout"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_features(backend: str, row: Any) -> None:
    names = ("lengths", "head_dim", "heads", "dtype", "mask", "score", "extra")
    contract.run_row(backend, dict(zip(names, row, strict=True)))


@pytest.mark.parametrize(
    "law",
    [
        partial(contract.test_nan_in_what_nobody_sees, name="by head", features="all"),
        partial(contract.test_a_query_that_sees_nothing, kind="score"),
        contract.test_a_nan_cotangent_of_a_dead_row_goes_nowhere,
        contract.test_pairs_that_may_not_meet_do_not,
        partial(contract.test_large_logits_stay_finite, dtype="bfloat16"),
        contract.test_float32_products_are_true_float32,
        contract.test_a_score_never_meets_a_masked_logit,
        contract.test_scores_cannot_unmask,
        nonfinite.test_dropout_does_not_hide_what_is_not_finite,
    ],
    ids=lambda law: getattr(law, "func", law).__name__.removeprefix("test_"),
)
def test_laws(backend: str, law: Any) -> None:
    law(backend)


# --- gradients of scores, vmap, shards, maps ------------------------------------------------------

B, T, S, N = 2, 23, 35, 4
make = partial(small.make, T=T, S=S)
# One operand of each kind, of each extent: shared by rows, by heads, by all, or by none.
LEARNED = {
    "pairs, keys, a number": scores.chain(
        scores.bias(small.normal(7, 1, N, T, S)),
        scores.bias(small.normal(8, 1, N, 1, S)),
        scores.soft_cap(jnp.float32(1.5)),
    ),
    "pairs, queries, distances": scores.chain(
        scores.bias(small.normal(7, T, S)),
        scores.bias(small.normal(8, B, 1, T, 1)),
        scores.relative_bias(small.normal(9, N, 8), max_distance=12),
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_scores_learn(backend: str, name: str) -> None:
    call = make(masks.causal(5), LEARNED[name], scale=jnp.float32(-0.3))
    got = jax.jit(partial(small.everything, ENGINES[backend].run))(call)
    small.close(got, small.dense_all(call))


def test_vmap_is_a_loop(backend: str) -> None:
    ids = small.IDS[:, :T], small.IDS[:, :S]
    table = scores.relative_bias(small.normal(9, N, 8), max_distance=12)
    call = make(masks.segments(*ids), table)
    two = jnp.stack([call.query, 2 * call.query])
    scales = jnp.asarray([0.3, -0.4], jnp.float32)

    def one(run: Any, query: Any, scale: Any) -> Any:
        return small.everything(run, dataclasses.replace(call, query=query, scale=scale))

    got = jax.jit(jax.vmap(partial(one, ENGINES[backend].run)))(two, scales)
    alone = jax.jit(partial(one, dense.run))
    each = [alone(q, c) for q, c in zip(two, scales, strict=True)]
    small.close(got, jax.tree.map(lambda *x: jnp.stack(x), *each), 5e-5)


def test_sharded_inputs_stay_where_they_are(backend: str) -> None:
    contract.test_sharded_inputs_stay_where_they_are(backend, "batch", "auto")


@pytest.mark.parametrize("tile", [16, 32, 40])
def test_a_tile_map_is_reused(backend: str, tile: int) -> None:
    mask = masks.causal(5)
    known = tile_map(mask, (B, T, N, small.H), (B, S, 2, small.H), tile=tile)
    run = ENGINES[backend].run
    small.close(jax.jit(run)(make(known)), jax.jit(dense.run)(make(mask)))

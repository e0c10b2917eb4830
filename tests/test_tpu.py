"""The kernels for TPUs: their lists, races, what they refuse, and lowered for real TPUs.

`test_kernels.py` holds them, interpreted, to the contract.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_tiled as small
from cases import MASKS, SQUARE
from test_kernels import LEARNED, B, N, S, T, make
from test_mosaic import directly

import jaxattn as ja
from jaxattn import masks, scores, stats
from jaxattn.arguments import checked_call
from jaxattn.backends import base, formula, tpu
from jaxattn.backends.base import Call
from jaxattn.backends.tpu import backend, steps
from jaxattn.dispatch import BACKENDS
from jaxattn.masks.mask import as_mask
from jaxattn.tiles.tile_map import EMPTY

pytestmark = pytest.mark.no_cover
NAME = "tpu"


@pytest.fixture
def interpreted() -> Any:
    with tpu.interpreted():
        yield


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")
def test_lists_that_do_not_fit_are_computed_in_parts(monkeypatch: Any) -> None:
    """Three tiles of keys in a row, and lists of both batch rows: one row of tiles at a time."""
    ids = small.IDS[:, :T], small.IDS[:, :S]
    call = make(masks.segments(*ids), LEARNED["pairs, queries, distances"])
    expected = small.dense_all(call)
    monkeypatch.setattr("jaxattn.backends.tpu.tiles.MOST", 2 * -(-S // 16))
    got = jax.jit(partial(small.everything, tpu.run))(call)
    small.close(got, expected)


@pytest.mark.parametrize(
    ("across", "extents"), [(False, (2, 2, 3)), (True, (2, 2, 3)), (True, (2, 1, 1))]
)
def test_steps_are_the_active_tiles_row_by_row(across: bool, extents: Any) -> None:
    draw = np.random.default_rng(3)
    states = jnp.asarray(draw.choice([0, 0, 1, 2], (*extents, 5, 4)), jnp.int8)
    path, by_rows = steps.walk(states, 3, across)
    path = dataclasses.replace(path, length=by_rows.shape[2] * by_rows.shape[3])
    words, most = path.steps(by_rows)
    b_last, k_last, g_last = (n - 1 for n in extents)
    for b, k, g in np.ndindex(2, 2, 3):
        seen, ended = [], True
        own = np.asarray(states)[min(b, b_last), min(k, k_last), min(g, g_last)]
        for step, inner in np.ndindex(int(most), path.inner):
            head = k if across else k * 3 + g
            at = path.place(b, head, step, jnp.int32(inner), words, jnp.zeros(1, jnp.int32))
            assert (int(at.b), int(at.k), int(at.n)) == (b, k, k * 3 + int(at.g))
            if int(at.state) == EMPTY and not bool(at.begins | at.ends):
                continue
            assert bool(at.begins) == ended
            ended = bool(at.ends)
            if int(at.g) == g and int(at.state) != EMPTY:
                i, j = int(at.i), int(at.j)
                assert int(at.state) == own[i, j]
                seen.append((j, i) if across else (i, j))
        assert seen == sorted(seen)
        assert set(seen) == set(map(tuple, np.argwhere((own.T if across else own) != EMPTY)))


# --- the interpreter of TPUs ----------------------------------------------------------------------


def without_races(call: Call) -> None:
    """Output and gradients, interpreted as a TPU runs kernels: copies in flight, memory unset."""
    from jax.experimental.pallas import tpu as pltpu

    interpreter = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )

    def run(call: Call) -> Any:
        return directly(*backend.build(call, interpreter=interpreter))

    small.close(jax.jit(partial(small.everything, run))(call), small.dense_all(call))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.deep] if n % 24 else [])
        for n, name in enumerate(MASKS)
    ],
)
def test_masks_have_no_races(name: str) -> None:
    extents = {"T": 32, "S": 32} if name in SQUARE else {}
    case = MASKS[name](B, N, extents.get("T", T), extents.get("S", S))
    call = make(as_mask(case.mask), **extents)
    with tpu.interpreted():
        if reason := tpu.refuse(call):
            pytest.skip(reason)
    without_races(call)


SCORES = {
    "rows, heads, a table of distances": (
        masks.segments(small.IDS[:, :T], small.IDS[:, :S]) & masks.causal(5),
        LEARNED["pairs, queries, distances"],
    ),
    "windows of each head, keys, a number": (
        masks.sliding_window(jnp.asarray([3, 9, 1, 20])),
        LEARNED["pairs, keys, a number"],
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_have_no_races(name: str) -> None:
    without_races(make(*SCORES[name], scale=jnp.float32(-0.3)))


def test_dropout_has_no_races() -> None:
    dropout = base.Dropout(jnp.float32(0.3), jnp.asarray([17, 0], jnp.uint32))
    without_races(make(masks.causal(5), dropout=dropout))


def test_statistics_have_no_races() -> None:
    call = make()
    arrays = call.query, call.key, call.value
    asked = [stats.entropy(), stats.max(), stats.argmax(), stats.mean(lambda x, b, h, q, k: q - k)]
    without_races(checked_call(*arrays, mask=masks.causal(5), stats=asked))


# --- what is refused ------------------------------------------------------------------------------


def test_it_runs_on_tpus_alone() -> None:
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="runs on TPUs; inputs are on cpu"):
        ja.attention(x, x, x, backend=NAME)


@pytest.mark.usefixtures("interpreted")
def test_what_no_kernel_can_is_refused() -> None:
    table = jnp.ones((2, 3), bool)

    def reason(call: Call) -> str:
        return tpu.refuse(call) or ""

    assert not reason(make(masks.causal()))
    blocks = make(masks.predicate(lambda b, h, q, k: table[jnp.minimum(q * k, 1), k % 3]))
    assert "the mask can't be computed in a kernel" in reason(blocks)

    def bent(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return jax.lax.lgamma(x)

    assert "`lgamma` has no counterpart in a TPU kernel" in reason(make(None, scores.score(bent)))
    wide = jax.ShapeDtypeStruct((1, 4, 1, 257), jnp.float32)
    given = {"query": wide, "key": wide, "value": wide}
    assert "up to 256" in reason(dataclasses.replace(make(), **given))
    none = jax.ShapeDtypeStruct((1, 0, 1, 8), jnp.float32)
    given = {"query": none, "key": none, "value": none}
    assert "nothing to compute" in reason(dataclasses.replace(make(), **given))
    assert "bfloat16 or float32; got float16" in reason(make(dtype=np.float16))


# --- real TPUs ------------------------------------------------------------------------------------

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
LENGTH = 640


def described(kind: str) -> Any:
    """Inside, the TPU of that kind is what JAX computes on."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def structs(T: int, S: int, N: int, K: int, H: int, dtype: Any) -> Any:
    shapes = (2, T, N, H), (2, S, K, H), (2, S, K, H)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lowered(kind: str, arguments: Any, **options: Any) -> str:
    def loss(query: Any, key: Any, value: Any) -> Any:
        out, lse, *seen = ja.attention(query, key, value, backend=NAME, return_lse=True, **options)
        total = out.astype(jnp.float32).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()
        return total + sum(each.sum() for each in jax.tree.leaves(seen))

    with described(kind):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


REAL = {
    "causal": (64, (4, 4), jnp.bfloat16, lambda: {"mask": masks.causal()}),
    "segments, grouped": (
        80, (8, 2), jnp.bfloat16,
        lambda: {"mask": masks.segments(jnp.zeros((2, LENGTH), jnp.int32)) & masks.causal()},
    ),
    "window of each head, a table of distances": (
        96, (4, 2), jnp.bfloat16,
        lambda: {
            "mask": masks.sliding_window(jnp.arange(4) + 100),
            "score": scores.relative_bias(jnp.ones((4, 32))),
        },
    ),
    "a dense array, dropout": (
        128, (4, 2), jnp.bfloat16,
        lambda: {
            "mask": masks.dense(jnp.ones((LENGTH, LENGTH), bool)), "dropout_rate": 0.1,
            "dropout_seed": 1,
        },
    ),
    "not causal, alibi and a cap": (
        256, (4, 2), jnp.bfloat16,
        lambda: {
            "mask": ~masks.causal(),
            "score": scores.chain(scores.alibi(jnp.ones(4)), scores.soft_cap(5.0)),
        },
    ),
    "float32, statistics": (
        128, (2, 2), jnp.float32,
        lambda: {
            "mask": masks.prefix_lm(30),
            "stats": [stats.max(), stats.mean(lambda x, b, h, q, k: abs(q - k))],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # Few programs differ between the three.
        pytest.param(n, k, marks=() if k == "v5e" or n == "causal" else pytest.mark.deep)
        for n in REAL
        for k in KINDS
    ],
)
def test_it_lowers(name: str, kind: str, monkeypatch: Any) -> None:
    # What is not finite is looked for some rows at a time.
    monkeypatch.setattr(formula, "CELLS", LENGTH * 16)
    H, (N, K), dtype, options = REAL[name]
    text = lowered(KINDS[kind], structs(LENGTH, LENGTH, N, K, H, dtype), **options())
    assert text.count("tpu_custom_call") >= 3
    if "dense" not in name:
        assert f"{LENGTH}x{LENGTH}x" not in text


def test_ragged_lengths_lower() -> None:
    lowered(KINDS["v5e"], structs(333, 517, 2, 1, 64, jnp.bfloat16))


@pytest.mark.parametrize(
    ("T", "kind", "expected"),
    [(128, "TPU v5 lite", "dense"), (4096, "TPU v5 lite", NAME), (4096, "TPU v2", "tiled")],
)
def test_auto_takes_kernels_where_they_can(T: int, kind: str, expected: str) -> None:
    with described(kind):
        found = ja.explain(*structs(T, T, 32, 4, 64, jnp.bfloat16), mask=masks.causal())
    assert found.backend == expected
    assert ("never timed" in found.reason) == (expected == NAME)
    assert {found.backend, *found.others} == set(BACKENDS)

"""The contract: what attention promises, on every backend, in values and gradients.

Gold is float64 NumPy, written out in `cases.attend`. A backend that refuses a call shows as a skip
with its reason.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import HERE, MASKS, SCORES, SQUARE, attend, cells, close, grid, kept, pairwise, qkv, rng

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.backends import base
from jaxattn.backends.tiled import schedule

# Tracing every line of the package here would cost a minute, and the other tests reach them too.
pytestmark = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: Any) -> None:
    """Tiles so small that small shapes too have lists of every kind, and ragged edges."""

    def tile_size(T: int, S: int, heads: int) -> tuple[int, int]:
        return (16, 16) if max(T, S) <= 128 else usual(T, S, heads)

    usual = schedule.tile_size
    monkeypatch.setattr(schedule, "tile_size", tile_size)


@pytest.fixture(params=HERE)
def backend(request: Any) -> str:
    return str(request.param)


# What a call says is read before a backend has it: laws about that are seen every day on the
# definition and on the engine, and on the other backends by `make test-deep`.
arguments = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=() if b in ("dense", "tiled") else pytest.mark.deep) for b in HERE],
)


def attention(*args: Any, **options: Any) -> Any:
    """`ja.attention`, a refusal turned into a skip."""
    try:
        return ja.attention(*args, **options)
    except ValueError as error:
        if "can't compute this call" in str(error):
            # Without the call's own numbers, so that one reason is one line of the summary.
            pytest.skip(re.sub(r"\(.*\)|\b\d+(?= queries)", "...", str(error)))
        raise


def bits(x: Any) -> np.ndarray:
    """Bytes, so that NaN equals NaN and 0 is not -0."""
    array = np.asarray(x)
    return array.view(f"V{array.itemsize}") if array.size else array


def same_bits(left: Any, right: Any, where: str = "") -> None:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=where)


def everything(
    query: Any, key: Any, value: Any, make: Any = None, params: Any = (), sinks: Any = None,
    **options: Any
) -> Any:  # fmt: skip
    """A compiled function of the arrays: output, LSE, and gradients of a random loss of both."""
    B, T, N, _ = query.shape
    wide = base.accumulator(query.dtype)
    d_out = jnp.asarray(rng(3, T, N).normal(size=(B, T, N, value.shape[-1])), wide)
    d_lse = jnp.asarray(rng(4, T, N).normal(size=(B, T, N)), wide)

    def loss(inputs: dict[str, Any]) -> Any:
        score = None if make is None else make(*inputs["params"])
        out, lse = attention(
            inputs["query"], inputs["key"], inputs["value"], score=score,
            sinks=inputs["sinks"], return_lse=True, **options
        )  # fmt: skip
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return (out.astype(wide) * d_out).sum() + (finite * d_lse).sum(), (out, lse)

    def compute(query: Any, key: Any, value: Any, params: Any, sinks: Any) -> Any:
        inputs = dict(query=query, key=key, value=value, params=params, sinks=sinks)
        (_, (out, lse)), grads = jax.value_and_grad(loss, has_aux=True)(inputs)
        return out, lse, grads

    return functools.partial(jax.jit(compute), params=params, sinks=sinks), d_out, d_lse


def check(got: Any, gold: Any, plain: Any, dtype: Any) -> None:
    """Output, LSE and every gradient by the rule of errors."""
    out, lse, grads = got
    wide = base.accumulator(dtype)
    assert out.dtype == dtype
    assert lse.dtype == wide
    close(out, gold.out, plain.out, dtype, "out")
    close(lse, gold.lse, plain.lse, wide, "lse")
    for name in ("query", "key", "value"):
        assert grads[name].dtype == dtype
        largest = gold.largest.get(name, 0.0)
        close(grads[name], gold.grads[name], plain.grads[name], dtype, name, largest)
    if grads["sinks"] is not None:
        scale = 1 + np.abs(gold.grads["sinks"]).max()
        eps = float(jnp.finfo(dtype).eps)
        atol = 8 * eps * scale + eps * gold.largest["sinks"]
        np.testing.assert_allclose(grads["sinks"], gold.grads["sinks"], atol=atol)
    for i, slope in enumerate(grads["params"]):
        # A sum over all cells, of logits computed in the accumulator's dtype.
        expected = gold.grads[f"param{i}"]
        tolerance = 1e-4 if dtype == jnp.float32 else 1e-6 if dtype == jnp.float64 else 0.03
        atol = tolerance * (0.1 + np.abs(expected).max())
        atol += float(jnp.finfo(dtype).eps) * gold.largest[f"param{i}"]
        np.testing.assert_allclose(np.asarray(slope, np.float64), expected, atol=atol)


# --- every mask; every pair of features -----------------------------------------------------------


# The definition evaluates a mask cell by cell, which test_masks.py checks for all of them. On the
# other backends a fifth of the masks is seen here, and all by `make test-deep`.
DENSE_HERE = ("causal", "padding_left", "segments_packed", "window_per_head", "nobody_sees_some")
EVERY = [
    pytest.param(
        b, name, marks=pytest.mark.deep if n % 5 and b != "dense" else (), id=f"{b}-{name}"
    )
    for b in HERE
    for n, name in enumerate(MASKS)
    if b != "dense" or name in DENSE_HERE
]


@pytest.mark.parametrize(("backend", "name"), EVERY)
def test_every_mask(backend: str, name: str) -> None:
    B, N, T, S = (2, 4, 32, 32) if name in SQUARE else (2, 4, 23, 35)
    case = MASKS[name](B, N, T, S)
    inputs = qkv(B, T, S, N, 2, 8)
    out, lse = jax.jit(
        functools.partial(attention, mask=case.mask, return_lse=True, backend=backend)
    )(*inputs)
    seen = cells(case.cell, B, N, T, S)
    gold, plain = (attend(*inputs, seen, dtype=dtype) for dtype in (np.float64, np.float32))
    close(out, gold.out, plain.out, jnp.float32, "out")
    close(lse, gold.lse, plain.lse, jnp.float32, "lse")


FACTORS: dict[str, list[Any]] = {
    "lengths": [
        (1, 1), (1, 128), (3, 799), (113, 203), (128, 217), (108, 256), (239, 1), (255, 257),
        (512, 256), (1023, 1024),
    ],
    "head_dim": [1, 8, 31, 64, 80, 128, 256],
    "heads": [(2, 2), (4, 2), (8, 2), (3, 1)],
    "dtype": ["float32", "bfloat16", "float16", "float64"],
    "mask": [None, "padding_left", "window_per_head", "nobody_sees_some", "dense_full"],
    "score": [None, "t5_both", "bias_full", "chain"],
    "extra": ["sinks", "dropout", "scale", "positions"],
}  # fmt: skip
SHAPES = ("lengths", "head_dim", "heads", "dtype")


def in_turn(shapes: dict[str, Any], n: int) -> dict[str, Any]:
    """A row of shapes, with the n-th of what is computed on them."""
    others = [name for name in FACTORS if name not in SHAPES]
    turns = itertools.product(*(FACTORS[name] for name in others))
    count = math.prod(len(FACTORS[name]) for name in others)
    # A stride that meets them all, with neighbours far apart.
    return shapes | dict(zip(others, next(itertools.islice(turns, 37 * n % count, None))))


PRODUCT = [
    in_turn(dict(zip(SHAPES, row)), n)
    for n, row in enumerate(itertools.product(*(FACTORS[name] for name in SHAPES)))
]
# Lengths and head dims in turn, the two largest lengths once and where NumPy is fast: the product
# has all their pairs.
# Of 40 seeds, the one with the fewest rows.
PAIRS = pairwise({name: FACTORS[name] for name in FACTORS if name not in SHAPES[:2]}, seed=18)
FAST = [n for n, pair in enumerate(PAIRS) if pair["score"] is None][:2]
for n, pair in enumerate(PAIRS):
    lengths = FACTORS["lengths"][FAST.index(n) - 2 if n in FAST else n % 8]
    pair |= {"lengths": lengths, "head_dim": FACTORS["head_dim"][n % 7]}


def named(row: dict[str, Any]) -> str:
    return "-".join(map(str, row.values()))


# The backends of a row one after another: they share what NumPy computes for it. Every day the
# engine computes two thirds of the rows, and the others, which are the formula, a third of them.
@pytest.mark.parametrize(
    ("row", "backend"),
    [
        pytest.param(
            row, backend, id=f"{named(row)}-{backend}",
            marks=() if (n % 3 == i % 3 if backend != "tiled" else n % 3 and max(row["lengths"]) < 1000)
            else pytest.mark.deep,
        )
        for n, row in enumerate(PAIRS) for i, backend in enumerate(HERE)
    ],
)  # fmt: skip
def test_every_pair_of_features(backend: str, row: dict[str, Any]) -> None:
    run_row(backend, row)


@pytest.mark.deep
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("row", PRODUCT, ids=named)
def test_every_product_of_shapes(backend: str, row: dict[str, Any]) -> None:
    run_row(backend, row)


def run_row(backend: str, row: dict[str, Any]) -> None:
    """One combination of features, against NumPy."""
    with jax.enable_x64(row["dtype"] == "float64"):
        inputs, given, gold, plain = by_numpy(tuple(row.items()))
        compute, _, _ = everything(*inputs, **given, backend=backend)
        check(compute(*inputs), gold, plain, inputs[0].dtype)


@functools.lru_cache(maxsize=2)
def by_numpy(row: tuple[tuple[str, Any], ...]) -> tuple[Any, dict[str, Any], Any, Any]:
    """The inputs of a row, the other arguments of `everything`, and what they should give."""
    inputs, given, by_hand = features(dict(row))
    _, d_out, d_lse = everything(*inputs)
    by_hand |= {"d_out": d_out, "d_lse": d_lse}
    gold = plain = attend(*inputs, **by_hand)
    if base.accumulator(inputs[0].dtype) != jnp.float64:
        plain = attend(*inputs, **by_hand, dtype=np.float32)
    return inputs, given, gold, plain


def features(names: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The inputs of a row, the other arguments of `everything`, and those of `attend`."""
    (T, S), (N, K), H, extra = (names[n] for n in ("lengths", "heads", "head_dim", "extra"))
    B = 2 if T * S < 2**14 else 1
    dtype = jnp.dtype(names["dtype"])
    wide = base.accumulator(dtype)
    inputs = qkv(B, T, S, N, K, H, 5 if extra == "scale" else None, dtype)
    given: dict[str, Any] = {}
    by_hand: dict[str, Any] = {}
    at: dict[str, Any] = {}
    if extra == "sinks":
        given["sinks"] = by_hand["sinks"] = jnp.asarray(rng(5).normal(size=N), dtype)
    if extra == "scale":
        given["scale"] = by_hand["scale"] = 0.7
    if extra == "positions":
        # Permutations: arrays in masks and scores are read within their extents.
        at = {"q": rng(6).permutation(T), "k": rng(7).permutation(S)}
        given["positions"] = ja.Positions(**{n: jnp.asarray(x) for n, x in at.items()})
    if extra == "dropout":
        given |= {"dropout_rate": 0.3, "dropout_seed": 17}
        by_hand |= {"rate": 0.3, "keep": kept((17, 0), 0.3, *grid(B, N, T, S, **at))}
    if names["mask"]:
        case = MASKS[names["mask"]](B, N, T, S)
        given["mask"] = case.mask
        by_hand["seen"] = cells(case.cell, B, N, T, S, **at)
    if names["score"]:
        score = SCORES[names["score"]](B, N, T, S)
        params = tuple(jnp.asarray(p, wide) for p in score.params)
        given |= {"make": score.make, "params": params}
        # The formula on the parameters as they were rounded.
        by_hand["score"] = score._replace(params=tuple(np.asarray(p, np.float64) for p in params))
        if names["score"].startswith("t5") and at:
            # That formula looks buckets up by index: positions are indices here too.
            assert max(at["q"].max(), at["k"].max()) < max(T, S)
    return inputs, given, by_hand | {"at": at}


# --- queries that see nothing ---------------------------------------------------------------------


# Every day each kind on two backends, and on each backend two kinds.
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        pytest.param(b, kind, marks=pytest.mark.deep if (n + m) % 2 else ())
        for n, b in enumerate(HERE)
        for m, kind in enumerate(["plain", "sinks", "score", "dropout"])
    ],
)
def test_a_query_that_sees_nothing(backend: str, kind: str) -> None:
    """Output 0, LSE -inf, and not a trace of it in any gradient."""
    B, T, S, N = 2, 5, 6, 4
    inputs = qkv(B, T, S, N, 2, 8)
    seen = cells(lambda b, h, q, k: (q != 1) & ((b == 0) | (k < 0)) & (k < 4), B, N, T, S)
    dead = ~seen.any(3)
    assert dead.any()
    assert not dead.all()
    options: dict[str, Any] = {
        "plain": {},
        "sinks": {"sinks": jnp.arange(4.0)},
        "score": {"make": scores.alibi, "params": (jnp.ones(4),)},
        "dropout": {"dropout_rate": 0.5, "dropout_seed": 1},
    }[kind]
    compute, _, _ = everything(*inputs, mask=jnp.asarray(seen), backend=backend, **options)
    out, lse, grads = compute(*inputs)
    rows = dead.transpose(0, 2, 1)
    np.testing.assert_array_equal(np.asarray(out)[rows], 0)
    np.testing.assert_array_equal(np.asarray(lse)[rows], -np.inf)
    assert np.isfinite(np.asarray(lse)[~rows]).all()
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(np.asarray(grads["query"])[rows], 0)
    for name in ("key", "value"):
        np.testing.assert_array_equal(np.asarray(grads[name])[1], 0)
        np.testing.assert_array_equal(np.asarray(grads[name])[:, 4:], 0)
        assert np.abs(np.asarray(grads[name])[0, :4]).min() > 0


def test_nobody_sees_anything(backend: str) -> None:
    inputs = qkv(1, 3, 4, 2, 1, 8)
    compute, _, _ = everything(*inputs, sinks=jnp.zeros(2), mask=masks.empty(), backend=backend)
    out, lse, grads = compute(*inputs)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, 0)


def test_a_nan_cotangent_of_a_dead_row_goes_nowhere(backend: str) -> None:
    """As from `x / norm(x)` at the 0 of a query that sees nothing."""
    query, key, value = qkv(1, 4, 4, 2, 2, 8)
    mask = masks.causal() & (lambda b, h, q, k: q != 2)

    def loss(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        out = attention(query, key, value, mask=mask, sinks=sinks, backend=backend)
        unit = out / jnp.sqrt((out**2).sum(-1, keepdims=True))
        return jnp.where((jnp.arange(4) == 2)[None, :, None, None], 0, unit + out).sum()

    for grad in jax.jit(jax.grad(loss, (0, 1, 2, 3)))(query, key, value, jnp.zeros(2)):
        assert np.isfinite(grad).all()
        assert np.abs(grad).max() > 0


# --- what may not be seen cannot be felt ----------------------------------------------------------

SECRETS = {
    "causal & padding": lambda b, h, q, k: (k <= q) & (k < 4),
    "by head": lambda b, h, q, k: (k < 2) | ((h >= 2) & (k != 5)),
    "dead rows": lambda b, h, q, k: (q % 3 != 1) & (k % 3 != 2),
    "by batch": lambda b, h, q, k: (b == 1) & (k <= q),
}


@pytest.mark.parametrize("features", [pytest.param("plain", marks=pytest.mark.deep), "all"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("by head", "dead rows") else pytest.mark.deep)
        for n in SECRETS
    ],
)
def test_nan_in_what_nobody_sees(backend: str, name: str, features: str) -> None:
    """NaN and infinities in unseen keys and dead queries change no bit of anything."""
    B, T, S, N, K = 2, 6, 7, 4, 2
    query, key, value = qkv(B, T, S, N, K, 8)
    seen = cells(SECRETS[name], B, N, T, S)
    options: dict[str, Any] = {}
    if features == "all":
        options = {
            "make": lambda slopes, cap: scores.chain(scores.alibi(slopes), scores.soft_cap(cap)),
            "params": (jnp.ones(N), jnp.float32(2)),
            "sinks": jnp.arange(4.0),
            "dropout_rate": 0.2,
            "dropout_seed": 3,
        }
    compute, _, _ = everything(query, key, value, mask=SECRETS[name], backend=backend, **options)
    clean = compute(query, key, value)
    for leaf in jax.tree.leaves(clean[2]):
        assert np.isfinite(leaf).all()
    dead_key = ~seen.any(2).reshape(B, K, N // K, S).any(2).transpose(0, 2, 1)[..., None]
    dead_query = ~seen.any(3).transpose(0, 2, 1)[..., None]
    assert dead_key.any()
    for poison in (np.nan, np.inf, -np.inf, 3e38):
        poisoned = (
            jnp.where(dead_query, poison, query),
            jnp.where(dead_key, poison, key),
            jnp.where(dead_key, -poison, value),
        )
        assert not all(np.array_equal(a, b) for a, b in zip(poisoned, (query, key, value)))
        same_bits(compute(*poisoned), clean, f"{name}: {poison}")


def test_pairs_that_may_not_meet_do_not(backend: str) -> None:
    """A finite change of one key changes only the queries that see it."""
    B, T, S, N, K = 2, 6, 7, 4, 2
    query, key, value = qkv(B, T, S, N, K, 8)
    seen = rng(11).random((B, N, T, S)) < 0.6
    run = jax.jit(
        lambda q, k, v: attention(q, k, v, mask=jnp.asarray(seen), return_lse=True, backend=backend)
    )
    out, lse = run(query, key, value)
    for j in range(S):
        changed = (
            key.at[:, j].set(1e4 * jnp.asarray(rng(j).normal(size=(B, K, 8)), key.dtype)),
            value.at[:, j].set(-3e5),
        )
        out2, lse2 = run(query, *changed)
        blind = ~seen[:, :, :, j].transpose(0, 2, 1)
        same_bits(np.asarray(out)[blind], np.asarray(out2)[blind], f"out, key {j}")
        same_bits(np.asarray(lse)[blind], np.asarray(lse2)[blind], f"lse, key {j}")
        assert (np.asarray(out) != np.asarray(out2))[~blind].any(axis=-1).all()


# --- layout ---------------------------------------------------------------------------------------


def test_grouped_queries_share_their_key_head(backend: str) -> None:
    query, key, value = qkv(2, 5, 6, 6, 3, 8)
    run = jax.jit(functools.partial(attention, mask=masks.causal(1), backend=backend))
    repeated = run(query, key.repeat(2, axis=2), value.repeat(2, axis=2))
    np.testing.assert_allclose(run(query, key, value), repeated, rtol=1e-5, atol=1e-6)


def test_unbatched(backend: str) -> None:
    query, key, value = qkv(1, 5, 6, 4, 2, 8, 3)
    run = functools.partial(
        attention, mask=masks.causal(), sinks=jnp.ones(4), return_lse=True, backend=backend
    )
    out, lse = run(query[0], key[0], value[0])
    assert out.shape == (5, 4, 3)
    assert lse.shape == (5, 4)
    same_bits((out[None], lse[None]), run(query, key, value))
    assert ja.attention_weights(query[0], key[0]).shape == (4, 5, 6)


@arguments
def test_numpy_arrays_are_arrays(backend: str) -> None:
    query, key, value = (np.asarray(x) for x in qkv(1, 5, 6, 4, 2, 8))
    got = attention(query, key, value, mask=np.tri(5, 6, dtype=bool), backend=backend)
    want = attention(*map(jnp.asarray, (query, key, value)), mask=masks.causal(), backend=backend)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("T", "S", "B"), [(0, 3, 1), (3, 0, 1), (2, 3, 0)])
def test_empty_axes(backend: str, T: int, S: int, B: int) -> None:
    shapes = (B, T, 2, 4), (B, S, 1, 4), (B, S, 1, 4)
    out, lse = attention(
        *map(jnp.ones, shapes), mask=masks.causal(), return_lse=True, backend=backend
    )
    assert out.shape == (B, T, 2, 4)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, np.full((B, T, 2), -np.inf))
    grad = jax.grad(lambda q: ja.attention(q, *map(jnp.ones, shapes[1:]), backend=backend).sum())
    np.testing.assert_array_equal(grad(jnp.ones(shapes[0])), 0)


@pytest.mark.parametrize(("T", "S", "B"), [(0, 3, 1), (3, 0, 1), (2, 3, 0)])
def test_arrays_without_entries(T: int, S: int, B: int) -> None:
    """As of the last batch of a data set that was filtered."""
    query, key, value = map(jnp.ones, ((B, T, 2, 4), (B, S, 1, 4), (B, S, 1, 4)))
    mask = masks.segments(np.ones((B, T), int), np.ones((B, S), int))
    mask &= masks.key_padding(lengths=np.ones(B, int)) & masks.key_padding(np.ones((B, S), bool))
    given: dict[str, Any] = {"mask": mask, "score": scores.bias(jnp.ones((B, 2, T, S)))}
    assert ja.attention(query, key, value, **given).shape == (B, T, 2, 4)
    assert ja.attention_weights(query, key, **given).shape == (B, 2, T, S)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_summed_in_float32(backend: str, dtype: str) -> None:
    """Equal weights over 3000 keys: in 16 bits the sum of exponentials would stop growing."""
    S = 3000
    query, key = jnp.zeros((1, 1, 1, 8), dtype), jnp.ones((1, S, 1, 8), dtype)
    value = jnp.ones((1, S, 1, 4), dtype)
    out, lse = attention(query, key, value, return_lse=True, backend=backend)
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)
    np.testing.assert_allclose(lse, np.log(S), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_large_logits_stay_finite(backend: str, dtype: str) -> None:
    """Logits of 3e4 (beyond exp, and nearly beyond float16), with masked cells among them."""
    query = jnp.full((1, 3, 1, 4), 120.0, dtype)
    key = jnp.asarray(
        np.array([120, -120, 120, 60])[None, :, None, None] * np.ones((1, 4, 1, 4)), dtype
    )
    value = jnp.asarray(np.arange(4)[None, :, None, None] * np.ones((1, 4, 1, 2)), dtype)
    out, lse = attention(query, key, value, mask=masks.causal(), return_lse=True, backend=backend)
    np.testing.assert_allclose(np.asarray(out, np.float32)[0, :, 0, 0], [0, 0, 1])
    np.testing.assert_allclose(lse[0, :, 0], [28800, 28800, 28800 + np.log(2)], rtol=1e-6)


def test_float32_products_are_true_float32(backend: str) -> None:
    """By default, on platforms that would round too; `precision=` says otherwise."""
    query, key, value = qkv(1, 4, 4, 2, 2, 8)
    for given, expected in ((None, "HIGHEST"), (jax.lax.Precision.DEFAULT, "DEFAULT")):

        def run(query: Any, given: Any = given) -> Any:
            return attention(query, key, value, precision=given, backend=backend).sum()

        text = jax.jit(jax.value_and_grad(run)).lower(query).as_text()
        # Those with the head dimension, 8, or 16 in kernels: flags are counted exactly anyhow.
        products = [
            line
            for line in text.splitlines()
            if "stablehlo.dot_general" in line and re.search(r"(?<!\d)(8|16)x", line)
        ]
        assert len(products) > 2
        for line in products:
            assert f"precision = [{expected}, {expected}]" in line


@arguments
def test_precision_takes_what_jax_takes(backend: str) -> None:
    inputs = qkv(1, 4, 4, 2, 2, 8)
    want = attention(*inputs, backend=backend)
    for given in ("high", "default", jax.lax.Precision.HIGHEST):
        got = attention(*inputs, precision=given, backend=backend)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# --- order: scale, scores, mask -------------------------------------------------------------------


def test_scores_cannot_unmask(backend: str) -> None:
    inputs = qkv(1, 5, 5, 2, 2, 8)

    def tempting(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return jnp.where(k > q, 1e30, x)

    got, want = (
        attention(*inputs, mask=masks.causal(), score=s, backend=backend) for s in (tempting, None)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_score_never_meets_a_masked_logit(backend: str) -> None:
    """Where a key is masked, a score has a finite 0 in hand, and no gradient comes back."""
    query, key, value = qkv(1, 5, 5, 1, 1, 4)
    key = key.at[:, 4].set(1e18)

    def explosive(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return x * x * x

    def loss(query: Any) -> Any:
        out = attention(
            query, key, value, mask=lambda b, h, q, k: k < 4, score=explosive, backend=backend
        )
        return (out**2).sum()

    value_, slope = jax.jit(jax.value_and_grad(loss))(query)
    assert np.isfinite(value_)
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0


@arguments
def test_scale_may_be_traced(backend: str) -> None:
    inputs = qkv(1, 5, 5, 1, 1, 4)
    got = jax.jit(lambda s: attention(*inputs, scale=s, backend=backend))(0.3)
    np.testing.assert_allclose(got, attend(*inputs, scale=0.3).out, rtol=1e-5, atol=1e-6)


# --- weights, sinks -------------------------------------------------------------------------------


def test_attention_weights() -> None:
    B, T, S, N = 2, 6, 7, 4
    query, key, value = qkv(B, T, S, N, 2, 8)
    case = MASKS["nobody_sees_some"](B, N, T, S)
    slopes = SCORES["alibi"](B, N, T, S)
    at = {"q": np.arange(T) + 1}
    gold = attend(
        query, key, value, cells(case.cell, B, N, T, S, **at), score=slopes, scale=0.5, at=at
    )
    weights = functools.partial(
        ja.attention_weights, query, key, mask=case.mask, scale=0.5,
        score=scores.alibi(jnp.asarray(slopes.params[0], jnp.float32)),
        positions=ja.Positions(q=jnp.asarray(at["q"])),
    )  # fmt: skip
    got = weights()
    assert got.shape == (B, N, T, S)
    np.testing.assert_allclose(got, gold.weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), np.isfinite(gold.lse).transpose(0, 2, 1), rtol=1e-6)
    sinks = jnp.asarray([0.0, 1.0, -2.0, 30.0])
    shared = weights(sinks=sinks)
    share = 1 / (1 + np.exp(np.asarray(sinks, np.float64) - gold.lse)).transpose(0, 2, 1)
    np.testing.assert_allclose(shared.sum(-1), share, rtol=1e-5)


def test_a_sink_is_one_more_logit(backend: str) -> None:
    """As a key of logit `sinks` with value 0, and outside the LSE."""
    query, key, value = qkv(1, 4, 5, 2, 2, 8)
    sinks = jnp.asarray([0.5, -1.0])
    out, lse = attention(query, key, value, sinks=sinks, return_lse=True, backend=backend)
    logits = np.einsum("btnh,bsnh->bnts", query, key) * 8**-0.5
    column = np.broadcast_to(np.asarray(sinks)[None, :, None, None], (1, 2, 4, 1))
    e = np.exp(np.concatenate([logits, column], -1))
    weights = (e / e.sum(-1, keepdims=True))[..., :-1]
    np.testing.assert_allclose(
        out, np.einsum("bnts,bsnh->btnh", weights, value), rtol=1e-4, atol=1e-5
    )
    _, plain = attention(query, key, value, return_lse=True, backend=backend)
    same_bits(lse, plain)


# --- positions ------------------------------------------------------------------------------------


def test_decoding_gives_the_rows_of_the_whole(backend: str) -> None:
    """One query at a time, the cache full of garbage beyond it; then in chunks."""
    T = 8
    query, key, value = qkv(2, T, T, 2, 1, 8)
    mask = masks.causal() & masks.sliding_window(4)
    score = scores.alibi(0.3)
    whole = attention(query, key, value, mask=mask, score=score, backend=backend)

    @functools.partial(jax.jit, static_argnames="n")
    def rows(query: Any, key: Any, value: Any, first: Any, n: int) -> Any:
        at = ja.Positions(q=first + jnp.arange(n))
        chunk = jax.lax.dynamic_slice_in_dim(query, first, n, 1)
        return attention(chunk, key, value, mask=mask, score=score, positions=at, backend=backend)

    for first in range(T):
        future = (jnp.arange(T) > first)[None, :, None, None]
        cache = [jnp.where(future, 1e4, x) for x in (key, value)]
        got = rows(query, *cache, first, 1)
        np.testing.assert_allclose(got, whole[:, first : first + 1], rtol=1e-5, atol=1e-6)
    chunks = [rows(query, key, value, first, 4) for first in (0, 4)]
    np.testing.assert_allclose(jnp.concatenate(chunks, 1), whole, rtol=1e-5, atol=1e-6)


def test_keys_in_any_order(backend: str) -> None:
    """A ring buffer: keys in storage order, with their positions."""
    query, key, value = qkv(2, 5, 8, 2, 1, 8)
    mask, score = masks.sliding_window(3, 1), scores.alibi(0.5)
    options = dict(mask=mask, score=score, dropout_rate=0.3, dropout_seed=5, backend=backend)
    want = attention(query, key, value, **options)
    order = jnp.asarray([5, 6, 7, 0, 1, 2, 3, 4])
    at = ja.Positions(k=order)
    got = attention(query, key[:, order], value[:, order], positions=at, **options)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # Each row its own order.
    orders = jnp.stack([order, jnp.arange(8)])
    rows = jnp.arange(2)[:, None]
    at = ja.Positions(k=orders)
    got = attention(query, key[rows, orders], value[rows, orders], positions=at, **options)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_bottom_right_and_ragged_rows(backend: str) -> None:
    B, T, S = 2, 3, 7
    inputs = qkv(B, T, S, 2, 2, 8)
    at = ja.Positions(q=jnp.arange(T) + S - T)
    got = attention(*inputs, mask=masks.causal(), positions=at, backend=backend)
    want = attention(*inputs, mask=masks.causal(S - T), backend=backend)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    gold = attend(*inputs, np.tri(T, S, S - T, dtype=bool)[None, None])
    np.testing.assert_allclose(got, gold.out, rtol=1e-5, atol=1e-6)
    length = jnp.asarray([2, 4])
    at = ja.Positions(q=length[:, None] + jnp.arange(T)[None])
    got = attention(*inputs, mask=masks.causal(), positions=at, backend=backend)
    want = attention(*inputs, mask=masks.causal(length), backend=backend)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_positions_of_rows_and_heads(backend: str) -> None:
    """A shard of a batch and of heads says which ones it has."""
    B, T, S, N = 4, 4, 5, 4
    query, key, value = qkv(B, T, S, N, N, 8)
    lengths, windows = jnp.asarray([1, 3, 5, 2]), jnp.asarray([0, 1, 2, 3])

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k < lengths[b * 1]) & (q - k <= windows[h * 1])

    options = dict(mask=mask, dropout_rate=0.4, dropout_seed=9, backend=backend)
    whole = attention(query, key, value, **options)
    at = ja.Positions(b=jnp.asarray([2, 3]), h=jnp.asarray([2, 3]))
    shard = [x[2:, :, 2:] for x in (query, key, value)]
    got = attention(*shard, positions=at, **options)
    np.testing.assert_allclose(got, whole[2:, :, 2:], rtol=1e-5, atol=1e-6)


# --- dropout --------------------------------------------------------------------------------------


def dropped(
    backend: str, T: int, S: int, B: int = 1, N: int = 1, dtype: Any = jnp.float32, **o: Any
) -> Any:
    """The weights after dropout, `[B, N, T, S]`, read off with an identity as value."""
    eye = jnp.broadcast_to(jnp.eye(S, dtype=dtype)[None, :, None], (B, S, N, S))
    zeros = jnp.zeros((B, T, N, 4), dtype)
    out = attention(zeros, jnp.zeros((B, S, N, 4), dtype), eye, backend=backend, **o)
    return jnp.moveaxis(out, 2, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_is_the_hash_of_positions(backend: str, dtype: str) -> None:
    B, N, T, S = 2, 3, 5, 16
    got = dropped(backend, T, S, B, N, jnp.dtype(dtype), dropout_rate=0.25, dropout_seed=123)
    keep = kept((123, 0), 0.25, *grid(B, N, T, S))
    np.testing.assert_array_equal(np.asarray(got, np.float32) != 0, keep)
    np.testing.assert_allclose(np.asarray(got, np.float32)[keep], 1 / 16 / 0.75, rtol=4e-3)
    at = {"b": np.array([7, 3]), "q": np.arange(T) + 10, "k": np.arange(S)[::-1].copy()}
    positions = ja.Positions(**{n: jnp.asarray(x) for n, x in at.items()})
    got = dropped(
        backend, T, S, B, N, jnp.dtype(dtype), dropout_rate=0.25, dropout_seed=123,
        positions=positions,
    )  # fmt: skip
    keep = kept((123, 0), 0.25, *grid(B, N, T, S, **at))
    np.testing.assert_array_equal(np.asarray(got, np.float32) != 0, keep)


def test_dropout_depends_on_positions_not_on_the_call(backend: str) -> None:
    """Any part of a call drops what the whole drops."""
    options = dict(dropout_rate=0.5, dropout_seed=jnp.uint32(5))
    whole = np.asarray(dropped(backend, 12, 10, 3, 2, **options)) != 0
    part = dropped(backend, 4, 10, 1, 2, positions=ja.Positions(
        b=jnp.asarray([1]), q=jnp.arange(6, 10)), **options)  # fmt: skip
    np.testing.assert_array_equal(np.asarray(part)[0] != 0, whole[1, :, 6:10])


def test_dropout_rates_zero_and_one(backend: str) -> None:
    inputs = qkv(1, 4, 5, 2, 2, 8)
    plain = attention(*inputs, backend=backend)
    same_bits(attention(*inputs, dropout_rate=0.0, backend=backend), plain)
    got = attention(*inputs, dropout_rate=jnp.float32(0), dropout_seed=3, backend=backend)
    np.testing.assert_allclose(got, plain, rtol=1e-6)
    np.testing.assert_array_equal(
        attention(*inputs, dropout_rate=1.0, dropout_seed=3, backend=backend), 0
    )
    slope = jax.grad(
        lambda q: attention(q, *inputs[1:], dropout_rate=1.0, dropout_seed=3, backend=backend).sum()
    )(inputs[0])
    np.testing.assert_array_equal(slope, 0)


@arguments
def test_dropout_seeds(backend: str) -> None:
    """Python ints, NumPy and JAX uint32, typed and raw keys, traced or not."""
    run = jax.jit(lambda seed: dropped(backend, 6, 20, dropout_rate=0.5, dropout_seed=seed))
    by_int = dropped(backend, 6, 20, dropout_rate=0.5, dropout_seed=7)
    for seed in (np.uint32(7), jnp.uint32(7)):
        same_bits(dropped(backend, 6, 20, dropout_rate=0.5, dropout_seed=seed), by_int)
        same_bits(run(seed), by_int)
    keys = jax.random.split(jax.random.key(0), 4)
    by_key = [np.asarray(run(key)) for key in keys]
    same_bits(dropped(backend, 6, 20, dropout_rate=0.5, dropout_seed=keys[0]), by_key[0])
    same_bits(run(jax.random.key_data(keys[0])), by_key[0])
    for i in range(4):
        assert all((by_key[i] != by_key[j]).any() for j in range(i))
    many = jax.vmap(run)(keys)
    np.testing.assert_array_equal(many != 0, np.stack(by_key) != 0)
    big = dropped(backend, 6, 20, dropout_rate=0.5, dropout_seed=2**32 - 1)
    assert (np.asarray(big) != np.asarray(by_int)).any()
    rbg = dropped(backend, 6, 20, dropout_rate=0.5, dropout_seed=jax.random.key(1, impl="rbg"))
    assert 0.2 < (np.asarray(rbg) != 0).mean() < 0.8


@arguments
def test_a_vmapped_axis_has_a_seed_for_each(backend: str) -> None:
    """One seed would drop the same weights in every example."""
    query, key, value = (x[:, None] for x in qkv(3, 5, 6, 2, 1, 8))

    def run(query: Any, seed: Any) -> Any:
        return attention(
            query, key[0], value[0], dropout_rate=0.5, dropout_seed=seed, backend=backend
        )

    for f in (run, lambda *args: jax.grad(lambda q: run(q, *args[1:]).sum())(args[0])):
        with pytest.raises(ValueError, match=r"dropout_seed: got one seed for all 3 elements"):
            jax.vmap(f, (0, None))(query, jnp.uint32(1))
        seeds = jnp.arange(3, dtype=jnp.uint32)
        for i, got in enumerate(jax.vmap(f)(query, seeds)):
            np.testing.assert_allclose(got, f(query[i], seeds[i]), rtol=1e-4, atol=1e-5)
    # As the message says, for who wants it.
    same = jax.vmap(run)(query, jnp.broadcast_to(jnp.uint32(1), (3,)))
    np.testing.assert_allclose(same[2], run(query[2], jnp.uint32(1)), rtol=1e-4, atol=1e-5)


@arguments
def test_the_rate_of_dropout_has_no_gradient(backend: str) -> None:
    inputs = qkv(1, 5, 6, 2, 1, 8)

    def loss(rate: Any) -> Any:
        out = attention(*inputs, dropout_rate=rate, dropout_seed=1, backend=backend)
        return (out**2).sum()

    assert jax.jit(jax.grad(loss))(0.3) == 0
    assert jax.jit(lambda r: jax.jvp(loss, (r,), (r,))[1])(0.3) == 0


def test_dropout_keeps_the_mean(backend: str) -> None:
    inputs = qkv(1, 3, 6, 1, 1, 4)
    run = jax.jit(lambda s: attention(*inputs, dropout_rate=0.3, dropout_seed=s, backend=backend))
    many = np.asarray(jax.lax.map(run, jnp.arange(3000, dtype=jnp.uint32)))
    error = np.abs(many.mean(0) - np.asarray(attention(*inputs, backend=backend)))
    assert (error < 5 * many.std(0) / np.sqrt(3000)).all()


def draws(seed: int, rate: float, B: int, N: int, T: int, S: int) -> np.ndarray:
    at = ja.Positions().filled(B, N, T, S)
    keys = base.row_keys(
        jnp.asarray([seed, 0], jnp.uint32), at.b[:, None, None, None], at.h[None, :, None, None],
        at.q[:, None, :, None],
    )  # fmt: skip
    return np.asarray(base.keeps(keys, at.k[:, None, None, :], rate))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_dropout_rate_is_the_rate(rate: float) -> None:
    """Within 5 sigma over all cells; over rows, columns and heads as a binomial spreads."""
    keep = draws(1, rate, 2, 4, 256, 256)
    sigma = np.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - (1 - rate)) < 5 * sigma / np.sqrt(keep.size)
    for axes in [(2,), (3,), (0, 1, 2), (0, 1, 3), (2, 3)]:
        means = keep.mean(axis=axes)
        n = keep.size / means.size
        z = (means - (1 - rate)) / (sigma / np.sqrt(n))
        assert abs(z).max() < 6.5
        # Not more even than chance, either.
        if z.size > 500:
            assert 0.9 < z.std() < 1.1


def test_dropout_is_uncorrelated() -> None:
    """Between neighbours along every axis, between shifted rows, and between seeds."""
    keep = draws(3, 0.5, 3, 4, 128, 256) - 0.5
    limit = 5 / np.sqrt(keep.size / 2) / 2 * 1.5

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(abs((a * b).mean() * 4))

    for axis in range(4):
        for lag in (1, 2):
            ahead, behind = (np.take(keep, range(*r), axis) for r in (
                (lag, keep.shape[axis]), (0, keep.shape[axis] - lag)))  # fmt: skip
            assert correlation(ahead, behind) < limit * 2
    for shift in (1, 3, 17):
        a, b = keep[:, :, 1:, shift:], keep[:, :, :-1, :-shift]
        assert correlation(a, b) < limit * 2
    for seed in (2, 4, 3 + 2**16, 3 + 2**31):
        assert correlation(keep, draws(seed, 0.5, 3, 4, 128, 256) - 0.5) < limit * 2


# --- transformations ------------------------------------------------------------------------------


def loss_of(backend: str, mask: Any = None, **options: Any) -> Any:
    def loss(query: Any, key: Any, value: Any) -> Any:
        mask_ = masks.causal() if mask is None else mask
        return (attention(query, key, value, mask=mask_, backend=backend, **options) ** 2).sum()

    return loss


def test_jit_checkpoint_and_scan(backend: str) -> None:
    inputs = qkv(1, 5, 5, 2, 2, 8)
    loss = loss_of(backend)
    want = jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)
    close_to = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close_to, jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*inputs), want)

    def body(carry: Any, _: Any) -> Any:
        return carry, jax.grad(loss, (0, 1, 2))(*carry)

    _, scanned = jax.lax.scan(body, inputs, None, length=2)
    jax.tree.map(lambda s, w: close_to(s[1], w), scanned, want)

    def layers(x: Any) -> Any:
        def layer(x: Any, n: Any) -> Any:
            return x + attention(x, x, x, mask=masks.sliding_window(n), backend=backend), None

        return (jax.lax.scan(layer, x, jnp.asarray([0, 2]))[0] ** 2).sum()

    def by_hand(x: Any) -> Any:
        for n in (0, 2):
            x = x + attention(x, x, x, mask=masks.sliding_window(n), backend=backend)
        return (x**2).sum()

    close_to(jax.jit(jax.grad(layers))(inputs[0]), jax.jit(jax.grad(by_hand))(inputs[0]))


def test_vmap_is_a_loop(backend: str) -> None:
    """Over inputs, over some of them, over leaves of the mask, of gradients."""
    M = 3
    inputs = [x.reshape(M, 2, *x.shape[1:]) for x in qkv(2 * M, 5, 5, 2, 1, 8)]
    lengths = jnp.asarray([5, 2, 0])

    def run(query: Any, key: Any, value: Any, n: Any) -> Any:
        mask = masks.key_padding(lengths=n) & (lambda b, h, q, k: k <= q + n)
        return attention(query, key, value, mask=mask, sinks=jnp.ones(2), backend=backend)

    def slope(*args: Any) -> Any:
        return jax.grad(lambda *a: (run(*a) ** 2).sum(), (0, 1, 2))(*args)

    one, one_slope = jax.jit(run), jax.jit(slope)
    for axes in [(0, 0, 0, 0), (0, None, None, None), (None, None, None, 0)]:

        def at(i: int, axes: Any = axes) -> Any:
            arrays = (*inputs, lengths)
            return [x[i] if a == 0 else x[0] for x, a in zip(arrays, axes, strict=True)]

        given = [x if a == 0 else x[0] for x, a in zip((*inputs, lengths), axes, strict=True)]
        for f, loop in ((run, one), (slope, one_slope)):
            got = jax.jit(jax.vmap(f, axes))(*given)
            for i in range(M):
                jax.tree.map(
                    lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-5),
                    got, loop(*at(i)),
                )  # fmt: skip


def test_same_bits_every_time(backend: str) -> None:
    inputs = qkv(2, 9, 9, 4, 2, 8)
    compute, _, _ = everything(
        *inputs, sinks=jnp.ones(4), mask=masks.causal(), dropout_rate=0.1, dropout_seed=1,
        backend=backend,
    )  # fmt: skip
    first = compute(*inputs)
    for _ in range(3):
        same_bits(compute(*inputs), first)


def test_debug_nans_is_clean(backend: str) -> None:
    """With dead rows, dead keys, sinks, dropout and a learned score."""
    inputs = qkv(2, 5, 6, 4, 2, 8)
    with jax.debug_nans(True):
        compute, _, _ = everything(
            *inputs, scores.soft_cap, (jnp.float32(2),), jnp.ones(4),
            mask=MASKS["nobody_sees_some"](2, 4, 5, 6).mask, dropout_rate=0.5, dropout_seed=1,
            backend=backend,
        )  # fmt: skip
        jax.block_until_ready(compute(*inputs))
        out = attention(*inputs, mask=masks.empty(), backend=backend)
        np.testing.assert_array_equal(out, 0)


def test_debug_infs_is_clean(backend: str) -> None:
    """The LSE of a dead row is -inf, and no result that anyone asked for."""
    inputs = qkv(2, 5, 6, 4, 2, 8)
    mask = MASKS["nobody_sees_some"](2, 4, 5, 6).mask
    with jax.debug_infs(True):

        def run(*inputs: Any) -> Any:
            return attention(*inputs, mask=mask, sinks=jnp.ones(4), backend=backend)

        jax.block_until_ready(run(*inputs))
        grads = jax.grad(lambda *inputs: run(*inputs).sum(), (0, 1, 2))(*inputs)
        assert all(np.isfinite(grad).all() for grad in grads)


def test_no_tracer_leaks(backend: str) -> None:
    inputs = qkv(1, 4, 4, 2, 2, 8)
    # After each trace all of memory is searched: what is older than this test need not be.
    gc.collect()
    gc.freeze()
    with jax.checking_leaks():

        @jax.jit
        def run(query: Any, key: Any, value: Any, n: Any, slope: Any) -> Any:
            def loss(query: Any, slope: Any) -> Any:
                return attention(
                    query, key, value, mask=lambda b, h, q, k: q - k < n,
                    score=lambda x, b, h, q, k: x * slope, backend=backend,
                ).sum()  # fmt: skip

            return jax.grad(loss, (0, 1))(query, slope)

        jax.block_until_ready(run(*inputs, 2, 0.5))
    gc.unfreeze()


def test_forward_mode_and_second_order_of_the_definition() -> None:
    """Against finite differences in float64, with a dead row, sinks and a learned score."""
    with jax.enable_x64(True):
        query, key, value = qkv(1, 3, 4, 2, 1, 3, dtype=jnp.float64)
        # Row 1 sees nothing.
        mask = jnp.asarray(np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], bool))

        @jax.jit
        def loss(query: Any, key: Any, value: Any, cap: Any, sinks: Any) -> Any:
            out, lse = ja.attention(
                query, key, value, mask=mask, score=scores.soft_cap(cap), sinks=sinks,
                return_lse=True, backend="dense",
            )  # fmt: skip
            return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        args = (query, key, value, jnp.float64(1.3), jnp.asarray([0.2, -0.5]))
        make = rng(12)
        towards = [jnp.asarray(make.normal(size=a.shape)) for a in args]

        def along(t: Any) -> Any:
            return loss(*(a + t * d for a, d in zip(args, towards, strict=True)))

        first, second = jax.grad(along), jax.grad(jax.grad(along))
        step = 1e-4
        slope = (along(step) - along(-step)) / (2 * step)
        np.testing.assert_allclose(first(0.0), slope, rtol=1e-6)
        np.testing.assert_allclose(jax.jvp(loss, args, tuple(towards))[1], slope, rtol=1e-6)
        bend = (along(step) - 2 * along(0.0) + along(-step)) / step**2
        np.testing.assert_allclose(second(0.0), bend, rtol=1e-5)
        hvp = jax.jvp(jax.grad(loss, tuple(range(5))), args, tuple(towards))[1]
        total = sum((h * d).sum() for h, d in zip(hvp, towards, strict=True))
        np.testing.assert_allclose(total, bend, rtol=1e-5)
        assert all(np.isfinite(h).all() for h in hvp)


# --- values never retrace -------------------------------------------------------------------------


def test_values_never_retrace(backend: str, compilations: Any) -> None:
    """Lengths, ids, windows, offsets, prefixes, positions, seeds, rates: one compilation."""
    inputs = qkv(2, 6, 6, 2, 2, 8)

    def call(i: int) -> Any:
        ids = jnp.asarray(np.sort(rng(i).integers(0, 3, (2, 6))), jnp.int32)
        longer = jnp.pad(ids, ((0, 0), (0, 3)), mode="edge")
        mask = (
            masks.causal(1 + i) & masks.segments(longer, ids) & masks.sliding_window(i + 1, i)
            | masks.prefix_lm(i) & masks.key_padding(lengths=jnp.asarray([i, 6]))
            | masks.global_tokens(i) & masks.chunked(i + 1) & masks.dilated(i + 1)
        )
        score = scores.chain(scores.alibi(0.1 * i), scores.soft_cap(5.0 + i))
        at = ja.Positions(q=jnp.arange(6) + i)
        options = {"dropout_rate": 0.1 + 0.1 * i, "dropout_seed": i, "scale": 0.5 + i}
        return attention(*inputs, mask=mask, score=score, positions=at, backend=backend, **options)

    first = call(1)
    compilations.reset()
    later = [call(i) for i in (2, 3)]
    assert compilations.count == 0
    assert (np.asarray(first) != np.asarray(later[0])).any()


@arguments
def test_a_mask_is_an_argument_of_jit(backend: str) -> None:
    """The user's function is traced once for all values of the mask's leaves."""
    inputs = qkv(2, 6, 6, 2, 2, 8)
    traced = []

    @jax.jit
    def run(mask: Any, score: Any) -> Any:
        traced.append(mask)
        return attention(*inputs, mask=mask, score=score, backend=backend)

    def make(n: int) -> Any:
        mask = masks.causal() & masks.sliding_window(n) | masks.key_padding(
            lengths=jnp.asarray([n, 1])
        )
        return mask, scores.soft_cap(1.0 * n)

    got = [run(*make(n)) for n in (1, 2, 3)]
    assert len(traced) == 1
    for n in (1, 2, 3):
        mask, score = make(n)
        want = attention(*inputs, mask=mask, score=score, backend=backend)
        np.testing.assert_allclose(got[n - 1], want, rtol=1e-5, atol=1e-6)


@arguments
def test_a_fresh_lambda_is_compiled_once(backend: str, compilations: Any) -> None:
    inputs = qkv(2, 6, 6, 2, 2, 8)

    def call(limit: Any, factor: float) -> Any:
        return attention(
            *inputs, mask=lambda b, h, q, k: (q - k < limit) & (k != 3),
            score=lambda x, b, h, q, k: x * 0.5 + factor * x, backend=backend,
        )  # fmt: skip

    limits = [jnp.int32(i) for i in (1, 2, 3)]
    call(limits[0], 2.0)
    compilations.reset()
    got = [call(limit, 2.0) for limit in limits]
    assert compilations.count == 0, "an array that a lambda captures is data"
    assert (np.asarray(got[1]) != np.asarray(got[2])).any()
    # A Python number is part of the function, not data: another number, another program.
    other = call(limits[0], 3.0)
    assert compilations.count > 0
    assert (np.asarray(other) != np.asarray(got[0])).any()


# --- data parallelism -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "kind"),
    [
        ("batch", "auto"),
        ("heads", "explicit"),
        pytest.param("batch", "explicit", marks=pytest.mark.deep),
        pytest.param("heads", "auto", marks=pytest.mark.deep),
    ],
)
def test_sharded_inputs_stay_where_they_are(backend: str, axis: str, kind: str) -> None:
    types = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}
    mesh = jax.make_mesh((4,), ("x",), axis_types=(types[kind],), devices=jax.devices()[:4])
    spec = jax.P("x") if axis == "batch" else jax.P(None, None, "x")
    inputs = qkv(4, 6, 6, 4, 4, 8)
    mask = masks.causal() & masks.key_padding(lengths=jnp.asarray([6, 3, 0, 1]))
    options = dict(mask=mask, dropout_rate=0.2, dropout_seed=1, backend=backend)
    slope = jax.grad(lambda *args: (attention(*args, **options) ** 2).sum(), (0, 1, 2))
    want = jax.jit(slope)(*inputs)
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        placed = [jax.device_put(x, sharding) for x in inputs]
        compiled = jax.jit(slope).lower(*placed).compile()
        text = compiled.as_text()
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in text
        got = compiled(*placed)
    for g, w in zip(got, want, strict=True):
        assert g.sharding.is_equivalent_to(sharding, g.ndim)
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)

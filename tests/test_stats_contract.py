"""The contract of attention, over statistics: every pair of features, on all that take them.

Gold is float64 NumPy, from weights written out. Gradients are held against those of the formula in
float64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, grid, rng
from test_attention import PAIRS, features, many_tiles, named

import jaxattn as ja
from jaxattn import masks, stats
from jaxattn.backends import base

__all__ = ["many_tiles"]

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("many_tiles")]
MEANS = ("entropy", "far", "square", "headed", "first")


def asked(slope: Any, weight: Any) -> dict[str, stats.Stat]:
    return {
        "top": stats.max(),
        "near": stats.max(lambda x, b, h, q, k: -abs(q - k)),
        "key": stats.argmax(),
        "entropy": stats.entropy(),
        "far": stats.mean(lambda x, b, h, q, k: abs(q - k)),
        "square": stats.mean(lambda x, b, h, q, k: x * x),
        "headed": stats.mean(lambda x, b, h, q, k: slope[h] * x),
        "first": stats.mass(masks.global_tokens(3)),
        "received": stats.received(weight),
    }


def written_out(
    query: Any, key: Any, by_hand: dict[str, Any], slope: Any, weight: Any, dtype: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The statistics from the weights, in NumPy; and the logits, -inf where they are masked."""
    query, key, slope, weight = (np.asarray(a).astype(dtype) for a in (query, key, slope, weight))
    (B, T, N, H), (_, S, K, _) = query.shape, key.shape
    scale = dtype(by_hand.get("scale", H**-0.5))
    keys = key.transpose(0, 2, 1, 3).repeat(N // K, axis=1)
    x = (query.transpose(0, 2, 1, 3) @ keys.swapaxes(2, 3)) * scale
    place = b, h, q, k = grid(B, N, T, S, **by_hand["at"])
    if "score" in by_hand:
        score = by_hand["score"]
        x = score.value(x, *place, *score.params).astype(dtype)
    seen = np.broadcast_to(by_hand.get("seen", True), x.shape)
    x = np.where(seen, x, 0)
    masked = np.where(seen, x, -np.inf)
    alive = seen.any(-1)
    top = np.where(alive, masked.max(-1, initial=-np.inf), 0)
    e = np.where(seen, np.exp(x - top[..., None]), 0)
    sink = np.zeros((1, N, 1), dtype)
    if "sinks" in by_hand:
        sink = np.exp(np.asarray(by_hand["sinks"]).astype(dtype)[None, :, None] - top)
    total = np.where(alive, e.sum(-1) + sink, 1)
    p, left = e / total[..., None], np.where(alive, sink / total, 0)
    distance = np.abs(q - k).astype(dtype)

    def surprise(p: np.ndarray) -> np.ndarray:
        return -p * np.log(np.where(p > 0, p, 1))

    found = {
        "top": masked.max(-1),
        "near": np.where(seen, -distance, -np.inf).max(-1),
        "entropy": surprise(p).sum(-1) + surprise(left),
        "far": (p * distance).sum(-1),
        "square": (p * x**2).sum(-1),
        "headed": (p * x).sum(-1) * slope[:, None],
        "first": (p * (np.minimum(q, k) < 3)).sum(-1),
        "received": (p * weight.transpose(0, 2, 1)[..., None]).sum(2),
    }
    return {name: array.swapaxes(1, 2) for name, array in found.items()}, masked.swapaxes(1, 2)


def slopes(inputs: Any, given: dict[str, Any], more: Any, backend: str) -> Any:
    """Statistics, and the gradients of a sum of the means."""
    options = {n: a for n, a in given.items() if n not in ("make", "params")}
    query, _, value = inputs

    def loss(query: Any, key: Any, params: Any, slope: Any) -> Any:
        score = given["make"](*params) if "make" in given else None
        _, seen = ja.attention(
            query, key, value, score=score, stats=asked(slope, more[1]), backend=backend, **options
        )
        by = rng(31).standard_normal((len(MEANS), *query.shape[:3]))
        total = sum((seen[name] * w).sum() for name, w in zip(MEANS, by, strict=True))
        return total, seen

    args = (*inputs[:2], given.get("params", ()), more[0])
    grads, seen = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*args)
    return seen, grads


ROWS = [row for row in PAIRS if max(row["lengths"]) < 500]


@pytest.mark.parametrize(
    ("row", "backend"),
    [
        pytest.param(
            row, backend, id=f"{named(row)}-{backend}",
            marks=() if n % every == 0 else pytest.mark.deep,
        )
        for n, row in enumerate(ROWS)
        for backend, every in (("tiled", 3), ("dense", 9), ("decode", 1))
        if backend != "decode" or row["lengths"][0] * row["heads"][0] <= 16
    ],
)  # fmt: skip
def test_every_pair_of_features(backend: str, row: dict[str, Any]) -> None:
    with jax.enable_x64(row["dtype"] == "float64"):
        inputs, given, by_hand = features(row)
        B, T, N, _ = inputs[0].shape
        wide = base.accumulator(inputs[0].dtype)
        slope = jnp.asarray(rng(32).standard_normal(N), wide)
        weight = jnp.asarray(rng(33).random((B, T, N)), wide)
        seen, grads = slopes(inputs, given, (slope, weight), backend)
        gold, logits = written_out(*inputs[:2], by_hand, slope, weight, np.float64)
        plain, _ = written_out(*inputs[:2], by_hand, slope, weight, np.dtype(wide).type)
        key = np.asarray(seen.pop("key"))
        assert key.dtype == np.int32
        for name, array in seen.items():
            assert array.dtype == wide, name
            # Weights are multiplied in 16 bits where inputs have 16.
            kind = inputs[0].dtype if name == "received" else wide
            close(array, gold[name], plain[name], kind, name)
        at = by_hand["at"].get("k", np.arange(logits.shape[-1]))
        index = np.argsort(at)[np.maximum(key, 0)][..., None]
        best = np.take_along_axis(logits, index, -1)[..., 0]
        alive = np.isfinite(gold["top"])
        np.testing.assert_array_equal(key == -1, ~alive)
        np.testing.assert_allclose(best[alive], gold["top"][alive], atol=1e-5)
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda a: jnp.asarray(a, np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            (inputs, {n: a for n, a in given.items() if n != "mask" and hasattr(a, "dtype")}),
        )
        told = given | exact[1]
        told["params"] = tuple(jnp.asarray(a, np.float64) for a in given.get("params", ()))
        more = (jnp.asarray(slope, np.float64), jnp.asarray(weight, np.float64))
        _, right = slopes(exact[0], told, more, "dense")
    narrow = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 2e-4}
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(right), strict=True):
        scale = np.abs(other).max(initial=0.1)
        atol = narrow.get(np.dtype(inputs[0].dtype), 3e-2) * scale
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=atol)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_seen_is_felt_alike(poison: float) -> None:
    """NaN and infinities in keys, values and queries reach what they reach in the formula."""
    draw = rng(34)
    B, T, S, N, K, H = 1, 24, 40, 4, 2, 8
    q, k, v = (
        jnp.asarray(draw.standard_normal(shape), np.float32)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    )
    spoiled = {
        "query": (q.at[0, 3, 1, 0].set(poison), k, v),
        "key": (q, k.at[0, 7, 0, 0].set(poison), v),
        "value": (q, k, v.at[0, 5, 1].set(poison)),
    }

    def run(arrays: Any, backend: str) -> Any:
        given = asked(jnp.ones(N), jnp.ones((B, T, N)))
        mask = masks.causal(2) & (lambda b, h, q, k: q != 9)
        return ja.attention(*arrays, mask=mask, stats=given, backend=backend)

    for where, arrays in spoiled.items():
        got, right = run(arrays, "tiled"), run(arrays, "dense")
        if where == "key":
            # What a query gives that sees an infinite key is NaN, as a gradient is, even where the
            # logit is -inf.
            lost = np.isnan(got[1]["received"])
            assert lost[np.isnan(right[1]["received"])].all()
            assert not lost.all()
            right[1]["received"] = np.where(lost, np.nan, right[1]["received"])
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=where)


def small() -> tuple[Any, Any, Any]:
    q, k, v = rng(35).standard_normal((3, 2, 24, 4, 8))
    return tuple(jnp.asarray(a, np.float32) for a in (q, k[:, :, :2], v[:, :, :2]))  # type: ignore[return-value]


def spread_out(query: Any, key: Any, value: Any, slope: Any, backend: str) -> Any:
    """A number of the output, the entropy and a mean with an array that learns."""
    given = [stats.entropy(), stats.mean(lambda x, b, h, q, k: jnp.sin(slope[h] * x))]
    out, seen = ja.attention(
        query, key, value, mask=masks.causal(), stats=given, backend=backend, return_lse=False
    )
    return jnp.sin(out).sum() + jnp.cos(seen[0]).sum() + (seen[1] ** 2).sum()


def test_forward_mode_and_second_derivatives() -> None:
    args = (*small(), jnp.linspace(0.5, 1.5, 4))
    moved = tuple(jnp.cos(a) for a in args)

    def found(backend: str) -> Any:
        def slope(*args: Any) -> Any:
            return jax.grad(partial(spread_out, backend=backend), (0, 1, 2, 3))(*args)

        return jax.jit(lambda args, moved: jax.jvp(slope, args, moved))(args, moved)

    for one, other in zip(*map(jax.tree.leaves, map(found, ("tiled", "dense"))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_scan_and_remat_over_layers() -> None:
    """Statistics of every layer, and their gradients, through layers that are computed again."""
    q, k, v = small()

    def total(q: Any, rematted: bool, scanned: bool) -> Any:
        def layer(x: Any, _: Any) -> Any:
            out, seen = ja.attention(
                x, k, v, mask=masks.causal(), stats=stats.entropy(), backend="tiled"
            )
            return x + out, seen

        layer = jax.checkpoint(layer) if rematted else layer
        if scanned:
            x, seen = jax.lax.scan(layer, q, length=2)
        else:
            x, first = layer(q, None)
            x, second = layer(x, None)
            seen = jnp.stack([first, second])
        return (x.sum() + jnp.sin(seen).sum()), seen

    runs = [
        jax.jit(jax.grad(partial(total, rematted=r, scanned=s), has_aux=True))(q)
        for r, s in ((False, False), (True, True))
    ]
    assert runs[1][1].shape == (2, 2, 24, 4)
    for one, other in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_new_values_and_equal_functions_compile_once(compilations: Any) -> None:
    q, k, v = small()

    def run(n: float) -> Any:
        # New functions in every call, with other values inside.
        given = asked(jnp.linspace(0, n, 4), jnp.linspace(n, 1, 24)[:, None])
        return ja.attention(q, k, v, mask=masks.causal(), stats=given)

    first = run(2.0)
    compilations.reset()
    second = run(3.0)
    assert compilations.count == 0
    assert (np.asarray(first[1]["headed"]) != np.asarray(second[1]["headed"])).any()


def test_an_unbatched_call_and_one_without_pairs() -> None:
    q, k, v = small()
    given = asked(jnp.ones(4), jnp.ones((24, 4)))
    _, whole = ja.attention(q[:1], k[:1], v[:1], mask=masks.causal(), stats=given)
    _, alone = ja.attention(q[0], k[0], v[0], mask=masks.causal(), stats=given)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other[0])
    _, none = ja.attention(q, k[:, :0], v[:, :0], stats=given)
    assert none["received"].shape == (2, 0, 4)
    np.testing.assert_array_equal(none["top"], -np.inf)
    np.testing.assert_array_equal(none["key"], -1)
    np.testing.assert_array_equal(none["entropy"], 0)


def test_an_infinite_maximum_spoils_no_gradient() -> None:
    q, k, v = small()

    def total(q: Any, asked: Any) -> Any:
        out, _ = ja.attention(q, k, v, mask=masks.causal(), stats=asked, backend="tiled")
        return jnp.sin(out).sum()

    endless = stats.max(lambda x, b, h, q, k: jnp.where(k == 3, jnp.inf, -jnp.inf))
    got, right = (jax.grad(total)(q, asked) for asked in (endless, stats.max()))
    np.testing.assert_array_equal(got, right)


def test_no_statistics_are_an_empty_tree() -> None:
    q, k, v = small()
    out, seen = ja.attention(q, k, v, stats={})
    assert seen == {}
    np.testing.assert_array_equal(out, ja.attention(q, k, v))
    cache = ja.KVCache.create(batch=2, capacity=24, heads=2, head_dim=8)
    (out, seen), _ = cache.step(q, k, v, mask=masks.causal(), stats={})
    assert seen == {}
    assert out.shape == q.shape

"""Statistics in the same pass: against weights written out, on every backend that takes them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng

import jaxattn as ja
from jaxattn import masks, scores, stats

TAKING = ["dense", "tiled", "auto"]
B, T, S, N, K, H = 2, 24, 40, 4, 2, 8


def inputs(dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    draw = rng(20)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, 5)
    return tuple(jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes)  # type: ignore[return-value]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": masks.causal(3)},
    "empty rows": {"mask": masks.causal(-2) & masks.key_padding(lengths=np.array([S, 0]))},
    "by head": {"mask": masks.sliding_window(np.array([1, 3, 9, 20]))},
    "score": {"mask": masks.causal(8), "score": scores.soft_cap(1.5)},
    "sinks": {"mask": masks.causal(-2), "sinks": np.array([0.0, 1.0, -2.0, 3.0], np.float32)},
    "ragged, small tiles": {"mask": masks.segments(np.arange(T) // 7, np.arange(S) // 9)},
}
FIRST = masks.global_tokens(3)


def asked() -> dict[str, stats.Stat]:
    return {
        "top": stats.max(),
        "near": stats.max(lambda x, b, h, q, k: -jnp.abs(q - k)),
        "key": stats.argmax(),
        "entropy": stats.entropy(),
        "far": stats.mean(lambda x, b, h, q, k: jnp.abs(q - k)),
        "square": stats.mean(lambda x, b, h, q, k: x * x),
        "first": stats.mass(FIRST),
        "received": stats.received(),
    }


def expected(options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same from weights in float64, with loops for nothing."""
    q, k, _ = (np.asarray(a, np.float64) for a in inputs())
    logits = np.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k).reshape(B, N, T, S)
    logits *= H**-0.5
    mask = options.get("mask")
    shape = (B, N, T, S)
    seen = np.ones(shape, bool) if mask is None else np.asarray(mask.dense(T, S, B, N))
    seen = np.broadcast_to(seen, shape)
    if "score" in options:
        logits = 1.5 * np.tanh(logits / 1.5)
    weights = np.where(seen, np.exp(logits), 0)
    sinks = options.get("sinks")
    sink = np.zeros(N) if sinks is None else np.exp(np.asarray(sinks, np.float64))
    total = weights.sum(-1) + sink[:, None]
    p = weights / np.where(total == 0, 1, total)[..., None]
    left = np.where(seen.any(-1), sink[:, None] / np.where(total == 0, 1, total), 0)
    distance = np.abs(np.arange(T)[:, None] - np.arange(S))
    first = np.minimum(np.arange(T)[:, None], np.arange(S)) < 3

    def plogp(p: np.ndarray) -> np.ndarray:
        return p * np.log(np.where(p > 0, p, 1))

    found = {
        "top": np.where(seen, logits, -np.inf).max(-1),
        "near": np.where(seen, -distance, -np.inf).max(-1),
        "key": np.where(seen.any(-1), np.where(seen, logits, -np.inf).argmax(-1), -1),
        "entropy": -plogp(p).sum(-1) - plogp(left),
        "far": (p * distance).sum(-1),
        "square": (p * logits**2).sum(-1),
        "first": (p * first).sum(-1),
        "received": p.sum(2),
    }
    return {name: np.swapaxes(array, 1, 2) for name, array in found.items()}


@pytest.mark.parametrize("backend", TAKING)
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_weights(case: str, backend: str) -> None:
    options = CASES[case]
    q, k, v = inputs()
    out, lse, seen = ja.attention(
        q, k, v, **options, stats=asked(), return_lse=True, backend=backend
    )
    plain = ja.attention(q, k, v, **options, return_lse=True, backend="dense")
    for mine, other in zip((out, lse), plain, strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-6)
    for name, array in expected(options).items():
        assert seen[name].shape == array.shape, name
        np.testing.assert_allclose(seen[name], array, rtol=2e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("sink", [-np.inf, np.inf])
def test_the_entropy_of_a_sink_without_weight_or_with_all_of_it(sink: float) -> None:
    q, k, v = inputs()

    def entropy(sinks: Any, q: Any) -> Any:
        return ja.attention(q, k, v, sinks=sinks, stats=stats.entropy())[1]

    plain = ja.attention(q, k, v, stats=stats.entropy())[1]
    sinks = jnp.full(N, sink)
    np.testing.assert_allclose(entropy(sinks, q), plain if sink < 0 else 0, rtol=2e-5)
    for slope in jax.grad(lambda *given: entropy(*given).sum(), (0, 1))(sinks, q):
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("backend", ["tiled"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_means_are_those_of_the_formula(case: str, backend: str) -> None:
    options = CASES[case]
    q, k, v = inputs()
    slope = jnp.asarray(rng(21).standard_normal(N), jnp.float32)
    draw = rng(22)
    shape = (B, T, N)
    by = [jnp.asarray(draw.standard_normal(shape), jnp.float32) for _ in range(3)]

    def loss(backend: str, q: Any, k: Any, v: Any, slope: Any) -> Any:
        asked = [
            stats.entropy(),
            stats.mean(lambda x, b, h, q, k: slope[h] * jnp.abs(q - k).astype(x.dtype) + x * x),
            stats.mass(FIRST),
        ]
        out, seen = ja.attention(q, k, v, **options, stats=asked, backend=backend)
        return (out * out).sum() + sum((a * w).sum() for a, w in zip(seen, by, strict=True))

    found = [jax.grad(loss, (1, 2, 3, 4))(each, q, k, v, slope) for each in ("dense", backend)]
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=2e-5)


def test_maxima_have_no_gradient() -> None:
    q, k, v = inputs()
    for backend in ("dense", "tiled"):

        def loss(q: Any, backend: str = backend) -> Any:
            _, seen = ja.attention(q, k, v, stats=[stats.max(), stats.argmax()], backend=backend)
            return seen[0].sum() + seen[1].sum().astype(jnp.float32)

        assert not jax.grad(loss)(q).any()


def test_maxima_of_floats_take_no_part_in_gradients() -> None:
    q, k, v = inputs()

    def loss(q: Any, backend: str) -> Any:
        root = stats.max(lambda x, b, h, q, k: x * jnp.sqrt(k.astype(x.dtype)))
        asked = [root, stats.argmax(), stats.entropy()]
        return ja.attention(q, k, v, stats=asked, backend=backend)[1][2].sum()

    found = [jax.grad(loss)(q, backend) for backend in ("dense", "tiled")]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


def test_sums_are_float32_whatever_the_inputs_are() -> None:
    q, k, v = inputs(jnp.bfloat16)
    for backend in TAKING:
        out, seen = ja.attention(q, k, v, stats=asked(), backend=backend)
        assert out.dtype == jnp.bfloat16
        kinds = {name: array.dtype for name, array in seen.items()}
        assert kinds.pop("key") == jnp.int32
        assert set(kinds.values()) == {jnp.dtype(jnp.float32)}


def test_what_keys_receive_has_gradients_in_16_bits() -> None:
    q, k, v = inputs(jnp.bfloat16)

    def loss(q: Any, k: Any, backend: str) -> Any:
        return (ja.attention(q, k, v, stats=stats.received(), backend=backend)[1] ** 2).sum()

    found = [jax.grad(loss, (0, 1))(q, k, backend) for backend in ("dense", "tiled")]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (one, other)), atol=0.02)


@pytest.mark.parametrize("backend", TAKING)
def test_nothing_that_is_hidden_is_felt(backend: str) -> None:
    q, k, v = inputs()
    mask = masks.key_padding(lengths=np.array([S - 9, S - 3]))
    bad = ~np.asarray(mask.dense(T, S, B))[:, 0, 0]
    dirty_k, dirty_v = (jnp.where(bad[..., None, None], jnp.nan, a) for a in (k, v))
    clean = ja.attention(q, k, v, mask=mask, stats=asked(), backend=backend)
    dirty = ja.attention(q, dirty_k, dirty_v, mask=mask, stats=asked(), backend=backend)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("backend", TAKING)
def test_vmap_and_a_batch_are_the_same(backend: str) -> None:
    q, k, v = inputs()

    def alone(q: Any, k: Any, v: Any) -> Any:
        return ja.attention(q, k, v, mask=masks.causal(2), stats=asked(), backend=backend)

    whole = alone(q, k, v)
    each = jax.vmap(alone)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), each, whole)


@pytest.mark.parametrize("backend", ["rows", "cudnn", "triton", "mosaic"])
def test_other_backends_refuse(backend: str) -> None:
    with pytest.raises(ValueError, match=r"does not compute max \(|runs on NVIDIA|need JAX"):
        ja.attention(*inputs(), stats=stats.max(), backend=backend)


def _asked(stat: Any) -> Any:
    return ja.attention(*inputs(), stats=stat)


ERRORS: dict[str, tuple[Any, str]] = {
    "an integer": (lambda: _asked({"a": 3}), r"stats: got 3, expected a pytree of statistics"),
    "an array": (lambda: _asked([jnp.ones(3)]), r"stats: got float32\[3\], expected a pytree"),
    "not called": (lambda: _asked(stats.entropy), r"stats: got <function entropy"),
    "no number": (
        lambda: _asked(stats.mean(lambda x, b, h, q, k: x[None])),
        r"stat\(<lambda>\) .*for one cell it returned float32\[1\], expected a single number",
    ),
    "complex": (
        lambda: _asked(stats.max(lambda x, b, h, q, k: 1j)), r"returned complex64\[\], expected"
    ),
    "arguments of a mask": (
        lambda: _asked(stats.mean(lambda b, h, q, k: q - k)),
        r"takes the arguments \(b, h, q, k\) and is called with \(x, b, h, q, k\)",
    ),
    "length": (
        lambda: _asked(stats.mean(lambda x, b, h, q, k: jnp.ones(S + 1)[k])),
        "got extent 41 along axis 0, which is read at `k`; expected S = 40",
    ),
    "a mask for mean": (lambda: stats.mean(masks.causal()), r"got the mask causal\(\).*mass\(mask\)"),
    "an array for mean": (lambda: stats.mean(jnp.ones((T, S))), r"mean\(fn\): got .* function"),
    "a score for mass": (
        lambda: stats.mass(scores.soft_cap(1.0)), r"mass\(mask\): got the score soft_cap"
    ),
    "a word for mass": (lambda: stats.mass("causal"), r"mass\(mask\): .* say masks.causal"),
    "floats for mass": (lambda: stats.mass(jnp.ones((T, S))), "expected booleans"),
    "heads of mass": (
        lambda: _asked(stats.mass(masks.per_head([masks.causal()] * 3))),
        r"mass\(mask\): got per_head of 3 masks, expected 4",
    ),
    "shape of mass": (
        lambda: _asked(stats.mass(np.ones((T, S + 1), bool))), "expected S = 40"
    ),
    "shape of weights": (
        lambda: _asked(stats.received(jnp.ones((3, T, N)))),
        r"received\(weight\): got shape \[3, 24, 4\], expected .* \[B, T, N\] = \[2, 24, 4\]",
    ),
    "no weights": (lambda: stats.received("all"), r"received\(weight\): got str, expected numbers"),
    "a backend": (
        lambda: ja.attention(*inputs(), stats=stats.max(), backend="rows"),
        r"'rows' can't compute this call: does not compute max \(stats=\); 'dense' and 'tiled'",
    ),
    "another library's name": (
        lambda: ja.attention(*inputs(), return_max_logits=True), r"here it is stats=stats.max\(\)"
    ),
}  # fmt: skip


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_says_what_to_do(name: str) -> None:
    run, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        run()


def test_statistics_say_what_they_are() -> None:
    def distance(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q - k

    asked = stats.mean(distance), stats.entropy(), stats.mass(FIRST), stats.received()
    assert repr(asked) == ("(mean(distance), entropy(), mass(global_tokens(3)), received())")


def test_explain_says_what_takes_another_pass() -> None:
    found = ja.explain(*inputs(), stats=[stats.max(), stats.received()])
    assert "does not compute max, received" in found.others["rows"]
    assert any("received takes another pass" in note for note in found.notes)
    assert not any("pass" in note for note in ja.explain(*inputs(), stats=stats.max()).notes)

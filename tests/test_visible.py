"""`testing.visible`: the mask that a model really applies, read off from the outside."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SQUARE, cells, rng
from flax import linen, nnx
from test_describe import compositions, made

import jaxattn as ja
from jaxattn import masks
from jaxattn.describing.evaluate import cells_of
from jaxattn.testing import visible
from jaxattn.testing.depth import one_layer, power

# Checks of shapes in every small function of `masks.describe` would take most of the time.
pytestmark = pytest.mark.usefixtures("own_errors")

B, S = 2, 12
X = np.asarray(jax.random.normal(jax.random.key(0), (B, S, 4)), np.float32)
TOKENS = rng(1).integers(0, 7, (B, S)).astype(np.int32)
TABLE = rng(2).standard_normal((7, 4)).astype(np.float32)


def model(x: Any, mask: Any, layers: int = 1) -> Any:
    for _ in range(layers):
        heads = x[:, :, None]
        x = x + ja.attention(heads, heads, heads, mask=mask)[:, :, 0]
    return x


# --- what is found is the mask --------------------------------------------------------------------


def attend(query: Any, x: Any, mask: Any) -> Any:
    heads = x.reshape(*x.shape[:2], query.shape[2], -1)
    return ja.attention(query, heads, heads, mask=mask)


# One program for all masks of a shape that are given as arrays.
attend_by_array = jax.jit(attend)


def found(mask: Any, shape: Any) -> np.ndarray:
    """What `visible` finds of an attention layer whose queries do not depend on the inputs."""
    B, N, T, S = shape
    query = jnp.asarray(rng(3).standard_normal((B, T, N, 2)), jnp.float32)
    x = jnp.asarray(rng(4).standard_normal((B, S, N * 2)), jnp.float32)
    if isinstance(mask, np.ndarray):
        array = jnp.asarray(mask)
        seen = visible(
            lambda x: attend_by_array(query, x, array), x, outputs=T, tries=1, backend="calls"
        )
    else:
        seen = visible(lambda x: attend(query, x, mask), x, outputs=T, backend="jax")
    return np.asarray(seen.array)


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), pytest.param((3, 2, 5, 9), marks=pytest.mark.deep)], ids=str
)
def test_every_mask_is_seen_as_an_array(shape: Any) -> None:
    for name, make in MASKS.items():
        if shape[2] == shape[3] or name not in SQUARE:
            array = np.array(cells(make(*shape).cell, *shape))
            got = found(array, shape)
            np.testing.assert_array_equal(got, array.any(1, keepdims=True), name)


@pytest.mark.deep
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_seen(name: str) -> None:
    shape = (2, 3, 12, 12)
    case = MASKS[name](*shape)
    want = cells(case.cell, *shape).any(1, keepdims=True)
    np.testing.assert_array_equal(found(case.mask, shape), want)


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.deep)])
def test_random_compositions_are_seen(count: int) -> None:
    for shape, text in compositions(count, 73):
        array = np.array(cells_of(made(text), shape))
        got = found(array, shape)
        np.testing.assert_array_equal(got, array.any(1, keepdims=True), text)


def test_a_jax_model_is_compiled_and_pushed_forward() -> None:
    seen = visible(lambda x: model(x, masks.sliding_window(2)), X)
    assert str(seen).splitlines()[0] == "sliding_window(2)"
    assert not masks.diff(seen, masks.sliding_window(2), S)
    assert "a tangent" in str(seen)
    assert "compiled by JAX" in str(seen)
    assert seen.why(q=0, k=1).allowed is False
    assert not seen.empty_rows.any()
    assert not seen.unseen_keys.any()


def test_what_rounding_hides_is_felt_by_tangents() -> None:
    seen = visible(lambda x: x + 1e-12 * jnp.flip(x, 1), X)
    np.testing.assert_array_equal(
        seen.array[0, 0], np.eye(S, dtype=bool) | np.eye(S, dtype=bool)[::-1]
    )
    assert f"pairs felt by the tangent only: {B * S}" in str(seen)


def test_without_forward_mode_values_are_changed() -> None:
    @jax.custom_vjp
    def backward_only(x: Any) -> Any:
        return jnp.cumsum(x, 1)

    backward_only.defvjp(lambda x: (backward_only(x), None), lambda _, g: (g,))

    def called_back(x: Any) -> Any:
        return jax.pure_callback(lambda x: np.cumsum(x, 1), x, x)

    for fn in (lambda x: backward_only(x), called_back):
        seen = visible(fn, jnp.asarray(X), tries=1)
        assert not masks.diff(seen, masks.causal(), S)
        assert "compiled by JAX" in str(seen)
        assert "a tangent" not in str(seen)


def test_large_masks_are_described_in_part() -> None:
    seen = visible(lambda x: x + 1, np.arange(400, dtype=np.float32)[:, None], stride=100, tries=1)
    assert "masks.describe(seen.array[:, :, :128, :128]) finds words" in str(seen)
    assert masks.describe(seen.array[:, :, :128, :128]).expression == "chunked(100)"


def test_the_mask_may_depend_on_values() -> None:
    seen = visible(lambda t: jnp.where(t[:, :1] > 3, t, 0), TOKENS, tries=4)
    assert "pairs felt in some tries only" in str(seen)


# --- any function ---------------------------------------------------------------------------------


def test_numpy_and_float64() -> None:
    def backwards(x: np.ndarray) -> np.ndarray:
        assert type(x) is np.ndarray
        assert x.dtype == np.float64
        return np.cumsum(x[:, ::-1], 1)[:, ::-1]

    seen = visible(backwards, X.astype(np.float64))
    assert not masks.diff(seen, lambda b, h, q, k: q <= k, S)
    assert "by calls" in str(seen)


class Stateful:
    """Overwrites what it keeps, as capturing hooks do, and mixes by a loop of Python."""

    last: Any = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.last = np.zeros_like(x)
        for i in range(x.shape[1]):
            self.last[:, i] = x[:, max(i - 1, 0)]
        return self.last


def test_a_class_that_returns_its_own_buffer() -> None:
    want = np.equal.outer(np.maximum(np.arange(S) - 1, 0), np.arange(S))
    np.testing.assert_array_equal(visible(Stateful(), X).array[0, 0], want)


def test_tokens() -> None:
    def read(tokens: Any) -> Any:
        return model(jnp.asarray(TABLE)[tokens], masks.causal())

    seen = visible(read, TOKENS)
    assert not masks.diff(seen, masks.causal(), S)
    assert "an effect below the rounding of float32" in str(seen)
    assert not masks.diff(visible(read, TOKENS, stride=4), lambda b, h, q, k: q >= k // 4 * 4, S)
    one = visible(lambda t: read(t[None])[0], TOKENS[0])
    assert not masks.diff(one, masks.causal(), S)


# --- findings -------------------------------------------------------------------------------------


def test_rows_that_mix_are_a_finding_of_their_own() -> None:
    def normalised(x: Any) -> Any:
        return np.tril(np.ones((S, S), x.dtype)) @ x - x[:, :1].mean(0)

    seen = visible(normalised, X)
    np.testing.assert_array_equal(seen.across, ~np.eye(B, dtype=bool))
    assert "row 0 of the batch depends on row 1" in str(seen)
    # Row by row, so that positions are those of the row itself.
    assert not masks.diff(seen, masks.causal(), S)


def test_blind_queries_and_unseen_keys_are_named() -> None:
    real = np.arange(S) < np.array([8, 12])[:, None]

    def padded(x: Any) -> Any:
        return np.where(real[..., None], np.where(real[..., None], x, 0).sum(1, keepdims=True), 0)

    seen = visible(padded, X, padding=np.array([8, 12]))
    told = str(seen)
    assert "queries that see no key: 8-11 (row 0)" in told
    assert "keys that no query sees: 8-11 (row 0)" in told
    assert "padding is not felt" in told


@pytest.mark.parametrize("padding", [np.array([8, 12]), np.arange(S) < np.array([[8], [12]])])
def test_felt_padding_is_named(padding: Any) -> None:
    seen = visible(lambda x: x + x.mean(1, keepdims=True), X, padding=padding)
    assert seen.padding_felt is not None
    assert seen.padding_felt.sum() == 4
    assert "padding that real queries feel: 8-11 (row 0)" in str(seen)


def test_nan_hides_changes() -> None:
    hole = np.where(np.arange(S) == 3, np.nan, 0)[:, None]
    seen = visible(lambda x: x + hole, X, backend="calls")
    assert f"outputs that hold NaN, in which changes are not seen: {B}" in str(seen)


def test_slow_models_show_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["jaxattn.testing.visible"], "_QUIET", 0.0)
    visible(lambda x: np.cumsum(x, 1), X, tries=1, backend="calls")
    assert f"visible: {S} of {S} runs, 0 s left" in capsys.readouterr().err


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize(
    "expression",
    [
        "sliding_window(2)",
        "sliding_window(1, 2)",
        "sliding_window(2) & segments(np.arange(24) // 13)",
        "causal()",
        "segments(np.arange(24) // 5) & causal()",
        "chunked(6)",
        "prefix_lm(5)",
        "causal() & dilated(3)",
        "sliding_window(6) & dilated(3)",
    ],
)
def test_one_layer_is_solved_for(expression: str, layers: int) -> None:
    sees = np.asarray(cells_of(made(expression), (1, 1, 24, 24)))[:, 0] | np.eye(24, dtype=bool)
    solved = one_layer(power(sees, layers), layers)
    np.testing.assert_array_equal(solved.mask, sees)
    assert "checked" in solved.told
    assert solved.determined == ("window" in expression)


def test_what_depth_does_not_determine_is_said() -> None:
    sees = np.asarray(cells_of(made("neighborhood((5, 5), 1)"), (1, 1, 25, 25)))[:, 0]
    reach = power(sees, 2)
    solved = one_layer(reach, 2)
    np.testing.assert_array_equal(solved.mask, reach)
    assert not solved.determined
    assert "is not determined by what 2 layers reach" in solved.told


def test_layers_of_a_model() -> None:
    window = masks.sliding_window(2)
    seen = visible(lambda x: model(x, window, 3), X[:1], layers=3)
    assert not masks.diff(seen, window, S)
    assert not masks.diff(masks.dense(jnp.asarray(seen.reach)), masks.sliding_window(6), S)
    assert "3 of them reach the same" in str(seen)


# --- one layer of a model -------------------------------------------------------------------------


class Block(linen.Module):
    left: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return model(linen.Dense(4)(x), masks.sliding_window(self.left))


class Linen(linen.Module):
    def setup(self) -> None:
        self.blocks = [Block(1), Block(3)]

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_a_layer_of_linen() -> None:
    module = Linen()
    params = module.init(jax.random.key(1), X)
    seen = visible(lambda x: module.apply(params, x), jnp.asarray(X), where="blocks_1")
    assert not masks.diff(seen, masks.sliding_window(3), S)
    with pytest.raises(ValueError, match="where: got 'blocks_7', which the model did not call"):
        visible(lambda x: module.apply(params, x), jnp.asarray(X), where="blocks_7")
    with pytest.raises(ValueError, match="where: got 'blocks_1', which is called inside jit"):
        visible(jax.jit(lambda x: module.apply(params, x)), jnp.asarray(X), where="blocks_1")


class Window(nnx.Module):
    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, q: Any, k: Any, *, v: Any) -> Any:
        q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
        return ja.attention(q, k, v, mask=masks.sliding_window(self.left))[:, :, 0]


class Nnx(nnx.Module):
    def __init__(self) -> None:
        self.blocks = nnx.List([Window(1), Window(3)])

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x, x, v=x)
        return x


@pytest.mark.parametrize("by_path", [True, False])
def test_a_layer_of_nnx(by_path: bool) -> None:
    module = Nnx()
    where = "blocks.1" if by_path else module.blocks[1]
    seen = visible(module, jnp.asarray(X), where=where)
    assert not masks.diff(seen, masks.sliding_window(3), S)
    assert Window.__call__.__name__ == "__call__"


# --- wrong input ----------------------------------------------------------------------------------


rng_of_calls = rng(5)


class Cache:
    """Keeps what it saw, as a cache of keys and values does."""

    seen = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.seen += float(x.sum())
        return x + self.seen


@pytest.mark.parametrize(
    ("fn", "inputs", "options", "says"),
    [
        (lambda x: x + rng_of_calls.random(), X, {}, "fn: returned other outputs.*dropout left on"),
        (Cache(), X, {}, "fn: returned other outputs.*a state that calls change"),
        (lambda x: (x, x), X, {}, r"fn: returned tuple, expected one array.*lambda x: fn\(x\)\[0\]"),
        (lambda x: x[:, :-1], X, {}, "fn: returned 11 outputs for 12 inputs.*say outputs=11"),
        (lambda x: x[:, 0], X, {}, "fn: returned 4 outputs for 12 inputs.*function that pools"),
        (lambda x: x[0, 0], X, {}, r"fn: returned shape \[4\] for inputs \[2, 12, 4\]"),
        (lambda x, *, mask: x, X, {}, r"fn: takes \(x, \*, mask\).*lambda x: fn\(x, ...\)"),
        (lambda x, lengths: x, X, {}, "fn: takes .*missing a required argument: 'lengths'"),
        (lambda x: x, TOKENS * 0 + 3, {}, "inputs: got the token 3 everywhere.*random tokens"),
        (lambda x: x, X > 0, {}, r"inputs: got bool\[2, 12, 4\], expected floats"),
        (lambda x: x, X, {"tries": 0}, "tries: got 0, expected at least 1"),
        (lambda x: x, X, {"backend": "torch"}, "backend: got 'torch', expected 'auto'"),
        (lambda x: x, X, {"padding": np.ones(3)}, r"padding: got float64\[3\], expected bool"),
        (lambda x: x[:, :5], X, {"outputs": 5, "layers": 2}, "layers: got 2 with T=5 and S=12"),
        (lambda x: x, X, {"where": "a.b"}, "where: got 'a.b', which the model did not call"),
    ],
)  # fmt: skip
def test_wrong_input(fn: Any, inputs: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        visible(fn, inputs, **options)


def test_named_backends() -> None:
    with pytest.raises(jax.errors.TracerArrayConversionError):
        visible(lambda x: np.asarray(x), X, backend="jax")
    assert "by calls" in str(visible(lambda x: x, X, backend="calls"))


def test_dropout_of_flax_is_told() -> None:
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dropout left on is the likely reason"):
        visible(layer, jnp.asarray(X))
    layer.eval()
    np.testing.assert_array_equal(visible(layer, jnp.asarray(X)).array[0, 0], np.eye(S, dtype=bool))

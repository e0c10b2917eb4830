"""Plausible mistakes that would compute something: each is an error, or a warning that says so."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, scores

pytestmark = pytest.mark.usefixtures("own_errors")
X = jnp.ones((1, 4, 2, 4))
MASK, SCORE = masks.causal(), scores.soft_cap(5.0)


# --- a score for a mask, a mask for a score -------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda: MASK & SCORE, "^&: got the score soft_cap"),
        (lambda: SCORE | MASK, r"^\|: got the score soft_cap"),
        (lambda: ja.attention(X, X, X, mask=SCORE), "^mask: got the score soft_cap.* as score="),
        (lambda: ja.explain(X, X, X, mask=SCORE), "^mask: got the score soft_cap"),
        (lambda: ja.tile_map(SCORE, X.shape, X.shape), "^mask: got the score"),
        (lambda: masks.per_head([MASK, SCORE]), r"^per_head\(masks\[1\]\): got the score"),
        (lambda: masks.predicate(SCORE), r"^predicate\(fn\): got the score"),
        (lambda: ja.attention(X, X, X, score=MASK), r"^score: got the mask causal\(\).* as mask="),
        (lambda: ja.attention_weights(X, X, score=MASK), r"^score: got the mask causal"),
        (lambda: scores.chain(SCORE, MASK), r"^chain\(scores\[1\]\): got the mask causal"),
        (lambda: scores.score(MASK), r"^score\(fn\): got the mask causal"),
        (lambda: masks.predicate(MASK, 3), r"^predicate\(fn\): got causal\(\) with arguments"),
        (
            lambda: scores.score(SCORE, 3),
            r"^score\(fn\): got the score soft_cap\(5.0\) with parameters",
        ),
    ],
)
def test_scores_are_no_masks(mistake: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        mistake()
    with pytest.raises(TypeError, match=says):
        jax.jit(mistake)()


def test_what_is_one_already_stays() -> None:
    assert masks.predicate(MASK) is MASK
    assert scores.score(SCORE) is SCORE


# --- a mask for a bias ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("low", [-1e9, -2e4, None])
def test_a_bias_that_removes_warns(low: float | None, dtype: str) -> None:
    low = float(jnp.finfo(dtype).min) if low is None else low
    array = jnp.where(jnp.tri(4, dtype=bool), 0.0, low).astype(dtype)
    learned = array + jnp.asarray(0.5, dtype)
    for wrong in (array, learned, np.asarray(array), jnp.asarray(array)[None, None]):
        with pytest.warns(UserWarning, match=r"bias\(array\): got -.*masks\.from_array"):
            scores.bias(wrong)


def test_a_bias_that_only_changes_does_not_warn() -> None:
    scores.bias(jnp.linspace(-9e3, 9e3, 16).reshape(4, 4))
    jax.jit(lambda a: ja.attention(X, X, X, score=scores.bias(a)))(jnp.full((4, 4), -1e9))


# --- tokens or counts -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [list, np.array, jnp.array, tuple])
def test_integers_as_global_tokens_are_refused(wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"global_tokens\(tokens\): got integers \[2\].*counts="):
        masks.global_tokens(wrap([0, 5]))


def test_global_tokens_said_clearly() -> None:
    counts = masks.global_tokens(counts=[0, 2]).dense(4, 4, batch=2)[:, 0]
    at = np.minimum(*np.ogrid[:4, :4])
    np.testing.assert_array_equal(counts, [at < 0, at < 2])
    flags = jnp.zeros(6, bool).at[jnp.array([0, 5])].set(True)
    marked = np.isin(np.arange(6), [0, 5])
    np.testing.assert_array_equal(
        masks.global_tokens(flags).dense(6, 6)[0, 0], marked[:, None] | marked
    )
    assert repr(masks.global_tokens(3)) == "global_tokens(3)"
    assert masks.global_tokens(3) == masks.global_tokens(counts=3)
    assert repr(masks.global_tokens(counts=[0, 2])) == "global_tokens(counts=int32[2])"
    for wrong in (lambda: masks.global_tokens(), lambda: masks.global_tokens(3, counts=3)):
        with pytest.raises(ValueError, match=r"global_tokens: got (neither|both) of `tokens`"):
            wrong()


# --- numbers that are none ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale", [1j, 1 + 0j, np.complex64(1), jnp.complex64(1), True, "2", [1.0], object(), 10**400],
    ids=lambda scale: type(scale).__name__,
)  # fmt: skip
def test_scale_is_one_real_number(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"^scale: got .*, expected one real number"):
        ja.attention(X, X, X, scale=scale)


def test_traced_scales() -> None:
    with pytest.raises(ValueError, match=r"^scale: got complex64\[\], expected one real number"):
        jax.jit(lambda s: ja.attention(X, X, X, scale=s))(1j)
    for scale in (2, 2.0, np.float32(2), jnp.int32(2), jnp.float32(2)):
        np.testing.assert_array_equal(
            ja.attention(X, X, X, scale=scale), ja.attention(X, X, X, scale=2.0)
        )


@pytest.mark.parametrize("rate", ["0.1", None, 0.1j, True, [0.1], jnp.ones(2)], ids=repr)
def test_dropout_rate_is_one_real_number(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"^dropout_rate: got .*, expected a probability"):
        ja.attention(X, X, X, dropout_rate=rate, dropout_seed=0)


def test_sinks_are_an_array() -> None:
    with pytest.raises(TypeError, match=r"^sinks: got str, expected floats"):
        ja.attention(X, X, X, sinks="auto")


@pytest.mark.parametrize(
    "key", [0, 0.5, None, jax.random.split(jax.random.key(0)), jnp.zeros(2), "key"], ids=repr
)
def test_random_blocks_want_a_key(key: Any) -> None:
    with pytest.raises(TypeError, match=r"^random_blocks\(key\): got .*jax\.random\.key\(0\)"):
        masks.random_blocks(key, 2, 4, 16)


def test_random_blocks_of_both_kinds_of_keys() -> None:
    typed, raw = (
        masks.random_blocks(make(3), 2, 4, 16).dense(16, 16)
        for make in (jax.random.key, jax.random.PRNGKey)
    )
    np.testing.assert_array_equal(typed, raw)
    with pytest.raises(TypeError, match=r"random_blocks\(q_len\): got a traced value"):
        jax.jit(lambda n: masks.random_blocks(jax.random.key(0), 2, 4, n).dense(4, 4))(16)


# --- lengths and heads ----------------------------------------------------------------------------

SWAPPED = jnp.ones((1, 2, 6, 4))  # [B, N, T, H]: 2 heads of 6 tokens


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ja.attention(x, x, x),
        lambda x: ja.attention(x, x, x, mask=MASK),
        lambda x: ja.attention(x[0], x[0], x[0], mask=masks.sliding_window(1)),
        lambda x: ja.attention_weights(x, x),
        lambda x: ja.dot_product_attention(x, x, x),
        jax.jit(lambda x: ja.attention(x, x, x)),
    ],
)
def test_lengths_and_heads_that_look_mixed_up(call: Any) -> None:
    with pytest.warns(UserWarning, match=r"^query: got 2 tokens with 6 heads.*swapaxes\(query, -3"):
        call(SWAPPED)


def test_explain_says_it_too() -> None:
    (note,) = ja.explain(SWAPPED, SWAPPED, SWAPPED).notes
    assert note.startswith("query: got 2 tokens with 6 heads")
    assert not ja.explain(SWAPPED, SWAPPED, SWAPPED, positions=ja.Positions()).notes


def test_lengths_and_heads_that_are_as_they_should() -> None:
    """Nothing is said of more tokens, grouped heads, one token, or where an array confirms T."""
    few = SWAPPED
    valid = jnp.ones((1, 2), bool)
    one = few[:, :1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ja.attention(X, X, X)
        ja.attention(few, few[:, :, :3], few[:, :, :3])
        ja.attention(one, one, one)
        ja.attention(one, few, few)
        ja.attention(few, few, few, mask=masks.key_padding(valid))
        ja.attention(few, few, few, score=scores.bias(jnp.zeros((2, 2))))
        ja.attention(few, few, few, positions=ja.Positions())
        ja.scaled_dot_product_attention(few, few, few)


def test_the_warning_names_the_line_that_calls_once(tmp_path: Any) -> None:
    """In a process without the tests' checks of types, which add calls of their own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import jax.numpy as jnp, jaxattn as ja\n"
        "x = jnp.ones((1, 2, 6, 4))\n"
        "for _ in range(3):\n"
        "    ja.attention(x, x, x)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stderr.count("query: got 2 tokens with 6 heads") == 1
    assert f"{script}:4: UserWarning" in done.stderr


# --- grids ----------------------------------------------------------------------------------------

GRID = masks.neighborhood((2, 4), (0, 1))
VIT = masks.neighborhood((2, 4), (0, 1), prefix=1)


@pytest.mark.parametrize("n", [7, 9])
@pytest.mark.parametrize("mask", [GRID, GRID & (lambda b, h, q, k: q >= k)], ids=["alone", "part"])
def test_a_grid_of_another_number_of_tokens(mask: Any, n: int) -> None:
    x = jax.ShapeDtypeStruct((1, n, 2, 4), "float32")
    arrays = jnp.ones(x.shape)
    for call in (
        lambda: ja.attention(arrays, arrays, arrays, mask=mask),
        lambda: ja.explain(x, x, x, mask=mask),
        lambda: ja.tile_map(mask, x.shape, x.shape),
        lambda: mask.dense(n, n),
        lambda: mask.show(n),
    ):
        with pytest.raises(
            ValueError, match=rf"neighborhood\(\(2, 4\), \(0, 1\)\).*8 tokens.*T = {n}.*prefix="
        ):
            call()
    with pytest.raises(ValueError, match=rf"8 tokens, and S = {n}"):
        mask.dense(8, n)
    with pytest.raises(ValueError, match="9 tokens"):
        VIT.dense(8, 8)


def test_a_prefix_sees_all_and_is_seen_by_all() -> None:
    got = np.asarray(VIT.dense(9, 9)[0, 0])
    np.testing.assert_array_equal(got[1:, 1:], GRID.dense(8, 8)[0, 0])
    assert got[0].all()
    assert got[:, 0].all()
    assert repr(VIT) == "neighborhood((2, 4), (0, 1), prefix=1)"


def test_nothing_is_seen_beyond_a_grid() -> None:
    at = np.array([-3, -1, 0, 3, 7, 8, 9, 20])
    inside = (at >= 0) & (at < 8)
    got = np.asarray(GRID.dense(8, 8, positions=ja.Positions(q=at, k=at))[0, 0])
    assert not got[~inside].any()
    assert not got[:, ~inside].any()
    whole = np.asarray(GRID.dense(8, 8)[0, 0])
    np.testing.assert_array_equal(
        got[np.ix_(inside, inside)], whole[np.ix_(at[inside], at[inside])]
    )
    in_vit = (at >= 0) & (at < 9)
    got = np.asarray(VIT.dense(8, 8, positions=ja.Positions(q=at, k=at))[0, 0])
    assert not got[~in_vit].any()
    assert not got[:, ~in_vit].any()
    assert got[at == 0][0, in_vit].all()


@pytest.mark.parametrize("mask", [GRID, VIT], ids=["grid", "prefix"])
def test_tiles_of_a_grid_are_as_tight_as_they_are_exact(mask: Any) -> None:
    n = 8 + (mask is VIT)
    shape = (1, n, 1, 4)
    bounds, exact = (ja.tile_map(mask, shape, shape, tile=(1, 4), exact=e) for e in (False, True))
    assert (np.asarray(bounds.states) <= 1 + (np.asarray(exact.states) == 2)).all()
    empty = np.asarray(exact.states) == 0
    assert (np.asarray(bounds.states)[empty] == 0).mean() > 0.8


def test_pictures_have_the_size_of_the_grid(capsys: Any) -> None:
    VIT.show()
    assert "9 queries, 9 keys" in capsys.readouterr().out
    (VIT & masks.causal()).show()
    assert "9 queries, 9 keys" in capsys.readouterr().out
    assert "neighborhood forbids it" in str(GRID.why(0, 5))


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((2.5, 4), {}, r"shape\[0\]\): got 2.5, expected one integer"),
        ((2, True), {}, r"shape\[1\]\): got True"),
        ((0, 4), {}, r"shape\[0\]\): got 0, expected at least 1"),
        ((2, 4), {"prefix": -1}, r"prefix\): got -1, expected at least 0"),
        ((2, 4), {"prefix": 0.5}, r"prefix\): got 0.5, expected one integer"),
        ((4, 4), {"radius": (1, -1)}, r"radius\): got -1, expected at least 0"),
        ((), {}, r"radius\): got 0, expected one integer or one for each axis of shape \(\)"),
    ],
)
def test_grids_that_are_none(shape: Any, options: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"neighborhood\\({says}"):
        masks.neighborhood(shape, **({"radius": 0} | options))

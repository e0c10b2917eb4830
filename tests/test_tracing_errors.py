"""Mistakes inside a predicate or a score: named, with the line they are in and what to write."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import everyday

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.masks.mask import as_mask
from jaxattn.tracing.split import split

X = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
TABLE = np.ones((8, 8), bool)
INTERNAL = ("KeyPadding", "GlobalTokens", "Predicate", "Scored", "formula", "canonical")


def branches(b, h, q, k):
    if q > k:
        return k > 2
    return q < 2


def both(b, h, q, k):
    return (q >= k) and (k < 3)


class Impatient(ja.Mask):
    def __call__(self, b, h, q, k):
        return q >= k and k < 3


def line_of(fn, text):
    lines, first = inspect.getsourcelines(fn)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("mask", "name", "place", "remedy"),
    [
        (branches, "predicate(branches)", line_of(branches, "if q"), "jnp.where"),
        (both, "predicate(both)", line_of(both, " and "), "`&`"),
        (masks.causal() & both, "predicate(both)", line_of(both, " and "), "`&`"),
        (functools.partial(both, h=0), "predicate(", __file__, "(b, h, q, k)"),
        (Impatient(), "Impatient()", line_of(Impatient, " and "), "`&`"),
        (lambda b, h, q, k: 0 <= q < k, "predicate(<lambda>)", __file__, "`a < b < c`"),
        (lambda b, h, q, k: TABLE[q, k], "predicate(<lambda>)", __file__, "jnp.asarray(table)"),
        (lambda b, h, q, k: TABLE[0][k], "predicate(<lambda>)", __file__, "jnp.asarray(table)"),
        (lambda b, h, q, k: np.abs(q - k) < 2, "predicate(<lambda>)", __file__, "jnp for np"),
        (lambda b, h, q, k: [1, 2][k] > q, "predicate(<lambda>)", __file__, "jnp.asarray(table)"),
        (lambda b, h, q, k: int(q) > k, "predicate(<lambda>)", __file__, "jax.numpy"),
        (lambda q, k: q > k, "predicate(<lambda>)", __file__, "(b, h, q, k)"),
        (lambda b, h, q, k: None, "predicate(<lambda>)", __file__, "returned NoneType"),
        (lambda b, h, q, k: q - k, "predicate(<lambda>)", __file__, "returned int32[]"),
        (masks.predicate(lambda b, h, q, k: q > k, 3), "predicate(<lambda>", "", "*args"),
        (masks.causal, "masks.causal", "mask: ", "call it: masks.causal()"),
        (masks.segments, "masks.segments", "mask: ", "call it: masks.segments(...)"),
        (Impatient, "Impatient", "mask: ", "call it: Impatient(...)"),
    ],
)
@pytest.mark.usefixtures("own_errors")
def test_a_mistake_in_a_predicate_says_where_and_what_to_write(mask, name, place, remedy):
    with pytest.raises(TypeError) as error:
        ja.attention(X, X, X, mask=mask)
    said = str(error.value)
    assert all(word in said for word in (name, place, remedy)), said
    assert not any(word in said for word in INTERNAL)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda x, b, h, q, k: x if q > k else 0.0, ["score(<lambda>)", __file__, "jnp.where"]),
        (lambda b, h, q, k: q, ["score(<lambda>)", __file__, "(logit, b, h, q, k)"]),
        (lambda x, b, h, q, k: None, ["score(<lambda>)", __file__, "returned NoneType"]),
        (scores.alibi, ["score: ", "scores.alibi", "call it"]),
    ],
)
def test_a_mistake_in_a_score_too(score, words):
    with pytest.raises(TypeError) as error:
        ja.attention(X, X, X, score=score)
    assert all(word in str(error.value) for word in words), error.value


def test_the_error_of_jax_is_chained_and_those_of_users_pass():
    for mask in (both, Impatient()):
        with pytest.raises(TypeError) as error:
            ja.attention(X, X, X, mask=mask)
        cause = error.value.__cause__
        assert isinstance(cause, jax.errors.TracerBoolConversionError)
        assert __file__ in str(cause)
        assert not any(word in str(cause) for word in INTERNAL)

    def broken(b, h, q, k):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ja.attention(X, X, X, mask=broken)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"mask": masks.key_padding(jnp.ones(5, bool))}, "key_padding(valid)"),
        ({"mask": masks.key_padding(lengths=jnp.ones(5, int))}, "key_padding(lengths)"),
        ({"mask": masks.global_tokens(jnp.ones(5, bool))}, "global_tokens(tokens)"),
        ({"mask": masks.global_tokens(counts=jnp.ones(5, int))}, "global_tokens(counts)"),
        ({"mask": masks.causal(jnp.ones(5, int))}, "causal(offset)"),
        ({"mask": masks.tree(jnp.arange(5) - 1)}, "tree(parents)"),
        ({"mask": masks.segments(jnp.ones(5, int)) & (lambda b, h, q, k: q > k)}, "segments(q_ids)"),
        ({"mask": lambda b, h, q, k: jnp.asarray(TABLE)[q, 3] & FIVE[k]}, "`FIVE` of predicate("),
        ({"mask": masks.predicate(lambda b, h, q, k, mine: mine[k], jnp.ones(5, bool))}, "`mine` of"),
        ({"score": scores.bias(jnp.ones((5, 5)))}, "bias(array)"),
        ({"score": scores.relative_bias(jnp.ones((5, 8)))}, "relative_bias(table)"),
        ({"score": scores.alibi(jnp.ones(5))}, "alibi(slopes)"),
    ],
)  # fmt: skip
def test_arrays_are_called_what_their_user_called_them(options, label):
    with pytest.raises(ValueError, match="got extent 5") as error:
        ja.attention(X, X, X, **options)
    assert str(error.value).startswith(label)


FIVE = jnp.ones(5, bool)


def test_ids_of_one_row_for_many():
    x = jnp.zeros((4, 8, 2, 4))
    with pytest.raises(ValueError, match="remove the axis, or repeat it 4 times"):
        ja.attention(x, x, x, mask=masks.segments(jnp.zeros((1, 8), int)))


def test_a_function_is_a_score_of_float64_too():
    x = np.asarray(X, np.float64)
    with jax.enable_x64(True):
        x = jnp.asarray(x)
        mask = masks.causal()
        found = ja.attention(x, x, x, mask=mask, score=lambda logit, b, h, q, k: logit * 2.0)
        expected = ja.attention(x, x, x, mask=mask, score=scores.temperature(0.5))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- numbers that are captured ---------------------------------------------------------------------


def window(w):
    return lambda b, h, q, k: (q - k < w) & (q >= k)


def test_a_function_that_captures_many_numbers_is_warned_of_once():
    line = line_of(window, "lambda")
    for w in range(20, 24):
        split(masks.predicate(window(w)) & masks.causal())
    with pytest.warns(UserWarning, match="compiled for 5 values") as warned:
        split(as_mask(window(24)))
    for w in range(24, 30):
        split(as_mask(window(w)))
    (only,) = warned
    said = str(only.message)
    assert line in said
    assert f"{only.filename}:{only.lineno}" == line
    assert "`w`, now 24" in said
    assert "masks.predicate(fn, w)" in said


def test_arrays_arguments_and_a_few_numbers_are_not_warned_of():
    # Warnings are errors here.
    for w in range(8):
        split(masks.predicate(lambda b, h, q, k, w: q - k < w, w))
        near = jnp.asarray(w)
        split(as_mask(lambda b, h, q, k, near=near: q - k < near))
        split(as_mask(lambda b, h, q, k, w=w % 3: q - k > w))
    for sign in (jnp.less, jnp.greater, jnp.equal, jnp.not_equal, jnp.less_equal):
        split(as_mask(lambda b, h, q, k, sign=sign: sign(q, k)))


def test_numbers_beside_a_function_are_data(compilations):
    near = lambda b, h, q, k: abs(q - k) < 4  # noqa: E731
    ja.attention(X, X, X, mask=masks.sliding_window(3) & near)
    compilations.reset()
    ja.attention(X, X, X, mask=masks.sliding_window(2) & near)
    assert compilations.count == 0


# --- functions and classes of users ---------------------------------------------------------------


class Near(ja.Mask):
    """No pytree, with a number and an array."""

    def __init__(self, reach, real):
        self.reach, self.real = reach, real

    def __call__(self, b, h, q, k):
        return (abs(q - k) <= self.reach) & self.real[k]


class Always(ja.Mask):
    def __call__(self, b, h, q, k):
        return True


class Gain(ja.Score):
    def __init__(self, gain):
        self.gain = gain

    def __call__(self, logit, b, h, q, k):
        return logit * self.gain[h]


REAL = jnp.arange(8) != 5
PLAIN = masks.sliding_window(2, 2) & masks.key_padding(REAL)


@pytest.mark.parametrize(
    ("backend", "under"),
    everyday(
        ((b, u) for b in ("dense", "decode", "tiled") for u in (lambda fn: fn, jax.jit)), every=2
    ),
)
def test_a_class_with_only_a_call_is_a_mask(backend, under):
    near = Near(2, REAL)
    for mask, same in (
        (near, PLAIN),
        (~near | masks.causal(), ~PLAIN | masks.causal()),
        (masks.per_head([near, masks.full()]), masks.per_head([PLAIN, masks.full()])),
    ):
        run = under(lambda x, mask=mask: ja.attention(x, x, x, mask=mask, backend=backend))
        expected = ja.attention(X, X, X, mask=same, backend=backend)
        np.testing.assert_array_equal(run(X), expected)


def test_a_class_with_only_a_call_is_drawn_and_explained(capsys):
    near = Near(2, REAL)
    assert repr(near) == "Near(reach=2, real=bool[8])"
    near.show(8)
    assert capsys.readouterr().out.startswith("Near(reach=2, real=bool[8]), 8 queries")
    assert "Near forbids it: real[5] is false" in str((near & masks.causal()).why(6, 5))
    assert ja.explain(X, X, X, mask=near & masks.causal()).mask == f"{near!r} & causal()"
    tiles = ja.tile_map(near, X, X, tile=4)
    np.testing.assert_array_equal(tiles.states, ja.tile_map(PLAIN, X, X, tile=4).states)
    assert not (~Always()).dense(2, 2).any()
    assert not masks.diff(near, PLAIN, 8)


def test_a_class_with_only_a_call_may_hold_tracers():
    run = jax.jit(lambda real: ja.attention(X, X, X, mask=Near(2, real), backend="tiled"))
    expected = ja.attention(X, X, X, mask=PLAIN, backend="tiled")
    np.testing.assert_allclose(run(REAL), expected, rtol=1e-5)


def test_a_class_with_only_a_call_is_a_score_that_learns():
    def loss(gain, score, backend):
        out = ja.attention(X, X, X, score=score(gain), mask=masks.causal(), backend=backend)
        return (out**2).sum()

    gain = jnp.array([1.0, 2.0])
    plain = jax.grad(loss)(gain, lambda g: scores.temperature(1 / g), "dense")
    for score in (Gain, lambda g: scores.chain(Gain(g))):
        found = jax.grad(loss)(gain, score, "tiled")
        np.testing.assert_allclose(found, plain, rtol=1e-4)


def test_a_function_without_a_module_is_a_mask_and_a_score():
    names = {}
    exec("near = lambda b, h, q, k: q >= k\ntwice = lambda x, b, h, q, k: x * 2", names)
    near, twice = names["near"], names["twice"]
    near.__module__ = twice.__module__ = None
    found = ja.attention(X, X, X, mask=near, score=twice)
    expected = ja.attention(X, X, X, mask=masks.causal(), score=scores.temperature(0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert repr(masks.predicate(near)) == "predicate(<lambda>)"
    near_mask = masks.predicate(near) & masks.causal()
    assert near_mask.why(1, 0)
    assert ja.explain(X, X, X, mask=near_mask, score=twice).density == 1.0


def test_arrays_stand_for_their_shapes_in_a_tile_map():
    by_array = ja.tile_map(masks.causal(), X, X, tile=4)
    by_shape = ja.tile_map(masks.causal(), X.shape, np.array(X.shape), tile=4)
    np.testing.assert_array_equal(by_array.states, by_shape.states)
    with pytest.raises(ValueError, match=r"query_shape: got \(8, 2\)"):
        ja.tile_map(masks.causal(), X[0, :, :, 0], X)

"""Functions with other people's signatures: the tutorial's, and `jax.nn`'s."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import attend, everyday, flags, pairwise, qkv, rng

import jaxattn as ja
from jaxattn import masks

# --- the Transformer tutorial ---------------------------------------------------------------------

KEYS = jnp.asarray([[10.0, 0, 0], [0, 10, 0], [0, 0, 10], [0, 0, 10]])
VALUES = jnp.asarray([[1.0, 0], [10, 0], [100, 5], [1000, 6]])


@pytest.mark.parametrize(
    ("query", "weights", "output"),
    [
        ([0, 0, 10], [0, 0, 0.5, 0.5], [550, 5.5]),
        ([0, 10, 0], [0, 1, 0, 0], [10, 0]),
        ([10, 10, 0], [0.5, 0.5, 0, 0], [5.5, 0]),
    ],
)
def test_examples_of_the_tutorial(
    query: list[int], weights: list[float], output: list[float]
) -> None:
    q = jnp.asarray([query], jnp.float32)
    got_output, got_weights = ja.scaled_dot_product_attention(q, KEYS, VALUES, None)
    np.testing.assert_allclose(got_weights, [weights], atol=1e-7)
    np.testing.assert_allclose(got_output, [output], rtol=1e-6, atol=1e-5)


def test_all_queries_of_the_tutorial_at_once() -> None:
    q = jnp.asarray([[0, 0, 10], [0, 10, 0], [10, 10, 0]], jnp.float32)
    output, weights = ja.scaled_dot_product_attention(q, KEYS, VALUES)
    np.testing.assert_allclose(
        weights, [[0, 0, 0.5, 0.5], [0, 1, 0, 0], [0.5, 0.5, 0, 0]], atol=1e-7
    )
    np.testing.assert_allclose(output, [[550, 5.5], [10, 0], [5.5, 0]], rtol=1e-6, atol=1e-5)


def test_an_ignored_key_of_the_tutorial() -> None:
    """The tutorial marks ignored keys with 1; the weights of the others were equal."""
    q = jnp.asarray([[0, 10, 0]], jnp.float32)
    ignored = jnp.asarray([[0.0, 1, 0, 0]])
    mask = masks.from_array(ignored, "ignore")
    for given in (mask, ignored == 0, lambda b, h, q, k: k != 1):
        output, weights = ja.scaled_dot_product_attention(q, KEYS, VALUES, given)
        np.testing.assert_allclose(weights, [[1 / 3, 0, 1 / 3, 1 / 3]], rtol=1e-6)
        assert weights[0, 1] == 0
        np.testing.assert_allclose(output, [[367, 11 / 3]], rtol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 2, 3)], ids=str)
def test_any_leading_axes(lead: tuple[int, ...]) -> None:
    T, S, d, dv = 4, 5, 8, 3
    make = rng(21)
    q, k, v = (
        jnp.asarray(make.normal(size=(*lead, *tail)), jnp.float32)
        for tail in ((T, d), (S, d), (S, dv))
    )
    N = lead[-1] if lead else 1
    B = int(np.prod(lead[:-1]))
    keep = np.broadcast_to(
        (np.arange(S) <= np.arange(T)[:, None] + np.arange(N)[:, None, None])
        & (np.arange(S) != np.arange(B)[:, None, None, None]),
        (B, N, T, S),
    )

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q + h) & (k != b)

    gold = attend(
        q.reshape(B, N, T, d).swapaxes(1, 2), k.reshape(B, N, S, d).swapaxes(1, 2),
        v.reshape(B, N, S, dv).swapaxes(1, 2), keep,
    )  # fmt: skip
    as_array = jnp.asarray(keep.reshape(*lead, T, S))
    for given in (mask, as_array, masks.predicate(mask)):
        output, weights = ja.scaled_dot_product_attention(q, k, v, given)
        assert output.shape == (*lead, T, dv)
        assert weights.shape == (*lead, T, S)
        np.testing.assert_allclose(weights, gold.weights.reshape(*lead, T, S), rtol=1e-5, atol=1e-6)
        want = np.swapaxes(gold.out, 1, 2).reshape(*lead, T, dv)
        np.testing.assert_allclose(output, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_axes(B: int, T: int, S: int) -> None:
    query, key, value = map(jnp.ones, ((B, 3, T, 8), (B, 3, S, 8), (B, 3, S, 5)))
    keep = np.ones((B, 1, T, S), bool)
    output, weights = ja.scaled_dot_product_attention(query, key, value, keep)
    assert output.shape == (B, 3, T, 5)
    assert weights.shape == (B, 3, T, S)
    swapped = (jnp.swapaxes(a, 1, 2) for a in (query, key, value))
    lengths = np.full(B, S, np.int32)
    out = ja.dot_product_attention(*swapped, mask=keep, key_value_seq_lengths=lengths)
    np.testing.assert_array_equal(out, jnp.swapaxes(output, 1, 2))


@pytest.mark.parametrize(
    "shape", [(5,), (1, 5), (4, 1), (2, 1, 1, 5), (3, 1, 1), (2, 3, 4, 5)], ids=str
)
def test_booleans_broadcast(shape: tuple[int, ...]) -> None:
    lead, T, S = (2, 3), 4, 5
    q, k, v = (jnp.asarray(rng(22, n).normal(size=(*lead, n, 8)), jnp.float32) for n in (T, S, S))
    keep = flags(*shape)
    _, weights = ja.scaled_dot_product_attention(q, k, v, jnp.asarray(keep))
    full = np.broadcast_to(keep, (*lead, T, S))
    np.testing.assert_array_equal(np.asarray(weights) > 0, full)
    _, by_numpy = ja.scaled_dot_product_attention(q, k, v, keep)
    np.testing.assert_array_equal(by_numpy, weights)


def test_leading_axes_broadcast_and_gradients_flow() -> None:
    """Keys and values that all heads share, as NumPy would broadcast them."""
    q, k = jnp.ones((2, 3, 4, 8)), jnp.asarray(rng(23).normal(size=(1, 1, 5, 8)), jnp.float32)
    output, weights = ja.scaled_dot_product_attention(q, k, k)
    assert output.shape == (2, 3, 4, 8)
    assert weights.shape == (2, 3, 4, 5)
    slope = jax.grad(lambda k: ja.scaled_dot_product_attention(q, k, k)[0].sum())(k)
    assert slope.shape == k.shape
    assert np.abs(slope).max() > 0


def test_dtypes_of_the_tutorials_function() -> None:
    q = jnp.ones((2, 3, 4), jnp.bfloat16)
    output, weights = ja.scaled_dot_product_attention(q, q, q, masks.causal())
    assert output.dtype == jnp.bfloat16
    assert weights.dtype == jnp.float32


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        (lambda x: (x[0, 0], x, x), ValueError, r"q: got shape \[8\], expected \(..., length, d\)"),
        (lambda x: (x, x, x, jnp.zeros((4, 4))), TypeError, "float32.*from_array"),
        (lambda x: (x, x, x, jnp.ones((3, 4, 4), bool)), ValueError,
         r"mask: got shape \[3, 4, 4\].*\(..., T, S\) = \[2, 4, 4\]"),
        (lambda x: (x, x, x, jnp.ones((1, 2, 4, 4), bool)), ValueError, "mask: got shape"),
        (lambda x: (x, x[..., :7], x), ValueError, "key"),
        (lambda x: (x, x, x[:, :3]), ValueError, "value"),
        (lambda x: (x, x, x, True), TypeError, "masks.full"),
    ],
    ids=["rank", "additive", "broadcast", "rank of mask", "depth", "length", "bool"],
)  # fmt: skip
def test_errors_of_the_tutorials_function(wrong: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        ja.scaled_dot_product_attention(*wrong(jnp.ones((2, 4, 8))))


# --- the twin of jax.nn.dot_product_attention -----------------------------------------------------

T_, S_ = 6, 8


def theirs(*args: Any, **options: Any) -> Any:
    """`jax.nn.dot_product_attention`, which promotes where strict mode forbids it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.nn.dot_product_attention(*args, **options)


ROWS = pairwise(
    {
        "rank": [4, 3],
        "heads": [(4, 4), (4, 2), (4, 1)],
        "bias": [None, "full", "heads", "shared", "16 bits"],
        "mask": [None, "full", "keys", "heads", "2-D"],
        "causal": [False, True],
        "query_lengths": [False, True],
        "key_lengths": [False, True],
        "window": [None, 2, (1, 3)],
        "scale": [None, 0.3],
        "residual": [False, True],
        # Not float16: jax.nn asks for products that the CPU has not.
        "dtype": ["float32", "bfloat16"],
        "implementation": [None, "xla"],
    },
    seed=1,
)


def arguments(row: dict[str, Any]) -> tuple[list[Any], dict[str, Any], np.ndarray]:
    """A row as arguments of both functions, and which queries see a key, `[B, T, N]`."""
    B = 2 if row["rank"] == 4 else 1
    N, K = row["heads"]
    dtype = jnp.dtype(row["dtype"])
    arrays = [x if row["rank"] == 4 else x[0] for x in qkv(B, T_, S_, N, K, 8, dtype=dtype)]
    shapes = {"full": (B, N, T_, S_), "heads": (1, N, 1, S_), "shared": (1, 1, T_, S_),
              "keys": (B, 1, 1, S_), "2-D": (T_, S_), "16 bits": (1, N, T_, S_)}  # fmt: skip
    options: dict[str, Any] = {}
    seen = np.ones((B, N, T_, S_), bool)
    q, k = np.arange(T_)[:, None], np.arange(S_)
    if row["bias"]:
        kind = jnp.bfloat16 if row["bias"] == "16 bits" else jnp.float32
        # jax.nn adds the bias with the promotion that strict mode forbids: same dtype for it.
        options["bias"] = jnp.asarray(rng(24).normal(size=shapes[row["bias"]]), kind).astype(
            jnp.float32
        )
    if row["mask"]:
        keep = flags(*shapes[row["mask"]])
        options["mask"] = jnp.asarray(keep)
        seen = seen & keep
    if row["causal"]:
        options["is_causal"] = True
        seen = seen & (k <= q)
    if row["window"]:
        options["local_window_size"] = row["window"]
        left, right = row["window"] if isinstance(row["window"], tuple) else (row["window"],) * 2
        seen = seen & (k >= q - left) & (k <= q + right)
    for name, size, axis in (("query", T_, 2), ("key", S_, 3)):
        if row[f"{name}_lengths"]:
            n = np.array([size - 2, size])[:B].astype(np.int32)
            name = "query_seq_lengths" if name == "query" else "key_value_seq_lengths"
            options[name] = jnp.asarray(n)
            at = np.arange(size).reshape((-1, 1) if axis == 2 else (1, -1))
            seen = seen & (at < n[:, None, None, None])
    options |= {"scale": row["scale"], "implementation": row["implementation"]}
    return arrays, options, seen.any(3).transpose(0, 2, 1)


@pytest.mark.parametrize("row", everyday(ROWS, 3), ids=lambda row: "-".join(map(str, row.values())))
def test_twin(row: dict[str, Any]) -> None:
    """The same results and gradients as `jax.nn`, wherever a query sees a key."""
    arrays, options, alive = arguments(row)
    alive = alive if row["rank"] == 4 else alive[0]
    assert alive.any()
    d_out = np.where(alive[..., None], rng(25).normal(size=(*alive.shape, 8)), 0)
    bias = options.pop("bias", None)
    residual = row["residual"]

    def run(f: Any) -> Any:
        def loss(arrays: Any, bias: Any) -> Any:
            got = f(*arrays, bias, return_residual=residual, **options)
            out, lse = got if residual else (got, None)
            return (out.astype(jnp.float32) * d_out).sum(), (out, lse)

        (_, aux), grads = (
            jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, bias)
            if (bias is not None)
            else jax.jit(jax.value_and_grad(lambda a: loss(a, None), has_aux=True))(arrays)
        )
        return aux, grads

    (out, lse), grads = run(ja.dot_product_attention)
    # Its backward pass promotes too, outside of the call.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (want, want_lse), want_grads = run(theirs)
    tolerance = {"float32": 3e-6, "bfloat16": 3e-2}[row["dtype"]]
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance * 2)
    assert out.dtype == want.dtype
    assert out.shape == want.shape
    close(np.asarray(out, np.float32)[alive], np.asarray(want, np.float32)[alive])
    np.testing.assert_array_equal(np.asarray(out, np.float32)[~alive], 0)
    if residual:
        assert lse.dtype == want_lse.dtype
        assert lse.shape == want_lse.shape
        close(np.asarray(lse, np.float32)[alive], np.asarray(want_lse, np.float32)[alive])
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert got.dtype == expected.dtype
        close(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=tolerance * 4)


def test_twin_has_the_same_signature() -> None:
    import inspect

    ours, original = (
        inspect.signature(f).parameters
        for f in (ja.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert list(ours) == list(original)
    assert [p.kind for p in ours.values()] == [p.kind for p in original.values()]
    for name, parameter in original.items():
        assert ours[name].default == parameter.default, name


def test_implementation_takes_our_backends() -> None:
    arrays = qkv(1, 4, 4, 2, 2, 8)
    want = ja.dot_product_attention(*arrays, is_causal=True)
    got = ja.dot_product_attention(*arrays, is_causal=True, implementation="dense")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="implementation: got 'flash'"):
        ja.dot_product_attention(*arrays, implementation="flash")


def test_x64_with_debug_infs() -> None:
    """No infinity is made on the way, in float32 under x64 and in float64."""
    with jax.enable_x64(True), jax.debug_infs(True):
        for dtype in (jnp.float32, jnp.float64):
            arrays = qkv(1, 4, 6, 2, 2, 8, dtype=dtype)
            bias = jnp.ones((1, 1, 4, 6), dtype)
            lengths = jnp.asarray([5], jnp.int32)
            options = dict(bias=bias, is_causal=True, key_value_seq_lengths=lengths)
            got = ja.dot_product_attention(*arrays, **options)
            want = theirs(*arrays, **options)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
            slope = jax.grad(lambda q: ja.dot_product_attention(q, *arrays[1:], **options).sum())(
                arrays[0]
            )
            assert np.isfinite(slope).all()


# The table of the docstring, line by line.


def test_deviation_a_query_that_sees_no_key() -> None:
    query, key, value = qkv(1, 2, 3, 1, 1, 4)
    mask = jnp.asarray([[[[True, True, False], [False, False, False]]]])

    def slopes(f: Any) -> Any:
        return jax.grad(lambda v: f(query, key, v, mask=mask)[0, 1].sum())(value)

    mean = theirs(query, key, value, mask=mask)
    np.testing.assert_allclose(mean[0, 1, 0], value.mean(1)[0, 0], rtol=1e-5)
    assert np.abs(slopes(theirs)).min() > 0
    out, lse = ja.dot_product_attention(query, key, value, mask=mask, return_residual=True)
    np.testing.assert_array_equal(out[0, 1], 0)
    assert lse[0, 1, 0] == -np.inf
    np.testing.assert_array_equal(slopes(ja.dot_product_attention), 0)


def test_deviation_nan_that_nobody_sees() -> None:
    query, key, value = qkv(1, 3, 4, 1, 1, 4)
    lengths = jnp.asarray([3], jnp.int32)
    poisoned = [x.at[:, 3].set(jnp.nan) for x in (key, value)]
    their, ours, clean = (
        f(query, *kv, key_value_seq_lengths=lengths)
        for f, kv in (
            (theirs, poisoned),
            (ja.dot_product_attention, poisoned),
            (ja.dot_product_attention, (key, value)),
        )
    )
    assert np.isnan(their).all()
    np.testing.assert_array_equal(ours, clean)


def test_deviation_float64() -> None:
    with jax.enable_x64(True):
        arrays = qkv(1, 4, 5, 1, 1, 8, dtype=jnp.float64)
        gold = attend(*arrays).out
        our, their = (np.abs(f(*arrays) - gold).max() for f in (ja.dot_product_attention, theirs))
        assert our < 1e-14
        assert their > 1e-10


def test_deviation_gradient_of_the_residual() -> None:
    query, key, value = qkv(1, 3, 4, 1, 1, 4)

    def slope(f: Any) -> Any:
        return jax.grad(lambda q: f(q, key, value, return_residual=True)[1].sum())(query)

    np.testing.assert_array_equal(slope(theirs), 0)
    d_lse = np.ones((1, 3, 1))
    gold = attend(query, key, value, d_out=np.zeros((1, 3, 1, 4)), d_lse=d_lse).grads["query"]
    np.testing.assert_allclose(slope(ja.dot_product_attention), gold, rtol=1e-5, atol=1e-6)


def test_deviation_value_of_its_own_head_dimension() -> None:
    query, key, value = qkv(1, 3, 4, 2, 1, 8, 5)
    assert ja.dot_product_attention(query, key, value).shape == (1, 3, 2, 5)
    with pytest.raises(ValueError, match="value"):
        theirs(query, key, value)


def test_deviation_masks_and_lengths() -> None:
    query, key, value = qkv(2, 3, 4, 2, 1, 8)
    array = jnp.asarray(np.tri(3, 4, dtype=bool))[None, None]
    want = ja.dot_product_attention(query, key, value, mask=array)
    for mask in (masks.causal(), lambda b, h, q, k: q >= k):
        got = ja.dot_product_attention(query, key, value, mask=mask)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    short, lengths = jnp.asarray([3, 2], jnp.int16), jnp.asarray([3, 2], jnp.int32)
    np.testing.assert_array_equal(
        ja.dot_product_attention(query, key, value, key_value_seq_lengths=short),
        ja.dot_product_attention(query, key, value, key_value_seq_lengths=lengths),
    )
    with pytest.raises(ValueError, match="dtype"):
        theirs(query, key, value, key_value_seq_lengths=short)


def test_deviation_products_of_sixteen_bits() -> None:
    """Weights of 1/3 are not rounded to bfloat16 before the sum over values."""
    query, key = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 3, 1, 8), jnp.bfloat16)
    value = jnp.full((1, 3, 1, 8), 3 * 2.0**7, jnp.bfloat16)
    np.testing.assert_array_equal(ja.dot_product_attention(query, key, value), value[:, :1])


@pytest.mark.parametrize("low", [-np.inf, float(np.finfo(np.float32).min), -1e9])
def test_a_bias_that_removes(low: float) -> None:
    """-inf and its substitutes in a bias remove cells, as in `jax.nn`, values and gradients."""
    query, key, value = qkv(1, 3, 4, 1, 1, 4)
    bias = jnp.asarray(np.where(np.tri(3, 4, dtype=bool), 0, low), jnp.float32)[None, None]

    def both(f: Any) -> Any:
        out = f(query, key, value, bias)
        return out, jax.grad(lambda q, b: (f(q, key, value, b) ** 2).sum(), (0, 1))(query, bias)

    got, want = both(ja.dot_product_attention), both(theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


def test_a_row_of_the_lowest_bias_is_uniform() -> None:
    """finfo.min is a number like any other: with all of a row there, all are equally likely."""
    query, key, value = jnp.zeros((1, 2, 1, 4)), *qkv(1, 2, 4, 1, 1, 4)[1:]
    bias = jnp.zeros((1, 1, 2, 4)).at[:, :, 1].set(jnp.finfo(jnp.float32).min)
    got = ja.dot_product_attention(query, key, value, bias)
    np.testing.assert_allclose(got[0, 1], value.mean(1)[0], rtol=1e-5, atol=1e-6)


def test_a_row_of_minus_infinity_is_nan() -> None:
    """A bias removes no cells: a softmax of nothing but -inf is NaN, here as in `jax.nn`."""
    query, key, value = qkv(1, 2, 4, 1, 1, 4)
    bias = jnp.zeros((1, 1, 2, 4)).at[:, :, 1].set(-jnp.inf).at[:, :, 0, :3].set(-jnp.inf)
    out, lse = ja.dot_product_attention(query, key, value, bias, return_residual=True)
    want = theirs(query, key, value, bias)
    np.testing.assert_allclose(out, want, rtol=1e-5)
    assert np.isnan(out[0, 1]).all()
    assert np.isnan(lse[0, 1]).all()
    assert np.isfinite(lse[0, 0]).all()


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"mask": jnp.zeros((3, 4))}, TypeError, "mask: got an array of float32"),
        ({"mask": jnp.ones((2, 1, 3, 4), bool)}, ValueError, r"\[2, 1, 3, 4\]|2.*1"),
        ({"query_seq_lengths": jnp.ones(2, int)}, ValueError, r"query_seq_lengths: got .*\[B\] = "),
        ({"key_value_seq_lengths": jnp.ones(1)}, TypeError, "lengths.*float32"),
        ({"local_window_size": -1}, ValueError, "got -1"),
        ({"bias": jnp.ones((1, 1, 3, 5))}, ValueError, r"\[1, 1, 3, 5\]|5.*4"),
    ],
    ids=["additive", "batch", "lengths", "float lengths", "window", "bias"],
)
def test_errors_of_the_twin(options: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        ja.dot_product_attention(*qkv(1, 3, 4, 2, 2, 8), **options)

"""What Flax promises of its attention, asked of its modules with `attention_fn` in the place of
their own: linen and nnx, values and gradients, dtypes, masks, decoding, dropout, sown weights.

Each behaviour is a law that Flax's own function meets too, or an equality with it.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import everyday, rng
from flax import linen as nn
from flax import nnx

import jaxattn as ja
from jaxattn import masks

B, T, S, F, N = 2, 5, 7, 8, 2
KEY = jax.random.key(0)
OURS = ja.nn.attention_fn()
DIALECTS = ["linen", "nnx"]
THEIRS = {"linen": nn.dot_product_attention, "nnx": nnx.dot_product_attention}
# Of sums of a few products; of 16 bits, in which Flax computes and we only round.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLOSE_16 = {"rtol": 3e-2, "atol": 3e-2}


def numbers(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(rng(71, seed, *shape).normal(size=shape), dtype)


def same(got: Any, want: Any) -> None:
    """The same dtype, and the same numbers as far as that dtype tells."""
    assert got.dtype == want.dtype
    tolerance = CLOSE if got.dtype == jnp.float32 else CLOSE_16
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), **tolerance
    )


@pytest.fixture(autouse=True)
def as_users_run():
    """JAX's own defaults: Flax promotes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def linen_module(fn: Any, **options: Any) -> nn.Module:
    return nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=fn, **options)


def nnx_module(fn: Any, **options: Any) -> nnx.Module:
    options = {"decode": False, "rngs": nnx.Rngs(0, dropout=1)} | options
    return nnx.MultiHeadAttention(N, F, attention_fn=fn, **options)


@lru_cache
def parameters(shapes: Any, options: Any) -> Any:
    """Those of a linen module with these options, for inputs of these shapes: whatever its fn."""
    module = linen_module(nn.dot_product_attention, **dict(options))
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    made = jax.eval_shape(module.lazy_init, KEY, *shapes)["params"]
    draw = rng(83)
    return {
        "params": jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape) / 2, p.dtype), made)
    }


def linen_parts(fn: Any, inputs: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A module, and the parameters of every other with these options."""
    shapes = tuple((x.shape, x.dtype) for x in inputs)
    still = {k: v for k, v in options.items() if k not in ("dropout_rate", "deterministic")}
    return linen_module(fn, **options), parameters(shapes, tuple(still.items()))


def called(dialect: str, fn: Any, *args: Any, call: dict[str, Any] | None = None, **options: Any):
    """A module's output, its parameters those of every other call with these options."""
    given = call or {}
    if dialect == "nnx":
        return nnx_module(fn, **options)(*args, **given)
    module, variables = linen_parts(fn, args, options)
    return module.apply(variables, *args, **given)


def sown(dialect: str, fn: Any, *args: Any, call: dict[str, Any], **options: Any) -> Any:
    """Output and weights of a module that is asked for them."""
    call = call | {"sow_weights": True}
    if dialect == "nnx":
        out, state = nnx.capture(nnx_module(fn, **options), nnx.Intermediate)(*args, **call)
        (weights,) = state["attention_weights"].get_value()
        return out, weights
    module, variables = linen_parts(fn, args, options)
    out, state = module.apply(variables, *args, **call, mutable=["intermediates"])
    (weights,) = state["intermediates"]["attention_weights"]
    return out, weights


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_batch_axes(dialect: str, lead: tuple[int, ...]) -> None:
    """With a bias and a mask, lengths and depths of their own; gradients of all four."""
    if dialect == "nnx" and lead == ():
        pytest.skip("Flax nnx needs a batch")
    query, key = numbers(*lead, T, N, 4), numbers(*lead, S, N, 4, seed=1)
    # Flax nnx takes values as wide as keys alone.
    value = numbers(*lead, S, N, 6 if dialect == "linen" else 4, seed=2)
    bias = numbers(*lead, N, T, S, seed=3)
    mask = jnp.asarray(np.tri(T, S, 1, dtype=bool))
    mask = jnp.broadcast_to(mask, (*lead, 1, T, S))

    def loss(fn: Any, *arrays: Any) -> Any:
        out = fn(*arrays[:3], bias=arrays[3], mask=mask)
        return (out**2).sum(), out

    found = [
        jax.jit(jax.grad(partial(loss, fn), (0, 1, 2, 3), has_aux=True))(query, key, value, bias)
        for fn in (OURS, THEIRS[dialect])
    ]
    jax.tree.map(same, *found)


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        (("float32", "bfloat16", "float32"), None),
        (("bfloat16", "bfloat16", "bfloat16"), None),
        (("float32", "float32", "float32"), "bfloat16"),
        (("bfloat16", "bfloat16", "bfloat16"), "float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dtypes_promote(dialect: str, types: tuple[str, ...], dtype: Any) -> None:
    arrays = [numbers(B, T, N, 4, dtype=t, seed=i) for i, t in enumerate(types)]
    same(OURS(*arrays, dtype=dtype), THEIRS[dialect](*arrays, dtype=dtype))


def test_a_promotion_of_the_callers_own() -> None:
    """`promote_dtype` of nnx decides, as there."""

    def widest(arrays: Any, dtype: Any = None) -> Any:
        return tuple(a.astype(jnp.float32) for a in arrays)

    arrays = [numbers(B, T, N, 4, dtype=jnp.bfloat16, seed=i) for i in range(3)]
    same(OURS(*arrays, promote_dtype=widest), nnx.dot_product_attention(*arrays, promote_dtype=widest))  # fmt: skip


def test_grouped_heads_and_causal() -> None:
    """What nnx's function has and linen's has not."""
    query = numbers(B, T, 4, 4)
    key, value = numbers(B, T, 2, 4, seed=1), numbers(B, T, 2, 4, seed=2)
    padding = jnp.asarray(np.arange(T) < 4)[None, None, None]
    for given in ({}, {"is_causal": True, "mask": jnp.broadcast_to(padding, (B, 1, T, T))}):
        got, want = (fn(query, key, value, **given) for fn in (OURS, THEIRS["nnx"]))
        same(got, want)
    same(
        called("nnx", OURS, numbers(B, T, F), num_kv_heads=1, call={"is_causal": True}),
        called("nnx", THEIRS["nnx"], numbers(B, T, F), num_kv_heads=1, call={"is_causal": True}),
    )


def test_complex_numbers_are_refused() -> None:
    x = jnp.ones((B, T, N, 4), jnp.complex64)
    with pytest.raises(TypeError, match="query: got dtype complex64, expected float16"):
        OURS(x, x, x)


# --- the modules ----------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sizes": {"qkv_features": 12, "out_features": 3},
    "no bias": {"use_bias": False},
    "qk-norm": {"normalize_qk": True},
    "precision": {"precision": jax.lax.Precision.HIGHEST},
    "bfloat16": {"dtype": jnp.bfloat16},
    "bfloat16 parameters": {"param_dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_options(dialect: str, name: str) -> None:
    """Self-attention, and keys and values of their own."""
    x, y, z = numbers(B, T, F), numbers(B, S, F, seed=1), numbers(B, S, F, seed=2)
    for inputs in ((x,), (x, y, z)) if name == "plain" else ((x, y, z),):
        got, want = (
            called(dialect, fn, *inputs, **OPTIONS[name]) for fn in (OURS, THEIRS[dialect])
        )
        same(got, want)


MASKS = {
    "causal": np.tri(T, dtype=np.float32)[None, None],
    "padding": (np.arange(T) < np.asarray([[T], [3]]))[:, None, None],
    "per head": rng(73).random((B, N, T, T)) < 0.7,
}


@pytest.mark.parametrize(("name", "dialect"), everyday((n, d) for n in MASKS for d in DIALECTS))
def test_masks(dialect: str, name: str) -> None:
    x = numbers(B, T, F)
    mask = jnp.asarray(MASKS[name])
    mask = mask | (jnp.eye(T, dtype=bool)) if name == "per head" else mask
    same(*(called(dialect, fn, x, call={"mask": mask}) for fn in (OURS, THEIRS[dialect])))


def test_masks_that_flax_makes() -> None:
    """`make_attention_mask`, `make_causal_mask` and `combine_masks`, with batch axes added."""
    tokens = jnp.asarray([[3, 1, 4, 0, 0], [1, 5, 9, 2, 6]])
    mask = nn.combine_masks(
        nn.make_attention_mask(tokens > 0, tokens > 0), nn.make_causal_mask(tokens)
    )
    x = numbers(B, T, F)
    got, want = (
        called("linen", fn, x, call={"mask": mask}) for fn in (OURS, nn.dot_product_attention)
    )
    # A query of padding sees nothing: 0 here, the mean of all values there.
    real = np.asarray(tokens > 0)
    same(got[real], want[real])
    own = masks.key_padding(tokens > 0) & masks.causal()
    same(called("linen", OURS, x, call={"mask": own})[real], want[real])
    wide = nn.make_causal_mask(jnp.ones((3, B, T)), extra_batch_dims=0)
    x = numbers(3, B, T, F)
    same(*(called("linen", fn, x, call={"mask": wide}) for fn in (OURS, nn.dot_product_attention)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_may_be_felt(dialect: str) -> None:
    """Under a causal mask an output depends on the inputs up to its own, and on all of those."""
    x = numbers(1, T, F)
    mask = nn.make_causal_mask(jnp.ones((1, T)))
    run = jax.jit(lambda x: called(dialect, OURS, x, call={"mask": mask})[0].sum(-1))
    felt = np.abs(np.asarray(jax.jacrev(run)(x)))[:, 0].sum(-1) > 0
    np.testing.assert_array_equal(felt, np.tri(T, dtype=bool))


def test_layers_in_a_scan() -> None:
    """A stack of rematerialised layers and its gradients, as with Flax's own function."""
    x = numbers(B, T, F)
    mask = nn.make_causal_mask(jnp.ones((B, T)))
    weights = jax.tree.map(lambda p: jnp.stack([p, p / 2]), parameters(((x.shape, x.dtype),), ()))
    weights = {"params": {"MultiHeadDotProductAttention_0": weights["params"]}}

    class Layer(nn.Module):
        fn: Any

        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return x + linen_module(self.fn)(x, mask=mask), None

    stack = nn.scan(
        nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )

    def loss(fn: Any, p: Any) -> Any:
        return (stack(fn).apply(p, x, None)[0] ** 2).sum()

    slopes = [
        jax.jit(jax.grad(partial(loss, fn)))(weights) for fn in (OURS, nn.dot_product_attention)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), *slopes)


# --- their caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(B,), (2, 1)], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_decoding(dialect: str, lead: tuple[int, ...]) -> None:
    """Token by token, with padding before: outputs, and the cache that is left behind."""
    x = numbers(*lead, T, F)
    padding = jnp.ones((*lead, 1, 1, T)).at[..., :2].set(0).at[:1].set(1)
    found = []
    for fn in (OURS, THEIRS[dialect]):
        outs = []
        if dialect == "linen":
            module, state = linen_parts(fn, (x,), {"decode": True})
            shapes = jax.eval_shape(module.init, KEY, x)["cache"]
            empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            state = {"params": state["params"], "cache": empty}

            @jax.jit
            def step(state: Any, token: Any, module: Any = module) -> Any:
                out, after = module.apply(state, token, mask=padding, mutable=["cache"])
                return out, state | after

            for i in range(T):
                out, state = step(state, x[..., i : i + 1, :])
                outs.append(out)
            left = state["cache"]
            with pytest.raises(ValueError, match="cache shape error"):
                module.apply(state, x, mutable=["cache"])
        else:
            decoder = nnx_module(fn, decode=True)
            decoder.init_cache(x.shape)
            run = nnx.jit(lambda m, x: m(x, mask=padding))
            outs = [run(decoder, x[..., i : i + 1, :]) for i in range(T)]
            left = nnx.to_pure_dict(nnx.state(decoder, nnx.Cache))
        found.append((jnp.concatenate(outs, -2), left))
    (got, cache), (want, other) = found
    # The queries of padding see nothing: 0 here, a mean there.
    seen = np.asarray(padding[..., 0, 0, :] > 0)
    same(got[seen], want[seen])
    jax.tree.map(np.testing.assert_array_equal, cache, other)


# --- dropout --------------------------------------------------------------------------------------


def dropped(dialect: str, fn: Any, seed: int, **options: Any) -> Any:
    x = numbers(B, T, F)
    options = {"dropout_rate": 0.5, **options}
    if dialect == "nnx":
        return nnx_module(fn, **options)(x, deterministic=False, rngs=nnx.Rngs(dropout=seed))
    module, params = linen_parts(fn, (x,), options)
    return module.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dropout_is_of_its_key(dialect: str) -> None:
    """One key, one result; another key, another; none where it is turned off, or none is given."""
    x = numbers(B, T, F)
    for fn in (OURS, THEIRS[dialect]):
        np.testing.assert_array_equal(dropped(dialect, fn, 1), dropped(dialect, fn, 1))
        assert (np.asarray(dropped(dialect, fn, 1)) != np.asarray(dropped(dialect, fn, 2))).any()
        still = called(dialect, fn, x)
        for given in ({"deterministic": True}, {}):
            options = {"dropout_rate": 0.5} | ({} if given else {"deterministic": True})
            np.testing.assert_array_equal(called(dialect, fn, x, call=given, **options), still)
        with pytest.raises(ValueError, match="deterministic"):
            called(dialect, fn, x, dropout_rate=0.5)


def test_a_dropout_key_in_the_call() -> None:
    """It goes before the module's stream, as in Flax."""
    x = numbers(B, T, F)
    module, params = linen_parts(OURS, (x,), {"dropout_rate": 0.5, "deterministic": False})
    a, b = jax.random.key(1), jax.random.key(2)
    first = module.apply(params, x, rngs={"dropout": a}, dropout_rng=b)
    np.testing.assert_array_equal(first, module.apply(params, x, dropout_rng=b))
    assert (np.asarray(first) != np.asarray(module.apply(params, x, rngs={"dropout": a}))).any()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_dropout_drops(dialect: str, shared: bool) -> None:
    """Half of the weights, the others twice as large; the same for all rows and heads, or not."""
    length = 32
    query = jnp.zeros((B, length, N, length))
    value = jnp.broadcast_to(jnp.eye(length)[None, :, None], (B, length, N, length))
    for fn in (OURS, THEIRS[dialect]):
        weights = np.asarray(
            fn(query, query, value, dropout_rate=0.5, dropout_rng=KEY, broadcast_dropout=shared)
        )
        kept = weights > 0
        np.testing.assert_allclose(weights[kept], 2 / length, rtol=1e-5)
        assert abs(kept.mean() - 0.5) < 0.05
        assert ((kept == kept[:1, :, :1]).mean() == 1) == shared


# --- weights that are shown -----------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(B,), (2, 3)], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_sown_weights(dialect: str, lead: tuple[int, ...]) -> None:
    """The same weights, in the same place and shape, before dropout; the output is unchanged."""
    x = numbers(*lead, T, F)
    mask = jnp.broadcast_to(jnp.tri(T), (*lead, 1, T, T))
    (out, weights), (want_out, want) = (
        sown(dialect, fn, x, call={"mask": mask}) for fn in (OURS, THEIRS[dialect])
    )
    assert weights.shape == (*lead, N, T, T)
    same(weights, want)
    same(out, want_out)
    given: dict[str, Any] = {"mask": mask, "deterministic": False}
    given |= {"dropout_rng": KEY} if dialect == "linen" else {"rngs": nnx.Rngs(dropout=1)}
    dropped_out, again = sown(dialect, OURS, x, call=given, dropout_rate=0.5)
    np.testing.assert_array_equal(again, weights)
    assert (np.asarray(dropped_out) != np.asarray(out)).any()


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_softmax_in_float32(dtype: Any, forced: bool) -> None:
    """`force_fp32_for_softmax`: weights and what comes of them are float32, else the inputs'."""
    x = numbers(B, T, F, dtype=dtype)
    options = {"force_fp32_for_softmax": forced, "param_dtype": dtype}
    mask = jnp.tri(T)
    (out, weights), (want_out, want) = (
        sown("linen", fn, x, call={"mask": mask}, **options)
        for fn in (OURS, nn.dot_product_attention)
    )
    assert weights.dtype == (jnp.float32 if forced else dtype)
    assert (weights.dtype, out.dtype) == (want.dtype, want_out.dtype)
    tolerance = CLOSE if dtype == jnp.float32 else CLOSE_16
    for a, b in ((weights, want), (out, want_out)):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), **tolerance
        )
    if forced and dtype != jnp.float32:
        # Not 16 bits that were widened.
        assert (weights != weights.astype(dtype).astype(jnp.float32)).any()
    q = x.reshape(B, T, N, F // N)
    plain = OURS(q, q, q, force_fp32_for_softmax=forced)
    assert plain.dtype == nn.dot_product_attention(q, q, q, force_fp32_for_softmax=forced).dtype

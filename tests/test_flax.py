"""Flax modules: linen and nnx are one function of their parameters, and Flax's own where it has it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import everyday, rng
from flax import linen as nn
from flax import nnx

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.nn import linen
from jaxattn.nn import nnx as ours

B, T, S, F, N = 2, 6, 7, 16, 4
Module = Callable[..., Any]


def inputs(length: int = T, features: int = F, *seed: int) -> jax.Array:
    return jnp.asarray(
        rng(37, length, features, *seed).normal(size=(B, length, features)), jnp.float32
    )


def fill(module: Any, params: Any) -> Any:
    """The nnx module with the parameters of a linen one."""
    for name, part in params.items():
        inner = getattr(module, name)
        if isinstance(part, dict):
            fill(inner, part)
        else:
            inner[...] = part
    return module


def pair(x: Any, *, in_kv: int | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """A linen module, its parameters at random, and the nnx module that has the same."""
    module = linen.MultiHeadAttention(num_heads=N, **options)
    other = () if in_kv is None else (jnp.ones((B, S, in_kv)),)
    params = module.init(jax.random.key(1), x, *other)["params"]
    draw = rng(41)
    params = jax.tree.map(
        lambda p: jnp.asarray(draw.normal(size=p.shape) * 0.5, p.dtype), nn.unbox(params)
    )
    twin = ours.MultiHeadAttention(
        N, x.shape[-1], in_kv_features=in_kv, rngs=nnx.Rngs(0), **options
    )
    return module, params, fill(twin, params)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "sizes": {"qkv_features": 8, "out_features": 5},
    "head dim": {"head_dim": 6},
    "no bias": {"use_bias": False},
    "qk-norm": {"normalize_qk": True},
    "sinks": {"sinks": True},
    "rope": {"rope": ja.nn.RoPE()},
    "half rope": {"rope": ja.nn.RoPE(theta=100.0, fraction=0.5)},
    "mask and score": {
        "mask": masks.causal(),
        "score": lambda: scores.alibi(scores.alibi_slopes(N)),
    },
    "bfloat16": {"dtype": jnp.bfloat16},
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=pytest.mark.deep if n % 2 else ())
        for n, (name, options) in enumerate(OPTIONS.items())
    ],
)
def test_one_module_in_two_dialects(options: dict[str, Any]) -> None:
    """The same parameters, the same output: alone, masked, with positions, from a cache."""
    x = inputs()
    module, params, twin = pair(x, **options)
    assert sorted(params) == sorted(nnx.to_pure_dict(nnx.state(twin, nnx.Param)))
    padding = masks.key_padding(lengths=jnp.asarray([T, 3]))
    positions = ja.Positions(q=jnp.arange(T) + 2, k=jnp.arange(T) + 2)
    for call in ({}, {"mask": padding}, {"mask": masks.causal(), "positions": positions}):
        want = module.apply({"params": params}, x, **call)
        got = twin(x, **call)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "name", everyday(["plain", "grouped", "qk-norm", "rope", "sinks", "mask and score"], 2, 1)
)
def test_the_cache_of_a_module(name: str) -> None:
    """A prompt and tokens, in both dialects, equal one pass."""
    x = inputs()
    module, params, twin = pair(x, **OPTIONS[name])
    heads = OPTIONS[name].get("num_kv_heads", N)
    mask = masks.causal()
    want = twin(x, mask=mask)
    for call in (partial(module.apply, {"params": params}), twin):
        cache, outs = ja.KVCache.create(B, T, heads, F // N), []
        for piece in (x[:, :3], x[:, 3:4], x[:, 4:]):
            out, cache = call(piece, mask=mask, cache=cache)
            outs.append(out)
        np.testing.assert_allclose(jnp.concatenate(outs, 1), want, rtol=1e-5, atol=1e-5)
    # A row that brings fewer tokens is as if it were alone.
    cache = ja.KVCache.create(B, T, heads, F // N)
    _, cache = twin(x[:, :3], mask=mask, cache=cache, counts=jnp.asarray([3, 2]))
    out, cache = twin(x[:, 2:3], mask=mask, cache=cache)
    np.testing.assert_allclose(out[1], want[1, 2:3], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.length, [4, 3])


def test_cross_attention_and_what_it_remembers() -> None:
    """Keys and values of a memory, projected once, serve every step."""
    x, y = inputs(), inputs(S, 10)
    mask = masks.key_padding(lengths=jnp.asarray([S, 4]))
    for rope in (None, ja.nn.RoPE()):
        module, params, twin = pair(x, in_kv=10, qkv_features=F, rope=rope, num_kv_heads=2)
        want = twin(x, y, mask=mask)
        bound = {"params": params}
        np.testing.assert_array_equal(module.apply(bound, x, y, mask=mask), want)
        for memory, call in (
            (twin.remember(y), twin),
            (module.apply(bound, y, method="remember"), partial(module.apply, bound)),
        ):
            np.testing.assert_allclose(call(x, memory, mask=mask), want, rtol=1e-5, atol=1e-6)
            third = call(x[:, 3:4], memory, mask=mask, positions=ja.Positions(q=jnp.asarray([3])))
            np.testing.assert_allclose(third, want[:, 3:4], rtol=1e-5, atol=1e-6)


def test_unbatched_and_strange_lengths() -> None:
    x = inputs()
    _, _, twin = pair(x, rope=ja.nn.RoPE())
    np.testing.assert_allclose(twin(x[0]), twin(x)[0], rtol=1e-5, atol=1e-5)


def test_weights_are_sown() -> None:
    """In both dialects, as Flax does, and they are those of the attention that ran."""
    x = inputs()
    module, params, twin = pair(x)
    _, state = module.apply(
        {"params": params}, x, mask=masks.causal(), sow_weights=True, mutable=["intermediates"]
    )
    (got,) = state["intermediates"]["attention_weights"]
    _, state = nnx.capture(twin, nnx.Intermediate)(x, mask=masks.causal(), sow_weights=True)
    (other,) = state["attention_weights"].get_value()
    flax_own = nn.MultiHeadDotProductAttention(num_heads=N)
    _, state = flax_own.apply(
        {"params": params}, x, mask=nn.make_causal_mask(x[..., 0]), sow_weights=True,
        mutable=["intermediates"],
    )  # fmt: skip
    (want,) = state["intermediates"]["attention_weights"]
    np.testing.assert_array_equal(got, other)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2}, {"normalize_qk": True}, {"use_bias": False}, {"qkv_features": 8, "out_features": 5}],
    ids=str,
)  # fmt: skip
def test_checkpoints_of_flax_nnx(options: dict[str, Any]) -> None:
    """Their state in our module and ours in theirs, the same outputs to 1e-5."""
    x = inputs()
    theirs = nnx.MultiHeadAttention(
        N, F, decode=False, attention_fn=_masked_gqa, rngs=nnx.Rngs(3), **options
    )
    mine = ours.MultiHeadAttention(N, F, rngs=nnx.Rngs(4), **options)
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(theirs, nnx.Param))) == jax.tree.structure(
        nnx.to_pure_dict(nnx.state(mine, nnx.Param))
    )
    dense = nn.make_causal_mask(x[..., 0])
    for source, target in ((theirs, mine), (mine, theirs)):
        draw = rng(43, id(source) % 7)
        for leaf in jax.tree.leaves(nnx.state(source, nnx.Param), is_leaf=_is_variable):
            leaf[...] = jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype)
        nnx.update(target, nnx.state(source, nnx.Param))
        want = theirs(x, mask=dense)
        np.testing.assert_allclose(mine(x, mask=masks.causal()), want, rtol=1e-5, atol=1e-5)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _masked_gqa(query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> Any:
    return jax.nn.dot_product_attention(query, key, value, mask=mask != 0)


def test_rope_is_that_of_nnx() -> None:
    x = inputs().reshape(B, T, N, F // N)
    at = jnp.arange(T) * 3
    if not hasattr(nnx, "RoPE"):
        # Older Flax has none: the formula, pair by pair.
        half = F // N // 2
        angle = np.asarray(at)[:, None] * 10_000.0 ** (-np.arange(half) / half)
        pairs = np.asarray(x[..., :half]) + 1j * np.asarray(x[..., half:])
        turned = pairs * np.exp(1j * angle)[None, :, None]
        want: Any = np.concatenate([turned.real, turned.imag], -1)
    else:
        want = jax.vmap(nnx.RoPE(), in_axes=(-2, None), out_axes=-2)(x, at.astype(jnp.float32))
    np.testing.assert_allclose(ja.nn.RoPE()(x, at), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"RoPE\(fraction\): got 0.3"):
        ja.nn.RoPE(fraction=0.3)(x, at)


@pytest.mark.parametrize("lead", [(4,), (1, 4), (3, 4), (2, 3, 4), (2, 1, 4)])
def test_rope_takes_any_number_of_batch_axes(lead: tuple[int, ...]) -> None:
    """And positions that broadcast to them."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 2, 6))
    at = jax.random.randint(jax.random.key(1), lead, 0, 100)
    full = jnp.broadcast_to(at, x.shape[:3])
    want = [ja.nn.RoPE()(a, p) for a, p in zip(x, full, strict=True)]
    np.testing.assert_array_equal(ja.nn.RoPE()(x, at), want)


def test_dropout_of_nnx() -> None:
    x = inputs()
    module = ours.MultiHeadAttention(N, F, dropout_rate=0.5, rngs=nnx.Rngs(0, dropout=1))
    plain = ours.MultiHeadAttention(N, F, rngs=nnx.Rngs(0))
    module.eval()
    np.testing.assert_array_equal(module(x), plain(x))
    module.train()
    first, second = module(x), module(x)
    assert (np.asarray(first) != np.asarray(second)).any()
    np.testing.assert_array_equal(
        module(x, rngs=nnx.Rngs(dropout=5)), module(x, rngs=nnx.Rngs(dropout=5))
    )
    np.testing.assert_array_equal(module(x, deterministic=True), plain(x))
    module.deterministic = None
    with pytest.raises(ValueError, match=r"deterministic: got None with dropout_rate=0\.5"):
        module(x)


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", everyday(["pre", "post"]))
def test_blocks(norm: Any) -> None:
    """Both dialects, with a memory and from a cache, and what the formula says."""
    x, memory = inputs(), inputs(S, 10)
    make = partial(linen.MultiHeadAttention, num_heads=N, qkv_features=F)
    block = linen.TransformerBlock(make, 24, norm=norm)
    params = block.init(jax.random.key(0), x, memory=memory)["params"]
    twin = fill(
        ours.TransformerBlock(
            F, partial(ours.MultiHeadAttention, N, qkv_features=F), 24,
            memory_features=10, norm=norm, rngs=nnx.Rngs(1),
        ),
        params,
    )  # fmt: skip
    mask, memory_mask = masks.causal(), masks.key_padding(lengths=jnp.asarray([S, 3]))
    call: dict[str, Any] = {"mask": mask, "memory_mask": memory_mask}
    apply = partial(block.apply, {"params": params})
    want = apply(x, memory=memory, **call)
    np.testing.assert_allclose(twin(x, memory=memory, **call), want, rtol=1e-6, atol=1e-6)

    def layer_norm(name: str, x: Any) -> Any:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        scale, bias = (params[name][leaf][None, None] for leaf in ("scale", "bias"))
        return (x - mean) / jnp.sqrt(var + 1e-6) * scale + bias

    def attend(name: str, *args: Any, **options: Any) -> Any:
        return make().apply({"params": params[name]}, *args, **options)

    def mlp(x: Any) -> Any:
        a, b = params["mlp_in"], params["mlp_out"]
        hidden = jax.nn.gelu(x @ a["kernel"] + a["bias"][None, None])
        return hidden @ b["kernel"] + b["bias"][None, None]

    y = x
    for name, f in (
        ("attention_norm", lambda y: attend("attention", y, mask=mask)),
        ("cross_norm", lambda y: attend("cross_attention", y, memory, mask=memory_mask)),
        ("mlp_norm", mlp),
    ):
        y = y + f(layer_norm(name, y)) if norm == "pre" else layer_norm(name, y + f(y))
    np.testing.assert_allclose(want, y, rtol=1e-4, atol=1e-5)

    for run, kept in (
        (apply, block.apply({"params": params}, memory, method="remember")),
        (twin, twin.remember(memory)),
    ):
        cache, outs = ja.KVCache.create(B, T, N, F // N), []
        for piece in (x[:, :4], x[:, 4:5], x[:, 5:]):
            out, cache = run(piece, memory=kept, cache=cache, **call)
            outs.append(out)
        np.testing.assert_allclose(jnp.concatenate(outs, 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", ["linen", "nnx"])
def test_queries_of_a_block_are_at_their_positions_in_its_memory_too(dialect: str) -> None:
    """Rotary embeddings and masks of cross-attention, in decoding and in part of a sequence."""
    x, memory = inputs(), inputs()[::-1]
    rope = ja.nn.RoPE()
    call: dict[str, Any] = {"mask": masks.causal(), "memory_mask": masks.causal(1)}
    if dialect == "linen":
        block = linen.TransformerBlock(partial(linen.MultiHeadAttention, N, rope=rope), 8)
        run = block.bind(block.init(jax.random.key(0), x, memory=memory))
    else:
        attention = partial(ours.MultiHeadAttention, N, rope=rope)
        run = ours.TransformerBlock(F, attention, 8, memory_features=F, rngs=nnx.Rngs(0))
    want = run(x, memory=memory, **call)
    for kept in (memory, run.remember(memory)):
        cache, outs = ja.KVCache.create(B, T, N, F // N), []
        for piece in (x[:, :4], x[:, 4:]):
            out, cache = run(piece, memory=kept, cache=cache, **call)
            outs.append(out)
        np.testing.assert_allclose(jnp.concatenate(outs, 1), want, rtol=1e-5, atol=1e-5)
    # Tokens that do not see each other, so that a part of them is enough.
    alone = {**call, "mask": lambda b, h, q, k: q == k}
    late = jnp.arange(3, T)
    part = run(x[:, 3:], memory=memory, positions=ja.Positions(q=late, k=late), **alone)
    whole = run(x, memory=memory, **alone)
    np.testing.assert_allclose(part, whole[:, 3:], rtol=1e-5, atol=1e-5)


def test_blocks_as_in_llama() -> None:
    """RMS norms, a gate, and no biases: both dialects, and what the formula says."""
    x = inputs()
    attention: dict[str, Any] = {"use_bias": False, "rope": ja.nn.RoPE(), "mask": masks.causal()}
    make = partial(linen.MultiHeadAttention, num_heads=N, num_kv_heads=1, **attention)
    mlp: dict[str, Any] = {"gated": True, "use_bias": False}
    norm_layer = partial(nn.RMSNorm, epsilon=1e-5)
    block = linen.TransformerBlock(make, 24, norm_layer=norm_layer, activation=nn.silu, **mlp)
    params = block.init(jax.random.key(0), x)["params"]
    assert not [path for path, _ in jax.tree.leaves_with_path(params) if "bias" in str(path)]
    twin = fill(
        ours.TransformerBlock(
            F, partial(ours.MultiHeadAttention, N, num_kv_heads=1, **attention), 24,
            norm_layer=partial(nnx.RMSNorm, epsilon=1e-5), activation=nnx.silu, **mlp,
            rngs=nnx.Rngs(1),
        ),
        params,
    )  # fmt: skip
    found = block.apply({"params": params}, x)
    np.testing.assert_allclose(twin(x), found, rtol=1e-6, atol=1e-6)

    def norm(name: str, x: Any) -> Any:
        mean = (x * x).mean(-1, keepdims=True)
        return x / jnp.sqrt(mean + 1e-5) * params[name]["scale"][None, None]

    y = x + make().apply({"params": params["attention"]}, norm("attention_norm", x))
    inner = norm("mlp_norm", y)
    gate, up, down = (params[f"mlp_{name}"]["kernel"] for name in ("gate", "in", "out"))
    wanted = y + (jax.nn.silu(inner @ gate) * (inner @ up)) @ down
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_of_blocks() -> None:
    x = inputs()
    make = partial(linen.MultiHeadAttention, num_heads=N, dropout_rate=0.5)
    block = linen.TransformerBlock(make, 8, dropout_rate=0.5)
    params = block.init(jax.random.key(0), x, deterministic=True)
    still = block.apply(params, x, deterministic=True)

    def run(seed: int) -> Any:
        return block.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(run(1), run(1))
    assert (np.asarray(run(1)) != np.asarray(run(2))).any()
    twin = ours.TransformerBlock(
        F, partial(ours.MultiHeadAttention, N, dropout_rate=0.5), 8, dropout_rate=0.5,
        rngs=nnx.Rngs(0, dropout=1),
    )  # fmt: skip
    twin = fill(twin, params["params"])
    twin.eval()
    np.testing.assert_allclose(twin(x), still, rtol=1e-6, atol=1e-6)
    twin.train()
    assert (np.asarray(twin(x)) != np.asarray(twin(x))).any()


# --- masks in modules -----------------------------------------------------------------------------


def test_masks_are_arguments_of_nnx_jit(compilations: Any) -> None:
    """New lengths and ids, one program; gradients flow to the parameters."""
    x = inputs()
    _, _, module = pair(x, mask=masks.causal())
    traced = []

    @nnx.jit
    def step(module: Any, mask: Any) -> Any:
        traced.append(1)
        return nnx.grad(lambda m: (m(x, mask=mask) ** 2).sum())(module)

    def mask(n: int) -> Any:
        ids = jnp.arange(T) // n
        return masks.key_padding(lengths=jnp.asarray([n, 2])) & masks.segments(ids)

    first, second = step(module, mask(5)), step(module, mask(3))
    assert len(traced) == 1
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)))
    want = nnx.grad(lambda m: (m(x, mask=mask(3)) ** 2).sum())(module)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), second, want)


@pytest.mark.parametrize("remat", everyday([False, True], 2, 1), ids=["", "remat"])
def test_layers_in_a_scan(remat: bool) -> None:
    """A stack of layers as one scanned layer, in both dialects, equals the loop."""
    x = inputs()
    mask = masks.causal() & masks.key_padding(lengths=jnp.asarray([T, 4]))
    make = partial(linen.MultiHeadAttention, num_heads=N)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, mask: Any) -> Any:
            return linen.TransformerBlock(make, 8, name="block")(x, mask=mask), None

    scanned = nn.scan(
        nn.remat(Layer) if remat else Layer, variable_axes={"params": 0},
        split_rngs={"params": True}, in_axes=nn.broadcast, length=3,
    )()  # fmt: skip
    params = scanned.init(jax.random.key(0), x, mask)
    got, _ = scanned.apply(params, x, mask)
    want = x
    for i in range(3):
        layer = jax.tree.map(lambda p: p[i], params["params"]["block"])
        want = linen.TransformerBlock(make, 8).apply({"params": layer}, want, mask=mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: Any) -> Any:
        return ours.TransformerBlock(F, partial(ours.MultiHeadAttention, N), 8, rngs=rngs)

    layers = stack(nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(layers, nnx.Param))
    fill(layers, params["params"]["block"])
    assert jax.tree.structure(state) == jax.tree.structure(dict(params["params"]["block"]))

    def forward(x: Any, layer: Any) -> Any:
        return layer(x, mask=mask)

    run = nnx.scan(
        nnx.remat(forward) if remat else forward, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    np.testing.assert_allclose(nnx.jit(run)(x, layers), want, rtol=1e-4, atol=1e-4)


def test_sharded_parameters() -> None:
    """Heads over devices: parameters carry their axes, and the result is that of one device."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x = inputs()
    options: dict[str, Any] = {
        "sharding": (None, "model", None),
        "sinks": True,
        "normalize_qk": True,
    }
    module = linen.MultiHeadAttention(num_heads=N, **options)
    boxed = module.init(jax.random.key(0), x)
    spec = nn.get_partition_spec(boxed)["params"]
    P = jax.sharding.PartitionSpec
    assert spec["query"] == {"kernel": P(None, "model", None), "bias": P("model", None)}
    assert spec["out"] == {"kernel": P("model", None, None), "bias": P(None)}
    assert spec["sinks"] == P("model")
    assert spec["query_ln"]["scale"] == P(None)
    params = nn.unbox(boxed)["params"]
    want = linen.MultiHeadAttention(num_heads=N, sinks=True, normalize_qk=True).apply(
        {"params": params}, x, mask=masks.causal()
    )
    placed = jax.tree.map(
        lambda p, s: jax.device_put(p, jax.sharding.NamedSharding(mesh, s)), params, spec
    )
    run = jax.jit(lambda p, x: module.apply({"params": p}, x, mask=masks.causal()))
    np.testing.assert_allclose(run(placed, x), want, rtol=1e-5, atol=1e-5)

    with jax.set_mesh(mesh):
        twin = ours.MultiHeadAttention(N, F, rngs=nnx.Rngs(0), **options)
        specs = nnx.get_partition_spec(nnx.state(twin, nnx.Param))
        assert specs["query"]["kernel"].get_value() == P(None, "model", None)
        assert specs["out"]["kernel"].get_value() == P("model", None, None)
        fill(twin, params)
        got = nnx.jit(lambda m, x: m(x, mask=masks.causal()))(twin, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: ours.MultiHeadAttention(5, F, rngs=nnx.Rngs(0)), r"qkv_features\): got 16, expected a multiple of num_heads=5"),
        (lambda x: ours.MultiHeadAttention(4, F, num_kv_heads=3, rngs=nnx.Rngs(0)), r"num_kv_heads\): got 3, expected a divisor"),
        (lambda x: ours.MultiHeadAttention(4, F, mask=masks.segments(jnp.zeros(T, int)), rngs=nnx.Rngs(0)), r"MultiHeadAttention\(mask\).*holds arrays.*the call takes it as mask="),
        (lambda x: linen.MultiHeadAttention(4, score=scores.alibi(jnp.ones(4))).init(jax.random.key(0), x), r"MultiHeadAttention\(score\).*holds arrays"),
        (lambda x: ours.TransformerBlock(F, partial(ours.MultiHeadAttention, 4), 8, norm="mid", rngs=nnx.Rngs(0)), r"norm\): got 'mid', expected 'pre' or 'post'"),
        (lambda x: ours.TransformerBlock(F, partial(ours.MultiHeadAttention, 4), 8, rngs=nnx.Rngs(0))(x, memory=x), "memory: got one in a block without memory_features"),
        (lambda x: ours.MultiHeadAttention(4, F, rngs=nnx.Rngs(0))(x, cache=ja.KVCache.create(B, T, 4, 4), positions=ja.Positions()), "positions: got a value, and cache= a KVCache"),
        (lambda x: ours.MultiHeadAttention(4, F, rngs=nnx.Rngs(0))(x, ja.KVCache.create(B, T, 4, 4), cache=ja.KVCache.create(B, T, 4, 4)), "inputs_kv: got a value, and cache= a KVCache"),
        (lambda x: ours.MultiHeadAttention(4, F, rngs=nnx.Rngs(0))(x[0], cache=ja.KVCache.create(B, T, 4, 4)), "inputs_q: got queries of shape .* with a cache, expected a batch"),
        (lambda x: ours.MultiHeadAttention(4, F, rngs=nnx.Rngs(0)).remember(x[0]), "inputs_kv.*expected a batch"),
    ],
    ids=range(10),
)  # fmt: skip
def test_errors(call: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(inputs())


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("dialect", ["linen", "nnx"])
def test_an_attribute_that_is_a_function_of_positions(dialect: str) -> None:
    """Functions among the attributes are factories; the error says what makes it a mask."""

    def run(**attribute: Any) -> Any:
        if dialect == "linen":
            return linen.MultiHeadAttention(4, **attribute).init(jax.random.key(0), inputs())
        return ours.MultiHeadAttention(4, F, **attribute, rngs=nnx.Rngs(0))

    for says, attribute in {
        r"mask\) \(.*\): got a function of \(b, h, q, k\), .*masks.predicate\(fn\)": {
            "mask": lambda b, h, q, k: q >= k
        },
        r"score\) \(.*\): got a function of \(x, b, h, q, k\), .*scores.score\(fn\)": {
            "score": lambda x, b, h, q, k: x - k
        },
        r"stats\) \(.*\): got a function of \(x, b, h, q, k\), .*stats.mean\(fn\)": {
            "stats": lambda x, b, h, q, k: q - k
        },
        r"mask\): got the function masks.sliding_window, expected what it returns": {
            "mask": masks.sliding_window
        },
    }.items():
        with pytest.raises(TypeError, match=r"MultiHeadAttention\(" + says):
            run(**attribute)


WRONG = {
    "one position for all keys": (
        {"rope": ja.nn.RoPE()},
        {"inputs_kv": jnp.ones((B, S, F)), "rope_positions": jnp.array([5])},
        r"rope_positions: got shape \[1\], expected \[7\] or \[2, 7\].*Positions\(q=, k=\)",
    ),
    "positions of other tokens": (
        {"rope": ja.nn.RoPE()},
        {"positions": ja.Positions(q=jnp.arange(3))},
        r"positions.q: got shape \[3\], expected \[1\] or \[2, 1\]",
    ),
    "positions as an array": (
        {},
        {"positions": jnp.arange(1)},
        r"positions: got ArrayImpl, expected Positions\(b=, h=, q=, k=\)",
    ),
    "no cache": ({}, {"cache": {"length": 3}}, "cache: got dict, expected a cache, as of"),
    "a rate below 0": (
        {"dropout_rate": -0.1, "deterministic": False},
        {},
        r"MultiHeadAttention\(dropout_rate\): got -0.1, expected a probability",
    ),
    "a head without features": ({"head_dim": 0}, {}, r"\(head_dim\): got 0, expected at least 1"),
    "axes as a string": ({"sharding": "abc"}, {}, r"\(sharding\): got 'abc', expected mesh axes"),
}


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("dialect", ["linen", "nnx"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(dialect: str, name: str) -> None:
    """Of a query of one token, to which any length would broadcast."""
    attributes, call, says = WRONG[name]
    x = inputs()[:, :1]

    def run() -> Any:
        if dialect == "linen":
            module = linen.MultiHeadAttention(4, **attributes)
            return module.init_with_output(jax.random.key(0), x, **call)
        return ours.MultiHeadAttention(4, F, **attributes, rngs=nnx.Rngs(0))(x, **call)

    with pytest.raises((TypeError, ValueError), match=says):
        run()


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("rate", [-0.1, 10.0])
def test_a_block_with_a_rate_that_is_none(rate: float) -> None:
    says = r"TransformerBlock\(dropout_rate\): got .*expected a probability"
    options = {"dropout_rate": rate, "deterministic": False}
    with pytest.raises(ValueError, match=says):
        ours.TransformerBlock(
            F, partial(ours.MultiHeadAttention, 4), 8, **options, rngs=nnx.Rngs(0)
        )
    block = linen.TransformerBlock(partial(linen.MultiHeadAttention, 4), 8, **options)
    with pytest.raises(ValueError, match=says):
        block.init(jax.random.key(0), inputs())


def attends(dialect: str, block: bool) -> Callable[..., Any]:
    """A module with rotary embeddings, or a block of one, made for `inputs()`."""
    rope = ja.nn.RoPE()
    if dialect == "nnx":
        make = partial(ours.MultiHeadAttention, N, rope=rope)
        rngs = nnx.Rngs(0)
        return ours.TransformerBlock(F, make, 8, rngs=rngs) if block else make(F, rngs=rngs)
    layer = partial(linen.MultiHeadAttention, num_heads=N, rope=rope)
    module = linen.TransformerBlock(layer, 8) if block else layer()
    return partial(module.apply, module.init(jax.random.key(0), inputs()))


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("dialect", ["linen", "nnx"])
def test_what_a_module_is_given(dialect: str) -> None:
    """Inputs, masks and caches that are not its own are named, before anything is computed."""
    x = inputs()
    cache = partial(ja.KVCache.create, B, T)
    for call, kind, says in (
        (lambda f: f(x[..., :5]), ValueError, r"inputs_q: got shape \[2, 6, 5\], expected \[B, T, 16\]"),
        (lambda f: f(x[0, 0]), ValueError, r"inputs_q: got shape \[16\], expected"),
        (lambda f: f(x, x[..., :5]), ValueError, r"inputs_kv: got shape \[2, 6, 5\], expected \[B, T, 16\]"),
        (lambda f: f(x, x[:1]), ValueError, r"inputs_kv: got a batch of \[1\], expected \[2\]"),
        (lambda f: f(x, masks.causal()), TypeError, r"inputs_kv: got causal\(\), .*given by name, as layer\(x, mask="),
        (lambda f: f(x, lambda b, h, q, k: q >= k), TypeError, "inputs_kv: got .*given by name"),
        (lambda f: f(x, jnp.ones((T, T), bool)), TypeError, r"inputs_kv: got booleans \[6, 6\].*given by name"),
        (lambda f: f(x, counts=jnp.asarray([1, 2])), ValueError, "counts: got a value without a cache"),
        (lambda f: f([[1.0]]), TypeError, "inputs_q: got list, expected an array"),
        (lambda f: f(x, cache=ja.KVCache.create(3, T, N, 4)), ValueError, r"cache: got KVCache\(batch=3.*expected batch=2"),
        (lambda f: f(x, cache=cache(2, 4)), ValueError, "cache: got KVCache.*expected batch=2, head_dim=4 and heads=4"),
        (lambda f: f(x, ja.KVCache.create(3, T, N, 4)), ValueError, r"inputs_kv: got KVCache\(batch=3"),
        (lambda f: f(x, cache=cache(N, 4, dtype=jnp.bfloat16)), TypeError, r"cache: got .*expected dtype=float32.*stored="),
    ):  # fmt: skip
        with pytest.raises(kind, match=says):
            call(attends(dialect, False))
    with pytest.raises(ValueError, match=r"x: got shape \[2, 6, 5\], expected \[B, T, 16\]"):
        attends(dialect, True)(x[..., :5])
    if dialect == "nnx":
        make = partial(ours.MultiHeadAttention, N)
        block = ours.TransformerBlock(F, make, 8, memory_features=10, rngs=nnx.Rngs(0))
        with pytest.raises(
            ValueError, match=r"memory: got shape \[2, 6, 16\], expected \[B, T, 10\]"
        ):
            block(x, memory=x)
    # What the last of them advises.
    held = cache(N, 4, stored=jnp.bfloat16)
    out, _ = attends(dialect, False)(x, cache=held, mask=masks.causal())
    np.testing.assert_allclose(out, attends(dialect, False)(x, mask=masks.causal()), atol=0.02)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_without_flax(name: str, monkeypatch: Any) -> None:
    """Whoever reaches for a module is told which extra brings it."""
    monkeypatch.setitem(sys.modules, "flax", None)
    for module in ("flax_packages", "linen", "nnx"):
        monkeypatch.delitem(sys.modules, f"jaxattn.nn.{module}")
        monkeypatch.delattr(ja.nn, module)
    with pytest.raises(ImportError, match=r'need flax; pip install "jaxattn\[flax\]"'):
        getattr(ja.nn, name)
    with pytest.raises(ImportError, match=r'need flax; pip install "jaxattn\[flax\]"'):
        importlib.import_module(f"jaxattn.nn.{name}")
    assert callable(ja.nn.attention_fn(masks.causal()))

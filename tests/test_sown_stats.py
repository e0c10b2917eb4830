"""Statistics that Flax modules sow: those of `ja.attention` at the layer's own arrays."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import linen as nn
from flax import nnx

import jaxattn as ja
from jaxattn import masks, stats
from jaxattn.nn import linen
from jaxattn.nn import nnx as ours

B, T, F, N, K = 2, 6, 16, 4, 2
DIALECTS = ["linen", "nnx"]
NAME = "attention_stats"
SIZES: dict[str, Any] = {"num_heads": N, "num_kv_heads": K, "mask": masks.causal()}


def far(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return q - k


def asked() -> Any:
    return {"top": stats.max(), "entropy": stats.entropy(), "others": [stats.mean(far)]}


ASKED = asked()


def inputs(*seed: int) -> jax.Array:
    return jnp.asarray(rng(59, *seed).normal(size=(B, T, F)), jnp.float32)


def qkv(params: Any, x: Any) -> list[jax.Array]:
    """What a layer with these parameters projects."""
    parts = (params[name] for name in ("query", "key", "value"))
    return [jnp.einsum("btf,fnh->btnh", x, p["kernel"]) + p["bias"][None, None] for p in parts]


def collected(dialect: str, call: dict[str, Any], *xs: Any, **options: Any) -> tuple[Any, ...]:
    """Output, what was sown, and the parameters of a layer that is called with each input."""
    options = SIZES | options
    if dialect == "linen":
        module = linen.MultiHeadAttention(**options)
        params = linen.MultiHeadAttention(**SIZES).init(jax.random.key(1), xs[0])["params"]
        out, state = module.apply(
            {"params": params},
            *xs,
            **call,
            rngs={"dropout": jax.random.key(0)},
            mutable=["intermediates"],
        )
        assert set(state) <= {"intermediates"}
        return out, state.get("intermediates", {}).get(NAME), params
    layer = ours.MultiHeadAttention(in_features=F, rngs=nnx.Rngs(0), **options)
    out, state = nnx.capture(layer, nnx.Intermediate)(*xs, **call)
    found = state[NAME].get_value() if NAME in state else None
    return out, found, nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_values_are_those_of_attention(dialect: str) -> None:
    """In the pytree that was asked for; those of the call come before those of the module."""
    x = inputs()
    plain, _, _ = collected(dialect, {}, x)
    out, (seen,), params = collected(dialect, {}, x, stats=ASKED)
    same(out, plain)
    _, want = ja.attention(*qkv(params, x), mask=masks.causal(), stats=ASKED)
    same(seen, want)
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1], [0] * T])
    own = stats.mass(masks.segments(ids))
    for options, call in (({"stats": ASKED}, {"stats": own}), ({"stats": lambda: own}, {})):
        _, (seen,), _ = collected(dialect, call, x, **options)
        same(seen, ja.attention(*qkv(params, x), mask=masks.causal(), stats=own)[1])
    _, (row,), _ = collected(dialect, {}, x[0], stats=stats.received())
    every = ja.attention(*qkv(params, x), mask=masks.causal(), stats=stats.received())[1]
    same(row, every[0])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dropout_and_weights(dialect: str) -> None:
    """Statistics are of the weights before dropout, and equal what the sown weights say."""
    x = inputs()
    _, (want,), _ = collected(dialect, {}, x, stats=stats.entropy())
    call = {"deterministic": False, "sow_weights": True}
    _, (seen,), params = collected(dialect, call, x, stats=stats.entropy(), dropout_rate=0.5)
    same(seen, want)
    query, key, _ = qkv(params, x)
    p = ja.attention_weights(query, key, mask=masks.causal())
    same(seen, jnp.swapaxes(-jax.scipy.special.xlogy(p, p).sum(-1), 1, 2))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_step_of_decoding(dialect: str) -> None:
    """From a cache and from a memory, the rows of one whole pass."""
    x, sizes = inputs(), {"stats": stats.entropy()}
    _, (want,), params = collected(dialect, {}, x, **sizes)
    cache, found = ja.KVCache.create(B, T, K, F // N), []
    for piece in (x[:, :3], x[:, 3:4], x[:, 4:]):
        (_, cache), (seen,), _ = collected(dialect, {"cache": cache}, piece, **sizes)
        found.append(seen)
    same(jnp.concatenate(found, 1), want)
    _, key, value = qkv(params, x)
    memory = ja.KVCache.create(B, T, K, F // N).append(key, value)
    _, (seen,), _ = collected(dialect, {}, x, memory, **sizes)
    same(seen, want)


class Scanned(nn.Module):
    """Two layers, scanned, the second step of each call after the first."""

    remat: bool = False

    @nn.compact
    def __call__(self, x: Any, steps: int = 1) -> Any:
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                layer = partial(linen.MultiHeadAttention, **SIZES, stats=ASKED)
                return linen.TransformerBlock(layer, F, name="block")(x), None

        body = nn.remat(Body) if self.remat else Body
        axes = {"params": 0, "intermediates": 0}
        layers = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=2)()
        for _ in range(steps):
            x, _ = layers(x, None)
        return x


class ScannedTwin(nnx.Module):
    """The same in nnx."""

    def __init__(self, remat: bool = False) -> None:
        layer = partial(ours.MultiHeadAttention, **SIZES, stats=asked())
        self.remat = remat

        @nnx.vmap
        def made(key: Any) -> ours.TransformerBlock:
            return ours.TransformerBlock(F, layer, F, rngs=nnx.Rngs(key))

        self.block = made(jax.random.split(jax.random.key(0), 2))

    def __call__(self, x: Any, steps: int = 1) -> Any:
        def body(layer: Any, x: Any) -> Any:
            return layer(x)

        run = nnx.scan(
            nnx.remat(body) if self.remat else body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        for _ in range(steps):
            x = run(self.block, x)
        return x


def scanned(dialect: str, x: Any, steps: int = 1, remat: bool = False) -> tuple[Any, Any]:
    """What two scanned layers sow, and what each of them sows alone."""
    if dialect == "linen":
        module = Scanned(remat)
        variables = module.init(jax.random.key(0), x)
        assert set(variables) == {"params"}
        params = variables["params"]
        found = module.apply({"params": params}, x, steps, mutable=["intermediates"])[1]
        (inner,) = found["intermediates"].values()
        (all_params,) = params.values()
        each = [jax.tree.map(lambda p, i=i: p[i], all_params["block"]) for i in range(2)]
        block = linen.TransformerBlock(partial(linen.MultiHeadAttention, **SIZES, stats=ASKED), F)
        alone = []
        for params in each:
            x, state = block.apply({"params": params}, x, mutable=["intermediates"])
            alone += state["intermediates"]["attention"][NAME]
        return inner["block"]["attention"][NAME], alone
    model = ScannedTwin(remat)
    found = nnx.capture(model, nnx.Intermediate)(x, steps)[1]
    alone = []
    for i in range(2):
        graph, state = nnx.split(model.block)
        block = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], state))
        x, one = nnx.capture(block, nnx.Intermediate)(x)
        alone += one["attention"][NAME].get_value()
    return found["block"]["attention"][NAME].get_value(), alone


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_scanned_layers_are_stacked(dialect: str, remat: bool) -> None:
    """Each leaf gets an axis of layers; a second step is a second entry."""
    x = inputs()
    (first, *others), alone = scanned(dialect, x, 1 if remat else 2, remat)
    same(first, jax.tree.map(lambda *each: jnp.stack(each), *alone))
    for second in others:
        assert jax.tree.map(jnp.shape, second) == jax.tree.map(jnp.shape, first)
        assert not np.array_equal(second["entropy"], first["entropy"])
    assert len(others) == (0 if remat else 1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_block_with_two_attentions(dialect: str) -> None:
    """The module's statistics are of both; those of the call are of self-attention."""
    x, memory = inputs(), inputs(2)[:, :4]
    found = []
    for options, call in (({"stats": stats.max()}, {}), ({}, {"stats": stats.max()})):
        if dialect == "linen":
            block = linen.TransformerBlock(
                partial(linen.MultiHeadAttention, num_heads=N, **options), F
            )
            params = block.init(jax.random.key(0), x, memory=memory)
            _, state = block.apply(params, x, memory=memory, **call, mutable=["intermediates"])
            found.append({part: each[NAME] for part, each in state["intermediates"].items()})
        else:
            make = partial(ours.MultiHeadAttention, N, **options)
            twin = ours.TransformerBlock(F, make, F, memory_features=F, rngs=nnx.Rngs(0))
            _, state = nnx.capture(twin, nnx.Intermediate)(x, memory=memory, **call)
            found.append({part: each[NAME].get_value() for part, each in state.items()})
    assert set(found[0]) == {"attention", "cross_attention"}
    assert set(found[1]) == {"attention"}
    same(found[0]["attention"], found[1]["attention"])


def programs(dialect: str, options: dict[str, Any], collect: bool) -> str:
    """The jaxpr of a layer in a scan, and where nobody collects, of its initialisation too."""
    x = inputs()
    if dialect == "linen":
        module = linen.MultiHeadAttention(**SIZES, **options)
        params = module.init(jax.random.key(0), x)
        mutable = ["intermediates"] if collect else False
        traced = [jax.make_jaxpr(lambda p, x: module.apply(p, x, mutable=mutable))(params, x)]
        if not collect:
            traced.append(jax.make_jaxpr(module.init)(jax.random.key(0), x))
        return "\n".join(map(str, traced))
    graph, state = nnx.split(
        ours.MultiHeadAttention(in_features=F, rngs=nnx.Rngs(0), **SIZES, **options)
    )

    def run(state: Any, x: Any) -> Any:
        layer = nnx.merge(graph, state)
        return nnx.capture(layer, nnx.Intermediate)(x) if collect else layer(x)

    return str(jax.make_jaxpr(run)(state, x))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nothing_is_computed_where_nobody_collects(dialect: str) -> None:
    plain = programs(dialect, {}, False)
    assert programs(dialect, {"stats": ASKED}, False) == plain
    without = programs(dialect, {}, True)
    assert programs(dialect, {"stats": {}}, True) == without
    assert len(programs(dialect, {"stats": ASKED}, True)) > len(without)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_sown_entropy_is_a_loss(dialect: str) -> None:
    """Gradients of the parameters, through what was sown, under `jit`."""
    x = inputs()
    module = linen.MultiHeadAttention(**SIZES, stats=stats.entropy())
    params = module.init(jax.random.key(0), x)["params"]
    twin = ours.MultiHeadAttention(in_features=F, rngs=nnx.Rngs(0), **SIZES, stats=stats.entropy())
    graph, state = nnx.split(twin)

    def of_linen(params: Any) -> Any:
        _, state = module.apply({"params": params}, x, mutable=["intermediates"])
        return jnp.mean(state["intermediates"][NAME][0])

    def of_nnx(params: Any) -> Any:
        filled = nnx.clone(state)
        nnx.replace_by_pure_dict(filled, params)
        _, seen = nnx.capture(nnx.merge(graph, filled), nnx.Intermediate)(x)
        return jnp.mean(seen[NAME].get_value()[0])

    def direct(params: Any) -> Any:
        return jnp.mean(
            ja.attention(*qkv(params, x), mask=masks.causal(), stats=stats.entropy())[1]
        )

    sown = {"linen": of_linen, "nnx": of_nnx}[dialect]
    got, want = (jax.jit(jax.grad(f))(params) for f in (sown, direct))
    assert np.abs(np.asarray(want["query"]["kernel"])).max() > 1e-3
    same(got, want)


def test_modules_that_ask_compare_by_structure() -> None:
    """Dictionaries and lists of statistics do not cost a module its hash, nor a new program."""
    graphs = [
        nnx.graphdef(ours.MultiHeadAttention(in_features=F, rngs=nnx.Rngs(0), **SIZES, stats=s))
        for s in (asked(), asked(), stats.entropy())
    ]
    assert graphs[0] == graphs[1] != graphs[2]
    assert hash(graphs[0]) == hash(graphs[1])
    first, second = (linen.MultiHeadAttention(**SIZES, stats=asked()) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_attention_fn(dialect: str) -> None:
    """Flax's own modules ask by `sow_weights`, and then no weights are computed."""
    x = jnp.stack([inputs(), inputs(1)])
    fn = ja.nn.attention_fn(masks.causal(), stats=ASKED)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if dialect == "linen":
            module = nn.MultiHeadDotProductAttention(num_heads=N, attention_fn=fn)
            params = module.init(jax.random.key(0), x, sow_weights=True)
            assert set(params) == {"params"}
            _, state = module.apply(params, x, sow_weights=True, mutable=["intermediates"])
            found, params = state["intermediates"], params["params"]
        else:
            layer = nnx.MultiHeadAttention(N, F, decode=False, attention_fn=fn, rngs=nnx.Rngs(0))
            params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
            _, state = nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)
            found = {name: each.get_value() for name, each in state.items()}
    assert list(found) == [NAME]
    (seen,) = found[NAME]
    for i in range(2):
        _, want = ja.attention(*qkv(params, x[i]), mask=masks.causal(), stats=ASKED)
        same(jax.tree.map(lambda each, i=i: each[i], seen), want)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_errors(dialect: str) -> None:
    own = stats.mass(masks.segments(jnp.zeros(T, int)))
    with pytest.raises(ValueError, match=r"MultiHeadAttention\(stats\).*holds arrays.*stats="):
        collected(dialect, {}, inputs(), stats={"own": own})
    with pytest.raises(TypeError, match=r"stats: got .*expected a pytree of statistics"):
        collected(dialect, {}, inputs(), stats={"entropy": 3})

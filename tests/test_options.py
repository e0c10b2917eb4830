"""Flags, precisions, sizes and dtypes of every public function: what is none has an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxattn as ja
from jaxattn import masks, parallel, scores, stats
from jaxattn.nn import linen
from jaxattn.nn import nnx as ours

pytestmark = pytest.mark.usefixtures("own_errors")

Q, KV = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
X = jnp.ones((2, 3, 16))
WHOLE = jax.ShapeDtypeStruct((1, 16, 8, 8), "float32")
KEYS = jnp.ones((2, 3, 2, 8))

attention = partial(ja.attention, Q, KV, KV)
twin = partial(ja.dot_product_attention, Q, KV, KV)


def linen_module(**attributes: Any) -> Any:
    return linen.MultiHeadAttention(**{"num_heads": 2} | attributes).init(jax.random.key(0), X)


def linen_call(**call: Any) -> Any:
    return linen.MultiHeadAttention(2).init(jax.random.key(0), X, **call)


def linen_block(**attributes: Any) -> Any:
    own = {"attention": partial(linen.MultiHeadAttention, 2), "mlp_features": 8}
    return linen.TransformerBlock(**own | attributes).init(jax.random.key(0), X)


def linen_block_call(**call: Any) -> Any:
    block = linen.TransformerBlock(partial(linen.MultiHeadAttention, 2), 8)
    return block.init(jax.random.key(0), X, **call)


def nnx_module(**attributes: Any) -> Any:
    own = {"num_heads": 2, "in_features": 16, "rngs": nnx.Rngs(0)}
    return ours.MultiHeadAttention(**own | attributes)(X)


def nnx_call(**call: Any) -> Any:
    return ours.MultiHeadAttention(2, 16, rngs=nnx.Rngs(0))(X, **call)


def nnx_block(**attributes: Any) -> Any:
    own = {"in_features": 16, "attention": partial(ours.MultiHeadAttention, 2), "mlp_features": 8}
    return ours.TransformerBlock(**own | {"rngs": nnx.Rngs(0)} | attributes)(X)


def nnx_block_call(**call: Any) -> Any:
    make = partial(ours.MultiHeadAttention, 2)
    return ours.TransformerBlock(16, make, 8, rngs=nnx.Rngs(0))(X, **call)


def inside_flax(**call: Any) -> Any:
    heads = jnp.ones((2, 5, 4, 8))
    return ja.nn.attention_fn()(Q, heads, heads, **call)


def cache() -> ja.KVCache:
    return ja.KVCache.create(2, 8, 2, 8)


def over_devices(**options: Any) -> Any:
    mesh = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "seq")
    both = any(options.get("return_lse") is true for true in (True, np.True_))
    out = (spec, spec) if both else spec
    run = jax.shard_map(
        partial(parallel.attention, **options), mesh=mesh, in_specs=spec, out_specs=out
    )
    return jax.jit(run)(KEYS, KEYS, KEYS)


Call = Callable[..., Any]

# What is called, the argument, and whether None leaves it open.
FLAGS: dict[str, tuple[Call, str, bool]] = {
    "attention": (attention, "return_lse", False),
    "attention under jit": (lambda **o: jax.jit(partial(attention, **o))(), "return_lse", False),
    "explain": (partial(ja.explain, Q, KV, KV), "return_lse", False),
    "step": (lambda **o: cache().step(KEYS, KEYS, KEYS, **o), "return_lse", False),
    "parallel": (over_devices, "return_lse", False),
    "parallel.explain": (partial(parallel.explain, *[WHOLE] * 3, ranks=2), "return_lse", False),
    "causal twin": (twin, "is_causal", False),
    "twin": (twin, "return_residual", False),
    "tile_map": (partial(ja.tile_map, masks.causal(), Q, KV), "exact", False),
    "T5": (partial(scores.relative_bias, jnp.ones((4, 8))), "bidirectional", False),
    "show": (partial(masks.causal().show, 3), "color", True),
    "diff": (partial(masks.diff, masks.causal(), masks.full(), 3), "color", True),
    "respects": (
        partial(ja.testing.assert_respects_mask, lambda x: x, X, masks.causal()),
        "nonfinite",
        False,
    ),
    "decoding in Flax": (ja.nn.attention_fn, "decode", True),
    "dropout in Flax": (inside_flax, "broadcast_dropout", False),
    "causal in Flax": (inside_flax, "is_causal", False),
    "softmax in Flax": (inside_flax, "force_fp32_for_softmax", False),
    "deterministic in Flax": (inside_flax, "deterministic", True),
}
for _name, _module, _call, _block, _block_call in (
    ("linen", linen_module, linen_call, linen_block, linen_block_call),
    ("nnx", nnx_module, nnx_call, nnx_block, nnx_block_call),
):
    FLAGS |= {
        f"{_name} {flag}": (_module, flag, False) for flag in ("sinks", "normalize_qk", "use_bias")
    }
    FLAGS |= {f"{_name} block {flag}": (_block, flag, False) for flag in ("gated", "use_bias")}
    for _kind, _made in (
        ("", _module), (" call", _call), (" block", _block), (" block call", _block_call),
    ):  # fmt: skip
        FLAGS[f"{_name}{_kind} deterministic"] = (_made, "deterministic", True)
        if "call" in _kind:
            FLAGS[f"{_name}{_kind} sow_weights"] = (_made, "sow_weights", False)

NO_FLAGS: dict[str, Any] = {
    "a word": "False", "0": 0, "1": 1, "a float": 0.5, "a list": [True], "an empty list": [],
    "a dictionary": {}, "an array": jnp.ones(3, bool), "one entry": jnp.ones((), bool),
    "of NumPy": np.ones(1, bool),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name: str) -> None:
    """Nothing is read by its truth: "False" is true, and an empty list is not."""
    call, flag, optional = FLAGS[name]
    wrong = NO_FLAGS | ({} if optional else {"None": None})
    for given in wrong.values():
        with pytest.raises(TypeError, match=rf"{flag}\)?: got .*, expected True or False"):
            call(**{flag: given})
    for right in (True, False, np.True_, np.False_):
        # Flax warns of what is kept where nobody collects.
        if "respects" not in name and (flag, right) != ("sow_weights", True):
            call(**{flag: right})


def test_a_traced_flag() -> None:
    with pytest.raises(TypeError, match=r"return_lse: got a traced bool\[\].*a static argument"):
        jax.jit(lambda flag: attention(return_lse=flag))(True)


PRECISIONS: dict[str, tuple[Call, str]] = {
    "attention": (attention, "precision"),
    "attention under jit": (lambda **o: jax.jit(partial(attention, **o))(), "precision"),
    "weights": (partial(ja.attention_weights, Q, KV), "precision"),
    "explain": (partial(ja.explain, Q, KV, KV), "precision"),
    "step": (lambda **o: cache().step(KEYS, KEYS, KEYS, **o), "precision"),
    "parallel": (over_devices, "precision"),
    "in Flax": (inside_flax, "precision"),
    "linen": (linen_module, r"MultiHeadAttention\(precision\)"),
    "nnx": (nnx_module, r"MultiHeadAttention\(precision\)"),
}

NO_PRECISIONS: list[Any] = [
    "False", "best", 0, 3, True, 1.5, [], ["highest"], ("high", "best"), ("high", 1), {"a": 1},
    ("high", "high", "high"), jnp.ones(3), np.ones(2), lambda: None, dict, b"high",
]  # fmt: skip

HIGH, DEFAULT = lax.Precision.HIGHEST, lax.Precision.DEFAULT


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_is_one_of_jax(name: str) -> None:
    call, says = PRECISIONS[name]
    for given in NO_PRECISIONS:
        with pytest.raises(
            (TypeError, ValueError), match=f"(?s){says}: got .*, expected None, one"
        ):
            call(precision=given)
    for right in (
        "highest",
        "float32",
        "fastest",
        HIGH,
        ("high", "default"),
        [HIGH, DEFAULT],
        None,
    ):
        call(precision=right)


@pytest.mark.parametrize(
    "given",
    ["default", "high", "float32", HIGH, (HIGH, DEFAULT), ["high", "highest"], "F32_F32_F32",
     lax.DotAlgorithmPreset.F32_F32_F32],
    ids=repr,
)  # fmt: skip
def test_all_that_jax_multiplies_by(given: Any) -> None:
    """What `lax.dot_general` takes is taken, by every backend of plain XLA."""
    jnp.einsum(
        "btnh,bsnh->bnts", Q, Q, precision=tuple(given) if isinstance(given, list) else given
    )
    for backend in ("dense", "rows", "tiled", "auto"):
        np.testing.assert_allclose(
            attention(precision=given, backend=backend), attention(backend=backend), rtol=1e-6
        )


def test_names_of_precisions_are_precisions() -> None:
    """A name is not another precision than what it names: backends compare and compile by it."""
    for name, named in (("highest", HIGH), ("float32", HIGH), ("default", DEFAULT)):
        assert ja.arguments.checked_call(Q, KV, KV, precision=name).precision is named
    preset = ja.arguments.checked_call(Q, KV, KV, precision="BF16_BF16_F32").precision
    assert preset is lax.DotAlgorithmPreset.BF16_BF16_F32


SIZES: dict[str, tuple[Call, str]] = {
    "slopes": (lambda heads: scores.alibi_slopes(heads), "heads"),
    "T5": (partial(scores.relative_bias, jnp.ones((4, 8))), "max_distance"),
    "tile": (partial(ja.tile_map, masks.causal(), Q, KV), "tile"),
    "layers": (partial(ja.testing.visible, lambda x: x, X), "layers"),
    "stride": (partial(ja.testing.visible, lambda x: x, X), "stride"),
    "heads of a test": (
        partial(ja.testing.assert_respects_mask, lambda x: x, X, masks.causal()), "heads",
    ),
    "zigzag": (partial(parallel.zigzag, ranks=2), "length"),
    "cyclic": (partial(parallel.cyclic, 16, 2), "blocks"),
    "striped": (partial(parallel.striped, ranks=2), "length"),
    "layout": (partial(parallel.layout, masks.causal(), ranks=2), "length"),
    "cache": (partial(ja.KVCache.create, 2, 8, 2), "head_dim"),
    "values of a cache": (partial(ja.KVCache.create, 2, 8, 2, 8), "value_dim"),
    "pages": (partial(ja.PagedKVCache.create, 2, page=4, heads=2, head_dim=8), "pages"),
    "values of pages": (partial(ja.PagedKVCache.create, 2, 4, 4, 2, 8), "value_dim"),
    "upcoming": (lambda T: cache().upcoming(T), "T"),
    "rows described": (partial(masks.describe, masks.causal(), 4), "batch"),
    "queries": (lambda T: masks.causal().dense(T, 3), "T"),
    "linen": (linen_module, "num_heads"),
    "linen head": (linen_module, "head_dim"),
    "linen keys": (linen_module, "num_kv_heads"),
    "linen width": (linen_module, "qkv_features"),
    "linen output": (linen_module, "out_features"),
    "linen block": (linen_block, "mlp_features"),
    "nnx": (nnx_module, "num_heads"),
    "nnx input": (nnx_module, "in_features"),
    "nnx memory": (nnx_module, "in_kv_features"),
    "nnx output": (nnx_module, "out_features"),
    "nnx block": (nnx_block, "mlp_features"),
    "nnx block of memory": (nnx_block, "memory_features"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_one_integer(name: str) -> None:
    call, size = SIZES[name]
    for given in (
        "3",
        [3],
        1.5,
        True,
        -3,
        2**70,
        jnp.ones(3),
        np.array([None]),
        {"a": 1},
        float("nan"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"{size}\b.*: got"):
            call(**{size: given})


DTYPES: dict[str, tuple[Call, str]] = {
    "cache": (partial(ja.KVCache.create, 2, 8, 2, 8), "dtype"),
    "ring": (partial(ja.KVCache.rolling, 2, 8, 2, 8), "stored"),
    "pages": (partial(ja.PagedKVCache.create, 2, 4, 4, 2, 8), "stored"),
    "in Flax": (inside_flax, "dtype"),
    "linen": (linen_module, "dtype"),
    "linen parameters": (linen_module, "param_dtype"),
    "linen block": (linen_block, "dtype"),
    "nnx": (nnx_module, "dtype"),
    "nnx block": (nnx_block, "param_dtype"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_is_one_of_floats(name: str) -> None:
    call, dtype = DTYPES[name]
    for given in (3, [jnp.float32], jnp.ones(3), np.float32(1), jnp.int32, bool, object):
        with pytest.raises(TypeError, match=rf"{dtype}=?\)?: got .*, expected a float dtype"):
            call(**{dtype: given})
    for right in ("float32", jnp.float32, np.float32, np.dtype("float32")):
        call(**{dtype: right})


SEEDS: dict[str, Any] = {
    "a word": "seed", "a list": [1, 2, 3], "a float": 0.5, "True": True, "negative": -1,
    "33 bits": 2**32, "two keys": jax.random.split(jax.random.key(0)), "a function": lambda: 0,
    "floats": jnp.ones(2), "three words": jnp.ones(3, jnp.uint32), "a dictionary": {},
    "beyond": np.array([1, 2**40]), "of different lengths": [[1, 2], [3]],
}  # fmt: skip


@pytest.mark.parametrize("rate", [0.0, 0, 0.5, np.float32(0)])
@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_is_looked_at_also_where_nothing_drops(name: str, rate: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="dropout_seed: got"):
        attention(dropout_rate=rate, dropout_seed=SEEDS[name])


def test_a_seed_that_is_not_used_costs_nothing() -> None:
    """With a rate of 0 the program is that of a call without a seed."""
    plain = str(jax.make_jaxpr(attention)())
    for seed in (0, np.uint32(3), jax.random.key(0), jnp.uint32(7), [1, 2]):
        given = jax.make_jaxpr(lambda: attention(dropout_rate=0.0, dropout_seed=seed))()
        assert str(given) == plain
    traced = jax.make_jaxpr(lambda key: attention(dropout_rate=0.0, dropout_seed=key))
    assert str(traced(jax.random.key(0))).count("random_") == 0


EMPTY = jnp.zeros((0,), int)
WITHOUT_ENTRIES: dict[str, dict[str, Any]] = {
    "ids": {"mask": masks.segments(EMPTY)},
    "ids of keys": {"mask": masks.segments(jnp.zeros(3, int), EMPTY)},
    "lengths": {"mask": masks.key_padding(lengths=EMPTY)},
    "a table": {"mask": masks.block_sparse(jnp.ones((0, 2), bool), 2)},
    "a part": {"mask": masks.causal() & masks.segments(EMPTY)},
    "a closure": {"mask": lambda b, h, q, k: EMPTY[q] == 0},
    "a bias": {"score": scores.bias(jnp.ones((3, 0)))},
    "slopes": {"score": scores.alibi(jnp.ones(0))},
    "a parameter": {"score": scores.score(lambda x, b, h, q, k, t: x + t[h], jnp.ones(0))},
    "a mass": {"stats": stats.mass(masks.segments(EMPTY))},
    "positions": {
        "mask": masks.segments(EMPTY),
        "positions": ja.Positions(q=jnp.arange(3), k=jnp.arange(5)),
    },
}


@pytest.mark.parametrize("name", WITHOUT_ENTRIES)
def test_an_array_without_entries(name: str) -> None:
    """It is named, where there are pairs; JAX would say that an index is out of bounds."""
    with pytest.raises(ValueError, match="got an array without entries, expected one for each"):
        attention(**WITHOUT_ENTRIES[name])


def test_an_error_of_a_list_is_the_users_own() -> None:
    with pytest.raises(IndexError, match="list index"):
        attention(mask=lambda b, h, q, k: k < [1, 2][2])


V, T = ValueError, TypeError
WRONG: list[tuple[str, Call, type[Exception], str]] = [
    ("queries of the tutorial", lambda: ja.scaled_dot_product_attention("q", X, X), T, "q: got str"),
    ("integers", lambda: ja.scaled_dot_product_attention(X, jnp.ones((2, 3, 16), int), X), T,
     "k: got dtype int32, expected floats"),
    ("batches", lambda: ja.scaled_dot_product_attention(X, jnp.ones((3, 3, 16)), X), V,
     r"q, k, v: got leading axes \(2,\), \(3,\), \(2,\), expected axes that broadcast"),
    ("query of the twin", lambda: ja.dot_product_attention(None, KV, KV), T, "query: got NoneType"),
    ("bias", lambda: twin(bias="b"), T, "bias: got str, expected numbers that broadcast"),
    ("bias of rank 5", lambda: twin(bias=jnp.ones((1,) * 5)), V, r"bias: got shape \[1, 1, 1, 1, 1\]"),
    ("complex bias", lambda: twin(bias=1j), T, "bias: got dtype complex64"),
    ("one side", lambda: twin(local_window_size=(1,)), V, r"local_window_size: got \(1,\), expected"),
    ("no window", lambda: twin(local_window_size=1.5), T, "local_window_size: got dtype float"),
    ("negative window", lambda: twin(local_window_size=(1, -2)), V, "local_window_size: got -2"),
    ("shape", lambda: ja.tile_map(masks.causal(), 3, KV), T, "query_shape: got 3, expected"),
    ("extent", lambda: ja.tile_map(masks.causal(), Q, (2, 5.5, 2, 8)), T, r"key_shape\[1\]: got 5.5"),
    ("positions", lambda: ja.tile_map(masks.causal(), Q, KV, positions=0), T, "positions: got int"),
    ("positions of a view", lambda: masks.causal().dense(2, 2, positions=jnp.arange(2)), T,
     "positions: got ArrayImpl, expected Positions"),
    ("one list of labels", lambda: masks.causal().html(3, labels=["a", "b", "c"]), T,
     r"html\(labels\): got .*expected two lists of words"),
    ("labels that are True", lambda: masks.causal().show(3, labels=True), T, r"show\(labels\): got True"),
    ("axes", lambda: masks.causal().plot(5, 3), T, r"plot\(ax\): got 5, expected axes of matplotlib"),
    ("a row beyond int32", lambda: masks.causal().show(3, b=2**70), V, r"show\(b\): got 11805"),
    ("query of a cache", lambda: cache().attend("q", jnp.arange(3)), T, r"attend\(query\): got str"),
    ("rows", lambda: ja.PagedKVCache.create(2, 4, 4, 2, 8).free(None), T, r"free\(rows\): got NoneType"),
    ("blocks", lambda: parallel.Layout(((0, "a"),), 4), T, "Layout.blocks: got .*expected a row"),
    ("uneven blocks", lambda: parallel.cyclic(16, 2, 3), V, r"cyclic\(blocks\): got 3, .*16 tokens"),
    ("axis of tokens", lambda: parallel.zigzag(4, 2).shard(jnp.ones((2, 4)), "1"), T, r"Layout\(axis\)"),
    ("schedule", lambda: parallel.explain(*[WHOLE] * 3, ranks=2, schedule=3), V, "schedule: got 3"),
    ("whole sequence", lambda: parallel.explain(None, WHOLE, WHOLE, ranks=2), T, "query: got NoneType"),
    ("axis", lambda: over_devices(axis=None), V, "axis: got None, expected one of this shard_map's"),
    ("stats over devices", lambda: over_devices(stats="entropy"), T, "stats: got 'entropy'"),
    ("no model", lambda: ja.testing.visible(3, X), T, "fn: got 3, expected a function"),
    ("a layer", lambda: ja.testing.visible(lambda x: x, X, where=[1]), T, r"where: got \[1\]"),
    ("documents", lambda: ja.testing.assert_packing_invariant(lambda *x: x[0], "ab"), T, "documents"),
    ("lengths", lambda: ja.testing.assert_padding_invariant(lambda x, n: x, X, jnp.ones(2)), T,
     "lengths: got dtype float32"),
    ("theta", lambda: ja.nn.RoPE(theta="1e4"), V, r"RoPE\(theta\): got '1e4', expected a number"),
    ("fraction", lambda: ja.nn.RoPE(fraction=2.0), V, r"RoPE\(fraction\): got 2.0, .*at most 1"),
    ("turning", lambda: ja.nn.RoPE()(KEYS, jnp.arange(2)), V, r"positions: got shape \[2\], expected"),
    ("backend in Flax", lambda: ja.nn.attention_fn(backend="flash"), V, r"attention_fn\(backend\)"),
    ("stats in Flax", lambda: ja.nn.attention_fn(stats="entropy"), T, "stats: got 'entropy'"),
    ("keys in Flax", lambda: inside_flax(promote_dtype=3), T, r"promote_dtype\): got 3"),
    ("no random numbers", lambda: nnx_module(rngs=3), T, r"rngs\): got 3, expected nnx.Rngs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "says"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_wrong_calls(call: Call, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        call()


@pytest.mark.parametrize("module", [linen_module, nnx_module])
def test_attributes_of_modules(module: Call) -> None:
    for attributes, says in (
        ({"rope": True}, r"\(rope\): got True, expected a RoPE, or a function"),
        ({"rope": ja.nn.RoPE}, r"\(rope\): got the class RoPE, expected an instance; call it"),
        ({"stats": "entropy"}, "stats: got 'entropy', expected a pytree of statistics"),
        ({"dropout_rate": "0.1"}, r"\(dropout_rate\): got '0.1', expected a probability"),
        ({"dropout_rate": jnp.ones(2)}, r"\(dropout_rate\): got float32\[2\]"),
        ({"sharding": 3}, r"\(sharding\): got 3, expected mesh axes"),
        ({"sharding": (1, 2, 3)}, r"\(sharding\): got \(1, 2, 3\), expected mesh axes"),
    ):
        with pytest.raises((TypeError, ValueError), match=r"(?s)(MultiHeadAttention)?" + says):
            module(**attributes)


@pytest.mark.parametrize("block", [linen_block, nnx_block])
def test_functions_of_blocks(block: Call) -> None:
    for name in ("attention", "norm_layer", "activation"):
        with pytest.raises(TypeError, match=rf"TransformerBlock\({name}\): got 3, expected a func"):
            block(**{name: 3})


@pytest.mark.parametrize("call", [linen_call, nnx_call, linen_block_call, nnx_block_call])
def test_arguments_that_a_call_does_not_need(call: Call) -> None:
    """Nobody collects, nothing turns: what is not needed is looked at all the same."""
    for given, says in (
        ({"stats": "entropy"}, "stats: got 'entropy', expected a pytree of statistics"),
        ({"rope_positions": "a"}, "rope_positions: got str, expected integers"),
        ({"rope_positions": jnp.arange(2)}, r"rope_positions: got shape \[2\], expected"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            call(**given)
    call(rope_positions=jnp.arange(3), stats=stats.entropy())


@pytest.mark.parametrize("call", [linen_block_call, nnx_block_call])
def test_the_mask_of_no_memory(call: Call) -> None:
    with pytest.raises(
        ValueError, match="memory_mask: got a value without a memory, expected None"
    ):
        call(memory_mask=masks.causal())

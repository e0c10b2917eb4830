"""cuDNN: which masks it is given and as what, the wrapping around its kernel, and its lowering.

No GPU here: the kernel's part is played by `jax.nn`'s plain XLA in float32, with the habits of the
original, above all the bad ones.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SQUARE, attend, cells, close, everyday, qkv, rng
from jax._src.cudnn import fused_attention_stablehlo as fused

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.arguments import checked_call
from jaxattn.backends import base, cudnn

pytestmark = pytest.mark.no_cover

HALF = jnp.bfloat16


@pytest.fixture
def on_gpu(monkeypatch: Any) -> None:
    """What is asked of the machine gets the answers of a Hopper GPU."""
    monkeypatch.setattr(cudnn.base, "platform", lambda call: "gpu")
    monkeypatch.setattr(base, "capability", lambda call: (9, 0))
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)


def struct(B: int, T: int, N: int, H: int, dtype: Any = HALF) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((B, T, N, H), dtype)


def called(mask: Any, T: int = 64, S: int = 64, H: int = 64, dtype: Any = HALF, **options: Any):
    query, key = struct(2, T, 4, H, dtype), struct(2, S, 2, H, dtype)
    return checked_call(query, key, key, mask=mask, **options)


# --- what is recognised ---------------------------------------------------------------------------


LENGTHS = jnp.asarray([3, 9])
TAKEN = {
    "none": (None, (False, None, None, None)),
    "full": (masks.full(), (False, None, None, None)),
    "causal": (masks.causal(), (True, None, None, None)),
    "causal from an array": (masks.causal(jnp.zeros(2, jnp.int32)), (True, None, None, None)),
    "window": (masks.sliding_window(7), (True, 7, None, None)),
    "window of arrays": (masks.sliding_window(jnp.full(4, 7), 0), (True, 7, None, None)),
    "two windows": (
        masks.sliding_window(7) & masks.sliding_window(9, 4), (True, 7, None, None),
    ),
    "a window that looks ahead, cut": (
        masks.causal() & masks.sliding_window(5, 5), (True, 5, None, None),
    ),
    "a window of everything": (masks.sliding_window(63, 63), (False, None, None, None)),
    "keys": (masks.key_padding(lengths=LENGTHS), (False, None, None, LENGTHS)),
    "one length": (masks.key_padding(lengths=5), (False, None, None, 5)),
    "queries": (masks.query_padding(lengths=LENGTHS), (False, None, LENGTHS, None)),
    "all": (
        (masks.causal() & masks.key_padding(lengths=LENGTHS))
        & (masks.query_padding(lengths=LENGTHS) & masks.sliding_window(2)),
        (True, 2, LENGTHS, LENGTHS),
    ),
    "shorter of two": (
        masks.key_padding(lengths=LENGTHS) & masks.key_padding(lengths=5),
        (False, None, None, jnp.asarray([3, 5])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_passed_on(name: str, on_gpu: None) -> None:
    mask, (causal, left, queries, keys) = TAKEN[name]
    call = called(mask)
    assert cudnn.refuse(call) is None
    band = cudnn.prepare(call).prepared
    assert (band.causal, band.left, band.scale) == (causal, left, 0.125)
    for got, expected in ((band.queries, queries), (band.keys, keys)):
        assert bool(got) == (expected is not None)
        if got:
            np.testing.assert_array_equal(functools.reduce(np.minimum, got), expected)


def test_a_tile_map_is_taken_as_its_mask(on_gpu: None) -> None:
    tiles = ja.tile_map(masks.sliding_window(7), (2, 64, 4, 64), (2, 64, 2, 64))
    call = called(tiles)
    assert cudnn.refuse(call) is None
    assert cudnn.prepare(call).prepared.left == 7


@pytest.mark.parametrize("name", MASKS)
def test_it_allows_what_the_mask_allows(name: str, on_gpu: None) -> None:
    """Of every mask of the library: either refused, or the same cells."""
    B, N, T, S = (2, 4, 32, 32) if name in SQUARE else (2, 4, 23, 35)
    case = MASKS[name](B, N, T, S)
    call = checked_call(*qkv(B, T, S, N, 2, 8, dtype=HALF), mask=case.mask)
    if cudnn.refuse(call) is None:
        band = cudnn.prepare(call).prepared
        np.testing.assert_array_equal(band.dense(T, S, B, N), cells(case.cell, B, N, T, S))
    taken = ("full", "causal", "window_left", "padding_right", "padding_query_lengths")
    assert (cudnn.refuse(call) is None) == (name in taken)


REFUSED = {
    "other": (masks.segments(jnp.arange(64) // 8) & masks.causal(), {}, "no mask like segments"),
    "a lambda": (lambda b, h, q, k: q >= k, {}, "no mask like"),
    "or": (masks.causal() | masks.key_padding(lengths=3), {}, "no mask like"),
    "not": (~masks.causal(), {}, "no mask like ~causal"),
    "flags": (masks.key_padding(jnp.ones((2, 64), bool)), {}, "no mask like key_padding"),
    "offset": (masks.causal(3), {}, "starts at the first query"),
    "per head": (masks.sliding_window(jnp.arange(4)), {}, "one concrete number"),
    "ahead": (masks.sliding_window(3, 2), {}, "look back only; this one also looks 2 keys ahead"),
    "not causal": (masks.sliding_window(3, 63), {}, "windows are causal"),
    "few keys": (masks.sliding_window(3), {"S": 32}, "at least as many keys"),
    "float32": (None, {"dtype": jnp.float32}, "not float32"),
    "head dim": (None, {"H": 20}, "a multiple of 8"),
    "large head dim": (None, {"H": 264}, "up to 256"),
    "score": (None, {"score": scores.soft_cap(5.0)}, "no scores"),
    "dropout": (None, {"dropout_rate": 0.1, "dropout_seed": 0}, "dropout"),
    "positions": (None, {"positions": ja.Positions(q=jnp.arange(64))}, "positions were given"),
    "nothing": (None, {"T": 0}, "nothing to compute"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, on_gpu: None) -> None:
    mask, options, reason = REFUSED[name]
    assert reason in str(cudnn.refuse(called(mask, **options)))


def test_values_have_a_head_dim_of_their_own(on_gpu: None) -> None:
    x = struct(2, 64, 4, 64)
    assert "the same for both" in str(cudnn.refuse(checked_call(x, x, struct(2, 64, 4, 32))))


def test_traced_windows_and_scales_are_refused_and_lengths_are_not(on_gpu: None) -> None:
    said = []

    @jax.jit
    def ask(n: jax.Array) -> jax.Array:
        for mask, scale in (
            (masks.sliding_window(n), None),
            (masks.causal(n), None),
            (None, n * 0.5),
            (masks.key_padding(lengths=n) & masks.query_padding(lengths=n), None),
        ):
            said.append(cudnn.refuse(called(mask, scale=scale)))
        return n

    ask(jnp.asarray(3))
    for got, reason in zip(said, ("one concrete", "first query", "scale is traced", None)):
        assert (got is None) if reason is None else reason in str(got)


def test_what_the_machine_lacks(on_gpu: None, monkeypatch: Any) -> None:
    call = called(masks.causal())
    assert cudnn.refuse(call) is None

    def absent() -> int:
        raise RuntimeError("cuDNN is not detected.")

    with monkeypatch.context() as lacks:
        lacks.setattr(fused, "check_cudnn_version", absent)
        assert cudnn.refuse(call) == "cuDNN is not detected."
    with monkeypatch.context() as lacks:
        lacks.setattr(base, "capability", lambda call: (7, 0))
        assert "Ampere" in str(cudnn.refuse(call))
    with monkeypatch.context() as lacks:
        lacks.setattr(base, "capability", lambda call: (8, 0))
        assert "up to 128" in str(cudnn.refuse(called(None, H=136)))
    with monkeypatch.context() as lacks:
        lacks.setattr(cudnn, "fused", None)
        assert "another place" in str(cudnn.refuse(call))


def test_without_a_gpu() -> None:
    assert cudnn.refuse(called(None)) == "runs on NVIDIA GPUs; inputs are on cpu"
    x = jnp.zeros((1, 8, 2, 8), HALF)
    with pytest.raises(ValueError, match=r"'cudnn' can't compute this call: runs on NVIDIA"):
        ja.attention(x, x, x, backend="cudnn")


def test_auto_takes_it_where_it_can(on_gpu: None) -> None:
    large = struct(2, 8192, 4, 64)
    window = ja.explain(large, large, large, mask=masks.causal())
    assert window.backend == "cudnn"
    assert "gradients may differ" in window.reason
    assert "slower on gpu" in window.others["tiled"]
    other = ja.explain(large, large, large, mask=masks.dilated(4))
    assert other.backend == "triton"
    assert "no mask like dilated" in other.others["cudnn"]
    small = struct(2, 64, 4, 64)
    assert "slower below" in ja.explain(small, small, small).others["cudnn"]


# --- the wrapping ---------------------------------------------------------------------------------


@jax.custom_vjp
def spoilt(x: jax.Array, bad: jax.Array) -> jax.Array:
    """`x`, whose gradient comes back as NaN where it is bad."""
    return x


spoilt.defvjp(
    lambda x, bad: (x, bad), lambda bad, g: (jnp.where(bad, jnp.asarray(jnp.nan, g.dtype), g), None)
)


def kernel(
    query: Any, key: Any, value: Any, *, q_seqlen: Any, kv_seqlen: Any, scale: float,
    mask_type: Any, sliding_window_length: int | None, return_residual: bool,
) -> Any:  # fmt: skip
    """cuDNN's kernel: what lies beyond a length comes back as NaN, gradients included."""
    assert return_residual
    assert key.shape == value.shape
    causal = mask_type in (fused.MaskType.CAUSAL, fused.MaskType.PADDING_CAUSAL)
    padded = mask_type in (fused.MaskType.PADDING, fused.MaskType.PADDING_CAUSAL)
    assert padded == (q_seqlen is not None) == (kv_seqlen is not None)
    dtype, options = query.dtype, {}
    late = None
    if padded:
        late, beyond = (
            (jnp.arange(x.shape[1])[None] >= n[:, None])[..., None, None]
            for x, n in ((query, q_seqlen), (key, kv_seqlen))
        )
        query, key, value = spoilt(query, late), spoilt(key, beyond), spoilt(value, beyond)
        options = {"query_seq_lengths": q_seqlen, "key_value_seq_lengths": kv_seqlen}
    if sliding_window_length is not None:
        assert causal, "cuDNN would see the future"
        assert query.shape[1] <= key.shape[1]
        options["local_window_size"] = (sliding_window_length - 1, 0)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        out, lse = jax.nn.dot_product_attention(
        *(x.astype(jnp.float32) for x in (query, key, value)), is_causal=causal, scale=scale,
        return_residual=True, implementation="xla", **options,
    )  # fmt: skip
    if late is not None:
        # What a length of 0 does is not written: here it spoils everything.
        late = late | (jnp.minimum(q_seqlen, kv_seqlen).min() == 0)
        out, lse = jnp.where(late, jnp.nan, out), jnp.where(late[..., 0], jnp.nan, lse)
    return out.astype(dtype), jnp.swapaxes(lse, 1, 2)


@pytest.fixture
def kernel_here(on_gpu: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(fused, "dot_product_attention", kernel)
    jax.clear_caches()


def losses(mask: Any, cotangents: Any, sinks: Any = None, **options: Any) -> Any:
    """Output, LSE, and the gradients of a loss of both, compiled."""
    d_out, d_lse = cotangents

    def loss(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        out, lse = ja.attention(
            query, key, value, mask=mask, sinks=sinks, backend="cudnn", return_lse=True, **options
        )
        whole = (out.astype(jnp.float32) * d_out).sum()
        return whole + (jnp.where(jnp.isfinite(lse), lse, 0) * d_lse).sum(), (out, lse)

    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return lambda *arrays: found(*arrays, sinks)


CASES = {
    "none": (None, 40, 56),
    "causal": (masks.causal(), 40, 40),
    "causal, more keys": (masks.causal(), 24, 56),
    "causal, more queries": (masks.causal(), 56, 24),
    "window": (masks.sliding_window(5), 40, 56),
    "keys": (masks.key_padding(lengths=jnp.asarray([13, 0, 56])), 40, 56),
    "queries": (masks.query_padding(lengths=jnp.asarray([0, 40, 7])), 40, 56),
    "too long": (masks.key_padding(lengths=jnp.asarray([1, 99, 7])), 40, 56),
    "all": (
        masks.sliding_window(5) & masks.key_padding(lengths=jnp.asarray([13, 0, 56]))
        & masks.query_padding(lengths=jnp.asarray([40, 30, 17])), 40, 56,
    ),
    "causal, short": (masks.causal() & masks.key_padding(lengths=jnp.asarray([9, 1, 0])), 40, 40),
    "whole tiles": (masks.causal(), 128, 128),
}  # fmt: skip


def random(*shape: int, seed: int = 7) -> Any:
    return rng(seed, *shape).normal(size=shape)


@pytest.mark.parametrize(
    ("name", "dtype"), everyday([*((name, "bfloat16") for name in CASES), ("all", "float16")], 2, 1)
)
def test_values_and_gradients(name: str, dtype: str, kernel_here: None) -> None:
    mask, T, S = CASES[name]
    arrays = qkv(3, T, S, 4, 2, 8, dtype=jnp.dtype(dtype))
    sinks = jnp.asarray(random(4), jnp.float32) if name in ("all", "window") else None
    cotangents = random(3, T, 4, 8), random(3, T, 4)
    (_, (out, lse)), grads = losses(mask, cotangents, sinks)(*arrays)
    seen = None if mask is None else np.asarray(mask.dense(T, S, 3, 4))
    options = dict(sinks=sinks, d_out=cotangents[0], d_lse=cotangents[1])
    gold, plain = (attend(*arrays, seen, dtype=t, **options) for t in (np.float64, np.float32))
    assert lse.dtype == jnp.float32
    close(out, gold.out, plain.out, arrays[0].dtype, "out")
    close(lse, gold.lse, plain.lse, jnp.float32, "lse")
    for got, which in zip(grads, ("query", "key", "value")):
        assert got.dtype == arrays[0].dtype
        largest = gold.largest[which]
        # Through the LSE: a sum of two gradients, either one rounded.
        close(got, gold.grads[which], plain.grads[which], got.dtype, which, 2 * largest)


@pytest.mark.parametrize("name", ["causal, more keys", "all", "queries", "keys"])
def test_what_nobody_sees_is_not_felt(name: str, kernel_here: None) -> None:
    mask, T, S = CASES[name]
    arrays = qkv(3, T, S, 4, 2, 8, dtype=HALF)
    seen = np.asarray(mask.dense(T, S, 3, 4))
    blind, unseen = ~seen.any((1, 3)), ~seen.any((1, 2))
    assert blind.any() or unseen.any()
    found = losses(mask, (random(3, T, 4, 8), random(3, T, 4)))
    clean = found(*arrays)
    poison = jnp.asarray(jnp.nan, HALF)
    query, key, value = (
        jnp.where(where[..., None, None], poison, x)
        for x, where in zip(arrays, (blind, unseen, unseen))
    )
    dirty = found(query, key, value)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    for grad, where in zip(dirty[1], (blind, unseen, unseen)):
        assert not np.asarray(grad, np.float32)[where].any()


def flax_module(query: Any, key: Any, value: Any) -> Any:
    """`attention_fn` as Flax's modules call it."""
    attend = ja.nn.attention_fn(mask=masks.causal(), backend="cudnn")
    return attend(query, key, value, dropout_rate=0.0, deterministic=True)


DOORS = {
    "attention": lambda *x: ja.attention(*x, mask=masks.causal(), backend="cudnn"),
    "Flax's modules": flax_module,
    "the twin of jax.nn": lambda *x: ja.dot_product_attention(
        *x, is_causal=True, implementation="cudnn"
    ),
}


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_door_prepares_the_call(name: str, compiled: bool, kernel_here: None) -> None:
    """The scale that a kernel is compiled for is known at each of them, under `jit` too."""
    arrays = qkv(1, 32, 32, 4, 4, 8, dtype=HALF)
    run = jax.jit(DOORS[name]) if compiled else DOORS[name]
    gold = attend(*arrays, np.tril(np.ones((1, 1, 32, 32), bool)), dtype=np.float64)
    plain = attend(*arrays, np.tril(np.ones((1, 1, 32, 32), bool)), dtype=np.float32)
    close(run(*arrays), gold.out, plain.out, HALF, "out")


def test_an_lse_that_is_not_used_costs_nothing(kernel_here: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(cudnn, "_of_lse", lambda *_: pytest.fail("no LSE is differentiated"))
    x = qkv(1, 32, 32, 2, 2, 8, dtype=HALF)
    call = cudnn.prepare(checked_call(*x, mask=masks.causal()))
    jax.jit(jax.grad(lambda call: cudnn.run(call)[0].sum(), allow_int=True))(call)
    jax.grad(lambda *x: ja.attention(*x, mask=masks.causal(), backend="cudnn").sum())(*x)
    both = {"backend": "cudnn", "return_lse": True}
    with pytest.raises(pytest.fail.Exception):
        jax.grad(lambda *x: ja.attention(*x, mask=masks.causal(), **both)[1].sum())(*x)


def test_lengths_do_not_compile_anew_and_windows_do(kernel_here: None, compilations: Any) -> None:
    x = qkv(2, 32, 32, 2, 2, 8, dtype=HALF)

    def attention(mask: Any) -> Any:
        return jax.block_until_ready(ja.attention(*x, mask=mask, backend="cudnn"))

    attention(masks.key_padding(lengths=jnp.asarray([3, 4])) & masks.sliding_window(4))
    lengths = jnp.asarray([5, 6])
    compilations.reset()
    attention(masks.key_padding(lengths=lengths) & masks.sliding_window(4))
    assert compilations.count == 0
    attention(masks.key_padding(lengths=lengths) & masks.sliding_window(5))
    assert compilations.count == 1


# --- lowering for a GPU that is not here ----------------------------------------------------------


def lowered(fn: Any, *args: Any) -> str:
    """What would be compiled for CUDA."""
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[str]:
    return re.findall(r"@(__cudnn\$\w+)", text)


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def attention(mask: Any, **options: Any) -> Any:
    return lambda *x: ja.attention(*x, mask=mask, backend="cudnn", **options)


@pytest.mark.parametrize("name", CASES)
def test_it_lowers(name: str, on_gpu: None) -> None:
    mask, T, S = CASES[name]
    x = struct(3, T, 4, 64), struct(3, S, 2, 64), struct(3, S, 2, 64)
    text = lowered(attention(mask), *x)
    assert calls(text) == [FORWARD]
    band = cudnn.prepare(checked_call(*x, mask=mask)).prepared
    # As cuDNN is told, the window counts the query itself.
    window = re.search(r"sliding_window_length\\22: (\d+)", text).group(1)
    assert int(window) == (0 if band.left is None else band.left + 1)
    kind = re.search(r"mask_type\\22: \\22(\w+?)\\22", text).group(1)
    # Lengths that are not whole tiles are always told.
    told = "" if name == "whole tiles" else "PADDING"
    parts = filter(None, (told, "CAUSAL" * band.causal))
    assert kind == ("_".join(parts) or "NO_MASK")

    gradients = jax.grad(lambda *x: attention(mask)(*x).astype(jnp.float32).sum(), (0, 1, 2))
    assert calls(lowered(gradients, *x)) == [FORWARD, BACKWARD]


def test_an_lse_takes_another_forward_and_backward(on_gpu: None) -> None:
    x = (struct(2, 128, 4, 64),) * 3

    def loss(*x: Any) -> Any:
        out, lse = attention(masks.causal(), return_lse=True)(*x)
        return out.astype(jnp.float32).sum() + lse.sum()

    assert sorted(calls(lowered(jax.grad(loss, (0, 1, 2)), *x))) == 2 * [FORWARD] + 2 * [BACKWARD]


@pytest.mark.parametrize("axes", [(0, None, None), (1, 0, None), (None, 2, 1), (0, 0, 0)])
def test_vmap_folds_into_the_batch(axes: Any, on_gpu: None) -> None:
    """JAX's own rule wants every array batched, on its first axis."""
    shape = (2, 40, 4, 64)
    x = [
        jax.ShapeDtypeStruct(shape if at is None else (*shape[:at], 5, *shape[at:]), HALF)
        for at in axes
    ]
    one = attention(masks.key_padding(lengths=jnp.asarray([3, 4])))

    def loss(*x: Any) -> Any:
        return one(*x).astype(jnp.float32).sum()

    for fn in (one, jax.grad(loss, (0, 1, 2))):
        text = lowered(jax.vmap(fn, axes), *x)
        shapes = re.findall(r"__cudnn\$.*?\(tensor<([0-9x]+)xbf16>", text)
        assert shapes
        assert set(shapes) == {"10x40x4x64"}


def test_vmap_of_vmap_and_of_cotangents(on_gpu: None) -> None:
    one = attention(masks.causal())
    x = jax.ShapeDtypeStruct((3, 2, 128, 4, 64), HALF)
    twice = jax.ShapeDtypeStruct((5, 2, 128, 4, 64), HALF)

    def nested(q: Any, k: Any) -> Any:
        return jax.vmap(lambda q: jax.vmap(lambda k: one(q, k, k))(k))(q)

    assert "30x128x4x64" in lowered(nested, x, twice)

    def pulled(q: Any, gs: Any) -> Any:
        return jax.vmap(jax.vjp(lambda q: one(q, q, q), q)[1])(gs)

    text = lowered(pulled, jax.ShapeDtypeStruct(x.shape[1:], HALF), x)
    assert re.search(r"fmhaSoftmaxBackward.*\(tensor<6x128x4x64xbf16>", text)


P = jax.sharding.PartitionSpec


def mapped(fn: Any, check_vma: bool) -> Any:
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P("rows")
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma)


AROUND = {
    "remat": jax.checkpoint,
    "scan": lambda fn: lambda *x: jax.lax.scan(
        lambda carry, _: (fn(carry, *x[1:]), None), x[0], None, length=3
    )[0],
    "cond": lambda fn: lambda *x: jax.lax.cond(
        x[0][0, 0, 0, 0] > 0, lambda: fn(*x), lambda: x[0]
    ),
    "shard_map": lambda fn: mapped(fn, True),
    "shard_map, unchecked": lambda fn: mapped(fn, False),
}  # fmt: skip


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("name", AROUND)
def test_under_transformations(name: str, sinks: bool, on_gpu: None) -> None:
    def one(query: Any, key: Any, value: Any) -> Any:
        lengths = jnp.arange(query.shape[0], dtype=jnp.int32)
        mask = masks.causal() & masks.key_padding(lengths=lengths)
        more = {"sinks": jnp.ones(4)} if sinks else {}
        return ja.attention(query, key, value, mask=mask, backend="cudnn", **more)

    around = AROUND[name](one)
    x = (struct(4, 64, 4, 64),) * 3
    gradients = jax.grad(lambda *x: around(*x).astype(jnp.float32).sum(), (0, 1, 2))
    found = calls(lowered(gradients, *x))
    assert found.count(BACKWARD) == (2 if sinks else 1)
    assert FORWARD in found


def test_forward_mode_says_that_it_is_not_there(on_gpu: None) -> None:
    one = attention(masks.causal())
    x = struct(2, 64, 4, 64)
    with pytest.raises(TypeError, match="forward-mode"):
        lowered(lambda q: jax.jvp(lambda q: one(q, q, q), (q,), (q,)), x)


def test_prepared_calls_keep_their_arrays(on_gpu: None) -> None:
    call = called(masks.key_padding(lengths=LENGTHS))
    prepared = cudnn.prepare(call)
    assert prepared.query is call.query
    assert "band(causal=False" in repr(prepared.prepared)
    with pytest.raises(ValueError, match="no mask like"):
        cudnn.prepare(called(masks.dilated(2)))
    assert cudnn.footprint(call) > 0

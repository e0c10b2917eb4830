"""The Mosaic GPU engine computes what NumPy does, races for nothing, and compiles for an H100.

JAX interprets the kernels here: warpgroups are threads, barriers are counted, and what is read and
written without one in between is an error. A program costs seconds to trace, so cases are few and
each checks much. That the compiler for GPUs takes them is seen by lowering, which needs no GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES, attend, cells, close, kept, qkv, rng, split_parts

from jaxattn import masks, scores, stats
from jaxattn.arguments import checked_call
from jaxattn.backends import dense, mosaic
from jaxattn.backends.base import Call, Dropout
from jaxattn.backends.flash import nonfinite, transforms
from jaxattn.masks.mask import as_mask
from jaxattn.masks.positions import Positions
from jaxattn.tiles.tile_map import tile_map
from jaxattn.tracing.program import trace
from jaxattn.tracing.split import split

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic's interpreter is part of JAX from 0.11 on"
)

B16, F16 = jnp.bfloat16, jnp.float16
SEED = (12345, 678)


def make(mask: Any = None, score: Any = None, *, sizes: Any = None, **more: Any) -> Call:
    """A call; `sizes` are B, T, S, N, K, H, Hv."""
    query, key, value = qkv(*(sizes or (1, 70, 100, 2, 1, 64, 64)), dtype=more.pop("dtype", B16))
    given = {
        "query": query, "key": key, "value": value,
        "scale": jnp.float32(0.125), "sinks": None, "positions": Positions(), "dropout": None,
    }  # fmt: skip
    B, T, N, _ = query.shape
    parts = split_parts(mask, score, (B, N, T, key.shape[1]), more.get("positions"))
    return Call(**given | parts | more)


def run(call: Call, tile: Any, interpreted: bool = True) -> Any:
    engine = mosaic.INTERPRETED if interpreted else mosaic.ENGINE
    return (directly if interpreted else transforms.attend)(*mosaic.build(call, engine, tile))


def directly(plan: Any, x: Any) -> Any:
    """Attention without what lies around engines: the interpreter's callbacks have effects, which
    operations of the library have not."""

    @jax.custom_vjp
    def attended(x: Any) -> Any:
        return nonfinite.forward(plan, x)

    def forward(x: Any) -> Any:
        out, lse = nonfinite.forward(plan, x)
        return (out, lse), (x, out, lse)

    def backward(saved: Any, cotangents: Any) -> Any:
        x, out, lse = saved
        g = nonfinite.backward(plan, 1, x, out, lse, *cotangents)
        given = {"query": g.query, "key": g.key, "value": g.value, "score": g.score}
        given["scale"] = g.scale.sum(0, keepdims=True) if x.scale.shape[0] == 1 else g.scale
        nothing = {name: jax.tree.map(lambda _: None, getattr(x, name)) for name in x._fields}
        return (x._replace(**nothing | given),)

    attended.defvjp(forward, backward)
    return attended(x)


def cotangents(call: Call) -> Any:
    B, T, _, N, _, _, Hv = call.sizes
    return rng(3, T, N).normal(size=(B, T, N, Hv)), rng(4, T, N).normal(size=(B, T, N))


def everything(tile: Any, make_score: Any, interpreted: bool = True) -> Any:
    """Output, LSE and all gradients, as a function of a call and the parameters of its score."""

    def compute(call: Call, params: Any) -> Any:
        d_out, d_lse = (jnp.asarray(d, jnp.float32) for d in cotangents(call))

        def loss(query: Any, key: Any, value: Any, params: Any) -> Any:
            score = None if make_score is None else split(make_score(*params), logit=jnp.float32)
            new = dataclasses.replace(call, query=query, key=key, value=value, score=score)
            out, lse = run(new, tile, interpreted)
            finite = jnp.where(jnp.isfinite(lse), lse, 0)
            return (out.astype(jnp.float32) * d_out).sum() + (finite * d_lse).sum(), (out, lse)

        grad = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        return grad(call.query, call.key, call.value, params)

    return compute


def alone(fn: Any) -> Any:
    """Compiled for one device by hand: the interpreter's effects are nothing XLA could partition."""
    mesh = jax.make_mesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


# --- the definition -------------------------------------------------------------------------------


# A mask and a score by name, the sizes B, T, S, N, K, H, Hv, the tile, and what else is given.
CASES = {
    "ragged, rows that see nothing": (
        "padding_left", None, (2, 70, 90, 1, 1, 64, 64), (64, 64), {},
    ),
    "two warpgroups, learned numbers": (
        "segments_packed", "chain", (1, 140, 140, 2, 1, 64, 64), (128, 128), {},
    ),
    "a mask of bytes, learned columns, dropout": (
        "dense_full", "bias_per_head_key", (1, 90, 130, 2, 2, 64, 64), (64, 128), {"rate": 0.3},
    ),
    "more tiles than buffers, padded heads": (
        "causal_bottom_right", None, (1, 64, 384, 5, 1, 80, 40), (64, 64), {"dtype": F16},
    ),
    "no mask, negative scale": (
        None, "soft_cap", (1, 64, 70, 1, 1, 64, 64), (64, 64), {"scale": jnp.float32(-0.2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_the_definition(name: str) -> None:
    mask_name, score_name, sizes, tile, more = CASES[name]
    B, T, S, N, *_ = sizes
    rate = more.get("rate", 0.0)
    case = None if mask_name is None else MASKS[mask_name](B, N, T, S)
    score = None if score_name is None else SCORES[score_name](B, N, T, S)
    dropout = Dropout(jnp.float32(rate), jnp.asarray(SEED, jnp.uint32)) if rate else None
    more = {key: value for key, value in more.items() if key != "rate"}
    call = make(case and as_mask(case.mask), sizes=sizes, dropout=dropout, **more)
    params = () if score is None else tuple(jnp.asarray(p, jnp.float32) for p in score.params)
    compute = everything(tile, score and score.make)
    parts = score and split(score.make(*params), logit=jnp.float32)
    assert mosaic.obstacle(dataclasses.replace(call, score=parts)) is None
    (dq, dk, dv, slopes), (out, lse) = alone(compute)(call, params)

    place = [np.arange(n).reshape(-1, *[1] * (3 - i)) for i, n in enumerate((B, N, T, S))]
    d_out, d_lse = cotangents(call)
    gold, plain = (
        attend(
            call.query, call.key, call.value,
            None if case is None else cells(case.cell, B, N, T, S),
            score=score, scale=float(call.scale), rate=rate, d_out=d_out, d_lse=d_lse,
            keep=kept(SEED, rate, *place) if rate else None, dtype=dtype,
        ) for dtype in (np.float64, np.float32)
    )  # fmt: skip
    dtype = call.query.dtype
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    close(out, gold.out, plain.out, dtype, "out")
    close(lse, gold.lse, plain.lse, jnp.float32, "lse")
    for name, got in (("query", dq), ("key", dk), ("value", dv)):
        assert got.dtype == dtype
        close(got, gold.grads[name], plain.grads[name], dtype, name, gold.largest[name])
    for i, slope in enumerate(slopes):
        # A sum over all cells.
        expected, largest = gold.grads[f"param{i}"], gold.largest[f"param{i}"]
        atol = 0.03 * (0.1 + np.abs(expected).max()) + float(jnp.finfo(dtype).eps) * largest
        np.testing.assert_allclose(np.asarray(slope, np.float64), expected, atol=atol)


def test_statistics_are_those_of_the_formula() -> None:
    """All columns, and gradients of means in the inputs and in arrays of functions and scores."""
    q, k, v = qkv(1, 70, 100, 2, 1, 64, 64, dtype=B16)
    gain, at = (jnp.asarray(rng(24, n).normal(size=n), jnp.float32) for n in (2, 100))
    weight = jnp.asarray(rng(25).normal(size=(1, 70, 2)), jnp.float32)

    def compute(run: Any, q: Any, k: Any, v: Any, gain: Any, at: Any, cap: Any) -> Any:
        asked = [
            stats.mean(lambda x, b, h, q, k: gain[h] * jnp.abs(q - k).astype(x.dtype) + x * at[k]),
            stats.max(),
            stats.argmax(),
        ]
        mask = masks.causal(-2) & masks.key_padding(lengths=jnp.array([90]))
        call = checked_call(q, k, v, mask=mask, score=scores.soft_cap(cap), stats=asked)
        assert mosaic.obstacle(call) is None
        out, lse = run(call)
        values, columns = out[..., :64], out[..., 64:]
        loss = (values.astype(jnp.float32) ** 2).sum() + (columns[..., 0] * weight).sum()
        return loss, (values, columns, lse)

    def everything_of(run: Any) -> Any:
        return jax.grad(functools.partial(compute, run), tuple(range(6)), has_aux=True)

    given = q, k, v, gain, at, jnp.float32(2)
    found = alone(everything_of(functools.partial(run, tile=(64, 64))))(*given)
    expected = jax.jit(everything_of(dense.run))(*given)
    # Values, and the gradients of what has 16 bits, are products of weights in 16 bits.
    wide = {"rtol": 1e-4, "atol": 2e-4}
    narrow = {"rtol": 0.02, "atol": 0.04}
    for n, (one, other) in enumerate(zip(*map(jax.tree.leaves, (found, expected)), strict=True)):
        numbers = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(
            *numbers, **narrow if n in (0, 1, 2, 6) else wide, err_msg=str(n)
        )


# --- what may not be felt -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_what_is_not_seen_is_not_felt() -> None:
    T, S = 20, 30
    seen = np.asarray(cells(MASKS["nobody_sees_some"](1, 2, T, S).cell, 1, 2, T, S))[0, 0]
    call = make(masks.predicate(lambda b, h, q, k: (k % 3 != 1) & (q % 4 != 2) & (k <= q + 2)),
                sizes=(1, T, S, 2, 1, 64, 64))  # fmt: skip
    compute = alone(everything((64, 64), None))

    def given(query: Any, key: Any, value: Any) -> Any:
        return compute(dataclasses.replace(call, query=query, key=key, value=value), ())

    plain = given(call.query, call.key, call.value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(plain[0]))

    # Rows that nobody sees, and queries that see nothing, may hold anything.
    dead_keys, dead_queries = ~seen.any(0), ~seen.any(1)
    spoilt = given(
        jnp.where(dead_queries[:, None, None], jnp.nan, call.query).astype(B16),
        jnp.where(dead_keys[:, None, None], -jnp.inf, call.key).astype(B16),
        jnp.where(dead_keys[:, None, None], jnp.nan, call.value).astype(B16),
    )
    jax.tree.map(np.testing.assert_array_equal, plain, spoilt)

    # A change, finite and far too large, of a key that some see is not felt by the others.
    j = 9
    (_, (out, lse)) = given(call.query, call.key.at[:, j].set(1e30), call.value.at[:, j].set(-1e37))
    blind = ~seen[:, j]
    np.testing.assert_array_equal(out[:, blind], plain[1][0][:, blind])
    np.testing.assert_array_equal(lse[:, blind], plain[1][1][:, blind])
    assert (lse[:, ~blind] != plain[1][1][:, ~blind]).all()

    # What is seen is felt.
    _, (out, _) = given(call.query, call.key, call.value.at[:, 0].set(jnp.nan))
    np.testing.assert_array_equal(
        np.isnan(np.asarray(out, np.float32)).any(-1)[0, :, 0], seen[:, 0]
    )


def test_a_missing_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental.pallas import mosaic_gpu

    from jaxattn.backends.mosaic import memory

    def hasty(self: Any, n: Any, *sources: Any) -> None:
        slot = jax.lax.rem(n, jnp.int32(self.ready.shape[0]))
        for source, into in zip(sources, self.buffers, strict=True):
            mosaic_gpu.copy_gmem_to_smem(source, into.at[slot], self.ready.at[slot])

    monkeypatch.setattr(memory.Ring, "fill", hasty)
    plan, x = mosaic.build(make(sizes=(1, 64, 384, 1, 1, 64, 64)), mosaic.INTERPRETED, (64, 64))
    # JAX 0.11 says no more than where the interpreter gave up.
    with pytest.raises(Exception, match=r"RACE DETECTED|CpuCallback error"):
        jax.block_until_ready(jax.jit(functools.partial(plan.engine.forward, plan))(x.grouped()))


# --- compiling for a GPU --------------------------------------------------------------------------


def lower(call: Call, tile: Any = None) -> str:
    """The code for an H100, forward and backward."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), call)

    def compute(call: Call) -> Any:
        plan, x = mosaic.build(call, tile=tile)
        x = x.grouped()
        out, lse = plan.engine.forward(plan, x)
        far = lse.transpose(0, 2, 3, 1)
        return plan.engine.backward(plan, 1, x, far, far, out)

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(compute).trace(structs)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


SIZES = 2, 1000, 1024, 4, 2
IDS = jnp.zeros((2, 1024), jnp.int32)
SEGMENTS = masks.segments(IDS[:, :1000], IDS)
LOWERED = {
    "full": (make(sizes=(*SIZES, 128, 128)), None),
    "causal": (make(masks.causal(), sizes=(*SIZES, 128, 128)), None),
    "window, f16": (make(masks.sliding_window(256), sizes=(*SIZES, 64, 64), dtype=F16), None),
    "segments, soft-cap": (
        make(SEGMENTS & masks.causal(), scores.soft_cap(50.0), sizes=(*SIZES, 128, 96)), None,
    ),
    "a head each, ALiBi, dropout": (
        make(
            masks.per_head([masks.causal(), masks.full(), masks.causal(), masks.full()]),
            scores.alibi(jnp.ones(4)), sizes=(*SIZES, 64, 64),
            dropout=Dropout(jnp.float32(0.1), jnp.zeros(2, jnp.uint32)),
        ), (128, 64),
    ),
    "bytes": (make(masks.dense(jnp.ones((1000, 1024), bool)), sizes=(*SIZES, 64, 64)), (64, 128)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_a_gpu(name: str) -> None:
    call, tile = LOWERED[name]
    assert mosaic.obstacle(call) is None
    assert lower(call, tile).count("@mosaic_gpu") == 3


def all_operations(logit: Any, b: Any, h: Any, q: Any, k: Any, flag: Any, gain: Any) -> Any:
    """A score that uses all the operations that are taken."""
    f, n, u = logit * gain, q - 3 * k, (q * 7 + k).astype(jnp.uint32)
    near, far = jnp.abs(n) < 5, ~(n >= 40)
    chosen = jnp.where(near, far, flag[h] & (q != k)) | (near ^ (f > 0))
    chosen = jnp.maximum(chosen, near) & jnp.minimum(far | near, f <= 9) & (u.astype(bool) | near)
    which = near.astype(jnp.int32) + far.astype(jnp.int32)
    n = jax.lax.select_n(which, n, -n, jnp.sign(n) * (q // 2))
    n = (n << 2) + (n >> 1) + (u >> jnp.uint32(3)).astype(jnp.int32) + chosen.astype(jnp.int32)
    n = jnp.clip(n, -9, 9) % 7
    x = (
        jnp.tanh(f)
        + jnp.sin(f) * jnp.cos(f)
        + jax.lax.logistic(f)
        + jax.lax.clamp(-1.0, f, 1.0) ** 3
    )
    y = jnp.exp(-jnp.abs(f)) + jnp.exp2(-jnp.square(f)) + jnp.sqrt(1 + f * f)
    y = y + jnp.log(2 + f * f) + jnp.log2(2 + jnp.square(f)) + jax.lax.rsqrt(1 + jnp.square(f))
    y = jnp.where(
        chosen == near, jnp.round(y), jnp.minimum(x / (1 + jnp.abs(y)), jnp.maximum(x, y))
    )
    return jnp.where(chosen, x, y) + n.astype(jnp.float32)


def operations(score: Any, slopes: bool) -> tuple[Any, Any]:
    from jaxattn.backends.mosaic import tiles

    call = make(None, score, sizes=(1, 128, 128, 2, 1, 64, 64))
    plan, _ = mosaic.build(call)
    return call, tiles.scored(plan.score, slopes)


ALL = scores.score(all_operations, jnp.array([True, False]), jnp.ones(()))


def test_all_operations_lower() -> None:
    from jaxattn.backends.mosaic import programs

    call, program = operations(ALL, True)
    assert mosaic.obstacle(call) is None
    lower(call, (64, 64))
    used = {step.prim.name for step in program.steps}
    missing = programs.OPERATIONS - programs.SAME - used
    assert missing <= {"add_any", "one_minus_square", "square", "shift_right_logical"}, missing


def test_evaluating_is_running_the_program() -> None:
    from jaxattn.backends.mosaic import tiles

    _, program = operations(ALL, True)
    shape = 6, 9
    types = [program.types[ref].dtype for ref in program.inputs]
    arrays = [
        jnp.asarray(rng(i).integers(0, 2, shape), bool) if dtype == jnp.bool_
        else jnp.asarray(rng(i).integers(-50, 50, shape), dtype) if dtype == jnp.int32
        else jnp.asarray(rng(i).normal(size=shape), dtype)
        for i, dtype in enumerate(types)
    ]  # fmt: skip
    # What is the same for all elements may come as a scalar.
    heads = [i for i, t in enumerate(types) if t == jnp.bool_]
    given = [tile[0, 0] if i in heads else tile for i, tile in enumerate(arrays)]
    got = jax.jit(lambda *given: tiles.evaluate(program, given, shape))(*given)
    flat = [jnp.full(shape, tile) if tile.ndim == 0 else tile for tile in given]
    expected = jax.jit(jax.vmap(jax.vmap(program)))(*flat)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(jnp.broadcast_to(a, shape), b, rtol=2e-5, atol=1e-5)


def test_powers() -> None:
    from jaxattn.backends.mosaic import tiles

    x = jnp.linspace(0.5, 2, 7, dtype=jnp.float32)
    for n in (-3, -1, 0, 1, 2, 5, 8):
        program, _ = trace(lambda x, n=n: jax.lax.integer_pow(x, n), [jnp.float32(1)], "power")
        (got,) = tiles.evaluate(program, [x], x.shape)
        np.testing.assert_allclose(jnp.broadcast_to(got, x.shape), x**n, rtol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


REFUSED = {
    "float32": (make(dtype=jnp.float32), "float32"),
    "mixed": (dataclasses.replace(make(), value=jnp.ones((1, 100, 1, 64), F16)), "float16"),
    "wide heads": (make(sizes=(1, 8, 8, 1, 1, 160, 160)), "wider than 128"),
    "nothing": (make(sizes=(1, 0, 8, 1, 1, 64, 64)), "nothing to compute"),
    "precision": (make(precision=jax.lax.Precision.HIGHEST), "precision"),
    "distances": (make(masks.dilated(3)), "the mask can't .*q - k"),
    "computed reads": (
        make(masks.block_sparse(jnp.ones((1, 1, 35, 50), bool), 2)), "computed positions",
    ),
    "learned arrays": (make(None, scores.bias(jnp.ones((70, 100)))), "gradient of an array"),
    "unknown operations": (
        make(masks.predicate(lambda b, h, q, k: jax.lax.population_count(q ^ k) > 1)),
        "`population_count` has no counterpart",
    ),
    "narrow integers": (
        make(masks.predicate(lambda b, h, q, k: q.astype(jnp.int8) + k.astype(jnp.int8) > 3)),
        "int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    call, reason = REFUSED[name]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(mosaic.obstacle(call))


def test_tiles() -> None:
    def tile(call: Call) -> Any:
        found = []
        jax.eval_shape(lambda c: found.append(mosaic.build(c)[0].tile), call)
        return found[0]

    assert tile(make(masks.causal())) == (128, 128)
    assert tile(make(masks.causal(), sizes=(1, 7, 300, 1, 1, 64, 64))) == (64, 128)
    shapes = (1, 70, 2, 64), (1, 100, 1, 64)
    assert tile(make(tile_map(masks.causal(), *shapes, tile=64))) == (64, 64)
    assert tile(make(tile_map(masks.causal(), *shapes, tile=32))) == (128, 128)

"""One sequence over several devices is attention on one device: every schedule, every layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import many_tiles

import jaxattn as ja
from jaxattn import Positions, masks, parallel, scores, stats
from jaxattn.backends import tpu, triton

__all__ = ["many_tiles"]

RANKS = 4
B, T, N, K, H, HV = 2, 64, 8, 2, 8, 4
SPLIT = P(None, "seq")
SCHEDULES = ("ring", "gather", "heads", "halo")


def mesh_of(*sizes: int, names: tuple[str, ...] = ("seq",), kind: Any = AxisType.Auto) -> Any:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes), devices=devices)


class Case(NamedTuple):
    """A call: arrays that every device has whole, and a function from them to options."""

    arrays: dict[str, Any]
    options: Callable[[dict[str, Any]], dict[str, Any]]
    keys: int = T


def _ids(draw: Any) -> Any:
    return jnp.asarray(np.sort(draw.integers(0, 4, (B, T)), 1), jnp.int32)


CASES: dict[str, Callable[[Any], Case]] = {
    "none": lambda draw: Case({}, lambda x: {}),
    "causal": lambda draw: Case({}, lambda x: dict(mask=masks.causal())),
    "window": lambda draw: Case({}, lambda x: dict(mask=masks.sliding_window(9, 3))),
    "ids": lambda draw: Case(
        {"ids": _ids(draw)}, lambda x: dict(mask=masks.segments(x["ids"]) & masks.causal())
    ),
    "window and ids": lambda draw: Case(
        {"ids": _ids(draw)},
        lambda x: dict(mask=masks.segments(x["ids"]) & masks.sliding_window(20)),
    ),
    "heads": lambda draw: Case(
        {"window": jnp.arange(1, N + 1, dtype=jnp.int32) * 4},
        lambda x: dict(mask=lambda b, h, q, k: abs(q - k) < x["window"][h]),
    ),
    "empty rows": lambda draw: Case(
        {"lengths": jnp.asarray([0, 37])}, lambda x: dict(mask=masks.key_padding(lengths=x["lengths"]))
    ),
    "boolean array": lambda draw: Case(
        {"seen": jnp.asarray(draw.random((B, 1, T, T)) < 0.3)}, lambda x: dict(mask=x["seen"])
    ),
    "tile map": lambda draw: Case(
        {},
        lambda x: dict(
            mask=ja.tile_map(masks.sliding_window(9, 3), (B, T, N, H), (B, T, K, H), tile=8)
        ),
    ),
    "alibi": lambda draw: Case(
        {"slopes": jnp.linspace(0.1, 0.4, N)},
        lambda x: dict(mask=masks.causal(), score=scores.alibi(x["slopes"])),
    ),
    "relative bias": lambda draw: Case(
        {"table": jnp.asarray(draw.normal(size=(N, 32)))},
        lambda x: dict(mask=masks.sliding_window(9, 3), score=scores.relative_bias(x["table"])),
    ),
    "bias": lambda draw: Case(
        {"bias": jnp.asarray(draw.normal(size=(1, N, T, T)))},
        lambda x: dict(score=scores.bias(x["bias"]), mask=masks.causal()),
    ),
    "captured": lambda draw: Case(
        {"row": jnp.asarray(draw.normal(size=T)), "column": jnp.asarray(draw.normal(size=T))},
        lambda x: dict(score=lambda logit, b, h, q, k: logit + x["row"][q] * x["column"][k]),
    ),
    "sinks, scale": lambda draw: Case(
        {"sinks": jnp.asarray(draw.normal(size=N)), "scale": jnp.asarray(0.3)},
        lambda x: dict(mask=masks.causal(), sinks=x["sinks"], scale=x["scale"]),
    ),
    "dropout": lambda draw: Case(
        {}, lambda x: dict(mask=masks.causal(), dropout_rate=0.3, dropout_seed=5)
    ),
    "positions": lambda draw: Case(
        {"start": jnp.asarray([[3], [17]], jnp.int32)},
        lambda x: dict(
            mask=masks.causal() & masks.sliding_window(30),
            positions=Positions(q=x["start"] + jnp.arange(T, dtype=jnp.int32)[None]),
        ),
    ),
    "fewer keys": lambda draw: Case({}, lambda x: dict(mask=masks.causal(offset=4)), keys=32),
}  # fmt: skip


def inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    draw = rng(seed)
    S = case.keys

    def normal(*shape: int) -> Any:
        return jnp.asarray(draw.normal(size=shape))

    return {
        "query": normal(B, T, N, H), "key": normal(B, S, K, H), "value": normal(B, S, K, HV),
        **case.arrays,
    }  # fmt: skip


def objective(fn: Callable[..., Any], case: Case, x: dict[str, Any]) -> Any:
    """A number of output and LSE, and both."""
    out, lse = fn(x["query"], x["key"], x["value"], **case.options(x), return_lse=True)
    weight = rng(9).normal(size=out.shape)
    finite = jnp.where(jnp.isfinite(lse), lse, 0)
    return (out.astype(lse.dtype) * weight.astype(lse.dtype)).sum() + jnp.sin(finite).sum(), (
        out,
        lse,
    )


def slopes(fn: Callable[..., Any], case: Case, x: dict[str, Any]) -> Any:
    """Output, LSE, and the gradients of everything that has one."""
    slope = jax.value_and_grad(partial(objective, fn, case), has_aux=True, allow_int=True)
    return jax.jit(slope)(x)


def spread(
    case: Case, schedule: str, layout: Any, mesh: Any = None, *, check: bool = True, **more: Any
) -> Callable[..., Any]:
    """`attention` of whole arrays, computed over a mesh."""
    mesh = mesh_of(RANKS) if mesh is None else mesh

    def run(query: Any, key: Any, value: Any, *, return_lse: bool, **options: Any) -> Any:
        # Arrays are arguments; numbers, such as that of a window, stay known.
        leaves, tree = jax.tree.flatten((options.pop("mask", None), options.pop("score", None)))
        numbers = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        leaves = [leaf if n is None else None for leaf, n in zip(leaves, numbers, strict=True)]
        arrays = {n: options.pop(n) for n in ("sinks", "scale", "positions") if n in options}

        def local(query: Any, key: Any, value: Any, leaves: Any, arrays: Any) -> Any:
            given = [a if n is None else n for a, n in zip(leaves, numbers, strict=True)]
            mask, score = jax.tree.unflatten(tree, given)
            return parallel.attention(
                query, key, value, mask=mask, score=score, schedule=schedule, layout=layout,
                return_lse=return_lse, **arrays, **options, **more,
            )  # fmt: skip

        if layout is not None:
            query, key, value = layout.shard((query, key, value))
        out = jax.shard_map(
            local, mesh=mesh, in_specs=(SPLIT,) * 3 + (P(), P()), out_specs=SPLIT, check_vma=check
        )(query, key, value, [*leaves], arrays)
        return out if layout is None else layout.unshard(out)

    return run


def close(got: Any, wanted: Any, tolerance: float = 1e-11) -> None:
    flat, tree = jax.tree.flatten(got)
    assert tree == jax.tree.structure(wanted)
    for mine, theirs in zip(flat, jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(theirs.dtype, jnp.floating):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


# A ring of each case every day, with the layouts in turn, and the halo of each window. The other
# schedules have a few cases each, and a layout each; the rest is left to `make test-deep`.
LAYOUTS = ("contiguous", "zigzag", "cyclic")
TODAY = {
    "gather": {"bias": "contiguous", "captured": "zigzag", "ids": "cyclic"},
    "heads": {"dropout": "contiguous", "relative bias": "zigzag", "heads": "cyclic",
              "fewer keys": "contiguous", "tile map": "contiguous"},
}  # fmt: skip


def combinations() -> list[Any]:
    found = []
    for n, name in enumerate(CASES):
        for schedule in SCHEDULES:
            if schedule == "halo" and name not in ("window", "window and ids", "relative bias"):
                continue
            for kind in LAYOUTS:
                if kind != "contiguous" and (schedule == "halo" or name == "fewer keys"):
                    continue
                in_turn = "contiguous" if name == "fewer keys" else LAYOUTS[n % 3]
                chosen = {"ring": in_turn, "halo": kind}.get(schedule) or TODAY[schedule].get(name)
                marks = () if kind == chosen else pytest.mark.deep
                found.append(pytest.param(name, schedule, kind, marks=marks))
    return found


def layout_of(kind: str, ranks: int = RANKS) -> Any:
    return None if kind == "contiguous" else getattr(parallel, kind)(T, ranks)


@pytest.mark.parametrize(("name", "schedule", "kind"), combinations())
def test_is_attention_on_one_device(name: str, schedule: str, kind: str) -> None:
    """Output, LSE and all gradients, in float64 to 1e-11."""
    with jax.enable_x64(True):
        case = CASES[name](rng(1))
        x = inputs(case)
        got = slopes(spread(case, schedule, layout_of(kind)), case, x)
        close(got, slopes(partial(ja.attention, backend="tiled"), case, x))


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_tiles_in_a_part(schedule: str) -> None:
    with jax.enable_x64(True):
        case = CASES["window and ids"](rng(2))
        x = inputs(case)
        fn = spread(case, schedule, None, mesh_of(2), backend="tiled")
        close(slopes(fn, case, x), slopes(partial(ja.attention, backend="dense"), case, x))


@pytest.mark.parametrize("check", [True, False], ids=["vma", "no vma"])
@pytest.mark.parametrize("backend", ["tiled", "rows"])
def test_backends(backend: str, check: bool) -> None:
    """Gradients outside of a `shard_map` are the same whether it checks types or not."""
    case = CASES["alibi"](rng(2))
    x = jax.tree.map(lambda a: a.astype(jnp.float32), inputs(case))
    got = slopes(spread(case, "ring", None, check=check, backend=backend), case, x)
    close(got, slopes(partial(ja.attention, backend="dense"), case, x), 2e-5)


@pytest.mark.parametrize(
    ("backend", "schedule"),
    [("triton", "ring"), ("tpu", "ring"), pytest.param("triton", "halo", marks=pytest.mark.deep)],
)
def test_kernels(backend: str, schedule: str) -> None:
    """Operands keep their kinds: kernels are given a bias, and distances, as on one device."""
    x = {
        **inputs(CASES["none"](rng(2))),
        "bias": jnp.asarray(rng(3).normal(size=(1, N, T, T))),
        "slopes": jnp.linspace(0.1, 0.4, N),
    }
    x = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    case = Case(
        {},
        lambda x: dict(
            mask=masks.sliding_window(9, 3),
            score=scores.chain(scores.bias(x["bias"]), scores.alibi(x["slopes"])),
        ),
    )
    with {"triton": triton, "tpu": tpu}[backend].interpreted():
        got = slopes(spread(case, schedule, None, check=False, backend=backend), case, x)
    close(got, slopes(partial(ja.attention, backend="dense"), case, x), 2e-4)


def test_sixteen_bits() -> None:
    """Gradients of keys are summed over the ranks in float32."""
    case = CASES["causal"](rng(2))
    x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), inputs(case))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    wanted = slopes(partial(ja.attention, backend="dense"), case, exact)[1]
    whole = slopes(partial(ja.attention, backend="tiled"), case, x)[1]
    parts = slopes(spread(case, "ring", None), case, x)[1]
    for name in ("query", "key", "value"):
        ours, theirs = (
            np.abs(g[name].astype(jnp.float32) - wanted[name]).max() for g in (parts, whole)
        )
        # Each part is rounded to 16 bits, and then their sum is.
        assert ours <= 4 * theirs


def test_unbatched_and_without_lse() -> None:
    case = CASES["causal"](rng(3))
    x = inputs(case)

    def local(*parts: Any) -> Any:
        return parallel.attention(*parts, mask=masks.causal())

    run = jax.shard_map(local, mesh=mesh_of(RANKS), in_specs=P("seq"), out_specs=P("seq"))
    parts = [x[name][0] for name in ("query", "key", "value")]
    np.testing.assert_allclose(
        jax.jit(run)(*parts), ja.attention(*parts, mask=masks.causal()), atol=2e-6
    )
    # Without `jit` too, where nothing is compiled as a whole.
    np.testing.assert_allclose(run(*parts), jax.jit(run)(*parts), atol=2e-6)


def test_unbatched_weights_of_queries_may_have_a_row() -> None:
    case = CASES["causal"](rng(3))
    query, key, value = (inputs(case)[name][0] for name in ("query", "key", "value"))
    weight = jnp.asarray(rng(6).normal(size=(1, T, N)), query.dtype)

    def local(query: Any, key: Any, value: Any, weight: Any) -> Any:
        asked = stats.received(weight)
        return parallel.attention(query, key, value, schedule="heads", stats=asked)[1]

    split = (P("seq"), P("seq"), P("seq"), SPLIT)
    run = jax.shard_map(local, mesh=mesh_of(RANKS), in_specs=split, out_specs=P("seq"))
    got = jax.jit(run)(query, key, value, weight)
    wanted = ja.attention(query, key, value, stats=stats.received(weight))[1]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_batch_sequence_and_heads() -> None:
    """A mesh of all three: positions say which batch rows and heads a device has."""
    mesh = mesh_of(2, 2, 2, names=("data", "seq", "model"))
    case = CASES["ids"](rng(4))
    x = inputs(case)
    slopes_ = jnp.linspace(0.1, 0.4, N, dtype=jnp.float32)

    def local(q: Any, k: Any, v: Any, ids: Any, b: Any, h: Any) -> Any:
        return parallel.attention(
            q, k, v, mask=masks.segments(ids) & masks.causal(), score=scores.alibi(slopes_),
            positions=Positions(b=b, h=h), schedule="ring", dropout_rate=0.2, dropout_seed=3,
        )  # fmt: skip

    spec = P("data", "seq", "model")

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = jax.shard_map(
            local, mesh=mesh, in_specs=(spec,) * 3 + (P(), P("data"), P("model")), out_specs=spec
        )(q, k, v, x["ids"], jnp.arange(B), jnp.arange(N))
        return (out**2).sum(), out

    def plain(q: Any, k: Any, v: Any) -> Any:
        out = ja.attention(
            q, k, v, mask=masks.segments(x["ids"]) & masks.causal(), score=scores.alibi(slopes_),
            dropout_rate=0.2, dropout_seed=3,
        )  # fmt: skip
        return (out**2).sum(), out

    parts = [x[name] for name in ("query", "key", "value")]
    got, wanted = (jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*parts) for f in (loss, plain))
    close(got, wanted, 2e-5)


def test_windows_of_heads_that_are_split() -> None:
    """Which heads are here is traced, so a window that depends on them is not known; others are."""
    mesh = mesh_of(2, 2, names=("seq", "model"))
    parts = [inputs(CASES["none"](rng(4)))[name] for name in ("query", "key", "value")]
    window = jnp.arange(1, N + 1, dtype=jnp.int32) * 4
    spec = P(None, "seq", "model")

    def run(mask: Any, schedule: str) -> Any:
        def local(q: Any, k: Any, v: Any, h: Any) -> Any:
            at = Positions(h=h)
            return parallel.attention(q, k, v, mask=mask, positions=at, schedule=schedule)

        specs = (spec,) * 3 + (P("model"),)
        fn = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec)
        got = jax.jit(fn)(*parts, jnp.arange(N))
        np.testing.assert_allclose(got, ja.attention(*parts, mask=mask), atol=2e-6)

    of_heads = masks.sliding_window(window)
    run(of_heads, "auto")
    run(masks.sliding_window(9) & of_heads, "halo")
    with pytest.raises(ValueError, match="no window is known"):
        run(of_heads, "halo")


@pytest.mark.parametrize(
    "schedule", ["ring", "gather", "heads", ("ring", "heads"), ("heads", "heads")], ids=str
)
def test_several_axes(schedule: Any) -> None:
    """A sequence over two mesh axes, the first the slowest, with a layout and sinks."""
    case = CASES["sinks, scale"](rng(4))
    x = inputs(case)
    mesh, layout = mesh_of(2, 2, names=("pod", "seq")), parallel.zigzag(T, RANKS)

    def local(x: Any, shared: Any) -> Any:
        return parallel.attention(
            *x, axis=("pod", "seq"), schedule=schedule, layout=layout, return_lse=True,
            **case.options(shared),
        )  # fmt: skip

    def spread(query: Any, key: Any, value: Any, **_: Any) -> Any:
        split = P(None, ("pod", "seq"))
        shared = {n: x[n] for n in ("sinks", "scale")}
        run = jax.shard_map(local, mesh=mesh, in_specs=(split, P()), out_specs=split)
        return layout.unshard(run(layout.shard((query, key, value)), shared))

    got = slopes(spread, case, x)
    wanted = slopes(partial(ja.attention, backend="dense"), case, x)
    for name in ("query", "key", "value"):
        close(got[1][name], wanted[1][name], 2e-5)
    close(got[0], wanted[0], 2e-5)


def test_explain_of_several_axes() -> None:
    """Heads inside a node: a rank sends the keys of its own heads alone between nodes."""
    query, key = (jax.ShapeDtypeStruct((1, 8192, n, 64), "float32") for n in (16, 4))
    plain = parallel.explain(query, key, key, ranks=16, schedule="ring", mask=masks.causal())
    both = parallel.explain(
        query, key, key, ranks=(4, 4), schedule=("ring", "heads"), mask=masks.causal()
    )
    assert both.schedule == "ring, heads"
    assert sum(both.sent) < sum(plain.sent)
    assert len(both.tiles) == len(plain.tiles) == 16
    # The four ranks of a node compute the same queries, in four heads of 16 each.
    for n in range(4):
        node = sum(plain.tiles[4 * n : 4 * n + 4])
        assert both.tiles[4 * n : 4 * n + 4] == (node // 4,) * 4


# --- transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["ring", pytest.param("gather", marks=pytest.mark.deep)])
def test_vmap(schedule: str) -> None:
    """Arrays with an axis more, masks and scores too, and gradients of what the axis shares."""
    case = CASES["alibi"](rng(5))
    x = inputs(case)
    many = {
        n: jnp.stack([a, a[::-1], a * 0.5]) if n in ("query", "key", "slopes") else a
        for n, a in x.items()
    }

    def total(fn: Any, many: Any) -> Any:
        axes = {n: 0 if n in ("query", "key", "slopes") else None for n in x}
        return jax.vmap(lambda x: objective(fn, case, x)[0], (axes,))(many).sum()

    got = jax.jit(jax.grad(partial(total, spread(case, schedule, None))))(many)
    wanted = jax.jit(jax.grad(partial(total, partial(ja.attention, backend="dense"))))(many)
    close(got, wanted, 2e-5)


def test_scan_and_remat_over_layers() -> None:
    """A policy that saves output and LSE by name sends keys no third time."""
    case = CASES["causal"](rng(6))
    x = inputs(case)
    weights = jnp.asarray(rng(7).normal(size=(3, HV, H)) * 0.3, jnp.float32)

    def total(fn: Any, remat: bool, weights: Any) -> Any:
        def layer(query: Any, weight: Any) -> Any:
            out = fn(query, x["key"], x["value"], mask=masks.causal(), return_lse=False)
            return jnp.einsum("btnv,vh->btnh", out, weight), None

        policy = jax.checkpoint_policies.save_only_these_names("jaxattn_out", "jaxattn_lse")
        step = jax.checkpoint(layer, policy=policy) if remat else layer
        return (jax.lax.scan(step, x["query"], weights)[0] ** 2).sum()

    fn = spread(case, "ring", None)
    plain = jax.jit(jax.grad(partial(total, partial(ja.attention), False)))(weights)
    for remat in (True, False):
        run = jax.jit(jax.grad(partial(total, fn, remat)))
        close(run(weights), plain, 2e-5)


@pytest.mark.parametrize("schedule", ["ring", pytest.param("halo", marks=pytest.mark.deep)])
def test_forward_mode_and_second_derivatives(schedule: str) -> None:
    """By the formula, over gathered keys."""
    with jax.enable_x64(True):
        case = CASES["window"](rng(8))
        x = inputs(case)
        moved = jax.tree.map(lambda a: jnp.flip(a) * 0.1, x)

        def twice(fn: Any) -> Any:
            def slope(x: Any) -> Any:
                return jax.grad(lambda x: objective(fn, case, x)[0])(x)

            return jax.jit(lambda x, moved: jax.jvp(slope, (x,), (moved,)))(x, moved)

        close(twice(spread(case, schedule, None)), twice(partial(ja.attention, backend="dense")))


# --- what is not finite ---------------------------------------------------------------------------


def _poisoned(what: str) -> dict[str, Any]:
    x = {n: np.asarray(a, np.float32).copy() for n, a in inputs(CASES["none"](rng(1))).items()}
    query, key, value = x["query"], x["key"], x["value"]
    match what:
        case "NaN in a key":
            key[0, 21, 1, 2] = np.nan
        case "infinite value":
            value[0, 21, 1, 2] = np.inf
        case "NaN in a value":
            value[1, 3, 0, 1] = np.nan
        case "NaN in a query":
            query[0, 40] = np.nan
        case "infinite key":
            # A logit of -inf, and an output that is finite.
            query[..., 0], query[..., 1:], key[0, 9, 1] = 1, 0, -np.inf
        case "all logits of a part are -inf":
            query[..., 0], query[..., 1:], key[:, 16:32, :, 0] = 1, 0, -np.inf
        case "all logits are -inf":
            query[..., 0], query[..., 1:], key[..., 0] = 1, 0, -np.inf
    return {n: jnp.asarray(a) for n, a in x.items()}


POISONS = [
    "NaN in a key", "infinite value", "NaN in a value", "NaN in a query", "infinite key",
    "all logits of a part are -inf", "all logits are -inf",
]  # fmt: skip


@pytest.mark.parametrize(
    "schedule", ["ring", *(pytest.param(s, marks=pytest.mark.deep) for s in SCHEDULES[1:])]
)
def test_what_is_not_finite_reaches_what_it_would_on_one_device(schedule: str) -> None:
    case = CASES["window"](rng(1))
    here, there = (
        jax.jit(jax.value_and_grad(partial(objective, fn, case), has_aux=True))
        for fn in (spread(case, schedule, None), partial(ja.attention, backend="tiled"))
    )
    for what in POISONS:
        x = _poisoned(what)
        for mine, theirs in zip(*map(jax.tree.leaves, (here(x), there(x))), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4, err_msg=what)


@pytest.mark.parametrize("how", ["vma", "no vma", "attention"])
def test_nan_in_one_batch_row_of_a_mesh_stops_nobody(how: str) -> None:
    """What is sent only if a number is not finite is sent by all devices, or by none."""
    mesh = mesh_of(2, 4, names=("data", "seq"))
    x = {n: jnp.asarray(a, jnp.float32) for n, a in inputs(CASES["none"](rng(1))).items()}
    x["key"] = x["key"].at[0, 13, 1, 2].set(jnp.nan)
    split = P("data", "seq")
    fn: Any = partial(ja.attention, mask=masks.causal(), backend="tiled")

    def slope(fn: Any, x: Any) -> Any:
        return jax.grad(lambda x: (fn(x["query"], x["key"], x["value"]) ** 2).sum())(x)

    wanted = jax.jit(partial(slope, fn))(x)
    if how == "attention":
        placed = jax.device_put(x, NamedSharding(mesh, split))
    else:
        placed = x
        local = partial(parallel.attention, mask=masks.causal(), schedule="ring")
        fn = jax.shard_map(
            local, mesh=mesh, in_specs=split, out_specs=split, check_vma=how == "vma"
        )
    close(jax.jit(partial(slope, fn))(placed), wanted, 2e-5)


# --- what moves -----------------------------------------------------------------------------------


def sent_in(text: str) -> dict[str, int]:
    """Bytes that a rank sends, by collective, in a compiled program: loops count every round."""
    blocks = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text)
    rounds = {
        body: int(count)
        for body, count in re.findall(
            r'while\(.*?body=%?([\w.\-]+).*?"known_trip_count":\{"n":"(\d+)"', text
        )
    }
    found: dict[str, int] = {}
    for block in blocks:
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block)
        times = rounds.get(name.group(1), 1) if name else 1
        # Flags, which are sent if a number is not finite, are none of these.
        for width, shape, op in re.findall(
            r"= [fs](\d+)\[([\d,]*)\]\S* (collective-permute|all-gather|all-to-all|all-reduce|"
            r"reduce-scatter)(?:-start)?\(",
            block,
        ):
            numbers = int(np.prod([int(n) for n in shape.split(",") if n]))
            found[op] = found.get(op, 0) + numbers * int(width) // 8 * times
    return found


@pytest.mark.parametrize("schedule", ["ring", "halo"])
def test_bytes_are_those_that_explain_says(schedule: str) -> None:
    """And nothing else moves: a ring sends 3R - 2 parts of keys and values, both passes."""
    ranks = 4
    case = CASES["window"](rng(1))
    x = {n: a.astype(jnp.float32) for n, a in inputs(case).items()}
    split = NamedSharding(mesh_of(ranks), SPLIT)
    placed = {n: jax.device_put(a, split) for n, a in x.items()}
    slope = jax.jit(jax.grad(lambda x: objective(spread(case, schedule, None), case, x)[0]))
    text = slope.lower(placed).compile().as_text()
    said = parallel.explain(
        x["query"], x["key"], x["value"], ranks=ranks, schedule=schedule, **case.options(x)
    )
    # The XLA of JAX 0.10 moves the backward's halo to the forward, and sends it once for both.
    once = schedule == "halo" and jax.__version_info__ < (0, 11)
    moved = said.sent.backward if once else sum(said.sent)
    # One number says whether all keys are finite.
    assert sent_in(text) == {"collective-permute": moved, "all-reduce": 4}
    if schedule == "ring":
        part = (x["key"].nbytes + x["value"].nbytes) // ranks
        assert sum(said.sent) == (3 * ranks - 2) * part


def _memory(schedule: str, ranks: int, length: int) -> int:
    """Bytes of temporary memory on a device, forward and backward."""
    mesh = mesh_of(ranks)
    fn = partial(parallel.attention, mask=masks.causal(), schedule=schedule, backend="tiled")

    def loss(*args: Any) -> Any:
        return (jax.shard_map(fn, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)(*args) ** 2).sum()

    def part(heads: int) -> Any:
        split = NamedSharding(mesh, SPLIT)
        return jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32, sharding=split)

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(part(4), part(2), part(2))
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


def test_memory_of_a_ring_is_that_of_a_part() -> None:
    few, many = _memory("ring", 4, 4 * 1024), _memory("ring", 8, 8 * 1024)
    assert abs(many / few - 1) < 0.05
    assert many < 0.6 * _memory("gather", 8, 8 * 1024)


# --- inputs that are sharded already --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (AxisType.Auto, T),
        (AxisType.Explicit, T),
        pytest.param(AxisType.Auto, 32, marks=pytest.mark.deep),
        pytest.param(AxisType.Explicit, 32, marks=pytest.mark.deep),
    ],
)
def test_attention_of_sharded_lengths(kind: Any, keys: int) -> None:
    """`attention` itself sends keys around where lengths are sharded, and gathers nothing."""
    mesh = mesh_of(2, 4, names=("data", "seq"), kind=kind)
    case = CASES["fewer keys" if keys < T else "alibi"](rng(2))
    x = jax.tree.map(lambda a: a.astype(jnp.float32), inputs(case))
    split = NamedSharding(mesh, P("data", "seq"))
    parts = {n: split if n in ("query", "key", "value") else NamedSharding(mesh, P()) for n in x}
    fn = partial(ja.attention, backend="tiled")
    run = jax.jit(jax.value_and_grad(partial(objective, fn, case), has_aux=True))
    placed = jax.device_put(x, parts)
    text = run.lower(placed).compile().as_text()
    got = run(placed)
    assert ("all-gather" in text) == (keys < T)
    assert got[0][1][0].sharding.is_equivalent_to(split, 4)
    close(got, slopes(partial(ja.attention, backend="dense"), case, x), 2e-5)


# --- statistics -----------------------------------------------------------------------------------


def observed(fn: Callable[..., Any], mask: Any, x: dict[str, Any]) -> Any:
    """Statistics of every kind, and gradients of those that have them."""
    asked = {
        "top": stats.max(),
        "near": stats.max(lambda x, b, h, q, k: -abs(q - k)),
        "key": stats.argmax(),
        "entropy": stats.entropy(),
        "far": stats.mean(lambda x, b, h, q, k: abs(q - k)),
        "first": stats.mass(masks.global_tokens(3)),
    }

    def total(x: dict[str, Any]) -> Any:
        more = {"received": stats.received(x["weight"]), "all": stats.received()}
        _, seen = fn(x["query"], x["key"], x["value"], mask=mask, stats=asked | more)
        return sum(jnp.sin(seen[name]).sum() for name in ("entropy", "far", "first")), seen

    return jax.jit(jax.grad(total, has_aux=True))(x)


def observable() -> dict[str, Any]:
    x = inputs(CASES["none"](rng(1)))
    return x | {"weight": jnp.asarray(rng(8).random((B, T, N)))}


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [("ring", "zigzag"), ("heads", "contiguous"), ("halo", "contiguous"), ("gather", "cyclic")],
)
def test_statistics(schedule: str, kind: str) -> None:
    """Means are added, maxima are compared, and what keys receive comes home."""
    mask, layout = masks.sliding_window(9, 3), layout_of(kind)

    def run(query: Any, key: Any, value: Any, *, mask: Any, stats: Any) -> Any:
        weight = stats["received"].weight

        def local(query: Any, key: Any, value: Any, weight: Any) -> Any:
            here = stats | {"received": ja.stats.received(weight)}
            return parallel.attention(
                query, key, value, mask=mask, stats=here, schedule=schedule, layout=layout
            )

        parts = (query, key, value, weight)
        parts = parts if layout is None else layout.shard(parts)
        out = jax.shard_map(local, mesh=mesh_of(RANKS), in_specs=SPLIT, out_specs=SPLIT)(*parts)
        return out if layout is None else layout.unshard(out)

    with jax.enable_x64(True):
        x = observable()
        close(observed(run, mask, x), observed(partial(ja.attention, backend="dense"), mask, x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [SPLIT, P("data", None, "seq")], ids=["lengths", "heads"])
def test_statistics_of_sharded_arrays(kind: Any, spec: Any) -> None:
    mesh = mesh_of(2, 4, names=("data", "seq"), kind=kind)
    x = jax.tree.map(lambda a: a.astype(jnp.float32), observable())
    wanted = observed(partial(ja.attention, backend="dense"), masks.causal(), x)

    def placed(array: Any) -> Any:
        # Two key heads cannot lie on four devices.
        own = P(spec[0]) if array.shape[2] == K and spec != SPLIT else spec
        return jax.device_put(array, NamedSharding(mesh, own))

    got = observed(partial(ja.attention, backend="tiled"), masks.causal(), jax.tree.map(placed, x))
    close(got, wanted, 1e-4)


# --- layouts --------------------------------------------------------------------------------------


@given(ranks=st.integers(1, 6), count=st.integers(1, 5), size=st.integers(1, 4), data=st.data())
def test_layouts_are_permutations(ranks: int, count: int, size: int, data: Any) -> None:
    numbers = data.draw(st.permutations(range(ranks * count)))
    rows = tuple(tuple(numbers[r * count : (r + 1) * count]) for r in range(ranks))
    layout = parallel.Layout(rows, ranks * count * size)
    assert sorted(layout.positions.tolist()) == list(range(layout.length))
    tokens = np.arange(2 * layout.length).reshape(2, layout.length)
    there = layout.shard({"tokens": tokens})["tokens"]
    np.testing.assert_array_equal(there, tokens[:, layout.positions])
    np.testing.assert_array_equal(layout.unshard(there), tokens)
    assert layout.contiguous == (list(numbers) == sorted(numbers))
    assert hash(layout) == hash(parallel.Layout(rows, layout.length))


BALANCED = {
    "causal": masks.causal(),
    "window": masks.sliding_window(700),
    "prefix": masks.prefix_lm(3000),
    "documents": masks.segments(np.sort(rng(1).integers(0, 9, 8192)).astype(np.int32)) & masks.causal(),
    "chunks": masks.chunked(1024) & masks.causal(),
    "padding": masks.key_padding(lengths=np.asarray([5000])),
}  # fmt: skip


@pytest.mark.parametrize("name", BALANCED)
def test_a_layout_made_for_a_mask_is_even(name: str) -> None:
    """The most work of a rank is at most 1.05 of the mean, with no tile more than contiguous."""
    mask = BALANCED[name]
    x = jax.ShapeDtypeStruct((1, 8192, 1, 64), "float32")

    def plan(layout: Any) -> Any:
        return parallel.explain(x, x, x, ranks=8, schedule="ring", mask=mask, layout=layout)

    made, plain = plan(parallel.layout(mask, 8192, 8, blocks=8)), plan(None)
    assert made.balance <= 1.05
    assert sum(made.tiles) <= sum(plain.tiles)


def test_a_layout_for_several_layers() -> None:
    """One order of tokens serves layers with different masks, and their work together is even."""
    layers = [masks.causal(), masks.sliding_window(512), masks.causal()]
    layout = parallel.layout(layers, 8192, 8, blocks=8)
    x = jax.ShapeDtypeStruct((1, 8192, 1, 64), "float32")
    total = np.zeros(8)
    for mask in layers:
        total += parallel.explain(x, x, x, ranks=8, schedule="ring", mask=mask, layout=layout).tiles
    assert total.max() / total.mean() <= 1.05


def test_a_layout_for_a_traced_mask_is_cyclic_but_for_windows() -> None:
    found = []

    def run(ids: Any) -> Any:
        def same(b: Any, h: Any, q: Any, k: Any) -> Any:
            return ids[q] == ids[k]

        known = masks.full(), masks.causal(), masks.sliding_window(100)
        found.extend(parallel.layout(masks.predicate(same) & mask, 4096, 4) for mask in known)
        found.append(parallel.layout(same, 4096, 4))
        return ids

    jax.jit(run)(jnp.zeros(4096, jnp.int32))
    anything, window = parallel.cyclic(4096, 4), parallel.contiguous(4096, 4)
    assert found == [anything, anything, window, anything]


def test_tokens_stay_in_order_where_that_is_even() -> None:
    for mask in (masks.full(), masks.sliding_window(200), masks.chunked(64)):
        assert parallel.layout(mask, 4096, 4).contiguous
    assert not parallel.layout(masks.causal(), 4096, 4).contiguous


# --- the choice -----------------------------------------------------------------------------------


def test_auto_sends_least() -> None:
    def plan(mask: Any, heads: int = 8, length: int = 16384, ranks: int = 8, **more: Any) -> Any:
        query = jax.ShapeDtypeStruct((1, length, heads, 64), "float32")
        key = jax.ShapeDtypeStruct((1, length, heads // 3 if heads % 3 == 0 else 2, 64), "float32")
        return parallel.explain(query, key, key, ranks=ranks, mask=mask, **more)

    assert plan(masks.sliding_window(256)).schedule == "halo"
    assert plan(masks.causal()).schedule == "heads"
    # 8 ranks don't divide 12 heads.
    assert plan(masks.causal(), heads=12).schedule == "ring"
    assert plan(masks.causal(), heads=12, length=512).schedule == "gather"
    layout = parallel.zigzag(16384, 8)
    assert plan(masks.sliding_window(256), heads=12, layout=layout).schedule == "ring"
    assert plan(None, schedule="gather").reason.startswith("asked for")
    text = str(plan(masks.causal(), heads=12))
    for said in ("ring", "not heads: 8 ranks don't divide the 12 query heads", "MiB", "tiles"):
        assert said in text


def test_a_window_beside_traced_ids_is_known() -> None:
    """The halo of a static window is found though the other conjunct is traced."""
    x = jax.ShapeDtypeStruct((1, 4096, 12, 64), "float32")
    found = []

    def run(ids: Any) -> Any:
        mask = masks.segments(ids) & masks.sliding_window(100, 20)
        found.append(parallel.explain(x, x, x, ranks=8, mask=mask))
        return ids

    jax.jit(run)(jnp.zeros((1, 4096), jnp.int32))
    assert found[0].schedule == "halo"
    assert found[0].tiles is None
    assert found[0].balance is None
    part = 12 * 64 * 2 * 4
    assert found[0].sent == (120 * part, 2 * 120 * part)


# --- bad input ------------------------------------------------------------------------------------


def _local(run: Callable[..., Any], length: int = T, heads: int = N) -> Any:
    x = jnp.zeros((1, length, heads, H))
    fn = jax.shard_map(run, mesh=mesh_of(RANKS), in_specs=SPLIT, out_specs=SPLIT)
    return jax.jit(fn)(x, x, x)


def _several(**options: Any) -> Any:
    """Over two mesh axes, of which the second exchanges heads."""
    x, axis = jnp.zeros((1, T, N, H)), ("pod", "seq")
    run = partial(parallel.attention, axis=axis, schedule=("ring", "heads"), **options)
    mesh, split = mesh_of(2, 2, names=axis), P(None, axis)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split))(x, x, x)


ERRORS = {
    "no shard_map": (
        lambda: parallel.attention(*[jnp.zeros((1, T, N, H))] * 3), "axis: .*inside jax.shard_map"
    ),
    "axis": (
        lambda: _local(partial(parallel.attention, axis="sequence")),
        "axis: got 'sequence', expected one of this shard_map's axes, 'seq'",
    ),
    "schedule": (
        lambda: _local(partial(parallel.attention, schedule="rings")),
        "schedule: got 'rings', expected one of 'auto', 'ring'",
    ),
    "schedules": (
        lambda: _local(partial(parallel.attention, schedule=("ring", "heads"))),
        "schedule: got .* for 1 mesh axes, expected one schedule, or one for each",
    ),
    "heads": (
        lambda: _local(partial(parallel.attention, schedule="heads"), heads=6),
        "schedule: 'heads' can't .*4 ranks don't divide the 6 query heads",
    ),
    "sinks of other heads": (
        lambda: _several(sinks=jnp.zeros(N // 2)), r"sinks: got shape \[4\], expected \[N\] = \[8\]"
    ),
    "masks of other heads": (
        lambda: _several(mask=masks.sliding_window(jnp.zeros(N // 2, jnp.int32))),
        "got extent 4 .* expected N = 8",
    ),
    "halo": (
        lambda: _local(partial(parallel.attention, schedule="halo", mask=masks.causal())),
        "schedule: 'halo' can't .*no window is known",
    ),
    "halo of a layout": (
        lambda: _local(partial(parallel.attention, schedule="halo", layout=parallel.zigzag(T, RANKS))),
        "schedule: 'halo' can't .*contiguous",
    ),
    "length of a layout": (
        lambda: _local(partial(parallel.attention, layout=parallel.zigzag(2 * T, RANKS))),
        "layout: got one of 128 tokens over 4 ranks, expected one for 64 queries",
    ),
    "ranks of a layout": (
        lambda: _local(partial(parallel.attention, layout=parallel.zigzag(T, 2))),
        "layout: got one of 64 tokens over 2 ranks, expected .* over 4",
    ),
    "local ids": (
        lambda: _local(partial(parallel.attention, mask=masks.segments(jnp.zeros((1, T // RANKS), jnp.int32)))),
        "expected T = 64",
    ),
    "a backend of whole rows": (
        lambda: _local(partial(parallel.attention, schedule="ring", backend="dense")),
        "backend: 'dense' can't compute this call: the sequence is shared by devices",
    ),
    "whole keys": (
        lambda: _local(lambda q, k, v: parallel.attention(q, jnp.zeros((1, T, N, H)), v)),
        "key: got an array that is the same on all devices",
    ),
    "a length that ranks don't divide": (
        lambda: parallel.explain(*[jax.ShapeDtypeStruct((1, 30, 4, 8), "float32")] * 3, ranks=4),
        "query: got 30 tokens, expected a multiple of ranks = 4: pad",
    ),
    "no ranks": (
        lambda: parallel.explain(*[jnp.zeros((1, 8, 2, 4))] * 3, ranks=(0, 8)),
        r"parallel.explain\(ranks\[0\]\): got 0, expected at least 1",
    ),
    "ranks that are no number": (
        lambda: parallel.explain(*[jnp.zeros((1, 8, 2, 4))] * 3, ranks=2.0),
        r"parallel.explain\(ranks\): got 2.0, expected one integer",
    ),
    "no axes": (
        lambda: parallel.explain(*[jnp.zeros((1, 8, 2, 4))] * 3, ranks=()),
        r"parallel.explain\(ranks\): got no sizes, expected a number of devices",
    ),
    "a layout of no ranks": (
        lambda: parallel.layout(masks.causal(), 8, ranks=0),
        r"parallel.layout\(ranks\): got 0, expected at least 1",
    ),
    "stripes for no ranks": (
        lambda: parallel.striped(8, 0), r"parallel.striped\(ranks\): got 0, expected at least 1"
    ),
    "zigzag for ranks of two axes": (
        lambda: parallel.zigzag(8, (2, 2)),
        r"parallel.zigzag\(ranks\): got \(2, 2\), expected one integer",
    ),
    "a layout of a length that ranks don't divide": (
        lambda: parallel.zigzag(30, 4), "Layout.length: got 30, expected a multiple of the 8 blocks"
    ),
    "no table": (lambda: parallel.Layout(((0, 1), (1, 2)), 8), "Layout.blocks: got .*every number"),
    "tokens of another length": (
        lambda: parallel.zigzag(T, RANKS).shard(jnp.zeros((2, 5))), "expected 64 tokens along"
    ),
    "weights of all queries": (
        lambda: _local(partial(parallel.attention, stats=ja.stats.received(jnp.ones((1, T, N))))),
        r"received\(weight\): got shape \[1, 64, 8\], expected .* \[B, T, N\] = \[1, 16, 8\]",
    ),
    "an option of explain": (
        lambda: parallel.explain(*[jnp.zeros((1, 8, 2, 4))] * 3, ranks=2, masks=None),
        "unexpected keyword argument 'masks'",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_says_what_to_do(name: str) -> None:
    run, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        run()


def test_explain_of_attention_speaks_of_lengths() -> None:
    mesh = mesh_of(4)
    x = {
        n: jax.device_put(a, NamedSharding(mesh, SPLIT))
        for n, a in inputs(CASES["none"](rng(1))).items()
    }
    found = ja.explain(x["query"], x["key"], x["value"])
    assert any("lengths are split over 4 devices" in note for note in found.notes)
    found = ja.explain(x["query"], x["key"][:, :32], x["value"][:, :32])
    assert any("are gathered on each" in note for note in found.notes)


def test_a_halo_that_wraps_around_is_not_seen_by_distance() -> None:
    """The first rank's halo holds the last keys; masks of distances alone are read by distance."""
    draw = rng(31)
    q, k, v = (jnp.asarray(draw.normal(size=(1, 16, 2, 4)), jnp.float32) for _ in range(3))
    mask = masks.sliding_window(6, 1) & masks.dilated(2)

    def local(q: Any, k: Any, v: Any) -> Any:
        return parallel.attention(q, k, v, mask=mask, schedule="halo")

    run = jax.shard_map(local, mesh=mesh_of(2), in_specs=SPLIT, out_specs=SPLIT)
    np.testing.assert_allclose(
        jax.jit(run)(q, k, v), ja.attention(q, k, v, mask=mask, backend="dense"), atol=1e-5
    )

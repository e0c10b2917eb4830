"""The kernels for NVIDIA GPUs: their lists, what they refuse, and lowered for real GPUs.

`test_kernels.py` holds them, interpreted, to the contract.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention as contract
from test_kernels import make

import jaxattn as ja
from jaxattn import masks, scores, stats
from jaxattn.arguments import checked_call
from jaxattn.backends import base, formula, triton
from jaxattn.backends.base import Call
from jaxattn.backends.flash import tile_lists
from jaxattn.backends.triton import tiles
from jaxattn.dispatch import BACKENDS
from jaxattn.tiles.tile_map import tile_map

pytestmark = pytest.mark.no_cover
NAME = "triton"


@pytest.fixture
def interpreted() -> Any:
    with triton.interpreted():
        yield


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"), [((16, 16), (32, 16)), ((64, 32), (16, 64)), ((16, 64), (16, 16))]
)
@pytest.mark.parametrize(("T", "S"), [(70, 50), (9, 200)])
def test_states_of_other_tiles_are_sound(given: Any, wanted: Any, T: int, S: int) -> None:
    seen = jnp.asarray(np.tril(np.ones((T, S), bool), 20) & (np.arange(S) % 50 != 7))
    states = tile_map(seen, (1, T, 1, 8), (1, S, 1, 8), tile=given).states
    found = np.asarray(tile_lists.states_of(states[:, :, None], given, wanted, T, S))[0, 0, 0]
    assert found.shape == (-(-T // wanted[0]), -(-S // wanted[1]))
    for i, j in np.ndindex(found.shape):
        part = seen[i * wanted[0] :, j * wanted[1] :][: wanted[0], : wanted[1]]
        if found[i, j] == tile_lists.EMPTY:
            assert not part.any()
        if found[i, j] == tile_lists.FULL:
            assert part.all()
            assert part.shape == wanted


def test_lists_have_mixed_tiles_first() -> None:
    states = jnp.asarray([[2, 0, 1, 2, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], jnp.int8)
    tile, ends = tile_lists.rows(states[None, None, None])
    np.testing.assert_array_equal(tile[0, 0, 0, 0, :4], [2, 4, 0, 3])
    np.testing.assert_array_equal(ends[0, 0, 0], [[2, 4], [0, 0], [5, 5]])


# --- float16 --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreted")
def test_float16() -> None:
    row = {"lengths": (40, 17), "head_dim": 80, "heads": (3, 1), "dtype": "float16"}
    features = {"mask": "window_per_head", "score": None, "extra": "positions"}
    contract.run_row(NAME, row | features)


# --- what is refused ------------------------------------------------------------------------------


def test_it_runs_on_gpus_alone() -> None:
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs; inputs are on cpu"):
        ja.attention(x, x, x, backend=NAME)
    with pytest.raises(ValueError, match=r"expected one of .*'triton'"):
        ja.attention(x, x, x, backend="pallas")


@pytest.mark.usefixtures("interpreted")
def test_what_no_kernel_can_is_refused() -> None:
    table = jnp.ones((2, 3), bool)

    def reason(call: Call) -> str:
        return triton.refuse(call) or ""

    assert not reason(make(masks.causal()))
    blocks = make(masks.predicate(lambda b, h, q, k: table[jnp.minimum(q * k, 1), k % 3]))
    assert "the mask can't be computed in a kernel" in reason(blocks)

    def smooth(x: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return jax.lax.erf(x) * k.astype(x.dtype)

    assert re.search("no kernel has .*erf", reason(make(None, scores.score(smooth))))
    wide = jax.ShapeDtypeStruct((1, 4, 1, 257), jnp.float32)
    given = {"query": wide, "key": wide, "value": wide}
    assert "up to 256" in reason(dataclasses.replace(make(), **given))
    none = jax.ShapeDtypeStruct((1, 0, 1, 8), jnp.float32)
    given = {"query": none, "key": none, "value": none}
    assert "nothing to compute" in reason(dataclasses.replace(make(), **given))
    with jax.enable_x64(True):
        assert "float64" in reason(make(dtype=np.float64))


# --- real GPUs ------------------------------------------------------------------------------------

# Pallas says so wherever it lowers for Triton, from JAX 0.11 on.
lowering = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def described(kind: str) -> Any:
    """Inside, the GPU of that name is what JAX computes on."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def structs(T: int, S: int, N: int, K: int, H: int, dtype: Any, B: int = 2) -> Any:
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lowered(kind: str, arguments: Any, backend: str = NAME, **options: Any) -> str:
    def loss(query: Any, key: Any, value: Any) -> Any:
        out, lse = ja.attention(query, key, value, backend=backend, return_lse=True, **options)
        return out.astype(jnp.float32).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    with described(kind):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


LENGTH = 640
REAL = {
    "causal": (64, (4, 4), jnp.bfloat16, lambda: {"mask": masks.causal()}),
    "segments, grouped": (
        80, (8, 2), jnp.bfloat16,
        lambda: {"mask": masks.segments(jnp.zeros((2, LENGTH), jnp.int32)) & masks.causal()},
    ),
    "window of each head, a table of distances": (
        96, (4, 2), jnp.float16,
        lambda: {
            "mask": masks.sliding_window(jnp.arange(4) + 100),
            "score": scores.relative_bias(jnp.ones((4, 32))),
        },
    ),
    "a dense array, dropout": (
        128, (4, 2), jnp.bfloat16,
        lambda: {
            "mask": masks.dense(jnp.ones((LENGTH, LENGTH), bool)), "dropout_rate": 0.1,
            "dropout_seed": 1,
        },
    ),
    "not causal, alibi and a cap": (
        256, (4, 2), jnp.bfloat16,
        lambda: {
            "mask": ~masks.causal(),
            "score": scores.chain(scores.alibi(jnp.ones(4)), scores.soft_cap(5.0)),
        },
    ),
    "float32": (128, (2, 2), jnp.float32, lambda: {"mask": masks.prefix_lm(30)}),
}  # fmt: skip


@lowering
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # Few programs differ between the two.
        pytest.param(n, k, marks=() if k == H100 or n == "causal" else pytest.mark.deep)
        for n in REAL
        for k in (H100, A100)
    ],
)
def test_it_lowers(name: str, kind: str, monkeypatch: Any) -> None:
    # What is not finite is looked for some rows at a time.
    monkeypatch.setattr(formula, "CELLS", LENGTH * 16)
    H, (N, K), dtype, options = REAL[name]
    text = lowered(kind, structs(LENGTH, LENGTH, N, K, H, dtype), **options())
    assert text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call") >= 3
    if "dense" not in name:
        assert f"{LENGTH}x{LENGTH}x" not in text


@lowering
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic's kernels need JAX 0.11")
def test_mosaic_runs_where_it_is_named(monkeypatch: Any) -> None:
    half, single = (structs(704, 704, 2, 1, 64, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert lowered(H100, half, "mosaic", mask=masks.causal()).count("@mosaic_gpu") == 3
    assert "mosaic" not in lowered(H100, half, "triton", mask=masks.causal())
    with pytest.raises(ValueError, match=r"'mosaic' can't compute.*bfloat16 or float16"):
        lowered(H100, single, "mosaic", mask=masks.causal())
    monkeypatch.setattr(base, "capability", lambda call: (8, 0))
    with pytest.raises(ValueError, match=r"'mosaic' can't compute.*capability 9.0"):
        lowered(H100, half, "mosaic", mask=masks.full())


@lowering
def test_its_name_of_before_still_runs_it() -> None:
    arguments = structs(768, 768, 2, 1, 64, jnp.bfloat16)
    with pytest.warns(DeprecationWarning, match="write 'triton'"):
        text = lowered(H100, arguments, "pallas_gpu", mask=masks.causal())
    assert "triton" in text


@lowering
def test_a_tile_can_be_asked_for() -> None:
    """All kernels take it, and the lists of active tiles are of that size."""
    arguments = structs(LENGTH, LENGTH, 2, 1, 64, jnp.bfloat16)
    for tile, counts in (((32, 64), "20x10xi32"), ((64, 128), "10x5xi32")):

        def run(query: Any, key: Any, value: Any, tile: Any = tile) -> Any:
            return triton.run(checked_call(query, key, value, mask=masks.causal()), tile)[0]

        with described(H100):
            traced = jax.jit(run).trace(*arguments)
            assert counts in traced.lower(lowering_platforms=("cuda",)).as_text()


@lowering
def test_ragged_lengths_lower() -> None:
    lowered(H100, structs(333, 517, 2, 1, 64, jnp.bfloat16))


@lowering
@pytest.mark.parametrize(
    ("T", "options", "expected"),
    [
        (128, {}, "dense"),
        (256, {}, NAME),
        (4096, {}, NAME),
        (256, {"score": lambda x, b, h, q, k: jax.lax.erf(x)}, "dense"),
        (4096, {"score": lambda x, b, h, q, k: jax.lax.erf(x)}, "tiled"),
    ],
)
def test_auto_takes_kernels_where_they_can(T: int, options: Any, expected: str) -> None:
    with described(H100):
        arguments = structs(T, T, 4, 4, 64, jnp.bfloat16)
        found = ja.explain(*arguments, mask=masks.causal(), **options)
    assert found.backend == expected
    assert ("by published figures; not measured here" in found.reason) == (expected == NAME)
    assert {found.backend, *found.others} == set(BACKENDS)
    assert ja.explain(*arguments, mask=masks.causal(), **options).backend != NAME


@lowering
def test_auto_takes_kernels_for_statistics() -> None:
    asked = [stats.entropy(), stats.received()]
    with described(H100):
        found = ja.explain(*structs(4096, 4096, 4, 4, 64, jnp.bfloat16), stats=asked)
    assert found.backend == NAME
    assert found.others["cudnn"].startswith("does not compute entropy, received (stats=); 'dense'")
    assert found.others["rows"].startswith("does not compute entropy, received")


@lowering
def test_auto_takes_kernels_for_many_short_rows_that_fill_the_memory() -> None:
    with described(H100):
        few, many = (jax.ShapeDtypeStruct((B, 128, 4, 64), jnp.bfloat16) for B in (8, 2048))
        assert ja.explain(few, few, few).backend == "dense"
        assert ja.explain(many, many, many).backend in ("cudnn", NAME)


@pytest.mark.parametrize(("H", "Hv"), [(1, 17), (64, 64), (96, 128), (256, 17)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tiles_are_what_triton_takes(H: int, Hv: int, dtype: str) -> None:
    for T, S in ((1, 1), (33, 7), (4096, 4096)):
        blocks = tiles.blocks_of(tiles.KernelOptions(), H, Hv, T, S, dtype)
        for block in blocks:
            for n in (block.tq, block.tk, block.warps):
                assert n & (n - 1) == 0
            assert min(block.tq, block.tk) >= tiles.LEAST
        assert blocks.tables.tq == blocks.tables.tk
        tq, tk = tiles.tile_of(tiles.KernelOptions(), H, Hv, T, S, dtype)
        assert all(block.tq % tq == 0 and block.tk % tk == 0 for block in blocks)


def test_a_head_is_padded_to_a_power_of_two() -> None:
    assert [tiles.width(n) for n in (1, 16, 17, 80, 128)] == [16, 16, 32, 128, 128]

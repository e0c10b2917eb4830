"""What kernels for TPUs read, write and multiply: the counts."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import benchmark_gpu_worker as worker  # noqa: E402
import splash  # noqa: E402
import traffic_tpu  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from traffic_tpu import Config, Launched, Traffic  # noqa: E402

from jaxattn.arguments import checked_call  # noqa: E402
from jaxattn.backends.tpu import backend, kernels, tiles  # noqa: E402

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("as_users_run")]
T, SIDE, H = 1024, 128, 64
# What a block of queries or of keys is, in bytes; the same of gradients in float32; of a line.
BLOCK, WIDE, LINE = SIDE * H * 2, SIDE * H * 4, SIDE * 4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Eight tiles along each side, windows and documents of two and a half tiles."""
    monkeypatch.setattr(tiles, "TILE", (SIDE, SIDE))
    monkeypatch.setattr(splash, "BLOCK", SIDE)
    monkeypatch.setattr(traffic_tpu, "BLOCK", SIDE)
    for length in ("WINDOW", "DOCUMENT"):
        for module in (worker, splash):
            monkeypatch.setattr(module, length, 320)
    splash._kernel.cache_clear()
    yield
    splash._kernel.cache_clear()


def shown(mask: str) -> np.ndarray:
    """Which tiles have a visible pair, `[queries, keys]`."""
    arrays, make = worker.our_options(mask, {"T": T, "B": 1, "N": 1})
    array = np.asarray(make(**arrays)["mask"].dense(T, T)[0, 0])
    n = T // SIDE
    return array.reshape(n, SIDE, n, SIDE).any((1, 3))


def test_a_copy_is_made_where_the_block_changes() -> None:
    """By hand: six programs of two axes, and a list that is prefetched."""
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2, 3),
        in_specs=[
            pl.BlockSpec((None, 4), lambda a, b, words: (a, 0)),  # 0 0 0 1 1 1
            pl.BlockSpec((2, 4), lambda a, b, words: (words[b], 0)),  # 5 5 7 5 5 7
            pl.BlockSpec((1, 1), lambda a, b, words: (0, 0)),
        ],
        out_specs=[pl.BlockSpec((8,), lambda a, b, words: (b,))],  # 0 1 2 0 1 2
    )
    words = jnp.asarray([5, 5, 7], jnp.int32)
    arrays = jnp.zeros((2, 4), jnp.int8), jnp.zeros((16, 4), jnp.int16), jnp.zeros((1, 1))
    kernel = Launched("", spec, [jax.ShapeDtypeStruct((24,), jnp.float32)], (words,), arrays)
    found = kernel.traffic(lambda a, b, words: words[b] == 5, 10)
    assert found == Traffic(6, 4, 2 * 4 + 4 * 16 + 4 + 12, 6 * 32, 40)


@pytest.mark.parametrize("mask", Config.masks)
def test_every_active_tile_is_visited_once(mask: Any) -> None:
    """And of a tile's blocks those are read that the tile before it did not have."""
    tile_of = shown(mask)
    n, active = tile_of.shape[0], int(tile_of.sum())
    found = traffic_tpu.ours(Config(head_dim=H), mask, T)
    for name, each in found.items():
        assert each.steps == each.active == active
        assert each.flop == active * traffic_tpu.PRODUCTS[name] * 2 * SIDE * SIDE * H
    assert found["forward"].written == n * (BLOCK + LINE)
    assert found["queries"].written == n * WIDE
    assert found["keys"].written == n * 2 * BLOCK

    def runs(order: np.ndarray) -> int:
        """Blocks along the columns of the tiles in an order."""
        _, at = np.nonzero(order)
        return 1 + int((at[1:] != at[:-1]).sum())

    ids = mask == "documents"
    # Operands of the mask: positions of queries and of keys, and the ids of both.
    of_row, of_column = (1 + ids) * LINE, (1 + ids) * LINE
    # Read once: words for all tiles, the first row, the scale, and both sides of the window.
    lists = 4 * n * n + 4 + 4 + 8 * (mask == "window")
    assert found["forward"].read == (
        n * (BLOCK + of_row) + runs(tile_of) * (2 * BLOCK + of_column) + lists
    )
    assert found["queries"].read == (
        n * (2 * BLOCK + of_row + 2 * LINE) + runs(tile_of) * (2 * BLOCK + of_column) + lists
    )
    assert found["keys"].read == (
        n * (2 * BLOCK + of_column) + runs(tile_of.T) * (2 * BLOCK + of_row + 2 * LINE) + lists
    )


def test_kernels_in_parts_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two rows of tiles, four kernels do the work of one."""
    whole = traffic_tpu.ours(Config(head_dim=H), "causal", T)
    monkeypatch.setattr(tiles, "MOST", 2 * T // SIDE)
    parts = traffic_tpu.ours(Config(head_dim=H), "causal", T)
    for name, each in parts.items():
        assert each.flop == whole[name].flop
        assert each.active == whole[name].active
        assert each.written == whole[name].written


@pytest.mark.parametrize("mask", ["causal", "window", "prefix"])
def test_splash_multiplies_its_blocks_that_are_not_empty(mask: Any) -> None:
    found = traffic_tpu.splashes(Config(head_dim=H), mask, T)
    assert found.keys() == traffic_tpu.PRODUCTS.keys()
    assert {each.active for each in found.values()} == {int(shown(mask).sum())}
    assert found["forward"].steps == shown(mask).sum(1).max() * (T // SIDE)


def test_splash_does_not_skip_by_ids() -> None:
    found = traffic_tpu.splashes(Config(head_dim=H), "documents", T)
    assert {each.active for each in found.values()} == {int(shown("causal").sum())}


def test_splash_refuses_what_it_is_not_given() -> None:
    with pytest.raises(ValueError, match="splash has no alibi; here it is given full, causal"):
        splash.splash("alibi", T, 1)


def test_heads_share_lists_and_keys() -> None:
    """Four query heads write the gradients of one key head once."""
    one = traffic_tpu.ours(Config(head_dim=H), "causal", T)
    four = traffic_tpu.ours(Config(head_dim=H, heads=4, kv_heads=4), "causal", T)
    grouped = traffic_tpu.ours(Config(head_dim=H, heads=4, kv_heads=1), "causal", T)
    assert {four[name].flop / one[name].flop for name in one} == {4}
    assert four["keys"].written == 4 * one["keys"].written
    assert grouped["keys"].flop == four["keys"].flop
    assert grouped["keys"].written == one["keys"].written


def test_products_are_those_of_the_kernels() -> None:
    """Without a mask a kernel has no second version for PARTIAL tiles."""
    x = jnp.zeros((1, T, 1, H), jnp.bfloat16)

    def ours(q: Any, k: Any, v: Any) -> Any:
        problem, inputs = backend.build(checked_call(q, k, v))
        inputs, engine = inputs.grouped(), kernels.engine(tiles.KernelOptions())
        out, lse = engine.forward(problem, inputs)
        far = lse.transpose(0, 2, 3, 1)
        return engine.backward(problem, 1, inputs, far, far, out)

    def splashes(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(splash.splash("full", T, 1), *(a[:, :, 0] for a in (q, k, v)))
        return pull(out)

    def products(both: Any) -> int:
        return str(jax.make_jaxpr(both)(x, x, x)).count("dot_general[")

    of_kernels = sum(traffic_tpu.PRODUCTS.values())
    assert products(ours) == of_kernels
    # One is not in a kernel: each output times its gradient.
    assert products(splashes) == of_kernels + 1


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    traffic_tpu.main(Config(masks=("window",), lengths=(T,), head_dim=H))
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.count("|") for row in (header, *rows)] == 4 * [len(traffic_tpu.HEADER) + 1]
    pairs = worker.visible("window", T)
    assert rows[0].startswith(f"| window, T = {T}, forward | {4 * H * pairs / 1e9:.1f} |")

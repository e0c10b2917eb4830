"""Products of bfloat16 on CPU: where they are used, and that results are right with and without."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_tiled import everything, make

from jaxattn import masks, scores
from jaxattn.backends import base, bfloat16, dense, rows, tiled
from jaxattn.backends.base import Call

# Lengths in whole tiles and as many key heads as query heads: without barriers XLA merges the
# transpose of the keys into a product, and the program fails.
whole = partial(make, B=1, T=64, S=64, N=2, K=2)

CASES = {
    "whole tiles": lambda dtype: whole(masks.causal(), dtype=dtype),
    "no mask": lambda dtype: whole(dtype=dtype),
    "grouped heads, ragged tiles, negative scale": lambda dtype: make(
        masks.sliding_window(9) | masks.global_tokens(3), scale=jnp.float32(-0.3), dtype=dtype
    ),
    "a score that learns": lambda dtype: whole(
        masks.causal(-5), scores.alibi(jnp.asarray([0.5, 0.1], jnp.float32)), dtype=dtype
    ),
}


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products of bfloat16 forced on, and off; whether on."""
    if request.param and not bfloat16.multiplies():
        pytest.skip("this JAX does not multiply bfloat16 as it is")
    monkeypatch.setattr(bfloat16, "pays", lambda: request.param)
    return bool(request.param)


RUNS = {"tiled": partial(tiled.run, tile=(16, 16)), "rows": rows.run}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_float32(name: str, run: Any, narrow: bool) -> None:
    """Within some steps of bfloat16, of which 1 has 2^-8."""
    got = jax.jit(partial(everything, run))(CASES[name](jnp.bfloat16))
    rounded = CASES[name](jnp.bfloat16)
    wide = dataclasses.replace(
        CASES[name](jnp.float32),
        **{n: getattr(rounded, n).astype(jnp.float32) for n in ("query", "key", "value")},
    )
    wanted = jax.jit(partial(everything, dense.run))(wide)
    # The scale's gradient is the sum of these, whose errors add up as those of chance do.
    terms = np.asarray(wide.query * wanted[0][0] / wide.scale)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if b.dtype == jax.dtypes.float0:
            continue
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        largest = np.abs(b).max() if b.ndim else np.sqrt((terms**2).sum())
        assert np.abs(a - b).max() <= 4 * 2**-8 * (1 + largest)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_lse_is_as_exact_as_in_float32(run: Any, narrow: bool) -> None:
    """Weights are rounded for the product with values, but not for their sum."""
    call = whole(masks.causal(), dtype=jnp.bfloat16)
    wide = dataclasses.replace(
        call, **{n: getattr(call, n).astype(jnp.float32) for n in ("query", "key", "value")}
    )
    _, lse = jax.jit(run)(call)
    np.testing.assert_allclose(lse, jax.jit(dense.run)(wide)[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_program_multiplies_what_was_chosen(run: Any, narrow: bool) -> None:
    call = whole(dtype=jnp.bfloat16)
    text = jax.jit(partial(everything, run)).lower(call).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert (sum("bf16>" in line for line in products) >= 7) == narrow
    assert narrow or not any("bf16>" in line for line in products)


def test_which_calls_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(call: Call) -> Any:
        return jnp.dtype(bfloat16.factors(call))

    monkeypatch.setattr(bfloat16, "pays", lambda: True)
    call = whole(dtype=jnp.bfloat16)
    if base.platform(call) == "cpu":
        assert of(call) == jnp.bfloat16
        assert of(dataclasses.replace(call, precision=lax.Precision.HIGHEST)) == jnp.bfloat16
        named = lax.DotAlgorithmPreset.F32_F32_F32
        assert of(dataclasses.replace(call, precision=named)) == jnp.float32
        assert of(dataclasses.replace(call, value=call.value.astype(jnp.float32))) == jnp.float32
        assert of(whole(dtype=jnp.float16)) == jnp.float32
        assert of(whole()) == jnp.float32


# --- finding out ----------------------------------------------------------------------------------


def test_it_is_found_out_inside_of_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    outside, found = bfloat16.multiplies(), []

    def traced(x: Any) -> Any:
        found.append(bfloat16.multiplies())
        return x

    jax.jit(jax.vmap(jax.grad(traced)))(jnp.ones(2))
    mesh = jax.make_mesh((1,), ("rows",))
    with jax.sharding.use_mesh(mesh) if hasattr(jax.sharding, "use_mesh") else jax.set_mesh(mesh):
        found.append(bfloat16.multiplies())
    with jax.disable_jit():
        found.append(bfloat16.multiplies())
    with jax.enable_x64(True):
        found.append(bfloat16.multiplies())
    assert found == [outside] * 4


def test_products_that_fail_or_round_or_are_converted_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = bfloat16.dot

    def fails(*args: Any) -> Any:
        raise NotImplementedError("BF16 x BF16 = F32")

    def rounds(*args: Any) -> Any:
        return exact(*args) + 1

    def converts(a: Any, b: Any, *args: Any) -> Any:
        return exact(a.astype(jnp.float32), b.astype(jnp.float32), *args)

    for other in (fails, rounds, converts):
        monkeypatch.setattr(bfloat16, "dot", other)
        jax.clear_caches()
        assert not bfloat16.multiplies()


def test_the_unit_is_read_from_what_linux_says(tmp_path: Path) -> None:
    def has(*flags: str) -> bool:
        text = "".join(f"processor : {n}\nflags\t\t: {each}\n\n" for n, each in enumerate(flags))
        (tmp_path / "cpuinfo").write_text(text)
        return bfloat16.has_unit(str(tmp_path / "cpuinfo"))

    assert has("fpu avx512f avx512_bf16", "fpu avx512f avx512_bf16")
    assert not has("fpu avx512f avx512_bf16", "fpu avx512f")
    assert not has("fpu avx512_bf16x")
    assert not has()
    assert not bfloat16.has_unit(str(tmp_path / "nothing"))


def test_both_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in (True, False):
        for multiplies in (True, False):
            monkeypatch.setattr(bfloat16, "has_unit", lambda unit=unit: unit)
            monkeypatch.setattr(bfloat16, "multiplies", lambda found=multiplies: found)
            bfloat16.pays.cache_clear()
            assert bfloat16.pays() == (unit and multiplies)
    bfloat16.pays.cache_clear()

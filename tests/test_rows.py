"""The rows backend, a few batch rows at a time, computes what the definition does on all of them.

`tests/test_attention.py` runs over this backend too. Its cases are so small that one step does all.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tiled import close, everything, make, normal

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.backends import dense, rows
from jaxattn.backends.base import Call, Dropout
from jaxattn.backends.flash import transforms
from jaxattn.backends.problem import Engine, Keeping
from jaxattn.backends.rows import passes, steps

B, N, T = 6, 4, 12

small = partial(make, B=B, T=T, S=T)


def in_steps(
    call: Call, monkeypatch: pytest.MonkeyPatch, batch_rows: int, *, keeps: bool = False
) -> Any:
    """The backend with so many batch rows in a step, as a function of its own, compiled anew."""
    _, t, s, n, k, h, hv = call.sizes
    monkeypatch.setattr(steps, "STEP_NUMBERS", batch_rows * steps.numbers(t, s, n, k, h + hv))
    monkeypatch.setattr(steps, "WHOLE_NUMBERS", 0)
    engine = Engine(
        partial(passes.forward),
        partial(passes.backward),
        partial(passes.forward),
        decided=partial(passes.decided),
        keeping=Keeping(partial(passes.with_weights), partial(passes.from_weights))
        if keeps
        else None,
        cleans=True,
        states=False,
    )

    def run(call: Call) -> Any:
        config, x = rows.build(call)
        return transforms.attend(config._replace(engine=engine), x)

    return run


LENGTHS = jnp.asarray([3, 12, 0, 7, 1, 12], jnp.int32)
SHARED = scores.bias(normal(7, 1, N, T, T))
OWN = scores.bias(normal(8, B, 1, T, T))
CASES = {
    "a mask of each row": lambda: small(masks.causal() & masks.key_padding(lengths=LENGTHS)),
    "a mask that all share, and their bias": lambda: small(masks.causal(-2), SHARED),
    "a bias of each row": lambda: small(masks.key_padding(lengths=LENGTHS), OWN),
    "no mask, dropout": lambda: small(
        dropout=Dropout(jnp.float32(0.3), jnp.asarray([1, 2], jnp.uint32))
    ),
}


@pytest.mark.parametrize("batch_rows", [1, 4])
@pytest.mark.parametrize(
    ("name", "keeps"),
    [
        *((name, False) for name in CASES),
        *((name, True) for name in CASES if "bias" not in name),
    ],
)
def test_steps_give_what_the_whole_gives(
    name: str, keeps: bool, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row in a step, and three: the largest divisor of the batch that fits.

    And so do weights that are kept, as the steps of a vmapped call may have them.
    """
    call = CASES[name]()
    run = in_steps(call, monkeypatch, batch_rows, keeps=keeps)
    sizes, one_step = set(), passes._forward

    def recorded(config: Any, x: Any, *rest: Any) -> Any:
        sizes.add(x.query.shape[0])
        return one_step(config, x, *rest)

    monkeypatch.setattr(passes, "_forward", recorded)
    close(jax.jit(partial(everything, run))(call), jax.jit(partial(everything, dense.run))(call))
    assert sizes == {1 if batch_rows == 1 else 3}


def test_a_vmapped_bias_that_rows_share_gets_a_gradient_for_each_element(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = small(masks.key_padding(lengths=LENGTHS), SHARED)

    def gradient(run: Any, query: Any) -> Any:
        def loss(score: Any) -> Any:
            out, _ = run(dataclasses.replace(call, query=query, score=score))
            return (out * normal(5, *out.shape)).sum()

        return jax.grad(loss, allow_int=True)(call.score)

    queries = normal(9, 2, *call.query.shape)
    found = jax.jit(jax.vmap(partial(gradient, in_steps(call, monkeypatch, 3))))(queries)
    wanted = [jax.jit(partial(gradient, dense.run))(query) for query in queries]
    for n, each in enumerate(wanted):
        close(jax.tree.map(lambda a, n=n: a[n], found), each)


@pytest.mark.parametrize("keeps", [False, True])
def test_what_is_not_finite_stays_in_its_batch_row(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the row of length 3: NaN in the last key that it sees, inf in a value that it does not."""
    call = small(masks.key_padding(lengths=LENGTHS))
    broken = dataclasses.replace(
        call, key=call.key.at[0, 2].set(np.nan), value=call.value.at[0, 3].set(np.inf)
    )
    run = in_steps(call, monkeypatch, 2, keeps=keeps)
    compute, clean = (jax.jit(partial(everything, run)), jax.jit(partial(everything, dense.run)))
    (gradients, (out, lse)), (wanted, (plain, _)) = compute(broken), clean(call)
    assert np.isnan(out[0]).all()
    assert np.isnan(lse[0]).all()
    close(out[1:], plain[1:])
    for got, expected in zip(gradients[:3], wanted[:3], strict=True):
        close(got[1:], expected[1:])
    # Keys and values that row 0 does not see have no gradient.
    assert np.isnan(gradients[1][0, :3]).all()
    assert (np.asarray(gradients[1][0, 3:]) == 0).all()
    assert (np.asarray(gradients[2][0, 3:]) == 0).all()


# Sizes, and whether weights are kept: in the last case rows are more than one step.
KEPT = {
    (2, 8, 8, 4): True,
    (2, 64, 64, 4): False,
    (1, 512, 512, 32): False,
    (3, 4, 300, 8): True,
    (64, 100, 100, 64): False,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", KEPT)
def test_a_gradient_keeps_at_most_as_much_again_as_it_is_given(
    sizes: tuple[int, int, int, int], dtype: Any
) -> None:
    """Weights only where they are no more than inputs and outputs, beside two numbers of each row."""
    b, t, s, width = sizes
    query = jax.ShapeDtypeStruct((b, t, N, width), dtype)
    key = jax.ShapeDtypeStruct((b, s, N, width), dtype)

    def kept(query: Any, key: Any, value: Any) -> Any:
        attend = partial(ja.attention, mask=masks.causal(), backend="rows")
        return jax.vjp(attend, query, key, value)[1]

    def size(arrays: Any) -> int:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))

    found = jax.eval_shape(kept, query, key, key)
    given = 2 * size((query, key))
    assert size(found) <= 2 * given + 4 * 16 * b * t * N
    assert any(a.shape == (b, N, t, s) for a in jax.tree.leaves(found)) == KEPT[sizes]


def test_weights_that_a_policy_does_not_save_are_computed_again() -> None:
    """With their name they are saved, beside output and LSE."""
    call = small(masks.causal())

    def exponentials(*names: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        def loss(query: Any) -> Any:
            attend = jax.checkpoint(
                lambda query: ja.attention(
                    jnp.sin(query), call.key, call.value, mask=masks.causal(), backend="rows"
                ),
                policy=policy,
            )
            return (attend(query) ** 2).sum()

        text = jax.jit(jax.grad(loss)).lower(call.query).as_text()
        return text.count("stablehlo.exponential")

    assert exponentials(*transforms.SAVED) < exponentials(*transforms.SAVED[:2])


def test_an_lse_that_nobody_reads_is_not_computed() -> None:
    """Only then does XLA compute a softmax and the product after it as one."""

    def logarithms(results: slice) -> int:
        text = jax.jit(lambda call: rows.run(call)[results]).lower(small(masks.causal())).compile()
        return str(text.as_text()).count(" log(")

    assert logarithms(slice(1)) < logarithms(slice(2))


def test_values_of_zero_are_no_rows_without_weights() -> None:
    """An output of 0 makes the backend look again; here it finds nothing, and there an overflow."""
    call = small(masks.causal() & masks.key_padding(lengths=LENGTHS))
    call = dataclasses.replace(call, value=jnp.zeros_like(call.value))
    run = jax.jit(rows.run)
    close(run(call), jax.jit(dense.run)(call))
    # The first query of each row sees one key; its logit is less than all finite numbers.
    huge = dataclasses.replace(
        call,
        query=call.query.at[:, 0].set(-3e38),
        key=call.key.at[:, 0].set(3e38),
    )
    out, lse = map(np.asarray, run(huge))
    some = np.asarray(LENGTHS) > 0
    assert np.isnan(out[some, 0]).all()
    assert np.isnan(lse[some, 0]).all()
    assert (out[~some] == 0).all()
    assert (lse[~some] == -np.inf).all()


def test_huge_logits_of_a_score_are_rounded_once() -> None:
    """As for the largest of a row, so for its weights: no row that sees keys is empty."""
    query, key, value = normal(1, B, T, N, 8) * 1e12, normal(2, B, T, N, 8), normal(3, B, T, N, 8)
    shown = jnp.ones((B, 1, 1, 1), bool)

    def attend(factors: Any, shown: Any) -> Any:
        score = scores.score(lambda logit, b, h, q, k, factors: logit * factors[h], factors)
        mask = masks.dense(shown)
        return ja.attention(
            query, key, value, mask=mask, score=score, return_lse=True, backend="rows"
        )

    given = normal(4, N), shown
    # Optimized as for users, unlike other tests.
    options = {"xla_backend_optimization_level": 3}
    out, lse = jax.jit(attend).lower(*given).compile(compiler_options=options)(*given)
    assert jnp.isfinite(out).all()
    assert jnp.isfinite(lse).all()

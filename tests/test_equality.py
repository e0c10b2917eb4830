"""Masks and scores without arrays are equal and hash by how they were written."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, scores
from jaxattn.masks.mask import And, Or, Xor, as_mask


def _near(b: Any, h: Any, q: Any, k: Any, n: Any = 3) -> Any:
    return q - k < n


def _scaled(logit: Any, b: Any, h: Any, q: Any, k: Any, by: Any) -> Any:
    return logit * by


# Each is called twice, and what comes out is equal; any two differ.
DISTINCT: dict[str, Callable[[], Any]] = {
    "causal": lambda: masks.causal(),
    "offset": lambda: masks.causal(2),
    "window": lambda: masks.sliding_window(3),
    "other window": lambda: masks.sliding_window(4),
    "full": lambda: masks.full(),
    "and": lambda: masks.causal() & masks.sliding_window(3),
    "and, turned": lambda: masks.sliding_window(3) & masks.causal(),
    "or": lambda: masks.causal() | masks.sliding_window(3),
    "xor": lambda: masks.causal() ^ masks.sliding_window(3),
    "not": lambda: ~masks.causal(),
    "nested": lambda: ~(masks.causal() & ~masks.chunked(2)) | masks.global_tokens(1),
    "heads": lambda: masks.per_head([masks.causal(), masks.full()]),
    "other heads": lambda: masks.per_head([masks.full(), masks.causal()]),
    "grid": lambda: masks.neighborhood((2, 4), 0),
    "other grid": lambda: masks.neighborhood((4, 2), 0),
    "class token": lambda: masks.neighborhood((2, 4), 0, prefix=1),
    "function": lambda: masks.predicate(_near),
    "function of a number": lambda: masks.predicate(_near, 3),
    "function of a float": lambda: masks.predicate(_near, 3.0),
    "function of a bool": lambda: masks.predicate(_near, True),
    "function of 1": lambda: masks.predicate(_near, 1),
    "function of NaN": lambda: masks.predicate(_near, float("nan")),
    "function of a scalar": lambda: masks.predicate(_near, np.float32(3)),
    "function of a dict": lambda: masks.predicate(_near, {"a": 3}),
    "cap": lambda: scores.soft_cap(30.0),
    "other cap": lambda: scores.soft_cap(50.0),
    "slope": lambda: scores.alibi(30.0),
    "chain": lambda: scores.chain(scores.soft_cap(30.0), scores.alibi(0.5)),
    "turned chain": lambda: scores.chain(scores.alibi(0.5), scores.soft_cap(30.0)),
    "score": lambda: scores.score(_scaled, 2.0),
    "other zero": lambda: scores.score(_scaled, -0.0),
    "zero": lambda: scores.score(_scaled, 0.0),
    "positions": lambda: ja.Positions(),
}

# Each holds an array.
WITH_ARRAYS: dict[str, Callable[[], Any]] = {
    "ids": lambda: masks.segments(np.zeros(4, int)),
    "lengths": lambda: masks.key_padding(lengths=np.array([2, 3])),
    "composite": lambda: masks.causal() & ~masks.key_padding(np.ones(4, bool)),
    "one element": lambda: masks.causal(np.array([1])),
    "scalar": lambda: masks.causal(jnp.asarray(1)),
    "dense": lambda: masks.dense(np.ones((4, 4), bool)),
    "argument": lambda: masks.predicate(_near, np.arange(3)),
    "slopes": lambda: scores.alibi(scores.alibi_slopes(2)),
    "positions": lambda: ja.Positions(q=jnp.arange(4)),
    "tile map": lambda: ja.tile_map(masks.causal(), (1, 4, 1, 8), (1, 4, 1, 8), tile=2),
    "cache": lambda: ja.KVCache.create(batch=1, capacity=4, heads=1, head_dim=2),
    "pages": lambda: ja.PagedKVCache.create(batch=1, pages=2, page=2, heads=1, head_dim=2),
}


def test_equal_where_written_alike_and_nowhere_else() -> None:
    first, second = ([make() for make in DISTINCT.values()] for _ in range(2))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            assert (a == b) is (i == j), (a, b)
            assert (a != b) is (i != j)
    assert [hash(a) for a in first] == [hash(b) for b in second]
    assert len({*first, *second}) == len(DISTINCT)


def test_structures_of_different_classes_differ() -> None:
    """Were they equal, `jit` might run the program of `a & b` for `a | b`."""
    parts = masks.causal(), masks.sliding_window(3)
    kinds = [kind(*parts) for kind in (And, Or, Xor)]
    assert len({jax.tree.structure(mask) for mask in kinds}) == 3
    for a in kinds:
        for b in kinds:
            assert (jax.tree.structure(a) == jax.tree.structure(b)) is (a is b)
    assert jax.tree.structure(~parts[0]) != jax.tree.structure(masks.per_head([parts[0]]))


@pytest.mark.parametrize("name", DISTINCT)
def test_copies_are_equal(name: str) -> None:
    made = DISTINCT[name]()
    leaves, tree = jax.tree.flatten(made)
    for again in (copy.copy(made), copy.deepcopy(made), jax.tree.unflatten(tree, leaves),
                  pickle.loads(pickle.dumps(made))):  # fmt: skip
        assert again == made
        assert hash(again) == hash(made)


def test_lambdas_are_themselves() -> None:
    def make() -> Any:
        return lambda b, h, q, k: q >= k

    fn = make()
    assert as_mask(fn) == as_mask(fn) == masks.predicate(fn)
    assert (masks.causal() & fn) == (masks.causal() & fn)
    assert as_mask(fn) != as_mask(make())
    part = functools.partial(_near, n=4)
    assert masks.predicate(part) == masks.predicate(part)
    assert masks.predicate(masks.causal()) == masks.causal()


@pytest.mark.parametrize("name", WITH_ARRAYS)
def test_with_arrays_only_itself_and_no_hash(name: str) -> None:
    made, again = WITH_ARRAYS[name](), WITH_ARRAYS[name]()
    assert (made == made) is True
    assert (made == again) is False
    assert (made != again) is True
    assert (made == masks.causal()) is False
    with pytest.raises(TypeError, match=r"holds arrays.*argument of the compiled function"):
        hash(made)


def test_never_elementwise() -> None:
    array = np.ones((2, 2), bool)
    for other in (array, jnp.asarray(array), 3, None, "causal", [masks.causal()]):
        assert (masks.causal() == other) is False
        assert (other == masks.causal()) is False
        assert (masks.dense(array) == other) is False


def test_subclasses_that_are_no_pytrees() -> None:
    class Even(ja.Mask):
        def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
            return (q + k) % 2 == 0

    even = Even()
    assert even == even
    assert even != Even()
    assert len({even, even}) == 1


# --- what is static is traced once ----------------------------------------------------------------

X = jnp.ones((1, 4, 8))
Q = jnp.ones((1, 4, 2, 4))


def test_static_arguments_are_traced_once() -> None:
    traced = []

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def attend(mask: Any, score: Any, x: Any) -> Any:
        traced.append(mask)
        return ja.attention(x, x, x, mask=mask, score=score)

    for _ in range(3):
        attend(masks.causal() & masks.sliding_window(2), scores.soft_cap(9.0), Q)
    assert len(traced) == 1
    attend(masks.causal() & masks.sliding_window(3), scores.soft_cap(9.0), Q)
    assert len(traced) == 2
    with pytest.raises((TypeError, ValueError), match="holds arrays"):
        attend(masks.segments(np.zeros(4, int)), None, Q)


def test_an_attribute_of_nnx_modules_is_traced_once() -> None:
    nnx = pytest.importorskip("flax.nnx")
    traced = []

    @nnx.jit
    def run(model: Any, x: Any) -> Any:
        traced.append(model)
        return model(x)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        outs = [
            run(ja.nn.nnx.MultiHeadAttention(2, 8, mask=masks.causal() & masks.sliding_window(2),
                                             score=scores.soft_cap(9.0), rngs=nnx.Rngs(0)), X)
            for _ in range(3)
        ]  # fmt: skip
        assert len(traced) == 1
        other = run(ja.nn.nnx.MultiHeadAttention(2, 8, mask=masks.sliding_window(1),
                                                 rngs=nnx.Rngs(0)), X)  # fmt: skip
    assert len(traced) == 2
    assert outs[0].shape == other.shape


def test_linen_modules_with_equal_masks_are_equal() -> None:
    pytest.importorskip("flax.linen")

    def make(**options: Any) -> Any:
        return ja.nn.linen.MultiHeadAttention(2, **options)

    assert make(mask=masks.causal()) == make(mask=masks.causal())
    assert hash(make(mask=masks.causal())) == hash(make(mask=masks.causal()))
    assert make(mask=masks.causal()) != make(mask=masks.full())

"""Integers of any width: exact where they are known, the same as "everything" beyond int32, and
never wrapped around."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, scores

FAR = [2**31 - 1, 2**31, 2**32, 2**40, 2**70]
S = 4
ONES, EYE, CAUSAL = np.ones((S, S), bool), np.eye(S, dtype=bool), np.tri(S, dtype=bool)

# By name: what takes a number, and what it means where that is beyond every position.
SATURATING: dict[str, tuple[Any, np.ndarray]] = {
    "causal": (masks.causal, ONES),
    "window": (lambda n: masks.sliding_window(n), CAUSAL),
    "right window": (lambda n: masks.sliding_window(0, n), CAUSAL.T),
    "prefix": (masks.prefix_lm, ONES),
    "chunks": (masks.chunked, ONES),
    "rate": (masks.dilated, EYE),
    "keys": (lambda n: masks.key_padding(lengths=n), ONES),
    "queries": (lambda n: masks.query_padding(lengths=n), ONES),
    "shared": (lambda n: masks.shared_prefix(n, np.arange(S)), ONES),
    "global": (masks.global_tokens, ONES),
    "globals": (lambda n: masks.global_tokens(counts=n), ONES),
    "blocks": (lambda n: masks.block_sparse(np.ones((1, 1), bool), n), ONES),
    "halves": (lambda n: masks.block_diffusion(n, 1), EYE),
    "diffusion": (lambda n: masks.block_diffusion(2, n), np.kron(np.eye(2), np.ones((2, 2))) > 0),
    "tree": (lambda n: masks.tree(np.arange(S) - 1, start=n), CAUSAL),
}  # fmt: skip


@pytest.fixture(scope="module")
def dense_all() -> Any:
    """Dense masks by name, compiled once for all numbers."""
    return jax.jit(lambda made: {name: mask.dense(S, S)[0, 0] for name, mask in made.items()})


@pytest.mark.parametrize("n", [*FAR, np.array(2**40), np.array(2**63, np.uint64)], ids=repr)
def test_numbers_beyond_every_position(n: Any, dense_all: Any) -> None:
    got = dense_all({name: make(n) for name, (make, _) in SATURATING.items()})
    for name, (_, want) in SATURATING.items():
        np.testing.assert_array_equal(got[name], want, err_msg=name)


def test_numbers_beyond_every_position_with_64_bits(dense_all: Any) -> None:
    with jax.enable_x64(True):
        got = dense_all({name: make(2**40) for name, (make, _) in SATURATING.items()})
    for name, (_, want) in SATURATING.items():
        np.testing.assert_array_equal(got[name], want, err_msg=name)


@pytest.mark.parametrize(
    ("mask", "like"),
    [
        (masks.causal(2**40), masks.full()),
        (masks.causal(-(2**40)), masks.empty()),
        (masks.causal(1), lambda b, h, q, k: k <= q + 1),
        (masks.sliding_window(2**40), masks.causal()),
        (masks.key_padding(lengths=2**40), masks.full()),
    ],
)
def test_tiles_know_what_everything_is(mask: Any, like: Any) -> None:
    shape = (1, 8, 1, 4)
    states = [ja.tile_map(each, shape, shape, tile=2).states for each in (mask, like)]
    np.testing.assert_array_equal(*states)


def test_far_below() -> None:
    assert not masks.causal(-(2**40)).dense(S, S).any()
    assert not masks.causal(np.array([-(2**40)])).dense(S, S).any()


@pytest.mark.parametrize("offset", [2**31 - 1, 5, -5, -(2**31)])
def test_offsets_where_positions_are_large(offset: int) -> None:
    """Sums of positions and offsets would wrap around."""
    q, k = np.array([0, 7, 2**31 - 2]), np.array([0, 5, 2**31 - 3, 2**31 - 1])
    mask = masks.causal(offset)
    got = mask.dense(3, 4, positions=ja.Positions(q=q, k=k))[0, 0]
    np.testing.assert_array_equal(got, q[:, None] + offset >= k)


@pytest.mark.parametrize("traced", [False, True])
def test_wide_arrays_with_64_bits(traced: bool) -> None:
    with jax.enable_x64(True):
        wide = jnp.array([2**40, 2, 2**32])
        assert wide.dtype == jnp.int64

        def dense(n: Any) -> Any:
            mask = masks.key_padding(lengths=n) & masks.sliding_window(n)
            return mask.dense(S, S, batch=3, heads=3)

        got = (jax.jit(dense) if traced else dense)(wide)
        h, q, k = np.ogrid[:3, :S, :S]
        n = np.asarray(wide)
        want = (q >= k) & (q - k <= n[h]) & (k < n[:, None, None, None])
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(masks.causal(2**40).dense(S, S)[0, 0], ONES)
        np.testing.assert_array_equal(masks.sliding_window(2**40).dense(S, S)[0, 0], CAUSAL)
        unsigned = jnp.array([2**63, 1, 2**32], jnp.uint64)
        np.testing.assert_array_equal(
            jax.jit(lambda n: masks.key_padding(lengths=n).dense(1, S, batch=3))(unsigned)[:, 0, 0],
            np.arange(S) < np.array([[S], [1], [S]]),
        )


def test_unsigned_32_bits() -> None:
    n = jnp.array([2**31, 2**32 - 1, 1], jnp.uint32)
    got = jax.jit(lambda n: masks.key_padding(lengths=n).dense(1, S, batch=3))(n)[:, 0, 0]
    np.testing.assert_array_equal(got, np.arange(S) < np.array([[S], [S], [1]]))


# --- ids ------------------------------------------------------------------------------------------

HASHES = np.array([0, 2**32, 2**33, 0, -(2**32), 2**33])
SAME = HASHES[:, None] == HASHES


@pytest.mark.parametrize(
    "ids",
    [
        HASHES,
        HASHES.astype(np.uint64),
        HASHES.tolist(),
        HASHES.astype(object) * 2**40,
        np.array([0, 3, 2**8 - 1, 0, 7, 2**8 - 1], np.uint8),
        np.array([0, 3, -1, 0, -4, -1], np.int8),
        np.array([0, 3, 2**32 - 1, 0, 2**31, 2**32 - 1], np.uint32),
    ],
    ids=["int64", "uint64", "list", "Python", "uint8", "int8", "uint32"],
)
@pytest.mark.usefixtures("own_errors")
def test_ids_keep_their_meaning(ids: Any) -> None:
    np.testing.assert_array_equal(masks.segments(ids).dense(6, 6)[0, 0], SAME)
    shared = masks.shared_prefix(1, ids).dense(6, 6)[0, 0]
    np.testing.assert_array_equal(shared, SAME | (np.arange(6) < 1))


@pytest.mark.parametrize(
    ("q_ids", "k_ids"),
    [
        (HASHES, HASHES[:4]),
        (HASHES, np.array([0, 2**33])),
        (np.array([-1, 2**63 - 1, 5]), np.array([2**64 - 1, 2**63 - 1, 5], np.uint64)),
        (np.array([-1, 5], np.int32), np.array([2**32 - 1, 5], np.uint32)),
        (np.array([-1, 5], np.int8), np.array([255, 5], np.uint8)),
        (jnp.array([-1, 5]), jnp.array([2**32 - 1, 5], jnp.uint32)),
        (jnp.array([0, 1]), HASHES),
        (np.array([[0, 2**32], [2**33, 1]]), np.array([2**32, 1, 0])),
    ],
    ids=["alike", "narrow keys", "signs", "signs of 32", "bytes", "jax", "jax and NumPy", "ranks"],
)
def test_ids_of_queries_and_keys_are_numbered_together(q_ids: Any, k_ids: Any) -> None:
    B, T, S = (2 if np.ndim(q_ids) == 2 else 1), np.shape(q_ids)[-1], np.shape(k_ids)[-1]
    exact = [np.atleast_2d(np.asarray(x).astype(object)) for x in (q_ids, k_ids)]
    want = exact[0][:, :, None] == exact[1][:, None, :]
    got = masks.segments(q_ids, k_ids).dense(T, S, batch=B)[:, 0]
    np.testing.assert_array_equal(got, want.astype(bool))


def test_ids_that_fit_are_read_by_attention() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, 4)), jnp.float32)
    got = ja.attention(x, x, x, mask=masks.segments(HASHES))
    np.testing.assert_array_equal(got, ja.attention(x, x, x, mask=jnp.asarray(SAME)))


def test_new_ids_of_64_bits_are_not_compiled_anew(compilations: Any) -> None:
    run = jax.jit(lambda mask: mask.dense(6, 6))
    run(masks.segments(HASHES))
    compilations.reset()
    for ids in (HASHES + 1, np.arange(6), HASHES // 2**32):
        run(masks.segments(ids))
    assert compilations.count == 0


def test_ids_beside_traced_ones() -> None:
    """What fits is compared; what can't be is refused, with what to do."""

    def dense(traced: Any, ids: Any) -> Any:
        return jnp.stack(
            [masks.segments(traced, ids).dense(2, 2), masks.segments(ids, traced).dense(2, 2).mT]
        )

    for ids in (np.array([1, 0]), np.array([1, 0], np.uint8)):
        got = jax.jit(lambda x: dense(x, ids))(jnp.array([0, 1]))[:, 0, 0]
        np.testing.assert_array_equal(got, [1 - np.eye(2)] * 2)
    for ids in (np.array([2**32, 0]), np.array([2**31, 0], np.uint32)):
        with pytest.raises(TypeError, match=r"segments\(q_ids\) of traced int32 and .*np\.unique"):
            jax.jit(lambda x: dense(x, ids))(jnp.array([0, 1]))


def test_ids_with_64_bits() -> None:
    with jax.enable_x64(True):
        ids = jnp.asarray(HASHES)
        np.testing.assert_array_equal(masks.segments(ids).dense(6, 6)[0, 0], SAME)
        got = jax.jit(lambda x: masks.segments(x, HASHES).dense(6, 6))(ids)[0, 0]
        np.testing.assert_array_equal(got, SAME)
        with pytest.raises(TypeError, match=r"traced int64 and .* traced uint64"):
            jax.jit(lambda x: masks.segments(x, x.astype(jnp.uint64)).dense(6, 6))(ids)


# --- refused by name ------------------------------------------------------------------------------


def _first(b: Any, h: Any, q: Any, k: Any, n: Any) -> Any:
    return q - k < n


def _plus(logit: Any, b: Any, h: Any, q: Any, k: Any, n: Any) -> Any:
    return logit + n


REFUSED: list[tuple[Any, str]] = [
    (lambda: masks.predicate(_first, 2**40), r"predicate\(args\)\[0\]: got 1099511627776.*int32"),
    (lambda: scores.score(_plus, 2**40), r"score\(params\)\[0\]: got 1099511627776"),
    (lambda: masks.tree(np.array([-1, 2**32])), r"tree\(parents\).*sort"),
    (lambda: masks.tree(np.array([-(2**32), 0])), r"tree\(parents\): got -4294967296, expected"),
    (lambda: masks.sliding_window(np.array([-(2**32)])), r"\(left\): got -4294967296"),
    (lambda: masks.neighborhood((2**16, 2**16), 0), r"neighborhood\(shape\): got .*4294967296"),
    (lambda: masks.neighborhood((2**40,), 0), r"neighborhood\(shape\[0\]\): got 1099511627776"),
    (lambda: masks.neighborhood((4, 4), 2**40), r"neighborhood\(radius\): got 1099511627776"),
    (lambda: masks.neighborhood((4, 4), 1, prefix=2**31), r"neighborhood\(prefix\): got 2147483648"),
    (lambda: masks.random_blocks(jax.random.key(0), 1, 1, 2**31), r"random_blocks\(q_len\): got 2147"),
    (lambda: masks.causal().why(2**40, 0), r"why\(q\): got 1099511627776"),
    (lambda: dense_at(q=np.array([0, 2**32])), r"positions.q: got 4294967296.*int32"),
    (lambda: dense_at(k=np.array([-(2**40), 1])), r"positions.k: got -1099511627776"),
    (lambda: dense_at(q=jnp.array([0, 2**31], jnp.uint32)), r"positions.q: got 2147483648"),
    (lambda: dropped(np.array(2**40)), r"dropout_seed: got 1099511627776"),
    (lambda: dropped(np.array([0, 2**32])), r"dropout_seed: got \[.*4294967296"),
]  # fmt: skip


def dense_at(**at: Any) -> Any:
    return masks.causal().dense(2, 2, positions=ja.Positions(**at))


def dropped(seed: Any) -> Any:
    x = jnp.ones((2, 1, 4))
    return ja.attention(x, x, x, dropout_rate=0.5, dropout_seed=seed)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(("wrong", "says"), REFUSED, ids=[says[:30] for _, says in REFUSED])
def test_what_has_no_clear_meaning_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()
    with jax.enable_x64(True), pytest.raises(ValueError, match=says):
        wrong()


def test_arrays_of_64_bits_for_functions() -> None:
    """They are whole with x64, and refused without."""
    array = np.array([0, 2**40])
    for make, name in ((lambda: masks.predicate(_first, array), "predicate"),
                       (lambda: scores.score(_plus, [array]), "score")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}\(\w+\)\[0\].*: got 1099511627776"):
            make()
        with jax.enable_x64(True):
            make()


def test_lengths_and_counts_elsewhere() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 1, 4)), jnp.float32)
    got = ja.dot_product_attention(x, x, x, key_value_seq_lengths=np.array([2**32]))
    # A mask of all keys may round in another way than no mask.
    np.testing.assert_allclose(got, ja.dot_product_attention(x, x, x), rtol=1e-5)
    cache = ja.KVCache.create(batch=1, capacity=4, heads=1, head_dim=4).append(x, x)
    assert cache.truncate(2**40).length.tolist() == [3]
    assert cache.truncate(np.array([2**32 + 1])).length.tolist() == [3]
    with pytest.raises(ValueError, match="counts"):
        cache.append(x, x, np.array([2**32]))
    pages = ja.PagedKVCache.create(batch=1, pages=2, page=2, heads=1, head_dim=4)
    assert pages.allocate(2**40).append(x, x).length.tolist() == [3]


def test_seeds_of_64_bits_when_traced() -> None:
    """Both halves count."""
    with jax.enable_x64(True):
        x = jnp.ones((8, 1, 4), jnp.float32)
        drop = jax.jit(lambda seed: ja.attention(x, x, x, dropout_rate=0.5, dropout_seed=seed))
        small, large = drop(jnp.int64(5)), drop(jnp.int64(5 + 2**32))
        np.testing.assert_array_equal(small, drop(jnp.uint32(5)))
        assert (small != large).any()

"""`KVCache.keep`: what is gone is hidden, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, qkv, rng

import jaxattn as ja
from jaxattn import masks, stats

B, N, K, L, H = 2, 4, 2, 12, 8
CHUNK, CAPACITY = 3, 9


@lru_cache
def sequence() -> tuple[Any, Any, Any]:
    """Queries, keys and values of whole sequences."""
    return qkv(B, L, L, N, K, H)


def part(start: int) -> tuple[Any, Any, Any]:
    query, key, value = (x[:, start : start + CHUNK] for x in sequence())
    return query, key, value


# One program for each mask, whatever is kept.
@jax.jit
def fed(cache: Any, given: Any, index: Any, mask: Any) -> Any:
    """A chunk of each row, after which a cache keeps some places."""
    out, cache = cache.step(*given, mask=mask)
    return out, cache.keep(index)


@jax.jit
def whole(mask: Any, shown: Any) -> Any:
    return ja.attention(*sequence(), mask=mask & shown)


def chosen(draw: np.random.Generator, cache: Any) -> np.ndarray:
    """Places of up to six tokens of each row, in any order, with -1 and places that hold none."""
    rows = [draw.permutation(CAPACITY)[:6] for _ in range(B)]
    index = np.stack(rows).astype(np.int32)
    index[1, 3] = -1
    return index


@pytest.mark.parametrize("name", ["causal", "window_per_head", "segments_packed", "padding_left"])
@pytest.mark.parametrize("stored", [None, jnp.int8])
def test_what_is_gone_is_hidden(name: str, stored: Any) -> None:
    """After any choices, each query gets what a mask of the choices gives over the sequence.

    Places are taken anew, rows keep different numbers, and positions count on.
    """
    mask = masks.causal() & MASKS[name](B, N, L, L).mask
    draw = rng(20)
    cache = ja.KVCache.create(B, CAPACITY, K, H, stored=stored)
    shown, here = np.zeros((B, L, L), bool), np.zeros((B, L), bool)
    outs = []
    for start in range(0, L, CHUNK):
        here[:, start : start + CHUNK] = True
        shown[:, start : start + CHUNK] = here[:, None]
        index = chosen(draw, cache)
        out, cache = fed(cache, part(start), index, mask)
        outs.append(out)
        held = np.asarray(cache.positions)
        here = np.stack([np.isin(np.arange(L), row) for row in held])
        assert (here.sum(1) <= 6).all()
    np.testing.assert_array_equal(cache.length, [L, L])
    assert not cache.overflowed.any()
    assert not here[:, :-CHUNK].all()
    want = whole(mask, masks.dense(shown[:, None]))
    tolerance = 1e-5 if stored is None else 0.05
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, rtol=1e-5, atol=tolerance)


def test_keeping_all_changes_nothing() -> None:
    _, key, value = sequence()
    cache = ja.KVCache.create(B, CAPACITY, K, H).append(key[:, :6], value[:, :6])
    for index in (jnp.arange(6), np.arange(CAPACITY), jnp.asarray([[5, 4, 3, 2, 1, 0, 0]] * B)):
        jax.tree.map(np.testing.assert_array_equal, cache.keep(index), cache)
    none = cache.keep(jnp.zeros((B, 0), jnp.int32))
    assert (none.positions == -1).all()
    np.testing.assert_array_equal(none.length, cache.length)
    assert not none.attend(key[:, :1], cache.upcoming(1) - 1).any()


def test_other_calls_go_on() -> None:
    """Tokens are taken back, drafts accepted and rows copied among those that are left."""
    _, key, value = sequence()
    cache = ja.KVCache.create(B, CAPACITY, K, H).append(key[:, :6], value[:, :6])
    cache = cache.keep(np.asarray([[5, 1, 4], [0, 2, -1]]))

    def held(cache: Any) -> list[dict[int, Any]]:
        """The first feature of the key at each position."""
        rows = np.asarray(cache.positions), np.asarray(cache.read()[0][..., 0, 0])
        return [{int(p): k for p, k in zip(*row) if p >= 0} for row in zip(*rows, strict=True)]

    first = np.asarray(key[..., 0, 0])
    assert held(cache) == [{p: first[0, p] for p in (1, 4, 5)}, {p: first[1, p] for p in (0, 2)}]
    back = cache.truncate(5).append(key[:, 7:9], value[:, 7:9])
    np.testing.assert_array_equal(back.length, [7, 7])
    assert held(back)[0] == {1: first[0, 1], 4: first[0, 4], 5: first[0, 7], 6: first[0, 8]}
    drafts = cache.append(key[:, 7:10], value[:, 7:10])
    path = drafts.accept(cache.length, np.asarray([[6, 8]] * B))
    assert held(path)[1] == {p: first[1, n] for p, n in ((0, 0), (2, 2), (6, 7), (7, 9))}
    np.testing.assert_array_equal(path.length, [8, 8])
    assert held(cache.reorder(jnp.asarray([1, 1]))) == [held(cache)[1]] * 2


@pytest.mark.usefixtures("own_errors")
def test_room_is_what_is_free() -> None:
    _, key, value = sequence()
    cache = ja.KVCache.create(B, CAPACITY, K, H).append(key[:, :8], value[:, :8])
    cache = cache.keep(np.asarray([[7, 0, 3, 2], [7, -1, -1, -1]]))
    more = key[:, :6], value[:, :6]
    with pytest.raises(ValueError, match=r"row 0 10 long, expected at most 9"):
        cache.append(*more)
    full = jax.jit(lambda c: c.append(*more))(cache)
    np.testing.assert_array_equal(full.overflowed, [True, False])
    np.testing.assert_array_equal(full.length, [13, 14])
    assert sorted(np.asarray(full.positions[0])) == [0, 2, 3, 7, 8, 9, 10, 11, 12]


def test_one_loop_drops_tokens_as_it_goes(compilations: Any) -> None:
    """Token by token, two of three kept by what they received: a compiled scan, and its gradient."""
    query, key, value = sequence()

    @jax.jit
    def decoded(query: Any, key: Any, value: Any) -> Any:
        def step(carry: Any, token: Any) -> Any:
            cache, scores = carry
            (out, got), cache = cache.step(
                *(x[:, None] for x in token), mask=masks.causal(), stats=stats.received()
            )
            scores = jax.lax.stop_gradient(scores + got.sum(-1))
            newest = cache.positions == cache.length[:, None] - 1
            worth = jnp.where(newest, jnp.inf, scores)
            cache = cache.keep(jax.lax.top_k(worth, 3)[1])
            scores = jnp.where(cache.positions < 0, 0, scores)
            return (cache, scores), (out[:, 0], cache.positions)

        cache = ja.KVCache.create(B, 4, K, H)
        tokens = [jnp.moveaxis(x, 1, 0) for x in (query, key, value)]
        (cache, _), (out, held) = jax.lax.scan(step, (cache, jnp.zeros((B, 4))), tokens)
        return jnp.moveaxis(out, 0, 1), held

    out, held = decoded(query, key, value)
    compilations.reset()
    decoded(query * 2, key, value)
    before = np.concatenate([np.full((1, B, 4), -1), held[:-1]])
    now = np.arange(L)[:, None, None]
    shown = np.stack([((before == k).any(-1) | (now[..., 0] == k)).T for k in range(L)], -1)
    assert (shown.sum(-1) <= 4).all()
    assert (shown.sum(-1)[:, 4:] == 4).all()
    want = whole(masks.causal(), masks.dense(shown[:, None]))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)

    def loss(shown: Any, *given: Any) -> Any:
        if shown is None:
            return (decoded(*given)[0] ** 2).sum()
        mask = masks.causal() & masks.dense(shown[:, None])
        return (ja.attention(*given, mask=mask) ** 2).sum()

    found, wanted = (jax.grad(loss, (1, 2, 3))(s, *sequence()) for s in (None, shown))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_vmap_keeps_for_each() -> None:
    _, key, value = sequence()
    cache = ja.KVCache.create(B, CAPACITY, K, H).append(key[:, :6], value[:, :6])
    several = jnp.asarray([[0, 1], [5, -1], [2, 2]])
    kept = jax.vmap(lambda index: cache.keep(index).positions)(several)
    for index, positions in zip(several, kept, strict=True):
        np.testing.assert_array_equal(cache.keep(index).positions, positions)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("index", "says"),
    [
        (np.zeros(2, np.float32), r"keep\(index\): got dtype float32"),
        (3, r"keep\(index\): got shape \[\], expected \[M\] or \[B, M\]"),
        (np.zeros((3, 1), int), r"keep\(index\): got shape \[3, 1\], expected \[M\] or \[2, M\]"),
        (np.asarray([0, 9]), r"keep\(index\): got 9, expected places below 9"),
        (np.asarray([0, -2]), r"keep\(index\): got -2, expected at least -1"),
    ],
)
def test_errors(index: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        ja.KVCache.create(B, CAPACITY, K, H).keep(index)


@pytest.mark.usefixtures("own_errors")
def test_a_ring_forgets_by_itself() -> None:
    make: Callable[..., Any] = ja.KVCache.rolling
    with pytest.raises(ValueError, match=r"keep\(index\): got a ring, KVCache.rolling.*create"):
        make(B, 4, K, H).keep(np.asarray([0]))

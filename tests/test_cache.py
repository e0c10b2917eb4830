"""Caches: whatever is fed in whatever pieces, the result is that of one pass over the sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SCORES, everyday, qkv, rng

import jaxattn as ja
from jaxattn import masks

B, N, K, L, H = 2, 4, 2, 12, 8
PIECES = ([L], [5, 1, 1, 5], [1] * L)


def contiguous(**options: Any) -> ja.KVCache:
    return ja.KVCache.create(B, L + 3, K, H, **options)


def paged(**options: Any) -> ja.PagedKVCache:
    return ja.PagedKVCache.create(B, 9, 3, K, H, pages_per_row=5, **options)


def ring(**options: Any) -> ja.KVCache:
    return ja.KVCache.rolling(B, 4, K, H, chunk=5, **options)


def kept_ring(**options: Any) -> ja.KVCache:
    return ja.KVCache.rolling(B, 4, K, H, chunk=5, first=2, **options)


KINDS: dict[str, Callable[..., Any]] = {"contiguous": contiguous, "paged": paged, "ring": ring}


@lru_cache
def sequence() -> tuple[Any, Any, Any]:
    """Queries, keys and values of whole sequences."""
    return qkv(B, L, L, N, K, H)


# One program for each kind of cache, mask and length of a piece.
@jax.jit
def fed(cache: Any, query: Any, key: Any, value: Any, mask: Any, score: Any = None) -> Any:
    at = cache.upcoming(query.shape[1])
    cache = cache.append(key, value)
    return cache.attend(query, at, mask=mask, score=score), cache


def in_pieces(cache: Any, pieces: list[int], mask: Any, score: Any = None) -> tuple[Any, Any]:
    """The sequence piece by piece: all outputs, and the cache after."""
    outs, start = [], 0
    for n in pieces:
        part = (x[:, start : start + n] for x in sequence())
        out, cache = fed(cache, *part, mask, score)
        outs.append(out)
        start += n
    return jnp.concatenate(outs, 1), cache


@jax.jit
def whole(mask: Any, score: Any = None) -> Any:
    return ja.attention(*sequence(), mask=mask, score=score)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.deep if i % 3 else ()) for i, n in enumerate(MASKS)]
)
def test_pieces_equal_the_whole(name: str) -> None:
    """A prompt in chunks and tokens, for every built-in mask, from a contiguous cache."""
    mask = ja.masks.causal() & MASKS[name](B, N, L, L).mask
    got, cache = in_pieces(contiguous(), PIECES[1], mask)
    np.testing.assert_allclose(got, whole(mask), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.length, [L, L])
    assert not cache.overflowed.any()


@pytest.mark.parametrize("pieces", PIECES, ids=["whole", "chunks", "tokens"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_any_pieces(kind: str, pieces: list[int]) -> None:
    lengths = jnp.asarray([L, 7])
    mask = masks.causal() & masks.key_padding(lengths=lengths)
    got, _ = in_pieces(KINDS[kind](), pieces, mask)
    np.testing.assert_allclose(got, whole(mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["alibi", "t5_past", "soft_cap"])
def test_scores_see_positions(name: str) -> None:
    case = SCORES[name](B, N, L, L)
    score = case.make(*(jnp.asarray(p, jnp.float32) for p in case.params))
    got, _ = in_pieces(contiguous(), PIECES[1], masks.causal(), score)
    np.testing.assert_allclose(got, whole(masks.causal(), score), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "segments_packed", "padding_left", "window_per_head"])
def test_a_ring_is_a_window(name: str) -> None:
    """A ring of 9 places under sequences of 12: the mask, and a window of 4."""
    mask = masks.causal() & MASKS[name](B, N, L, L).mask
    for pieces in ([5, 1, 1, 5], [1] * L):
        got, cache = in_pieces(ring(), pieces, mask)
        want = whole(mask & masks.sliding_window(4))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert cache.key[0].shape[2] == 9
        assert not cache.overflowed.any()


def test_a_ring_may_keep_the_first_tokens() -> None:
    """A ring of 11 places under sequences of 12: a window of 4, and the first 2."""
    mask = masks.causal()
    for pieces in ([5, 1, 1, 5], [1] * L):
        got, cache = in_pieces(kept_ring(), pieces, mask)
        want = whole(mask & (masks.sliding_window(4) | masks.global_tokens(2)))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert not cache.overflowed.any()
    assert "chunk=5, first=2" in repr(cache)
    # Back by a chunk, and on with the same tokens.
    query, key, value = (x[:, 8:] for x in sequence())
    out, _ = cache.truncate(8).step(query, key, value, mask=mask)
    np.testing.assert_allclose(out, want[:, 8:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"got 3 in row 0, expected 7 to 12, or at most 2"):
        cache.truncate(3)
    assert not cache.truncate(2).overflowed.any()


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rows(kind: str) -> None:
    """Rows that take different numbers of tokens of a chunk: each is as if it were alone."""
    query, key, value = sequence()
    counts = [jnp.asarray(c) for c in ([5, 2], [0, 5], [3, 5])]
    cache, mask = KINDS[kind](), masks.causal()
    want = whole(mask & masks.sliding_window(4) if kind == "ring" else mask)
    start = np.zeros(B, int)
    for given in counts:
        at = cache.upcoming(5)
        np.testing.assert_array_equal(at[:, 0], start)
        index = np.minimum(np.asarray(at), L - 1)[..., None, None]
        q, k, v = (jnp.take_along_axis(x, jnp.asarray(index), 1) for x in (query, key, value))
        cache = cache.append(k, v, given)
        out = cache.attend(q, at, mask=mask)
        for b in range(B):
            n = int(given[b])
            np.testing.assert_allclose(
                out[b, :n], want[b, start[b] : start[b] + n], rtol=1e-5, atol=1e-5
            )
        start += np.asarray(given)
    np.testing.assert_array_equal(cache.length, start)


@pytest.mark.parametrize("kind", KINDS)
def test_int8(kind: str) -> None:
    """A quarter of the memory; every number to half a step, 1/254 of its head's largest."""
    exact = KINDS[kind]()
    cache = KINDS[kind](stored=jnp.int8)
    assert cache.key[0].dtype == jnp.int8
    _, key, value = sequence()
    for held, given in zip(cache.append(key[:, :5], value[:, :5]).read(), (key, value)):
        largest = jnp.abs(given[:, :5]).max(-1, keepdims=True)
        assert (jnp.abs(held[:, :5] - given[:, :5]) <= largest / 254 * 1.001).all()
    zero = cache.append(key[:, :1] * 0, value[:, :1] * 0).read()
    assert not any(x.any() for x in zero)
    pieces = [5, 1, 1, 5]
    got, _ = in_pieces(cache, pieces, masks.causal())
    want, _ = in_pieces(exact, pieces, masks.causal())
    np.testing.assert_allclose(got, want, atol=0.05)
    assert (np.asarray(got) != np.asarray(want)).any()


def test_dtypes() -> None:
    x = jnp.ones((B, 1, K, H), jnp.bfloat16)
    cache = contiguous(dtype=jnp.bfloat16, stored=jnp.float16).append(x, x)
    assert cache.key[0].dtype == jnp.float16
    assert cache.read()[0].dtype == jnp.bfloat16
    assert cache.attend(x, jnp.zeros((B, 1), int)).dtype == jnp.bfloat16


# --- room -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_overflow(kind: str) -> None:
    """Outside jit it raises; inside, what does not fit is dropped, and a flag stays."""
    cache = KINDS[kind]()
    x = jnp.asarray(rng(8).normal(size=(B, 1, K, H)), jnp.float32)
    room = cache.capacity
    assert room == L + 3
    many = jnp.repeat(x, room - 1, axis=1)
    counts = jnp.asarray([room - 1, 4])
    cache = cache.append(many, many, counts)
    more = jnp.full((B, 2, K, H), 7.0)
    with pytest.raises(ValueError, match=r"row 0 16 long, expected at most 15"):
        cache.append(more, more)
    after = jax.jit(lambda c: c.append(more, more))(cache)
    np.testing.assert_array_equal(after.overflowed, [True, False])
    np.testing.assert_array_equal(after.length, [room, 6])
    key, _ = after.read()
    np.testing.assert_array_equal(key[0, : room - 1], many[0])
    np.testing.assert_array_equal(key[0, room - 1], more[0, 0])
    np.testing.assert_array_equal(key[1, 4:6], more[1])
    later = jax.jit(lambda c: c.append(x, x, jnp.asarray([0, 1])))(after)
    np.testing.assert_array_equal(later.overflowed, [True, False])
    np.testing.assert_array_equal(later.truncate(3).overflowed, [True, False])
    assert not later.truncate(0).overflowed.any()


@pytest.mark.usefixtures("own_errors")
def test_pages() -> None:
    """Pages go where tokens are, come back, and no row touches another's."""
    cache = ja.PagedKVCache.create(3, 4, 2, K, H)
    assert int(cache.available) == 4
    x = jnp.arange(3 * 3 * K * H, dtype=jnp.float32).reshape(3, 3, K, H)
    cache = cache.append(x, -x, jnp.asarray([3, 0, 2]))
    assert int(cache.available) == 1
    assert sorted(np.asarray(cache.table)[np.asarray(cache.table) >= 0].tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="row 1 3 long"):
        cache.append(x, x, jnp.asarray([0, 3, 0]))
    part = jax.jit(lambda c: c.append(x, x, jnp.asarray([0, 3, 0])))(cache)
    np.testing.assert_array_equal(part.overflowed, [False, True, False])
    np.testing.assert_array_equal(part.length, [3, 2, 2])
    freed = part.free(jnp.asarray([True, False, False]))
    assert int(freed.available) == 2
    np.testing.assert_array_equal(freed.length, [0, 2, 2])
    again = freed.append(x + 100, x, jnp.asarray([0, 0, 3]))
    key, value = again.read()
    np.testing.assert_array_equal(key[1, :2], x[1, :2])
    np.testing.assert_array_equal(key[2, :5], jnp.concatenate([x[2, :2], x[2] + 100]))
    np.testing.assert_array_equal(value[2, :2], -x[2, :2])
    reserved = ja.PagedKVCache.create(2, 4, 2, K, H).allocate(jnp.asarray([3, 1]))
    assert int(reserved.available) == 1
    assert int(reserved.append(x[:2], x[:2], jnp.asarray([3, 2])).available) == 1
    with pytest.raises(ValueError, match=r"cache\.free\(rows\): got int32"):
        cache.free(jnp.asarray([0, 1, 2]))


# --- beams and drafts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stored"), everyday((k, s) for k in KINDS for s in (None, jnp.int8))
)
def test_beams_reorder(kind: str, stored: Any) -> None:
    """Beam search: after a reordering every row is as if its new past had always been its own."""
    query, key, value = sequence()
    rows = jnp.asarray([1, 1])
    cache = KINDS[kind](stored=stored).append(key[:, :5], value[:, :5], jnp.asarray([5, 3]))
    moved = jax.jit(lambda c: c.reorder(rows))(cache)
    np.testing.assert_array_equal(moved.length, [3, 3])
    alone = KINDS[kind](stored=stored).append(key[rows, :5], value[rows, :5], jnp.asarray([3, 3]))
    for held, want in zip(moved.read(), alone.read()):
        np.testing.assert_array_equal(held[:, :3], want[:, :3])
    at = moved.upcoming(1)
    results = []
    for each in (moved, alone):
        each = each.append(key[:, 6:7], value[:, 6:7])
        results.append(each.attend(query[:, 6:7], at, mask=masks.causal()))
    np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_drafts_equal_sequential_decoding(kind: str) -> None:
    """A tree of drafted tokens in one pass: every path is what decoding it token by token gives."""
    parents = np.asarray([[-1, 0, 0, 1, 1], [-1, -1, 1, 2, 0]])
    paths = {3: [0, 1, 3], 2: [0, 2]}, {3: [1, 2, 3], 4: [0, 4]}
    query, key, value = sequence()
    cache = KINDS[kind]().append(key[:, :5], value[:, :5], jnp.asarray([5, 3]))
    start = cache.length
    draft = slice(6, 11)
    mask = masks.tree(jnp.asarray(parents), start=start)
    at = cache.upcoming(5)
    verified = jax.jit(lambda c, m: c.append(key[:, draft], value[:, draft]).attend(
        query[:, draft], at, mask=m))(cache, mask)  # fmt: skip
    for b in range(B):
        for leaf, path in paths[b].items():
            alone = cache
            for node in path:
                n = draft.start + node
                one = alone.upcoming(1)
                token = (x[:, n : n + 1] for x in (key, value))
                alone = alone.append(*token)
                out = alone.attend(query[:, n : n + 1], one, mask=masks.causal())
            np.testing.assert_allclose(verified[b, leaf], out[b, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "stored"),
    everyday((k, s) for k in ("contiguous", "paged", "ring", "kept") for s in (None, jnp.int8)),
)
def test_accepted_drafts_are_kept(kind: str, stored: Any) -> None:
    """What is kept of a chunk is as if nothing else of it had been appended, to the bit."""
    _, key, value = sequence()
    make = kept_ring if kind == "kept" else KINDS[kind]
    cache = make(stored=stored)
    # The tree begins in places that the first two tokens of a kept ring have beside the others.
    for n in (1, 4) if kind == "kept" else (5, 3):
        cache = cache.append(key[:, :n], value[:, :n], jnp.asarray([n, n - 1]))
    start, draft = cache.length, slice(6, 11)
    paths, counts = jnp.asarray([[0, 1, 3], [1, 2, 3]]), jnp.asarray([3, 2])
    full = cache.append(key[:, draft], value[:, draft])
    kept = jax.jit(lambda c, at: c.accept(start, at, counts))(full, start[:, None] + paths)
    index = paths[..., None, None] + draft.start
    alone = cache.append(*(jnp.take_along_axis(x, index, axis=1) for x in (key, value)), counts)
    np.testing.assert_array_equal(kept.length, alone.length)
    np.testing.assert_array_equal(full.accept(start, start[:, None] + paths).length, start + 3)
    assert not kept.overflowed.any()
    # A ring may have lost what lies more than its window before the drafts.
    at = jnp.clip(jnp.arange(L)[None], start[:, None] - 2, alone.length[:, None] - 1)
    for held, want in zip(jax.tree.leaves(kept._stored(at)), jax.tree.leaves(alone._stored(at))):
        np.testing.assert_array_equal(held, want)


@pytest.mark.usefixtures("own_errors")
def test_a_ring_takes_back_its_last_chunk() -> None:
    query, key, value = sequence()
    _, cache = in_pieces(ring(), [5, 5], masks.causal())
    back = cache.truncate(6)
    at = back.upcoming(2)
    np.testing.assert_array_equal(at[0], [6, 7])
    other = key[:, :2] * 2
    out = back.append(other, value[:, :2]).attend(query[:, :2], at, mask=masks.causal())
    plain = contiguous().append(key[:, :6], value[:, :6]).append(other, value[:, :2])
    want = plain.attend(query[:, :2], at, mask=masks.sliding_window(4))
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"got 4 in row 0, expected 5 to 10, or 0"):
        cache.truncate(4)
    assert jax.jit(lambda c: c.truncate(4))(cache).overflowed.all()
    assert not cache.truncate(0).overflowed.any()
    assert not ring().append(key[:, :5], value[:, :5]).truncate(1).overflowed.any()


# --- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_decodes(kind: str, compilations: Any) -> None:
    """New lengths, new pages, new prompts: the compiled step serves them all."""
    x = jnp.ones((B, 1, K, H))
    query = jnp.ones((B, 1, N, H))
    traced = []

    @jax.jit
    def step(cache: Any, mask: Any) -> Any:
        traced.append(1)
        at = cache.upcoming(1)
        cache = cache.append(x, x)
        return cache.attend(query, at, mask=mask), cache

    cache = KINDS[kind]()
    for i in range(4):
        out, cache = step(
            cache, masks.causal() & masks.key_padding(lengths=jnp.asarray([9, i + 1]))
        )
        if i == 0:
            compilations.reset()
    assert len(traced) == 1
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_a_scan(kind: str) -> None:
    query, key, value = sequence()

    def step(cache: Any, token: Any) -> Any:
        q, k, v = (x[:, None] for x in token)
        at = cache.upcoming(1)
        cache = cache.append(k, v)
        return cache, cache.attend(q, at)[:, 0]

    tokens = [jnp.moveaxis(x, 1, 0) for x in (query, key, value)]
    _, outs = jax.jit(lambda c: jax.lax.scan(step, c, tokens))(KINDS[kind]())
    mask = masks.sliding_window(4) if kind == "ring" else masks.causal()
    np.testing.assert_allclose(jnp.moveaxis(outs, 0, 1), whole(mask), rtol=1e-5, atol=1e-5)


def test_decoding_copies_no_keys() -> None:
    """They are read as they lie: no program that copies or turns them is compiled."""
    cache = ja.KVCache.create(B, 77, K, H).append(*(jnp.ones((B, 5, K, H)),) * 2)
    query = jnp.ones((B, 1, N, H))
    program = jax.jit(lambda c, q: c.attend(q, c.upcoming(1) - 1, mask=masks.causal()))
    text = program.lower(cache, query).compile().as_text()
    whole = [line for line in text.splitlines() if f"f32[{B},{K},77,{H}]" in line]
    assert whole
    assert not [line for line in whole if " copy(" in line or " transpose(" in line]


def test_what_no_place_holds_is_not_felt() -> None:
    """Stale and empty places may hold anything."""
    query, key, value = sequence()
    cache = contiguous().append(key[:, :4], value[:, :4])
    at = cache.upcoming(1) - 1
    dirty = jax.tree.map(lambda a: a.at[:, :, 4:].set(jnp.nan) if a.ndim == 4 else a, cache)
    np.testing.assert_array_equal(cache.attend(query[:, :1], at), dirty.attend(query[:, :1], at))


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ja.KVCache.create(0, 1, 1, 1), r"create\(batch=\): got 0, expected an integer >= 1"),
        (lambda: ja.KVCache.rolling(1, -1, 1, 1), r"rolling\(window=\): got -1"),
        (lambda: ja.KVCache.rolling(1, 2, 1, 1, chunk=0), r"rolling\(chunk=\): got 0"),
        (lambda: ja.KVCache.rolling(1, 2, 1, 1, first=-1), r"rolling\(first=\): got -1"),
        (lambda: contiguous().accept(0, jnp.zeros((1, 2), jnp.int32)), r"accept\(positions\): got shape \[1, 2\], expected \[2, M\]"),
        (lambda: ja.PagedKVCache.create(1, 1, 2.0, 1, 1), r"create\(page=\): got 2.0"),
        (lambda: ja.KVCache.create(1, 1, 1, 1, stored=jnp.int16), r"create\(stored=\): got int16, expected a float"),
        (lambda: contiguous().append(jnp.ones((B, 1, K, 3)), jnp.ones((B, 1, K, H))), r"append\(key\): got shape"),
        (lambda: contiguous().append(jnp.ones((B, 1, K, H)), jnp.ones((1, 1, K, H))), r"append\(value\): got shape"),
        (lambda: contiguous().append(jnp.ones((B, 1, K, H)), jnp.ones((B, 2, K, H))), "got 2 tokens, expected the 1"),
        (lambda: contiguous().append(jnp.ones((B, 1, K, H)), jnp.ones((B, 1, K, H)), jnp.ones(B)), r"append\(counts\): got float32"),
        (lambda: contiguous().append(jnp.ones((B, 1, K, H)), jnp.ones((B, 1, K, H)), jnp.asarray([2, 0])), "expected numbers from 0 to 1"),
        (lambda: ring().append(jnp.ones((B, 6, K, H)), jnp.ones((B, 6, K, H))), "got 6 tokens, expected at most the 5"),
    ],
    ids=range(13),
)  # fmt: skip
def test_errors(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call()

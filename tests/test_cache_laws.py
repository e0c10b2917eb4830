"""Caches against a slow model of them, and the order, the steps and the names of their calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from hypothesis import given
from hypothesis import strategies as st

import jaxattn as ja
from jaxattn import masks
from jaxattn.masks.positions import Filled, over_grid

B, H, WINDOW, CHUNK, FIRST, CAPACITY = 2, 4, 3, 4, 2, 24

KINDS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: ja.KVCache.create(B, CAPACITY, 1, H),
    "paged": lambda: ja.PagedKVCache.create(B, 12, 4, 1, H, pages_per_row=6),
    "ring": lambda: ja.KVCache.rolling(B, WINDOW, 1, H, chunk=CHUNK),
    "kept ring": lambda: ja.KVCache.rolling(B, WINDOW, 1, H, chunk=CHUNK, first=FIRST),
}


# --- a slow model ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One row as lists: what is in each place, and the sequence as whoever feeds it knows it."""

    places: list[tuple[int, np.ndarray] | None]
    tokens: list[np.ndarray]
    first: int
    lost: bool = False

    def append(self, token: np.ndarray) -> None:
        at = len(self.tokens)
        around = self.first + (at - self.first) % (len(self.places) - self.first)
        self.places[at if at < self.first else around] = (at, token)
        self.tokens.append(token)

    def sees(self, q: int, window: int) -> list[int]:
        """The past that a query at q sees."""
        past = range(min(q, len(self.tokens)))
        return [k for k in past if q - k <= window or k < self.first]

    def truncate(self, length: int, window: int) -> None:
        del self.tokens[length:]
        self.lost = bool(self.tokens) and (
            self.lost or not self.remembers(len(self.tokens), window)
        )

    def remembers(self, q: int, window: int) -> bool:
        """Whether everything is there that a query at q sees of the past."""
        return set(self.sees(q, window)) <= {place[0] for place in self.held().values()}

    def held(self) -> dict[int, tuple[int, np.ndarray]]:
        """Positions and keys of the tokens that are really there, by place."""
        filled = enumerate(self.places)
        return {i: at for i, at in filled if at is not None and at[0] < len(self.tokens)}

    def copy(self) -> Row:
        return Row(list(self.places), list(self.tokens), self.first, self.lost)


def expected_mask(rows: list[Row], window: int) -> np.ndarray:
    """`[B, q, places]`."""
    seen = np.zeros((len(rows), CAPACITY, len(rows[0].places)), bool)
    for b, row in enumerate(rows):
        for place, (at, _) in row.held().items():
            seen[b, :, place] = (np.arange(CAPACITY) - at <= window) | (at < row.first)
    return seen


def expected_output(row: Row, q: int, window: int, query: np.ndarray) -> np.ndarray:
    """Causal attention of one query to the sequence as it is known, by the formula."""
    past = np.stack([row.tokens[k] for k in (*row.sees(q, window), q)])
    logits = past @ query / np.sqrt(H)
    weights = np.exp(logits - logits.max())
    return -(weights / weights.sum()) @ past  # type: ignore[no-any-return]


@jax.jit
def appended(cache: Any, key: Any, counts: Any) -> Any:
    return cache.append(key, -key, counts)


@jax.jit
def truncated(cache: Any, length: Any) -> Any:
    return cache.truncate(length)


@jax.jit
def reordered(cache: Any, rows: Any) -> Any:
    return cache.reorder(rows)


@jax.jit
def asked(cache: Any, query: Any) -> Any:
    """What the cache says of itself, and what queries at all positions get of it."""
    at = jnp.broadcast_to(jnp.arange(CAPACITY, dtype=jnp.int32), (B, CAPACITY))
    cells = Filled(jnp.arange(B), jnp.arange(1), at, cache.positions)
    seen = over_grid(cache.mask, cells)[:, 0]
    return seen, cache.positions, *cache.read(), cache.attend(query, at, mask=masks.causal())


def check(cache: Any, rows: list[Row], window: int, draw: np.random.Generator) -> None:
    """Lengths, flags, places, mask, keys, and what queries get whose past is there."""
    np.testing.assert_array_equal(cache.length, [len(row.tokens) for row in rows])
    np.testing.assert_array_equal(cache.overflowed, [row.lost for row in rows])
    query = draw.normal(size=(B, CAPACITY, 1, H)).astype(np.float32)
    seen, positions, key, value, out = map(np.asarray, asked(cache, query))
    np.testing.assert_array_equal(seen, expected_mask(rows, window))
    for b, row in enumerate(rows):
        for place, (at, token) in row.held().items():
            assert positions[b, place] == at
            np.testing.assert_array_equal(key[b, place, 0], token)
            np.testing.assert_array_equal(value[b, place, 0], -token)
        for q in range(len(row.tokens)):
            if row.remembers(q, window) and row.remembers(q + 1, 1):
                want = expected_output(row, q, window, query[b, q, 0])
                np.testing.assert_allclose(out[b, q, 0], want, rtol=1e-5, atol=1e-6)


counts = st.tuples(*[st.sampled_from([CHUNK, CHUNK, 3, 1, 0])] * B)
steps = st.one_of(
    st.tuples(st.just("append"), counts),
    st.tuples(st.just("append"), counts),
    st.tuples(st.just("truncate"), st.tuples(*[st.integers(0, 6)] * B)),
    st.tuples(st.just("reorder"), st.tuples(*[st.integers(0, B - 1)] * B)),
)


@pytest.mark.parametrize("kind", KINDS)
@given(program=st.lists(steps, min_size=4, max_size=14), seed=st.integers(0, 99))
def test_caches_hold_what_they_say(kind: str, program: list[Any], seed: int) -> None:
    """After any appends, truncations and reorderings: places, mask, keys, flags and outputs."""
    draw = rng(seed)
    cache = KINDS[kind]()
    window = WINDOW if "ring" in kind else CAPACITY
    first = FIRST if kind == "kept ring" else 0
    rows = [Row([None] * cache.capacity, [], first) for _ in range(B)]
    for name, numbers in program:
        if name == "append":
            most = [min(n, CAPACITY - len(row.tokens)) for n, row in zip(numbers, rows)]
            key = draw.normal(size=(B, CHUNK, 1, H)).astype(np.float32)
            cache = appended(cache, key, jnp.asarray(most, jnp.int32))
            for b, row in enumerate(rows):
                for token in key[b, : most[b], 0]:
                    row.append(token)
        elif name == "truncate":
            # By so many tokens back.
            lengths = [max(0, len(row.tokens) - n) for n, row in zip(numbers, rows)]
            cache = truncated(cache, jnp.asarray(lengths, jnp.int32))
            for row, length in zip(rows, lengths):
                row.truncate(length, window)
        else:
            cache = reordered(cache, jnp.asarray(numbers, jnp.int32))
            rows = [rows[n].copy() for n in numbers]
        check(cache, rows, window, draw)


@pytest.mark.usefixtures("own_errors")
def test_what_a_ring_no_longer_has() -> None:
    """Places that later tokens took, after several truncations: never read, and asked for by name.

    A window of 3 in 7 places: 12 tokens, back to 9, one again, back to 8.
    """
    x = jnp.asarray(rng(61).normal(size=(1, 12, 1, H)), jnp.float32)
    cache = ja.KVCache.rolling(1, WINDOW, 1, H, chunk=CHUNK)
    for start in range(0, 12, CHUNK):
        part = x[:, start : start + CHUNK]
        cache = cache.append(part, part)
    cache = cache.truncate(9).append(x[:, 9:10], x[:, 9:10]).truncate(8)
    whole = ja.attention(x, x, x, mask=masks.causal() & masks.sliding_window(WINDOW))
    at = jnp.asarray([[7]])
    with pytest.raises(
        ValueError, match=r"at\): got position 7 in row 0, which sees position 4.*holds 5 to 7"
    ):
        cache.attend(x[:, 7:8], at, mask=masks.causal())  # fmt: skip
    # A mask that would not have shown what is gone, and no chance to look: what is there is right.
    near = masks.causal() & masks.sliding_window(2)
    want = ja.attention(x, x, x, mask=near)[:, 7:8]
    np.testing.assert_allclose(cache.attend(x[:, 7:8], at, mask=near), want, rtol=1e-5, atol=1e-5)
    traced = jax.jit(lambda c, at: c.attend(x[:, 7:8], at, mask=masks.causal()))(cache, at)
    np.testing.assert_allclose(traced, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"truncate\(length\): got 7 in row 0, expected 8 to 8, or"
    ):
        cache.truncate(7)
    assert jax.jit(lambda c: c.truncate(7))(cache).overflowed.all()
    out, cache = cache.step(x[:, 8:], x[:, 8:], x[:, 8:], mask=masks.causal())
    np.testing.assert_allclose(out, whole[:, 8:], rtol=1e-5, atol=1e-5)
    assert not cache.overflowed.any()


# --- steps and their order ------------------------------------------------------------------------


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize("kind", KINDS)
def test_positions_asked_too_late(kind: str) -> None:
    """`upcoming` after `append` shows a query its future: refused; a step can't get it wrong."""
    x = jnp.asarray(rng(67).normal(size=(B, CHUNK, 1, H)), jnp.float32)
    cache = KINDS[kind]()
    after = cache.append(x, x)
    with pytest.raises(ValueError, match=r"from 4 on in row 0.*below 4.*before cache\.append"):
        after.attend(x, after.upcoming(CHUNK), mask=masks.causal())
    want = after.attend(x, cache.upcoming(CHUNK), mask=masks.causal())
    out, stepped = cache.step(x, x, x, mask=masks.causal())
    np.testing.assert_array_equal(out, want)
    jax.tree.map(np.testing.assert_array_equal, stepped, after)
    # Queries of padding stand after the end too.
    ragged = jnp.asarray([2, 0])
    _, short = cache.step(x, x, x, ragged, mask=masks.causal())
    np.testing.assert_array_equal(short.length, ragged)
    short.attend(x, cache.upcoming(CHUNK), mask=masks.causal())
    (out, lse), _ = cache.step(x, x, x, return_lse=True, mask=masks.causal())
    np.testing.assert_array_equal(out, want)
    assert lse.shape == (B, CHUNK, 1)


@pytest.mark.usefixtures("own_errors")
def test_an_overflow_is_no_wrong_order() -> None:
    x = jnp.ones((1, 1, 1, H))
    cache = ja.KVCache.create(1, 1, 1, H).append(x, x)
    full = jax.jit(lambda c: c.append(x, x))(cache)
    assert full.overflowed.all()
    assert full.attend(x, cache.upcoming(1), mask=masks.causal()).shape == x.shape


SHORT = jnp.ones((B, 1, 1, H))


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.step(SHORT[:1], SHORT, SHORT), r"step\(query\): got shape \[1, 1, 1, 4\], expected \[2, T, N, 4\]"),
        (lambda c: c.step(SHORT[0], SHORT, SHORT), r"step\(query\): got shape \[1, 1, 4\], expected"),
        (lambda c: c.step(SHORT.repeat(2, 1), SHORT, SHORT), r"step\(query\): got 2 tokens, expected the 1 of the keys"),
        (lambda c: c.step(SHORT.astype(jnp.bfloat16), SHORT, SHORT), r"step\(query\): got bfloat16, expected float32"),
        (lambda c: c.step(SHORT, SHORT, SHORT[:1]), r"append\(value\): got shape"),
        (lambda c: c.step(SHORT, SHORT[0, 0, 0], SHORT), r"append\(key\): got shape \[4\]"),
        (lambda c: c.reorder(jnp.asarray([0, 2])), r"reorder\(rows\): got \[0 2\], expected numbers from 0 to 1"),
        (lambda c: c.reorder(jnp.ones(B, bool)), r"reorder\(rows\): got bool\[2\]"),
        (lambda c: c.attend(SHORT, c.upcoming(1)), r"in row 0, expected positions below 0"),
        (lambda c: c.attend(SHORT, jnp.zeros((B, 2), int)), r"attend\(at\): got int32\[2, 2\], expected integers \[B, T\] = \[2, 1\]"),
        (lambda c: c.attend(SHORT, jnp.zeros((B, 1))), r"attend\(at\): got float32"),
        (lambda c: c.attend(SHORT[..., :2], jnp.zeros((B, 1), int)), r"attend\(query\): got shape .*head_dim=4"),
        (lambda c: ja.KVCache.create(B, 2, 1, H, dtype=jnp.bfloat16).attend(SHORT, jnp.zeros((B, 1), int)), r"attend\(query\): got float32, expected bfloat16.*dtype=jnp\.float32 \(stored="),
    ],
    ids=range(13),
)  # fmt: skip
def test_errors(call: Callable[[Any], Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call(KINDS["contiguous"]())


# --- their names ----------------------------------------------------------------------------------


def test_reprs() -> None:
    """The call that makes such a cache, and how far each row is; whatever the leaves are."""
    x = jnp.ones((B, CHUNK, 1, H))
    real = jnp.asarray([4, 2])
    assert repr(KINDS["contiguous"]().append(x, x, real)) == (
        "KVCache(batch=2, capacity=24, heads=1, head_dim=4, dtype=float32, length=[4, 2])"
    )
    assert repr(KINDS["ring"]()) == (
        "KVCache.rolling(batch=2, window=3, chunk=4, heads=1, head_dim=4, dtype=float32, "
        "length=[0, 0])"
    )
    paged = ja.PagedKVCache.create(B, 2, 2, 1, H, value_dim=8, dtype=jnp.bfloat16, stored=jnp.int8)
    wide = jnp.ones((B, CHUNK, 1, 8), jnp.bfloat16)
    over = jax.jit(lambda c: c.append(wide[..., :H], wide))(paged)
    assert repr(over) == (
        "PagedKVCache(batch=2, pages=2, page=2, pages_per_row=2, heads=1, head_dim=4, value_dim=8, "
        "dtype=bfloat16, stored=int8, length=[4, 0], overflowed=[False, True])"
    )
    many = ja.KVCache.create(100, 1, 1, 1)
    assert "length=[0, 0, 0, ..., 0, 0, 0]" in repr(many)
    for make in KINDS.values():
        cache, seen = make(), []
        jax.eval_shape(lambda c: seen.append(repr(c)), cache)
        jax.vmap(lambda c: seen.append(repr(c)))(jax.tree.map(lambda a: a[None], cache))
        assert all("length=int32[2]" in text for text in seen), seen
        stacked = jax.tree.map(lambda a: jnp.stack([a, a]), cache)
        assert "length=[int32[2, 2]]" in repr(stacked)
        assert repr(jax.tree.map(lambda a: None, cache))
        assert "length=int32[2]" in repr(jax.eval_shape(lambda c: c, cache))
        donated = jax.tree.map(lambda a: a.copy(), cache)
        donated.length.delete()
        assert "length=int32[2]" in repr(donated)

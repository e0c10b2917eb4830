"""Positions beyond the end of an array: refused where they are known, never clamped where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, scores

T = 8
BEYOND = ja.Positions(q=jnp.arange(T), k=jnp.arange(T))
X = jax.random.normal(jax.random.key(0), (1, T, 2, 4))
IDS = jnp.array([0, 0, 0, 1, 1, 1])
VALID = jnp.array([False, True, True, True, True, False])


def attend(positions=BEYOND, **options):
    return ja.attention(X, X, X, positions=positions, return_lse=True, **options)


def cells(mask, positions=BEYOND):
    """What is visible where positions are traced: by the definition, and by bounds of one pair."""

    def both(at):
        dense = mask.dense(T, T, positions=at)
        return dense, ja.tile_map(mask, X, X, positions=at, tile=1, exact=False).states

    dense, states = jax.jit(both)(positions)
    dense, states = np.asarray(dense)[0, 0], np.asarray(states)[0, 0]
    assert not (dense & (states == 0)).any()
    assert not (~dense & (states == 2)).any()
    assert (states != 1).all()
    return dense


Q, K = np.mgrid[:T, :T]
INSIDE = (Q < 6) & (K < 6)
AT = np.minimum(np.mgrid[:T, :T], 5)
SAME = np.asarray(IDS)[AT[0]] == np.asarray(IDS)[AT[1]]

CASES = {
    "padding": (masks.key_padding(VALID), (K < 6) & np.asarray(VALID)[AT[1]]),
    "not padding": (~masks.key_padding(VALID), (K < 6) & ~np.asarray(VALID)[AT[1]]),
    "segments": (masks.segments(IDS), INSIDE & SAME),
    "other segments": (~masks.segments(IDS), INSIDE & ~SAME),
    "causal segments": (masks.causal() & masks.segments(IDS), INSIDE & SAME & (Q >= K)),
    "xor": (masks.causal() ^ masks.segments(IDS), INSIDE & (SAME ^ (Q >= K))),
    "array": (masks.dense(jnp.ones((6, 6), bool)), INSIDE),
    # What one part allows already does not hang on the other.
    "window or flags": (
        masks.sliding_window(1) | masks.global_tokens(jnp.arange(6) == 0),
        ((Q >= K) & (Q - K <= 1)) | (Q == 0) | (K == 0),
    ),
    "answered": (
        masks.predicate(lambda b, h, q, k, v: jnp.where(k < 6, v[k], True), VALID),
        np.asarray(VALID)[AT[1]] | (K >= 6),
    ),
    "filled": (
        masks.predicate(
            lambda b, h, q, k, v: ~v.at[k].get(mode="fill", fill_value=False), VALID
        ),
        ~np.asarray(VALID)[AT[1]] | (K >= 6),
    ),
    "taken": (masks.predicate(lambda b, h, q, k, v: jnp.take(v, k), VALID), (K < 6) & np.asarray(VALID)[AT[1]]),
    "computed": (
        masks.predicate(lambda b, h, q, k, v: v[jnp.minimum(k, 5)], VALID),
        np.asarray(VALID)[AT[1]],
    ),
    "row": (
        masks.predicate(lambda b, h, q, k, t: t[q][k % 6] > q - 4, jnp.arange(36).reshape(6, 6)),
        (Q < 6) & (6 * AT[0] + K % 6 > Q - 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_hangs_on_an_entry_that_is_not_there_is_not_visible(name):
    mask, expected = CASES[name]
    np.testing.assert_array_equal(cells(mask), expected)


def test_positions_below_0_are_beyond_an_array_too():
    at = ja.Positions(q=jnp.arange(T) - 2, k=jnp.arange(T) - 2)
    seen = cells(masks.segments(jnp.zeros(T, int)), at)
    np.testing.assert_array_equal(seen, (Q >= 2) & (K >= 2))
    with pytest.raises(ValueError, match="q = -2, expected 0 to 7"):
        attend(at, mask=masks.segments(jnp.zeros(T, int)))


def test_a_row_and_a_head_that_are_not_there():
    mask = masks.prefix_lm(jnp.array([2, 3])) & masks.sliding_window(jnp.array([4, 4]))
    at = ja.Positions(b=jnp.array([1, 2]), h=jnp.array([1, 2]))
    seen = jax.jit(lambda at: mask.dense(4, 4, 2, 2, at))(at)
    assert not seen[:, 1].any()
    # What is causal does not hang on the length of a prefix.
    np.testing.assert_array_equal(seen[1, 0], Q[:4, :4] >= K[:4, :4])
    with pytest.raises(ValueError, match=r"sliding_window\(left\): got position h = 2"):
        mask.dense(4, 4, 2, 2, at)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_every_backend_says_the_same(backend):
    mask = masks.causal() & ~masks.key_padding(~VALID)
    lse = jax.jit(lambda at: attend(at, mask=mask, backend=backend)[1])(BEYOND)
    expected = attend(None, mask=jnp.asarray(CASES["padding"][1] & (Q >= K)), backend="dense")[1]
    np.testing.assert_allclose(lse, expected, rtol=1e-5)


def test_a_bias_that_is_not_there_is_nan_where_it_is_seen():
    score = scores.bias(jnp.zeros((6, T)))
    mask = masks.causal() & masks.query_padding(lengths=7)

    def loss(x, at, mask):
        out = ja.attention(x, x, x, mask=mask, score=score, positions=at, backend="tiled")
        return out.sum(), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, out), _ = run(X, BEYOND, mask)
    seen = np.isfinite(np.asarray(out)[0, :, 0, 0])
    assert seen.tolist() == [True] * 6 + [False, True]
    (total, _), gradient = run(X, BEYOND, masks.causal() & masks.query_padding(lengths=6))
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match=r"bias\(array\): got position q = 6"):
        attend(mask=mask, score=score)
    # Nobody sees what is beyond: nothing hangs on it.
    attend(mask=masks.query_padding(lengths=6), score=score)


@pytest.mark.parametrize(
    ("mask", "label"),
    [
        (masks.causal() & masks.key_padding(VALID), r"key_padding\(valid\): got position k = 6"),
        (masks.segments(IDS), r"segments\(q_ids\): got position q = 6|segments\(k_ids\)"),
        (masks.global_tokens(VALID) & masks.causal(), r"global_tokens\(tokens\): got position"),
        (masks.tree(jnp.arange(6) - 1), r"tree\(parents\): got position"),
    ],
)
def test_known_positions_beyond_an_array_are_refused_by_name(mask, label):
    for ask in (
        lambda: attend(mask=mask),
        lambda: mask.dense(T, T, positions=BEYOND),
        lambda: ja.tile_map(mask, X, X, positions=BEYOND),
        lambda: ja.explain(X, X, X, mask=mask, positions=BEYOND),
    ):
        with pytest.raises(ValueError, match=label) as error:
            ask()
        assert "give an array that covers all positions" in str(error.value)
    with pytest.raises(ValueError, match=label.split(":")[0]):
        mask.why(q=7, k=6)


def test_why_says_what_has_no_entry_and_goes_on():
    mask = masks.sliding_window(1) | masks.global_tokens(VALID)
    found = mask.why(q=7, k=7)
    assert found
    assert "global_tokens has no entry for it" in str(found)


def test_known_positions_within_arrays_or_hidden_by_the_rest_are_not():
    mask = masks.causal() & masks.segments(IDS)
    near = ja.Positions(q=jnp.arange(T) % 6, k=jnp.arange(T) % 6)
    whole = attend(near, mask=mask)[0]
    traced = jax.jit(lambda at: attend(at, mask=mask)[0])(near)
    np.testing.assert_allclose(whole, traced, rtol=1e-5)
    # Keys 6 and 7 come after every query.
    attend(ja.Positions(q=jnp.arange(T) % 6, k=jnp.arange(T)), mask=mask)


def test_known_positions_are_refused_inside_jit_as_well():
    @jax.jit
    def run(x, ids):
        at = ja.Positions(q=np.arange(T), k=np.arange(T))
        return ja.attention(x, x, x, mask=masks.segments(ids), positions=at)

    with pytest.raises(ValueError, match="got position k = 6"):
        run(X, IDS)


def test_a_cache_reads_a_mask_as_far_as_it_goes():
    x = X[:, :6]
    cache = ja.KVCache.create(batch=1, capacity=T, heads=2, head_dim=4)
    mask = masks.causal() & masks.key_padding(VALID)
    at, cache = cache.upcoming(6), cache.append(x, x)
    # The places that are still empty are nobody's.
    out = cache.attend(x, at, mask=mask)
    np.testing.assert_allclose(out, ja.attention(x, x, x, mask=mask), rtol=1e-5, atol=1e-6)
    at, cache = cache.upcoming(1), cache.append(X[:, 6:7], X[:, 6:7])
    with pytest.raises(ValueError, match=r"key_padding\(valid\): got position k = 6"):
        cache.attend(X[:, 6:7], at, mask=mask)
    out = jax.jit(lambda c, at: c.attend(X[:, 6:7], at, mask=mask))(cache, at)
    expected = ja.attention(X[:, 6:7], x, x, mask=masks.key_padding(VALID))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_values_of_positions_never_retrace(compilations):
    run = jax.jit(lambda at, ids: attend(at, mask=masks.segments(ids))[0])
    run(BEYOND, IDS)
    attend(ja.Positions(q=jnp.arange(T) % 6, k=jnp.arange(T) % 5), mask=masks.segments(IDS))
    shifted = [ja.Positions(q=jnp.arange(T) % n, k=jnp.arange(T) % 2) for n in (2, 3)]
    ids = IDS + 1
    compilations.reset()
    for at in shifted:
        run(at, ids)
        attend(at, mask=masks.segments(ids))
    assert compilations.count == 0


def test_a_tile_map_is_of_its_positions():
    x = jnp.ones((1, 64, 1, 4))
    first, second = (ja.Positions(q=jnp.arange(64) + n) for n in (0, 48))
    tiles = ja.tile_map(masks.causal(), x, x, positions=first, tile=16)
    same = ja.Positions(q=np.arange(64)[None])
    np.testing.assert_array_equal(
        ja.attention(x, x, x, mask=tiles, positions=same, backend="tiled"),
        ja.attention(x, x, x, mask=tiles, positions=first, backend="tiled"),
    )
    with pytest.raises(ValueError, match=r"TileMap made for other positions\.q"):
        ja.attention(x, x, x, mask=tiles, positions=second)


def test_a_tile_map_at_positions_that_are_traced_is_made_anew():
    x = jax.random.normal(jax.random.key(0), (1, 64, 1, 4))
    first, second = (ja.Positions(q=jnp.arange(64) + n, k=jnp.arange(64) * 2) for n in (0, 48))
    tiles = ja.tile_map(masks.causal(), x, x, positions=first, tile=16)

    @jax.jit
    def run(tiles, at):
        return ja.attention(x, x, x, mask=tiles, positions=at, backend="tiled", return_lse=True)[1]

    expected = ja.attention(x, x, x, mask=masks.causal(), positions=second, return_lse=True)[1]
    np.testing.assert_allclose(run(tiles, second), expected, rtol=1e-5)


def test_a_tile_map_that_is_made_where_it_is_used_is_kept():
    x = jnp.ones((1, 64, 1, 4))

    @jax.jit
    def run(at):
        tiles = ja.tile_map(masks.causal(), x, x, positions=at, tile=16)
        assert tiles.for_call(1, 1, 64, 64, at).states is tiles.states
        return ja.attention(x, x, x, mask=tiles, positions=at)

    run(ja.Positions(q=jnp.arange(64)))

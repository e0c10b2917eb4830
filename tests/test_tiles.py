"""Tile maps: masks that bring their tiles along, and the list of the tiles to compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import predicates
import pytest
from predicates import TILE, B, N, S, T, tile_states

import jaxattn as ja
from jaxattn import masks
from jaxattn.masks.mask import as_mask
from jaxattn.masks.positions import Positions
from jaxattn.tiles import known
from jaxattn.tiles.tile_map import TileMap, tile_map
from jaxattn.tracing.canonical import canonicalize
from jaxattn.tracing.split import split

QUERY, KEY = (B, T, N, 8), (B, S, N, 8)


def made(mask, **options):
    return tile_map(mask, QUERY, KEY, tile=TILE, **options)


@pytest.mark.parametrize(
    "name", ["user: mixed documents", "user: relative", "user: stack", "dilated & window", "dense4"]
)
@pytest.mark.parametrize("given", [False, True])
def test_exact_is_brute_force(name, given):
    mask = predicates.everything()[name]
    at = Positions(q=jnp.arange(T)[::-1], b=jnp.array([1, 0])) if given else None
    expected = tile_states(predicates.brute(mask, at))
    found = made(mask, positions=at, exact=True).states
    assert (np.broadcast_to(found, expected.shape) == expected).all()


def test_a_tile_map_is_a_mask():
    mask = masks.causal() & masks.sliding_window(9)
    tiles = made(mask)
    assert isinstance(tiles, TileMap)
    assert (predicates.brute(tiles) == predicates.brute(mask)).all()
    both = tiles & masks.key_padding(lengths=jnp.asarray(predicates.LENGTHS))
    assert (made(both).states <= tiles.states).all()
    assert (made(tiles).states == tiles.states).all()
    leaves, tree = jax.tree.flatten(tiles)
    assert jax.tree.unflatten(tree, leaves).tile == TILE


WITHOUT_ARRAYS = {
    "causal": (masks.causal(), True),
    "not causal": (~masks.causal(), True),
    "full": (masks.full(), True),
    "empty": (masks.empty(), True),
    "a window": (lambda b, h, q, k: (q >= k) & (q - k <= 5), True),
    "floats": (lambda b, h, q, k: (q >= k) | (q.astype(jnp.float32) * 0.5 > 3), True),
    "by head": (lambda b, h, q, k: (h < 1) | (q >= k), False),
    "no such operation": (lambda b, h, q, k: q // 3 == k // 3, False),
}


@pytest.mark.parametrize("name", WITHOUT_ARRAYS)
def test_numpy_finds_the_same_states(name):
    """Of masks without arrays, where it has all operations, and no batch row or head its own."""
    mask, possible = WITHOUT_ARRAYS[name]
    found = known.states(split(canonicalize(as_mask(mask))), Positions(), (B, N, T, S), TILE)
    assert (found is not None) == possible
    if found is not None:
        rows = [np.frombuffer(row, np.int8) for row in found]
        assert (np.stack(rows) == made(mask).states[0, 0]).all()


def test_states_with_arrays_or_positions_are_not_known():
    at = Positions(q=jnp.arange(T)).checked(B, N, T, S)
    plain = masks.causal()
    for mask, given in [(masks.sliding_window(3), Positions()), (plain, at)]:
        assert known.states(split(canonicalize(mask), given), given, (B, N, T, S), TILE) is None


def test_callables_and_arrays_are_taken():
    expected = made(masks.causal()).states
    assert (made(lambda b, h, q, k: q >= k).states == expected).all()
    assert (made(np.tri(T, S, dtype=bool)).states == expected).all()
    alone = tile_map(masks.causal(), QUERY[1:], KEY[1:], tile=TILE)
    assert (alone.states == expected).all()


def test_new_values_and_new_lambdas_do_not_compile(compilations):
    for i in range(3):
        ids = jnp.asarray(predicates.IDS_Q) + i
        keys = jnp.asarray(predicates.IDS_K) + i
        jax.block_until_ready((ids, keys))
        compilations.reset()
        made(lambda b, h, q, k, ids=ids, keys=keys: (ids[b, q] == keys[b, k]) & (q >= k))
        made(masks.segments(ids, keys) & masks.sliding_window(3 + i))
        assert i == 0 or compilations.count == 0


def test_an_array_that_a_program_holds_is_not_reduced_by_the_compiler():
    """XLA folds reductions of constants, at some 4 s for each million elements."""
    array = jnp.asarray(np.random.default_rng(0).random((T, S)) < 0.5)
    compiled = jax.jit(lambda: tile_map(array, (B, T, N, 8), (B, S, N, 8), tile=TILE).states)
    assert "reduce(" in compiled.lower().compile().as_text()


def test_under_jit_and_vmap():
    lengths = jnp.arange(5) * 10
    one = jax.jit(lambda n: made(masks.key_padding(lengths=n)))
    many = jax.jit(jax.vmap(lambda n: made(masks.key_padding(lengths=n)).states))(lengths)
    for n, states in zip(lengths, many, strict=True):
        assert (one(n).states == states).all()
        assert states.shape == (1, 1, 3, 2)


# --- looking at it, and mistakes ------------------------------------------------------------------


def test_printed():
    text = str(tile_map(masks.causal(), (1, 64, 1, 8), (1, 64, 1, 8), tile=16))
    assert "6 full, 4 partial, 6 empty of 16 tiles: 62.5% to compute" in text
    assert text.splitlines()[-4:] == ["+...", "#+..", "##+.", "###+"]
    long = str(tile_map(masks.causal(), (1, 4096, 1, 8), (1, 4096, 1, 8), tile=16))
    assert max(map(len, long.splitlines()[2:])) <= 32
    traced = jax.eval_shape(lambda: jnp.zeros(len(repr(made(masks.causal())).splitlines())))
    assert traced.shape == (1,)


def test_a_map_is_for_the_sizes_and_positions_it_was_made_for():
    tiles = made(masks.causal())
    tiles.check(B, N, T, S)
    with pytest.raises(ValueError, match=f"T = {T}, not {T + 1}"):
        tiles.check(B, N, T + 1, S)
    with pytest.raises(ValueError, match=r"positions\.q"):
        tiles.check(B, N, T, S, Positions(q=jnp.arange(T)))


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        (((T, 8), KEY), {}, "query_shape"),
        ((QUERY, (3, S, N, 8)), {}, "batch rows"),
        ((QUERY, KEY), {"tile": 0}, "tile: got 0"),
        ((QUERY, KEY), {"tile": (16, -1)}, "tile"),
        ((QUERY, KEY), {"positions": Positions(q=jnp.zeros(3, "int32"))}, r"positions\.q"),
    ],
)
@pytest.mark.usefixtures("own_errors")
def test_mistakes(shapes, options, words):
    with pytest.raises(ValueError, match=words):
        tile_map(masks.causal(), *shapes, **options)


# Chosen blocks, spans, tiles of a grid and prompts with answers: 64 tokens, tiles of 8.
IMAGES = np.repeat([-1, 0, 1, -1, 2, -1], [8, 16, 8, 12, 12, 8])
PIECES = np.repeat(np.arange(6), [16, 8, 8, 8, 16, 8])
TIGHT = {
    "chosen": masks.top_blocks(jax.random.normal(jax.random.key(0), (2, 4, 4)), 2, 16),
    "chosen, for rows": masks.top_blocks(jax.random.normal(jax.random.key(1), (8, 4)), 1, (8, 16)),
    "spans": masks.spans(IMAGES),
    "sliding tiles": masks.neighborhood((4, 16), (0, 1), tile=(2, 4)),
    "sliding cubes": masks.neighborhood((4, 4, 4), (0, 0, 0), tile=(2, 2, 2)),
    "prompts": masks.tree(np.array([-1, 0, 0, -1, 3, 3]), ids=PIECES),
}


@pytest.mark.parametrize("name", TIGHT)
def test_tiles_are_partial_only_where_they_are_mixed(name):
    dense = np.asarray(TIGHT[name].dense(64, 64, heads=2))[0].reshape(2, 8, 8, 8, 8)
    expected = dense.any((2, 4)).astype(int) + dense.all((2, 4))
    found = tile_map(TIGHT[name], (1, 64, 2, 8), (1, 64, 2, 8), tile=(8, 8)).states[0]
    assert (np.asarray(found) == expected).all()


def test_new_choices_of_blocks_do_not_compile(compilations):
    def call(scores, count, q):
        mask = masks.causal() & masks.top_blocks(scores, count, 16)
        return jax.grad(lambda q: ja.attention(q, q, q, mask=mask, backend="tiled").sum())(q)

    run, q = jax.jit(call), jnp.ones((1, 64, 1, 8))
    scores = [jax.random.normal(jax.random.key(i), (4, 4)) for i in range(2)]
    run(scores[0], 2, q)
    compilations.reset()
    run(scores[1], 1, q)
    assert compilations.count == 0


def test_what_is_not_in_a_chosen_block_is_not_felt():
    """Forward and backward of the tiled engine: NaN in tiles that are skipped changes no bit."""
    scores = jnp.array([[0.0, -jnp.inf], [2.0, 1.0]])
    mask = masks.top_blocks(scores, 1, 32)  # nobody sees the second block of keys
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 1, 8))

    def gradients(k, v):
        def loss(q, k, v):
            return (ja.attention(q, k, v, mask=mask, backend="tiled") ** 2).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    clean = gradients(k, v)
    other = gradients(k.at[:, 32:].set(jnp.nan), v.at[:, 32:].set(jnp.nan))
    for x, y in zip(clean, other, strict=True):
        assert (np.asarray(x) == np.asarray(y)).all()

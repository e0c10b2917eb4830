"""`masks.describe`: the words for a mask, read off its cells."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SQUARE, cells, rng

from jaxattn import masks, tile_map
from jaxattn.describing.closures import closures
from jaxattn.describing.evaluate import cells_of, evaluated

# Checks of shapes in every small function make the search ten times slower; one test keeps them.
fast = pytest.mark.usefixtures("own_errors")

NAMES = {name: getattr(masks, name) for name in masks.__all__} | {"jnp": jnp, "np": np}


def made(expression: str) -> Any:
    """What a reader gets who pastes an expression."""
    return eval(expression, dict(NAMES))


def constructors(expression: str) -> int:
    return len(re.findall(r"(?<![.\w])[a-z_]+\(", expression))


def missed(description: Any, array: np.ndarray) -> np.ndarray:
    """The cells that a description says it misses, as flags; an extent of 1 means all."""
    found = np.zeros([1 if (array == array.take([0], i)).all() else n
                      for i, n in enumerate(array.shape[:2])] + list(array.shape[2:]), bool)  # fmt: skip
    found[tuple(description.cells.T)] = True
    return np.broadcast_to(found, array.shape)


# --- what is found is true, and short -------------------------------------------------------------

# What says almost anything that it likes: arrays, and any function.
UNNAMED = {"dense_shared", "dense_full", "bare_array", "predicate_args"}


@fast
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 3, 12, 12), marks=pytest.mark.deep),
        (1, 2, 8, 8),
        pytest.param((3, 2, 5, 9), marks=pytest.mark.deep),
    ],
    ids=str,
)
def test_every_built_in_mask_is_described(shape: Any) -> None:
    B, N, T, S = shape
    given = {
        name: cells(make(*shape).cell, *shape)
        for name, make in MASKS.items()
        if T == S or name not in SQUARE
    }
    found = {name: masks.describe(array) for name, array in given.items()}
    again = [cells_of(made(each.expression), shape) for each in found.values()]
    for (name, array), got in zip(given.items(), again, strict=True):
        np.testing.assert_array_equal(got != array, missed(found[name], array), name)
        assert found[name].exact == (got == array).all() == (name not in UNNAMED), name
        assert str(found[name]).splitlines()[0] == found[name].expression


def plain_atom(draw: np.random.Generator, B: int, T: int, S: int) -> str:
    """A mask of positions and numbers, or of a list of flags or ids."""

    def number(most: int) -> str:
        if B == 1 or draw.random() < 0.5:
            return str(draw.integers(1, most))
        return f"np.array({draw.integers(1, most, B).tolist()})"

    def flags(size: int) -> str:
        return f"np.array({(draw.random(size) < 0.7).tolist()})"

    kinds = [
        lambda: f"causal({draw.choice([0, draw.integers(-4, 6)])})",
        lambda: f"sliding_window({draw.integers(0, 6)})",
        lambda: f"sliding_window({draw.integers(0, 5)}, {draw.integers(0, 5)})",
        lambda: f"prefix_lm({number(S)})",
        lambda: f"key_padding(lengths={number(S)})",
        lambda: f"query_padding(lengths={number(T)})",
        lambda: f"key_padding({flags(S)})",
        lambda: f"query_padding({flags(T)})",
        lambda: f"chunked({draw.integers(2, 9)})",
        lambda: f"dilated({draw.integers(2, 5)})",
        lambda: f"global_tokens(counts={number(5)})",
        lambda: (
            f"segments(np.array({np.sort(draw.integers(0, 4, T)).tolist()}), "
            f"np.array({np.sort(draw.integers(0, 4, S)).tolist()}))"
        ),
        lambda: f"segments(np.array({draw.integers(0, 3, max(T, S)).tolist()})[:{min(T, S)}])",
    ]
    return kinds[draw.integers(len(kinds) - (T != S))]()


def rich_atom(draw: np.random.Generator, T: int, S: int) -> str:
    """A mask of a tree, a grid, a prompt, flags of tokens or a table."""
    table = draw.random((-(-T // 4), -(-S // 4))) < 0.5
    kinds = [
        lambda: f"block_sparse(np.array({table.tolist()}), 4)",
        lambda: (
            f"tree(np.array({[int(draw.integers(-1, max(i, 1))) if i else -1 for i in range(T)]}))"
        ),
        lambda: (
            f"shared_prefix({draw.integers(1, 5)}, np.array({np.sort(draw.integers(1, 4, T)).tolist()}))"
        ),
        lambda: f"global_tokens(np.array({(draw.random(T) < 0.2).tolist()}))",
        lambda: f"neighborhood((2, {T // 2}), (0, {draw.integers(1, (T // 2 - 1) // 2 + 1)}))",
        lambda: f"block_diffusion({T // 2}, {draw.integers(1, 5)})",
    ]
    return kinds[draw.integers(len(kinds)) if T == S else 0]()


SIZES = [(1, 1, 8, 8), (1, 1, 12, 20), (2, 1, 16, 16), (1, 1, 16, 9), (1, 1, 24, 24)]


@functools.cache
def compositions(count: int, seed: int) -> list[tuple[tuple[int, int, int, int], str]]:
    """Two or three constructors each; one in three has a tree, a grid, a prompt or a table."""
    draw, found = rng(seed), []
    for i in range(count):
        B, N, T, S = SIZES[i % len(SIZES)]
        atoms = [plain_atom(draw, B, T, S) for _ in range(draw.integers(2, 4))]
        if draw.random() < 1 / 3:
            atoms[draw.integers(len(atoms))] = rich_atom(draw, T, S)
        atoms = ["~" * int(draw.random() < 0.2) + atom for atom in atoms]
        text = f"{atoms[0]} {draw.choice(['&', '|'])} {atoms[1]}"
        for atom in atoms[2:]:
            text = f"({text}) {draw.choice(['&', '|'])} {atom}"
        found.append(((B, N, T, S), text))
    return found


@fast
@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.deep)])
def test_random_compositions_are_described(count: int) -> None:
    """What is said is always true; 95% are named, in no more constructors than made them.

    The rest are mostly unions with trees, and two or three masks of lists in one expression.
    """
    short, all_of_them = 0, compositions(count, 73)
    for i, (shape, text) in enumerate(all_of_them):
        B, N, T, S = shape
        array = cells_of(made(text), shape)
        found = masks.describe(array)
        again = made(found.expression)
        # Formulas in NumPy, which compile nothing; now and then what users call.
        got = cells_of(again, shape) if i % 20 else np.asarray(again.dense(T, S, B, N))
        np.testing.assert_array_equal(got != array, missed(found, array), text)
        assert found.exact == (got == array).all(), text
        short += found.exact and constructors(found.expression) <= constructors(text)
    assert short >= 0.95 * len(all_of_them), short


def test_shapes_are_those_that_are_written() -> None:
    q, k = np.ogrid[:6, :6]
    array = ((q >= k) & (q - k < 3) | (k < 2))[None, None] & (np.arange(2) > 0)[:, None, None, None]
    assert masks.describe(array).exact


@fast
@pytest.mark.parametrize(
    "expression",
    [
        "causal()",
        "causal(-2)",
        "~causal()",
        "sliding_window(3)",
        "sliding_window(2, 5)",
        "prefix_lm(7)",
        "chunked(4)",
        "dilated(3)",
        "causal() & chunked(8)",
        "causal() & dilated(3)",
        "dilated(2) & sliding_window(4, 4)",
        "sliding_window(2) & key_padding(lengths=9)",
        "causal() & ~key_padding(lengths=4)",
        "key_padding(lengths=np.array([9, 12]))",
        "causal() & key_padding(lengths=np.array([9, 12]))",
        "causal() & segments(np.repeat([0, 1, 2], [3, 4, 5]))",
        "sliding_window(1, 1) | global_tokens(2)",
        "neighborhood((3, 4), 1)",
        "block_diffusion(6, 2)",
        "prefix_lm(np.array([5, 9]))",
        "sliding_window(np.array([1, 3]))",
        "per_head([causal(), dilated(3)])",
        "full()",
        "empty()",
    ],
)
def test_what_people_write_is_found_as_written(expression: str) -> None:
    array = cells_of(evaluated(expression), (2, 2, 12, 12))
    assert masks.describe(array).expression == expression


# --- closures -------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 7, 9)], ids=str)
def test_closures_allow_what_is_seen(shape: Any) -> None:
    """And the text of each is a mask of just its cells."""
    for i, density in enumerate((0.02, 0.2, 0.6)):
        seen = rng(7, i).random(shape) < density
        for term in closures(seen):
            assert (term.cells | ~seen).all(), term.text
            np.testing.assert_array_equal(
                cells_of(evaluated(term.text), shape), np.broadcast_to(term.cells, shape), term.text
            )


@fast
def test_a_member_is_its_own_closure() -> None:
    for (B, N, T, S), text in compositions(60, 5):
        atom = re.split(r" [&|] ", text)[0].lstrip("(~")
        name = atom.split("(")[0]
        if name in ("tree", "block_sparse", "shared_prefix", "neighborhood", "block_diffusion"):
            continue
        if name == "global_tokens" and "counts" not in atom:
            continue
        array = cells_of(evaluated(atom), (B, N, T, S))
        if array.any():
            own = [term for term in closures(array) if term.text.startswith(name)]
            assert any((term.cells == array).all() for term in own), atom


# --- what fits nothing ----------------------------------------------------------------------------


@fast
def test_the_nearest_misses_what_it_says() -> None:
    q, k = np.ogrid[:16, :16]
    array = q >= k
    wrong = [(2, 9), (3, 12), (11, 4), (12, 7), (5, 13), (6, 2), (14, 1), (1, 6), (0, 14), (9, 10)]
    array[tuple(np.transpose(wrong))] ^= True
    found = masks.describe(array)
    assert not found.exact
    assert found.expression == "causal()"
    assert sorted(map(tuple, found.cells[:, 2:].tolist())) == sorted(wrong)
    lines = str(found).splitlines()
    assert lines[0] == "causal()"
    assert "differs in 10 of 256 pairs" in lines[1]
    assert lines[2].startswith("10 of 256 pairs differ; the first: query 0, key 14")
    shown = np.array([list(line)[1::2] for line in lines[3:]])
    np.testing.assert_array_equal(np.argwhere(np.isin(shown, ["-", "+"])), sorted(wrong))


@fast
def test_noise_is_not_described() -> None:
    array = rng(9).random((2, 2, 9, 9)) < 0.5
    found = masks.describe(array)
    assert not found.exact
    np.testing.assert_array_equal(
        np.asarray(found.mask.dense(9, 9, 2, 2)) != array, missed(found, array)
    )


@fast
def test_a_table_for_each_row_is_not_written_without_its_heads() -> None:
    array = (rng(10).random((2, 1, 4, 4)) < 0.5).repeat(4, 2).repeat(4, 3).repeat(2, 1)
    found = masks.describe(array)
    got = np.asarray(found.mask.dense(16, 16, 2, 2))
    np.testing.assert_array_equal(got != array, missed(found, array))


# --- arrays and masks from anywhere ---------------------------------------------------------------


@fast
def test_arrays_of_other_libraries() -> None:
    valid = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert masks.describe(masks.from_array(valid, "hf"), T=5).expression == (
        "key_padding(lengths=np.array([3, 5]))"
    )
    low = np.finfo(np.float32).min
    q, k = np.ogrid[:5, :5]
    inside = np.where((q >= k) & valid[:, None, None, ::-1].astype(bool), 0, low)
    found = masks.describe(masks.from_array(inside.astype(np.float32), "additive"))
    assert found.expression == "causal() & ~key_padding(lengths=np.array([2, 0]))"


@fast
def test_arrays_of_flax() -> None:
    linen = pytest.importorskip("flax.linen")
    tokens = jnp.array([[5, 3, 9, 0, 0], [2, 4, 7, 1, 0]])
    both = linen.combine_masks(
        linen.make_causal_mask(tokens), linen.make_attention_mask(tokens > 0, tokens > 0)
    )
    found = masks.describe(masks.from_array(both, "flax"))
    assert found.exact
    assert found.expression == "causal() & query_padding(lengths=np.array([3, 4]))"


@fast
def test_masks_and_callables() -> None:
    def fn(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k <= 4)

    assert masks.describe(fn, 12).expression == "sliding_window(4)"
    assert masks.describe(masks.chunked(4) & masks.causal()).expression == "causal() & chunked(4)"
    tiles = tile_map(masks.causal() & masks.full(), (1, 8, 2, 4), (1, 8, 2, 4))
    assert masks.describe(tiles).expression == "causal()"
    heads = masks.per_head([masks.causal(), masks.dilated(2)])
    assert masks.describe(heads, 6).expression == "per_head([causal(), dilated(2)])"
    assert masks.describe(masks.causal(), 6, 6, batch=2, heads=4).expression == "causal()"
    row = np.ones((2, 1, 1, 5), bool)
    row[0, ..., 3:] = False
    assert masks.describe(row, T=4).expression == "key_padding(lengths=np.array([3, 5]))"


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda: masks.describe(np.ones((3, 3))), TypeError, "from_array"),
        (lambda: masks.describe(3), TypeError, r"describe\(observed\): got int"),
        (lambda: masks.describe("causal"), TypeError, r"say masks\.causal\(\)"),
        (lambda: masks.describe(np.ones((2, 3, 4), bool)), ValueError, "expected \\[T, S\\]"),
        (lambda: masks.describe(np.ones((0, 3), bool)), ValueError, "at least one query"),
        (lambda: masks.describe(np.ones((3, 3), bool), T=4), ValueError, r"describe\(T\): got 4"),
        (lambda: masks.describe(masks.causal(), 0), ValueError, r"describe\(T\): got 0"),
        (lambda: masks.describe(masks.causal(), 4096), ValueError, "a smaller T and S"),
        (lambda: masks.describe(np.ones((4096, 2048), bool)), ValueError, "a smaller T and S"),
        (lambda: jax.jit(lambda a: masks.describe(a).mask.dense(3, 3))(np.ones((3, 3), bool)),
         TypeError, "inside jit"),
    ],
)  # fmt: skip
def test_wrong_arguments(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        given()

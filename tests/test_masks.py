"""Masks: every constructor against its formula, the laws of the algebra, masks as pytrees."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, SQUARE, cells, grid
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxattn as ja
from jaxattn import masks
from jaxattn.masks.mask import Mask, as_mask

SHAPES = [(2, 4, 8, 8), (2, 3, 5, 9), (3, 2, 9, 4)]


@functools.cache
def densified(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Every case of a shape as `[B, N, T, S]`; compiled at once, with all leaves traced."""
    B, N, T, S = shape
    made = {n: make(B, N, T, S) for n, make in MASKS.items() if T == S or n not in SQUARE}
    given = {n: as_mask(case.mask) for n, case in made.items()}

    @jax.jit
    def dense(tree: dict[str, Mask]) -> dict[str, Any]:
        return {n: mask.dense(T, S, batch=B, heads=N) for n, mask in tree.items()}

    return jax.tree.map(np.asarray, dense(given))


@pytest.mark.parametrize(
    "shape", [*SHAPES[:2], pytest.param(SHAPES[2], marks=pytest.mark.deep)], ids=str
)
@pytest.mark.parametrize("name", MASKS)
def test_every_constructor_keeps_the_cells_of_its_formula(name: str, shape: Any) -> None:
    B, N, T, S = shape
    if name in SQUARE and T != S:
        pytest.skip("reads one array at both q and k: needs T = S")
    got = densified(shape)[name]
    assert got.dtype == bool
    np.testing.assert_array_equal(got, cells(MASKS[name](*shape).cell, *shape))


def test_every_constructor_has_a_case() -> None:
    """No public constructor is left out of the shared list, or of the tests below."""
    public = {n for n in masks.__all__ if inspect.isfunction(getattr(masks, n))}
    source = inspect.getsource(inspect.getmodule(MASKS["full"]))
    named_elsewhere = {"from_array", "random_blocks", "diff", "describe"}
    missing = {n for n in public - named_elsewhere if f"masks.{n}(" not in source}
    assert not missing


@pytest.mark.parametrize(
    "name", ["causal", "window_per_head", "segments_two", "padding_right", "per_head", "closure"]
)
def test_dense_outside_jit_is_the_same(name: str) -> None:
    case = MASKS[name](2, 4, 8, 8)
    got = as_mask(case.mask).dense(8, 8, batch=2, heads=4)
    np.testing.assert_array_equal(got, cells(case.cell, 2, 4, 8, 8))


def test_one_cell_is_a_call() -> None:
    mask = masks.causal() & masks.key_padding(lengths=jnp.array([2, 3]))
    for b, h, q, k in [(0, 0, 2, 1), (0, 0, 2, 2), (1, 0, 2, 2), (1, 5, 1, 2)]:
        answer = mask(b, h, q, k)
        assert answer.shape == ()
        assert bool(answer) == (k <= q and k < [2, 3][b])


def test_extents_default_to_one() -> None:
    assert masks.causal().dense(3, 4).shape == (1, 1, 3, 4)
    assert masks.causal().dense(0, 4).shape == (1, 1, 0, 4)


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        {"q": np.arange(5) + 4},
        {"q": np.array([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])},
        {"k": np.array([6, 7, 8, 3, 4, 5])},
        {"k": np.array([[6, 7, 8, 3, 4, 5], [5, 4, 3, 2, 1, 0]]), "q": np.arange(5) - 2},
        {"h": np.array([3, 1]), "b": np.array([1, 1])},
    ],
    ids=["decode", "ragged", "ring", "both", "heads"],
)
def test_dense_sees_positions(at: dict[str, Any]) -> None:
    n, left = np.array([4, 8], np.int32), np.array([0, 1, 2, 9], np.int32)
    mask = (masks.causal() & masks.sliding_window(jnp.asarray(left))) | ~masks.key_padding(
        lengths=jnp.asarray(n)
    )
    if "h" not in at:
        left = left[:2]
        mask = (masks.causal() & masks.sliding_window(jnp.asarray(left))) | ~masks.key_padding(
            lengths=jnp.asarray(n)
        )
    positions = ja.Positions(**{name: jnp.asarray(x) for name, x in at.items()})
    got = jax.jit(lambda m, p: m.dense(5, 6, batch=2, heads=2, positions=p))(mask, positions)
    b, h, q, k = grid(2, 2, 5, 6, **at)
    gold = ((k <= q) & (q - k <= left[h])) | (k >= n[b])
    np.testing.assert_array_equal(got, np.broadcast_to(gold, (2, 2, 5, 6)))


def test_shards_of_a_mask_are_slices_of_it() -> None:
    mask = masks.sliding_window(3, 1) | masks.global_tokens(2)
    whole = mask.dense(12, 12)
    for first in (0, 4, 8):
        at = ja.Positions(q=jnp.arange(first, first + 4), k=jnp.arange(12))
        np.testing.assert_array_equal(
            mask.dense(4, 12, positions=at), whole[:, :, first : first + 4]
        )


# --- algebra: a homomorphism to arrays ------------------------------------------------------------

B, N, T, S = 2, 3, 4, 5
_draw = np.random.default_rng(0)
_KEEP = _draw.random((T, S)) < 0.5
ATOMS: list[tuple[Any, Any]] = [
    (masks.causal(), lambda b, h, q, k: q >= k),
    (masks.sliding_window(1, 2), lambda b, h, q, k: (q - k <= 1) & (k - q <= 2)),
    (masks.key_padding(lengths=jnp.array([2, 5])), lambda b, h, q, k: k < np.array([2, 5])[b]),
    (masks.sliding_window(jnp.array([0, 1, 3])), lambda b, h, q, k:
        (q >= k) & (q - k <= np.array([0, 1, 3])[h])),
    (masks.full(), lambda b, h, q, k: True),
    (masks.empty(), lambda b, h, q, k: False),
    (lambda b, h, q, k: (q + k) % 2 == 0, lambda b, h, q, k: (q + k) % 2 == 0),
    (jnp.asarray(_KEEP), lambda b, h, q, k: _KEEP[q, k]),
    (_KEEP, lambda b, h, q, k: _KEEP[q, k]),
]  # fmt: skip
ATOM_CELLS = [cells(cell, B, N, T, S) for _, cell in ATOMS]

trees = st.recursive(
    st.integers(0, len(ATOMS) - 1),
    lambda inner: st.one_of(
        st.tuples(st.just("~"), inner), st.tuples(st.sampled_from("&|^"), inner, inner)
    ),
    max_leaves=4,
)


def evaluate(tree: Any) -> tuple[Any, np.ndarray]:
    """A tree as a mask, with Python's operators, and as an array."""
    if isinstance(tree, int):
        return ATOMS[tree][0], ATOM_CELLS[tree]
    if tree[0] == "~":
        mask, array = evaluate(tree[1])
        return ~as_mask(mask), ~array
    (left, a), (right, b) = evaluate(tree[1]), evaluate(tree[2])
    if not isinstance(left, Mask) and not isinstance(right, Mask):
        # Two arrays, or two callables, know nothing of masks: one of them has to be one.
        left = as_mask(left)
    operator = {"&": lambda x, y: x & y, "|": lambda x, y: x | y, "^": lambda x, y: x ^ y}[tree[0]]
    return operator(left, right), operator(a, b)


@settings(max_examples=max(settings.default.max_examples // 2, 5))
@given(trees)
def test_dense_of_a_tree_is_the_tree_of_dense(tree: Any) -> None:
    mask, array = evaluate(tree)
    np.testing.assert_array_equal(as_mask(mask).dense(T, S, batch=B, heads=N), array)


@settings(max_examples=max(settings.default.max_examples // 5, 5))
@given(st.integers(0, len(ATOMS) - 1), st.integers(0, len(ATOMS) - 1))
def test_de_morgan(left: int, right: int) -> None:
    a, b = as_mask(ATOMS[left][0]), as_mask(ATOMS[right][0])
    dense = functools.partial(Mask.dense, T=T, S=S, batch=B, heads=N)
    np.testing.assert_array_equal(dense(~(a & b)), dense(~a | ~b))
    np.testing.assert_array_equal(dense(~(a | b)), dense(~a & ~b))
    np.testing.assert_array_equal(dense(a ^ b), dense((a | b) & ~(a & ~~b)))


@pytest.mark.parametrize("other", [6, 7, 8], ids=["callable", "jax array", "numpy array"])
@pytest.mark.parametrize("sign", ["&", "|", "^"])
def test_both_sides_of_an_operator_take_what_is_a_mask(other: int, sign: str) -> None:
    operand, array = ATOMS[other][0], ATOM_CELLS[other]
    operator = {"&": lambda x, y: x & y, "|": lambda x, y: x | y, "^": lambda x, y: x ^ y}[sign]
    gold = operator(ATOM_CELLS[0], array)
    for mask in (operator(masks.causal(), operand), operator(operand, masks.causal())):
        assert isinstance(mask, Mask)
        np.testing.assert_array_equal(mask.dense(T, S, batch=B, heads=N), gold)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m and m,
        lambda m: m or m,
        lambda m: not m,
        lambda m: 1 if m else 0,
        lambda m: bool(m),
    ],
    ids=["and", "or", "not", "if", "bool"],
)
def test_a_mask_has_no_truth_value(use: Any) -> None:
    with pytest.raises(TypeError, match=r"`&`, `\|`, `~`"):
        use(masks.causal())


def test_repr_says_what_was_written() -> None:
    mask = ~masks.causal() | (masks.sliding_window(3) & masks.key_padding(lengths=jnp.ones(2, int)))
    assert repr(mask) == "~causal() | (sliding_window(3, 0) & key_padding(lengths=int32[2]))"


# --- masks as pytrees -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_flatten_unflatten(name: str) -> None:
    mask = as_mask(MASKS[name](2, 4, 8, 8).mask)
    leaves, structure = jax.tree.flatten(mask)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(mask)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(again), strict=True))
    assert structure == jax.tree.structure(again)
    assert hash(structure) == hash(jax.tree.structure(again))


def test_structure_does_not_depend_on_values() -> None:
    def make(n: int, ids: Any) -> Mask:
        return masks.segments(ids) & masks.sliding_window(n) | ~masks.prefix_lm(n)

    first, second = make(3, jnp.zeros(8, int)), make(5, jnp.arange(8))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.structure(first) != jax.tree.structure(first & masks.causal())


def test_masks_are_frozen() -> None:
    with pytest.raises(AttributeError):
        masks.causal().offset = 1  # type: ignore[attr-defined]


def test_vmap_over_leaves_is_a_loop() -> None:
    n = jnp.array([0, 2, 5])
    got = jax.vmap(lambda n: masks.prefix_lm(n).dense(4, 5))(n)
    for i in range(3):
        np.testing.assert_array_equal(got[i], masks.prefix_lm(int(n[i])).dense(4, 5))
    # The mask itself as the vmapped argument.
    batched = masks.sliding_window(n, n)
    got = jax.vmap(lambda m: m.dense(4, 5))(batched)
    for i in range(3):
        np.testing.assert_array_equal(
            got[i], masks.sliding_window(int(n[i]), int(n[i])).dense(4, 5)
        )


def _captured(limit: Any) -> Any:
    return lambda b, h, q, k: q - k < limit


def test_closures_over_tracers() -> None:
    """The array that a lambda closes over may be a tracer of jit, vmap, grad or scan."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2, 4)), jnp.float32)

    def loss(x: Any, limit: Any) -> Any:
        return (ja.attention(x, x, x, mask=_captured(limit)) ** 2).sum()

    by_hand = [loss(x, i) for i in (1, 3)]
    assert not np.allclose(by_hand[0], by_hand[1])
    limits = jnp.array([1, 3])
    # float32, compiled differently: the last bits may differ.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6)
    for i in range(2):
        close(jax.jit(loss)(x, limits[i]), by_hand[i])
    close(jax.vmap(loss, (None, 0))(x, limits), by_hand)
    close(jax.jit(jax.vmap(loss, (None, 0)))(x, limits), by_hand)
    slopes = [jax.grad(loss)(x, i) for i in (1, 3)]
    close(jax.vmap(jax.grad(loss), (None, 0))(x, limits), slopes, atol=1e-5)
    _, scanned = jax.lax.scan(lambda c, n: (c, jax.grad(loss)(x, n)), 0, limits)
    close(scanned, slopes, atol=1e-5)
    close(jax.checkpoint(loss)(x, limits[1]), by_hand[1])


def test_a_float_that_a_mask_captures_gets_no_gradient() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 1, 4)), jnp.float32)

    def loss(limit: Any) -> Any:
        mask = masks.causal() & (lambda b, h, q, k: (q - k).astype(jnp.float32) < limit)
        return (ja.attention(x, x, x, mask=mask) ** 2).sum()

    assert float(jax.grad(loss)(2.5)) == 0.0


# --- random blocks, trees -------------------------------------------------------------------------


def test_random_blocks() -> None:
    def make(seed: int) -> np.ndarray:
        mask = masks.random_blocks(jax.random.key(seed), 3, 4, 20, 26)
        return np.asarray(mask.dense(20, 26))[0, 0]

    dense = make(0)
    for i in range(5):
        rows = dense[4 * i : 4 * i + 4]
        assert (rows == rows[0]).all(), "the queries of a block see the same keys"
        seen = {j for j in range(7) if rows[0, 4 * j]}
        assert len(seen) == 3
        expected = np.isin(np.arange(26) // 4, list(seen))
        np.testing.assert_array_equal(rows[0], expected)
    np.testing.assert_array_equal(dense, make(0))
    assert (dense != make(1)).any()


def test_tree_with_one_branch_is_causal_and_roots_see_themselves() -> None:
    line = masks.tree(jnp.arange(6) - 1)
    np.testing.assert_array_equal(line.dense(6, 6), masks.causal().dense(6, 6))
    np.testing.assert_array_equal(
        masks.tree(-jnp.ones(4, int)).dense(4, 4)[0, 0], np.eye(4, dtype=bool)
    )
    traced = jax.jit(lambda parents: masks.tree(parents).dense(6, 6))(jnp.arange(6) - 1)
    np.testing.assert_array_equal(traced, masks.causal().dense(6, 6))


def test_streaming_llm_and_longformer_as_composed() -> None:
    """The recipes of the docstrings."""
    q, k = np.ogrid[:9, :9]
    stream = (masks.global_tokens(2) | masks.sliding_window(2)) & masks.causal()
    np.testing.assert_array_equal(
        stream.dense(9, 9)[0, 0], (k <= q) & ((k < 2) | (q - k <= 2)) | ((q < 2) & (k <= q))
    )
    wide = masks.dilated(2) & masks.sliding_window(4, 4)
    np.testing.assert_array_equal(wide.dense(9, 9)[0, 0], np.isin(k - q, [-4, -2, 0, 2, 4]))


# --- arrays in other conventions ------------------------------------------------------------------

KEEP = np.random.default_rng(3).random((2, 3, 4, 5)) < 0.5
ALLOWED = {
    "attend": (["bool", "int32", "uint8"], lambda keep: keep),
    "ignore": (["bool", "int32", "float32", "bfloat16"], lambda keep: ~keep),
    "additive": (["float32", "float16", "bfloat16"], None),
    "hf": (["bool", "int32", "float32", "float16"], lambda keep: keep),
    "keras": (["bool", "int32"], lambda keep: keep),
    "flax": (["bool", "int32", "float32", "bfloat16"], lambda keep: keep),
}


def _as_convention(keep: np.ndarray, convention: str, dtype: str, low: float = -jnp.inf) -> Any:
    if convention == "additive":
        return jnp.where(keep, 0.0, low).astype(dtype)
    return jnp.asarray(ALLOWED[convention][1](keep)).astype(dtype)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize(
    ("convention", "dtype"), [(c, d) for c, (dtypes, _) in ALLOWED.items() for d in dtypes]
)
def test_from_array_keeps_what_the_array_keeps(convention: str, dtype: str, rank: int) -> None:
    if rank == 4:
        keep, gold = KEEP, KEEP
    elif rank == 3:
        keep, gold = KEEP[:, 0], np.broadcast_to(KEEP[:, :1], KEEP.shape)
    elif convention in ("hf", "keras"):
        keep = KEEP[:, 0, 0]
        gold = np.broadcast_to(keep[:, None, None, :], KEEP.shape)
    else:
        keep, gold = KEEP[0, 0], np.broadcast_to(KEEP[0, 0], KEEP.shape)
    array = _as_convention(keep, convention, dtype)
    mask = masks.from_array(array, convention)
    np.testing.assert_array_equal(mask.dense(4, 5, batch=2, heads=3), gold)
    # Round trip: the dense mask, in the convention again.
    again = masks.from_array(_as_convention(np.asarray(mask.dense(4, 5, 2, 3)), convention, dtype),
                             convention)  # fmt: skip
    np.testing.assert_array_equal(again.dense(4, 5, 2, 3), gold)
    traced = jax.jit(lambda a: masks.from_array(a, convention).dense(4, 5, 2, 3))
    np.testing.assert_array_equal(traced(array), gold)


@pytest.mark.parametrize(
    ("dtype", "low"),
    [
        ("float32", -1e4),
        ("float32", -1e9),
        ("float32", float(np.finfo(np.float32).min)),
        ("float16", -1e4),
        ("float16", float(np.finfo(np.float16).min)),
        ("bfloat16", -1e4),
        ("bfloat16", float(jnp.finfo(jnp.bfloat16).min)),
    ],
)
def test_additive_takes_every_constant_in_use(dtype: str, low: float) -> None:
    """-1e4 has no exact bfloat16: what it rounds to removes as well."""
    array = _as_convention(KEEP, "additive", dtype, low)
    mask = masks.from_array(array, "additive")
    np.testing.assert_array_equal(mask.dense(4, 5, 2, 3), KEEP)
    inside = jax.jit(lambda a: masks.from_array(a, "additive").dense(4, 5, 2, 3))(array)
    np.testing.assert_array_equal(inside, KEEP)


def test_additive_zeros_keep_everything() -> None:
    assert masks.from_array(jnp.zeros((4, 5)), "additive").dense(4, 5).all()


def test_sum_of_additive_masks_still_removes() -> None:
    low = float(np.finfo(np.float32).min)
    with np.errstate(over="ignore"):
        both = np.where(KEEP, np.float32(0), np.float32(low)) + np.where(
            KEEP, np.float32(0), np.float32(low)
        )
    assert np.isinf(both).any()
    np.testing.assert_array_equal(masks.from_array(both, "additive").dense(4, 5, 2, 3), KEEP)


def test_a_traced_nan_removes() -> None:
    """Values are unknown under jit; what is not clearly kept is not let through."""
    array = jnp.array([[0.0, jnp.nan], [-jnp.inf, 0.0]])
    got = jax.jit(lambda a: masks.from_array(a, "additive").dense(2, 2))(array)
    np.testing.assert_array_equal(got[0, 0], np.eye(2, dtype=bool))


def test_tutorial_padding_mask() -> None:
    """`create_padding_mask` of the tutorial: 1.0 where the token is padding, [B, 1, 1, S]."""
    tokens = np.array([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]])
    ignore = (tokens == 0).astype(np.float32)[:, None, None, :]
    mask = masks.from_array(ignore, "ignore")
    np.testing.assert_array_equal(mask.dense(2, 5, batch=3)[:, 0, 0], tokens != 0)


# --- dtypes of arguments --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64", "uint64"])
def test_integers_of_any_width(dtype: str) -> None:
    with jax.enable_x64(dtype.endswith("64")):
        n = jnp.array([1, 4]).astype(dtype)
        ids = jnp.array([0, 0, 1, 1]).astype(dtype)
        mask = (
            masks.key_padding(lengths=n)
            & masks.causal(n)
            & masks.sliding_window(n)
            & masks.segments(ids, ids)
            & masks.chunked(n[1])
            & masks.dilated(n[0])
            & masks.prefix_lm(n)
        ) | (
            masks.global_tokens(counts=n)
            & masks.tree(jnp.arange(4).astype(dtype).astype("int32") - 1)
        )
        b, h, q, k = grid(2, 2, 4, 4)
        m = np.array([1, 4])
        gold = (k < m[b]) & (q + m[b] >= k) & (q >= k) & (q - k <= m[h]) & (q // 2 == k // 2) | (
            (np.minimum(q, k) < m[b]) & (q >= k)
        )
        np.testing.assert_array_equal(mask.dense(4, 4, 2, 2), gold)

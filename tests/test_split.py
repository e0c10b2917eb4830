"""The split computes what the predicate computes, and puts every part where it belongs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import predicates
import pytest
from cases import everyday
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from predicates import B, N, S, T

from jaxattn import masks, scores
from jaxattn.masks.mask import as_mask
from jaxattn.masks.positions import Positions
from jaxattn.tracing import dependence
from jaxattn.tracing.canonical import canonicalize
from jaxattn.tracing.program import Program
from jaxattn.tracing.split import split

MASKS = predicates.everything()


def on_everything(part, positions=None, *logits):
    """The residue on all of `[B, N, T, S]`."""
    positions = positions or Positions()
    parts = split(part, positions)
    operands = parts.operands(positions, B, N, T, S)
    found = parts.residue(*logits, *(op.tile(0, 0, T, S, S) for op in operands))
    return jnp.broadcast_to(found, (B, N, T, S))


def some_positions():
    """Positions other than 0, 1, 2, ... in an order of their own."""
    random = np.random.default_rng(3)
    return Positions(
        b=jnp.array([1, 0]),
        q=jnp.asarray(random.integers(0, T, (B, T), np.int32)),
        k=jnp.asarray(random.permutation(S).astype(np.int32)),
    )


@pytest.mark.parametrize("name", everyday(predicates.EVERYTHING, 3))
def test_operands_and_residue_say_what_the_predicate_says(name):
    mask = MASKS[name]

    @predicates.quick
    def both(positions):
        pairs = [
            (on_everything(mask, at), mask.dense(T, S, B, N, at)) for at in (Positions(), positions)
        ]
        return [(found == expected).all() for found, expected in pairs]

    assert all(both(some_positions()))


@pytest.mark.parametrize("name", ["user: documents", "dilated & window", "dense4", "blocks"])
def test_tiles_of_operands_are_tiles_of_the_mask(name):
    mask = MASKS[name]
    expected = predicates.brute(mask)

    @predicates.quick
    def tile(q, k):
        parts = split(mask)
        operands = parts.operands(Positions(), B, N, T, S)
        return parts.residue(*(op.tile(q, k, 16, 32, S) for op in operands))

    for q, k in [(0, 0), (7, 20), (T - 16, S - 32)]:
        assert (tile(q, k) == expected[:, :, q : q + 16, k : k + 32]).all()


@pytest.mark.parametrize(
    ("name", "kinds"),
    {
        "causal": ("row", "column"),
        "segments": ("row", "column"),
        "key padding": ("column",),
        "query padding": ("row",),
        "full": (),
        "dense": ("grid",),
        "dense4": ("grid",),
        "dilated & window": ("diagonal",),
        "user: window a head": ("row", "column", "head"),
        "user: table of distances": ("diagonal",),
        "user: table of blocks": ("head", "row", "column"),
        "user: dense, one by one": ("grid",),
        "user: dense, transposed": ("grid",),
        "user: dense, first head": ("grid",),
        "user: dense, last row": ("grid",),
        "user: dense, take": ("grid",),
        "user: dense, clipped": ("grid",),
        "user: searchsorted": ("row", "column"),
    }.items(),
)
def test_kinds(name, kinds):
    assert split(MASKS[name]).kinds == kinds


def test_extents_are_1_where_nothing_depends_on_b_or_h():
    shapes = {
        "causal": [(1, 1, T), (1, 1, S)],
        "segments": [(B, 1, T), (B, 1, S)],
        "user: window a head": [(1, 1, T), (1, 1, S), (1, N)],
        "dense": [(1, 1, T, S)],
        "dense4": [(1, N, T, S)],
        "heads": [(1, N, T + S - 1)],
    }
    for name, expected in shapes.items():
        operands = split(MASKS[name]).operands(Positions(), B, N, T, S)
        assert [op.array.shape for op in operands] == expected


def test_reasons_name_what_is_not_elementwise():
    assert split(MASKS["segments & window"]).elementwise
    assert split(MASKS["user: cond"]).elementwise
    for name, word in {"blocks": "bool[9, 11]", "user: stack": "`stack`"}.items():
        parts = split(MASKS[name])
        assert not parts.elementwise
        assert any(word in reason for reason in parts.reasons)
    given = split(MASKS["dense"], Positions(q=jnp.arange(T)))
    assert given.kinds == ("head", "row", "column")
    assert any("computed positions" in reason for reason in given.reasons)


def test_a_dense_array_is_not_gathered():
    def operands(array):
        return split(masks.dense(array)).operands(Positions(), B, N, T, S)[0].array

    text = str(jax.make_jaxpr(operands)(jnp.asarray(predicates.DENSE4)))
    assert "gather" not in text
    assert "dynamic_slice" not in text


# --- scores ---------------------------------------------------------------------------------------

ARRAY4 = np.random.default_rng(1).normal(size=(B, N, T, S)).astype(np.float32)
SLOPES = np.array([0.5, 0.25, 0.125], np.float32)


@jax.custom_jvp
def passing(x):
    """`max(x, 0)` with the derivative of x."""
    return jax.nn.relu(x)


passing.defjvp(lambda x, dx: (passing(*x), dx[0]))


@jax.custom_vjp
def backwards(x):
    """x with a derivative of -1."""
    return x


backwards.defvjp(lambda x: (x, None), lambda _, dx: (-dx,))


def some_scores():
    table = jnp.asarray(np.random.default_rng(2).normal(size=(N, 16)).astype(np.float32))
    near = jnp.linspace(0.0, 1.0, 9)
    return {
        "alibi": scores.alibi(jnp.asarray(SLOPES)),
        "soft cap": scores.soft_cap(5.0),
        "relative bias": scores.relative_bias(table, max_distance=20),
        "bias": scores.bias(ARRAY4[:, :1]),
        "bias2": scores.bias(ARRAY4[0, 0]),
        "chain": scores.chain(scores.bias(ARRAY4[:1]), scores.soft_cap(3.0)),
        "user": scores.score(lambda logit, b, h, q, k, w: logit * w[h] + near[k % 9], SLOPES),
        "user, own derivatives": scores.score(
            lambda logit, b, h, q, k, w: passing(logit * 0.0) + passing(logit) * w[h], SLOPES
        ),
        "kerple": scores.score(
            lambda logit, b, h, q, k, r: logit - r[h] * jnp.log1p(jnp.abs(q - k).astype("float32")),
            SLOPES,
        ),
        "decoded": scores.score(
            lambda logit, b, h, q, k, w: logit + w[jnp.clip(q - k, 0, 2)], SLOPES
        ),
    }


def directly(score, logits):
    at = (jnp.arange(B), jnp.arange(N), jnp.arange(T), jnp.arange(S))
    fn = score
    for axis in reversed(range(4)):
        fn = jax.vmap(fn, (0, *(0 if i == axis else None for i in range(4))))
    return fn(logits, *at)


@pytest.mark.parametrize("name", some_scores())
def test_scores_and_their_gradients(name):
    logits = jnp.asarray(ARRAY4)

    def results(score, logits):
        return on_everything(score, None, logits), directly(score, logits)

    @predicates.quick
    def everything(score, logits):
        def total(which):
            return lambda score, logits: (results(score, logits)[which] * ARRAY4[::-1]).sum()

        grads = [jax.grad(total(i), (0, 1), allow_int=True)(score, logits) for i in (0, 1)]
        return results(score, logits), grads

    # A user's function is no leaf: hoisted first, what it closes over is.
    (found, expected), (mine, theirs) = everything(canonicalize(some_scores()[name]), logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_a_table_of_distances_is_a_vector():
    parts = split(some_scores()["relative bias"])
    assert parts.kinds == ("diagonal",)
    assert parts.operands(Positions(), B, N, T, S)[0].array.shape == (1, N, T + S - 1)
    assert split(some_scores()["alibi"]).kinds == ("head", "row", "column")
    assert split(some_scores()["kerple"]).kinds == ("diagonal",)


# --- extents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda: masks.segments(jnp.zeros((B, T), "int32")), ["k_ids", f"{T}", "axis 1", f"{S}"]),
        (lambda: masks.dense(jnp.ones((T, S + 1), bool)), ["dense(array)", f"{S + 1}", "`k`"]),
        (
            lambda: masks.key_padding(lengths=jnp.ones(B + 1, "int32")),
            ["lengths", "`b`", f"B = {B}"],
        ),
        (lambda: masks.key_padding(lengths=jnp.ones(1, "int32")), ["extent 1", "not broadcast"]),
        (lambda: as_mask(lambda b, h, q, k: jnp.arange(N + 2)[h] > k), [f"{N + 2}", "`h`"]),
    ],
)
def test_an_axis_read_at_a_bare_position_has_its_extent(mask, words):
    with pytest.raises(ValueError, match="extent") as error:
        split(mask()).operands(Positions(), B, N, T, S)
    for word in words:
        assert word in str(error.value)


def test_computed_indices_and_given_positions_follow_jax():
    values = jnp.arange(3) > 0
    for fn in (lambda b, h, q, k: values[q // 20], lambda b, h, q, k: values[jnp.minimum(k, 2)]):
        assert (on_everything(as_mask(fn)) == predicates.brute(fn)).all()
    positions = Positions(q=jnp.arange(T) % 3)
    found = on_everything(as_mask(lambda b, h, q, k: values[q]), positions)
    assert (found[0, 0, :, 0] == (np.arange(T) % 3 > 0)).all()


def test_positions_have_to_be_the_same_for_both():
    with pytest.raises(ValueError, match="same positions"):
        split(masks.causal()).operands(Positions(q=jnp.arange(T)), B, N, T, S)


# --- hoist ----------------------------------------------------------------------------------------


def window(w):
    return as_mask(lambda b, h, q, k: q - k < w)


def test_functions_are_compared_by_what_they_compute():
    one, two, other = canonicalize(window(5)), canonicalize(window(5)), canonicalize(window(6))
    assert isinstance(one.fn, Program)
    assert one.fn == two.fn
    assert hash(one.fn) == hash(two.fn)
    assert one.fn != other.fn
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert canonicalize(one) is one


def test_derivatives_of_their_own_are_compared_too():
    def score(fn, w):
        return scores.score(lambda logit, b, h, q, k: fn(logit * w))

    for fn in (passing, backwards, jax.nn.softplus):
        one, two = canonicalize(score(fn, 2.0)), canonicalize(score(fn, 2.0))
        assert one.fn == two.fn
        assert split(one).elementwise
        slope = jax.grad(lambda x, score=one: score(x, 0, 0, 0, 0))(3.0)
        assert slope == pytest.approx(jax.grad(lambda x, fn=fn: fn(x * 2.0))(3.0))
    same = [
        canonicalize(score(fn, 1.0)).fn for fn in (backwards, lambda x: x, passing, jax.nn.relu)
    ]
    assert len(set(same)) == 4


def test_not_a_number_is_equal_to_itself():
    def never():
        return as_mask(lambda b, h, q, k: q.astype("float32") < jnp.float32(jnp.nan))

    assert canonicalize(never()).fn == canonicalize(never()).fn


def test_captured_arrays_are_leaves():
    one, two = (canonicalize(window(jnp.int32(w) + jnp.zeros((2,), "int32")[0])) for w in (5, 6))
    assert one.fn == two.fn
    assert [int(leaf) for leaf in jax.tree.leaves(one) + jax.tree.leaves(two)] == [5, 6]


def test_new_values_and_new_lambdas_do_not_compile(compilations):
    cells = jax.jit(lambda mask: on_everything(mask))
    for i, expected in ((0, None), (5, 0)):
        ids = jnp.asarray(predicates.IDS_Q + i)
        other = jnp.asarray(predicates.IDS_K)
        mask = canonicalize(
            as_mask(lambda b, h, q, k, ids=ids, other=other: ids[b, q] == other[b, k])
        )
        jax.block_until_ready((ids, other))
        compilations.reset()
        cells(mask)
        assert expected is None or compilations.count == expected


def test_the_librarys_masks_are_traced_once(monkeypatch):
    mask = masks.causal() & masks.segments(jnp.asarray(predicates.IDS_Q))
    split(mask)
    monkeypatch.setattr(jax, "make_jaxpr", lambda *_: pytest.fail("traced again"))
    split(masks.causal() & masks.segments(jnp.asarray(predicates.IDS_Q) + 1))
    assert canonicalize(mask) is mask


def test_float_arrays_in_masks_carry_no_gradient_and_in_scores_learn():
    def visible(x):
        mask = canonicalize(as_mask(lambda b, h, q, k: x[h] > k.astype("float32")))
        return sum(leaf.sum() for leaf in jax.tree.leaves(mask) if leaf.dtype == jnp.float32)

    assert (jax.grad(visible)(jnp.ones(N)) == 0).all()

    def scored(x):
        score = scores.score(lambda logit, b, h, q, k: logit * x[h])
        return on_everything(score, None, jnp.ones((B, N, T, S))).sum()

    assert (jax.grad(scored)(jnp.ones(N)) == B * T * S).all()


def closing_over(ids):
    return as_mask(lambda b, h, q, k: (jnp.searchsorted(ids[b], ids[b, q]) >= k) & (q >= ids[b, k]))


def one_row(ids):
    """The mask of one row of the batch, from a traced array that its function closes over."""
    mask = closing_over(ids[None])
    parts = split(mask)
    tiles = [op.tile(0, 0, T, T, T) for op in parts.operands(Positions(), 1, N, T, T)]
    return jnp.broadcast_to(parts.residue(*tiles), (1, N, T, T))[0]


def seen(mask):
    return predicates.quick(lambda: mask.dense(T, T, B, N))()


CONTEXTS = {
    "vmap": predicates.quick(jax.vmap(one_row)),
    "scan": predicates.quick(lambda ids: jax.lax.scan(lambda c, x: (c, one_row(x)), 0, ids)[1]),
    "remat": predicates.quick(lambda ids: jax.lax.map(jax.checkpoint(one_row), ids)),
    "grad": predicates.quick(
        lambda ids: jax.grad(lambda x: (x, jax.vmap(one_row)(ids)), has_aux=True)(1.0)[1]
    ),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_masks_closing_over_tracers(context):
    ids = jnp.asarray(predicates.IDS_Q)
    assert (CONTEXTS[context](ids) == seen(closing_over(ids))).all()


@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map(check_vma):
    mesh = jax.make_mesh((B,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:B])
    ids = jnp.asarray(predicates.IDS_Q)
    x = PartitionSpec("x")
    run = jax.shard_map(jax.vmap(one_row), mesh=mesh, in_specs=x, out_specs=x, check_vma=check_vma)
    assert (predicates.quick(run)(ids) == seen(closing_over(ids))).all()


def test_arrays_on_explicit_mesh_axes():
    mesh = jax.make_mesh((B,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:B])
    plain = jnp.asarray(predicates.IDS_Q)
    ids = jax.device_put(plain, NamedSharding(mesh, PartitionSpec("x")))
    assert canonicalize(masks.segments(ids)).q_ids is ids
    hoisted = canonicalize(closing_over(ids))
    assert hoisted.fn == canonicalize(closing_over(plain)).fn
    operands = split(masks.segments(ids)).operands(Positions(), B, N, T, T)
    assert all(op.array.shape == (B, 1, T) for op in operands)


@pytest.mark.parametrize("spec", [("x",), (None, "x")])
def test_sharded_arrays_stay_where_they_are(spec):
    mesh = jax.make_mesh((B,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:B])
    lengths = jax.device_put(
        jnp.asarray(predicates.LENGTHS), NamedSharding(mesh, PartitionSpec("x"))
    )
    ids = jax.device_put(jnp.zeros((B, S), "int32"), NamedSharding(mesh, PartitionSpec("x")))

    def features(lengths, ids):
        mask = masks.key_padding(lengths=lengths) & masks.segments(ids) & masks.causal()
        return [op.array for op in split(mask).operands(Positions(), B, N, S, S)]

    assert "all-gather" not in jax.jit(features).lower(lengths, ids).compile().as_text()


def test_a_lookup_is_all_that_a_known_mask_costs():
    mask = masks.causal() & masks.segments(jnp.asarray(predicates.IDS_Q))
    before = dependence.split_plan.cache_info()
    split(mask)
    split(mask)
    assert dependence.split_plan.cache_info().misses <= before.misses + 1

"""Bounds are never wrong, and tight where they should be.

The law is soundness, checked three ways against brute force: every rule on intervals of every
dtype, random predicates, and a list of nasty ones that random search does not find.
"""

from __future__ import annotations

import itertools
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import predicates
import pytest
from cases import everyday
from hypothesis import given
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from predicates import TILE, B, N, S, T, tile_states

from jaxattn import masks
from jaxattn.masks.mask import as_mask
from jaxattn.masks.positions import Positions
from jaxattn.tiles import intervals
from jaxattn.tiles.elementwise_rules import Interval, finite
from jaxattn.tiles.intervals import RULES
from jaxattn.tracing.canonical import canonicalize
from jaxattn.tracing.out_of_range import guarded
from jaxattn.tracing.program import Type
from jaxattn.tracing.split import split

EMPTY, FULL = 0, 2


def states(mask, positions=None, tile=TILE):
    positions = positions or Positions()
    parts = split(as_mask(mask), positions)
    return intervals.states(parts, parts.operands(positions, B, N, T, S), *tile, T, S)


def compiled(mask, positions=None, tile=TILE):
    # A function of its own: `cuts` is no argument that a cache of compiled functions would see.
    return predicates.quick(lambda mask, positions: states(mask, positions, tile))(mask, positions)


def assert_sound(found, expected):
    found = np.broadcast_to(np.asarray(found), expected.shape)
    wrong = (found != expected) & (found != 1)
    assert not wrong.any(), f"states {found[wrong]} of tiles that are {expected[wrong]}"


@pytest.fixture(params=["bounds of tiles", "bounds of blocks"])
def cuts(request, monkeypatch):
    """Whether tiles are cut into blocks; uncut, the rules have to stand alone."""
    if request.param == "bounds of tiles":
        monkeypatch.setattr(intervals, "_BLOCKS", 0)
    return request.param


# --- every rule -----------------------------------------------------------------------------------

SMALL = [np.dtype(d) for d in ("int8", "uint8")]
BINARY = {
    "add": lax.add,
    "sub": lax.sub,
    "mul": lax.mul,
    "div": lax.div,
    "rem": lax.rem,
    "max": lax.max,
    "min": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
    "lt": lax.lt,
    "le": lax.le,
    "gt": lax.gt,
    "ge": lax.ge,
    "eq": lax.eq,
    "ne": lax.ne,
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
}
UNARY = {
    "neg": (lax.neg, {}),
    "abs": (lax.abs, {}),
    "sign": (lax.sign, {}),
    "not": (lax.bitwise_not, {}),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), {"y": 3}),
    "square": (lambda x: lax.integer_pow(x, 2), {}),
}


def everything_of(dtype):
    info = jnp.iinfo(dtype)
    return np.arange(info.min, info.max + 1).astype(dtype)


def some_intervals(dtype, n, seed):
    """Intervals narrow and wide, at the ends of the range and around 0, `[1, 1, n, 1]` each."""
    random = np.random.default_rng(seed)
    values = everything_of(dtype).astype(np.int64)
    least, most = values[0], values[-1]
    lo = random.choice([least, least + 1, -1, 0, 1, 2, 7, most - 1, most, *values[::17]], n)
    width = random.choice([0, 0, 1, 2, 5, 40, 255], n)
    lo, hi = np.clip(lo, least, most), np.clip(lo + width, least, most)
    return Interval(*(jnp.asarray(x.astype(dtype))[None, None, :, None] for x in (lo, hi)))


def inside(interval, values):
    lo, hi = (np.asarray(x).reshape(-1, *(1,) * (values.ndim - 1)) for x in interval)
    return (lo <= values) & (values <= hi)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_rules_of_two(name, dtype):
    a, b = some_intervals(dtype, 120, 0), some_intervals(dtype, 120, 1)
    values = everything_of(dtype)
    results = np.asarray(BINARY[name](*np.broadcast_arrays(values[:, None], values[None, :])))
    found = RULES[name](Type((), results.dtype), {}, a, b)
    happens = inside(a, np.broadcast_to(values[:, None], (120, 256, 256)))
    happens = happens & inside(b, np.broadcast_to(values[None, :], (120, 256, 256)))
    assert (inside(found, np.broadcast_to(results, (120, 256, 256))) | ~happens).all()


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_rules_of_one(name, dtype):
    if (name, dtype) == ("abs", np.dtype("uint8")):
        pytest.skip("jax has none")
    fn, params = UNARY[name]
    a, values = some_intervals(dtype, 300, 2), everything_of(dtype)
    results = np.asarray(fn(jnp.asarray(values)))
    found = RULES[name](Type((), results.dtype), params, a)
    happens = inside(a, np.broadcast_to(values, (300, 256)))
    assert (inside(found, np.broadcast_to(results, (300, 256))) | ~happens).all()


@pytest.mark.parametrize(
    ("old", "new"),
    list(itertools.permutations(["int8", "uint8", "int16", "float32", "bool"], 2)),
)
def test_conversions(old, new):
    if old == "bool":
        flags = np.array([[0, 0, 1], [0, 1, 1]], bool)
        a, values = (
            Interval(*(jnp.asarray(x)[None, None, :, None] for x in flags)),
            np.array([0, 1], bool),
        )
    elif old == "float32":
        ends = np.array(
            [[-2e9, -300, -128.5, -1, -0.5, 0, 1, 127.9, 255.9, 3e9], [0] * 10], "float32"
        )
        ends[1] = ends[0] + np.float32(1.25)
        a = Interval(*(jnp.asarray(x)[None, None, :, None] for x in ends))
        values = np.concatenate([ends[0], ends[1], (ends[0] + ends[1]) / 2])
    else:
        a, values = some_intervals(np.dtype(old), 200, 3), everything_of(old)
    results = np.asarray(lax.convert_element_type(jnp.asarray(values), jnp.dtype(new)))
    found = RULES["convert_element_type"](Type((), np.dtype(new)), {}, a)
    n = a.lo.size
    happens = inside(a, np.broadcast_to(values, (n, values.size)))
    assert (inside(found, np.broadcast_to(results, (n, values.size))) | ~happens).all()


@pytest.mark.parametrize(
    "name", ["exp", "exp2", "expm1", "log", "log1p", "sqrt", "tanh", "logistic"]
)
def test_rules_of_functions(name):
    fn = getattr(lax, name)
    random = np.random.default_rng(5)
    lo = np.concatenate([random.normal(size=200) * 10, random.random(100) * 1e-3]).astype("float32")
    hi = (lo + random.choice([0, 1e-6, 0.1, 5], 300)).astype("float32")
    a = Interval(*(jnp.asarray(x)[None, None, :, None] for x in (lo, hi)))
    step = types = Type((), np.dtype("float32"))
    found = finite(RULES[name](step, {}, a))
    del types
    for at in np.linspace(0, 1, 17, dtype="float32"):
        value = np.asarray(jax.jit(fn)(lo + (hi - lo) * at))
        # Not a number is anything.
        outside = ~np.isfinite(np.asarray(found.lo).ravel())
        assert (inside(found, value) | outside).all()


def test_selections():
    a, b = some_intervals(np.dtype("int8"), 100, 6), some_intervals(np.dtype("int8"), 100, 7)
    out = Type((), np.dtype("int8"))
    for lo, hi in ((0, 0), (0, 1), (1, 1)):
        flags = Interval(*(jnp.full((1, 1, 1, 1), bool(x)) for x in (lo, hi)))
        numbers = Interval(*(jnp.full((1, 1, 1, 1), x) for x in (lo, hi)))
        for which in (flags, numbers):
            found = RULES["select_n"](out, {}, which, a, b)
            for case in (a, b)[lo : hi + 1]:
                assert ((found.lo <= case.lo) & (case.hi <= found.hi)).all()
    outside = Interval(*(jnp.full((1, 1, 1, 1), x) for x in (0, 2)))
    assert int(RULES["select_n"](out, {}, outside, a, b).lo.max()) == -128


# --- random predicates ----------------------------------------------------------------------------

INTS = st.sampled_from([-(2**31), -100, -3, -1, 0, 1, 2, 3, 7, 16, 64, 1000, 2**20, 2**31 - 1])
LEAVES = {
    "ids": jnp.asarray(predicates.MIXED_Q),
    "large": jnp.asarray(
        np.random.default_rng(9).choice([0, 1, -1, 2**31 - 1, -(2**31), 40], (T,)).astype(np.int32)
    ),
    "noise": jnp.asarray(
        np.random.default_rng(8).choice([0.0, -0.5, 3.25, np.nan, np.inf, -np.inf, 1e38], (S,)),
        jnp.float32,
    ),
    "smooth": jnp.linspace(-2.0, 50.0, T).astype(jnp.float32),
    "sorted": jnp.asarray(predicates.IDS_K),
    "heads": jnp.asarray(predicates.WINDOWS),
    "flags": jnp.asarray(predicates.DENSE[:, 0]),
    "table": jnp.asarray(predicates.TABLE[0, 0]),
    "small": jnp.asarray(np.arange(-26, S - 26), jnp.int8),
}


def numbers(kind):
    """Trees of numbers of one kind: `("int", ...)`."""
    if kind == "int":
        base = st.one_of(
            st.sampled_from(["b", "h", "q", "k", "q - k", "ids", "large", "sorted", "heads"]), INTS
        )
        unary = ["neg", "abs", "sign", "not", "square", "u32", "i8", "of float", "of bool"]
        binary = [
            "add",
            "sub",
            "mul",
            "max",
            "min",
            "div",
            "rem",
            "and",
            "or",
            "xor",
            "//",
            "%",
            "<<",
            ">>",
        ]
    else:
        base = st.one_of(st.sampled_from(["noise", "smooth"]), st.floats(-40, 40, width=32))
        unary = ["neg", "abs", "sqrt", "floor", "tanh", "square", "of int", "bf16"]
        binary = ["add", "sub", "mul", "max", "min", "div"]
    base = st.tuples(st.just(kind), base)
    return st.recursive(
        base,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(unary), inner),
            st.tuples(st.sampled_from(binary), inner, inner),
        ),
        max_leaves=4,
    )


CONDITIONS = st.recursive(
    st.one_of(
        *(
            st.tuples(st.sampled_from(["lt", "le", "eq", "ne", "gt", "ge"]), numbers(k), numbers(k))
            for k in ("int", "float")
        ),
        st.just(("flags",)),
        st.tuples(st.just("table"), numbers("int"), numbers("int")),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.sampled_from(["and", "or", "xor"]), inner, inner),
        st.tuples(st.just("where"), inner, inner, inner),
    ),
    max_leaves=4,
)


def divided(op):
    """A division of integers by what is not 0, and of what is not the lowest integer.

    XLA's compiler computes with constants, and before JAX 0.12 it dies of these; the list of nasty
    cases has them.
    """

    def run(x, y):
        if x.dtype != jnp.int32:
            return op(x, y)
        return op(jnp.maximum(x, LEAST + 1), jnp.where(y == 0, jnp.int32(3), y))

    return run


OPS = {
    "neg": jnp.negative,
    "abs": jnp.abs,
    "sign": jnp.sign,
    "not": jnp.invert,
    "square": lambda x: lax.integer_pow(x, 2),
    "sqrt": jnp.sqrt,
    "floor": jnp.floor,
    "tanh": jnp.tanh,
    "add": lax.add,
    "sub": lax.sub,
    "mul": lax.mul,
    "max": lax.max,
    "min": lax.min,
    "div": divided(lax.div),
    "rem": divided(lax.rem),
    "//": divided(jnp.floor_divide),
    "%": divided(jnp.remainder),
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
    "<<": lax.shift_left,
    ">>": lax.shift_right_arithmetic,
    "lt": lax.lt,
    "le": lax.le,
    "eq": lax.eq,
    "ne": lax.ne,
    "gt": lax.gt,
    "ge": lax.ge,
    "u32": lambda x: lax.div(x.astype(jnp.uint32), jnp.uint32(3)).astype(jnp.int32),
    "i8": lambda x: x.astype(jnp.int8).astype(jnp.int32),
    "of float": lambda x: (x.astype(jnp.float32) * jnp.float32(0.7)).astype(jnp.int32),
    "of bool": lambda x: (x > 3).astype(jnp.int32),
    "of int": lambda x: x.astype(jnp.int32).astype(jnp.float32),
    "bf16": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "where": lambda c, x, y: jnp.where(c, x, y),
}


def evaluate(tree, b, h, q, k, leaves):
    """The value of a tree at one pair of positions."""
    name, *parts = tree
    if name in ("int", "float"):
        (what,) = parts
        at = {"b": b, "h": h, "q": q, "k": k, "q - k": q - k}
        index = {"ids": (b, q), "sorted": (b, k), "heads": h, "noise": k}
        if not isinstance(what, str):
            return jnp.int32(what) if name == "int" else jnp.float32(what)
        return at[what] if what in at else leaves[what][index.get(what, q)]
    if name == "flags":
        return leaves["flags"][q]
    values = [evaluate(part, b, h, q, k, leaves) for part in parts]
    if name == "table":
        return leaves["table"][values[0] // 8, values[1] // 4]
    return OPS[name](*values)


def tree_mask(tree):
    return masks.predicate(lambda b, h, q, k, leaves: evaluate(tree, b, h, q, k, leaves), LEAVES)


@given(tree=CONDITIONS, positions=st.booleans(), blocks=st.sampled_from([0, 200]))
def test_random_predicates(tree, positions, blocks):
    at = Positions(q=jnp.arange(T) * 3 - 40, k=jnp.arange(S)[::-1]) if positions else Positions()
    mask = tree_mask(tree)

    @predicates.quick
    def both(at):
        # Positions may be beyond the arrays: what hangs on that is not visible.
        inside = guarded(canonicalize(mask), at, (B, N, T, S))
        return states(inside, at), mask.dense(T, S, B, N, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_BLOCKS", blocks)
        found, cells = both(at)
    assert_sound(found, tile_states(np.asarray(cells)))


# --- a list that random search does not find ------------------------------------------------------

LARGE = jnp.int32(2**31 - 1)
LEAST = jnp.int32(-(2**31))


def leaf(*values, dtype, n=T):
    """An array of a few values, again and again, in blocks so that tiles differ."""
    return jnp.asarray(np.resize(np.repeat(np.asarray(values), 16), n).astype(dtype))


def nasty():
    """Predicates at the edges of numbers; every rule that must give up has one."""
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    f = partial(leaf, dtype="float32")
    i = partial(leaf, dtype="int32")
    u = partial(leaf, dtype="uint32")
    near = i(2**31 - 20, 0, -(2**31) + 3)
    floats, holes, huge = f(0.5, nan, 2.0), f(inf, -inf, 1.0), f(3e38, -3e38, 1.0)
    unsigned, bytes_ = u(0, 5, 2**32 - 3), leaf(-128, 127, 3, dtype="int8")
    shift = i(0, 31, 32)
    return {
        "add wraps": lambda b, h, q, k: near[q] + k > 0,
        "add wraps both ways": lambda b, h, q, k: near[q] + near[q] + k > k,
        "sub wraps": lambda b, h, q, k: k - near[q] > 0,
        "sub from the least": lambda b, h, q, k: LEAST - k < 0,
        "mul wraps": lambda b, h, q, k: near[q] * k > -1,
        "mul wraps to 0": lambda b, h, q, k: (q * 65536) * (k * 65536) > 0,
        "neg of the least": lambda b, h, q, k: -(near[q] - 3 + k * 0) > 0,
        "abs of the least": lambda b, h, q, k: jnp.abs(near[q] - 3 + k * 0) >= 0,
        "power wraps": lambda b, h, q, k: lax.integer_pow(q * 900 + k, 3) > 0,
        "square wraps": lambda b, h, q, k: lax.integer_pow(q * 2000 - k, 2) >= 0,
        "unsigned sub": lambda b, h, q, k: unsigned[q] - k.astype("uint32") < jnp.uint32(100),
        "unsigned add": lambda b, h, q, k: unsigned[q] + k.astype("uint32") > jnp.uint32(4),
        "unsigned neg": lambda b, h, q, k: -(unsigned[q] + k.astype("uint32") * 0) > jnp.uint32(9),
        "unsigned of negative": lambda b, h, q, k: (q - k).astype("uint32") > jnp.uint32(50),
        "signed of large unsigned": lambda b, h, q, k: (
            (unsigned[q] ^ k.astype("uint32")).astype("int32") > 3
        ),
        "bytes wrap": lambda b, h, q, k: bytes_[q] + k.astype("int8") > jnp.int8(0),
        "narrowing": lambda b, h, q, k: (q * 9 - k).astype("int8") > jnp.int8(0),
        "narrowing unsigned": lambda b, h, q, k: (q - k).astype("uint8") > jnp.uint8(100),
        "shift too far": lambda b, h, q, k: lax.shift_left(k + 1, shift[q]) > 0,
        "shift into the sign": lambda b, h, q, k: (q + k) << 26 > 0,
        "shift by negative": lambda b, h, q, k: lax.shift_right_arithmetic(q + 9, k - 20) > 1,
        "logical shift of negative": lambda b, h, q, k: lax.shift_right_logical(q - k, 1) < 50,
        "div by 0": lambda b, h, q, k: lax.div(q, k - 20) > -1,
        "div the least by -1": lambda b, h, q, k: lax.div(near[q] - 3, -1 - k * 0) < 0,
        "rem by 0": lambda b, h, q, k: lax.rem(q, k - 20) == q,
        "rem of negative": lambda b, h, q, k: lax.rem(q - k, 7) >= 0,
        "rem by negative": lambda b, h, q, k: lax.rem(q - k, -7) > 3,
        "rem by the least": lambda b, h, q, k: lax.rem(q + k, near[q] - 3) > 0,
        "% of negative": lambda b, h, q, k: (q - k) % -5 < -2,
        "// of negative": lambda b, h, q, k: (q - k) // 7 == -1,
        "compare with nan": lambda b, h, q, k: floats[q] < k.astype("float32"),
        "not compare with nan": lambda b, h, q, k: ~(floats[q] <= k.astype("float32")),
        "nan is not itself": lambda b, h, q, k: floats[q] + k.astype("float32") * 0 == floats[q],
        "nan differs": lambda b, h, q, k: floats[q] != k.astype("float32"),
        "max with nan": lambda b, h, q, k: jnp.maximum(floats[q], k.astype("float32")) >= 0,
        "clip nan": lambda b, h, q, k: jnp.clip(floats[q] * k.astype("float32"), 0.0, 1.0) >= 0,
        "sign of nan": lambda b, h, q, k: jnp.sign(floats[q] - k.astype("float32")) <= 1,
        "nan to int": lambda b, h, q, k: (floats[q] * k.astype("float32")).astype("int32") > 1,
        "nan to bool": lambda b, h, q, k: (floats[q] * k.astype("float32")).astype(bool),
        "inf - inf": lambda b, h, q, k: holes[q] - holes[q] * (k + 1).astype("float32") == 0,
        "0 * inf": lambda b, h, q, k: holes[q] * k.astype("float32") >= 0,
        "inf": lambda b, h, q, k: k.astype("float32") < holes[q],
        "overflow to inf": lambda b, h, q, k: huge[q] * (k + 2).astype("float32") > 0,
        "inf to int": lambda b, h, q, k: (huge[q] * (k + 1).astype("float32")).astype("int32") > 0,
        "div by 0.0": lambda b, h, q, k: 1.0 / (q - k).astype("float32") > 0,
        "log of negative": lambda b, h, q, k: jnp.log((q - k - 3).astype("float32")) < 9,
        "sqrt of negative": lambda b, h, q, k: (
            ~(jnp.sqrt((q - k).astype("float32") * floats[q]) < 3)
        ),
        "tanh of inf": lambda b, h, q, k: jnp.tanh(holes[q] * k.astype("float32")) <= 1,
        "is finite": lambda b, h, q, k: jnp.isfinite(holes[q] * k.astype("float32")),
        "float eq": lambda b, h, q, k: q.astype("float32") * 0.1 == k.astype("float32") * 0.1,
        "float sum": lambda b, h, q, k: (
            q.astype("float32") * 0.1 + k.astype("float32") * 0.2 <= 4.1
        ),
        "float rounding": lambda b, h, q, k: (
            (q + 2**24).astype("float32") + k.astype("float32") > 2**24 + 60
        ),
        "bf16": lambda b, h, q, k: (q + k).astype("bfloat16") * jnp.bfloat16(3) > jnp.bfloat16(100),
        "f16 overflow": lambda b, h, q, k: (q * k * 100).astype("float16") < jnp.float16(jnp.inf),
        "where on nan": lambda b, h, q, k: jnp.where(q > k, floats[q], k.astype("float32")) > 1,
        "select outside": lambda b, h, q, k: lax.select_n((q > k).astype("int32"), q, k, q + k) > 9,
        "not, ragged": lambda b, h, q, k: ~((q < T) & (k < S)),
        "not of a window": lambda b, h, q, k: ~(jnp.abs(q - k) < 60),
        "int not": lambda b, h, q, k: ~(q - k) > 3,
        "int and": lambda b, h, q, k: (q - 20) & (k + 1) > 3,
        "int or": lambda b, h, q, k: (q - 20) | (k + 1) > 3,
        "int xor": lambda b, h, q, k: (q ^ k) > 15,
        "no rule": lambda b, h, q, k: lax.population_count(q ^ k) > 2,
        "no rule, decided": lambda b, h, q, k: (lax.population_count(q ^ k) > 2) & (q < 16),
        "no rule, vector": lambda b, h, q, k: jnp.sort(jnp.stack([q, k, h]))[1] > 2,
        "argmax": lambda b, h, q, k: jnp.argmax(jnp.stack([q, k])) == 1,
        "table out of range": lambda b, h, q, k: LEAVES["table"][q - 20, k - 30],
        "table of both": lambda b, h, q, k: LEAVES["table"][(q + k) // 9, k // 9],
        "table twice": lambda b, h, q, k: LEAVES["table"][q // 9, (q % 5)] & (k > 1),
        "table, filled": lambda b, h, q, k: (
            LEAVES["sorted"].at[b, q + k - 30].get(mode="fill", fill_value=7) > 1
        ),
        "table of numbers": lambda b, h, q, k: near[jnp.minimum(q // 3 + 0 * k, T - 1)] + k > 0,
        "table of nan": lambda b, h, q, k: ~(floats[(q + k) // 3] < 5),
    }


@pytest.mark.parametrize("name", nasty())
def test_nasty(name, monkeypatch):
    monkeypatch.setattr(intervals, "_BLOCKS", 0)
    mask = canonicalize(as_mask(nasty()[name]))
    found, cells = predicates.quick(lambda mask: (states(mask), mask.dense(T, S, B, N)))(mask)
    assert_sound(found, tile_states(np.asarray(cells)))


# --- positions, sharding, tracing -----------------------------------------------------------------

EXTREME = ["user: mixed documents", "user: relative", "user: table of blocks", "dilated & window"]


@pytest.mark.parametrize("name", [*EXTREME, "user: cond", "heads", "xor", "dense4", "blocks"])
def test_traced_positions(name, monkeypatch):
    monkeypatch.setattr(intervals, "_BLOCKS", 100)
    mask = canonicalize(predicates.everything()[name])
    random = np.random.default_rng(0)

    @predicates.quick
    def both(at):
        return states(mask, at), mask.dense(T, S, B, N, at)

    for shift in (0, 9):
        q = (random.permutation(T)[None] + np.array([[0], [1]]) * shift) % T
        at = Positions(q=jnp.asarray(q, jnp.int32), k=jnp.arange(S) - shift, b=jnp.array([1, 0]))
        found, cells = both(at)
        assert_sound(found, tile_states(np.asarray(cells)))


def tiles_of_rows(ids, table):
    """The states of a mask that closes over one row of each."""
    mask = as_mask(lambda b, h, q, k: (ids[q] == ids[k]) & table[h, q // 5, k // 5] & (q >= k - 3))
    parts = split(mask)
    return intervals.states(parts, parts.operands(Positions(), 1, N, T, T), *TILE, T, T)[0]


def sharded(check_vma):
    mesh = jax.make_mesh((B,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:B])
    x = PartitionSpec("x")
    return jax.shard_map(
        jax.vmap(tiles_of_rows), mesh=mesh, in_specs=(x, x), out_specs=x, check_vma=check_vma
    )


@pytest.mark.parametrize(
    "run",
    [jax.vmap(tiles_of_rows), sharded(True), sharded(False)],
    ids=["vmap", "shard_map", "shard_map without vma"],
)
def test_transformations(run):
    ids, table = jnp.asarray(predicates.IDS_Q), jnp.asarray(predicates.TABLE)
    mask = masks.segments(ids) & masks.block_sparse(table, 5) & masks.causal(3)
    cells = np.asarray(predicates.quick(lambda: mask.dense(T, T, B, N))())
    assert (predicates.quick(run)(ids, table) == tile_states(cells)).all()


# --- tightness ------------------------------------------------------------------------------------

# Without blocks these are truly mixed only where both conditions are: nothing says that one empties
# what the other leaves.
JOINT = {"neighborhood", "block diffusion", "dilated & causal", "not (window or blocks)", "xor"}


@pytest.mark.parametrize("name", everyday(predicates.library()))
def test_masks_of_the_library_are_tight(name, cuts):
    if cuts == "bounds of tiles" and name in JOINT:
        pytest.skip("two conditions together are decided by smaller blocks")
    expected = predicates.library_states(name)
    mask = predicates.library()[name]
    found = np.broadcast_to(compiled(mask), expected.shape)
    assert (found == expected).all()


@pytest.mark.parametrize("offset", [5, 30])
def test_decoding_is_tight(offset, cuts):
    at = Positions(q=jnp.arange(T)[None] + jnp.array([[0], [1]]) * offset, k=jnp.arange(S))
    mask = (masks.sliding_window(9) | masks.chunked(8)) & masks.causal()
    expected = tile_states(predicates.brute(mask, at))
    found = compiled(mask, at)
    assert (np.broadcast_to(found, expected.shape) == expected).all()


def test_extents_are_1_where_nothing_depends_on_b_or_h():
    shape = tile_states(np.zeros((1, 1, T, S))).shape[2:]
    expected = {"causal": (1, 1), "segments": (B, 1), "heads": (1, N), "blocks": (B, N)}
    for name, lead in expected.items():
        found = jax.eval_shape(states, predicates.library()[name])
        assert (found.shape, found.dtype) == ((*lead, *shape), jnp.int8)


def test_what_has_no_rule_is_named():
    assert intervals.unruled(split(as_mask(nasty()["no rule"]))) == ("population_count",)
    assert intervals.unruled(split(masks.causal())) == ()


@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 77), (200, 3)])
def test_other_extents(t, s):
    @predicates.quick
    def both(mask):
        parts = split(mask)
        operands = parts.operands(Positions(), 1, 1, t, s)
        return intervals.states(parts, operands, 64, 32, t, s), mask.dense(t, s)

    for mask in (masks.causal(), masks.dilated(3) & masks.sliding_window(50, 9)):
        found, cells = both(mask)
        assert (np.asarray(found) == tile_states(np.asarray(cells), (64, 32))).all()

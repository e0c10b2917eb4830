"""Wrong calls, one a row: the right type, and a message that says argument, got, expected, remedy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn import masks, scores

Q, KV = (2, 3, 4, 8), (2, 5, 2, 8)  # T = 3, S = 5, N = 4, K = 2


def call(query: Any = Q, key: Any = KV, value: Any = KV, **options: Any) -> Any:
    """A call of attention that is right but for what the row says."""
    arrays = [jnp.ones(x) if isinstance(x, tuple) else x for x in (query, key, value)]
    return ja.attention(*arrays, **options)


def _float_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k).astype(jnp.float32)


def _vector_mask(b: Any, h: Any, q: Any, k: Any) -> Any:
    return jnp.arange(3) < k


V, T = ValueError, TypeError
NAN = float("nan")

# name, the call, the exception, and what the message has to say, in this order.
CALLS: list[tuple[str, Any, type[Exception], str]] = [
    # Shapes and dtypes of query, key and value.
    ("query rank 2", lambda: call((3, 8)), V, r"query: got shape \[3, 8\], expected \[batch"),
    ("query rank 5", lambda: call((1, *Q)), V, r"query: got shape \[1, 2, 3, 4, 8\]"),
    ("key rank 3", lambda: call(key=KV[1:]), V, r"key: got shape \[5, 2, 8\], expected rank 4"),
    ("value rank 3", lambda: call(value=KV[1:]), V, r"value: got shape \[5, 2, 8\], .*rank 4"),
    ("query unbatched, key not", lambda: call(Q[1:]), V, r"key: got shape .*expected rank 3"),
    ("key batch", lambda: call(key=(1, 5, 2, 8)), V, r"key: got shape \[1, 5, 2, 8\], expected \[2"),
    ("key head dim", lambda: call(key=(2, 5, 2, 6)), V, r"key: got .*6\], expected .*8\] with a query"),
    ("value length", lambda: call(value=(2, 4, 2, 8)), V, r"value: got \S+ \[2, 4, .*expected \[2, 5, 2"),
    ("value heads", lambda: call(value=(2, 5, 4, 8)), V, r"value: got .*\[2, 5, 4, 8\], .*\[2, 5, 2"),
    ("heads not a multiple", lambda: call(key=(2, 5, 3, 8), value=(2, 5, 3, 8)), V,
     "key: got 3 heads, expected a divisor of the query's 4"),
    ("more key heads", lambda: call(key=(2, 5, 8, 8), value=(2, 5, 8, 8)), V, "key: got 8 heads"),
    ("no key heads", lambda: call(key=(2, 5, 0, 8), value=(2, 5, 0, 8)), V, "key: got 0 heads"),
    ("integer query", lambda: call(jnp.ones(Q, int)), T, "query: got dtype int32, expected float16"),
    ("boolean value", lambda: call(value=jnp.ones(KV, bool)), T, "value: got dtype bool"),
    ("float8 key", lambda: call(key=jnp.ones(KV, jnp.float8_e4m3fn)), T, "key: got dtype float8"),
    ("complex key", lambda: call(key=jnp.ones(KV, jnp.complex64)), T, "key: got dtype complex64"),
    ("mixed dtypes", lambda: call(key=jnp.ones(KV, jnp.bfloat16)), T,
     "key, value: got dtypes bfloat16, float32, expected float32.*cast"),
    ("query is a string", lambda: call("q"), T, "query: got str, expected an array"),
    ("query is None", lambda: call(None), T, "query: got NoneType, expected an array"),
    # What is no array.
    ("no mask of a tokenizer", lambda: masks.from_array(None, "hf"), T,
     r"from_array\(array\): got NoneType, expected an array of the 'hf' convention"),
    ("array of nothing", lambda: masks.dense(None), T, "mask: got NoneType, expected booleans"),
    ("padding of words", lambda: masks.key_padding("ab"), T,
     r"key_padding\(valid\): got str, expected booleans \[S\] or \[B, S\]"),
    ("ids of rows of different lengths", lambda: masks.segments([[1, 1], [1]]), T,
     r"segments\(q_ids\): got list, expected integers \[T\] or \[B, T\]"),
    ("a set of lengths", lambda: masks.key_padding(lengths={3, 5}), T, "got set, expected integers"),
    ("a table of a dictionary", lambda: scores.bias({}), T, r"bias\(array\): got dict, expected floats"),
    ("scores of no blocks", lambda: masks.top_blocks(None, 1, 2), T, "got NoneType, expected floats"),
    ("positions of words", lambda: call(positions=ja.Positions(q=object())), T,
     r"positions.q: got object, expected integers \[3\] or \[2, 3\]"),
    # Masks.
    ("additive array as mask", lambda: call(mask=jnp.zeros((3, 5))), T,
     "mask: got an array of float32, expected booleans.*from_array.*scores.bias"),
    ("integer array as mask", lambda: call(mask=jnp.ones((3, 5), int)), T,
     "mask: got an array of int32, expected booleans.*from_array"),
    ("NumPy float mask", lambda: call(mask=np.zeros((3, 5))), T, "mask: got an array of float"),
    ("mask [B, S]", lambda: call(mask=jnp.ones((2, 5), bool)), V,
     r"mask: got .*\[2, 5\], expected \[T, S\] = \[3, 5\].*key_padding"),
    ("mask [S]", lambda: call(mask=jnp.ones(5, bool)), V, r"mask: got .*\[5\], expected \[T, S\]"),
    ("mask rank 3", lambda: call(mask=jnp.ones((2, 3, 5), bool)), V, r"mask: got .*\[2, 3, 5\]"),
    ("mask [1, S] of rank 2", lambda: call(mask=jnp.ones((1, 5), bool)), V, r"mask: got .*\[1, 5\]"),
    ("mask batch", lambda: call(mask=jnp.ones((3, 1, 3, 5), bool)), V,
     r"mask: got .*\[3, 1, 3, 5\], expected \[2\|1, 4\|1, 3\|1, 5\|1\]"),
    ("mask of kv heads", lambda: call(mask=jnp.ones((2, 2, 3, 5), bool)), V, r"mask: .*4\|1"),
    ("mask a list", lambda: call(mask=[[True] * 5] * 3), T, "mask: got list, expected a Mask"),
    ("mask a bool", lambda: call(mask=True), T, r"mask: got True; say masks.full\(\)"),
    ("mask a string", lambda: call(mask="causal"), T, r"mask: got 'causal', say masks\.causal\(\)"),
    ("mask the constructor", lambda: call(mask=masks.causal), T, "causal"),
    ("predicate of floats", lambda: call(mask=_float_mask), T,
     "_float_mask.*returned float32.*expected a single bool.*jaxattn.scores"),
    ("predicate of vectors", lambda: call(mask=_vector_mask), T, r"returned bool\[3\], expected"),
    ("predicate of None", lambda: call(mask=lambda b, h, q, k: None), T, "returned NoneType"),
    ("predicate of too few arguments", lambda: call(mask=lambda q, k: q >= k), T, "argument"),
    ("padding for another batch", lambda: call(mask=masks.key_padding(jnp.ones((3, 5), bool))), V,
     r"key_padding|key_valid"),
    ("padding for another length", lambda: call(mask=masks.key_padding(jnp.ones((2, 4), bool))), V,
     r"\[2, 4\]|4.*5"),
    ("lengths for another batch", lambda: call(mask=masks.key_padding(lengths=jnp.ones(3, int))),
     V, r"\[3\]|3.*2"),
    ("windows for other heads", lambda: call(mask=masks.sliding_window(jnp.ones(2, int))), V,
     r"\[2\]|2.*4"),
    ("ids of queries for keys", lambda: call(mask=masks.segments(jnp.ones((2, 3), int))), V,
     r"\[2, 3\]|3.*5"),
    ("array of another length in a composite",
     lambda: call(mask=masks.causal() & jnp.ones((3, 4), bool)), V, r"\[3, 4\]|4.*5"),
    ("closure over an array of another length",
     lambda: call(mask=lambda b, h, q, k: jnp.ones((2, 4), bool)[b, k]), V, r"\[2, 4\]|4.*5"),
    ("float array in a composite", lambda: masks.causal() & jnp.ones((3, 5)), T, "booleans"),
    ("None in a composite", lambda: masks.causal() & None, T, "&: got NoneType, expected a Mask"),
    ("and", lambda: masks.causal() and masks.full(), T, "truth value.*`&`, `|`, `~`"),
    # Constructors of masks.
    ("negative window", lambda: masks.sliding_window(-1), V,
     r"sliding_window\(left\): got -1, expected at least 0"),
    ("negative right window", lambda: masks.sliding_window(2, jnp.asarray([1, -2])), V,
     r"sliding_window\(right\): got -2"),
    ("float window", lambda: masks.sliding_window(2.5), T, r"sliding_window\(left\): .*integers"),
    ("window rank 2", lambda: masks.sliding_window(jnp.ones((2, 2), int)), V, r"\[2, 2\].*\[N\]"),
    ("negative lengths", lambda: masks.key_padding(lengths=jnp.asarray([3, -1])), V,
     r"key_padding\(lengths\): got -1, expected at least 0"),
    ("float lengths", lambda: masks.key_padding(lengths=jnp.asarray([3.0])), T, "lengths.*float32"),
    ("lengths as validity", lambda: masks.key_padding(jnp.asarray([3, 2])), T,
     r"key_padding\(valid\): got dtype int32, expected booleans"),
    ("neither valid nor lengths", masks.key_padding, V, "got neither of `valid` and `lengths`"),
    ("both valid and lengths",
     lambda: masks.query_padding(jnp.ones(3, bool), lengths=2), V, "got both"),
    ("additive padding", lambda: masks.key_padding(jnp.zeros((2, 5))), T, "booleans.*from_array"),
    ("negative prefix", lambda: masks.prefix_lm(-3), V, r"prefix_lm\(lengths\): got -3"),
    ("boolean offset", lambda: masks.causal(True), T, r"causal\(offset\): got True, .*integers"),
    ("float offset", lambda: masks.causal(jnp.float32(1)), T, r"causal\(offset\): .*float32"),
    ("chunks of 0", lambda: masks.chunked(0), V, r"chunked\(size\): got 0, expected at least 1"),
    ("rate of 0", lambda: masks.dilated(0), V, r"dilated\(rate\): got 0"),
    ("float ids", lambda: masks.segments(jnp.ones((2, 3))), T, r"segments\(q_ids\): .*float32"),
    ("negative global", lambda: masks.global_tokens(-1), V, r"global_tokens\(n\): got -1"),
    ("radius too large", lambda: masks.neighborhood((4, 4), 2), V, r"neighborhood\(radius\): got 2"),
    ("radii too many", lambda: masks.neighborhood((4, 4), (1, 1, 1)), V, r"neighborhood\(radius\)"),
    ("integer table", lambda: masks.block_sparse(jnp.ones((2, 2), int), 4), T, r"\(table\).*bool"),
    ("table rank 1", lambda: masks.block_sparse(jnp.ones(2, bool), 4), V, r"\(table\).*\[Q, K\]"),
    ("block of 0", lambda: masks.block_sparse(jnp.ones((2, 2), bool), 0), V, r"\(block\): got 0"),
    ("too many random blocks", lambda: masks.random_blocks(jax.random.key(0), 5, 4, 16), V,
     r"random_blocks\(count\): got 5, expected at most 4"),
    ("table of indices",
     lambda: masks.top_blocks(jnp.ones((2, 2), int), 1, 4), T, r"\(block_scores\): got dtype int32"),
    ("scores rank 1", lambda: masks.top_blocks(jnp.ones(2), 1, 4), V, r"\(block_scores\).*\[Q, K\]"),
    ("a count below 0", lambda: masks.top_blocks(jnp.ones((2, 2)), -1, 4), V, r"\(count\): got -1"),
    ("three sides", lambda: masks.block_sparse(jnp.ones((2, 2), bool), (1, 2, 3)), V,
     r"\(block\): got \(1, 2, 3\), expected one integer, or \(queries, keys\)"),
    ("side of 0", lambda: masks.top_blocks(jnp.ones((2, 2)), 1, (1, 0)), V, r"\(block\)\[1\]: got 0"),
    ("tile that does not fit", lambda: masks.neighborhood((4, 6), 0, tile=(2, 4)), V,
     r"neighborhood\(tile\): got \(2, 4\), expected a divisor of each extent of shape \(4, 6\)"),
    ("radius of tiles", lambda: masks.neighborhood((4, 4), 1, tile=(2, 2)), V, "extent 2 tiles"),
    ("float spans", lambda: masks.spans(jnp.ones(3)), T, r"spans\(ids\): got dtype float32"),
    ("span below -1", lambda: masks.spans(jnp.array([-2, 0])), V, r"spans\(ids\): got -2"),
    ("a node that is not there", lambda: masks.tree(jnp.array([-1, 0]), ids=jnp.array([0, 2])), V,
     r"tree\(ids\): got node 2, expected less than 2"),
    ("rows of another tree",
     lambda: masks.tree(-jnp.ones((2, 1), int), ids=jnp.zeros((3, 4), int)), V, "got 3 rows"),
    ("child before parent", lambda: masks.tree(jnp.asarray([1, -1])), V, "parents.*sort the nodes"),
    ("parent below -1", lambda: masks.tree(jnp.asarray([-2, 0])), V, r"tree\(parents\): got -2"),
    ("half of 0", lambda: masks.block_diffusion(0, 4), V, r"block_diffusion\(length\): got 0"),
    ("no heads", lambda: masks.per_head([]), V, r"per_head\(masks\): got \[\]"),
    ("a head that is no mask", lambda: masks.per_head([masks.causal(), 3]), T, r"masks\[1\].*int"),
    ("predicate of a number", lambda: masks.predicate(3), T, r"predicate\(fn\): got int"),
    ("negative T", lambda: masks.causal().dense(-1, 3), V, r"dense\(T=\): got -1"),
    ("float T", lambda: masks.causal().dense(2.0, 3), V, r"dense\(T=\): got 2.0"),
    # Arrays of other conventions.
    ("unknown convention", lambda: masks.from_array(jnp.ones((2, 2), bool), "torch"), V,
     "convention.*got 'torch', expected one of 'attend', 'ignore'"),
    ("0 and 1 as additive", lambda: masks.from_array(jnp.eye(3), "additive"), V,
     "only 0 and 1 with convention 'additive'.*'attend'.*'ignore'"),
    ("a bias as additive", lambda: masks.from_array(jnp.asarray([[0, -0.5]]), "additive"), V,
     "value -0.5 .*'additive'.*scores.bias"),
    ("too small a constant", lambda: masks.from_array(jnp.asarray([[0, -100.0]]), "additive"), V,
     "value -100.0.*at most -10000"),
    ("NaN as additive", lambda: masks.from_array(jnp.asarray([[0, NAN]]), "additive"), V, "nan"),
    ("+inf as additive", lambda: masks.from_array(jnp.asarray([[0, jnp.inf]]), "additive"), V, "inf"),
    ("booleans as additive", lambda: masks.from_array(jnp.ones((2, 2), bool), "additive"), T,
     "got dtype bool with convention 'additive', expected floats.*'attend'"),
    ("additive as attend", lambda: masks.from_array(jnp.zeros((2, 2)), "attend"), T,
     "got dtype float32 with convention 'attend'.*'additive'"),
    ("additive as hf", lambda: masks.from_array(jnp.asarray([[0, -1e9]]), "hf"), V,
     "value -1000000000.0 with convention 'hf', expected only 0 and 1.*'additive'"),
    ("counts as keras", lambda: masks.from_array(jnp.asarray([[0, 7]]), "keras"), V, "value 7"),
    ("complex", lambda: masks.from_array(jnp.ones((2, 2), jnp.complex64), "flax"), T, "real dtype"),
    ("rank 1", lambda: masks.from_array(jnp.ones(3, bool), "attend"), V, r"shape \[3\].*rank 2, 3"),
    ("rank 5", lambda: masks.from_array(jnp.ones((1,) * 5, bool), "ignore"), V, "rank 2, 3 or 4"),
    # Scores.
    ("array as score", lambda: call(score=jnp.zeros((3, 5))), T,
     r"score: got .*expected a Score.*scores.bias\(array\)"),
    ("number as score", lambda: call(score=2.0), T, "score: got float, expected a Score"),
    ("score of booleans", lambda: call(score=lambda x, b, h, q, k: q >= k), T,
     "returned bool.*expected a single float.*jaxattn.masks"),
    ("score of vectors", lambda: call(score=lambda x, b, h, q, k: x * jnp.ones(2)), T,
     r"returned float32\[2\]"),
    ("mask as score", lambda: call(score=masks.causal()), T, r"score: got the mask causal\(\), .*as mask="),
    ("slopes for other heads", lambda: call(score=scores.alibi(jnp.ones(3))), V, r"\[3\]|3.*4"),
    ("table for other heads", lambda: call(score=scores.relative_bias(jnp.ones((2, 8)))), V,
     r"\[2, 8\]|2.*4"),
    ("bias of another shape", lambda: call(score=scores.bias(jnp.ones((5, 3)))), V, r"\[5, 3\]|5"),
    # Everything else.
    ("NaN scale", lambda: call(scale=NAN), V, "scale: got nan, expected a finite number"),
    ("infinite scale", lambda: call(scale=float("inf")), V, "scale: got inf"),
    ("scale of heads", lambda: call(scale=jnp.ones(4)), V, "scale: .*expected one real number"),
    ("scale a string", lambda: call(scale="auto"), V, "scale: got 'auto', expected one real number"),
    ("sinks of kv heads", lambda: call(sinks=jnp.zeros(2)), V, r"sinks: got .*\[2\].*\[N\] = \[4\]"),
    ("integer sinks", lambda: call(sinks=jnp.zeros(4, int)), T, "sinks: got .*int32.*floats"),
    ("positions a tuple", lambda: call(positions=(0, 1)), T, "positions: got tuple, expected Pos"),
    ("positions an array", lambda: call(positions=jnp.arange(3)), T, "positions: got .*expected Pos"),
    ("float positions", lambda: call(positions=ja.Positions(q=jnp.ones(3))), T,
     "positions.q: got dtype float32, expected integers"),
    ("too few positions", lambda: call(positions=ja.Positions(q=jnp.arange(2))), V,
     r"positions.q: got shape \[2\], expected \[3\]"),
    ("positions of another batch", lambda: call(positions=ja.Positions(k=jnp.ones((3, 5), int))), V,
     r"positions.k: got shape \[3, 5\], expected \[5\] or \[2, 5\]"),
    ("positions of kv heads", lambda: call(positions=ja.Positions(h=jnp.arange(2))), V,
     r"positions.h: got shape \[2\], expected \[4\]"),
    ("dropout above 1", lambda: call(dropout_rate=1.5, dropout_seed=0), V,
     "dropout_rate: got 1.5, expected a probability"),
    ("negative dropout", lambda: call(dropout_rate=-0.1, dropout_seed=0), V, "dropout_rate: got -0.1"),
    ("NaN dropout", lambda: call(dropout_rate=NAN, dropout_seed=0), V, "dropout_rate: got nan"),
    ("dropout without a seed", lambda: call(dropout_rate=0.1), V,
     "dropout_seed: got None with dropout_rate=0.1.*jax.random.key"),
    ("float seed", lambda: call(dropout_rate=0.1, dropout_seed=0.5), T, "dropout_seed: got float"),
    ("several keys", lambda: call(dropout_rate=0.1, dropout_seed=jax.random.split(jax.random.key(0))),
     V, r"dropout_seed: got keys of shape \[2\], expected one"),
    ("negative seed", lambda: call(dropout_rate=0.1, dropout_seed=-1), V, "dropout_seed: got -1"),
    ("seed of 33 bits", lambda: call(dropout_rate=0.1, dropout_seed=2**32), V, "dropout_seed: got 4"),
    ("unknown backend", lambda: call(backend="flash"), V,
     "backend: got 'flash', expected one of 'auto', 'dense'"),
    ("weights of another head dim", lambda: ja.attention_weights(jnp.ones(Q), jnp.ones((2, 5, 2, 6))),
     V, r"key: got shape \[2, 5, 2, 6\]"),
]  # fmt: skip


def test_there_are_enough() -> None:
    assert len(CALLS) >= 60
    assert len({name for name, *_ in CALLS}) == len(CALLS)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(("wrong", "kind", "says"), [row[1:] for row in CALLS],
                         ids=[row[0] for row in CALLS])  # fmt: skip
def test_wrong_call(wrong: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        wrong()


# Faults of values, which are unknown under jit: there the check is the caller's.
BY_VALUE = {
    "negative right window", "negative lengths", "child before parent", "parent below -1",
    "0 and 1 as additive", "a bias as additive", "too small a constant", "NaN as additive",
    "+inf as additive", "additive as hf", "counts as keras", "span below -1", "a node that is not there",
}  # fmt: skip


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(("wrong", "kind", "says"), [row[1:] for row in CALLS if
                         row[0] not in BY_VALUE], ids=[row[0] for row in CALLS if
                         row[0] not in BY_VALUE])  # fmt: skip
def test_wrong_call_under_jit(wrong: Any, kind: type[Exception], says: str) -> None:
    """With every array traced: what is static is found all the same."""
    with pytest.raises(kind, match=f"(?s){says}"):
        jax.jit(wrong)()


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        (lambda x: call(mask=x), T, "mask: got an array of float32"),
        (lambda x: call(mask=x > 0), V, r"mask: got .*\[2, 2\], expected \[T, S\]"),
        (lambda x: call(mask=lambda b, h, q, k: x[q, k]), T, "returned float32"),
        (lambda x: call(mask=lambda b, h, q, k: x[q, k] > 0), V, r"\[2, 2\]|2.*3"),
        (lambda x: call(score=scores.bias(x)), V, r"\[2, 2\]|2.*3"),
        (lambda x: call(sinks=x), V, r"sinks: got .*\[2, 2\]"),
        (lambda x: masks.key_padding(x), T, "valid.*float32"),
        (lambda x: masks.from_array(x, "keras"), T, "float32"),
        (lambda x: call(scale=x), V, "scale: "),
    ],
    ids=["float", "shape", "predicate", "extent", "bias", "sinks", "valid", "keras", "scale"],
)
def test_wrong_tracers(wrong: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}"):
        jax.jit(wrong)(jnp.ones((2, 2)))


@pytest.mark.usefixtures("own_errors")
def test_a_python_condition_on_positions_says_what_to_write() -> None:
    """`if`, `and` or `not` in a predicate meets a traced value; JAX's own error is its cause."""
    with pytest.raises(TypeError, match=r"jnp\.where"):
        call(mask=lambda b, h, q, k: q >= k and k < 3)

"""Masks and scores by name, each with the formula it has to equal, written in NumPy.

A mask case makes a mask of the library for given extents, and says which cells it must keep:
`cell(b, h, q, k)` on integer arrays that broadcast. Where the library's line of maths could share a
mistake with ours, the table of cells is built by loops instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import masks, scores
from jaxattn.backends import base
from jaxattn.dispatch import ACCELERATED, BACKENDS
from jaxattn.masks.positions import Positions
from jaxattn.scores import as_score
from jaxattn.tiles.tile_map import TileMap
from jaxattn.tracing.split import split

# The backends that some call can run on here; kernels for accelerators have tests of their own.
HERE = [name for name in BACKENDS if name not in ACCELERATED or jax.default_backend() != "cpu"]

Cell = Callable[[Any, Any, Any, Any], Any]


class MaskCase(NamedTuple):
    """A mask, and the cells it has to keep."""

    mask: Any
    cell: Cell


MASKS: dict[str, Callable[[int, int, int, int], MaskCase]] = {}
# Masks whose arrays are read at both `q` and `k` need as many keys as queries.
SQUARE: set[str] = set()


def _case(make: Any = None, *, square: bool = False) -> Any:
    def register(make: Callable[[int, int, int, int], MaskCase]) -> Any:
        MASKS[make.__name__] = make
        if square:
            SQUARE.add(make.__name__)
        return make

    return register if make is None else register(make)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([20240229, *seed])


def grid(B: int, N: int, T: int, S: int, **at: Any) -> tuple[Any, Any, Any, Any]:
    """Positions that broadcast to `[B, N, T, S]`; `q=[T]` or `[B, T]` and so on say others."""
    b = np.asarray(at.get("b", np.arange(B))).reshape(B, 1, 1, 1)
    h = np.asarray(at.get("h", np.arange(N))).reshape(1, N, 1, 1)
    q = np.asarray(at.get("q", np.arange(T))).reshape(-1, 1, T, 1)
    k = np.asarray(at.get("k", np.arange(S))).reshape(-1, 1, 1, S)
    return b, h, q, k


def cells(cell: Cell, B: int, N: int, T: int, S: int, **at: Any) -> np.ndarray:
    """The cells that `cell` keeps, `[B, N, T, S]`."""
    return np.broadcast_to(np.asarray(cell(*grid(B, N, T, S, **at)), bool), (B, N, T, S))


def lengths(B: int, most: int) -> np.ndarray:
    """Lengths of B sequences: a full one first, then shorter ones, one of them 0."""
    return np.array([most, 0, most // 2 + 1, 1, most - 1])[np.arange(B) % 5].astype(np.int32)


def flags(*shape: int) -> np.ndarray:
    return rng(*shape, 1).random(shape) < 0.6


def documents(*shape: int) -> np.ndarray:
    """Segment ids in no order."""
    return rng(*shape, 2).integers(0, 3, shape).astype(np.int32)


@_case
def full(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.full(), lambda b, h, q, k: True)


@_case
def empty(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.empty(), lambda b, h, q, k: False)


@_case
def causal(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.causal(), lambda b, h, q, k: k <= q)


@_case
def causal_bottom_right(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.causal(S - T), lambda b, h, q, k: (T - 1) - q <= (S - 1) - k)


@_case
def causal_offset_per_row(B: int, N: int, T: int, S: int) -> MaskCase:
    offset = np.arange(B, dtype=np.int32) - 1
    return MaskCase(masks.causal(jnp.asarray(offset)), lambda b, h, q, k: k - offset[b] <= q)


@_case
def window_left(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.sliding_window(2), lambda b, h, q, k: (k <= q) & (k >= q - 2))


@_case
def window_both(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.sliding_window(1, 3), lambda b, h, q, k: (k <= q + 3) & (k >= q - 1))


@_case
def window_per_head(B: int, N: int, T: int, S: int) -> MaskCase:
    left, right = np.arange(N, dtype=np.int32), np.arange(N, dtype=np.int32)[::-1] // 2
    return MaskCase(
        masks.sliding_window(jnp.asarray(left), jnp.asarray(right)),
        lambda b, h, q, k: (k >= q - left[h]) & (k <= q + right[h]),
    )


@_case
def prefix_one(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.prefix_lm(3), lambda b, h, q, k: (k <= 2) | (k <= q))


@_case
def prefix_per_row(B: int, N: int, T: int, S: int) -> MaskCase:
    n = lengths(B, S)
    return MaskCase(masks.prefix_lm(jnp.asarray(n)), lambda b, h, q, k: (k < n[b]) | (k <= q))


@_case
def segments_two(B: int, N: int, T: int, S: int) -> MaskCase:
    q_ids, k_ids = documents(T), documents(B, S)
    return MaskCase(
        masks.segments(jnp.asarray(q_ids), jnp.asarray(k_ids)),
        lambda b, h, q, k: q_ids[q] == k_ids[b, k],
    )


@_case(square=True)
def segments_packed(B: int, N: int, T: int, S: int) -> MaskCase:
    ids = np.sort(documents(B, T), axis=1)
    return MaskCase(
        masks.segments(jnp.asarray(ids)) & masks.causal(),
        lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (k <= q),
    )


@_case
def padding_flags(B: int, N: int, T: int, S: int) -> MaskCase:
    valid = flags(B, S)
    return MaskCase(masks.key_padding(jnp.asarray(valid)), lambda b, h, q, k: valid[b, k])


@_case
def padding_shared(B: int, N: int, T: int, S: int) -> MaskCase:
    valid = flags(S)
    return MaskCase(masks.key_padding(valid), lambda b, h, q, k: valid[k])


@_case
def padding_right(B: int, N: int, T: int, S: int) -> MaskCase:
    n = lengths(B, S)
    return MaskCase(
        masks.key_padding(lengths=jnp.asarray(n)) & masks.causal(),
        lambda b, h, q, k: (k < n[b]) & (k <= q),
    )


@_case
def padding_left(B: int, N: int, T: int, S: int) -> MaskCase:
    pads = lengths(B, S)[::-1].copy()
    # Queries before the first real key see nothing.
    return MaskCase(
        masks.causal() & ~masks.key_padding(lengths=jnp.asarray(pads)),
        lambda b, h, q, k: (k >= pads[b]) & (k <= q),
    )


@_case
def padding_queries(B: int, N: int, T: int, S: int) -> MaskCase:
    valid, n = flags(B, T), lengths(B, S)
    return MaskCase(
        masks.query_padding(jnp.asarray(valid)) & masks.key_padding(lengths=jnp.asarray(n)),
        lambda b, h, q, k: valid[b, q] & (k < n[b]),
    )


@_case
def padding_query_lengths(B: int, N: int, T: int, S: int) -> MaskCase:
    n = lengths(B, T)
    return MaskCase(
        masks.query_padding(lengths=jnp.asarray(n)) & masks.key_padding(lengths=S - 1),
        lambda b, h, q, k: (q < n[b]) & (k < S - 1),
    )


@_case
def chunked(B: int, N: int, T: int, S: int) -> MaskCase:
    def cell(b: Any, h: Any, q: Any, k: Any) -> Any:
        begin = np.maximum(q, k) - np.maximum(q, k) % 3
        return np.minimum(q, k) >= begin

    return MaskCase(masks.chunked(3), cell)


@_case
def dilated(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(masks.dilated(3), lambda b, h, q, k: np.isin(np.abs(q - k) % 3, [0]))


@_case
def global_first(B: int, N: int, T: int, S: int) -> MaskCase:
    return MaskCase(
        masks.global_tokens(2) | masks.sliding_window(1, 1),
        lambda b, h, q, k: (np.minimum(q, k) < 2) | (np.abs(q - k) <= 1),
    )


@_case
def global_per_row(B: int, N: int, T: int, S: int) -> MaskCase:
    n = lengths(B, 3)
    return MaskCase(
        masks.global_tokens(counts=jnp.asarray(n)), lambda b, h, q, k: np.minimum(q, k) < n[b]
    )


@_case(square=True)
def global_flags(B: int, N: int, T: int, S: int) -> MaskCase:
    chosen = rng(B, T, 3).random((B, T)) < 0.2
    return MaskCase(
        masks.global_tokens(jnp.asarray(chosen)), lambda b, h, q, k: chosen[b, q] | chosen[b, k]
    )


@_case(square=True)
def neighborhood(B: int, N: int, T: int, S: int) -> MaskCase:
    height = 1 if T % 2 else 2
    width = T // height
    table = np.zeros((height * width, height * width), bool)

    def nearest(at: int, extent: int, reach: int) -> range:
        """The `2 * reach + 1` nearest, shifted inwards at the borders."""
        first = min(max(at - reach, 0), extent - 2 * reach - 1)
        return range(first, first + 2 * reach + 1)

    for at in range(height * width):
        for row in nearest(at // width, height, 0):
            for column in nearest(at % width, width, 1):
                table[at, row * width + column] = True
    return MaskCase(masks.neighborhood((height, width), (0, 1)), lambda b, h, q, k: table[q, k])


@_case
def block_table(B: int, N: int, T: int, S: int) -> MaskCase:
    table = rng(B, N, 4).random((B, N, -(-T // 2), -(-S // 2))) < 0.5
    spread = table.repeat(2, axis=2).repeat(2, axis=3)
    return MaskCase(
        masks.block_sparse(jnp.asarray(table), 2), lambda b, h, q, k: spread[b, h, q, k]
    )


@_case(square=True)
def tree(B: int, N: int, T: int, S: int) -> MaskCase:
    parents = np.stack(
        [[int(rng(b, i, 5).integers(-1, i)) for i in range(T)] for b in range(B)]
    ).astype(np.int32)
    ancestors = np.zeros((B, T, T), bool)
    for b in range(B):
        for node in range(T):
            at = node
            while at >= 0:
                ancestors[b, node, at] = True
                at = parents[b, at]
    return MaskCase(masks.tree(jnp.asarray(parents)), lambda b, h, q, k: ancestors[b, q, k])


@_case(square=True)
def shared_prefix(B: int, N: int, T: int, S: int) -> MaskCase:
    n, ids = lengths(B, T), documents(T)
    return MaskCase(
        masks.causal() & masks.shared_prefix(jnp.asarray(n), jnp.asarray(ids)),
        lambda b, h, q, k: (k <= q) & ((k < n[b]) | (ids[q] == ids[k])),
    )


@_case(square=True)
def prompts_with_answers(B: int, N: int, T: int, S: int) -> MaskCase:
    """Two prompts a row, 0 and 3; segments 1, 2 and 4 are their answers."""
    ids = np.sort(rng(B, T, 12).integers(0, 5, (B, T)), axis=1).astype(np.int32)
    prompt = np.array([0, 0, 0, 3, 3])
    return MaskCase(
        masks.causal() & masks.tree(jnp.array([-1, 0, 0, -1, 3]), ids=jnp.asarray(ids)),
        lambda b, h, q, k: (k <= q) & ((ids[b, q] == ids[b, k]) | (prompt[ids[b, q]] == ids[b, k])),
    )


@_case(square=True)
def image_spans(B: int, N: int, T: int, S: int) -> MaskCase:
    # Runs of two and three tokens; some touch.
    ids = np.stack([np.resize([-1, 0, 0, 1, 1, 1, -1, -1], T + b)[b:] for b in range(B)])
    table = np.tri(T, dtype=bool) | np.zeros((B, T, T), bool)
    for b in range(B):
        begin = 0
        for end in range(1, T + 1):
            if end == T or ids[b, end] != ids[b, begin]:
                if ids[b, begin] >= 0:
                    table[b, begin:end, begin:end] = True
                begin = end
    mask = masks.causal() | masks.spans(jnp.asarray(ids, jnp.int32))
    return MaskCase(mask, lambda b, h, q, k: table[b, q, k])


@_case
def latest_image(B: int, N: int, T: int, S: int) -> MaskCase:
    """Flamingo: queries are text, keys are images of two tokens each."""
    begins = rng(B, T, 13).random((B, T)) < 0.3
    latest = begins.cumsum(axis=1)
    mask = masks.segments(jnp.asarray(latest, jnp.int32), 1 + jnp.arange(S, dtype=jnp.int32) // 2)
    # Text before the first image sees none.
    return MaskCase(
        mask,
        lambda b, h, q, k: (2 * latest[b, q] - 2 <= k) & (k <= 2 * latest[b, q] - 1),
    )


@_case
def top_blocks(B: int, N: int, T: int, S: int) -> MaskCase:
    given = rng(B, N, T, S, 14).normal(size=(B, N, T, -(-S // 3))).astype(np.float32)
    given[..., 0] = -np.inf
    table = np.zeros(given.shape, bool)
    for at in np.ndindex(given.shape[:-1]):
        for block in sorted(range(given.shape[-1]), key=lambda j: -given[at][j])[:2]:
            table[(*at, block)] = given[at][block] > -np.inf
    return MaskCase(
        masks.top_blocks(jnp.asarray(given), 2, (1, 3)), lambda b, h, q, k: table[b, h, q, k // 3]
    )


@_case(square=True)
def sliding_tiles(B: int, N: int, T: int, S: int) -> MaskCase:
    """Tokens of a grid of one row or two, tile by tile; the window is three tiles of columns."""
    height = 1 if T % 2 else 2
    width = T // height
    side = next((s for s in (3, 2) if width % s == 0 and width // s >= 3), 1)
    tiles = width // side
    # The column of tiles of every token, in the order of tokens.
    column = np.array([tile for tile in range(tiles) for _ in range(height * side)])
    table = np.zeros((T, T), bool)
    for at in range(T):
        first = min(max(column[at] - 1, 0), tiles - 3)
        table[at] = (column >= first) & (column <= first + 2)
    mask = masks.neighborhood((height, width), (0, 1), tile=(height, side))
    return MaskCase(mask, lambda b, h, q, k: table[q, k])


@_case(square=True)
def block_diffusion(B: int, N: int, T: int, S: int) -> MaskCase:
    half, block = T // 2, 2
    table = np.zeros((T, T), bool)
    for q in range(T):
        for k in range(T):
            q_clean, k_clean = q >= half, k >= half
            q_block, k_block = q % half // block, k % half // block
            # The three parts of the paper: block-diagonal, offset block-causal, block-causal.
            diagonal = q_block == k_block and q_clean == k_clean
            offset = q_block > k_block and k_clean and not q_clean
            past = q_block >= k_block and k_clean and q_clean
            table[q, k] = diagonal or offset or past
    return MaskCase(masks.block_diffusion(half, block), lambda b, h, q, k: table[q, k])


@_case
def per_head(B: int, N: int, T: int, S: int) -> MaskCase:
    n = lengths(B, S)
    parts = [
        (masks.causal(), lambda b, h, q, k: k <= q),
        (lambda b, h, q, k: k % 2 == 0, lambda b, h, q, k: k % 2 == 0),
        (masks.key_padding(lengths=jnp.asarray(n)), lambda b, h, q, k: k < n[b]),
        (masks.empty(), lambda b, h, q, k: False),
    ]
    chosen = [parts[i % 4] for i in range(N)]

    def cell(b: Any, h: Any, q: Any, k: Any) -> Any:
        return np.concatenate(
            [np.broadcast_to(c(b, h[:, i : i + 1], q, k), (B, 1, T, S)) for i, (_, c) in
             enumerate(chosen)],
            axis=1,
        )  # fmt: skip

    return MaskCase(masks.per_head([mask for mask, _ in chosen]), cell)


@_case
def dense_shared(B: int, N: int, T: int, S: int) -> MaskCase:
    array = flags(T, S)
    return MaskCase(masks.dense(jnp.asarray(array)), lambda b, h, q, k: array[q, k])


@_case
def dense_full(B: int, N: int, T: int, S: int) -> MaskCase:
    array = flags(B, N, T, S)
    return MaskCase(masks.dense(jnp.asarray(array)), lambda b, h, q, k: array[b, h, q, k])


@_case
def dense_keys(B: int, N: int, T: int, S: int) -> MaskCase:
    array = flags(B, 1, 1, S)
    return MaskCase(masks.dense(jnp.asarray(array)), lambda b, h, q, k: array[b, 0, 0, k])


@_case
def dense_heads(B: int, N: int, T: int, S: int) -> MaskCase:
    array = flags(1, N, T, 1)
    return MaskCase(masks.dense(jnp.asarray(array)), lambda b, h, q, k: array[0, h, q, 0])


@_case
def bare_array(B: int, N: int, T: int, S: int) -> MaskCase:
    array = flags(1, N, T, S)
    return MaskCase(jnp.asarray(array), lambda b, h, q, k: array[0, h, q, k])


@_case
def predicate_args(B: int, N: int, T: int, S: int) -> MaskCase:
    order = rng(B, T, 6).permuted(np.tile(np.arange(T), (B, 1)), axis=1).astype(np.int32)
    # Any order of generation, as in XLNet: a query sees keys that come no later in the order.
    mask = masks.predicate(lambda b, h, q, k, order: order[b, q] >= k, jnp.asarray(order))
    return MaskCase(mask, lambda b, h, q, k: order[b, q] >= k)


@_case
def closure(B: int, N: int, T: int, S: int) -> MaskCase:
    limit = np.arange(1, N + 1, dtype=np.int32)
    captured = jnp.asarray(limit)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return jnp.abs(q - k) < captured[h]

    return MaskCase(mask, lambda b, h, q, k: np.abs(q - k) < limit[h])


@_case
def nobody_sees_some(B: int, N: int, T: int, S: int) -> MaskCase:
    """Some keys are unseen, and some queries see nothing: both ways a row can be dead."""
    return MaskCase(
        lambda b, h, q, k: (k % 3 != 1) & (q % 4 != 2) & (k <= q + 2),
        lambda b, h, q, k: (k % 3 != 1) & (q % 4 != 2) & (k <= q + 2),
    )


# --- scores ---------------------------------------------------------------------------------------


class ScoreCase(NamedTuple):
    """A score made from its parameters, and its formula on float64 arrays."""

    make: Callable[..., Any]
    params: tuple[np.ndarray, ...]
    value: Callable[..., Any]  # value(logits, b, h, q, k, *params)


SCORES: dict[str, Callable[[int, int, int, int], ScoreCase]] = {}


def _score(make: Callable[[int, int, int, int], ScoreCase]) -> Any:
    SCORES[make.__name__] = make
    return make


def t5_bucket(distance: int, buckets: int, furthest: int, both: bool) -> int:
    """Bucket of `k - q` by the rule of T5's paper, one distance at a time."""
    first = 0
    if both:
        buckets //= 2
        if distance > 0:
            first = buckets
        away = abs(distance)
    else:
        away = -distance if distance < 0 else 0
    exact = buckets // 2
    if away < exact:
        return first + away
    # Beyond, bucket i begins at exact * (furthest / exact) ** ((i - exact) / (buckets - exact)).
    bucket = exact
    while bucket + 1 < buckets:
        begin = exact * (furthest / exact) ** ((bucket + 1 - exact) / (buckets - exact))
        if away < begin * (1 - 1e-9):
            break
        bucket += 1
    return first + bucket


def t5_table(T: int, S: int, buckets: int, furthest: int, both: bool) -> np.ndarray:
    """Buckets of every (q, k), `[T, S]`."""
    line = np.array([t5_bucket(far, buckets, furthest, both) for far in range(1 - T, S)])
    return line[np.arange(S) - np.arange(T)[:, None] + T - 1]


@_score
def alibi(B: int, N: int, T: int, S: int) -> ScoreCase:
    slopes = 2.0 ** -np.arange(1, N + 1)
    return ScoreCase(scores.alibi, (slopes,), lambda x, b, h, q, k, m: x - m[h] * np.abs(q - k))


@_score
def alibi_shared(B: int, N: int, T: int, S: int) -> ScoreCase:
    return ScoreCase(scores.alibi, (np.array(0.5),), lambda x, b, h, q, k, m: x - m * np.abs(q - k))


@_score
def soft_cap(B: int, N: int, T: int, S: int) -> ScoreCase:
    return ScoreCase(
        scores.soft_cap, (np.array(1.5),), lambda x, b, h, q, k, cap: cap * np.tanh(x / cap)
    )


@_score
def soft_cap_per_head(B: int, N: int, T: int, S: int) -> ScoreCase:
    return ScoreCase(
        scores.soft_cap,
        (np.linspace(0.5, 3, N),),
        lambda x, b, h, q, k, cap: cap[h] * np.tanh(x / cap[h]),
    )


@_score
def temperature(B: int, N: int, T: int, S: int) -> ScoreCase:
    return ScoreCase(
        scores.temperature, (np.linspace(0.5, 3, N),), lambda x, b, h, q, k, t: x / t[h]
    )


@_score
def t5_both(B: int, N: int, T: int, S: int) -> ScoreCase:
    bucket = t5_table(T, S, 8, 12, True)
    return ScoreCase(
        lambda table: scores.relative_bias(table, max_distance=12),
        (rng(N, 7).normal(size=(N, 8)),),
        lambda x, b, h, q, k, table: x + table[h, bucket[q, k]],
    )


@_score
def t5_past(B: int, N: int, T: int, S: int) -> ScoreCase:
    bucket = t5_table(T, S, 6, 16, False)
    return ScoreCase(
        lambda table: scores.relative_bias(table, max_distance=16, bidirectional=False),
        (rng(N, 8).normal(size=(N, 6)),),
        lambda x, b, h, q, k, table: x + table[h, bucket[q, k]],
    )


@_score
def bias_shared(B: int, N: int, T: int, S: int) -> ScoreCase:
    return ScoreCase(
        scores.bias, (rng(T, S, 9).normal(size=(T, S)),), lambda x, b, h, q, k, a: x + a[q, k]
    )


@_score
def bias_full(B: int, N: int, T: int, S: int) -> ScoreCase:
    return ScoreCase(
        scores.bias,
        (rng(T, S, 10).normal(size=(B, N, T, S)),),
        lambda x, b, h, q, k, a: x + a[b, h, q, k],
    )


@_score
def bias_per_head_key(B: int, N: int, T: int, S: int) -> ScoreCase:
    return ScoreCase(
        scores.bias,
        (rng(N, S, 11).normal(size=(1, N, 1, S)),),
        lambda x, b, h, q, k, a: x + a[0, h, 0, k],
    )


@_score
def chain(B: int, N: int, T: int, S: int) -> ScoreCase:
    slopes = 2.0 ** -np.arange(1, N + 1)
    return ScoreCase(
        lambda slopes, cap: scores.chain(scores.alibi(slopes), scores.soft_cap(cap)),
        (slopes, np.array(2.0)),
        lambda x, b, h, q, k, m, cap: cap * np.tanh((x - m[h] * np.abs(q - k)) / cap),
    )


@_score
def custom(B: int, N: int, T: int, S: int) -> ScoreCase:
    def decay(logit: Any, b: Any, h: Any, q: Any, k: Any, gain: Any, rate: Any) -> Any:
        far = (q - k).astype(logit.dtype)
        gain, rate = gain.astype(logit.dtype), rate.astype(logit.dtype)
        return logit * gain[h] + jnp.sin(rate * far)

    return ScoreCase(
        lambda gain, rate: scores.score(decay, gain, rate),
        (np.linspace(0.5, 1.5, N), np.array(0.3)),
        lambda x, b, h, q, k, gain, rate: x * gain[h] + np.sin(rate * (q - k)),
    )


# --- attention by hand ----------------------------------------------------------------------------


class Gold(NamedTuple):
    """Attention and its gradients, as NumPy computes them."""

    out: np.ndarray  # [B, T, N, Hv]
    lse: np.ndarray  # [B, T, N]
    weights: np.ndarray  # [B, N, T, S], before dropout
    grads: dict[str, np.ndarray]
    largest: dict[str, float]  # of the terms a gradient sums, or their errors over eps


def attend(
    query: Any,
    key: Any,
    value: Any,
    seen: Any = None,
    *,
    score: ScoreCase | None = None,
    scale: float | None = None,
    sinks: Any = None,
    keep: Any = None,
    rate: float = 0.0,
    at: dict[str, Any] | None = None,
    d_out: Any = None,
    d_lse: Any = None,
    dtype: Any = np.float64,
) -> Gold:
    """Attention forward and backward, written out; gradients of `sum(out d_out) + sum(lse d_lse)`.

    With `dtype=np.float32`, what a plain computation in float32 gives: the measure of an error.
    """
    query, key, value = (np.asarray(x).astype(dtype) for x in (query, key, value))
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    group = N // K
    q = query.transpose(0, 2, 1, 3)
    k = key.transpose(0, 2, 1, 3).repeat(group, axis=1)
    v = value.transpose(0, 2, 1, 3).repeat(group, axis=1)
    seen = np.ones((B, N, T, S), bool) if seen is None else np.broadcast_to(seen, (B, N, T, S))
    scale = dtype(H**-0.5 if scale is None else scale)
    place = grid(B, N, T, S, **(at or {}))

    raw = (q @ k.swapaxes(2, 3)) * scale
    logits = raw if score is None else score.value(raw, *place, *score.params).astype(dtype)
    top = np.where(seen, logits, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    e = np.where(seen, np.exp(np.where(seen, logits - top, 0)), 0)
    total = e.sum(-1, keepdims=True)
    alive = total > 0
    p = e / np.where(alive, total, 1)
    lse = np.where(alive, top + np.log(np.where(alive, total, 1)), -np.inf)
    thinned = p if keep is None else np.where(keep, p / dtype(1 - rate), 0)
    plain = thinned @ v
    share = np.ones_like(lse)
    if sinks is not None:
        sink = np.asarray(sinks).astype(dtype)[None, :, None, None]
        share = 1 / (1 + np.exp(sink - np.where(alive, lse, 0)))
    out = plain * share

    grads: dict[str, np.ndarray] = {}
    largest: dict[str, float] = {}
    if d_out is not None:
        d = np.asarray(d_out).astype(dtype).transpose(0, 2, 1, 3)
        d_share = (d * plain).sum(-1, keepdims=True) * share * (1 - share)
        d_norm = np.zeros_like(lse)  # of the LSE
        if d_lse is not None:
            d_norm = d_norm + np.asarray(d_lse).astype(dtype).transpose(0, 2, 1)[..., None]
        if sinks is not None:
            grads["sinks"] = -d_share.sum((0, 2, 3))
            d_norm = d_norm + d_share
            # Rounding of each row's output and LSE, which add up as random numbers do.
            rows = np.abs(d * plain).sum(-1, keepdims=True) * (1 + np.abs(np.where(alive, lse, 0)))
            largest["sinks"] = float(np.sqrt((rows**2).sum((0, 2, 3))).max(initial=0))
        d_plain = d * share
        d_p = d_plain @ v.swapaxes(2, 3)
        if keep is not None:
            d_p = np.where(keep, d_p / dtype(1 - rate), 0)
        d_logits = p * (d_p - (p * d_p).sum(-1, keepdims=True) + d_norm)
        d_raw = d_logits
        # The two sides of `d_p - sum(p d_p)` may be equal, as where a query sees a single key. And
        # weights computed again differ by what rounding did to their logits.
        rounded = p * np.abs(np.where(seen, logits, 0))
        errors = (p + rounded) * np.abs(d_p)
        if score is not None:
            # The formula's own slope, exact: the imaginary part of a step too small to be felt.
            wide = raw.astype(np.float64)
            slope = score.value(wide + 1e-30j, *place, *score.params).imag / 1e-30
            d_raw = (d_logits * slope).astype(dtype)
            for i, param in enumerate(score.params):
                grads[f"param{i}"] = _slope(score, i, param, wide, place, d_logits)
                # Errors of the cells add up as random numbers do.
                squares = _slope(score, i, param, wide, place, errors, power=2)
                largest[f"param{i}"] = float(np.sqrt(squares).max(initial=0))
        d_q = (d_raw @ k) * scale
        d_k = (d_raw.swapaxes(2, 3) @ q) * scale
        term = float(errors.max(initial=0) * abs(scale))
        largest |= {
            "query": term * np.abs(k).max(initial=0),
            "key": term * np.abs(q).max(initial=0),
            "value": float(rounded.max(initial=0)) * np.abs(d_plain).max(initial=0),
        }
        d_v = thinned.swapaxes(2, 3) @ d_plain
        grads["query"] = d_q.transpose(0, 2, 1, 3)
        for name, g in (("key", d_k), ("value", d_v)):
            grads[name] = g.reshape(B, K, group, S, -1).sum(2).transpose(0, 2, 1, 3)
    return Gold(out.transpose(0, 2, 1, 3), lse[..., 0].transpose(0, 2, 1), p, grads, largest)


def _slope(
    score: ScoreCase,
    i: int,
    param: np.ndarray,
    raw: Any,
    place: Any,
    d_logits: Any,
    power: int = 1,
) -> np.ndarray:
    """Gradient of `sum(d_logits * score)` for one parameter, its terms to a power."""
    gradient = np.zeros(param.shape)
    if param.shape == raw.shape:
        # Every cell reads one element of its own, at its position.
        params = (*score.params[:i], param + 1e-30j, *score.params[i + 1 :])
        terms = (d_logits * score.value(raw, *place, *params).imag / 1e-30) ** power
        np.add.at(gradient, tuple(np.broadcast_arrays(*place)), terms)
        return gradient
    # Heads that have elements of their own are moved together.
    own = param.ndim and param.shape[0] == raw.shape[1]
    for index in np.ndindex(*param.shape[1:] if own else param.shape):
        moved = np.array(param, np.complex128)
        moved[(slice(None), *index) if own else index] += 1e-30j
        params = (*score.params[:i], moved, *score.params[i + 1 :])
        terms = (d_logits * score.value(raw, *place, *params).imag / 1e-30) ** power
        if own:
            gradient[(slice(None), *index)] = terms.sum((0, 2, 3))
        else:
            gradient[index] = terms.sum()
    return gradient


# --- dropout's hash, once more --------------------------------------------------------------------


def _murmur(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def kept(seed: tuple[int, int], rate: float, *place: Any) -> np.ndarray:
    """Which weights dropout keeps at positions `b, h, q, k` that broadcast."""
    b, h, q, k = (np.asarray(x).astype(np.uint32) for x in place)
    first = np.array(seed[0], np.uint32)[None]
    second = np.array(seed[1], np.uint32)[None] ^ np.uint32(0x9E3779B9)
    for word in (b, h, q):
        first = _murmur(first * np.uint32(0x9E3779B1) + word)
        second = _murmur(second * np.uint32(0x85EBCA77) ^ word)
    draw = _murmur((k + first) * (second | np.uint32(1)))
    return (draw >> 8) / 2.0**24 >= rate


# --- inputs ---------------------------------------------------------------------------------------


def qkv(
    B: int, T: int, S: int, N: int, K: int, H: int, Hv: int | None = None, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values from a normal distribution."""
    make = rng(B, T, S, N, K, H)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv or H)
    query, key, value = (jnp.asarray(make.normal(size=shape), dtype) for shape in shapes)
    return query, key, value


def close(
    got: Any, gold: Any, plain: Any, dtype: Any, where: str = "", largest: float = 0.0
) -> None:
    """The rule of errors: at most twice that of a plain computation in the same dtype, + 4 eps.

    `plain` is what NumPy computes in the dtype of accumulation; rounded to `dtype` here. Eps is
    relative to the largest value; that of the accumulator, also to the `largest` term of a sum.
    """
    got64, gold = np.asarray(got).astype(np.float64), np.asarray(gold)
    assert got64.shape == gold.shape, f"{where}: shape {got64.shape}, not {gold.shape}"
    infinite = np.isinf(gold)
    np.testing.assert_array_equal(got64[infinite], gold[infinite], err_msg=where)
    got64, gold, plain = (
        np.where(infinite, 0, x) for x in (got64, gold, np.asarray(plain).astype(np.float64))
    )
    assert np.isfinite(got64).all(), f"{where}: not finite"
    plain = np.asarray(jnp.asarray(plain).astype(dtype)).astype(np.float64)
    worst = np.abs(gold).max(initial=0)
    # Float64 is both gold and plain there: four times as much, as gold itself has rounded.
    several = 16 if dtype == jnp.float64 else 4
    eps = float(jnp.finfo(dtype).eps)
    allowed = 2 * np.abs(plain - gold).max(initial=0) + several * eps * worst
    allowed += several * float(jnp.finfo(base.accumulator(dtype)).eps) * largest
    # The backward reads the output, rounded to 16 bits.
    allowed += (eps if jnp.finfo(dtype).bits == 16 else 0) * largest
    error = np.abs(got64 - gold).max(initial=0)
    assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"


def pairwise(factors: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few rows in which every pair of values of any two factors meets (greedy)."""
    names = list(factors)
    missing = {
        (a, x, c, y)
        for i, a in enumerate(names)
        for c in names[i + 1 :]
        for x in range(len(factors[a]))
        for y in range(len(factors[c]))
    }
    draw, rows = rng(seed), []
    while missing:
        best: tuple[int, dict[str, int]] = (-1, {})
        a, x, c, y = min(missing)
        for _ in range(60):
            row = {name: int(draw.integers(len(factors[name]))) for name in names} | {a: x, c: y}
            met = sum(row[a] == x and row[c] == y for a, x, c, y in missing)
            best = max(best, (met, row), key=lambda scored: scored[0])
        row = best[1]
        missing = {m for m in missing if not (row[m[0]] == m[1] and row[m[2]] == m[3])}
        rows.append({name: factors[name][i] for name, i in row.items()})
    return rows


def split_parts(mask: Any, score: Any, sizes: Any, positions: Any = None, dtype: Any = None) -> Any:
    """The fields of a `Call` that say what a mask and a score are; `sizes` are B, N, T, S."""
    at, tiles = positions or Positions(), None
    if isinstance(mask, TileMap):
        tiles, mask = mask.for_call(*sizes, positions), mask.mask
    logit = base.accumulator(dtype or jnp.float32)
    return {
        "mask": None if mask is None else split(mask, at),
        "score": None if score is None else split(as_score(score), at, logit=logit),
        "tiles": tiles,
    }


def everyday(values: Iterable[Any], every: int = 2, first: int = 0, **options: Any) -> list[Any]:
    """Parameters, of which one in `every` is tested every day, from number `first` on.

    The others are marked `deep`, for `make test-deep`.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if n % every == first else pytest.mark.deep,
            **options,
        )
        for n, value in enumerate(values)
    ]

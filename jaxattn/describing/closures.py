"""Closures: the tightest member of a family that allows all visible cells.

Each is read off the first and the last visible key of every row, the distances `q - k` that are
seen, or what is connected to what. The opposite of a family is a family too: the closure in
`~causal` is the opposite of the largest causal mask that allows no visible cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..shapes import Bool, Int
from .terms import LIST, LISTS, ODD, PAIR, Term, call

Reduce: TypeAlias = Callable[[Any], Any]

# Families whose members do not meet in a member have several tightest ones; a few are enough.
_FEW = 3


class Rows(NamedTuple):
    """Of every row, by batch row or by head: whether it sees any key, its first and its last."""

    some: Bool[np.ndarray, "*X T"]
    first: Int[np.ndarray, "*X T"]
    last: Int[np.ndarray, "*X T"]


def any_of(cells: Bool[np.ndarray, "..."], *axes: int) -> Bool[np.ndarray, "..."]:
    """Whether any cell along the axes is seen."""
    return np.asarray(cells.any(axes))


def rows_of(seen: Bool[np.ndarray, "*X T S"]) -> Rows:
    """The rows of a table."""
    S = seen.shape[-1]
    return Rows(any_of(seen, -1), seen.argmax(-1), S - 1 - seen[..., ::-1].argmax(-1))


def closures(
    seen: Bool[np.ndarray, "B N T S"], most: Reduce = np.max, least: Reduce = np.min
) -> list[Term]:
    """The closure in every family, those that are preferred first.

    Args:
      seen: the visible cells; some of them are.
      most, least: how the numbers of all rows become one. The defaults make closures. With the
        most frequent number in their place the members are those that fit most rows: guesses, for
        arrays that are a member but for a few cells.
    """
    by_row, by_head = any_of(seen, 1), any_of(seen, 0)
    square = seen.shape[2] == seen.shape[3]
    return [
        *_order(by_row, most, least),
        *_windows(by_head, most),
        *_prefixes(by_row, most, least),
        *_padding(by_row, most, least),
        *_distances(by_head),
        *_chunks(any_of(by_row, 0)),
        *(global_flags(by_row) if square else ()),
        *(_segments(by_row, shared=True) if square else ()),
        *_segments(by_row, shared=False),
        *_tables(seen),
    ]


def _numbers(
    values: Int[np.ndarray, "X T"], some: Bool[np.ndarray, "X T"], reduce: Reduce, none: Any
) -> Iterator[Any]:
    """One number for all; then one for each of X, if they differ.

    Args:
      values: the numbers of the rows; those that see no key have none.
      some: whether a row sees a key.
      reduce: how the numbers of the rows become one.
      none: the number where no row sees a key; None for that of all others.
    """
    if not some.any():
        return
    shared = int(reduce(values[some]))
    yield shared
    own = [int(reduce(v[s])) if s.any() else none for v, s in zip(values, some, strict=True)]
    vector = np.array([shared if n is None else n for n in own])
    if (vector != shared).any():
        yield vector


def _grid(T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(T)[:, None], np.arange(S)


def by_batch(value: Any) -> Any:
    """A number, or one for each batch row, so that it broadcasts to `[B, N, T, S]`."""
    return np.asarray(value).reshape(-1, 1, 1, 1)


def _order(seen: np.ndarray, most: Reduce, least: Reduce) -> Iterator[Term]:
    """`causal(offset)` and its opposite."""
    some, first, last = rows_of(seen)
    q, k = _grid(*seen.shape[1:])
    for offset in _numbers(last - q[:, 0], some, most, None):
        yield _causal(offset, q, k)
        # Not the tightest, but what one would write where something else hides the rest.
        if np.max(offset) < 0:
            yield _causal(0, q, k)
    for offset in _numbers(first - q[:, 0] - 1, some, least, None):
        yield ~_causal(offset, q, k)
        if np.min(offset) > 0:
            yield ~_causal(0, q, k)


def _causal(offset: Any, q: np.ndarray, k: np.ndarray) -> Term:
    cells = (k - q) <= by_batch(offset)
    if np.ndim(offset) or offset:
        return call("causal", cells, offset, extra=ODD)
    return call("causal", cells)


def _windows(seen: np.ndarray, most: Reduce) -> Iterator[Term]:
    """`sliding_window(left, right)`, and the opposite of one that is not seen."""
    some, first, last = rows_of(seen)
    T, S = seen.shape[1:]
    q = np.arange(T)
    lefts = list(_numbers(np.maximum(q - first, 0), some, most, None))
    rights = list(_numbers(np.maximum(last - q, 0), some, most, None))
    for left in lefts:
        for right in rights:
            yield _window(left, right, T, S)
    near = any_of(diagonals(seen), 0)
    if not near[T - 1]:
        left, right = near[: T - 1][::-1], near[T:]
        left, right = (int(x.argmax()) if x.any() else x.size for x in (left, right))
        yield ~_window(left, right, T, S)
        if right:
            yield ~_window(left, 0, T, S)


def _window(left: Any, right: Any, T: int, S: int) -> Term:
    q, k = _grid(T, S)
    to_left, to_right = (np.asarray(side).reshape(1, -1, 1, 1) for side in (left, right))
    both = (left, right) if np.ndim(right) or right else (left,)
    wide = np.max(left) >= T - 1 or np.max(right) >= S - 1
    cells = (q - k <= to_left) & (k - q <= to_right)
    return call("sliding_window", cells, *both, extra=ODD * int(wide))


def _prefixes(seen: np.ndarray, most: Reduce, least: Reduce) -> Iterator[Term]:
    """`prefix_lm(lengths)`, `global_tokens(n)`, and their opposites."""
    some, first, last = rows_of(seen)
    q, k = _grid(*seen.shape[1:])
    at = q[:, 0]
    ahead = np.where(last > at, last + 1, 0)
    for lengths in _numbers(ahead, some, most, 0):
        yield call("prefix_lm", (k < by_batch(lengths)) | (q >= k), lengths, extra=ODD)
    if (first > at)[some].all():
        for lengths in _numbers(first, some, least, seen.shape[2]):
            yield ~call("prefix_lm", (k < by_batch(lengths)) | (q >= k), lengths, extra=ODD)
    for counts in _numbers(np.minimum(at, last) + 1, some, most, 0):
        yield _global(counts, q, k)
    for counts in _numbers(np.minimum(at, first), some, least, max(seen.shape[1:])):
        if np.any(counts):
            yield ~_global(counts, q, k)


def _global(counts: Any, q: np.ndarray, k: np.ndarray) -> Term:
    cells = np.minimum(q, k) < by_batch(counts)
    if np.ndim(counts):
        return call("global_tokens", cells, counts=counts, extra=ODD)
    return call("global_tokens", cells, counts, extra=ODD)


def _padding(seen: np.ndarray, most: Reduce, least: Reduce) -> Iterator[Term]:
    """`key_padding` and `query_padding`: lengths, numbers of pads on the left, and flags."""
    for name, table, axis in (
        ("key_padding", seen, -1),
        ("query_padding", seen.swapaxes(1, 2), -2),
    ):
        some, first, last = rows_of(table)
        size = table.shape[2]

        def along(flags: np.ndarray, axis: int = axis) -> np.ndarray:
            return np.expand_dims(flags, (1, 2) if axis == -1 else (1, 3))

        at = along(np.arange(size)[None])
        for lengths in _numbers(last + 1, some, most, 0):
            yield call(name, at < by_batch(lengths), lengths=lengths)
        for pads in _numbers(first, some, least, size):
            yield ~call(name, at < by_batch(pads), lengths=pads)
        valid = any_of(table, 1)
        shared = any_of(valid, 0)
        both = [(shared[None], shared), (valid, valid)]
        for flags, written in both[: 1 + bool((valid != shared).any())]:
            opposite = call(name, along(~flags), ~written).text
            yield replace(call(name, along(flags), written, extra=LIST), opposite=opposite)


def diagonals(seen: Bool[np.ndarray, "X T S"]) -> Bool[np.ndarray, "X TS"]:
    """Whether any cell of each diagonal is seen; entry `k - q + T - 1` is that of `k - q`."""
    X, T, S = seen.shape
    # Rows one longer than the diagonals are many, read at their number: each begins one later.
    skewed = np.zeros((X, T, S + T), bool)
    skewed[:, :, :S] = seen[:, ::-1]
    cut = skewed.reshape(X, -1)[:, : T * (S + T - 1)]
    return any_of(cut.reshape(X, T, S + T - 1), 1)


def _distances(seen: np.ndarray) -> Iterator[Term]:
    """`dilated(rate)`, and the opposites of those of which no pair is seen."""
    T, S = seen.shape[1:]
    q, k = _grid(T, S)
    found = np.abs(np.flatnonzero(diagonals(seen).any(0)) - (T - 1))
    if (rate := int(np.gcd.reduce(found))) > 1:
        yield call("dilated", (q - k) % rate == 0, rate)
    unseen: list[int] = []
    for rate in range(2, max(T, S)):
        if len(unseen) < _FEW and all(rate % n for n in unseen) and (found % rate).all():
            unseen.append(rate)
            yield ~call("dilated", (q - k) % rate == 0, rate)


def _chunks(seen: Bool[np.ndarray, "T S"]) -> Iterator[Term]:
    """`chunked(size)`, and the opposites of those of which no pair is seen."""
    T, S = seen.shape
    q, k = _grid(T, S)
    some, first, last = rows_of(seen)
    sizes = np.arange(1, max(T, S))[:, None]
    mine = np.arange(T) // sizes
    inside = ((mine == first // sizes) & (mine == last // sizes) | ~some).all(1)
    fitting: list[int] = []
    for size in sizes[inside, 0].tolist():
        if len(fitting) < _FEW and all(size % n for n in fitting):
            fitting.append(size)
            yield _chunk(size, q, k)
    before = np.pad(seen.cumsum(1), ((0, 0), (1, 0)))
    begin, end = (np.minimum(edge * sizes, S) for edge in (mine, mine + 1))
    at = np.arange(T)
    unseen = (before[at, begin] == before[at, end]).all(1)
    fitting = []
    for size in sizes[unseen, 0][::-1].tolist():
        if len(fitting) < _FEW and all(n % size for n in fitting):
            fitting.append(size)
            yield ~_chunk(size, q, k)


def _chunk(size: int, q: np.ndarray, k: np.ndarray) -> Term:
    alone = 2 * size >= max(len(q), len(k))
    return call("chunked", q // size == k // size, size, extra=ODD * alone)


def global_flags(seen: Bool[np.ndarray, "B T T"]) -> Iterator[Term]:
    """The opposite of the global tokens that see nothing, and that nothing sees."""
    flags = ~(seen.any(1) | seen.any(2))
    shared = flags.all(0)
    for chosen in (shared,) if (flags == shared).all() else (shared, flags):
        if chosen.any():
            tokens = np.atleast_2d(chosen)
            either = tokens[:, None, :, None] | tokens[:, None, None, :]
            yield ~call("global_tokens", either, chosen, extra=LIST)


def _segments(seen: Bool[np.ndarray, "B T S"], shared: bool) -> Iterator[Term]:
    """`segments`: what is connected by visible cells is one segment, in all rows or in each."""
    tables = [any_of(seen, 0)[None]]
    if (seen != tables[0]).any():
        tables.append(seen)
    for table in tables:
        ids = [components(each, shared) for each in table]
        q_ids, k_ids = (np.stack(each) for each in zip(*ids, strict=True))
        if not shared:
            yield _segment(q_ids, k_ids, extra=PAIR)
            continue
        # Tokens that see nothing, and that nothing sees, are padding: one segment is enough.
        alone = ~(table.any(1) | table.any(2))
        together = np.where(alone, q_ids.max() + 1, q_ids)
        for chosen in (together, q_ids):
            yield _segment(chosen, chosen, extra=LIST)


def _segment(q_ids: np.ndarray, k_ids: np.ndarray, extra: int) -> Term:
    cells = (q_ids[:, :, None] == k_ids[:, None])[:, None]
    lists = [q_ids] if q_ids is k_ids else [q_ids, k_ids]
    written = [each[0] if len(each) == 1 else each for each in lists]
    return call("segments", cells, *written, extra=extra)


def _tables(seen: Bool[np.ndarray, "B N T S"]) -> Iterator[Term]:
    """`block_sparse`, with the sizes of blocks that people take: powers of two from 4 on.

    Tables of smaller blocks say anything, noise too.
    """
    every, size = any_of(seen, 0)[None], 4
    while 2 * size <= max(seen.shape[2:]):
        yield table_of(blocks_of(every, size), size, *seen.shape[2:])
        size *= 2


def blocks_of(cells: Bool[np.ndarray, "B N T S"], size: int) -> Bool[np.ndarray, "B N nq nk"]:
    """Whether any cell of each block is flagged."""
    T, S = cells.shape[2:]
    rows = np.logical_or.reduceat(cells, np.arange(0, T, size), axis=2)
    return np.logical_or.reduceat(rows, np.arange(0, S, size), axis=3)


def table_of(blocks: Bool[np.ndarray, "B N nq nk"], size: int, T: int, S: int) -> Term:
    """`block_sparse` of a table, which is written without the axes that are not needed."""
    cells = blocks.repeat(size, 2)[:, :, :T].repeat(size, 3)[..., :S]
    B, N = blocks.shape[:2]
    table = blocks if B > 1 else blocks[0] if N > 1 else blocks[0, 0]
    return call("block_sparse", cells, table, size, extra=LIST if table.size <= T + S else LISTS)


def components(
    seen: Bool[np.ndarray, "T S"], shared: bool
) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "S"]]:
    """Numbers for queries and keys, equal where visible cells connect them.

    Args:
      seen: the visible cells.
      shared: whether query i and key i are one token, and have one number.
    """
    T, S = seen.shape
    groups: list[tuple[int, list[int]]] = []
    for q, row in enumerate(np.packbits(seen, axis=1, bitorder="little")):
        keys = int.from_bytes(row.tobytes(), "little") | (1 << q if shared else 0)
        queries, others = [q], []
        for group in groups:
            if group[0] & keys:
                keys, queries = keys | group[0], group[1] + queries
            else:
                others.append(group)
        groups = [*others, (keys, queries)]
    q_ids, k_ids = np.zeros(T, int), np.full(S, -1)
    for number, (keys, queries) in enumerate(sorted(groups, key=lambda group: min(group[1]))):
        q_ids[queries] = number
        of_keys = np.frombuffer(keys.to_bytes(-(-S // 8), "little"), np.uint8)
        k_ids[np.unpackbits(of_keys, count=S, bitorder="little").astype(bool)] = number
    alone = k_ids < 0
    k_ids[alone] = len(groups) + np.arange(alone.sum())
    return q_ids, k_ids

"""Fits: one member that lies between what must be visible and what must be hidden.

Besides closures, these are members of families that have no tightest member, or too many. Their
parameters are read off the cells that must be visible, and the member is kept if it hides what must
be hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..shapes import Bool
from .closures import (
    any_of,
    blocks_of,
    by_batch,
    closures,
    components,
    global_flags,
    rows_of,
    table_of,
)
from .terms import LIST, LISTS, Term, call

# Candidates of one family that are tried; parameters that are read off leave few.
_FEW = 4


def grids(seen: Bool[np.ndarray, "B N T S"]) -> list[Term]:
    """The tightest neighborhoods, of several shapes, and block diffusion, of several blocks."""
    T, S = seen.shape[2:]
    if T != S:
        return []
    any_row = any_of(seen, 0, 1)
    near = sorted(_neighborhoods(any_row), key=lambda term: (term.cells.sum(), *term.cost))
    return [*near[:_FEW], *_halves(any_row)]


def fits(seen: Bool[np.ndarray, "B N T S"], hidden: Bool[np.ndarray, "B N T S"]) -> list[Term]:
    """Members that allow all of `seen`, and nothing of `hidden`; none if nothing is seen."""
    if not seen.any():
        return []
    terms = [*closures(seen), *grids(seen)]
    return [term for term in terms if not (term.cells & hidden).any()] + lists(seen, hidden)


def lists(seen: Bool[np.ndarray, "B N T S"], hidden: Bool[np.ndarray, "B N T S"]) -> list[Term]:
    """Fits that are no closures: tables, flags, prompts and trees."""
    if not seen.any() or not hidden.any():
        return []
    found = [_blocks(seen, hidden)]
    if seen.shape[2] == seen.shape[3]:
        # The tokens of which nothing is hidden are the most that can be global.
        found += [~term for term in global_flags(any_of(hidden, 1))]
        for tables in _by_rows(seen, hidden):
            found += [_shared_prefix(*tables), _tree(*tables), _spans(tables[0])]
    return [
        term
        for term in found
        if term is not None and (term.cells | ~seen).all() and not (term.cells & hidden).any()
    ]


def _by_rows(seen: np.ndarray, hidden: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The cells of any head, `[B, T, S]`; with those of any batch row before them, as one."""
    tables = any_of(seen, 1), any_of(hidden, 1)
    yield any_of(tables[0], 0)[None], any_of(tables[1], 0)[None]
    if len(seen) > 1:
        yield tables


def _one_or_all(array: np.ndarray) -> np.ndarray:
    return array[0] if len(array) == 1 else array


def _shared_prefix(seen: np.ndarray, hidden: np.ndarray) -> Term | None:
    """The longest prompt of which nothing is hidden; then what is connected beyond it."""
    columns = any_of(hidden, 1)
    length = np.where(columns.any(1), columns.argmax(1), columns.shape[1])
    after = seen & (np.arange(seen.shape[2]) >= length[:, None, None])
    if not length.any() or not after.any():
        return None
    ids = np.stack([components(each, True)[0] for each in after])
    same = (ids[:, :, None] == ids[:, None])[:, None]
    prompt = np.arange(seen.shape[2]) < by_batch(length)
    shared = int(length[0]) if (length == length[0]).all() else length
    return call("shared_prefix", prompt | same, shared, _one_or_all(ids), extra=LIST)


def _spans(seen: np.ndarray) -> Term | None:
    """The shortest spans that hold what sees each other; a token alone is in none."""
    ids = np.full(seen.shape[:2], -1)
    for own, row in zip(ids, seen, strict=True):
        # How many visible pairs stand on both sides of each gap between tokens.
        ends = np.sort(np.argwhere(row), axis=1)
        begun, ended = (np.bincount(end, minlength=len(row)) for end in ends.T)
        joined = np.cumsum(begun - ended)[:-1] > 0
        inside = np.r_[joined, False] | np.r_[False, joined]
        own[inside] = np.cumsum(inside & ~np.r_[False, joined])[inside] - 1
    if (ids < 0).all():
        return None
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0)
    cells = same | np.eye(seen.shape[1], dtype=bool)
    return call("spans", cells[:, None], _one_or_all(ids), extra=LIST)


def _tree(seen: np.ndarray, hidden: np.ndarray) -> Term | None:
    """The parent of a node is the last that it sees before itself."""
    T = seen.shape[1]
    before = seen & np.tri(T, k=-1, dtype=bool)
    parents = np.where(before.any(2), T - 1 - before[:, :, ::-1].argmax(2), -1)
    cells = np.zeros(seen.shape, bool)
    for b, row in enumerate(parents):
        for node, parent in enumerate(row):
            if parent >= 0:
                cells[b, node] = cells[b, parent]
            cells[b, node, node] = True
    return call("tree", cells[:, None], _one_or_all(parents), extra=LISTS)


def _neighborhoods(seen: Bool[np.ndarray, "T T"]) -> Iterator[Term]:
    """Grids of one to three axes, behind the tokens that see all and are seen by all."""
    T = len(seen)
    everywhere = seen.all(0) & seen.all(1)
    first = T if everywhere.all() else int(everywhere.argmin())
    for prefix in {0, first}:
        grid = seen[prefix:, prefix:]
        for shape in _shapes(T - prefix):
            radii = [_radius(grid, shape, axis) for axis in range(len(shape))]
            near = np.ones((1, 1), bool)
            for extent, radius in zip(shape, radii, strict=True):
                near = np.kron(near, _near(extent, radius)) if radius is not None else near
            if None in radii or near.all():
                continue
            cells = np.ones((T, T), bool)
            cells[prefix:, prefix:] = near
            reach = radii[0] if len(set(radii)) == 1 else tuple(radii)
            yield call("neighborhood", cells, shape, reach, prefix=prefix or None)


def _shapes(tokens: int) -> Iterator[tuple[int, ...]]:
    """Grids of so many tokens, without axes of one token."""
    if tokens > 1:
        yield (tokens,)
    pairs = [(n, tokens // n) for n in range(2, tokens) if tokens % n == 0]
    yield from pairs
    for a, rest in pairs:
        yield from ((a, b, rest // b) for b in range(2, rest) if rest % b == 0)


def _radius(seen: np.ndarray, shape: tuple[int, ...], axis: int) -> int | None:
    """The least radius along an axis; None if no window along it is wide enough."""
    extent, after = shape[axis], math.prod(shape[axis + 1 :])
    cut = (math.prod(shape[:axis]), extent, after) * 2
    some, first, last = rows_of(any_of(seen.reshape(cut), 0, 2, 3, 5))
    radii = np.arange((extent - 1) // 2 + 1)[:, None]
    begin = np.clip(np.arange(extent) - radii, 0, extent - 1 - 2 * radii)
    wide = ((begin <= first) & (last <= begin + 2 * radii) | ~some).all(1)
    return int(wide.argmax()) if wide.any() else None


def _near(extent: int, radius: int) -> Bool[np.ndarray, "n n"]:
    x = np.arange(extent)
    middle = np.clip(x, radius, extent - 1 - radius)
    return np.abs(middle[:, None] - x) <= radius


def _halves(seen: Bool[np.ndarray, "T T"]) -> Iterator[Term]:
    """`block_diffusion`: the first noisy block says how long blocks are at least."""
    T = len(seen)
    length = T // 2
    if T % 2 or not length:
        return
    least = int(np.flatnonzero(seen[0, :length]).max(initial=0)) + 1
    clean = np.arange(T) >= length
    if (seen & ~clean & clean[:, None]).any():
        return
    found = 0
    for block in range(least, length):
        number = np.arange(T) % length // block
        same = (number[:, None] == number) & (clean[:, None] == clean)
        cells = same | (number[:, None] > number) & clean
        if found < _FEW and not (seen & ~cells).any():
            found += 1
            yield call("block_diffusion", cells, length, block)


def _blocks(seen: np.ndarray, hidden: np.ndarray) -> Term | None:
    """`block_sparse`: the largest blocks of which none has cells of both kinds."""
    B, N, T, S = seen.shape
    if B > 1 and N == 1:
        return None  # a table for each row has to say its heads, and here one may stand for all
    # Neighbouring rows of which one shows what the other hides are not in one block.
    edges = [
        1 + np.flatnonzero((_clash(seen, hidden, axis)).any((0, 1, 5 - axis))) for axis in (2, 3)
    ]
    common = int(np.gcd.reduce(np.concatenate(edges)))
    for block in range(min(common or max(T, S), max(T, S) // 2), 1, -1):
        if common % block:
            continue
        mine, other = (blocks_of(cells, block) for cells in (seen, hidden))
        if not (mine & other).any():
            return table_of(mine, block, T, S)
    return None


def _clash(seen: np.ndarray, hidden: np.ndarray, axis: int) -> np.ndarray:
    """Where a cell and the next along an axis have to differ."""
    before, after = ([slice(None)] * 4 for _ in range(2))
    before[axis], after[axis] = slice(-1), slice(1, None)
    one, two = tuple(before), tuple(after)
    return seen[one] & hidden[two] | hidden[one] & seen[two]

"""Steps of the tiled backend: which tiles are computed, in what order, and what each is given.

A *step* computes one tile of queries and keys for a few batch rows and key heads at once. Arrays
come with heads split into K key heads of G query heads each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ...shapes import Array, Int
from ...tiles.tile_map import EMPTY, FULL, PARTIAL
from ...tracing.split import pointwise, skewed
from .. import base
from ..problem import Config, Inputs, Residue

# Heads times cells of one step: large enough that starting its dozen operations is cheap, small
# enough that logits and weights stay in the caches (2 x 2 MB in float32 for a group of tiles).
STEP_CELLS = 128 * 1024

# Mixed tiles side by side that one step computes: the three that a window of two tiles has in each
# row. Of 2, 3 and 4 the best for windows, as good as any for documents, causal and dilated masks.
RUN = 3


# --- tiles ----------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """The extents of a problem and of its steps."""

    B: int
    T: int
    S: int
    K: int
    G: int
    H: int
    Hv: int
    # Extents rounded up to whole tiles.
    Tp: int
    Sp: int
    # Batch rows and key heads that one step computes together.
    cb: int
    ck: int


class Tile(NamedTuple):
    """Where a step is, and its size: starts are traced, sizes static."""

    b: Any
    h: Any
    i: Any
    j: Any
    tq: int
    tk: int
    masked: bool


class Work(NamedTuple):
    """Tiles of one size: `starts[first + n]` is where the n-th is, in b, h, q and k."""

    starts: Int[Array, "n 4"]
    first: Int[Array, ""]
    number: Int[Array, ""]
    repeats: tuple[int, int]
    tq: int
    tk: int
    masked: bool


def tile_size(T: int, S: int, heads: int) -> tuple[int, int]:
    """Queries and keys of a tile, for so many heads in a step; the canonical map is of these.

    Small tiles cover windows and documents tightly; few heads want larger ones, or starting the
    operations of a step costs more than they do.
    """
    side = 128 if heads >= 6 else 256
    tq = _even(T, side)
    # Few queries (decoding): the same number of cells, in a longer row.
    return tq, _even(S, min(1024, max(side, side * side // max(tq, 16))))


def _even(length: int, most: int) -> int:
    """A tile length at most `most` that divides `length` with little left over."""
    if length <= most:
        return max(length, 1)
    count = -(-length // most)
    return -(-length // (count * 8)) * 8


def _fit(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`; 1 of a number that is not known."""
    if base.symbolic(n):
        return 1
    return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)


def shape_of(config: Config, x: Inputs) -> Shape:
    """The extents of a problem, and how many batch rows and key heads a step takes."""
    B, T, K, G, H = x.query.shape
    _, S, _, Hv = x.value.shape
    tq, tk = config.tile
    by_b, by_h = (
        (False, False)
        if x.states is None
        else (x.states.shape[0] != 1, max(x.states.shape[1:3]) != 1)
    )
    # Half as many again, for numbers of heads such as 11 and 12.
    room = max(1, STEP_CELLS * 3 // 2 // (G * tq * tk))
    ck = 1 if by_h else _fit(K, room)
    cb = 1 if by_b or ck != K else _fit(B, room // ck)
    Tp, Sp = -(-T // tq) * tq, -(-S // tk) * tk
    return Shape(B, T, S, K, G, H, Hv, Tp, Sp, cb, ck)


def work(config: Config, z: Shape, states: Array | None) -> list[Work]:
    """The lists: groups of 2 x 2 that are all FULL, runs of other active tiles, and single ones."""
    tq, tk = config.tile
    nq, nk = z.Tp // tq, z.Sp // tk
    if states is None:
        states = jnp.full((1, 1, 1, nq, nk), FULL, jnp.int8)
    last = jnp.minimum(states, jnp.int8(PARTIAL))
    if z.Tp != z.T:
        states = jnp.where(lax.broadcasted_iota(jnp.int32, states.shape, 3) == nq - 1, last, states)
    if z.Sp != z.S:
        states = jnp.where(lax.broadcasted_iota(jnp.int32, states.shape, 4) == nk - 1, last, states)
    # The query heads of one key head are computed together.
    some, all_ = (states != EMPTY).any(2), (states == FULL).all(2)
    gq, gk, run = min(nq, 2), min(nk, 2), min(nk, RUN)
    eb, eh = some.shape[:2]
    wide = jnp.pad(all_, [(0, 0), (0, 0), (0, -nq % gq), (0, -nk % gk)])
    full = wide.reshape(eb, eh, -(-nq // gq), gq, -(-nk // gk), gk).all((3, 5))
    rest = some & ~jnp.repeat(jnp.repeat(full, gq, 2), gk, 3)[:, :, :nq, :nk]
    at = lax.broadcasted_iota(jnp.int32, rest.shape, 3)
    # How far into its stretch of neighbours a tile is, and how long that is.
    before = lax.cummax(jnp.where(rest, jnp.int32(-1), at), axis=3)
    after = lax.cummin(jnp.where(rest, jnp.int32(nk), at), axis=3, reverse=True)
    place, length = at - before - 1, after - before - 1
    in_runs = length - lax.rem(length, jnp.int32(run))
    first_of_run = rest & (place < in_runs) & (lax.rem(place, jnp.int32(run)) == 0)
    kinds = [(full, (gq, gk), (gq, gk), False), (first_of_run, (1, 1), (1, run), True)]
    if run > 1:
        kinds.append((rest & (place >= in_runs), (1, 1), (1, 1), True))

    # One list of all kinds, one after the other.
    flat = jnp.concatenate([flags.reshape(-1) for flags, *_ in kinds])
    running = jnp.cumsum(flat, dtype=jnp.int32)
    starts = jnp.concatenate([_starts(a.shape, tq * by[0], tk * by[1]) for a, by, *_ in kinds])
    # Where each goes: the place to which the running count sends it.
    to = jnp.where(flat, running - 1, flat.size)
    starts = jnp.zeros_like(starts).at[to].set(starts, mode="drop")
    repeats = z.B // z.cb if eb == 1 else 1, z.K // z.ck if eh == 1 else 1
    work, first = [], jnp.int32(0)
    for flags, _, (by_q, by_k), masked in kinds:
        number = flags.sum(dtype=jnp.int32)
        work.append(Work(starts, first, number, repeats, tq * by_q, tk * by_k, masked))
        first = first + number
    return work


def _starts(shape: tuple[int, ...], tq: int, tk: int) -> Int[Array, "n 4"]:
    """Where the tiles of an array of flags start, in b, h, q and k."""
    axes = [lax.broadcasted_iota(jnp.int32, shape, axis).reshape(-1) for axis in range(4)]
    return jnp.stack([axes[0], axes[1], axes[2] * tq, axes[3] * tk], 1)


def loop(z: Shape, work: list[Work], step: Callable[..., Any], carry: Any) -> Any:
    """Runs `step(tile, carry)` over all lists, for all batch rows and heads."""
    for w in work:
        rb, rh = w.repeats

        def body(n: Any, carry: Any, w: Work = w, rh: int = rh) -> Any:
            count = jnp.maximum(w.number, 1)
            at = w.first + lax.rem(n, count)
            starts = lax.dynamic_index_in_dim(w.starts, at, keepdims=False)
            again = lax.div(n, count)
            b = starts[0] + lax.div(again, jnp.int32(rh)) * z.cb
            h = starts[1] + lax.rem(again, jnp.int32(rh)) * z.ck
            return step(Tile(b, h, starts[2], starts[3], w.tq, w.tk, w.masked), carry)

        carry = lax.fori_loop(0, w.number * (rb * rh), body, carry)
    return carry


def _cut(z: Shape, kind: str, array: Array, at: Tile, groups: int = 1) -> tuple[Any, Any]:
    """Starts and sizes of the part of an operand that a tile needs."""
    eb, ek, eg = array.shape[:3]
    grouped = groups > 1 and eb == groups
    # Gradients of a shared operand are kept apart for each group of batch rows.
    b = at.b // (z.B // groups) if grouped else at.b if eb != 1 else 0
    starts = [b, at.h if ek != 1 else 0, 0]
    sizes = [1 if eb == 1 or grouped else z.cb, z.ck if ek != 1 else 1, eg]
    match kind:
        case "row":
            starts, sizes = [*starts, at.i], [*sizes, at.tq]
        case "column":
            starts, sizes = [*starts, at.j], [*sizes, at.tk]
        case "grid":
            starts, sizes = [*starts, at.i, at.j], [*sizes, at.tq, at.tk]
        case "diagonal":
            starts, sizes = [*starts, z.Sp - at.tk + at.i - at.j], [*sizes, at.tq + at.tk - 1]
    more = array.ndim - len(starts)
    return [*starts, *[0] * more], [*sizes, *array.shape[len(sizes) :]]


def sliced(z: Shape, kind: str, array: Array, at: Tile, groups: int = 1) -> Array:
    """The part of an operand that a tile needs."""
    starts, sizes = _cut(z, kind, array, at, groups)
    return cut_out(array, starts, sizes)


def parts_of(z: Shape, residue: Residue, arrays: Any, at: Tile) -> list[Array]:
    """The parts of a residue's operands that a tile needs."""
    return [sliced(z, kind, a, at) for kind, a in zip(residue.kinds, arrays, strict=True)]


def add_to(z: Shape, kind: str, array: Array, part: Array, at: Tile, groups: int = 1) -> Array:
    """An operand's gradient with a tile's part added in its place."""
    starts, sizes = _cut(z, kind, array, at, groups)
    old = cut_out(array, starts, sizes)
    return put_in(array, old + part.astype(array.dtype), starts)


def _spread(z: Shape, kind: str, part: Array, at: Tile, transposed: bool) -> Array:
    """A part as a tile, `[cb*ck|1, G|1, tq|1, tk|1, ...]`, or `[cb*ck|1, tk|1, G|1, tq|1, ...]`."""
    cb, ck, eg, *rest = part.shape
    if (cb, ck) not in ((1, 1), (z.cb, z.ck)):
        part = jnp.broadcast_to(part, (z.cb, z.ck, *part.shape[2:]))
        cb, ck = z.cb, z.ck
    part = part.reshape(cb * ck, eg, *rest)
    match kind:
        case "row":
            part = jnp.expand_dims(part, 3)
        case "column":
            part = jnp.expand_dims(part, 2)
        case "head":
            part = jnp.expand_dims(part, (2, 3))
        case "diagonal":
            if transposed:
                return jnp.moveaxis(skewed(part, at.tk, at.tq), 1, 2)
            part = skewed(jnp.flip(part, -1), at.tq, at.tk)
    return jnp.moveaxis(part, 3, 1) if transposed else part


def _residue(
    z: Shape, residue: Residue, parts: Any, at: Tile, transposed: bool, *logits: Array
) -> Array:
    tiles = [
        _spread(z, kind, part, at, transposed)
        for kind, part in zip(residue.kinds, parts, strict=True)
    ]
    program = residue.program
    ranks = [len(program.types[ref].shape) for ref in program.inputs]
    return pointwise(program, [*logits, *tiles], ranks)


def visible(config: Config, z: Shape, x: Inputs, at: Tile, transposed: bool) -> Array:
    """The mask on a tile, `[cb*ck|1, G|1, tq, tk]` or transposed, False beyond the edges."""
    shown = jnp.ones((1, 1, 1, 1), bool)
    if config.mask is not None:
        found = _residue(z, config.mask, parts_of(z, config.mask, x.mask, at), at, transposed)
        shown = found if found.ndim else found.reshape(1, 1, 1, 1)
    if z.Tp != z.T:
        q = at.i + jnp.arange(at.tq, dtype=jnp.int32) < z.T
        shown = shown & q.reshape((1, 1, 1, -1) if transposed else (1, 1, -1, 1))
    if z.Sp != z.S:
        k = at.j + jnp.arange(at.tk, dtype=jnp.int32) < z.S
        shown = shown & k.reshape((1, -1, 1, 1) if transposed else (1, 1, 1, -1))
    return shown


def kept(config: Config, z: Shape, x: Inputs, at: Tile, transposed: bool, like: Array) -> Array:
    """The factors of dropout on a tile: 0, or 1 / (1 - rate)."""
    kinds = ("row", "row", "column", "head")
    first, second, k, rate = (
        _spread(z, kind, sliced(z, kind, array, at), at, transposed)
        for kind, array in zip(kinds, x.dropout, strict=True)
    )
    keep = base.keeps((first, second), k, rate)
    return jnp.where(keep, base.kept_scale(rate, like.dtype), jnp.zeros((), like.dtype))


def cut_out(array: Array, starts: Any, sizes: Any) -> Array:
    """`lax.dynamic_slice` with starts of one dtype, whatever x64 says."""
    return lax.dynamic_slice(array, [jnp.asarray(n, jnp.int32) for n in starts], sizes)


def put_in(array: Array, part: Array, starts: Any) -> Array:
    """`lax.dynamic_update_slice` with starts of one dtype, whatever x64 says."""
    return lax.dynamic_update_slice(array, part, [jnp.asarray(n, jnp.int32) for n in starts])


def padded(array: Array, axis: int, length: int, mode: str = "constant") -> Array:
    """An array with one axis grown to `length`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return array if widths[axis][1] == 0 else jnp.pad(array, widths, mode=mode)


def _pad_operand(z: Shape, kind: str, array: Array) -> Array:
    """An operand up to whole tiles; edges repeat values that are there, which scores can take."""
    match kind:
        case "row":
            return padded(array, 3, z.Tp, "edge")
        case "column":
            return padded(array, 3, z.Sp, "edge")
        case "grid":
            return padded(padded(array, 3, z.Tp, "edge"), 4, z.Sp, "edge")
        case "diagonal":
            widths = [(0, 0)] * 3 + [(z.Sp - z.S, z.Tp - z.T)]
            return jnp.pad(array, widths, mode="edge") if max(widths[3]) else array
    return array


def pad_inputs(config: Config, z: Shape, x: Inputs) -> Inputs:
    """The inputs up to whole tiles, heads first."""

    def operands(residue: Residue | None, arrays: Any) -> Any:
        kinds = () if residue is None else residue.kinds
        return tuple(_pad_operand(z, c, a) for c, a in zip(kinds, arrays, strict=True))

    dropout = x.dropout
    if dropout:
        first, second, k, rate = dropout
        dropout = (
            padded(first, 3, z.Tp),
            padded(second, 3, z.Tp),
            padded(k, 3, z.Sp),
            rate,
        )
    return x._replace(
        query=heads_first(config, x.query, z.Tp),
        key=heads_first(config, x.key, z.Sp),
        value=heads_first(config, x.value, z.Sp),
        mask=operands(config.mask, x.mask),
        score=operands(config.score, x.score),
        dropout=dropout,
    )


def scored(
    config: Config, z: Shape, parts: Any, at: Tile, transposed: bool, logits: Array
) -> Array:
    """The score of the logits of a tile, in their shape and dtype."""
    assert config.score is not None
    return jnp.broadcast_to(
        _residue(z, config.score, parts, at, transposed, logits), logits.shape
    ).astype(logits.dtype)


def scale_of(z: Shape, x: Inputs, at: Tile) -> Array:
    """The scale of a step: a scalar, or `[cb*ck, 1, 1]`."""
    if x.scale.shape[0] == 1:
        return x.scale[0]
    part = cut_out(x.scale, [at.b], [z.cb])
    return jnp.repeat(part, z.ck)[:, None, None]


def heads_first(config: Config, array: Array, length: int) -> Array:
    """`[B, T, .., H]` as `[B * heads, length, H]`, padded with zeros, in the dtype of the products.

    Once, rather than tile by tile: rows of a head lie a power of two apart, which caches dislike.
    """
    array = padded(array, 1, length).astype(config.dtype)
    width = array.shape[-1]
    return jnp.moveaxis(array, 1, -2).reshape(-1, length, width)


def rows_of(z: Shape, array: Array, at: Tile) -> Array:
    """Queries of a step, or their cotangents: `[units, G * tq, width]` of `[B * N, T, width]`."""
    units, width = z.cb * z.ck, array.shape[-1]
    first = (at.b * z.K + at.h) * z.G
    part = cut_out(array, [first, at.i, 0], [units * z.G, at.tq, width])
    return part.reshape(units, z.G * at.tq, width)


def columns_of(z: Shape, array: Array, at: Tile) -> Array:
    """Keys or values of a step: `[units, tk, width]` of `[B * K, S, width]`."""
    first = at.b * z.K + at.h
    return cut_out(array, [first, at.j, 0], [z.cb * z.ck, at.tk, array.shape[-1]])


def accumulate(total: Array, part: Array, starts: Any) -> Array:
    """`total` with a part added from `starts` on."""
    old = cut_out(total, starts, part.shape)
    return put_in(total, old + part, starts)

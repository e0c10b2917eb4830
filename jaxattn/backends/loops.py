"""The loops of the tiled backend: flash-style attention over a list of active tiles, in plain XLA.

Arrays come with heads split into K key heads of G query heads each. A *step* computes one tile of
queries and keys for a few batch rows and key heads at once, as many as keep it in cache. States say
which tiles are computed, and which need no mask; where they are EMPTY nothing is done.

    forward   s = q k'          p = 2^(s - m)     l, acc rescaled, acc += p v
    backward  s' = k q'         p' = 2^(s' - lse)
              dv += p' do       dp' = v do'       ds' = p' (dp' - delta)
              dk += ds' q       dq' += k' ds'

The backward works on transposed tiles because no product then has a transposed left factor, which
XLA multiplies at half speed on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..program import Program
from ..shapes import Array, Float, Int, Shaped
from ..split import Kind, pointwise
from . import base

EMPTY, PARTIAL, FULL = 0, 1, 2

# Heads times cells of one step: large enough that starting its dozen operations is cheap, small
# enough that logits and weights stay in the caches (2 x 2 MB in float32 for a group of tiles).
STEP_CELLS = 128 * 1024

LOG2E, LN2 = math.log2(math.e), math.log(2)


class Residue(NamedTuple):
    """A residue of a mask or score, and how its operands are cut into tiles."""

    program: Program
    kinds: tuple[Kind, ...]


class Plan(NamedTuple):
    """What is the same for all values: hashable, the key of a compiled loop."""

    mask: Residue | None
    score: Residue | None
    dropout: bool
    precision: Any
    tile: tuple[int, int]


class Inputs(NamedTuple):
    """What the loops work on; extents of operands are 1 where they don't depend on b or h.

    Attributes:
      query: `[B, T, K, G, H]`.
      key, value: `[B, S, K, H]`, `[B, S, K, Hv]`.
      states: int8 `[B|1, K|1, G|1, nq, nk]`, or None: everything is FULL.
      scale: `[B|1]`.
      mask, score: operands of the residues, `[B|1, K|1, G|1, ...]`.
      dropout: nothing, or row keys twice `[B, K, G, T]`, key positions `[B|1, 1, 1, S]`, rate `[B|1]`.
    """

    query: Float[Array, "B T K G H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    states: Int[Array, "..."] | None
    scale: Float[Array, "..."]
    mask: tuple[Shaped[Array, "..."], ...]
    score: tuple[Shaped[Array, "..."], ...]
    dropout: tuple[Shaped[Array, "..."], ...]


# --- 2^x ------------------------------------------------------------------------------------------

# 2^r on [-1/2, 1/2], the largest relative error 2e-7 (a least-squares fit, reweighted to be
# minimax, with the constant term fixed to 1).
_EXP2 = (1.32647e-3, 9.67151e-3, 5.550734e-2, 0.24022242, 0.69314698, 1.0)


def exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`2 ** x` for x <= 0: in float32 half the time of XLA's, to 3e-7; exactly 0 below -127."""
    if x.dtype != jnp.float32:
        return jnp.exp2(x)
    x = jnp.maximum(x, jnp.float32(-127))
    # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    shifted = x + jnp.float32(12582912)
    rest = x - (shifted - jnp.float32(12582912))
    power = jnp.full_like(x, _EXP2[0])
    for c in _EXP2[1:]:
        power = power * rest + jnp.float32(c)
    exponent = lax.bitcast_convert_type(shifted, jnp.int32) << 23
    return lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + exponent, x.dtype)


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
    count: Int[Array, ""]
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
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)


def _shape(plan: Plan, x: Inputs) -> Shape:
    B, T, K, G, H = x.query.shape
    _, S, _, Hv = x.value.shape
    tq, tk = plan.tile
    by_b, by_h = (False, False) if x.states is None else (
        x.states.shape[0] != 1, max(x.states.shape[1:3]) != 1
    )
    # Half as many again, for numbers of heads such as 11 and 12.
    room = max(1, STEP_CELLS * 3 // 2 // (G * tq * tk))
    ck = 1 if by_h else _fit(K, room)
    cb = 1 if by_b or ck != K else _fit(B, room // ck)
    Tp, Sp = -(-T // tq) * tq, -(-S // tk) * tk
    return Shape(B, T, S, K, G, H, Hv, Tp, Sp, cb, ck)


def _work(plan: Plan, z: Shape, states: Array | None) -> list[Work]:
    """The lists: groups of 2 x 2 that are all FULL, or all active; and the other active tiles."""
    tq, tk = plan.tile
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
    gq, gk = min(nq, 2), min(nk, 2)
    wide = [(0, 0), (0, 0), (0, -nq % gq), (0, -nk % gk)]
    eb, eh = some.shape[:2]

    def grouped(flags: Array) -> Array:
        flags = jnp.pad(flags, wide)
        return flags.reshape(eb, eh, -(-nq // gq), gq, -(-nk // gk), gk).all((3, 5))

    full, most = grouped(all_), grouped(some)
    kinds = [(full, gq, gk, False), (most & ~full, gq, gk, True)]
    if gq * gk > 1:
        covered = jnp.repeat(jnp.repeat(most, gq, 2), gk, 3)[:, :, :nq, :nk]
        kinds.append((some & ~covered, 1, 1, True))

    # One list of all kinds, one after the other.
    flat = jnp.concatenate([flags.reshape(-1) for flags, *_ in kinds])
    running = jnp.cumsum(flat, dtype=jnp.int32)
    starts = jnp.concatenate([_starts(flags.shape, tq * by_q, tk * by_k) for flags, by_q, by_k, _ in kinds])
    # Where each goes: the place to which the running count sends it.
    place = jnp.where(flat, running - 1, flat.size)
    starts = jnp.zeros_like(starts).at[place].set(starts, mode="drop")
    repeats = z.B // z.cb if eb == 1 else 1, z.K // z.ck if eh == 1 else 1
    work, first, end = [], jnp.int32(0), -1
    for flags, by_q, by_k, masked in kinds:
        end += flags.size
        work.append(Work(starts, first, running[end] - first, repeats, tq * by_q, tk * by_k, masked))
        first = running[end]
    return work


def _starts(shape: tuple[int, ...], tq: int, tk: int) -> Int[Array, "n 4"]:
    """Where the tiles of an array of flags start, in b, h, q and k."""
    axes = [lax.broadcasted_iota(jnp.int32, shape, axis).reshape(-1) for axis in range(4)]
    return jnp.stack([axes[0], axes[1], axes[2] * tq, axes[3] * tk], 1)


def _loop(z: Shape, work: list[Work], step: Callable[..., Any], carry: Any) -> Any:
    """Runs `step(tile, carry)` over all lists, for all batch rows and heads."""
    for w in work:
        rb, rh = w.repeats

        def body(n: Any, carry: Any, w: Work = w, rh: int = rh) -> Any:
            count = jnp.maximum(w.count, 1)
            at = w.first + lax.rem(n, count)
            starts = lax.dynamic_index_in_dim(w.starts, at, keepdims=False)
            again = lax.div(n, count)
            b = starts[0] + lax.div(again, jnp.int32(rh)) * z.cb
            h = starts[1] + lax.rem(again, jnp.int32(rh)) * z.ck
            return step(Tile(b, h, starts[2], starts[3], w.tq, w.tk, w.masked), carry)

        carry = lax.fori_loop(0, w.count * (rb * rh), body, carry)
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


def _slice(z: Shape, kind: str, array: Array, at: Tile, groups: int = 1) -> Array:
    starts, sizes = _cut(z, kind, array, at, groups)
    return lax.dynamic_slice(array, starts, sizes)


def _add(z: Shape, kind: str, array: Array, part: Array, at: Tile, groups: int = 1) -> Array:
    starts, sizes = _cut(z, kind, array, at, groups)
    old = lax.dynamic_slice(array, starts, sizes)
    return lax.dynamic_update_slice(array, old + part.astype(array.dtype), starts)


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
                part = jnp.moveaxis(_skew(part, at.tk, at.tq), 1, 2)
                return part
            part = _skew(jnp.flip(part, -1), at.tq, at.tk)
    return jnp.moveaxis(part, 3, 1) if transposed else part


def _skew(line: Array, rows: int, columns: int) -> Array:
    """`out[.., r, c] = line[.., c - r + rows - 1]`, by reshapes: a gather would cost ten times."""
    lead = line.shape[:-1]
    period = rows + columns
    gap = jnp.zeros((*lead, 1), line.dtype)
    cycle = jnp.concatenate([line[..., rows - 1 :], gap, line[..., : rows - 1]], -1)
    flat = jnp.broadcast_to(cycle[..., None, :], (*lead, rows, period)).reshape(*lead, -1)
    return flat[..., : rows * (period - 1)].reshape(*lead, rows, period - 1)[..., :columns]


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


def _visible(plan: Plan, z: Shape, x: Inputs, at: Tile, transposed: bool) -> Array:
    """The mask on a tile, `[cb*ck|1, G|1, tq, tk]` or transposed, False beyond the edges."""
    shown = jnp.ones((1, 1, 1, 1), bool)
    if plan.mask is not None:
        parts = [_slice(z, c, a, at) for c, a in zip(plan.mask.kinds, x.mask, strict=True)]
        found = _residue(z, plan.mask, parts, at, transposed)
        shown = found if found.ndim else found.reshape(1, 1, 1, 1)
    if z.Tp != z.T:
        q = at.i + jnp.arange(at.tq, dtype=jnp.int32) < z.T
        shown = shown & q.reshape((1, 1, 1, -1) if transposed else (1, 1, -1, 1))
    if z.Sp != z.S:
        k = at.j + jnp.arange(at.tk, dtype=jnp.int32) < z.S
        shown = shown & k.reshape((1, -1, 1, 1) if transposed else (1, 1, 1, -1))
    return shown


def _kept(plan: Plan, z: Shape, x: Inputs, at: Tile, transposed: bool, like: Array) -> Array:
    """The factors of dropout on a tile: 0, or 1 / (1 - rate)."""
    kinds = ("row", "row", "column", "head")
    first, second, k, rate = (
        _spread(z, kind, _slice(z, kind, array, at), at, transposed)
        for kind, array in zip(kinds, x.dropout, strict=True)
    )
    keep = base.keeps((first, second), k, rate)
    return jnp.where(keep, base.kept_scale(rate).astype(like.dtype), jnp.zeros((), like.dtype))


def _padded(array: Array, axis: int, length: int, mode: str = "constant") -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return array if widths[axis][1] == 0 else jnp.pad(array, widths, mode=mode)


def _pad_operand(z: Shape, kind: str, array: Array) -> Array:
    """An operand up to whole tiles; edges repeat values that are there, which scores can take."""
    match kind:
        case "row":
            return _padded(array, 3, z.Tp, "edge")
        case "column":
            return _padded(array, 3, z.Sp, "edge")
        case "grid":
            return _padded(_padded(array, 3, z.Tp, "edge"), 4, z.Sp, "edge")
        case "diagonal":
            widths = [(0, 0)] * 3 + [(z.Sp - z.S, z.Tp - z.T)]
            return jnp.pad(array, widths, mode="edge") if max(widths[3]) else array
    return array


def _pad_inputs(plan: Plan, z: Shape, x: Inputs) -> Inputs:
    def padded(residue: Residue | None, arrays: Any) -> Any:
        kinds = () if residue is None else residue.kinds
        return tuple(_pad_operand(z, c, a) for c, a in zip(kinds, arrays, strict=True))

    dropout = x.dropout
    if dropout:
        first, second, k, rate = dropout
        dropout = (
            _padded(first, 3, z.Tp),
            _padded(second, 3, z.Tp),
            _padded(k, 3, z.Sp),
            rate.reshape(-1, 1, 1),
        )
    return x._replace(
        query=_heads_first(x.query, z.Tp),
        key=_heads_first(x.key, z.Sp),
        value=_heads_first(x.value, z.Sp),
        mask=padded(plan.mask, x.mask), score=padded(plan.score, x.score), dropout=dropout
    )


def _like(reference: Array, shape: tuple[int, ...], dtype: Any, fill: float = 0) -> Array:
    """A constant that varies over the same mesh axes as `reference`, as a loop's carry must."""
    full = jnp.full(shape, fill, dtype)
    axes = tuple(getattr(jax.typeof(reference), "vma", ()))
    return lax.pcast(full, axes, to="varying") if axes else full


def _dot(plan: Plan, dtype: Any) -> Callable[..., Any]:
    precision = lax.Precision.HIGHEST if plan.precision is None else plan.precision

    def dot(a: Array, b: Array, ca: int, cb: int) -> Array:
        """Products of stacks of matrices, contracting axis `ca` of one with `cb` of the other."""
        dims = (((ca,), (cb,)), ((0,), (0,)))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=dtype)

    return dot


def _score(
    plan: Plan, z: Shape, parts: Any, at: Tile, transposed: bool, logits: Array
) -> Array:
    assert plan.score is not None
    return jnp.broadcast_to(
        _residue(z, plan.score, parts, at, transposed, logits), logits.shape
    ).astype(logits.dtype)


def _scale(z: Shape, x: Inputs, at: Tile) -> Array:
    """The scale of a step: a scalar, or `[cb*ck, 1, 1]`."""
    if x.scale.shape[0] == 1:
        return x.scale[0]
    part = lax.dynamic_slice(x.scale, [at.b], [z.cb])
    return jnp.repeat(part, z.ck)[:, None, None]


def _heads_first(array: Array, length: int) -> Array:
    """`[B, T, .., H]` as `[B * heads, length, H]`, padded with zeros.

    Once, rather than tile by tile: rows of a head lie a power of two apart, which caches dislike.
    """
    array = _padded(array, 1, length)
    width = array.shape[-1]
    return jnp.moveaxis(array, 1, -2).reshape(-1, length, width)


def _rows(z: Shape, array: Array, at: Tile) -> Array:
    """Queries of a step, or their cotangents: `[units, G * tq, width]` of `[B * N, T, width]`."""
    units, width = z.cb * z.ck, array.shape[-1]
    first = (at.b * z.K + at.h) * z.G
    part = lax.dynamic_slice(array, [first, at.i, 0], [units * z.G, at.tq, width])
    return part.reshape(units, z.G * at.tq, width)


def _columns(z: Shape, array: Array, at: Tile) -> Array:
    """Keys or values of a step: `[units, tk, width]` of `[B * K, S, width]`."""
    first = at.b * z.K + at.h
    return lax.dynamic_slice(array, [first, at.j, 0], [z.cb * z.ck, at.tk, array.shape[-1]])


def _felt(finite: Array, shown: Array, axes: tuple[int, int]) -> Array:
    """Which keys anyone in a tile sees: the others may hold NaN, and 0 * NaN is NaN.

    Only looked up where something is not finite: it costs as much as a pass over the logits.
    """
    kept = shown.shape[1 if axes == (2, 3) else 3]
    whole = jnp.ones((shown.shape[0], kept), bool) | jnp.zeros_like(shown[:, :1, :1, :1]).any((2, 3))
    return lax.cond(finite, lambda s: whole, lambda s: s.any(axes), shown)


def _finite(*arrays: Array) -> Array:
    """Whether all is finite; False now and then for what is, if its sum is not."""
    return jnp.stack([a.sum(dtype=base.accumulator(a.dtype)) * 0 == 0 for a in arrays]).all()


# --- forward --------------------------------------------------------------------------------------


def forward(plan: Plan, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    z = _shape(plan, x)
    dtype = base.accumulator(x.query.dtype)
    low, nothing = jnp.asarray(base.sentinel(dtype), dtype), jnp.zeros((), dtype)
    dot = _dot(plan, dtype)
    work = _work(plan, z, x.states)
    finite = _finite(x.value)
    x = _pad_inputs(plan, z, x)
    units = z.cb * z.ck

    def step(at: Tile, carry: Any) -> Any:
        acc, ml = carry
        rows = z.G * at.tq
        grid = (units, z.G, at.tq, at.tk)
        c = _scale(z, x, at)
        # A negative scale turns the order of logits around, and their maximum with it.
        qt = _rows(z, x.query, at) * jnp.where(c < 0, -1, 1).astype(x.query.dtype)
        vt = _columns(z, x.value, at)
        s = dot(qt, _columns(z, x.key, at), 2, 2)
        c = jnp.abs(c)
        if at.masked:
            shown = _visible(plan, z, x, at, transposed=False)
            felt = _felt(finite, shown, (1, 2))[..., None]
            vt = jnp.where(felt, vt, jnp.zeros((), vt.dtype))
        if plan.score is not None:
            s = (s * c).reshape(grid)
            if at.masked:
                s = jnp.where(shown, s, nothing)
            parts = [_slice(z, n, a, at) for n, a in zip(plan.score.kinds, x.score, strict=True)]
            s = _score(plan, z, parts, at, False, s).reshape(units, rows, at.tk)
            c = jnp.ones((), dtype)
        c = c * LOG2E
        if at.masked:
            s = jnp.where(shown, (s * c).reshape(grid), low).reshape(s.shape)
            c = jnp.ones((), dtype)

        u = at.b * z.K + at.h
        old = lax.optimization_barrier(
            lax.dynamic_slice(ml, [u, 0, at.i], [units, 2 * z.G, at.tq])
        )
        m, l = (a[:, 0] for a in jnp.split(old.reshape(units, 2, rows), 2, 1))
        top = jnp.maximum(m, s.max(2) * (c[..., 0] if c.ndim else c))
        p = exp2((s if at.masked else s * c) - top[..., None])
        fade = exp2(m - top)
        l = l * fade + p.sum(2)
        if plan.dropout:
            keep = _kept(plan, z, x, at, False, p)
            p = (p.reshape(grid) * keep).reshape(s.shape)
        here = [u * z.G, at.i, 0], [units * z.G, at.tq, z.Hv]
        part = lax.dynamic_slice(acc, *here).reshape(units, rows, z.Hv)
        part = part * fade[..., None] + dot(p.astype(vt.dtype), vt, 2, 1)
        acc = lax.dynamic_update_slice(acc, part.reshape(here[1]), here[0])
        new = jnp.stack([top, l], 1).reshape(old.shape)
        return acc, lax.dynamic_update_slice(ml, new, [u, 0, at.i])

    acc = _like(x.query, (z.B * z.K * z.G, z.Tp, z.Hv), dtype)
    # So far above masked logits that the weights of those are 0 from the first tile on. One array
    # of m and l: two would be copied in every step.
    m = _like(x.query, (z.B * z.K, z.G, z.Tp), dtype, base.sentinel(dtype) / 2**20)
    acc, ml = _loop(z, work, step, (acc, jnp.concatenate([m, jnp.zeros_like(m)], 1)))
    acc = acc.reshape(z.B, z.K, z.G, z.Tp, z.Hv)[..., : z.T, :]
    ml = ml.reshape(z.B, z.K, 2, z.G, z.Tp)[..., : z.T]
    m, l = ml[:, :, 0], ml[:, :, 1]
    seen = l != 0
    total = jnp.where(seen, l, jnp.ones((), dtype))
    out = jnp.where(seen[..., None], acc / total[..., None], nothing).astype(x.query.dtype)
    lse = jnp.where(seen, (m + jnp.log2(total)) * LN2, -jnp.inf)
    return out.transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2)


# --- backward -------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Cotangents: of query, key, value, scale (`[B]` always), and of the score's operands."""

    query: Array
    key: Array
    value: Array
    scale: Array
    score: tuple[Array | None, ...]


def backward(
    plan: Plan,
    groups: int,
    x: Inputs,
    out: Float[Array, "B T K G Hv"],
    lse: Float[Array, "B T K G"],
    d_out: Float[Array, "B T K G Hv"],
    d_lse: Float[Array, "B T K G"],
) -> Gradients:
    """Cotangents of the inputs, in one pass.

    Operands that the batch rows share get one gradient for each of `groups` equal groups of rows.
    """
    z = _shape(plan, x)
    if groups > 1:
        z = z._replace(cb=1)
    dtype = base.accumulator(x.query.dtype)
    dot = _dot(plan, dtype)
    work = _work(plan, z, x.states)
    finite = _finite(x.key, x.value)
    units = z.cb * z.ck
    zero = jnp.zeros((), dtype)

    # Rows that see nothing take no part, whatever they hold and whatever cotangent they get.
    seen = lse != -jnp.inf
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1) - d_lse
    lines = [jnp.where(seen, lse * LOG2E, zero), jnp.where(seen, delta, zero), seen.astype(dtype)]
    line = jnp.stack([_padded(a.transpose(0, 2, 3, 1), 3, z.Tp) for a in lines], 2)
    line = line.reshape(z.B * z.K, 3 * z.G, z.Tp)
    whole, x = x, _pad_inputs(plan, z, x)
    d_out = _heads_first(d_out, z.Tp)
    learned = [n for n, a in enumerate(x.score) if jnp.issubdtype(a.dtype, jnp.floating)]

    def step(at: Tile, carry: Any) -> Any:
        dq, dk, dv, ds_parts = carry
        u = at.b * z.K + at.h
        rows = z.G * at.tq
        grid = (units, at.tk, z.G, at.tq)
        qt, dt = _rows(z, x.query, at), _rows(z, d_out, at)
        kt, vt = _columns(z, x.key, at), _columns(z, x.value, at)
        block = lax.dynamic_slice(line, [u, 0, at.i], [units, 3 * z.G, at.tq])
        lse_t, delta_t, seen_t = jnp.split(block.reshape(units, 3, rows), 3, 1)
        if at.masked:
            shown = _visible(plan, z, x, at, transposed=True)
            felt = _felt(finite, shown, (2, 3))[..., None]
            kt, vt = (jnp.where(felt, a, jnp.zeros((), a.dtype)) for a in (kt, vt))
            some = seen_t.reshape(units, rows, 1) != 0
            qt, dt = (jnp.where(some, a, jnp.zeros((), a.dtype)) for a in (qt, dt))
        s = dot(kt, qt, 2, 2)
        c = _scale(z, x, at)
        exponent = s * (c * LOG2E)
        if plan.score is not None:
            logits = (s * c).reshape(grid)
            if at.masked:
                logits = jnp.where(shown, logits, zero)
            parts = [_slice(z, n, a, at) for n, a in zip(plan.score.kinds, x.score, strict=True)]

            def scored(logits: Array, learnt: list[Array]) -> Array:
                given = list(parts)
                for n, part in zip(learned, learnt, strict=True):
                    given[n] = part
                return _score(plan, z, given, at, True, logits)

            scores, pull = jax.vjp(scored, logits, [parts[n] for n in learned])
            exponent = scores.reshape(s.shape) * LOG2E
        exponent = exponent - lse_t
        if at.masked:
            # Before the exponential, not after: what is masked may be too large for it.
            exponent = jnp.where(shown, exponent.reshape(grid), -jnp.inf).reshape(s.shape)
        p = exp2(exponent)
        dp = dot(vt, dt, 2, 2)
        kept = p
        if plan.dropout:
            keep = _kept(plan, z, x, at, True, p)
            kept = (p.reshape(grid) * keep).reshape(s.shape)
            dp = (dp.reshape(grid) * keep).reshape(s.shape)
        dv_part = dot(kept.astype(dt.dtype), dt, 2, 1)
        ds = p * (dp - delta_t)
        if plan.score is not None:
            d_logits, d_parts = pull(ds.reshape(grid))
            if at.masked:
                d_logits = jnp.where(shown, d_logits, zero)
            ds = d_logits.reshape(s.shape)
            ds_parts = tuple(
                _add(z, plan.score.kinds[n], total, part, at, groups)
                for n, total, part in zip(learned, ds_parts, d_parts, strict=True)
            )
        ds = ds.astype(qt.dtype)
        dk_part, dq_part = dot(ds, qt, 2, 1), dot(jnp.swapaxes(kt, 1, 2), ds, 2, 1)
        if c.ndim:
            # The scale of dq, and of dk where it is one for all, waits until the end.
            dk_part = dk_part * c
        dq = _accumulate(dq, dq_part.reshape(units, z.H * z.G, at.tq), [u, 0, at.i])
        dk, dv = _accumulate(dk, dk_part, [u, at.j, 0]), _accumulate(dv, dv_part, [u, at.j, 0])
        return dq, dk, dv, ds_parts

    def shared(n: int) -> Array:
        array = x.score[n]
        extent = groups if array.shape[0] == 1 else z.B
        return _like(x.query, (extent, *array.shape[1:]), base.accumulator(array.dtype))

    dq, dk, dv, parts = _loop(
        z,
        work,
        step,
        (
            _like(x.query, (z.B * z.K, z.H * z.G, z.Tp), dtype),
            _like(x.query, (z.B * z.K, z.Sp, z.H), dtype),
            _like(x.query, (z.B * z.K, z.Sp, z.Hv), dtype),
            tuple(map(shared, learned)),
        ),
    )
    dq = dq.reshape(z.B, z.K, z.H, z.G, z.Tp)[..., : z.T].transpose(0, 4, 1, 3, 2)
    dk = dk.reshape(z.B, z.K, z.Sp, z.H)[:, :, : z.S].transpose(0, 2, 1, 3)
    dv = dv.reshape(z.B, z.K, z.Sp, z.Hv)[:, :, : z.S].transpose(0, 2, 1, 3)
    query = jnp.where(seen[..., None], whole.query, jnp.zeros((), whole.query.dtype))
    d_scale = (query.astype(dtype) * dq).sum((1, 2, 3, 4))
    by_row = x.scale.reshape(-1, 1, 1, 1)
    if x.scale.shape[0] == 1:
        dk = dk * by_row
    score: list[Array | None] = [None] * len(x.score)
    for n, part in zip(learned, parts, strict=True):
        assert plan.score is not None
        like = whole.score[n]
        if plan.score.kinds[n] == "diagonal":
            part = part[..., z.Sp - z.S :]
        score[n] = part[(..., *map(slice, like.shape[3:]))].astype(like.dtype)
    return Gradients(
        (dq * by_row[..., None]).astype(whole.query.dtype),
        dk.astype(whole.key.dtype),
        dv.astype(whole.value.dtype),
        d_scale,
        tuple(score),
    )


def _accumulate(total: Array, part: Array, starts: Any) -> Array:
    old = lax.dynamic_slice(total, starts, part.shape)
    return lax.dynamic_update_slice(total, old + part, starts)

"""Attention as kernels for NVIDIA GPUs, written in Pallas and compiled by Triton.

    forward   a program for each tile of queries and query head    s = q k'    acc += e^(s - m) v
    queries   the same                                             dq += ds k
    keys      a program for each tile of keys and key head         dv += p' do     dk += ds' q
    tables    a program for each tile of a score's table           dt += ds

Every program runs over its own list of active tiles (`lists.py`) and owns what it writes: no atomic
operations, the same bits every time. Logits are kept in powers of 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...shapes import Array, Float
from ..flash import tile_lists
from ..problem import Config, Engine, Gradients, Inputs
from . import tiles as tiles

# --- forward --------------------------------------------------------------------------------------


def _forward(how: tiles.How, config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` in the query's dtype, and natural-log LSE `[B, T, K, G]`."""
    block = _blocks(how, x).forward
    z = tiles.shape_of(x, block)
    given = tiles.given_to(config, z, x) | tile_lists.rows(_states(config, z, x))._asdict()

    def kernel(refs: Any, out_ref: Any, lse_ref: Any) -> None:
        i, at = tiles.programs(z)
        q = refs["q"][at.b, pl.ds(i * z.tq, z.tq), at.k, at.g, :]
        scale = refs["scale"][0 if x.scale.shape[0] == 1 else at.b]

        def step(masked: bool, j: Any, carry: Any) -> Any:
            acc, m, l = carry
            k = refs["k"][at.b, pl.ds(j * z.tk, z.tk), at.k, :]
            v = refs["v"][at.b, pl.ds(j * z.tk, z.tk), at.k, :]
            shown = tiles.visible(config, z, refs, at, i, j) if masked else None
            s, _ = _exponents(
                config, z, refs, at, i, j, tiles.dot(config, q, k, 1, 1), scale, shown
            )
            if shown is not None:
                s = jnp.where(shown, s, -jnp.inf)
            top = jnp.maximum(m, s.max(1))
            # Rows that have seen nothing so far are measured from 0: -inf - -inf is NaN.
            level = jnp.where(top == -jnp.inf, 0.0, top)
            p, fade = jnp.exp2(s - level[:, None]), jnp.exp2(m - level)
            l = l * fade + p.sum(1)
            if config.dropout:
                p = tiles.dropped(z, refs, at, i, j, p)
            return acc * fade[:, None] + tiles.dot(config, p.astype(v.dtype), v, 1, 0), top, l

        m = jnp.full((z.tq,), -jnp.inf, jnp.float32)
        carry = jnp.zeros((z.tq, z.Hvp), jnp.float32), m, jnp.zeros((z.tq,), jnp.float32)
        acc, m, l = tiles.over_list(refs, at, i, step, carry, tiles.has_masks(config, z))
        seen = l != 0
        total = jnp.where(seen, l, 1.0)
        out = jnp.where(seen[:, None], acc / total[:, None], 0.0)
        out_ref[...] = out.astype(out_ref.dtype)
        lse_ref[...] = jnp.where(seen, m * (1 / tiles.LOG2E) + jnp.log(total), -jnp.inf)

    out, lse = tiles.launch(
        kernel, "forward", how.interpret, block, (z.Tp // z.tq, z.N, z.B), given,
        [
            ((z.B, z.Tp, z.N, z.Hvp), x.query.dtype, *_rows_of(z, z.Hvp)),
            ((z.B, z.N, z.Tp), jnp.float32, *_line_of(z.tq)),
        ],
    )  # fmt: skip
    out = out[:, : z.T, :, : z.Hv].reshape(z.B, z.T, z.K, z.G, z.Hv)
    return out, _by_query(z, lse)


def _blocks(how: tiles.How, x: Inputs) -> tiles.Blocks:
    _, T, _, _, H = x.query.shape
    _, S, _, Hv = x.value.shape
    return tiles.blocks_of(how, H, Hv, T, S, x.query.dtype)


def _states(config: Config, z: tiles.Shape, x: Inputs) -> Array:
    return tile_lists.states_of(x.states, config.tile, (z.tq, z.tk), z.T, z.S)


def _rows_of(z: tiles.Shape, wide: int) -> tuple[Any, Any]:
    """Block and index map of a tile of rows of a head in `[B, Tp, N, wide]`."""
    return (None, z.tq, None, wide), lambda i, n, b: (b, i, n, 0)


def _line_of(tile: int) -> tuple[Any, Any]:
    """Block and index map of a tile's numbers in `[B, N, length]`."""
    return (None, None, tile), lambda i, n, b: (b, n, i)


def _by_query(z: tiles.Shape, line: Array) -> Array:
    """`[B, N, Tp]` as `[B, T, K, G]`."""
    return line[..., : z.T].reshape(z.B, z.K, z.G, z.T).transpose(0, 3, 1, 2)


def _exponents(
    config: Config, z: tiles.Shape, refs: Any, at: tiles.Head, i: Any, j: Any, s: Array, scale: Any,
    shown: Array | None, learned: Sequence[int] | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, list[Array]]]]:  # fmt: skip
    """Logits of a tile from products, in powers of 2, and the way back.

    That goes from cotangents of logits in powers of e to those of scaled products, and of the
    `learned` operands of the score, all as large as the tile; for `None` there is none.
    """
    if config.score is None:
        return s * (scale * tiles.LOG2E), lambda ds: (ds, [])
    logits = s * scale
    if shown is not None:
        logits = jnp.where(shown, logits, 0.0)
    parts = tiles.parts_of(z, config.score, refs["score"], at, i, j)

    def scored(logits: Array, learnt: list[Array]) -> Array:
        given = list(parts)
        for n, part in zip(learned or (), learnt, strict=True):
            given[n] = part
        return tiles.scored(config, given, logits)

    if learned is None:
        return scored(logits, []) * tiles.LOG2E, lambda ds: (ds, [])
    found, pull = jax.vjp(scored, logits, [jnp.broadcast_to(parts[n], s.shape) for n in learned])
    return found * tiles.LOG2E, pull


# --- backward -------------------------------------------------------------------------------------


def _backward(
    how: tiles.How, config: Config, groups: int, x: Inputs, out: Float[Array, "B T K G Hv"],
    lse: Float[Array, "B T K G"], d_out: Float[Array, "B T K G Hv"], d_lse: Float[Array, "B T K G"],
) -> Gradients:  # fmt: skip
    """Cotangents of the inputs; see `Engine`."""
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    seen = lse != -jnp.inf
    lines = jnp.where(seen, lse * tiles.LOG2E, jnp.inf), delta
    given = tiles.Cotangents(d_out.astype(x.query.dtype), *(a.transpose(0, 2, 3, 1) for a in lines))
    score: list[Array | None] = [None] * len(x.score)
    by_kind: dict[str, list[int]] = {}
    for n, array in enumerate(x.score):
        if jnp.issubdtype(array.dtype, jnp.floating):
            assert config.score is not None
            by_kind.setdefault(config.score.kinds[n], []).append(n)

    def of(*kinds: str) -> list[int]:
        return sorted(n for kind in kinds for n in by_kind.get(kind, ()))

    blocks = _blocks(how, x)
    query, scale, found = _d_queries(how, config, blocks.queries, x, given, of("row", "head"))
    key, value, more = _d_keys(how, config, blocks.keys, x, given, of("column"))
    for n, part in (found | more).items():
        score[n] = _gathered(part, x.score[n], groups)
    for n in of("grid", "diagonal"):
        score[n] = _d_table(how, config, blocks.tables, x, given, n, groups)
    return Gradients(query, key, value, scale, tuple(score))


def _gathered(part: Array, operand: Array, groups: int) -> Array:
    """Gradients `[B, K, G, ...]` summed over what an operand is shared by."""
    extents = (groups if operand.shape[0] == 1 else part.shape[0], *operand.shape[1:3])
    for axis, extent in enumerate(extents):
        if part.shape[axis] != extent:
            shape = (*part.shape[:axis], extent, -1, *part.shape[axis + 1 :])
            part = part.reshape(shape).sum(axis + 1)
    return part.astype(operand.dtype)


class Rows(NamedTuple):
    """A tile of queries with what its backward needs."""

    q: Array
    do: Array
    lse: Array
    delta: Array


def _rows(z: tiles.Shape, refs: Any, at: tiles.Head, i: Any) -> Rows:
    here = pl.ds(i * z.tq, z.tq)
    q, do = (refs[name][at.b, here, at.k, at.g, :] for name in ("q", "do"))
    lse, delta = (refs[name][at.b, at.k, at.g, here] for name in ("lse", "delta"))
    return Rows(q, do, lse, delta)


def _slopes(
    config: Config, z: tiles.Shape, refs: Any, at: tiles.Head, i: Any, j: Any, rows: Rows, k: Array,
    v: Array, scale: Any, shown: Array | None, learned: Sequence[int] = (),
) -> tuple[Array, Array, list[Array]]:  # fmt: skip
    """Of a tile: weights after dropout, cotangents of scaled products and of score operands."""

    def product(of_queries: Array, of_keys: Array) -> Array:
        pair = (of_keys, of_queries) if z.across else (of_queries, of_keys)
        return tiles.dot(config, *pair, 1, 1)

    s, pull = _exponents(config, z, refs, at, i, j, product(rows.q, k), scale, shown, learned)
    s = s - z.of_queries(rows.lse)
    if shown is not None:
        # Before the exponential, not after: what is masked may be too large for it.
        s = jnp.where(shown, s, -jnp.inf)
    p = jnp.exp2(s)
    dp = product(rows.do, v)
    kept = p
    if config.dropout:
        kept, dp = (tiles.dropped(z, refs, at, i, j, a) for a in (p, dp))
    ds = p * (dp - z.of_queries(rows.delta))
    if shown is not None:
        ds = jnp.where(shown, ds, 0.0)
    ds, parts = pull(ds)
    if shown is not None and config.score is not None:
        ds = jnp.where(shown, ds, 0.0)
    return kept, ds, [part.astype(jnp.float32) for part in parts]


def _d_queries(
    how: tiles.How,
    config: Config,
    block: tiles.Block,
    x: Inputs,
    cotangents: tiles.Cotangents,
    learned: list[int],
) -> tuple[Array, Array, dict[int, Array]]:
    """Gradients of the queries, of the scale `[B]`, and of rows and heads of the score."""
    z = tiles.shape_of(x, block)
    given = (
        tiles.given_to(config, z, x)
        | cotangents.given(z)
        | tile_lists.rows(_states(config, z, x))._asdict()
        | cotangents.given(z)
        | tile_lists.rows(_states(config, z, x))._asdict()
    )
    kinds = [config.score.kinds[n] for n in learned] if config.score is not None else []

    def kernel(refs: Any, dq_ref: Any, dc_ref: Any, *part_refs: Any) -> None:
        i, at = tiles.programs(z)
        rows = _rows(z, refs, at, i)
        scale = refs["scale"][0 if x.scale.shape[0] == 1 else at.b]

        def step(masked: bool, j: Any, carry: Any) -> Any:
            dq, sums = carry
            k = refs["k"][at.b, pl.ds(j * z.tk, z.tk), at.k, :]
            v = refs["v"][at.b, pl.ds(j * z.tk, z.tk), at.k, :]
            shown = tiles.visible(config, z, refs, at, i, j) if masked else None
            _, ds, parts = _slopes(config, z, refs, at, i, j, rows, k, v, scale, shown, learned)
            sums = tuple(total + part.sum(1) for total, part in zip(sums, parts, strict=True))
            return dq + tiles.dot(config, ds.astype(k.dtype), k, 1, 0), sums

        dq = jnp.zeros((z.tq, z.Hp), jnp.float32)
        sums = tuple(jnp.zeros((z.tq,), jnp.float32) for _ in learned)
        dq, sums = tiles.over_list(refs, at, i, step, (dq, sums), tiles.has_masks(config, z))
        dq_ref[...] = (dq * scale).astype(dq_ref.dtype)
        dc_ref[...] = (rows.q.astype(jnp.float32) * dq).sum(1)
        for ref, total in zip(part_refs, sums, strict=True):
            ref[...] = total

    line = ((z.B, z.N, z.Tp), jnp.float32, *_line_of(z.tq))
    dq, dc, *sums = tiles.launch(
        kernel, "queries", how.interpret, block, (z.Tp // z.tq, z.N, z.B), given,
        [((z.B, z.Tp, z.N, z.Hp), x.query.dtype, *_rows_of(z, z.Hp)), *[line] * (1 + len(learned))],
    )  # fmt: skip
    parts = {}
    for n, kind, total in zip(learned, kinds, sums, strict=True):
        total = total[..., : z.T].reshape(z.B, z.K, z.G, z.T)
        parts[n] = total.sum(-1) if kind == "head" else total
    dq = dq[:, : z.T, :, : z.H].reshape(x.query.shape)
    return dq, dc.sum((1, 2)), parts


def _d_keys(
    how: tiles.How,
    config: Config,
    block: tiles.Block,
    x: Inputs,
    cotangents: tiles.Cotangents,
    learned: list[int],
) -> tuple[Array, Array, dict[int, Array]]:
    """Gradients of keys and values, summed over the queries of a key head, and of columns."""
    z = tiles.shape_of(x, block, across=True)
    columns = tile_lists.rows(jnp.swapaxes(_states(config, z, x), 3, 4))
    given = tiles.given_to(config, z, x) | cotangents.given(z) | columns._asdict()

    def kernel(refs: Any, dk_ref: Any, dv_ref: Any, *part_refs: Any) -> None:
        j, head, b = (pl.program_id(axis) for axis in range(3))
        k = refs["k"][b, pl.ds(j * z.tk, z.tk), head, :]
        v = refs["v"][b, pl.ds(j * z.tk, z.tk), head, :]
        scale = refs["scale"][0 if x.scale.shape[0] == 1 else b]

        def one(g: Any, carry: Any) -> Any:
            at = tiles.Head(b, head, g)

            def step(masked: bool, i: Any, carry: Any) -> Any:
                dk, dv, sums = carry
                rows = _rows(z, refs, at, i)
                shown = tiles.visible(config, z, refs, at, i, j) if masked else None
                p, ds, parts = _slopes(config, z, refs, at, i, j, rows, k, v, scale, shown, learned)
                sums = tuple(total + part.sum(1) for total, part in zip(sums, parts, strict=True))
                dk = dk + tiles.dot(config, ds.astype(k.dtype), rows.q, 1, 0)
                return dk, dv + tiles.dot(config, p.astype(k.dtype), rows.do, 1, 0), sums

            sums = tuple(jnp.zeros((z.tk,), jnp.float32) for _ in learned)
            *carry, sums = tiles.over_list(
                refs, at, j, step, (*carry, sums), tiles.has_masks(config, z)
            )
            for ref, total in zip(part_refs, sums, strict=True):
                ref[g, :] = total
            return tuple(carry)

        zero = (jnp.zeros((z.tk, wide), jnp.float32) for wide in (z.Hp, z.Hvp))
        dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(z.G), one, tuple(zero))
        dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv.astype(dv_ref.dtype)

    part = (
        (z.B, z.K, z.G, z.Sp), jnp.float32, (None, None, z.G, z.tk), lambda j, k, b: (b, k, 0, j),
    )  # fmt: skip
    dk, dv, *sums = tiles.launch(
        kernel, "keys", how.interpret, block, (z.Sp // z.tk, z.K, z.B), given,
        [
            (
                (z.B, z.Sp, z.K, wide), x.key.dtype, (None, z.tk, None, wide),
                lambda j, k, b: (b, j, k, 0),
            )
            for wide in (z.Hp, z.Hvp)
        ]
        + [part] * len(learned),
    )  # fmt: skip
    parts = {n: total[..., : z.S] for n, total in zip(learned, sums, strict=True)}
    return dk[:, : z.S, :, : z.H], dv[:, : z.S, :, : z.Hv], parts


def _d_table(
    how: tiles.How, config: Config, block: tiles.Block, x: Inputs, cotangents: tiles.Cotangents,
    n: int, groups: int,
) -> Array:  # fmt: skip
    """The gradient of an operand of the score that has a number for each pair, or each distance.

    A program owns a tile of the table, or all tiles along one diagonal, and sums over the batch
    rows, heads and tiles that share it: the others would need memory for a table of each head.
    """
    z = tiles.shape_of(x, block)
    states = _states(config, z, x)
    given = (
        tiles.given_to(config, z, x) | cotangents.given(z) | {"states": states.astype(jnp.int32)}
    )
    assert config.score is not None
    operand, diagonal = x.score[n], config.score.kinds[n] == "diagonal"
    nq, nk = z.Tp // z.tq, z.Sp // z.tk
    # Enough programs, also where all heads share one line.
    ek, eg = (z.K, z.G) if diagonal else operand.shape[1:3]
    eb = groups if operand.shape[0] == 1 else z.B
    owned, shared = nq + nk - 1 if diagonal else nq * nk, (z.B // eb, z.K // ek, z.G // eg)
    members = math.prod(shared)

    def kernel(refs: Any, ref: Any) -> None:
        tile, head, batch = (pl.program_id(axis) for axis in range(3))

        def member(m: Any, total: Array) -> Array:
            at = tiles.Head(
                batch * shared[0] + lax.div(m, shared[1] * shared[2]),
                lax.div(head, eg) * shared[1] + lax.rem(lax.div(m, shared[2]), shared[1]),
                lax.rem(head, eg) * shared[2] + lax.rem(m, shared[2]),
            )
            scale = refs["scale"][0 if x.scale.shape[0] == 1 else at.b]

            def add(i: Any, j: Any, total: Array) -> Array:
                rows = _rows(z, refs, at, i)
                k = refs["k"][at.b, pl.ds(j * z.tk, z.tk), at.k, :]
                v = refs["v"][at.b, pl.ds(j * z.tk, z.tk), at.k, :]
                shown = (
                    tiles.visible(config, z, refs, at, i, j) if tiles.has_masks(config, z) else None
                )
                found = _slopes(config, z, refs, at, i, j, rows, k, v, scale, shown, [n])
                return total + found[2][0]

            def visit(i: Any, j: Any, total: Array) -> Array:
                state = refs["states"][(*tiles.own_of(refs["states"], at), i, j)]
                # A loop of one turn or none: an empty tile costs a look at its state.
                return lax.fori_loop(
                    jnp.int32(0), jnp.minimum(state, 1), lambda _, t: add(i, j, t), total
                )

            if not diagonal:
                return visit(lax.div(tile, nk), lax.rem(tile, nk), total)
            # The tiles (i, i - (tile - (nk - 1))) that there are.
            first = jnp.maximum(tile - (nk - 1), 0)
            last = jnp.minimum(tile + 1, nq)
            return lax.fori_loop(first, last, lambda i, t: visit(i, i + (nk - 1) - tile, t), total)

        total = jnp.zeros((z.tq, z.tk), jnp.float32)
        ref[...] = lax.fori_loop(jnp.int32(0), jnp.int32(members), member, total)

    def of_diagonal(tile: Any, head: Any, batch: Any) -> tuple[Any, ...]:
        return batch, head, tile, 0, 0

    def of_pairs(tile: Any, head: Any, batch: Any) -> tuple[Any, ...]:
        return batch, head, lax.div(tile, nk), lax.rem(tile, nk)

    shape: tuple[int, ...] = (owned, z.tq, z.tk) if diagonal else (z.Tp, z.Sp)
    cut = (None,) * (len(shape)) + (z.tq, z.tk)
    where = of_diagonal if diagonal else of_pairs
    (found,) = tiles.launch(
        kernel, "tables", how.interpret, block, (owned, ek * eg, eb), given,
        [((eb, ek * eg, *shape), jnp.float32, cut, where)],
    )  # fmt: skip
    if diagonal:
        found = _line(found)[..., z.Sp - z.S :][..., : operand.shape[3]]
    else:
        found = found[..., : z.T, : z.S]
    return _gathered(found.reshape(eb, ek, eg, *found.shape[2:]), operand, groups)


def _line(parts: Array) -> Array:
    """Sums along the diagonals of tiles that lie along diagonals: `[.., n, t, t]` to a vector.

    Entry d is the sum of all elements with `q - k = d - (number of keys - 1)`.
    """
    *lead, n, t, _ = parts.shape
    # Turned around, row r moved to the right by r: diagonals become columns.
    wide = jnp.pad(jnp.flip(parts, -1), [(0, 0)] * (len(lead) + 2) + [(0, t)])
    flat = wide.reshape(*lead, n, 2 * t * t)[..., : t * (2 * t - 1)]
    sums = flat.reshape(*lead, n, t, 2 * t - 1).sum(-2)
    ends = [(0, 0)] * len(lead)
    first = jnp.pad(sums[..., :t].reshape(*lead, n * t), [*ends, (0, t)])
    second = jnp.pad(sums[..., t:], [*ends, (0, 0), (0, 1)]).reshape(*lead, n * t)
    return first + jnp.pad(second, [*ends, (t, 0)])


@lru_cache(maxsize=256)
def engine(how: tiles.How) -> Engine:
    """The kernels; the same ones step by step on any platform, slow, where they are interpreted."""
    return Engine(partial(_forward, how), partial(_backward, how))

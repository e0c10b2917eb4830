"""The kernels for NVIDIA GPUs, written in Pallas and compiled by Triton.

    forward   a program for each tile of queries and query head    s = q k'    acc += e^(s - m) v
    queries   the same                                             dq += ds k
    keys      a program for each tile of keys and key head         dv += p' do     dk += ds' q
    tables    a program for each tile of a score's table           dt += ds

A column of statistics is one more number of each query beside the largest logit and the sum of
weights. In the backward a mean is a value that depends on the pair: `dp = do v' + dc f`.

Every program runs over its own list of active tiles (`flash/tile_lists.py`). Each number of a
result is written by one program, without atomic operations: every run gives the same bits.
Logits are kept in powers of 2.
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
from ..flash import fused, tile_lists
from ..flash.fused import LOG2E
from ..flash.operands import (
    cropped_gradient,
    head_index,
    replaced,
    summed_gradient,
)
from ..problem import Config, Engine, Gradients, Inputs
from . import tiles
from .tiles import KernelOptions, KernelSizes, KernelTile, Result

# --- forward --------------------------------------------------------------------------------------


def _forward(options: KernelOptions, config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` with the columns, and natural-log LSE `[B, T, K, G]`."""
    block = _blocks(options, config, x).forward
    sizes = KernelSizes.chosen(x, block)
    given = tiles.given_to(config, sizes, x) | tile_lists.rows(_states(config, sizes, x))._asdict()

    def kernel(refs: Any, out_ref: Any, lse_ref: Any, *column_refs: Any) -> None:
        i, at = tiles.programs(sizes)
        first = KernelTile(config, sizes, refs, at, i, 0)
        q, scale = first.of_queries("q"), first.scale()

        def step(masked: bool, j: Any, carry: Any) -> Any:
            acc, m, l, columns = carry
            tile = first._replace(j=j)
            k, v = tile.of_keys("k"), tile.of_keys("v")
            shown = tile.visible() if masked else None
            s, functions, _ = _exponents(tile, tiles.dot(config, q, k, 1, 1), scale, shown)
            if shown is not None:
                s = jnp.where(shown, s, -jnp.inf)
            top = jnp.maximum(m, s.max(1))
            # Rows without any visible key so far are measured from 0: -inf - -inf is NaN.
            level = jnp.where(top == -jnp.inf, 0.0, top)
            p, fade = jnp.exp2(s - level[:, None]), jnp.exp2(m - level)
            l = l * fade + p.sum(1)
            columns = fused.added(
                config, fused.Weighed(shown, s, p, fade, m, top), functions, columns
            )
            if config.dropout:
                p = tile.dropped(p)
            acc = acc * fade[:, None] + tiles.dot(config, p.astype(v.dtype), v, 1, 0)
            return acc, top, l, columns

        m = jnp.full((sizes.tq,), -jnp.inf, jnp.float32)
        l, acc = jnp.zeros_like(m), jnp.zeros((sizes.tq, sizes.Hvp), jnp.float32)
        columns = [jnp.full_like(m, column.first) for column in config.columns]
        acc, m, l, columns = tiles.over_list(
            refs, at, i, step, (acc, m, l, columns), tiles.has_masks(config, sizes)
        )
        seen = l != 0
        total = jnp.where(seen, l, 1.0)
        out = jnp.where(seen[:, None], acc / total[:, None], 0.0)
        out_ref[...] = out.astype(out_ref.dtype)
        lse_ref[...] = jnp.where(seen, m * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        for ref, column in zip(column_refs, fused.reduced(config, columns, total), strict=True):
            ref[...] = column

    shape = sizes.B, sizes.Tp, sizes.N, sizes.Hvp
    line = Result((sizes.B, sizes.N, sizes.Tp), jnp.float32, *_line_of(sizes.tq))
    results = [Result(shape, x.query.dtype, *_rows_of(sizes, sizes.Hvp)), line]
    results += [line] * len(config.columns)
    grid = sizes.Tp // sizes.tq, sizes.N, sizes.B
    out, lse, *found = tiles.launch(kernel, "forward", options, block, grid, given, results)
    return fused.forward_results(sizes, out, lse, found)


def _blocks(options: KernelOptions, config: Config, x: Inputs) -> tiles.Blocks:
    _, T, _, _, H = x.query.shape
    _, S, _, Hv = x.value.shape
    return tiles.blocks_of(options, H, Hv, T, S, config.dtype)


def _states(config: Config, sizes: KernelSizes, x: Inputs) -> Array:
    return tile_lists.states_of(x.states, config.tile, (sizes.tq, sizes.tk), sizes.T, sizes.S)


def _rows_of(sizes: KernelSizes, wide: int) -> tuple[Any, Any]:
    """Block and index map of a tile of rows of a head in `[B, Tp, N, wide]`."""
    return (None, sizes.tq, None, wide), lambda i, n, b: (b, i, n, 0)


def _line_of(tile: int) -> tuple[Any, Any]:
    """Block and index map of a tile's numbers in `[B, N, length]`."""
    return (None, None, tile), lambda i, n, b: (b, n, i)


class Exponents(NamedTuple):
    """Logits of a tile, and what follows from them.

    Attributes:
      logits: in powers of 2.
      functions: the values of the functions of columns; in the backward, of those that are means.
      pull: from cotangents of logits in powers of e, and of these functions, to those of scaled
        products and of the operands that learn, all as large as the tile. In the forward it leads
        nowhere.
    """

    logits: Array
    functions: list[Array]
    pull: Callable[[tuple[Array, list[Array]]], tuple[Array, list[Array]]]


def _exponents(
    tile: KernelTile, s: Array, scale: Any, shown: Array | None, which: Sequence[int] | None = None
) -> Exponents:
    """Logits of a tile from products; in the backward, the operands `which` learn."""
    config = tile.config

    def nowhere(given: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        return given[0], []

    if not config.residues:
        return Exponents(s * (scale * LOG2E), [], nowhere)

    def inside(logits: Array) -> Array:
        return logits if shown is None else jnp.where(shown, logits, 0.0)

    logits = s * scale
    if config.score is not None:
        logits = inside(logits)
    parts = tile.parts(config.kinds, "score")

    def scored(logits: Array, some: list[Array]) -> tuple[Array, list[Array]]:
        of_score, of_columns = config.split(replaced(parts, which or (), some))
        if config.score is not None:
            logits = config.score.scored(logits, of_score)
        return logits, [
            column.residue.scored(inside(logits), own)
            for column, own in zip(config.columns, of_columns, strict=True)
            if column.mean or which is None
        ]

    if which is None:
        found, functions = scored(logits, [])
        return Exponents(found * LOG2E, functions, nowhere)
    learned = [jnp.broadcast_to(parts[n], s.shape) for n in which]
    (found, functions), pull = jax.vjp(scored, logits, learned)
    return Exponents(found * LOG2E, functions, pull)


# --- backward -------------------------------------------------------------------------------------


def _backward(
    options: KernelOptions,
    config: Config,
    groups: int,
    x: Inputs,
    far: Float[Array, "B K G T"],
    delta: Float[Array, "B K G T"],
    d_out: Float[Array, "B T K G Hv"],
) -> Gradients:
    """Cotangents of the inputs; see `Engine`."""
    Hv = x.value.shape[-1]
    columns = fused.cotangents_of_means(config, Hv, d_out)
    d_out = lax.slice_in_dim(d_out, 0, Hv, axis=4) if config.columns else d_out
    given = tiles.Cotangents(d_out.astype(config.dtype), far * LOG2E, delta, columns)
    score: list[Array | None] = [None] * len(x.score)

    def of(*wanted: str) -> list[int]:
        return [n for n in config.learned if config.kinds[n] in wanted]

    blocks = _blocks(options, config, x)
    query, scale, found = _d_queries(options, config, blocks.queries, x, given, of("row", "head"))
    key, value, more = _d_keys(options, config, blocks.keys, x, given, of("column"))
    for n, part in (found | more).items():
        score[n] = summed_gradient(part, x.score[n], groups)
    for n in of("grid", "diagonal"):
        score[n] = _d_table(options, config, blocks.tables, x, given, n, groups)
    return Gradients(query, key, value, scale, tuple(score))


class QueryTile(NamedTuple):
    """A tile of queries with what its backward needs."""

    q: Array
    do: Array
    lse: Array
    delta: Array
    columns: list[Array]


def _query_tile(tile: KernelTile) -> QueryTile:
    return QueryTile(
        tile.of_queries("q"),
        tile.of_queries("do"),
        tile.line(tile.refs["lse"]),
        tile.line(tile.refs["delta"]),
        [tile.line(ref) for ref in tile.refs["columns"]],
    )


class Slopes(NamedTuple):
    """What a tile adds to gradients.

    Attributes:
      weights: after dropout.
      products: cotangents of scaled products.
      operands: cotangents of the operands that learn, as large as the tile.
    """

    weights: Array
    products: Array
    operands: list[Array]


def _slopes(
    tile: KernelTile,
    rows: QueryTile,
    k: Array,
    v: Array,
    scale: Any,
    masked: bool,
    which: Sequence[int] = (),
) -> Slopes:
    """Recomputes the weights of a tile, and differentiates; the operands `which` learn.

    A column that is a mean is a value that depends on the pair.
    """
    config, sizes = tile.config, tile.sizes

    def product(of_queries: Array, of_keys: Array) -> Array:
        pair = (of_keys, of_queries) if sizes.across else (of_queries, of_keys)
        return tiles.dot(config, *pair, 1, 1)

    shown = tile.visible() if masked else None
    s, functions, pull = _exponents(tile, product(rows.q, k), scale, shown, which)
    s = s - sizes.of_queries(rows.lse)
    if shown is not None:
        # Before the exponential, not after: a masked logit may be too large for it.
        s = jnp.where(shown, s, -jnp.inf)
    p = jnp.exp2(s)
    dp = product(rows.do, v)
    kept = p
    if config.dropout:
        kept, dp = tile.dropped(p), tile.dropped(dp)
    d_columns = [sizes.of_queries(column) for column in rows.columns]
    for column, function in zip(d_columns, functions, strict=True):
        dp = dp + column * jnp.where(p == 0, 0.0, function)
    ds = p * (dp - sizes.of_queries(rows.delta))
    if shown is not None:
        ds = jnp.where(shown, ds, 0.0)
    ds, parts = pull((ds, [p * column for column in d_columns]))
    if shown is not None and config.residues:
        ds = jnp.where(shown, ds, 0.0)
    return Slopes(kept, ds, [part.astype(jnp.float32) for part in parts])


def _d_queries(
    options: KernelOptions,
    config: Config,
    block: tiles.Block,
    x: Inputs,
    cotangents: tiles.Cotangents,
    which: list[int],
) -> tuple[Array, Array, dict[int, Array]]:
    """Gradients of the queries, of the scale `[B]`, and of operands that are rows and heads."""
    sizes = KernelSizes.chosen(x, block)
    lists = tile_lists.rows(_states(config, sizes, x))
    given = tiles.given_to(config, sizes, x) | cotangents.given(sizes) | lists._asdict()

    def kernel(refs: Any, dq_ref: Any, dc_ref: Any, *part_refs: Any) -> None:
        i, at = tiles.programs(sizes)
        first = KernelTile(config, sizes, refs, at, i, 0)
        rows, scale = _query_tile(first), first.scale()

        def step(masked: bool, j: Any, carry: Any) -> Any:
            dq, sums = carry
            tile = first._replace(j=j)
            k, v = tile.of_keys("k"), tile.of_keys("v")
            _, ds, parts = _slopes(tile, rows, k, v, scale, masked, which)
            sums = tuple(total + part.sum(1) for total, part in zip(sums, parts, strict=True))
            return dq + tiles.dot(config, ds.astype(k.dtype), k, 1, 0), sums

        dq = jnp.zeros((sizes.tq, sizes.Hp), jnp.float32)
        sums = tuple(jnp.zeros((sizes.tq,), jnp.float32) for _ in which)
        dq, sums = tiles.over_list(refs, at, i, step, (dq, sums), tiles.has_masks(config, sizes))
        dq_ref[...] = (dq * scale).astype(dq_ref.dtype)
        dc_ref[...] = (rows.q.astype(jnp.float32) * dq).sum(1)
        for ref, total in zip(part_refs, sums, strict=True):
            ref[...] = total

    line = Result((sizes.B, sizes.N, sizes.Tp), jnp.float32, *_line_of(sizes.tq))
    shape = sizes.B, sizes.Tp, sizes.N, sizes.Hp
    results = [Result(shape, x.query.dtype, *_rows_of(sizes, sizes.Hp)), line, *[line] * len(which)]
    grid = sizes.Tp // sizes.tq, sizes.N, sizes.B
    dq, dc, *sums = tiles.launch(kernel, "queries", options, block, grid, given, results)
    parts = {}
    for n, total in zip(which, sums, strict=True):
        total = total[..., : sizes.T].reshape(sizes.B, sizes.K, sizes.G, sizes.T)
        parts[n] = total.sum(-1) if config.kinds[n] == "head" else total
    dq = dq[:, : sizes.T, :, : sizes.H].reshape(x.query.shape)
    return dq, dc.sum((1, 2)), parts


def _d_keys(
    options: KernelOptions,
    config: Config,
    block: tiles.Block,
    x: Inputs,
    cotangents: tiles.Cotangents,
    which: list[int],
) -> tuple[Array, Array, dict[int, Array]]:
    """Gradients of keys and values, summed over the queries of a key head, and of columns."""
    sizes = KernelSizes.chosen(x, block, across=True)
    columns = tile_lists.rows(jnp.swapaxes(_states(config, sizes, x), 3, 4))
    given = tiles.given_to(config, sizes, x) | cotangents.given(sizes) | columns._asdict()

    def kernel(refs: Any, dk_ref: Any, dv_ref: Any, *part_refs: Any) -> None:
        j, head, b = (pl.program_id(axis) for axis in range(3))
        first = KernelTile(config, sizes, refs, tiles.Head(b, head, 0), 0, j)
        k, v, scale = first.of_keys("k"), first.of_keys("v"), first.scale()

        def one_head(g: Any, carry: Any) -> Any:
            at = tiles.Head(b, head, g)

            def step(masked: bool, i: Any, carry: Any) -> Any:
                dk, dv, sums = carry
                tile = first._replace(at=at, i=i)
                rows = _query_tile(tile)
                p, ds, parts = _slopes(tile, rows, k, v, scale, masked, which)
                sums = tuple(total + part.sum(1) for total, part in zip(sums, parts, strict=True))
                dk = dk + tiles.dot(config, ds.astype(k.dtype), rows.q, 1, 0)
                return dk, dv + tiles.dot(config, p.astype(k.dtype), rows.do, 1, 0), sums

            sums = tuple(jnp.zeros((sizes.tk,), jnp.float32) for _ in which)
            *carry, sums = tiles.over_list(
                refs, at, j, step, (*carry, sums), tiles.has_masks(config, sizes)
            )
            for ref, total in zip(part_refs, sums, strict=True):
                ref[g, :] = total
            return tuple(carry)

        zeros = (jnp.zeros((sizes.tk, wide), jnp.float32) for wide in (sizes.Hp, sizes.Hvp))
        dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(sizes.G), one_head, tuple(zeros))
        dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv.astype(dv_ref.dtype)

    B, K, G, Sp, tk = sizes.B, sizes.K, sizes.G, sizes.Sp, sizes.tk
    results = [
        Result((B, Sp, K, wide), like.dtype, (None, tk, None, wide), lambda j, k, b: (b, j, k, 0))
        for wide, like in ((sizes.Hp, x.key), (sizes.Hvp, x.value))
    ]
    part = Result((B, K, G, Sp), jnp.float32, (None, None, G, tk), lambda j, k, b: (b, k, 0, j))
    results += [part] * len(which)
    grid = Sp // tk, K, B
    dk, dv, *sums = tiles.launch(kernel, "keys", options, block, grid, given, results)
    parts = {n: total[..., : sizes.S] for n, total in zip(which, sums, strict=True)}
    return dk[:, : sizes.S, :, : sizes.H], dv[:, : sizes.S, :, : sizes.Hv], parts


def _d_table(
    options: KernelOptions,
    config: Config,
    block: tiles.Block,
    x: Inputs,
    cotangents: tiles.Cotangents,
    n: int,
    groups: int,
) -> Array:
    """The gradient of an operand that has a number for each pair, or each distance.

    A program owns a tile of the table, or all tiles along one diagonal, and sums over the batch
    rows, heads and tiles that share it: another order would need memory for a table of each head.
    """
    sizes = KernelSizes.chosen(x, block)
    states = _states(config, sizes, x).astype(jnp.int32)
    given = tiles.given_to(config, sizes, x) | cotangents.given(sizes) | {"states": states}
    operand, kind = x.score[n], config.kinds[n]
    diagonal, masked = kind == "diagonal", tiles.has_masks(config, sizes)
    nq, nk = sizes.Tp // sizes.tq, sizes.Sp // sizes.tk
    # Of distances each head has its own, so that there are enough programs.
    ek, eg = (sizes.K, sizes.G) if diagonal else operand.shape[1:3]
    eb = groups if operand.shape[0] == 1 else sizes.B
    owned = nq + nk - 1 if diagonal else nq * nk
    shared = sizes.B // eb, sizes.K // ek, sizes.G // eg
    members = math.prod(shared)

    def kernel(refs: Any, ref: Any) -> None:
        owner, head, batch = (pl.program_id(axis) for axis in range(3))

        def member(m: Any, total: Array) -> Array:
            at = tiles.Head(
                batch * shared[0] + lax.div(m, shared[1] * shared[2]),
                lax.div(head, eg) * shared[1] + lax.rem(lax.div(m, shared[2]), shared[1]),
                lax.rem(head, eg) * shared[2] + lax.rem(m, shared[2]),
            )

            scale = KernelTile(config, sizes, refs, at, 0, 0).scale()

            def add(i: Any, j: Any, total: Array) -> Array:
                tile = KernelTile(config, sizes, refs, at, i, j)
                k, v = tile.of_keys("k"), tile.of_keys("v")
                found = _slopes(tile, _query_tile(tile), k, v, scale, masked, [n])
                return total + found.operands[0]

            def visit(i: Any, j: Any, total: Array) -> Array:
                state = refs["states"][(*head_index(refs["states"].shape, *at), i, j)]
                # A loop of one turn or none: an empty tile costs a look at its state.
                return lax.fori_loop(
                    jnp.int32(0), jnp.minimum(state, 1), lambda _, t: add(i, j, t), total
                )

            if not diagonal:
                return visit(lax.div(owner, nk), lax.rem(owner, nk), total)
            # The tiles (i, i - (owner - (nk - 1))) that exist.
            first = jnp.maximum(owner - (nk - 1), 0)
            last = jnp.minimum(owner + 1, nq)
            return lax.fori_loop(first, last, lambda i, t: visit(i, i + (nk - 1) - owner, t), total)

        total = jnp.zeros((sizes.tq, sizes.tk), jnp.float32)
        ref[...] = lax.fori_loop(jnp.int32(0), jnp.int32(members), member, total)

    def of_diagonal(owner: Any, head: Any, batch: Any) -> tuple[Any, ...]:
        return batch, head, owner, 0, 0

    def of_pairs(owner: Any, head: Any, batch: Any) -> tuple[Any, ...]:
        return batch, head, lax.div(owner, nk), lax.rem(owner, nk)

    shape: tuple[int, ...] = (sizes.Tp, sizes.Sp)
    if diagonal:
        shape = owned, sizes.tq, sizes.tk
    cut = (None,) * len(shape) + (sizes.tq, sizes.tk)
    where = of_diagonal if diagonal else of_pairs
    result = Result((eb, ek * eg, *shape), jnp.float32, cut, where)
    grid = owned, ek * eg, eb
    (found,) = tiles.launch(kernel, "tables", options, block, grid, given, [result])
    if diagonal:
        found = _summed_diagonals(found)
    found = cropped_gradient(sizes, kind, found.reshape(eb, ek, eg, *found.shape[2:]))
    return summed_gradient(found, operand, groups)


def _summed_diagonals(parts: Array) -> Array:
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
def engine(options: KernelOptions) -> Engine:
    """The kernels as an engine. Interpreted, they run on any platform, slowly."""
    return Engine(partial(_forward, options), partial(_backward, options))

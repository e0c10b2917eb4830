"""The kernels for TPUs, written in Pallas and compiled by Mosaic.

    forward   over rows of tiles       s = k q'     acc' += v' e^(s - m)
    queries   the same                 dq' += k' ds
    keys      over columns of tiles    dv += p do      dk += ds q
    tables    over tiles of a table    dt += ds

Tiles have keys first, `s[k, q]`, and what belongs to queries is summed with its length last: no
kernel transposes a tile. A column of statistics is one more number of each query beside the largest
logit and the sum of weights. In the backward a mean is a value that depends on the pair:
`dp = v do' + f dc`.

Each number of a result is written by one row of tiles, always in the same order: every run gives
the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...shapes import Array, Float
from ..flash import fused, tile_lists
from ..flash.operands import cropped_gradient, padded, summed_gradient
from ..problem import Config, Engine, Gradients, Inputs
from . import steps, tiles
from .steps import Place
from .tiles import Given, KernelOptions, KernelSizes, KernelTile, Result, dot

# --- forward --------------------------------------------------------------------------------------


def _forward(options: KernelOptions, config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, K, G, Hv]` with the columns, and natural-log LSE `[B, T, K, G]`."""
    sizes = options.sizes(config, x)
    given = tiles.given_to(config, sizes, x)

    def kernel(at: Place, refs: Any, results: Any, scratch: Any) -> None:
        tile = KernelTile(config, sizes, refs, at)
        out_ref, lines_ref = results
        acc_ref, top_ref, total_ref, *column_refs = scratch

        @pl.when(at.begins)
        def begin() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)
            top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
            total_ref[...] = jnp.zeros_like(total_ref)
            for ref, column in zip(column_refs, config.columns, strict=True):
                ref[...] = jnp.full_like(ref, column.first)

        def step(masked: bool) -> None:
            shown = tile.visible() if masked else None
            products = dot(config, refs["k"][...], refs["q"][...], 1, 1)
            s, functions, _ = tile.scored(products, shown, slopes=False)
            if shown is not None:
                s = jnp.where(shown, s, -jnp.inf)
            before = top_ref[...]
            top = jnp.maximum(before, s.max(0, keepdims=True))
            # Rows without any visible key so far are measured from 0: -inf - -inf is NaN.
            level = jnp.where(top == -jnp.inf, 0.0, top)
            p, fade = jnp.exp(s - level), jnp.exp(before - level)
            total_ref[...] = total_ref[...] * fade + p.sum(0, keepdims=True)
            weighed = fused.Weighed(shown, s, p, fade, before, top)
            columns = [ref[...] for ref in column_refs]
            columns = fused.added(config, weighed, functions, columns)
            for ref, column in zip(column_refs, columns, strict=True):
                ref[...] = column
            (kept,) = tile.dropped(p) if config.dropout else (p,)
            more = dot(config, refs["v"][...], kept.astype(config.dtype), 0, 0)
            acc_ref[...] = acc_ref[...] * fade + more
            top_ref[...] = top

        tile.when_active(step)

        @pl.when(at.ends)
        def end() -> None:
            total = total_ref[...]
            seen = total != 0
            total = jnp.where(seen, total, 1.0)
            out = jnp.where(seen, acc_ref[...] / total, 0.0)
            out_ref[...] = out.astype(out_ref.dtype)
            lse = jnp.where(seen, top_ref[...] + jnp.log(total), -jnp.inf)
            columns = fused.reduced(config, [ref[...] for ref in column_refs], total)
            lines_ref[...] = jnp.concatenate([lse, *columns], 0)

    B, N, Hv, n = sizes.B, sizes.N, sizes.Hv, 1 + len(config.columns)
    results = [
        _by_queries(sizes, (B, N, Hv, sizes.Tp), x.query.dtype),
        _by_queries(sizes, (B, N, n, sizes.Tp)),
    ]
    scratch = [(Hv, sizes.tq), *[(1, sizes.tq)] * (n + 1)]
    out, lines = _over_rows(kernel, "forward", options, config, sizes, x, given, results, scratch)
    found = [lines[:, :, i] for i in range(n)]
    return fused.forward_results(sizes, out.transpose(0, 3, 1, 2), found[0], found[1:])


def _by_queries(
    sizes: KernelSizes, shape: tuple[int, int, int, int], dtype: Any = jnp.float32
) -> Result:
    """A result `[B, N, height, Tp]` of rows of tiles."""
    block = None, None, shape[2], sizes.tq
    return Result(shape, dtype, block, lambda b, n, at: (b, n, 0, at.row), 3)


def _over_rows(
    kernel: Any, name: str, options: KernelOptions, config: Config, sizes: KernelSizes, x: Inputs,
    given: dict[str, Any], results: Sequence[Result], scratch: Sequence[tuple[int, int]],
    across: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """Runs a kernel over rows of tiles, or across, over columns."""
    path, states = steps.walk(_states(config, sizes, x), sizes.G, across)
    heads = sizes.B, sizes.K if across else sizes.N
    return tiles.launch(kernel, name, options, sizes, path, states, heads, given, results, scratch)


def _states(config: Config, sizes: KernelSizes, x: Inputs) -> Array:
    # Queries beyond the last one need no mask: what they give is cut off, or has weights of 0.
    return tile_lists.states_of(x.states, config.tile, (sizes.tq, sizes.tk), sizes.Tp, sizes.S)


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
    sizes = options.sizes(config, x)
    means = fused.cotangents_of_means(config, sizes.Hv, d_out)
    d_out = d_out[..., : sizes.Hv]

    def line(array: Array, value: float) -> Array:
        return padded(array.reshape(sizes.B, sizes.N, sizes.T), {2: sizes.Tp}, value)

    # Queries beyond the last one take no part: their weights are 0.
    lines = [line(far, math.inf), *(line(each, 0) for each in (delta, *means))]
    more = {
        "do": Given(tiles.heads_first(d_out, sizes.Tp, config.dtype), "queries"),
        "lines": Given(jnp.stack(lines, 2), "lines"),
    }
    query, scale, found = _d_queries(options, config, sizes, x, more)
    key, value, others = _d_keys(options, config, sizes, x, more)
    score: list[Array | None] = [None] * len(x.score)
    for n in config.learned:
        kind = config.kinds[n]
        if kind == "grid":
            score[n] = _d_table(options, config, sizes, x, more, n, groups)
            continue
        part = (found | others)[n].reshape(sizes.B, sizes.K, sizes.G, -1)
        part = (
            part[..., : sizes.T].sum(-1) if kind == "head" else cropped_gradient(sizes, kind, part)
        )
        score[n] = summed_gradient(part, x.score[n], groups)
    return Gradients(query, key, value, scale, tuple(score))


class Slopes(NamedTuple):
    """What a tile adds to gradients.

    Attributes:
      weights: after dropout.
      products: cotangents of scaled products.
      operands: cotangents of the operands that learn, as large as the tile, by their number.
    """

    weights: Array
    products: Array
    operands: dict[int, Array]


def _slopes(tile: KernelTile, masked: bool) -> Slopes:
    """Recomputes the weights of a tile, and differentiates."""
    config, refs = tile.config, tile.refs
    shown = tile.visible() if masked else None
    products = dot(config, refs["k"][...], refs["q"][...], 1, 1)
    s, functions, pull = tile.scored(products, shown, slopes=True)
    lse, delta, *d_columns = (refs["lines"][n : n + 1, :] for n in range(refs["lines"].shape[0]))
    s = s - lse
    if shown is not None:
        # Before the exponential, not after: a masked logit may be too large for it.
        s = jnp.where(shown, s, -jnp.inf)
    p = jnp.exp(s)
    dp = dot(config, refs["v"][...], refs["do"][...], 1, 1)
    kept = p
    if config.dropout:
        kept, dp = tile.dropped(p, dp)
    for column, function in zip(d_columns, functions, strict=True):
        dp = dp + column * jnp.where(p == 0, 0.0, function)
    ds = p * (dp - delta)
    if shown is not None:
        ds = jnp.where(shown, ds, 0.0)
    ds, operands = pull(ds, [p * column for column in d_columns])
    return Slopes(kept, ds, operands)


def _learned(config: Config, *kinds: str) -> list[int]:
    return [n for n in config.learned if config.kinds[n] in kinds]


def _d_queries(
    options: KernelOptions, config: Config, sizes: KernelSizes, x: Inputs, more: dict[str, Given]
) -> tuple[Array, Array, dict[int, Array]]:
    """Gradients of the queries, of the scale `[B]`, and of rows, heads and diagonals."""
    given = tiles.given_to(config, sizes, x) | more
    lines, diagonals = _learned(config, "row", "head"), _learned(config, "diagonal")
    nq, nk = sizes.counts

    def kernel(at: Place, refs: Any, results: Any, _: Any) -> None:
        tile = KernelTile(config, sizes, refs, at)
        dq_ref, *line_refs = results[: 1 + len(lines)]
        diagonal_refs = results[1 + len(lines) :]

        @pl.when(at.begins)
        def begin() -> None:
            for ref in (dq_ref, *line_refs):
                ref[...] = jnp.zeros_like(ref)

        @pl.when(at.begins & (at.row == 0))
        def begin_table() -> None:
            for ref in diagonal_refs:
                ref[...] = jnp.zeros_like(ref)

        def step(masked: bool) -> None:
            _, ds, parts = _slopes(tile, masked)
            dq_ref[...] += dot(config, refs["k"][...], ds.astype(config.dtype), 0, 0)
            for n, ref in zip(lines, line_refs, strict=True):
                ref[...] += parts[n].sum(0, keepdims=True)
            for n, ref in zip(diagonals, diagonal_refs, strict=True):
                sums = tiles.along_diagonals(parts[n])
                for half in range(2):
                    here = pl.ds(at.i - at.j + (nk - 1 + half), 1)
                    ref[here, :] += sums[:, half * sizes.tk :][:, : sizes.tk]

        tile.when_active(step)

    B, N = sizes.B, sizes.N
    one = _by_queries(sizes, (B, N, 1, sizes.Tp))
    table = B, N, nq + nk, sizes.tk
    whole = Result(
        table, jnp.float32, (None, None, *table[2:]), lambda b, n, at: (b, n, 0, 0), None
    )
    results = [_by_queries(sizes, (B, N, sizes.H, sizes.Tp)), *[one] * len(lines)]
    results += [whole] * len(diagonals)
    dq, *sums = _over_rows(kernel, "queries", options, config, sizes, x, given, results, ())
    dq = dq[..., : sizes.T].transpose(0, 3, 1, 2).reshape(x.query.shape)
    d_scale = (x.query.astype(dq.dtype) * dq).sum((1, 2, 3, 4))
    dq = dq * x.scale.astype(dq.dtype).reshape(-1, 1, 1, 1, 1)
    return dq.astype(x.query.dtype), d_scale, dict(zip(lines + diagonals, sums, strict=True))


def _d_keys(
    options: KernelOptions, config: Config, sizes: KernelSizes, x: Inputs, more: dict[str, Given]
) -> tuple[Array, Array, dict[int, Array]]:
    """Gradients of keys and values, summed over the queries of a key head, and of columns."""
    given = tiles.given_to(config, sizes, x) | more
    learned = _learned(config, "column")

    def kernel(at: Place, refs: Any, results: Any, scratch: Any) -> None:
        tile = KernelTile(config, sizes, refs, at)
        dk_ref, dv_ref, *part_refs = results
        dk, dv = scratch

        @pl.when(at.begins)
        def begin() -> None:
            for ref in (dk, dv, *part_refs):
                ref[...] = jnp.zeros_like(ref)

        def step(masked: bool) -> None:
            p, ds, parts = _slopes(tile, masked)
            dk[...] += dot(config, ds.astype(config.dtype), refs["q"][...], 1, 0)
            dv[...] += dot(config, p.astype(config.dtype), refs["do"][...], 1, 0)
            for n, ref in zip(learned, part_refs, strict=True):
                # A product sums over queries, and has its length last.
                ones = jnp.ones((1, sizes.tq), jnp.float32)
                ref[pl.ds(at.g, 1), :] += dot(config, ones, parts[n], 1, 1)

        tile.when_active(step)

        @pl.when(at.ends)
        def end() -> None:
            dk_ref[...] = (dk[...] * refs["scale"][...]).astype(dk_ref.dtype)
            dv_ref[...] = dv[...].astype(dv_ref.dtype)

    B, K, G, tk = sizes.B, sizes.K, sizes.G, sizes.tk
    results = [
        Result(
            (B, K, sizes.Sp, wide), like.dtype, (None, None, tk, wide),
            lambda b, k, at: (b, k, at.row, 0), 2,
        )
        for wide, like in ((sizes.H, x.key), (sizes.Hv, x.value))
    ]  # fmt: skip
    part = Result(
        (B, K, G, sizes.Sp), jnp.float32, (None, None, G, tk), lambda b, k, at: (b, k, 0, at.row), 3
    )
    results += [part] * len(learned)
    scratch = [(tk, sizes.H), (tk, sizes.Hv)]
    dk, dv, *sums = _over_rows(
        kernel, "keys", options, config, sizes, x, given, results, scratch, across=True
    )
    key, value = (jnp.swapaxes(each[:, :, : sizes.S], 1, 2) for each in (dk, dv))
    return key, value, dict(zip(learned, sums, strict=True))


def _d_table(
    options: KernelOptions, config: Config, sizes: KernelSizes, x: Inputs, more: dict[str, Given],
    n: int, groups: int,
) -> Array:  # fmt: skip
    """The gradient of an operand that has a number for each pair.

    A tile of it is summed over the batch rows and heads that share it: another order would need
    memory for a table of each head.
    """
    given = tiles.given_to(config, sizes, x) | more
    eb, ek, eg, *_ = x.score[n].shape
    extents = groups if eb == 1 else sizes.B, ek * eg

    def kernel(at: Place, refs: Any, results: Any, _: Any) -> None:
        (ref,) = results

        @pl.when(at.begins)
        def begin() -> None:
            ref[...] = jnp.zeros_like(ref)

        def step(masked: bool) -> None:
            ref[...] += _slopes(tile, masked).operands[n]

        tile = KernelTile(config, sizes, refs, at)
        tile.when_active(step)

    states = jnp.swapaxes(_states(config, sizes, x), 3, 4)
    b, k, g, *rest = states.shape
    states = states.reshape(b, k * g, *rest)
    shared = sizes.B // extents[0], sizes.N // extents[1]
    path = steps.SharedWalk((b, k * g), 0, sizes.counts[0], shared, sizes.G)
    result = Result(
        (*extents, sizes.Sp, sizes.Tp), jnp.float32, (None, None, *sizes.tile),
        lambda b, n, at: (b, n, at.row, at.i), 2,
    )  # fmt: skip
    (found,) = tiles.launch(
        kernel, "tables", options, sizes, path, states, extents, given, [result]
    )
    found = jnp.swapaxes(found, 2, 3).reshape(extents[0], ek, eg, sizes.Tp, sizes.Sp)
    found = cropped_gradient(sizes, "grid", found)
    return summed_gradient(found, x.score[n], groups)


@lru_cache(maxsize=256)
def engine(options: KernelOptions) -> Engine:
    """The kernels as an engine. Interpreted, they run on any platform, slowly."""
    return Engine(partial(_forward, options), partial(_backward, options))

"""The kernels for Hopper GPUs, in Pallas Mosaic GPU: flash attention over lists of active tiles.

In every kernel one warpgroup only loads: it runs through the list, a few tiles ahead of the others.
These compute 64 rows each: first the PARTIAL tiles of the list, where the mask is evaluated, then
the FULL ones. There are no atomic additions: every run gives the same bits.

    forward   s = q k'          p = 2^(s - m)     l, acc rescaled, acc += p v
    dq        p = 2^(s - lse)   ds = p (do v' - delta)   dq += ds k
    dk, dv    s' = k q'   p' = 2^(s' - lse)   dv += p' do   ds' = p' (v do' - delta)   dk += ds' q

A column of statistics is one more sum of each row. In the backward a mean is a value that depends
on the pair: its cotangent times its function is added to `do v'`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...shapes import Array
from ..flash import fused
from ..flash.fused import LOG2E
from ..problem import Config
from .memory import (
    ROWS,
    STEP,
    WGMMA,
    Ring,
    across,
    added,
    buffer,
    columns,
    compiled,
    load,
    over_list,
    plgpu,
    products,
    put,
    registers,
    ring,
    stages_for,
    zeros,
)
from .tiles import (
    LOW,
    BackwardInputs,
    KernelInputs,
    KernelSizes,
    TileFunctions,
    d_logits,
    learned_kinds,
    row_of,
    weights,
)

# --- forward --------------------------------------------------------------------------------------


def forward(
    config: Config, interpret: bool, sizes: KernelSizes, x: KernelInputs
) -> tuple[Array, Array, list[Array]]:
    """Output `[B, T, N, Hv]`, natural-log LSE `[B, N, T]`, and columns likewise."""
    wgs, _ = sizes.warpgroups
    row_bytes = (sizes.Hp + sizes.Hvp) * jnp.dtype(sizes.dtype).itemsize
    stages = stages_for(sizes.tq * row_bytes, sizes.tk * row_bytes)
    functions = TileFunctions.of(config, sizes, "row", slopes=False)

    def body(x: KernelInputs, out_ref: Any, lse_ref: Any, sums_ref: Any, q_smem: Any, o_smem: Any,
             lse_smem: Any, q_ready: Any, keys: Ring, values: Ring) -> None:  # fmt: skip
        b, h, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
        # Under a causal mask the last rows have the longest lists: they begin first.
        i = sizes.Tp // sizes.tq - 1 - lax.axis_index("i")
        kh = lax.div(h, jnp.int32(sizes.N // sizes.K))
        tiles, counts = row_of(x, b, h, i)

        @pl.when(wg < wgs)
        def _() -> None:
            registers(wgs, loads=False)
            row = i * sizes.tq + wg * ROWS
            own_q = q_smem.at[wg]
            rows = pl.ds(row, ROWS)
            plgpu.copy_gmem_to_smem(x.query.at[b, rows, h], own_q, q_ready.at[wg])
            scale = x.scale[b if x.scale.shape[0] != 1 else 0]
            tile_row = functions.at(x, b, h, row)
            plgpu.barrier_wait(q_ready.at[wg])

            def step(masked: bool, n: Any, carry: Any) -> Any:
                acc, m, l, sums = carry
                column = tiles[n] * sizes.tk
                (k,) = keys.take(n)
                (s,) = products((own_q, k.transpose((1, 0))))
                keys.release(n)
                s, shown, _, functions = weights(tile_row, masked, s, scale, column, None)
                top = jnp.maximum(m, s.max(axis=1))
                # Rows without any visible key so far are measured from 0: -inf - -inf is NaN.
                none = top == jnp.full_like(top, LOW)
                level = jnp.where(none, jnp.zeros_like(top), top)
                fade = jnp.exp2(m - level)
                p = jnp.exp2(s - across(level, sizes.tk))
                l = l * fade + p.sum(axis=1)
                tile = fused.Weighed(shown, s, p, fade, m, top)
                sums = fused.added(config, tile, [each for (each,) in functions], sums)
                if config.dropout:
                    p = p * tile_row.dropout_factors(column, p.shape)
                acc = acc * across(fade, sizes.Hvp)
                (v,) = values.take(n)
                (acc,) = added(interpret, (acc, p.astype(sizes.dtype), v))
                values.release(n)
                return acc, top, l, sums

            sums = [zeros(ROWS, fill=each.first) for each in config.columns]
            start = zeros(ROWS, sizes.Hvp), zeros(ROWS, fill=LOW), zeros(ROWS), sums
            acc, m, l, sums = over_list(counts, step, start)
            seen = l != jnp.zeros_like(l)
            total = jnp.where(seen, l, jnp.ones_like(l))
            out = acc / across(total, sizes.Hvp)
            out = jnp.where(across(seen, sizes.Hvp), out, jnp.zeros_like(out))
            o_smem.at[wg][...] = out.astype(sizes.dtype)
            lse = (m + jnp.log2(total)) * (1 / LOG2E)
            lse_smem.at[wg][...] = jnp.where(seen, lse, jnp.full_like(lse, -jnp.inf))
            for ref, found in zip(sums_ref, fused.reduced(config, sums, total), strict=True):
                put(ref.at[b, h, rows], found)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[wg], out_ref.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _() -> None:
            registers(wgs, loads=True)

            def fill(n: Any, _: None) -> None:
                at = pl.ds(tiles[n] * sizes.tk, sizes.tk)
                keys.fill(n, x.key.at[b, at, kh])
                values.fill(n, x.value.at[b, at, kh])

            total = counts[0] + counts[1]
            lax.fori_loop(jnp.int32(0), total, fill, None)
            keys.drain(total)
            values.drain(total)

    line = jax.ShapeDtypeStruct((sizes.B, sizes.N, sizes.Tp), jnp.float32)
    kernel = compiled(
        config,
        interpret,
        body=body,
        out_type=(
            jax.ShapeDtypeStruct((sizes.B, sizes.Tp, sizes.N, sizes.Hvp), sizes.dtype),
            line,
            [line for _ in config.columns],
        ),
        scratch_types=[
            *_matrices(sizes, wgs, ROWS),
            plgpu.SMEM((wgs, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=wgs),
            ring(stages, wgs, buffer(stages, sizes.tk, sizes.Hp, dtype=sizes.dtype)),
            ring(stages, wgs, buffer(stages, sizes.tk, sizes.Hvp, dtype=sizes.dtype)),
        ],
        grid=(sizes.N, sizes.Tp // sizes.tq, sizes.B),
        grid_names=("h", "i", "b"),
        num_threads=wgs + 1,
    )
    out, lse, found = kernel(x)
    return out, lse, found


def _matrices(sizes: KernelSizes, number: int, rows: int) -> tuple[Any, ...]:
    """Shared memory for matrices as wide as queries, and for matrices as wide as values."""
    return tuple(buffer(number, rows, width, dtype=sizes.dtype) for width in (sizes.Hp, sizes.Hvp))


# --- backward -------------------------------------------------------------------------------------


def d_query(
    config: Config, interpret: bool, sizes: KernelSizes, x: KernelInputs, y: BackwardInputs
) -> tuple[Array, list[Array]]:
    """Gradient of queries before the scale, `[B, T, N, H]` in float32, and sums over keys.

    The sums, `[B, N, T]`, are for operands that learn and don't depend on keys, in order.
    """
    wgs, _ = sizes.warpgroups
    row_bytes = (sizes.Hp + sizes.Hvp) * jnp.dtype(sizes.dtype).itemsize
    stages = stages_for(sizes.tq * row_bytes, STEP * row_bytes)
    functions = TileFunctions.of(config, sizes, "row", slopes=True)
    ours = [at for at, kind in enumerate(learned_kinds(config)) if kind != "column"]
    parts_of_tile = sizes.tk // STEP
    shape = (ROWS, STEP)

    def body(x: KernelInputs, y: BackwardInputs, dq_ref: Any, sums_ref: Any, q_smem: Any,
             do_smem: Any, ready: Any, keys: Ring) -> None:  # fmt: skip
        b, h, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
        i = sizes.Tp // sizes.tq - 1 - lax.axis_index("i")
        kh = lax.div(h, jnp.int32(sizes.N // sizes.K))
        tiles, counts = row_of(x, b, h, i)
        counts = tuple(count * parts_of_tile for count in counts)

        def start(n: Any) -> Any:
            tile, part = lax.div(n, jnp.int32(parts_of_tile)), lax.rem(n, jnp.int32(parts_of_tile))
            return tiles[tile] * sizes.tk + part * STEP

        @pl.when(wg < wgs)
        def _() -> None:
            registers(wgs, loads=False)
            row = i * sizes.tq + wg * ROWS
            rows = pl.ds(row, ROWS)
            q, do = q_smem.at[wg], do_smem.at[wg]
            plgpu.copy_gmem_to_smem(x.query.at[b, rows, h], q, ready.at[wg])
            plgpu.copy_gmem_to_smem(y.d_out.at[b, rows, h], do, ready.at[wg])
            scale = x.scale[b if x.scale.shape[0] != 1 else 0]
            count = y.lines.shape[2]
            lines = [load(y.lines.at[b, h, line, rows], WGMMA.reduce(1)) for line in range(count)]
            lse, delta, *means = (partial(across, line, STEP) for line in lines)
            tile_row = functions.at(x, b, h, row)
            plgpu.barrier_wait(ready.at[wg])

            def step(masked: bool, n: Any, carry: Any) -> Any:
                dq, sums = carry
                column = start(n)
                k, v = keys.take(n)
                s, dp = products((q, k.transpose((1, 0))), (do, v.transpose((1, 0))))
                found = weights(tile_row, masked, s, scale, column, lse)
                factors = tile_row.dropout_factors(column, shape) if config.dropout else None
                ds, terms = d_logits(masked, found, dp, factors, delta, means)
                sums = [a + terms[at].sum(axis=1) for a, at in zip(sums, ours, strict=True)]
                (dq,) = added(interpret, (dq, ds.astype(sizes.dtype), k))
                keys.release(n)
                return dq, sums

            first = zeros(ROWS, sizes.Hp), [zeros(ROWS) for _ in ours]
            dq, sums = over_list(counts, step, first)
            put(dq_ref.at[b, rows, h], dq)
            for ref, total in zip(sums_ref, sums, strict=True):
                put(ref.at[b, h, rows], total)

        @pl.when(wg == wgs)
        def _() -> None:
            registers(wgs, loads=True)

            def fill(n: Any, _: None) -> None:
                at = pl.ds(start(n), STEP)
                keys.fill(n, x.key.at[b, at, kh], x.value.at[b, at, kh])

            total = counts[0] + counts[1]
            lax.fori_loop(jnp.int32(0), total, fill, None)
            keys.drain(total)

    kernel = compiled(
        config,
        interpret,
        body=body,
        out_type=(
            jax.ShapeDtypeStruct((sizes.B, sizes.Tp, sizes.N, sizes.Hp), jnp.float32),
            [jax.ShapeDtypeStruct((sizes.B, sizes.N, sizes.Tp), jnp.float32) for _ in ours],
        ),
        scratch_types=[
            *_matrices(sizes, wgs, ROWS),
            plgpu.Barrier(num_arrivals=2, num_barriers=wgs),
            ring(stages, wgs, *_matrices(sizes, stages, STEP)),
        ],
        grid=(sizes.N, sizes.Tp // sizes.tq, sizes.B),
        grid_names=("h", "i", "b"),
        num_threads=wgs + 1,
    )
    dq, sums = kernel(x, y)
    return dq, sums


def d_keys(
    config: Config, interpret: bool, sizes: KernelSizes, x: KernelInputs, y: BackwardInputs
) -> tuple[Array, Array, list[Array]]:
    """Gradients of keys and values, `[B, S, K, H]` and `[B, S, K, Hv]`, and sums over queries.

    Lists of tiles are those of columns, grids are transposed. The sums, `[B, N, S]`, are for
    operands that learn and go with keys, in order.
    """
    _, wgs = sizes.warpgroups
    row_bytes = (sizes.Hp + sizes.Hvp) * jnp.dtype(sizes.dtype).itemsize
    lines = y.lines.shape[2]
    stages = stages_for(sizes.tk * row_bytes, STEP * row_bytes + lines * STEP * 4)
    functions = TileFunctions.of(config, sizes, "column", slopes=True)
    ours = [at for at, kind in enumerate(learned_kinds(config)) if kind == "column"]
    parts_of_tile = sizes.tq // STEP
    shape = (ROWS, STEP)
    G = sizes.N // sizes.K
    # Whether to start d_p late: slopes and factors of dropout would wait for it in registers.
    lean = not config.residues and not config.dropout

    def body(x: KernelInputs, y: BackwardInputs, dk_ref: Any, dv_ref: Any, sums_ref: Any,
             k_smem: Any, v_smem: Any, ready: Any, queries: Ring) -> None:  # fmt: skip
        b, kh, j, wg = (lax.axis_index(name) for name in ("b", "h", "j", "wg"))

        def list_of(g: Any) -> tuple[Any, Callable[[Any], Any], Any]:
            h = kh * G + g
            tiles, counts = row_of(x, b, h, j)

            def start(n: Any) -> Any:
                part = lax.rem(n, jnp.int32(parts_of_tile))
                return tiles[lax.div(n, jnp.int32(parts_of_tile))] * sizes.tq + part * STEP

            return h, start, tuple(count * parts_of_tile for count in counts)

        def each_head(step: Callable[..., Any], carry: Any) -> Any:
            # A loop of one step would cost registers.
            return (
                step(jnp.int32(0), carry)
                if G == 1
                else lax.fori_loop(jnp.int32(0), jnp.int32(G), step, carry)
            )

        @pl.when(wg < wgs)
        def _() -> None:
            registers(wgs, loads=False)
            row = j * sizes.tk + wg * ROWS
            rows = pl.ds(row, ROWS)
            k, v = k_smem.at[wg], v_smem.at[wg]
            plgpu.copy_gmem_to_smem(x.key.at[b, rows, kh], k, ready.at[wg])
            plgpu.copy_gmem_to_smem(x.value.at[b, rows, kh], v, ready.at[wg])
            scale = x.scale[b if x.scale.shape[0] != 1 else 0]
            plgpu.barrier_wait(ready.at[wg])

            def head(g: Any, carry: Any) -> Any:
                before, dk, dv = carry
                h, start, counts = list_of(g)
                tile_row = functions.at(x, b, h, row)

                def step(masked: bool, n: Any, carry: Any) -> Any:
                    dk, dv, sums = carry
                    q, do, line = queries.take(before + n)
                    column = start(n)
                    pairs = (k, q.transpose((1, 0))), (v, do.transpose((1, 0)))
                    s, *dp = products(*pairs[: 1 if lean else 2])
                    # Loaded where they are needed: there are no registers for both.
                    lse, delta, *means = (
                        partial(columns, line.at[at], shape) for at in range(lines)
                    )
                    found = weights(tile_row, masked, s, scale, column, lse)
                    factors = tile_row.dropout_factors(column, shape) if config.dropout else None
                    kept = found.s if factors is None else found.s * factors
                    # Gradients of values at once with what comes next: d_p, or gradients of keys.
                    early = [(dv, kept.astype(sizes.dtype), do)]
                    if lean:
                        dv, *dp = added(interpret, *early, (zeros(*shape), *pairs[1]))
                        early = []
                    ds, terms = d_logits(masked, found, dp[0], factors, delta, means)
                    sums = [a + terms[at].sum(axis=1) for a, at in zip(sums, ours, strict=True)]
                    *dvs, dk = added(interpret, *early, (dk, ds.astype(sizes.dtype), q))
                    (dv,) = dvs or (dv,)
                    # The lines were read by plain loads, which a copy may overtake.
                    plgpu.commit_smem()
                    queries.release(before + n)
                    return dk, dv, sums

                dk, dv, sums = over_list(counts, step, (dk, dv, [zeros(ROWS) for _ in ours]))
                for ref, total in zip(sums_ref, sums, strict=True):
                    put(ref.at[b, h, rows], total)
                return before + counts[0] + counts[1], dk, dv

            first = jnp.int32(0), zeros(ROWS, sizes.Hp), zeros(ROWS, sizes.Hvp)
            _, dk, dv = each_head(head, first)
            k[...] = (dk * scale).astype(sizes.dtype)
            v[...] = dv.astype(sizes.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[b, rows, kh])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[b, rows, kh])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _() -> None:
            registers(wgs, loads=True)

            def head(g: Any, before: Any) -> Any:
                h, start, counts = list_of(g)

                def fill(n: Any, _: None) -> None:
                    at = pl.ds(start(n), STEP)
                    queries.fill(
                        before + n,
                        x.query.at[b, at, h],
                        y.d_out.at[b, at, h],
                        y.lines.at[b, h, :, at],
                    )

                total = counts[0] + counts[1]
                lax.fori_loop(jnp.int32(0), total, fill, None)
                return before + total

            queries.drain(each_head(head, jnp.int32(0)))

    kernel = compiled(
        config,
        interpret,
        body=body,
        out_type=(
            jax.ShapeDtypeStruct((sizes.B, sizes.Sp, sizes.K, sizes.Hp), sizes.dtype),
            jax.ShapeDtypeStruct((sizes.B, sizes.Sp, sizes.K, sizes.Hvp), sizes.dtype),
            [jax.ShapeDtypeStruct((sizes.B, sizes.N, sizes.Sp), jnp.float32) for _ in ours],
        ),
        scratch_types=[
            *_matrices(sizes, wgs, ROWS),
            plgpu.Barrier(num_arrivals=2, num_barriers=wgs),
            ring(
                stages,
                wgs,
                *_matrices(sizes, stages, STEP),
                plgpu.SMEM((stages, lines, STEP), jnp.float32),
            ),
        ],
        grid=(sizes.K, sizes.Sp // sizes.tk, sizes.B),
        grid_names=("h", "j", "b"),
        num_threads=wgs + 1,
    )
    dk, dv, sums = kernel(x, y)
    return dk, dv, sums

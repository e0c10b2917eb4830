"""What the Mosaic kernels are made of: buffers that are filled ahead, and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from ...shapes import Array
from ..problem import Config

# Untyped: it changes from one version of JAX to the next.
plgpu: Any = mosaic_gpu

WGMMA = plgpu.Layout.WGMMA

# Rows that a warpgroup computes: as many as one wgmma instruction does.
ROWS = 64

# Keys (in the kernel of dK and dV: queries) of a step of the backward: as many as leave registers
# for two accumulators of 128 columns, or nearly.
STEP = 64

# Bytes of shared memory that a block may have, less those of barriers and reductions.
SHARED = 227 * 1024 - 8 * 1024

# The largest number of stages that loading runs ahead.
DEEPEST = 4

# --- memory and matrix products -------------------------------------------------------------------


def buffer(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices, as wgmma and the copy engine want them."""
    wide = 128 // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def products(*factors: tuple[Any, Any]) -> list[Array]:
    """`a @ b` of pairs of matrices in shared memory, all computed at the same time."""

    def fresh(*outs: Any) -> list[Array]:
        for out, (a, b) in zip(outs, factors, strict=True):
            plgpu.wgmma(out, a, b)
        return [out[...] for out in outs]

    shapes = [(a.shape[0], b.shape[1]) for a, b in factors]
    return pl.run_scoped(fresh, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def added(interpret: bool, *sums: tuple[Array, Any, Any]) -> list[Array]:
    """`acc + a @ b` of triples, all computed at the same time; `a` may be in registers."""
    if interpret:
        # The interpreter has no accumulators that start with a value. A plain read has to be
        # committed before a copy may write there; that of a wgmma does not.
        results = [
            acc + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for acc, a, b in sums
        ]
        plgpu.commit_smem()
        return results

    def add(outs: Any) -> None:
        for out, (_, a, b) in zip(outs, sums, strict=True):
            plgpu.wgmma(out, a, b)

    return pl.run_state(add)([plgpu.ACC.init(acc) for acc, _, _ in sums])


class Ring(NamedTuple):
    """Buffers that are filled and used in turn.

    Attributes:
      buffers: each `[stages, ...]`.
      ready: a barrier for each stage, at which every copy arrives.
      free: a barrier for each stage, at which every computing warpgroup arrives.
    """

    buffers: Any
    ready: Any
    free: Any

    def fill(self, n: Any, *sources: Any) -> None:
        """Loads what step n needs, as soon as a buffer is free."""
        stages = self.ready.shape[0]
        slot = lax.rem(n, jnp.int32(stages))

        @pl.when(n >= stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for source, into in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, into.at[slot], self.ready.at[slot])

    def take(self, n: Any) -> list[Any]:
        """Waits for what is loaded for step n, and returns it."""
        slot = lax.rem(n, jnp.int32(self.ready.shape[0]))
        plgpu.barrier_wait(self.ready.at[slot])
        return [each.at[slot] for each in self.buffers]

    def release(self, n: Any) -> None:
        """Marks what was loaded for step n as no longer needed by this warpgroup."""
        plgpu.barrier_arrive(self.free.at[lax.rem(n, jnp.int32(self.ready.shape[0]))])

    def drain(self, total: Any) -> None:
        """Waits until all that was loaded has been used: no barrier may end with an arrival that
        nothing has waited for."""
        stages = self.ready.shape[0]
        for last in range(1, stages + 1):
            n = total - last

            @pl.when(n >= 0)
            def _(n: Any = n) -> None:
                plgpu.barrier_wait(self.free.at[lax.rem(n, jnp.int32(stages))])


def ring(stages: int, computing: int, *buffers: Any) -> Ring:
    """The scratch memory of a ring; `buffers` are the shapes of one stage."""
    return Ring(
        buffers,
        plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages),
        plgpu.Barrier(num_arrivals=computing, num_barriers=stages),
    )


def stages_for(fixed: int, each: int) -> int:
    """How many stages of `each` bytes fit beside `fixed` ones."""
    return min(DEEPEST, (SHARED - fixed) // each)


def zeros(*shape: int, fill: float = 0) -> Array:
    """An accumulator: a tile, or a value for each of its rows."""
    layout = WGMMA if len(shape) == 2 else WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def across(rows: Array, width: int) -> Array:
    """A value of each row, for all its columns."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], width), (0,))


def load(ref: Any, layout: Any) -> Array:
    """Numbers or a tile from global memory."""
    # From global memory there is no load that counts as optimized.
    return plgpu.load(ref, layout=layout, optimized=False)


def put(ref: Any, value: Array) -> None:
    """Stores a tile, or values of rows, in global memory."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # JAX 0.11
        ref[...] = value


def columns(ref: Any, shape: tuple[int, ...]) -> Array:
    """A value of each column, for all its rows."""
    part = plgpu.load(ref, layout=WGMMA.reduce(0))
    return lax.broadcast_in_dim(part, shape, (1,))


def registers(computing: int, loads: bool) -> None:
    """Moves registers from the warpgroup that loads to two that compute; one has enough."""
    if computing == 2:
        # 2 x 240 + 24 of the 3 x 168 that there are.
        plgpu.set_max_registers(24 if loads else 240, action="decrease" if loads else "increase")


# --- loops and kernels ---------------------------------------------------------------------------


def over_list(counts: Any, step: Callable[..., Any], carry: Any) -> Any:
    """The PARTIAL tiles of a list, then the FULL ones: `step(masked, n, carry)`."""
    partial_, full = counts
    carry = lax.fori_loop(jnp.int32(0), partial_, partial(step, True), carry)
    return lax.fori_loop(partial_, partial_ + full, partial(step, False), carry)


def compiled(config: Config, interpret: bool, **options: Any) -> Callable[..., Any]:
    """A kernel. With a score or a statistic all functions are exact, else fast approximations."""
    # tanh.approx has 11 bits; ex2.approx and lg2.approx are nearly exact.
    params = plgpu.CompilerParams(approx_math=not config.residues)
    interpreter = plgpu.InterpretGPUParams(detect_races=True) if interpret else None
    return plgpu.kernel(compiler_params=params, thread_name="wg", interpret=interpreter, **options)

"""What kernels for TPUs read, write and multiply, against what the mask needs. Needs no TPU.

    make traffic-tpu
    make traffic-tpu ARGS="--lengths 32768 --masks causal prefix --heads 8 --kv-heads 1"

No kernel is run. Its grid and index maps say which block of each array a step needs, and Pallas
copies a block only where it is not that of the step before. So this counts, of one batch row, for
each kernel of jaxattn and of JAX's splash attention:

- the steps of the grid, and those of them that multiply: elsewhere the tile is empty;
- the bytes copied to the core and back, lists of tiles that are prefetched included;
- FLOPs: `2 tq tk H` for each matrix product of a tile, in the steps that multiply.

A mask needs these products for its visible pairs alone, each input read once, and each output
written once. What XLA computes before and after a kernel is not counted: both put heads before
lengths, and splash repeats statistics of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from benchmark_gpu_worker import our_options, visible
from jax.experimental import pallas as pl
from splash import BLOCK, splash

from jaxattn.arguments import checked_call
from jaxattn.backends.tpu import backend, kernels, tiles
from jaxattn.tiles.tile_map import EMPTY

Mask = Literal["full", "causal", "window", "documents", "prefix"]
# The matrix products of a tile: of queries and keys, and of weights and values; in the backward the
# first again, that of gradients and values, and one for each result.
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4}


@dataclass(frozen=True)
class Config:
    """Count what the kernels of jaxattn and of splash read, write and multiply."""

    masks: tuple[Mask, ...] = ("causal", "window", "documents")
    lengths: tuple[int, ...] = (8192, 131072)
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 128
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class Traffic(NamedTuple):
    """What a kernel does.

    Attributes:
      steps: of its grid.
      active: those that multiply.
      read, written: bytes.
      flop: operations of matrix products.
    """

    steps: int
    active: int
    read: int
    written: int
    flop: int

    def __add__(self, other: Any) -> Traffic:
        """The sum, as of one kernel after the other."""
        return Traffic(*map(sum, zip(self, other, strict=True)))

    @property
    def intensity(self) -> float:
        """Bytes for each thousand operations."""
        return 1e3 * (self.read + self.written) / self.flop


class Launched(NamedTuple):
    """A kernel as Pallas was given it.

    Attributes:
      name: of the kernel.
      spec: its grid and index maps.
      results: what says the shapes and dtypes of its results.
      prefetched: the arrays that index maps read.
      arrays: those of which it reads blocks.
    """

    name: str
    spec: Any
    results: Any
    prefetched: tuple[Any, ...]
    arrays: tuple[Any, ...]

    def traffic(self, active: Callable[..., Any], flop: int) -> Traffic:
        """Counts.

        Args:
          active: from a program's place in the grid, and what is prefetched, to whether it
            multiplies.
          flop: of a tile.
        """
        grid = tuple(int(n) for n in self.spec.grid)
        # In the order in which a core runs them: the last axis is the fastest.
        programs = [jnp.asarray(n.reshape(-1), jnp.int32) for n in np.indices(grid)]
        specs = jax.tree.leaves([self.spec.in_specs, self.spec.out_specs])
        arrays = jax.tree.leaves([self.arrays, self.results])

        def one(*place: Any) -> Any:
            functions = active, *(spec.index_map for spec in specs)
            return jax.tree.map(jnp.asarray, [fn(*place, *self.prefetched) for fn in functions])

        multiplies, *blocks = jax.jit(jax.vmap(one))(*programs)
        copied = [
            _bytes(spec, array) * _changes(block)
            for spec, array, block in zip(specs, arrays, blocks, strict=True)
        ]
        lists = [array.nbytes for array in jax.tree.leaves(self.prefetched)]
        count, reads = int(multiplies.sum()), len(jax.tree.leaves(self.spec.in_specs))
        return Traffic(
            steps=math.prod(grid),
            active=count,
            read=sum(copied[:reads]) + sum(lists),
            written=sum(copied[reads:]),
            flop=count * flop,
        )


def _bytes(spec: Any, array: Any) -> int:
    """Of a block."""
    size = math.prod(n or 1 for n in spec.block_shape)
    return int(size * jnp.dtype(array.dtype).itemsize)


def _changes(index: tuple[Any, ...]) -> int:
    """How often a block is another one than before, the first one included."""
    places = np.stack([np.asarray(axis) for axis in index])
    return 1 + int((places[:, 1:] != places[:, :-1]).any(0).sum())


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Inside, kernels are noted and not run; their results are zeros."""
    found: list[Launched] = []

    def pallas_call(_: Any, *, grid_spec: Any, out_shape: Any, name: str, **__: Any) -> Any:
        def run(*args: Any) -> Any:
            n = grid_spec.num_scalar_prefetch
            found.append(Launched(name, grid_spec, out_shape, args[:n], args[n:]))
            return jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), out_shape)

        return run

    # Without jit, what is prefetched has values.
    with jax.disable_jit(), mock.patch.object(pl, "pallas_call", pallas_call):
        yield found


# --- the kernels ----------------------------------------------------------------------------------


def ours(config: Config, mask: Mask, T: int) -> dict[str, Traffic]:
    """Of each kernel of jaxattn."""
    launch, launches = tiles.launch, list[tuple[Any, ...]]()

    def noted(*args: Any) -> Any:
        before = len(found)
        results = launch(*args)
        # Several, where lists of tiles do not fit into one kernel's memory.
        launches.extend([args] * (len(found) - before))
        return results

    query, key = (
        jnp.zeros((1, T, heads, config.head_dim), config.dtype)
        for heads in (config.heads, config.kv_heads)
    )
    arrays, make = our_options(mask, {"T": T, "B": 1, "N": config.heads})
    call = checked_call(query, key, key, **make(**arrays))
    problem, inputs = backend.build(call)
    inputs = inputs.grouped()
    engine = kernels.engine(tiles.KernelOptions())
    with recorded() as found, mock.patch.object(tiles, "launch", noted):
        out, lse = engine.forward(problem, inputs)
        far = lse.transpose(0, 2, 3, 1)
        engine.backward(problem, 1, inputs, far, far, out)

    counted = dict.fromkeys(PRODUCTS, Traffic(0, 0, 0, 0, 0))
    for kernel, (_, name, _, sizes, path, *_) in zip(found, launches, strict=True):
        b, heads = path.extents
        walk = replace(path, length=kernel.prefetched[0].size // (b * heads))

        def active(*place: Any, walk: Any = walk) -> Any:
            return walk.place(*place).state != EMPTY

        tile = 2 * sizes.tq * sizes.tk * config.head_dim
        counted[name] += kernel.traffic(active, PRODUCTS[name] * tile)
    return counted


def splashes(config: Config, mask: Mask, T: int) -> dict[str, Traffic]:
    """Of each kernel of splash attention."""
    query, key = (
        jnp.zeros((heads, T, config.head_dim), config.dtype)
        for heads in (config.heads, config.kv_heads)
    )
    attend = splash(mask, T, config.heads)
    with recorded() as found:
        out, pull = jax.vjp(attend, query, key, key)
        pull(out)

    def active(across: bool, a: Any, b: Any, c: Any, _: Any, states: Any, *__: Any) -> Any:
        if states is None:
            return True
        head, row, column = (b, c, a) if across else (a, b, c)
        return states[head if states.shape[0] > 1 else 0, row, column] > 0

    counted = {}
    for kernel in found:
        phase = kernel.name.split("_")[2]
        name = {"fwd": "forward", "dq": "queries", "dkv": "keys"}[phase]
        tile = 2 * min(BLOCK, T) ** 2 * config.head_dim
        counted[name] = kernel.traffic(partial(active, phase == "dkv"), PRODUCTS[name] * tile)
    return counted


def needed(config: Config, mask: Mask, T: int) -> dict[str, Traffic]:
    """What the same results need: visible pairs, and every array once."""
    pairs = visible(mask, T) * config.heads
    size = jnp.dtype(config.dtype).itemsize
    of_queries, of_keys = (n * T * config.head_dim * size for n in (config.heads, config.kv_heads))
    # A float32 number of each query: the LSE, and what the backward takes from weighted gradients.
    line = 4 * config.heads * T
    back = 2 * of_queries + 2 * of_keys + 2 * line
    moved = {
        "forward": (of_queries + 2 * of_keys, of_queries + line),
        "queries": (back, of_queries),
        "keys": (back, 2 * of_keys),
    }
    return {
        name: Traffic(0, 0, read, written, PRODUCTS[name] * 2 * pairs * config.head_dim)
        for name, (read, written) in moved.items()
    }


# --- the table ------------------------------------------------------------------------------------


def rows(config: Config) -> Iterator[list[str]]:
    """A row for each mask, length and kernel: needed, jaxattn's, splash's."""
    for T in config.lengths:
        for mask in config.masks:
            need, mine, other = (fn(config, mask, T) for fn in (needed, ours, splashes))
            for name, least in need.items():
                each = least, mine[name], other[name]
                yield [
                    f"{mask}, T = {T}, {name}",
                    f"{least.flop / 1e9:.1f}",
                    *(f"{one.flop / least.flop:.2f}" for one in each[1:]),
                    *(f"{(one.read + one.written) / 1e6:.1f}" for one in each),
                    *(f"{one.intensity:.2f}" for one in each),
                    *(str(one.steps) for one in each[1:]),
                ]


HEADER = [
    "kernel", "GFLOP needed", "times that, jaxattn", "splash", "MB needed", "jaxattn", "splash",
    "bytes per kFLOP, needed", "jaxattn", "splash", "steps, jaxattn", "splash",
]  # fmt: skip


def main(config: Config) -> None:
    """Counts, and prints a Markdown table."""
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for row in rows(config):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

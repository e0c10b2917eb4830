"""Meshes: explicit axes made automatic, axes that arrays vary over, and what is outside of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

R = TypeVar("R")


def varying_alike(args: list[Any]) -> list[Any]:
    """Under `shard_map`, operands cast to vary over the same mesh axes, as `lax` would."""
    axes = [varying(arg) for arg in args]
    union = frozenset[Any]().union(*axes)
    if not union:
        return args
    return [
        lax.pcast(arg, tuple(sorted(union - mine)), to="varying") if union - mine else arg
        for arg, mine in zip(args, axes, strict=True)
    ]


def varying(array: Any) -> frozenset[Any]:
    """The mesh axes that an array varies over inside `shard_map`."""
    if not isinstance(array, jax.core.Tracer):
        return frozenset()
    aval = jax.typeof(array)
    manual = getattr(aval, "mat", None)
    return getattr(manual, "varying", None) or getattr(aval, "vma", None) or frozenset()


def constant(reference: Any, shape: tuple[int, ...], dtype: Any, fill: float = 0) -> Any:
    """A constant that varies over the same mesh axes as `reference`, as a loop's carry must."""
    full = jnp.full(shape, fill, dtype)
    axes = tuple(sorted(varying(reference)))
    return lax.pcast(full, axes, to="varying") if axes else full


def automatic(run: Callable[..., Any], args: tuple[Any, ...], out: Any) -> Any:
    """`run(*args)`; where an argument lies on a mesh of explicit axes, with these made automatic.

    Args:
      run: the function. XLA, or what it calls, partitions the work as it likes.
      args: its arguments, pytrees of arrays.
      out: how its results are sharded on such a mesh: a pytree of `PartitionSpec`.
    """
    for leaf in jax.tree.leaves(args):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty and jax.sharding.AxisType.Explicit in mesh.axis_types:
            # The arrays' own mesh, so that none need be set by the caller.
            with jax.sharding.use_abstract_mesh(mesh):
                return jax.sharding.auto_axes(run, out_sharding=out)(*args)
    return run(*args)


def evaluated(fn: Callable[[], R]) -> R:
    """The result of a function of known values, under `jit` and inside `shard_map` too.

    JAX's `ensure_compile_time_eval` fails in a `shard_map` that is not compiled. What JAX traces,
    and its meshes and devices, belong to a thread, and in a new one there are none.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(fn).result()

"""The passes of an engine, computed where the inputs are: over batch rows, heads and lengths.

XLA's partitioner asks how the inputs lie on its mesh (`custom_partitioning`), and is told how each
device computes its part. Inside a `shard_map` arrays are parts already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ...shapes import Array
from .. import base
from ..problem import Config, Gradients, Inputs
from . import exchange, nonfinite

# Names of axes by role. Batch rows b, query heads n, key heads k and lengths t may be sharded; that
# of keys only if there are as many as queries. Operands have more axes after these, and extents of
# 1 where they don't depend on b or h.
_AXES = {
    "query": "btnh", "key": "btkh", "value": "btkw", "scale": "b", "operand": "bn", "out": "btnw",
    "lse": "btn", "weights": "bnt",
}  # fmt: skip


class Pass(NamedTuple):
    """What is computed: "forward", "tangent", or "backward", with this number of groups.

    With `weights`, the forward gives them too, and the backward takes them.
    """

    name: str
    groups: int = 1
    weights: bool = False


def partitioned(work: Pass, config: Config, local: bool, x: Inputs, *rest: Any) -> Any:
    """The pass `work`, computed where the inputs are."""
    args = (x, *rest)
    fn = _local(work, config)
    if local:
        return fn(*args)

    def operands(values: Any) -> Any:
        return jax.tree.map(lambda _: "operand", values)

    own: tuple[Any, ...] = ("query", "key", "value", operands(x.states), "scale")
    roles: Any = Inputs(*own, *map(operands, x[5:]))
    shapes = jax.eval_shape(fn, *args)
    weights = ("weights",) * work.weights
    out_roles: Any = ("out", "lse")
    match work.name:
        case "forward":
            given: tuple[Any, ...] = (roles,)
            out_roles += weights
        case "tangent":
            given = (roles, x.floats(roles))
        case _:
            given = (roles, "out", "lse", *weights, "out", "lse")
            query, key, value, _, scale = own
            out_roles = Gradients(query, key, value, scale, operands(shapes.score))
    B, T, N, _ = x.query.shape
    extents = {"b": B, "n": N, "k": x.key.shape[2], "t": T}
    leaves, tree = jax.tree.flatten(args)
    results, out_tree = jax.tree.flatten(shapes)

    def named(arrays: Any, roles: Any) -> tuple[str, ...]:
        pairs = zip(arrays, jax.tree.leaves(roles), strict=True)
        return tuple(_names(a.shape, role, extents) for a, role in pairs)

    op = _operation(
        work, config, tree, named(leaves, given), named(results, out_roles), tuple(extents.items())
    )
    return jax.tree.unflatten(out_tree, op(*leaves))


@lru_cache(maxsize=1024)
def _local(work: Pass, config: Config) -> Callable[..., Any]:
    """What is computed; traced once for its shapes, for the primal and for the forward rule."""
    passes: Any = nonfinite if config.shards is None else exchange
    match work.name:
        case "forward":
            fn: Any = partial(nonfinite.with_weights if work.weights else passes.forward, config)
        case "tangent":
            fn = partial(passes.tangent, config)
        case _:
            fn = partial(passes.backward, config, work.groups)
    return jax.jit(fn, inline=True)


def _names(shape: tuple[int, ...], role: str, extents: dict[str, int]) -> str:
    """A letter for each axis: b, n, k, t where it has that extent, "." for what stays whole."""
    letters = _AXES[role].ljust(len(shape), ".")
    return "".join(
        letter if letter in extents and extents[letter] == size else "."
        for letter, size in zip(letters, shape, strict=True)
    )


class _ShardedAxes(NamedTuple):
    """How an operation is split: mesh axes of batch rows, query heads, key heads, and lengths.

    And all axes of the mesh.
    """

    b: tuple[Any, ...] = ()
    n: tuple[Any, ...] = ()
    k: tuple[Any, ...] = ()
    t: tuple[Any, ...] = ()
    mesh: tuple[Any, ...] = ()


@lru_cache(maxsize=1024)
def _operation(
    work: Pass,
    config: Config,
    tree: Any,
    names: tuple[str, ...],
    outs: tuple[str, ...],
    extents: tuple[tuple[str, int], ...],
) -> Callable[..., Any]:
    """The work as an operation that XLA's partitioner may split.

    Where key heads are fewer than the devices that query heads are split over, every device is
    given all of them, and takes those that its query heads use. Where lengths are split, keys go
    from device to device (`exchange`).
    """
    B, N, K, T = (size for _, size in extents)
    engine = config.engine
    # An engine that is exact needs all keys at once, and so do weights.
    lengths = engine is not None and not engine.exact and not work.weights
    key_word = names[1]

    def local(split: _ShardedAxes, parts: int, *leaves: Array) -> Any:
        # XLA asks for this while it compiles, under whatever mesh the caller has set; on one
        # device there is none.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return computed(split, parts, *leaves)

    def computed(split: _ShardedAxes, parts: int, *leaves: Array) -> Any:
        here = work._replace(groups=max(work.groups // parts, 1))
        used = None
        if split.n and not split.k:
            used = _used(N, K, leaves[0].shape[2], lax.axis_index(split.n))
            leaves = tuple(
                jnp.take(a, used, 2) if "k" in word else a
                for a, word in zip(leaves, names, strict=True)
            )
        x, *rest = jax.tree.unflatten(tree, leaves)
        made, x = over_lengths(split, x)
        results = jax.tree.leaves(_local(here, made)(x, *rest))
        return tuple(whole(a, word, split, used) for a, word in zip(results, outs, strict=True))

    def over_lengths(split: _ShardedAxes, x: Inputs) -> tuple[Config, Inputs]:
        """The config and inputs of a device that has a part of the queries, and of the keys."""
        if not split.t:
            return config, x
        t, s = x.query.shape[1], x.key.shape[1]
        keys = "ring" if "t" in key_word else "whole"
        if t % config.tile[0] or s % config.tile[1]:
            x = x._replace(states=None)
        shards = base.Shards(split.t, T // t, keys, split.mesh)
        return config._replace(states=None, shards=shards), x

    def whole(array: Array, word: str, split: _ShardedAxes, used: Array | None) -> Array:
        """A result of all devices: gradients of arrays that they share are summed."""
        if used is not None and "k" in word:
            zeros = jnp.zeros((*array.shape[:2], K, *array.shape[3:]), array.dtype)
            array = zeros.at[:, :, used].add(array)
        over = () if "b" in word else split.b
        if "n" not in word and not ("k" in word and split.k):
            over += split.n
        if "t" not in word:
            over += split.t
        return lax.psum(array, over) if over else array

    @custom_partitioning
    def op(*leaves: Array) -> Any:
        return computed(_ShardedAxes(), 1, *leaves)

    def split_of(arg_shapes: Any) -> tuple[_ShardedAxes, int]:
        """How the queries are split, and into how many parts their batch rows are."""
        sharding = arg_shapes[0].sharding
        spec = (*getattr(sharding, "spec", ()), *(None,) * 4)
        b, t, n = (_tuple(axes) for axes in spec[:3])
        sizes = [math.prod(sharding.mesh.shape[axis] for axis in axes) for axes in (b, n, t)]
        # A gradient for each group of rows: only whole groups are split off.
        if B % sizes[0] or (work.groups > 1 and work.groups % sizes[0]):
            b, sizes[0] = (), 1
        if N % sizes[1]:
            n, sizes[1] = (), 1
        if not lengths or T % sizes[2]:
            t = ()
        mesh = tuple(sharding.mesh.axis_names)
        return _ShardedAxes(b, n, () if K % sizes[1] else n, t, mesh), sizes[0]

    def shardings(mesh: Any, split: _ShardedAxes, words: Sequence[str]) -> tuple[Any, ...]:
        axes = split._asdict()
        return tuple(NamedSharding(mesh, P(*(axes.get(n) or None for n in word))) for word in words)

    def infer(mesh: Any, arg_shapes: Any, _: Any) -> Any:
        return shardings(mesh, split_of(arg_shapes)[0], outs)

    def partition(mesh: Any, arg_shapes: Any, _: Any) -> Any:
        split, parts = split_of(arg_shapes)
        return (
            mesh,
            partial(local, split, parts),
            shardings(mesh, split, outs),
            shardings(mesh, split, names),
        )

    # A rule like einsum's: shared letters shard alike, every other axis stays whole.
    left: list[str] = []

    def spelled(word: str) -> str:
        named = []
        for n in word:
            if n == "." or (n == "t" and not lengths):
                left.append(f"x{len(left)}")
                n = left[-1]
            # As many key heads as query heads: they go together.
            named.append("n" if n == "k" and K == N else n)
        return " ".join(named)

    rule = ", ".join(map(spelled, names)) + " -> " + ", ".join(map(spelled, outs))
    op.def_partition(
        infer_sharding_from_operands=infer,
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(left),
    )
    return cast("Callable[..., Any]", op)


def _used(N: int, K: int, here: int, device: Array) -> Array:
    """The key heads that this device's `here` query heads use, each for as many of them."""
    group = N // K
    each = math.gcd(here, group)
    first = device * here + jnp.arange(here // each, dtype=jnp.int32) * each
    return lax.div(first, jnp.int32(group))


def _tuple(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)

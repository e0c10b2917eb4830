"""Loops and kernels as functions that behave under JAX's transformations.

From the outside in:

- `custom_vjp`: the backward is an engine's own, over the same tiles;
- `custom_vmap`: a vmapped axis is folded into the batch axis. A loop batched by JAX would compute
  every batch row to the length of the longest;
- `custom_partitioning`: inputs sharded over batch or heads are computed where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..program import varying, varying_alike
from ..shapes import Array, Float
from .inputs import Gradients, Inputs, Plan

# The names of the results that the backward needs, for `jax.checkpoint` policies.
SAVED = ("jaxattn_out", "jaxattn_lse")


def attend(plan: Plan, x: Inputs) -> tuple[Float[Array, "B T K G Hv"], Float[Array, "B T K G"]]:
    """Output and LSE by the plan's engine, under any transformation."""
    leaves, tree = jax.tree.flatten(x)
    # All varying over the same axes of a `shard_map`: gradients are then summed outside.
    alike = cast(Inputs, jax.tree.unflatten(tree, varying_alike(leaves)))
    return _attend(plan)(alike)


# --- differentiation ------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _attend(plan: Plan) -> Callable[[Inputs], tuple[Array, Array]]:
    @jax.custom_vjp
    def attend(x: Inputs) -> tuple[Array, Array]:
        return cast("tuple[Array, Array]", _forward(plan)(x))

    def forward(x: Inputs) -> Any:
        out, lse = _forward(plan)(x)
        out, lse = (checkpoint_name(a, name) for a, name in zip((out, lse), SAVED, strict=True))
        return (out, lse), (x, out, lse)

    def backward(saved: Any, cotangents: Any) -> tuple[Inputs]:
        x, out, lse = saved
        g: Gradients = _backward(plan, 1)(x, out, lse, *cotangents)
        scale = g.scale if x.scale.shape[0] != 1 else g.scale.sum(0, keepdims=True)
        # None stands for zero: masks carry no gradient.
        return (
            Inputs(
                g.query,
                g.key,
                g.value,
                None,
                scale,
                (None,) * len(x.mask),
                g.score,
                (None,) * len(x.dropout),
            ),
        )

    attend.defvjp(forward, backward)
    return attend


# --- vmap -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _forward(plan: Plan) -> Any:
    @custom_vmap
    def forward(x: Inputs) -> tuple[Array, Array]:
        return cast("tuple[Array, Array]", _partitioned(None, plan, x))

    @forward.def_vmap
    def rule(size: int, batched: Any, x: Inputs) -> Any:
        out, lse = forward(_fold(size, batched[0], x))
        return (_unfold(size, out), _unfold(size, lse)), (True, True)

    return forward


@lru_cache(maxsize=1024)
def _backward(plan: Plan, groups: int) -> Any:
    """The backward, with a gradient of each operand that batch rows share for every group of rows.

    Under vmap an array that is not batched still has one cotangent for each element.
    """

    @custom_vmap
    def backward(x: Inputs, out: Array, lse: Array, d_out: Array, d_lse: Array) -> Gradients:
        return cast(Gradients, _partitioned(groups, plan, x, out, lse, d_out, d_lse))

    @backward.def_vmap
    def rule(size: int, batched: Any, x: Inputs, *rest: Array) -> Any:
        B = x.query.shape[1 if batched[0].query else 0]
        folded = _fold(size, batched[0], x)
        others = (_fold_one(size, yes, B, a) for yes, a in zip(batched[1:], rest, strict=True))
        g = _backward(plan, groups * size)(folded, *others)

        def unfold(gradient: Array, primal: Array, yes: bool) -> Array:
            """The gradient for each element: `[size, groups]` or `[size, B]` in front."""
            extent = primal.shape[1 if yes else 0]
            target = extent if extent == B and B > 1 else groups
            gradient = gradient.reshape(size, -1, *gradient.shape[1:])
            if gradient.shape[1] == target:
                return gradient
            parts = gradient.reshape(size, target, -1, *gradient.shape[2:])
            return parts.sum(2)

        score = tuple(
            None if part is None else unfold(part, primal, yes)
            for part, primal, yes in zip(g.score, x.score, batched[0].score, strict=True)
        )
        result = Gradients(
            _unfold(size, g.query),
            _unfold(size, g.key),
            _unfold(size, g.value),
            _unfold(size, g.scale),
            score,
        )
        return result, jax.tree.map(lambda _: True, result)

    return backward


def _fold_one(size: int, batched: bool, B: int, array: Array, shared: bool = False) -> Array:
    """`[size, B, ...]` as `[size * B, ...]`; what is not batched is repeated, unless shared."""
    if not batched:
        if shared and array.shape[0] == 1:
            return array
        array = jnp.broadcast_to(array, (size, *array.shape))
    if array.shape[1] != B:
        array = jnp.broadcast_to(array, (size, B, *array.shape[2:]))
    return array.reshape(size * B, *array.shape[2:])


def _fold(size: int, batched: Inputs, x: Inputs) -> Inputs:
    B = x.query.shape[1 if batched.query else 0]
    rows = {"query", "key", "value"}
    return Inputs(
        *(
            jax.tree.map(
                lambda yes, a, own=name in rows: _fold_one(size, yes, B, a, shared=not own),
                getattr(batched, name),
                getattr(x, name),
            )
            for name in Inputs._fields
        )
    )


def _unfold(size: int, array: Array) -> Array:
    return array.reshape(size, -1, *array.shape[1:])


# --- sharding -------------------------------------------------------------------------------------


# Names of axes by role. Batch rows b, key heads k and groups g may be sharded; operands have more
# axes after these, and extents of 1 where they don't depend on b or h.
_AXES = {
    "query": "btkgh", "key": "bskh", "value": "bskw", "scale": "b", "operand": "bkg",
    "out": "btkgw", "lse": "btkg",
}  # fmt: skip


def _partitioned(groups: int | None, plan: Plan, x: Inputs, *rest: Array) -> Any:
    """The forward, or the backward of so many groups, computed where the inputs are."""
    args = (x, *rest)
    fn = _local(groups, plan)
    if varying(x.query) or jax.sharding.get_abstract_mesh().manual_axes:
        # Inside a shard_map arrays are local already.
        return fn(*args)

    def operands(values: Any) -> Any:
        return jax.tree.map(lambda _: "operand", values)

    own: tuple[Any, ...] = ("query", "key", "value", operands(x.states), "scale")
    roles = (Inputs(*own, *map(operands, x[5:])), *("out", "lse", "out", "lse")[: len(rest)])
    shapes = jax.eval_shape(fn, *args)
    out_roles: Any = ("out", "lse")
    if groups is not None:
        query, key, value, _, scale = own
        out_roles = Gradients(query, key, value, scale, operands(shapes.score))
    B, _, K, G, _ = x.query.shape
    extents = {"b": B, "k": K, "g": G}
    leaves, tree = jax.tree.flatten(args)
    results, out_tree = jax.tree.flatten(shapes)

    def named(arrays: Any, roles: Any) -> tuple[str, ...]:
        pairs = zip(arrays, jax.tree.leaves(roles), strict=True)
        return tuple(_names(a.shape, role, extents) for a, role in pairs)

    op = _operation(groups, plan, tree, named(leaves, roles), out_tree, named(results, out_roles))
    return jax.tree.unflatten(out_tree, op(*leaves))


@lru_cache(maxsize=1024)
def _local(groups: int | None, plan: Plan) -> Callable[..., Any]:
    """The engine; traced once for its shapes, for the primal and for the forward rule."""
    engine = plan.engine
    fn = partial(engine.forward, plan) if groups is None else partial(engine.backward, plan, groups)
    return jax.jit(fn, inline=True)


def _names(shape: tuple[int, ...], role: str, extents: dict[str, int]) -> str:
    """A letter for each axis: b, k, g where it has that extent, "." for what stays whole."""
    letters = _AXES[role].ljust(len(shape), ".")
    return "".join(
        letter if letter in extents and extents[letter] == n else "."
        for letter, n in zip(letters, shape, strict=True)
    )


@lru_cache(maxsize=1024)
def _operation(
    groups: int | None,
    plan: Plan,
    tree: Any,
    names: tuple[str, ...],
    out_tree: Any,
    outs: tuple[str, ...],
) -> Callable[..., Any]:
    """The engine as an operation that XLA's partitioner may split along b, k and g."""

    def local(local_groups: int | None, axes: dict[str, Any], *leaves: Array) -> Any:
        # XLA asks for this while it compiles, under whatever mesh the caller has set; on one
        # device there is none.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return flat(local_groups, axes, *leaves)

    def flat(local_groups: int | None, axes: dict[str, Any], *leaves: Array) -> Any:
        results = jax.tree.leaves(_local(local_groups, plan)(*jax.tree.unflatten(tree, leaves)))
        # The gradient of what devices share is the sum of theirs.
        over = [tuple(at for n in "bkg" if n not in out for at in axes[n]) for out in outs]
        return tuple(
            lax.psum(a, names) if names else a for a, names in zip(results, over, strict=True)
        )

    @custom_partitioning
    def op(*leaves: Array) -> Any:
        return flat(groups, dict.fromkeys("bkg", ()), *leaves)

    def axes_of(arg_shapes: Any) -> dict[str, Any]:
        sharding = arg_shapes[0].sharding
        spec = (*getattr(sharding, "spec", ()), *(None,) * 5)
        axes = {n: _tuple(spec[i]) for n, i in (("b", 0), ("k", 2), ("g", 3))}
        if groups is not None and groups > 1:
            # A gradient for each group of rows: only whole groups are split off.
            parts = 1
            for axis in axes["b"]:
                parts *= sharding.mesh.shape[axis]
            if groups % parts:
                axes["b"] = ()
        return axes

    def shardings(mesh: Any, axes: dict[str, Any], letters: Sequence[str]) -> tuple[Any, ...]:
        return tuple(
            NamedSharding(mesh, P(*(axes.get(n) or None for n in word))) for word in letters
        )

    def infer(mesh: Any, arg_shapes: Any, _: Any) -> Any:
        return shardings(mesh, axes_of(arg_shapes), outs)

    def partition(mesh: Any, arg_shapes: Any, _: Any) -> Any:
        axes = axes_of(arg_shapes)
        parts = 1
        for axis in axes["b"]:
            parts *= mesh.shape[axis]
        local_groups = None if groups is None else max(groups // parts, 1)
        return (
            mesh,
            partial(local, local_groups, axes),
            shardings(mesh, axes, outs),
            shardings(mesh, axes, names),
        )

    # A rule like einsum's: shared letters shard alike, every other axis stays whole.
    whole: list[str] = []

    def spelled(word: str) -> str:
        named = []
        for n in word:
            if n == ".":
                whole.append(f"x{len(whole)}")
                n = whole[-1]
            named.append(n)
        return " ".join(named)

    rule = ", ".join(map(spelled, names)) + " -> " + ", ".join(map(spelled, outs))
    op.def_partition(
        infer_sharding_from_operands=infer,
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(whole),
    )
    return cast("Callable[..., Any]", op)


def _tuple(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)

"""Engines as functions that work under all of JAX's transformations.

From the outside in:

- `operation`: JAX sees one operation. The transpose of its tangent is the engine's own backward,
  over the same tiles. Second derivatives are those of the formula, some rows at a time;
- `custom_vmap`: a vmapped axis is folded into the batch axis. A loop batched by JAX would run for
  every batch row as long as for the longest;
- `partition`: inputs sharded over batch, heads or lengths are computed where they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ...mesh import constant, varying, varying_alike
from ...shapes import Array, Float
from .. import base, formula
from ..operation import Rules, operation
from ..problem import Config, Gradients, Inputs
from . import exchange
from .partition import Pass, partitioned

# The names of the results that the backward needs, for `jax.checkpoint` policies. Weights are only
# kept by engines that say so (`Engine.keeping`).
SAVED = ("jaxattn_out", "jaxattn_lse", "jaxattn_weights")


def attend(config: Config, x: Inputs) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Output and LSE by the config's engine, under any transformation."""
    leaves, tree = jax.tree.flatten(x)
    # All varying over the same axes of a `shard_map`: gradients are then summed outside.
    alike = varying_alike(leaves)
    # Inside a `shard_map` arrays are local already. Asked here: derivatives are traced elsewhere.
    local = bool(varying(x.query) or jax.sharding.get_abstract_mesh().manual_axes)
    B, T, N, _ = x.query.shape
    wide = base.accumulator(x.query.dtype)
    width = x.value.shape[-1] + len(config.columns)
    like = (
        constant(alike[0], (B, T, N, width), wide if config.columns else x.query.dtype),
        constant(alike[0], (B, T, N), wide),
    )
    out, lse = operation(_forward_rules(config, tree, local), alike, (), like)
    return out, _with_empty(lse)


def received(
    config: Config, x: Inputs, lse: Float[Array, "B T N"], weight: Float[Array, "B T N"]
) -> Float[Array, "B S N"]:
    """The sum over queries of `weight * p`: the gradient of a value with one channel.

    Every query head has a key head of its own for that. The engine's backward also has gradients
    of queries and keys, which XLA leaves out of its loops.
    """
    (B, S, K, _), N = x.key.shape, x.query.shape[2]
    # Gradients are sums in the dtype of what they belong to; products have that of the config.
    query, key = (a.astype(weight.dtype) for a in (x.query, jnp.repeat(x.key, N // K, 2)))
    x = x._replace(query=query, key=key, value=constant(x.query, (B, S, N, 1), weight.dtype))
    d_out = weight[..., None]
    leaves, tree = jax.tree.flatten(x)
    local = bool(varying(x.query) or jax.sharding.get_abstract_mesh().manual_axes)
    given = (*leaves, jnp.zeros_like(d_out), _kept(lse), d_out, jnp.zeros_like(lse))
    _, _, found, *_ = operation(_backward_rules(config, tree, local, False), given, (), x.floats())
    return cast(Array, found[..., 0])


# --- differentiation ------------------------------------------------------------------------------


def _kept(lse: Array) -> Array:
    """An LSE as it is kept for derivatives: `jax_debug_infs` would stop for -inf."""
    return jnp.where(lse == -jnp.inf, jnp.finfo(lse.dtype).max, lse)


def _with_empty(lse: Array) -> Array:
    """An LSE as it was before it was kept."""
    return jnp.where(lse == jnp.finfo(lse.dtype).max, -jnp.inf, lse)


@lru_cache(maxsize=1024)
def _forward_rules(config: Config, tree: Any, local: bool, weights: bool = False) -> Rules:
    """Attention of the leaves of inputs: output and kept LSE, and weights if asked for."""

    def apply(leaves: Any, _: Any) -> Any:
        out, lse, *more = _forward(config, local, weights)(_inputs(tree, leaves))
        return out, _kept(lse), *more

    def slope(leaves: Any, _: Any, results: Any, moved: Any) -> Any:
        operands = _inputs(tree, leaves).floats(_inputs(tree, moved))
        rules = _tangent_rules(config, tree, local, weights)
        found = operation(rules, (*leaves, *results), operands, results[:2])
        # Nobody differentiates the weights: they are read by the backward alone.
        return *found, *map(jnp.zeros_like, results[2:])

    def differentiated(leaves: Any) -> tuple[Rules, Any]:
        x = _inputs(tree, leaves)
        (B, T, N, _), S = x.query.shape, x.key.shape[1]
        like = constant(x.query, (B, N, T, S), base.accumulator(x.query.dtype))
        return _forward_rules(config, tree, local, True), (like,)

    keeps = config.engine is not None and config.engine.keeping is not None
    return Rules(
        apply,
        slope,
        names=SAVED[: 3 if weights else 2],
        differentiated=differentiated if keeps and not weights else None,
    )


@lru_cache(maxsize=1024)
def _tangent_rules(config: Config, tree: Any, local: bool, weights: bool) -> Rules:
    """The tangent of attention: of inputs and what its forward gave, for tangents of the inputs.

    Its transpose is the backward. Where it is differentiated, the formula is, in its place.
    """

    count = tree.num_leaves

    def apply(fixed: Any, operands: Any) -> Any:
        return _tangent(config, local)(_inputs(tree, fixed[:count]), tuple(operands))

    def slope(fixed: Any, operands: Any, _: Any, moved: Any) -> Any:
        x, others = _inputs(tree, fixed[:count]), _inputs(tree, moved[:count])
        by_formula = _by_formula(config, x)

        def tangent(floats: Any) -> Any:
            return jax.jvp(by_formula, floats, tuple(operands))[1]

        return jax.jvp(tangent, (x.floats(),), (x.floats(others),))[1]

    def transpose(fixed: Any, cotangents: Any) -> Any:
        like = _inputs(tree, fixed[:count]).floats()
        rules = _backward_rules(config, tree, local, weights)
        return operation(rules, (*fixed, *cotangents), (), like)

    return Rules(apply, slope, transpose)


@lru_cache(maxsize=1024)
def _backward_rules(config: Config, tree: Any, local: bool, weights: bool) -> Rules:
    """The backward: of inputs, what the forward gave, and the cotangents of output and LSE."""
    count = tree.num_leaves

    def apply(fixed: Any, _: Any) -> Any:
        x, (out, lse, *rest) = _inputs(tree, fixed[:count]), fixed[count:]
        g: Gradients = _backward(config, local, 1, weights)(x, out, _with_empty(lse), *rest)
        scale = g.scale if x.scale.shape[0] != 1 else g.scale.sum(0, keepdims=True)
        # The operands of maxima have no gradient.
        pairs = zip(x.floats(), x.floats(g._replace(scale=scale)), strict=True)
        return tuple(constant(a, a.shape, a.dtype) if d is None else d for a, d in pairs)

    def slope(fixed: Any, _: Any, __: Any, moved: Any) -> Any:
        x, others = _inputs(tree, fixed[:count]), _inputs(tree, moved[:count])
        by_formula = _by_formula(config, x)

        def gradients(floats: Any, cotangents: Any) -> Any:
            return jax.vjp(by_formula, *floats)[1](cotangents)

        given = (x.floats(), tuple(fixed[-2:]))
        return jax.jvp(gradients, given, (x.floats(others), tuple(moved[-2:])))[1]

    return Rules(apply, slope)


def _inputs(tree: Any, leaves: Sequence[Any]) -> Inputs:
    """Inputs with these leaves, or with others in the same places, such as tangents."""
    return cast(Inputs, jax.tree.unflatten(tree, leaves))


def _by_formula(config: Config, x: Inputs) -> Callable[..., Any]:
    """Output and LSE from `x.floats()`, for derivatives that no engine has."""
    by_rows = formula.by_rows if config.shards is None else exchange.by_formula
    return lambda *floats: by_rows(config, x.with_floats(floats))


# --- vmap -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _forward(config: Config, local: bool, weights: bool) -> Any:
    @custom_vmap
    def forward(x: Inputs) -> tuple[Array, ...]:
        work = Pass("forward", weights=weights)
        return cast("tuple[Array, ...]", partitioned(work, config, local, x))

    @forward.def_vmap
    def rule(size: int, batched: Any, x: Inputs) -> Any:
        heads_first = config.engine is not None and config.engine.heads_first
        return _unfolded(size, forward(_fold(size, batched[0], x, heads_first)))

    return forward


@lru_cache(maxsize=1024)
def _tangent(config: Config, local: bool) -> Any:
    @custom_vmap
    def tangent(x: Inputs, moved: Any) -> tuple[Array, Array]:
        return cast("tuple[Array, Array]", partitioned(Pass("tangent"), config, local, x, moved))

    @tangent.def_vmap
    def rule(size: int, batched: Any, x: Inputs, moved: Any) -> Any:
        # A tangent has the shape of its primal: both are batched, or neither is.
        flags = tuple(map(operator.or_, x.floats(batched[0]), batched[1]))
        pairs = []
        for of, given in ((batched[0], x.floats()), (x.with_floats(batched[1], batched[0]), moved)):
            spread = [
                jnp.broadcast_to(a, (size, *a.shape)) if wanted and not yes else a
                for a, wanted, yes in zip(given, flags, x.floats(of), strict=True)
            ]
            pairs.append(_fold(size, x.with_floats(flags, batched[0]), x.with_floats(spread)))
        return _unfolded(size, tangent(pairs[0], pairs[1].floats()))

    return tangent


@lru_cache(maxsize=1024)
def _backward(config: Config, local: bool, groups: int, weights: bool) -> Any:
    """The backward, with a gradient of each operand that batch rows share for every group of rows.

    Under vmap an array that is not batched still has one cotangent for each element.
    """

    @custom_vmap
    def backward(x: Inputs, *rest: Array) -> Gradients:
        work = Pass("backward", groups, weights)
        return cast(Gradients, partitioned(work, config, local, x, *rest))

    @backward.def_vmap
    def rule(size: int, batched: Any, x: Inputs, *rest: Array) -> Any:
        B = x.query.shape[1 if batched[0].query else 0]
        folded = _fold(size, batched[0], x)
        others = (_fold_one(size, yes, B, a) for yes, a in zip(batched[1:], rest, strict=True))
        g = _backward(config, local, groups * size, weights)(folded, *others)

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
        rows, _ = _unfolded(size, g._replace(score=()))
        result = rows._replace(score=score)
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


def _fold(size: int, batched: Inputs, x: Inputs, heads_first: bool = False) -> Inputs:
    if heads_first:
        # In the order in which they lie, or XLA would copy them.
        return _swapped(_fold(size, batched, _swapped(x)))
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


def _swapped(x: Inputs) -> Inputs:
    """The inputs, length and heads of keys and values exchanged."""
    key, value = (jnp.swapaxes(a, -3, -2) for a in (x.key, x.value))
    return x._replace(key=key, value=value)


def _unfolded(size: int, tree: Any) -> Any:
    """Results of a folded call, `[size, B, ...]`, and that all of them are batched."""
    found = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), tree)
    return found, jax.tree.map(lambda _: True, found)

"""Rules of operations that rearrange arrays, and of reads; see `elementwise_rules`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..mesh import varying_alike
from ..tracing.array_reads import READ
from ..tracing.hashing import Type
from ..tracing.pointwise import pointwise
from .elementwise_rules import Interval, Rule, greatest_of, least_of, unless

# A table is searched along at most this many indices: as many as a tile has rows.
_LONGEST = 512


def _whole(interval: Interval, type: Type) -> Interval:
    """Bounds with every axis of the value in full."""
    return Interval(*(jnp.broadcast_to(x, (*x.shape[:4], *type.shape)) for x in interval))


def _lifted(fn: Callable[..., Any]) -> Rule:
    """An operation on the shape of a value, for bounds, which have four axes before it."""

    def rule(out: Type, params: Any, types: Sequence[Type], *args: Interval) -> Interval:
        whole = [_whole(arg, type) for arg, type in zip(args, types, strict=True)]
        lead = [np.broadcast_shapes(*(arg[i].shape[:4] for arg in whole)) for i in (0, 1)]
        bounds = [
            fn(
                out,
                params,
                [jnp.broadcast_to(arg[i], (*lead[i], *arg[i].shape[4:])) for arg in whole],
            )
            for i in (0, 1)
        ]
        return Interval(*bounds)

    return rule


def _broadcast(out: Type, params: Any, arrays: Any) -> Any:
    (x,) = arrays
    axes = (0, 1, 2, 3, *(4 + axis for axis in params["broadcast_dimensions"]))
    return lax.broadcast_in_dim(x, (*x.shape[:4], *out.shape), axes)


def _reshape(out: Type, params: Any, arrays: Any) -> Any:
    (x,) = arrays
    return x.reshape((*x.shape[:4], *out.shape))


def _concatenate(out: Type, params: Any, arrays: Any) -> Any:
    return jnp.concatenate(arrays, 4 + params["dimension"])


def _stack(out: Type, params: Any, arrays: Any) -> Any:
    return jnp.stack(arrays, 4 + params["axis"])


def _reduced(reduce: Any) -> Callable[..., Any]:
    return lambda out, params, arrays: reduce(arrays[0], tuple(4 + a for a in params["axes"]))


def _read(out: Type, params: Any, types: Sequence[Type], *args: Interval) -> Interval | None:
    """The least and the greatest of an array where its indices can be."""
    table, *index = args
    if table.lo.shape[2:4] != (1, 1):
        return None
    table = _whole(table, types[0])
    moving = [
        tuple(int(n > 1) for n in np.broadcast_shapes(*(x.shape[2:4] for x in at))) for at in index
    ]
    along = [where for where in moving if where != (0, 0)]
    if (1, 1) in along or len(set(along)) < len(along):
        return _read_points(out, params, types, table, index)
    bounds = Interval(*(x[:, :, 0, 0] for x in table))
    shape = bounds.lo.shape[2:]
    for axis, at in zip(params["axes"], index, strict=True):
        last = np.asarray(shape[axis] - 1, at.lo.dtype)
        least = np.zeros((), at.lo.dtype)
        at = Interval(*(jnp.clip(x, least, last).astype(jnp.int32) for x in at))
        at = Interval(*(x.reshape(*x.shape[:2], -1) for x in at))
        bounds = _range_along(bounds, at, 2 + axis)
    order = {where: 2 + axis for axis, where in zip(params["axes"], moving, strict=True)}
    dims = [order.get((1, 0)), order.get((0, 1))]
    kept = [2 + axis for axis in range(len(shape)) if axis not in params["axes"]]
    flat = [2 + a for a, where in zip(params["axes"], moving, strict=True) if where == (0, 0)]

    def arrange(x: Any) -> Any:
        present = [d for d in dims if d is not None]
        x = jnp.transpose(x, (0, 1, *present, *kept, *flat))
        x = x.reshape(x.shape[: x.ndim - len(flat)])
        return lax.expand_dims(x, [2 + i for i, d in enumerate(dims) if d is None])

    return Interval(*map(arrange, bounds))


def _read_points(
    out: Type, params: Any, types: Sequence[Type], table: Interval, index: Sequence[Interval]
) -> Interval:
    """What is read at indices that are known exactly; anything elsewhere."""
    ranks = [len(types[0].shape), *(0 for _ in index)]
    read = partial(READ.bind, **params)
    found = [pointwise(read, [x, *(at.lo for at in index)], ranks) for x in table]
    inexact = reduce(jnp.logical_or, (at.lo != at.hi for at in index))
    inexact = lax.expand_dims(inexact, range(4, 4 + len(out.shape)))
    return unless(inexact, Interval(found[0], found[1]), out.dtype)


def _range_along(table: Interval, at: Interval, axis: int) -> Interval:
    """The least and greatest of `table [B|1, N|1, ...]` from `at.lo` to `at.hi [B|1, N|1, L]`."""
    lo, hi, first, last = varying_alike([*table, *at])
    lo, hi = (jnp.moveaxis(x, axis, 2) for x in (lo, hi))
    lead = np.broadcast_shapes(lo.shape[:2], first.shape[:2])
    first, last = (jnp.broadcast_to(x, (*lead, x.shape[2])) for x in (first, last))
    lo, hi = (jnp.broadcast_to(x, (*lead, *x.shape[2:])) for x in (lo, hi))
    pick = jax.vmap(jax.vmap(lambda x, i: jnp.take(x, i, 0, mode="clip")))

    def extend(n: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
        i = jnp.minimum(first + n, last)
        return jnp.minimum(found[0], pick(lo, i)), jnp.maximum(found[1], pick(hi, i))

    # The indices of a tile are mostly few and next to each other. Where they are far apart the
    # bounds between them are loose: the bounds of the whole axis are taken instead.
    longest = jnp.minimum((last - first).max() + 1, _LONGEST)
    least, greatest = lax.fori_loop(1, longest, extend, (pick(lo, first), pick(hi, first)))
    if lo.shape[2] > _LONGEST:
        far = lax.expand_dims(last - first >= _LONGEST, range(3, lo.ndim))
        least = jnp.where(far, least_of(lo, 2)[:, :, None], least)
        greatest = jnp.where(far, greatest_of(hi, 2)[:, :, None], greatest)
    return Interval(jnp.moveaxis(least, 2, axis), jnp.moveaxis(greatest, 2, axis))


REARRANGING: dict[str, Rule] = {
    "broadcast_in_dim": _lifted(_broadcast),
    "reshape": _lifted(_reshape),
    "squeeze": _lifted(_reshape),
    "concatenate": _lifted(_concatenate),
    "stack": _lifted(_stack),
    "reduce_or": _lifted(_reduced(lambda x, axes: jnp.any(x, axes))),
    "reduce_and": _lifted(_reduced(lambda x, axes: jnp.all(x, axes))),
    "reduce_max": _lifted(_reduced(lambda x, axes: jnp.max(x, axes))),
    "reduce_min": _lifted(_reduced(lambda x, axes: jnp.min(x, axes))),
    "read": _read,
}

"""`parallel.attention`: one sequence over the devices of a mesh axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..arguments import Options, check_weights, checked_call
from ..attention import attention as whole_attention
from ..backends.base import Call
from ..checks.arrays import array_of, described
from ..checks.foreign_names import with_remedies
from ..checks.options import flag
from ..dispatch import choose, dispatch
from ..masks import predicate
from ..masks.mask import Mask
from ..masks.positions import Positions, as_positions
from ..mesh import varying
from ..shapes import Array, ArrayLike, Float
from ..stats import bare, check_statistics, with_queries
from ..tiles.tile_map import TileMap
from . import plan
from .known import plain
from .layouts import Layout


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    axis: str | Sequence[str] = "seq",
    schedule: str | Sequence[str] = "auto",
    layout: Layout | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Float[Array, "*B T N Hv"]: ...


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    axis: str | Sequence[str] = "seq",
    schedule: str | Sequence[str] = "auto",
    layout: Layout | None = None,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]: ...


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    axis: str | Sequence[str] = "seq",
    schedule: str | Sequence[str] = "auto",
    layout: Layout | None = None,
    return_lse: bool,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]: ...


@overload
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    axis: str | Sequence[str] = "seq",
    schedule: str | Sequence[str] = "auto",
    layout: Layout | None = None,
    stats: Any,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> tuple[Any, ...]: ...


@with_remedies(name="parallel.attention")
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    axis: str | Sequence[str] = "seq",
    schedule: str | Sequence[str] = "auto",
    layout: Layout | None = None,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    sinks: Float[ArrayLike, "N"] | None = None,
    positions: Positions | None = None,
    dropout_rate: Any = 0.0,
    dropout_seed: Any = None,
    precision: Any = None,
    stats: Any = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention over one sequence that the devices of a mesh axis share, inside `shard_map`.

    It is `jaxattn.attention` of the whole sequence, forward and backward, up to rounding. Every
    device holds an equal part of the queries, keys and values, and gets the output of its queries.

    Args:
      query, key, value: this device's part, `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`, or
        without B. With R devices the sequence has `R * T` queries and `R * S` keys.
      axis: the mesh axis over which the sequence is split, or several, the first the slowest.
      schedule: how keys reach the queries that see them:

        | schedule | what moves | takes | memory |
        |---|---|---|---|
        | "ring" | keys from rank to rank, and their gradients home | everything | a part |
        | "heads" | sequence against heads (Ulysses) | heads that the ranks divide | a part |
        | "halo" | the keys that a known window asks for | contiguous parts | a part and the halo |
        | "gather" | all keys to all, and their gradients summed | everything | all keys |

        "auto" takes the one that sends the fewest bytes and fits in memory; `parallel.explain`
        says which, and why. With several axes there may be one for each: `axis=("node", "gpu")`,
        `schedule=("ring", "heads")` exchanges heads inside a node, and then sends the keys of
        fewer heads from node to node. All after the first are "heads".
      layout: which blocks of the sequence each rank holds, if not contiguous parts in order. Tokens
        have to be in that order: `layout.shard(tokens)`.
      mask, score, sinks, positions, dropout_rate, dropout_seed: those of the whole sequence, in the
        order of positions, on every device: arrays in masks and scores, and `positions.q` and
        `positions.k`, have its lengths. Where batch rows or heads are split too, `positions.b` and
        `positions.h` say which are here.
      stats: as in `jaxattn.attention`: those of this device's queries, and for `received` of its
        keys, over the whole sequence. Functions are given positions in the whole sequence; the
        weights of `received` are those of this device's queries.
      scale, precision, backend, return_lse: as in `jaxattn.attention`.

    Returns:
      The output of this device's queries, `[B, T, N, Hv]`; with `return_lse` also their LSE,
      `[B, T, N]`, and last, with `stats`, these.

    Gradients of arrays that all devices share, such as parameters of scores, are summed over the
    devices by `shard_map`, as of any other function.

    Raises:
      TypeError, ValueError: as `jaxattn.attention`; for an axis that is none of the `shard_map`'s;
        for a schedule that can't compute the call; for a layout of another length or number of
        ranks. All are raised as the program is traced, on every host alike.

    Example:
      >>> import jax, jaxattn as ja
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("seq",))
      >>> split = P(None, "seq")
      >>> def local(q, k, v):
      ...     return ja.parallel.attention(q, k, v, mask=ja.masks.causal())
      >>> run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split))
      >>> x = jax.numpy.ones([1, 8, 2, 4])
      >>> q = k = v = jax.device_put(x, jax.NamedSharding(mesh, split))
      >>> run(q, k, v).shape
      (1, 8, 2, 4)

    Source: Liu et al. 2023, arXiv 2310.01889 (ring); Jacobs et al. 2023, arXiv 2309.14509 (heads).
    """
    names = _axes(axis)
    schedules = schedules_of(schedule, len(names))
    ranks = _ranks(names)
    _check_varying(names, query=query, key=key, value=value)
    parts = {"query": query, "key": key, "value": value}
    arrays = [array_of(part, name, "an array") for name, part in parts.items()]
    whole = lengths(arrays, ranks)
    if layout is not None:
        check_layout(layout, ranks, whole)
    in_order = layout is None or layout.contiguous
    if not in_order and isinstance(mask, TileMap):
        # Its tiles are those of another order.
        B, N = math.prod(arrays[0].shape[:-3]), arrays[0].shape[-2]
        mask.check(B, N, *whole, positions)
        mask = mask.mask
    options: dict[str, Any] = {
        "mask": mask,
        "score": score,
        "scale": scale,
        "sinks": sinks,
        "positions": positions if in_order else reordered(positions, layout),
        "dropout_rate": dropout_rate,
        "dropout_seed": dropout_seed,
        "precision": precision,
        "stats": stats,
    }
    settings = (in_order, backend, flag(return_lse, "return_lse"))
    results = _over(arrays, names, schedules, options, settings)
    return results if len(results) > 1 else results[0]


def _over(
    arrays: Sequence[Array],
    axis: tuple[str, ...],
    schedules: tuple[str, ...],
    options: dict[str, Any],
    settings: tuple[bool, str, bool],
) -> tuple[Any, ...]:
    """Output, and the LSE and statistics if asked for, over the axes that are left.

    Args:
      arrays: query, key and value.
      axis: the mesh axes over which lengths are split.
      schedules: one for all axes, or one for each.
      options: the arguments of the whole sequence.
      settings: whether tokens lie in their order, the backend, and whether the LSE is asked for.
    """
    in_order, backend, with_lse = settings
    ranks = _ranks(axis)
    # Checked before heads are exchanged: of those that a rank is given, positions say which.
    call = call_of(arrays, ranks, options)
    if len(schedules) > 1:
        inner = partial(_over, axis=axis[:-1], schedules=schedules[:-1], settings=settings)
        return _by_heads(arrays, axis[-1:], options, inner)
    chosen = plan.choose(call, plain(options["mask"]), schedules[0], ranks, in_order)
    if chosen.name == "heads" and ranks > 1:

        def whole(arrays: Sequence[Array], options: dict[str, Any]) -> tuple[Any, ...]:
            found = whole_attention(*arrays, **options, backend=backend, return_lse=with_lse)
            return found if isinstance(found, tuple) else (found,)

        return _by_heads(arrays, axis, options, whole)
    if chosen.name == "halo" and call.mask is not None and "diagonal" in call.mask.kinds:
        # What is read by distance can't tell the keys that wrap around from the next ones.
        own = plain(options["mask"])
        assert own is not None
        mask = own & _neighbours(call.sizes.T, chosen.before, chosen.after)
        call = call_of(arrays, ranks, options | {"mask": mask})
    if ranks > 1:
        backend = choose(met(call, chosen, axis, ranks), backend).backend
        call = replace(call, shards=plan.shards_of(chosen, axis, ranks))
    results = dispatch(call, backend, with_lse=with_lse)
    return jax.tree.map(lambda a: a[0], results) if arrays[0].ndim == 3 else results


def _neighbours(length: int, before: int, after: int) -> Mask:
    """The keys of a query's own part of the sequence, and those in its halo."""

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        first = q // length * length
        return (k >= first - before) & (k < first + length + after)

    return predicate(near)


def call_of(arrays: Sequence[Any], ranks: int, options: dict[str, Any]) -> Call:
    """The checked call of the whole sequence, with the arrays of one rank."""
    whole = [
        jax.ShapeDtypeStruct((*a.shape[:-3], a.shape[-3] * ranks, *a.shape[-2:]), a.dtype)
        if a.ndim in (3, 4)
        else a
        for a in arrays
    ]
    # Those of `received` are weights of this device's queries.
    stats = options.get("stats")
    check_statistics(stats)
    try:
        told = options | {"stats": with_queries(stats, lambda _: jnp.ones((), jnp.float32))}
        call = checked_call(*whole, **told)
    except (TypeError, ValueError) as error:
        if ranks > 1:
            error.add_note(
                f"Lengths are those of the whole sequence, {ranks} times those of this device's "
                "part. Arrays in masks and scores, and positions, have them on every device: give "
                "them to shard_map with in_specs=P()."
            )
        raise
    query, key, value = (a[None] if a.ndim == 3 else a for a in arrays)
    check_weights(stats, (query.shape[0], query.shape[2], query.shape[1]))
    return replace(call, query=query, key=key, value=value, stats=bare(stats))


def met(call: Call, chosen: plan.Schedule, axis: tuple[str, ...], ranks: int) -> Call:
    """The call as an engine meets it: with the queries, keys and heads that it is given at once.

    Args:
      call: with one rank's arrays.
      chosen: the schedule.
      axis, ranks: the mesh axes of the sequence, and their size.
    """
    if ranks == 1:
        return call
    S = call.sizes.S
    match chosen.name:
        case "heads":
            return by_heads(call, ranks)
        case "gather":
            S *= ranks
        case "halo":
            S += chosen.before + chosen.after
    return replace(
        call,
        key=_like(call.key, S, call.sizes.K),
        value=_like(call.value, S, call.sizes.K),
        shards=plan.shards_of(chosen, axis, ranks),
    )


def by_heads(call: Call, ranks: int) -> Call:
    """The call with the lengths of so many ranks, and a rank's heads of them."""
    _, T, S, N, K, *_ = call.sizes
    queries, keys = (T * ranks, N // ranks), (S * ranks, math.lcm(K, ranks) // ranks)
    return replace(
        call,
        query=_like(call.query, *queries),
        key=_like(call.key, *keys),
        value=_like(call.value, *keys),
    )


def _like(array: Any, length: int, heads: int) -> Any:
    B, *_, width = array.shape
    return jax.ShapeDtypeStruct((B, length, heads, width), array.dtype)


# --- sequence against heads -----------------------------------------------------------------------


def _by_heads(
    arrays: Sequence[Array],
    axis: tuple[str, ...],
    options: dict[str, Any],
    inner: Callable[..., tuple[Any, ...]],
) -> tuple[Any, ...]:
    """Attention of some heads on each device, over the sequence of all.

    Args:
      arrays: query, key and value.
      axis: the mesh axes that exchange heads.
      options: the arguments of the whole sequence.
      inner: `(arrays, options) -> results`, attention of some heads.
    """
    query, key, value = arrays
    ranks, N, K = _ranks(axis), query.shape[-2], key.shape[-2]
    why = plan.refuse("heads", N, ranks)
    if why is not None:
        raise ValueError(f"schedule: 'heads' can't compute this call: {why}")
    # As few copies of key heads as give each rank those that its query heads use.
    copies = math.lcm(K, ranks) // K
    if copies > 1:
        key, value = (jnp.repeat(a, copies, a.ndim - 2) for a in (key, value))

    length = query.ndim - 3

    def to_heads(array: Array) -> Array:
        return lax.all_to_all(array, axis, length + 1, length, tiled=True)

    def to_lengths(array: Array) -> Array:
        return lax.all_to_all(array, axis, length, length + 1, tiled=True)

    here = N // ranks
    first = lax.axis_index(axis) * here
    at = options["positions"] or Positions()
    heads = jnp.arange(N, dtype=jnp.int32) if at.h is None else jnp.asarray(at.h)
    at = replace(at, h=lax.dynamic_slice_in_dim(heads, first, here))
    mask = options["mask"]
    if isinstance(mask, TileMap):
        # Its tiles are those of all heads.
        mask = mask.mask
    sinks = options["sinks"]
    if sinks is not None:
        sinks = lax.dynamic_slice_in_dim(jnp.asarray(sinks), first, here)

    def some(weight: Array) -> Array:
        # Without a batch, weights may have an axis for its one row.
        weight = weight[0] if weight.ndim == query.ndim else weight
        return to_heads(jnp.broadcast_to(weight, query.shape[:-1]))

    stats = with_queries(options["stats"], some)
    parts = [to_heads(a) for a in (query, key, value)]
    given = {"mask": mask, "positions": at, "sinks": sinks, "stats": stats}
    return jax.tree.map(to_lengths, inner(parts, options=options | given))


# --- checks ---------------------------------------------------------------------------------------


def _axes(axis: Any) -> tuple[str, ...]:
    names = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for name in names:
        if not isinstance(name, str) or name not in manual:
            there = ", ".join(map(repr, manual))
            remedy = (
                f"expected one of this shard_map's axes, {there}"
                if there
                else "expected an axis of a shard_map: call it inside jax.shard_map, with "
                "in_specs that split lengths over the axis; outside, jaxattn.attention takes "
                "arrays of the whole sequence"
            )
            raise ValueError(f"axis: got {described(name)}, {remedy}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"axis: got {axis!r}, expected one mesh axis or several different ones")
    return names


def schedules_of(given: Any, axes: int) -> tuple[str, ...]:
    """The schedule of all axes together, or one for each of them, checked as far as their names."""
    found = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    known = ", ".join(map(repr, ("auto", *plan.SCHEDULES)))
    for name in found:
        if not isinstance(name, str) or name not in ("auto", *plan.SCHEDULES):
            raise ValueError(f"schedule: got {described(name)}, expected one of {known}")
    if len(found) != 1 and (len(found) != axes or set(found[1:]) != {"heads"}):
        raise ValueError(
            f"schedule: got {found} for {axes} mesh axes, expected one schedule, or one for each "
            "axis, where all but the first are 'heads'"
        )
    return found


def _ranks(axis: tuple[str, ...]) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in axis)


def _check_varying(axis: tuple[str, ...], **arrays: Any) -> None:
    """Checks that all arrays are parts, where `shard_map` knows which are."""
    parts = {name: set(axis) <= varying(array) for name, array in arrays.items()}
    if any(parts.values()) and not all(parts.values()):
        name = next(name for name, yes in parts.items() if not yes)
        raise ValueError(
            f"{name}: got an array that is the same on all devices of axis {', '.join(axis)}, "
            "expected this device's part; split its lengths by in_specs=P(None, axis), or call "
            "jaxattn.attention with positions= if every device is to hold all keys"
        )


def lengths(arrays: Sequence[Any], ranks: int) -> tuple[int, int]:
    """The numbers of queries and keys of the whole sequence; `checked_call` checks shapes."""
    query, key, _ = arrays
    T, S = (a.shape[-3] if a.ndim >= 3 else 0 for a in (query, key))
    return T * ranks, S * ranks


def check_layout(layout: Any, ranks: int, lengths: tuple[int, int]) -> None:
    """Checks that a layout is one of these lengths and this number of ranks."""
    if not isinstance(layout, Layout):
        raise TypeError(
            f"layout: got {type(layout).__name__}, expected a jaxattn.parallel.Layout, as "
            "parallel.layout(mask, length, ranks) makes"
        )
    if layout.ranks != ranks or any(n != layout.length for n in lengths):
        raise ValueError(
            f"layout: got one of {layout.length} tokens over {layout.ranks} ranks, expected one "
            f"for {lengths[0]} queries and {lengths[1]} keys over {ranks}: each device's query and "
            "key are one part of that many"
        )


def reordered(positions: Positions | None, layout: Layout | None) -> Positions:
    """The positions of queries and keys, in the order in which ranks hold them."""
    assert layout is not None
    given = as_positions(positions)
    order = layout.positions

    def moved(array: Any) -> Any:
        if array is None:
            return order
        if np.ndim(array) not in (1, 2) or np.shape(array)[-1] != layout.length:
            # Left for the check of positions, which says what is expected.
            return array
        return jnp.take(jnp.asarray(array), order, -1)

    return replace(given, q=moved(given.q), k=moved(given.k))

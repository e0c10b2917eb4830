"""`parallel.attention`: one sequence over the devices of a mesh axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..arguments import checked_call
from ..attention import attention as whole_attention
from ..backends import base
from ..backends.base import Call
from ..checks.foreign_names import with_remedies
from ..dispatch import choose, dispatch
from ..masks.positions import Positions
from ..mesh import varying
from ..shapes import Array, ArrayLike, Float
from ..tiles.tile_map import TileMap
from . import plan
from .layouts import Layout


@with_remedies(name="parallel.attention")
def attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K Hv"],
    *,
    axis: str | Sequence[str] = "seq",
    schedule: str = "auto",
    layout: Layout | None = None,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    sinks: Float[ArrayLike, "N"] | None = None,
    positions: Positions | None = None,
    dropout_rate: Any = 0.0,
    dropout_seed: Any = None,
    precision: Any = None,
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
        says which, and why.
      layout: which blocks of the sequence each rank holds, if not contiguous parts in order. Tokens
        have to be in that order: `layout.shard(tokens)`.
      mask, score, sinks, positions, dropout_rate, dropout_seed: those of the whole sequence, in the
        order of positions, on every device: arrays in masks and scores, and `positions.q` and
        `positions.k`, have its lengths. Where batch rows or heads are split too, `positions.b` and
        `positions.h` say which are here.
      scale, precision, backend, return_lse: as in `jaxattn.attention`.

    Returns:
      The output of this device's queries, `[B, T, N, Hv]`; with `return_lse` also their LSE,
      `[B, T, N]`.

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
      >>> q = k = v = jax.numpy.ones([1, 8, 2, 4])
      >>> run(q, k, v).shape
      (1, 8, 2, 4)

    Source: Liu et al. 2023, arXiv 2310.01889 (ring); Jacobs et al. 2023, arXiv 2309.14509 (heads).
    """
    names = _axes(axis)
    ranks = _ranks(names)
    _check_varying(names, query=query, key=key, value=value)
    arrays = [jnp.asarray(a) for a in (query, key, value)]
    lengths = _lengths(arrays, ranks)
    if layout is not None:
        check_layout(layout, ranks, lengths)
    contiguous = layout is None or layout.contiguous
    if not contiguous and isinstance(mask, TileMap):
        # Its tiles are those of another order.
        B, N = math.prod(arrays[0].shape[:-3]), arrays[0].shape[-2]
        mask.check(B, N, *lengths, positions)
        mask = mask.mask
    at = positions if contiguous else reordered(positions, layout)
    options: dict[str, Any] = {
        "mask": mask,
        "score": score,
        "scale": scale,
        "sinks": sinks,
        "positions": at,
        "dropout_rate": dropout_rate,
        "dropout_seed": dropout_seed,
        "precision": precision,
    }
    call = call_of(arrays, ranks, options)
    chosen = plan.choose(call, schedule, ranks, contiguous)
    if ranks > 1 and chosen.name == "heads":
        return _by_heads(arrays, names, ranks, options, backend, return_lse)
    if ranks > 1:
        backend = choose(met(call, chosen, names, ranks), backend).backend
        call = replace(call, shards=plan.shards_of(chosen, names, ranks))
    results = dispatch(call, backend, with_lse=return_lse)
    if arrays[0].ndim == 3:
        results = tuple(each[0] for each in results)
    return results if return_lse else results[0]


def call_of(arrays: Sequence[Any], ranks: int, options: dict[str, Any]) -> Call:
    """The checked call of the whole sequence, with the arrays of one rank."""
    whole = [
        jax.ShapeDtypeStruct((*a.shape[:-3], a.shape[-3] * ranks, *a.shape[-2:]), a.dtype)
        if a.ndim in (3, 4)
        else a
        for a in arrays
    ]
    call = checked_call(*whole, **options)
    query, key, value = (a[None] if a.ndim == 3 else a for a in arrays)
    return replace(call, query=query, key=key, value=value)


def met(call: Call, chosen: plan.Schedule, axis: tuple[str, ...], ranks: int) -> Call:
    """The call as an engine meets it: with the queries, keys and heads that it is given at once.

    Args:
      call: with one rank's arrays.
      chosen: the schedule.
      axis, ranks: the mesh axes of the sequence, and their size.
    """
    B, T, S, N, K, H, Hv = call.sizes
    shards: base.Shards | None = plan.shards_of(chosen, axis, ranks)
    match chosen.name:
        case "gather":
            S *= ranks
        case "halo":
            S += chosen.before + chosen.after
        case "heads":
            T, S, N, K, shards = T * ranks, S * ranks, N // ranks, math.lcm(K, ranks) // ranks, None

    def like(array: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((B, *shape), array.dtype)

    return replace(
        call,
        query=like(call.query, T, N, H),
        key=like(call.key, S, K, H),
        value=like(call.value, S, K, Hv),
        shards=shards if ranks > 1 else None,
    )


# --- sequence against heads -----------------------------------------------------------------------


def _by_heads(
    arrays: Sequence[Array],
    axis: tuple[str, ...],
    ranks: int,
    options: dict[str, Any],
    backend: str,
    return_lse: bool,
) -> Any:
    """Attention of some heads over the whole sequence, on each device."""
    query, key, value = arrays
    N, K = query.shape[-2], key.shape[-2]
    # As few copies of key heads as give each rank those that its query heads use.
    copies = math.lcm(K, ranks) // K
    if copies > 1:
        key, value = (jnp.repeat(a, copies, a.ndim - 2) for a in (key, value))

    def to_heads(array: Array, axes: int = 2) -> Array:
        n = array.ndim
        return lax.all_to_all(array, axis, n - axes, n - axes - 1, tiled=True)

    def to_lengths(array: Array, axes: int = 2) -> Array:
        n = array.ndim
        return lax.all_to_all(array, axis, n - axes - 1, n - axes, tiled=True)

    here = N // ranks
    first = lax.axis_index(axis) * here
    given = options["positions"] or Positions()
    heads = jnp.arange(N, dtype=jnp.int32) if given.h is None else jnp.asarray(given.h)
    at = replace(given, h=lax.dynamic_slice_in_dim(heads, first, here))
    sinks = options["sinks"]
    if sinks is not None:
        sinks = lax.dynamic_slice_in_dim(jnp.asarray(sinks), first, here)
    out, lse = whole_attention(
        *map(to_heads, (query, key, value)),
        **options | {"positions": at, "sinks": sinks},
        backend=backend,
        return_lse=True,
    )
    if not return_lse:
        return to_lengths(out)
    return to_lengths(out), to_lengths(lse, 1)


# --- checks ---------------------------------------------------------------------------------------


def _axes(axis: Any) -> tuple[str, ...]:
    names = (axis,) if isinstance(axis, str) else tuple(axis)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for name in names:
        if name not in manual:
            there = ", ".join(map(repr, manual))
            remedy = (
                f"expected one of this shard_map's axes, {there}"
                if there
                else "expected an axis of a shard_map: call it inside jax.shard_map, with "
                "in_specs that split lengths over the axis; outside, jaxattn.attention takes "
                "arrays of the whole sequence"
            )
            raise ValueError(f"axis: got {name!r}, {remedy}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"axis: got {axis!r}, expected one mesh axis or several different ones")
    return names


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


def _lengths(arrays: Sequence[Any], ranks: int) -> tuple[int, int]:
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
    given = positions or Positions()
    order = layout.positions

    def moved(array: Any) -> Any:
        if array is None:
            return order
        if np.ndim(array) not in (1, 2) or np.shape(array)[-1] != layout.length:
            # Left for the check of positions, which says what is expected.
            return array
        return jnp.take(jnp.asarray(array), order, -1)

    return replace(given, q=moved(given.q), k=moved(given.k))

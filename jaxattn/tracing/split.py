"""The split of a mask or score: operands for each query and for each key, and a residue.

A mask or a score is traced once, for one query and one key. Every value it computes depends on a
subset of the positions {b, h, q, k} (and of the logit). What does not depend on both q and k is an
*operand*: computed outside, once a row or once a column, exactly, by `vmap`. What is left, the
*residue*, is a small program of operands that consumers evaluate on a tile, or interpret on
intervals.

    ids[b, q] == ids[b, k]   operands: a row [B, 1, T] and a column [B, 1, S]   residue: r == c
    q - k < window[h]        operands: q, k, and a head [1, N]                  residue: q - k < w
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..masks.mask import Mask
from ..masks.positions import Positions
from ..pytrees import pytree, static
from ..scores import Score
from ..shapes import Array, Shaped
from .canonical import canonicalize, constant
from .dependence import Kind, OperandRecipe, SplitPlan, signature_of, split_plan
from .hashing import Const, Ref
from .pointwise import pointwise
from .program import Program, run

G = TypeVar("G", bound=Mask | Score)
X = TypeVar("X")

# --- the split ------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """An input of the residue: an array, and which of its axes are cut into tiles.

    | kind | depends on | array |
    |---|---|---|
    | `"row"` | q, not k | `[B|1, N|1, T, ...]` |
    | `"column"` | k, not q | `[B|1, N|1, S, ...]` |
    | `"head"` | b, h or nothing | `[B|1, N|1, ...]` |
    | `"grid"` | an array read at q and k themselves | `[B|1, N|1, T, S]`, a view of the user's |
    | `"diagonal"` | q - k alone | `[B|1, N|1, T + S - 1]`, entry d for `q - k = d - (S - 1)` |

    An extent is 1 where the value does not depend on `b` or `h`.
    """

    kind: Kind
    array: Shaped[Array, "..."]

    def tile(self, q: Any, k: Any, tile_q: int, tile_k: int, S: int) -> Shaped[Array, "..."]:
        """The part that belongs to queries from `q` and keys from `k`, as `Split.residue` takes it.

        Args:
          q, k: the first query and the first key, possibly traced; the tile lies within the array.
          tile_q, tile_k: numbers of queries and keys of the tile.
          S: the number of keys.
        """
        part = cut(self.kind, self.array, 2, (q, k), (tile_q, tile_k), S)
        return as_tile(self.kind, part, 2, tile_q, tile_k)


def along(kind: Kind, of_queries: X, of_keys: X, of_distances: X) -> tuple[X, ...]:
    """One entry for each axis of an operand after those of batch rows and heads.

    The axis goes with queries, with keys, or with distances `q - k`; a head has none of them.
    """
    match kind:
        case "row":
            return (of_queries,)
        case "column":
            return (of_keys,)
        case "grid":
            return of_queries, of_keys
        case "diagonal":
            return (of_distances,)
    return ()


def tile_slice(
    kind: Kind, q: Any, k: Any, tile_q: int, tile_k: int, S: int
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Where a tile's part of an operand starts, and its extents, along the axes of `along`.

    Args:
      kind: of the operand.
      q, k: the first query and the first key, possibly traced.
      tile_q, tile_k: numbers of queries and keys of the tile.
      S: the number of keys that the operand is for, with padding where it is padded.
    """
    # The smallest distance of a tile is that of its first query and its last key. Computed only
    # where it is needed: under a trace it would be three operations.
    first = S - tile_k + q - k if kind == "diagonal" else None
    return along(kind, q, k, first), along(kind, tile_q, tile_k, tile_q + tile_k - 1)


def cut(
    kind: Kind,
    array: Shaped[Array, "..."],
    axis: int,
    at: tuple[Any, Any],
    tile: tuple[int, int],
    S: int,
) -> Shaped[Array, "..."]:
    """A tile's part of an operand with `axis` axes of batch rows and heads; see `tile_slice`."""
    starts, sizes = tile_slice(kind, *at, *tile, S)
    for n, (start, size) in enumerate(zip(starts, sizes, strict=True), axis):
        array = lax.dynamic_slice_in_dim(array, start, size, n)
    return array


def as_tile(
    kind: Kind, part: Shaped[Array, "..."], axis: int, tile_q: int, tile_k: int
) -> Shaped[Array, "..."]:
    """A tile's part of an operand, as it broadcasts to a tile of queries and keys.

    Args:
      kind: of the operand.
      part: what `tile_slice` selects.
      axis: the number of axes of batch rows and heads; those of the tile follow.
      tile_q, tile_k: numbers of queries and keys of the tile.
    """
    match kind:
        case "row":
            return lax.expand_dims(part, (axis + 1,))
        case "column":
            return lax.expand_dims(part, (axis,))
        case "head":
            return lax.expand_dims(part, (axis, axis + 1))
        case "diagonal":
            return skewed(jnp.flip(part, axis), tile_q, tile_k)
    return part


def skewed(
    line: Shaped[Array, "*lead distances"], rows: int, columns: int
) -> Shaped[Array, "*lead rows columns"]:
    """`out[.., r, c] = line[.., c - r + rows - 1]`, by reshapes: a gather is ten times slower."""
    lead = line.shape[:-1]
    period = rows + columns
    gap = jnp.zeros((*lead, 1), line.dtype)
    cycle = jnp.concatenate([line[..., rows - 1 :], gap, line[..., : rows - 1]], -1)
    flat = jnp.broadcast_to(cycle[..., None, :], (*lead, rows, period)).reshape(*lead, -1)
    return flat[..., : rows * (period - 1)].reshape(*lead, rows, period - 1)[..., :columns]


@pytree
class Split(Generic[G]):
    """A mask or score, split: operands to compute once, and a residue to evaluate on tiles.

    Attributes:
      plan: what is the same for all values of its arrays.
      given: the mask or score itself, its functions traced.
    """

    plan: SplitPlan = static()
    given: G

    @property
    def scores(self) -> bool:
        """Whether it is a score."""
        return isinstance(self.given, Score)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the operands, in order."""
        return tuple(recipe.kind for recipe in self.plan.recipes)

    @property
    def program(self) -> Program:
        """The residue: a program from (the logit and) one element of each operand."""
        return self.plan.residue

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the residue is not elementwise; empty if it is."""
        return self.plan.reasons

    @property
    def elementwise(self) -> bool:
        """Whether every step of the residue goes from scalars to scalars."""
        return not self.plan.reasons

    def operands(self, positions: Positions, B: int, N: int, T: int, S: int) -> tuple[Operand, ...]:
        """The operands of the residue, in order.

        Args:
          positions: as given to `split`; `q` may be `[T]` or `[B|1, T]`, `k` likewise.
          B, N, T, S: numbers of batch rows, query heads, queries and keys.

        Raises:
          ValueError: for an array with another extent than the position it is read at.
        """
        plan = self.plan
        if _counted(positions) != plan.counted:
            raise ValueError(
                f"Split.operands(positions): got {_names(_counted(positions))} counted from 0, "
                f"expected {_names(plan.counted)}, as in split(); "
                "pass the same positions to both"
            )
        sizes = {"b": B, "h": N, "q": T, "k": S}
        self.check_extents(B, N, T, S)
        leaves = jax.tree.leaves(self.given)
        if not self.scores:
            leaves = list(map(constant, leaves))
        values = plan.captured | {
            ref: _typed(leaf, plan.types[ref].dtype)
            for ref, leaf in zip(plan.leaves, leaves, strict=True)
        }
        values = run(plan.free, values)
        sources = _position_arrays(plan, positions, sizes)
        for ref, (array, layout) in plan.views.items():
            sources[ref] = _view(_value(values, array), layout, sizes)
        return tuple(
            Operand(recipe.kind, _operand(plan, recipe, values, sources, T, S))
            for recipe in plan.recipes
        )

    def check_extents(self, B: int, N: int, T: int, S: int) -> None:
        """Checks that arrays have the extents of the positions they are read at.

        Raises:
          ValueError: for an axis read at a bare position with another extent.
        """
        sizes = {"b": B, "h": N, "q": T, "k": S}
        letters = {"b": "B", "h": "N", "q": "T", "k": "S"}
        counted = dict(zip("bhqk", self.plan.counted, strict=True))
        for label, (_, axis, extent, at) in self.plan.axis_reads:
            if not counted[at] or extent == sizes[at]:
                continue
            if extent == 1:
                remedy = (
                    f"an extent of 1 is not broadcast: remove the axis, or repeat it {sizes[at]} "
                    "times; your own function may index it with 0"
                )
            else:
                remedy = f"for a part of something longer say `positions=Positions({at}=...)`"
            raise ValueError(
                f"{label}: got extent {extent} along axis {axis}, which is read at `{at}`; "
                f"expected {letters[at]} = {sizes[at]}; {remedy}"
            )

    def residue(self, *tiles: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The residue on a tile.

        Args:
          *tiles: for a score first the logits `[.., tq, tk]`, then a tile of every operand: rows
            `[.., tq, 1, ...]`, columns `[.., 1, tk, ...]`, heads `[.., 1, 1, ...]`, grids and
            diagonals `[.., tq, tk]`; leading axes broadcast.

        Returns:
          The mask or the logits on the tile, `[.., tq, tk]`, or what broadcasts to that: an extent
          is 1 where no operand has more.
        """
        program = self.plan.residue
        ranks = [len(program.types[ref].shape) for ref in program.inputs]
        return pointwise(program, tiles, ranks)


def split(given: G, positions: Positions | None = None, *, logit: Any = False) -> Split[G]:
    """Splits a mask, or a score, into operands and residue.

    Args:
      given: the mask or score. One that `canonicalize` leaves as it is costs a lookup after the
        first time.
      positions: only which of them are given matters: arrays read at positions that are counted
        from 0 need no gather.
      logit: for a score, the dtype of the logits; True is float32.
    """
    try:
        given = canonicalize(given, np.float32 if isinstance(logit, bool) else logit)
        signature = signature_of(given, positions or Positions(), logit)
        return Split(split_plan(signature), given)
    except IndexError as error:
        # JAX reads nothing from an array without entries, not even while it traces.
        if "with size 0" not in str(error):
            raise
        raise ValueError(
            f"{given!r}: got an array without entries, expected one for each position that it is "
            "read at"
        ) from error


def _counted(positions: Positions) -> tuple[bool, ...]:
    return tuple(getattr(positions, letter) is None for letter in "bhqk")


def _names(counted: Sequence[bool]) -> str:
    return ", ".join(name for name, yes in zip("bhqk", counted, strict=True) if yes) or "none"


# --- evaluating operands ------------------------------------------------------------------------


def _value(values: dict[int, Any], ref: Ref) -> Any:
    return ref.value if isinstance(ref, Const) else values[ref]


def _typed(leaf: Any, dtype: Any) -> Any:
    # A Python number would take JAX's default dtype.
    return leaf if hasattr(leaf, "aval") else np.asarray(leaf, dtype)


def _position_arrays(
    plan: SplitPlan, positions: Positions, sizes: dict[str, int]
) -> dict[int, Any]:
    """The positions as `[B|1, N|1, L|1]`, L along the queries or the keys."""
    axis = {"b": 0, "h": 1, "q": 2, "k": 2}
    arrays = {}
    for ref, letter in plan.positions.items():
        given = getattr(positions, letter)
        array = jnp.arange(sizes[letter], dtype=jnp.int32) if given is None else given
        shape = [1, 1, 1]
        shape[axis[letter]] = sizes[letter]
        if np.ndim(array) == 2:
            shape[0] = np.shape(array)[0]
        arrays[ref] = jnp.reshape(jnp.asarray(array, jnp.int32), shape)
    return arrays


def _view(array: Any, layout: tuple[int | str, ...], sizes: dict[str, int]) -> Any:
    """An array read at positions, as `[B|1, N|1, L|1, ...]`, or `[B|1, N|1, T, S]` if at both."""
    for axis, at in reversed(list(enumerate(layout))):
        if isinstance(at, int):
            array = lax.index_in_dim(array, at, axis, keepdims=False)
    kept = [at for at in layout if isinstance(at, str)]
    order = [kept.index(at) for at in "bhqk" if at in kept]
    order += [axis for axis, at in enumerate(kept) if not at]
    array = lax.transpose(array, order) if order != sorted(order) else array
    missing = [axis for axis, at in enumerate("bh") if at not in kept]
    if "q" not in kept and "k" not in kept:
        missing.append(2)
    array = lax.expand_dims(array, missing)
    for axis, at in enumerate("bh"):
        if at in kept and array.shape[axis] != sizes[at]:
            # Read at min(b, extent - 1): the last one stands for all that follow.
            last = np.minimum(np.arange(sizes[at]), array.shape[axis] - 1)
            array = jnp.take(array, last, axis)
    return array


def _operand(
    plan: SplitPlan,
    recipe: OperandRecipe,
    values: dict[int, Any],
    sources: dict[int, Any],
    T: int,
    S: int,
) -> Any:
    """The array of one operand."""
    if not recipe.sources:
        return lax.expand_dims(jnp.asarray(_value(values, recipe.ref)), (0, 1))
    if recipe.kind == "diagonal":
        distance = jnp.arange(1 - S, T, dtype=jnp.int32)[None, None]
        at = {"q": distance, "k": jnp.zeros((1, 1, 1), jnp.int32)}
        sources = sources | {
            ref: at[letter] for ref, letter in plan.positions.items() if letter in at
        }
    arrays = [sources[ref] for ref in recipe.sources]
    if recipe.sources == (recipe.ref,):
        array = arrays[0]
    else:

        def element(*elements: Any) -> Any:
            start = values | dict(zip(recipe.sources, elements, strict=True))
            return _value(run(recipe.steps, start), recipe.ref)

        ranks = [len(plan.types[ref].shape) for ref in recipe.sources]
        array = pointwise(element, arrays, ranks)
    return lax.squeeze(array, (2,)) if recipe.kind == "head" else array

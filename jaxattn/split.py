"""What each query knows, what each key knows, and what they decide together.

A mask or a score is traced once, for one query and one key. Every value it computes depends on a
subset of the positions {b, h, q, k} (and of the logit). What does not depend on both q and k is an
*operand*: computed outside, once a row or once a column, exactly, by `vmap`. What is left, the
*residue*, is a small program of operands that consumers evaluate on a tile, or interpret on
intervals.

    ids[b, q] == ids[b, k]     operands: a row [B, 1, T] and a column [B, 1, S]    residue: r == c
    q - k < window[h]          operands: q, k, and a head [1, N]                   residue: q - k < w
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .algebra import Mask, Positions, pytree, static
from .hoist import arguments, constant, hoist, struct
from .program import Const, Program, Ref, Step, Type, has_body, needed, run
from .reads import Extent, Recogniser
from .scores import Score
from .shapes import Array, Bool, Shaped

Kind: TypeAlias = Literal["row", "column", "head", "grid", "diagonal"]

# Dependence is a set of positions, as bits.
B, H, Q, K, LOGIT = 1, 2, 4, 8, 16

# Operations that cost about as little as loading their result would; of a chain of these, what
# depends on q - k alone is not worth a vector of its own.
_CHEAP = frozenset(
    "abs add and broadcast_in_dim clamp convert_element_type copy eq ge gt le lt max min mul ne neg "
    "not or reshape select_n shift_left shift_right_arithmetic shift_right_logical sign squeeze "
    "stop_gradient sub xor".split()
)


# --- the split ------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """What a residue is given: an array, and which of its axes go with a tile.

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
          tile_q, tile_k: how many of each.
          S: the number of keys.
        """
        kind, array = self
        if kind == "head":
            return lax.expand_dims(array, (2, 3))
        if kind == "diagonal":
            n = tile_q + tile_k - 1
            near = lax.dynamic_slice_in_dim(array, q - k - tile_k + S, n, 2)
            # Rows of a table of period n, each one shorter than the period, move by one.
            near = jnp.roll(jnp.flip(near, 2), -(tile_q - 1), 2)
            rows = jnp.broadcast_to(near[:, :, None], (*near.shape[:2], tile_q, n))
            skewed = rows.reshape(*near.shape[:2], -1)[..., : tile_q * (n - 1)]
            return skewed.reshape(*near.shape[:2], tile_q, n - 1)[..., :tile_k]
        if kind != "column":
            array = lax.dynamic_slice_in_dim(array, q, tile_q, 2)
        else:
            array = lax.expand_dims(array, (2,))
        if kind != "row":
            return lax.dynamic_slice_in_dim(array, k, tile_k, 3)
        return lax.expand_dims(array, (3,))


class _Feature(NamedTuple):
    """How an operand is computed: the steps from its sources, positions and views of arrays."""

    kind: Kind
    ref: Ref
    sources: tuple[int, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class _Plan:
    """The split of one structure: everything but the values of its leaves."""

    leaves: tuple[int, ...]
    positions: dict[int, str]
    captured: dict[int, Any]
    types: tuple[Type, ...]
    free: tuple[Step, ...]
    views: dict[int, tuple[Ref, tuple[int | str, ...]]]
    features: tuple[_Feature, ...]
    residue: Program
    extents: tuple[tuple[str, Extent], ...]
    counted: tuple[bool, ...]
    reasons: tuple[str, ...]


@pytree
class Split:
    """A mask or score, split: operands to compute once, and a residue to evaluate on tiles."""

    plan: _Plan = static()
    leaves: tuple[Any, ...] = ()
    scores: bool = static(default=False)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the operands, in order."""
        return tuple(feature.kind for feature in self.plan.features)

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
                f"Split.operands(positions): given where split() saw none, or the reverse: got "
                f"{_names(_counted(positions))} counted from 0, expected {_names(plan.counted)}; "
                "pass the same positions to both"
            )
        sizes = {"b": B, "h": N, "q": T, "k": S}
        _check_extents(plan, sizes)
        leaves = self.leaves if self.scores else tuple(map(constant, self.leaves))
        values = dict(zip(plan.leaves, map(_typed, leaves, plan.leaves, [plan] * len(leaves))))
        values = run(plan.free, values | plan.captured)
        sources = _position_arrays(plan, positions, sizes)
        for ref, (array, layout) in plan.views.items():
            sources[ref] = _view(_value(values, array), layout, sizes)
        return tuple(
            Operand(feature.kind, _operand(plan, feature, values, sources, T, S))
            for feature in plan.features
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


def split(
    given: Mask | Score, positions: Positions | None = None, *, logit: Any = False
) -> Split:
    """Splits a mask, or a score, into operands and residue.

    Args:
      given: the mask or score. One of the library's own functions, or `hoist`ed, costs a lookup
        after the first time.
      positions: only which of them are given matters: arrays read at positions that are counted
        from 0 need no gather.
      logit: for a score, the dtype of the logits; True is float32.
    """
    given = hoist(given)
    scores = isinstance(given, Score)
    dtype = None
    if scores:
        dtype = np.dtype(np.float32 if isinstance(logit, bool) else logit)
    leaves, tree = jax.tree.flatten(given)
    structs = tuple(map(struct, leaves))
    key = tuple((s.shape, s.dtype, s.weak_type) for s in structs)
    x64 = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    plan = _plan(tree, key, dtype, _counted(positions or Positions()), x64)
    return Split(plan, tuple(leaves), scores)


def check_extents(
    given: Mask | Score, positions: Positions, B: int, N: int, T: int, S: int
) -> None:
    """Checks that arrays have the extents of the positions they are read at.

    Raises:
      ValueError: for an axis read at a bare position with another extent.
    """
    _check_extents(split(given, positions).plan, {"b": B, "h": N, "q": T, "k": S})


def _counted(positions: Positions) -> tuple[bool, ...]:
    return tuple(getattr(positions, letter) is None for letter in "bhqk")


def _names(counted: Sequence[bool]) -> str:
    return ", ".join(name for name, yes in zip("bhqk", counted, strict=True) if yes) or "none"


# --- planning: dependence, and where the residue begins -----------------------------------------


@lru_cache(maxsize=4096)
def _plan(
    tree: Any, leaves: tuple[Any, ...], logit: Any, counted: tuple[bool, ...], x64: bool
) -> _Plan:
    structs = [jax.ShapeDtypeStruct(s, d, weak_type=w) for s, d, w in leaves]
    lead = arguments(logit)
    given = jax.tree.unflatten(tree, structs)

    def call(*args: Any) -> Any:
        return jax.tree.unflatten(tree, args[len(lead) :])(*args[: len(lead)])

    jaxpr = jax.make_jaxpr(call)(*lead, *structs)
    code = Recogniser()
    inputs = [code.input(Type(v.shape, v.dtype)) for v in jaxpr.in_avals]
    logits, positions = inputs[: len(lead) - 4], inputs[len(lead) - 4 : len(lead)]
    code.bare.update(
        (ref, letter)
        for ref, letter, yes in zip(positions, "bhqk", counted, strict=True)
        if yes
    )
    (out,) = code.inline(jaxpr, inputs)
    own = inputs[len(lead) :]
    return _Planner(code, positions, logits, counted).plan(out, own, _labels(given))


class _Planner:
    """Finds the dependence of every value, the operands, and the residue."""

    def __init__(
        self, code: Recogniser, positions: list[int], logits: list[int], counted: tuple[bool, ...]
    ) -> None:
        self.code = code
        self.positions = dict(zip(positions, "bhqk", strict=True))
        self.logits = logits
        self.counted = counted
        self.depends: dict[Ref, int] = dict(zip(positions, (B, H, Q, K), strict=True))
        self.depends.update((ref, LOGIT) for ref in logits)
        # Integers a * q + c * k + (something of b and h): the pair (a, c).
        self.slopes: dict[Ref, tuple[int, int]] = {positions[2]: (1, 0), positions[3]: (0, 1)}
        self.distant: set[Ref] = set()
        self.costly: set[Ref] = set()
        for step in code.steps:
            self._follow(step)

    def _depends(self, ref: Ref) -> int:
        return self.depends.get(ref, 0)

    def _follow(self, step: Step) -> None:
        depends = 0
        for arg in step.args:
            depends |= self._depends(arg)
        self.depends.update(dict.fromkeys(step.outs, depends))
        if not all(self.counted[2:]) or depends & LOGIT:
            return
        slopes = self._slopes(step)
        if slopes is not None:
            self.slopes[step.outs[0]] = slopes
        if depends & (Q | K) and self._by_distance(step, slopes):
            self.distant.update(step.outs)
            inner = any(arg in self.costly for arg in step.args)
            if inner or step.prim.name not in _CHEAP or not _scalar(self.code, step):
                self.costly.update(step.outs)

    def _slope(self, ref: Ref) -> tuple[int, int] | None:
        return (0, 0) if not self._depends(ref) & (Q | K) else self.slopes.get(ref)

    def _slopes(self, step: Step) -> tuple[int, int] | None:
        """How an integer grows with q and with k, where that is known; sums may wrap around."""
        if not jnp.issubdtype(self.code.type(step.outs[0]).dtype, jnp.integer):
            return None
        parts = [self._slope(arg) for arg in step.args]
        if None in parts:
            return None
        known = [part for part in parts if part is not None]
        match step.prim.name, known:
            case "add", [(a, c), (d, e)]:
                return a + d, c + e
            case "sub", [(a, c), (d, e)]:
                return a - d, c - e
            case "neg", [(a, c)]:
                return -a, -c
            case "convert_element_type", [slope] if step.args[0] in self.positions:
                return slope if np.dtype(self.code.type(step.outs[0]).dtype).itemsize >= 4 else None
            case "mul", [_, _]:
                for (a, c), factor in zip(known, reversed(step.args), strict=True):
                    if isinstance(factor, Const):
                        return a * int(factor.value), c * int(factor.value)
        return None

    def _by_distance(self, step: Step, slopes: tuple[int, int] | None) -> bool:
        """Whether a value depends on q and k through q - k alone."""
        if slopes is not None:
            return slopes[0] == -slopes[1]
        bare = [arg for arg in step.args if arg in self.positions]
        if step.prim.name in ("lt", "le", "gt", "ge", "eq", "ne") and len(bare) == 2:
            return self._depends(bare[0]) | self._depends(bare[1]) == Q | K
        return all(arg in self.distant or not self._depends(arg) & (Q | K) for arg in step.args)

    def plan(self, out: Ref, leaves: list[int], labels: list[str]) -> _Plan:
        code = self.code
        found: dict[Ref, Kind] = {}
        inner: set[Ref] = set()
        self._visit(out, found, inner)
        steps = [step for step in needed(code.steps, [out]) if inner.intersection(step.outs)]
        residue = Program(
            (*self.logits, *(ref for ref in found if isinstance(ref, int))),
            tuple(steps),
            (out,),
            tuple(code.types),
            "residue",
        )
        features = [self._feature(kind, ref) for ref, kind in found.items()]
        sources = {ref for feature in features for ref in feature.sources}
        views = {ref: view for ref in sources if (view := self._as_view(ref)) is not None}
        free = {
            ref
            for feature in features
            for ref in (feature.ref, *(arg for step in feature.steps for arg in step.args))
            if isinstance(ref, int) and not self._depends(ref)
        } | {array for array, _ in views.values()}
        names = dict(zip(leaves, labels, strict=True))
        captured = dict(zip(code.inputs[len(code.inputs) - len(code.captured) :], code.captured))
        return _Plan(
            tuple(leaves),
            {ref: letter for ref, letter in self.positions.items()},
            captured,
            tuple(code.types),
            needed(code.steps, free),
            views,
            tuple(features),
            residue,
            tuple(dict.fromkeys((self._label(e.array, names), e) for e in code.extents)),
            self.counted,
            tuple(dict.fromkeys(self._reason(s) for s in steps if not _scalar(code, s))),
        )

    def _visit(self, ref: Ref, found: dict[Ref, Kind], inner: set[Ref]) -> None:
        """Walks down from the result to the operands."""
        if isinstance(ref, Const) or ref in found or ref in inner or ref in self.logits:
            return
        kind = self._kind(ref)
        if kind is not None:
            found[ref] = kind
            return
        step, _ = self.code.source[ref]
        inner.update(step.outs)
        for arg in step.args:
            self._visit(arg, found, inner)

    def _kind(self, ref: Ref) -> Kind | None:
        depends = self._depends(ref)
        if depends & LOGIT:
            return None
        if not (depends & Q and depends & K):
            return "row" if depends & Q else "column" if depends & K else "head"
        if self.code.type(ref).shape == ():
            if self._as_view(ref) is not None:
                return "grid"
            if ref in self.distant and ref in self.costly:
                return "diagonal"
        return None

    def _as_view(self, ref: Ref) -> tuple[Ref, tuple[int | str, ...]] | None:
        """The array that `ref` is an element of, and for its axes, first to last, the letter of the
        position it is read at, a constant index, or "" for an axis that is kept whole."""
        read = self.code.as_read(ref)
        if read is None or self._depends(read.array):
            return None
        layout: list[int | str] = [""] * len(self.code.type(read.array).shape)
        for axis, at in zip(read.axes, read.index, strict=True):
            if not isinstance(at, Const) and at not in self.code.bare:
                return None
            layout[axis] = int(at.value) if isinstance(at, Const) else self.code.bare[at]
        letters = [letter for letter in layout if letter and isinstance(letter, str)]
        return (read.array, tuple(layout)) if len(letters) == len(set(letters)) else None

    def _feature(self, kind: Kind, ref: Ref) -> _Feature:
        sources: dict[int, None] = {}
        inner: set[Ref] = set()

        def visit(at: Ref) -> None:
            if isinstance(at, Const) or not self._depends(at) or at in inner:
                return
            if at in self.positions or self._as_view(at) is not None:
                sources[at] = None
                return
            step, _ = self.code.source[at]
            inner.update(step.outs)
            for arg in step.args:
                visit(arg)

        visit(ref)
        steps = tuple(s for s in needed(self.code.steps, [ref]) if inner.intersection(s.outs))
        return _Feature(kind, ref, tuple(sources), steps)

    def _label(self, array: Ref, names: dict[int, str]) -> str:
        """What to call the array that a read is from: the leaf it came from, if one."""
        while isinstance(array, int) and array in self.code.source:
            step, _ = self.code.source[array]
            array = step.args[0] if step.args else Const(0)
        return names.get(array, "an array") if isinstance(array, int) else "an array"

    def _reason(self, step: Step) -> str:
        if step.prim.name == "read":
            shape, dtype = self.code.type(step.args[0])
            return f"an array {np.dtype(dtype).name}{list(shape)} is read at computed positions"
        return f"`{step.prim.name}` is not elementwise"


def _scalar(code: Recogniser, step: Step) -> bool:
    """Whether a step is elementwise: it goes from scalars to scalars, with no code of its own."""
    types = [code.type(ref) for ref in (*step.args, *step.outs)]
    plain = all(t.shape == () and not jnp.issubdtype(t.dtype, jax.dtypes.extended) for t in types)
    return plain and not any(map(has_body, step.params.values()))


def _labels(given: Any) -> list[str]:
    """What to call the leaves of a mask or score: `causal(offset)`."""
    labels = []
    for path, _ in jax.tree_util.tree_flatten_with_path(given)[0]:
        at, label = given, "an array"
        for key in path:
            if isinstance(key, jax.tree_util.GetAttrKey):
                fn, at = getattr(at, "fn", None), getattr(at, key.name)
                if fn is not None:
                    label = f"an array of {fn.__name__}"
                    names = [] if isinstance(fn, Program) else list(inspect.signature(fn).parameters)
                    owner = (fn.__name__.lstrip("_"), names[4 + (key.name == "params") :])
                continue
            if isinstance(key, jax.tree_util.SequenceKey) and label != "an array":
                name, names = owner
                if key.idx < len(names):
                    label = f"{name}({names[key.idx]})"
                break
            at = at[getattr(key, "idx", getattr(key, "key", None))]
        labels.append(label)
    return labels


def _check_extents(plan: _Plan, sizes: dict[str, int]) -> None:
    letters = {"b": "B", "h": "N", "q": "T", "k": "S"}
    for label, (_, axis, extent, at) in plan.extents:
        if extent != sizes[at]:
            raise ValueError(
                f"{label}: got extent {extent} along axis {axis}, which is read at `{at}`; expected "
                f"{letters[at]} = {sizes[at]}. An extent of 1 is not broadcast: index it with 0; "
                f"for a part of a longer sequence say `positions=Positions({at}=...)`"
            )


# --- evaluating operands ------------------------------------------------------------------------


def pointwise(
    fn: Callable[..., Any], arrays: Sequence[Shaped[Array, "..."]], ranks: Sequence[int]
) -> Shaped[Array, "..."]:
    """A function of single elements over arrays whose leading axes broadcast.

    Args:
      fn: takes one element of each array; an element has the last `ranks[i]` axes of array i.
      arrays: their other, leading axes are aligned at the last, and broadcast.
      ranks: the numbers of axes of the elements.
    """
    lead = max([np.ndim(a) - r for a, r in zip(arrays, ranks, strict=True)], default=0)
    shapes = [
        (1,) * (lead - np.ndim(a) + r) + np.shape(a)[: np.ndim(a) - r]
        for a, r in zip(arrays, ranks, strict=True)
    ]
    extents = np.broadcast_shapes(*shapes) if shapes else ()
    over = fn
    for axis in reversed(range(lead)):
        if extents[axis] != 1:
            over = jax.vmap(over, [None if shape[axis] == 1 else 0 for shape in shapes])
    squeezed = [
        lax.squeeze(a, [axis for axis in range(np.ndim(a) - r) if np.shape(a)[axis] == 1])
        for a, r in zip(arrays, ranks, strict=True)
    ]
    return lax.expand_dims(over(*squeezed), [axis for axis, n in enumerate(extents) if n == 1])


def _value(values: dict[int, Any], ref: Ref) -> Any:
    return ref.value if isinstance(ref, Const) else values[ref]


def _typed(leaf: Any, ref: int, plan: _Plan) -> Any:
    # Bound as they are, Python numbers would take the default dtype.
    return leaf if hasattr(leaf, "aval") else np.asarray(leaf, plan.types[ref].dtype)


def _position_arrays(
    plan: _Plan, positions: Positions, sizes: dict[str, int]
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
    for axis in reversed(range(len(layout))):
        if isinstance(layout[axis], int):
            array = lax.index_in_dim(array, layout[axis], axis, keepdims=False)
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
    plan: _Plan, feature: _Feature, values: dict[int, Any], sources: dict[int, Any], T: int, S: int
) -> Any:
    """The array of one operand."""
    if not feature.sources:
        return lax.expand_dims(jnp.asarray(_value(values, feature.ref)), (0, 1))
    if feature.kind == "diagonal":
        distance = jnp.arange(1 - S, T, dtype=jnp.int32)[None, None]
        at = {"q": distance, "k": jnp.zeros((1, 1, 1), jnp.int32)}
        sources = sources | {
            ref: at[letter] for ref, letter in plan.positions.items() if letter in at
        }
    arrays = [sources[ref] for ref in feature.sources]
    if feature.sources == (feature.ref,):
        array = arrays[0]
    else:

        def element(*elements: Any) -> Any:
            start = values | dict(zip(feature.sources, elements, strict=True))
            return _value(run(feature.steps, start), feature.ref)

        ranks = [len(plan.types[ref].shape) for ref in feature.sources]
        array = pointwise(element, arrays, ranks)
    return lax.squeeze(array, (2,)) if feature.kind == "head" else array

"""On which positions each value of a mask or score depends; from that its operands and residue."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..masks.mask import Mask
from ..masks.positions import Positions
from ..scores import Score
from .array_reads import AxisRead, ReadBuilder
from .canonical import arguments, struct
from .hashing import RULED, Const, Ref, Type, has_body
from .labels import labels
from .program import Builder, Program, Step, needed

Kind: TypeAlias = Literal["row", "column", "head", "grid", "diagonal"]

# Dependence is a set of positions, as bits.
B, H, Q, K, LOGIT = 1, 2, 4, 8, 16

# Operations about as cheap as loading their result: a chain of these that depends on q - k alone is
# computed for each pair, and gets no operand of its own.
_CHEAP = frozenset(
    [
        "abs",
        "add",
        "and",
        "broadcast_in_dim",
        "clamp",
        "convert_element_type",
        "copy",
        "eq",
        "ge",
        "gt",
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "reshape",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "squeeze",
        "stop_gradient",
        "sub",
        "xor",
    ]
)


class OperandRecipe(NamedTuple):
    """How an operand is computed: the steps from its sources, positions and views of arrays."""

    kind: Kind
    ref: Ref
    sources: tuple[int, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """The split of one structure: everything but the values of its leaves.

    Plans of equal signatures are equal, so that what was compiled for one serves another.
    """

    signature: Signature
    leaves: tuple[int, ...]
    positions: dict[int, str]
    captured: dict[int, Any]
    types: tuple[Type, ...]
    free: tuple[Step, ...]
    views: dict[int, tuple[Ref, tuple[int | str, ...]]]
    recipes: tuple[OperandRecipe, ...]
    residue: Program
    axis_reads: tuple[tuple[str, AxisRead], ...]
    counted: tuple[bool, ...]
    reasons: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, SplitPlan) and self.signature == other.signature)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.signature)

    @property
    def reads(self) -> frozenset[str]:
        """Which of the positions b, h, q, k its operands depend on."""
        found: set[str] = set()
        for source in {ref for recipe in self.recipes for ref in recipe.sources}:
            layout = self.views[source][1] if source in self.views else (self.positions[source],)
            found.update(name for name in layout if name in tuple("bhqk"))
        return frozenset(found)


class Signature(NamedTuple):
    """All of a mask or score but the values of its leaves; hashable, the key of its plan.

    Attributes:
      tree: its structure.
      leaves: shape, dtype and weak type of each leaf.
      logit: the dtype of a score's logits; None for a mask.
      counted: which of the positions b, h, q, k are counted from 0.
      x64: whether JAX computes in 64 bits.
    """

    tree: Any
    leaves: tuple[Any, ...]
    logit: Any
    counted: tuple[bool, ...]
    x64: bool


def signature_of(given: Mask | Score, positions: Positions, logit: Any = False) -> Signature:
    """The signature of a canonical mask or score, where these positions are given.

    Args:
      given: the mask or score.
      positions: only which of them are given matters.
      logit: for a score, the dtype of the logits; True and False are float32.
    """
    leaves, tree = jax.tree.flatten(given)
    structs = map(struct, leaves)
    dtype = None
    if isinstance(given, Score):
        dtype = np.dtype(np.float32 if isinstance(logit, bool) else logit)
    return Signature(
        tree,
        tuple((s.shape, s.dtype, s.weak_type) for s in structs),
        dtype,
        tuple(getattr(positions, letter) is None for letter in "bhqk"),
        bool(jax.config.read("jax_enable_x64")),
    )


class TracedSteps(NamedTuple):
    """A mask or score as steps.

    Attributes:
      builder: the steps, and the reads of arrays among them.
      logits, positions, leaves: its inputs; before those that it closes over.
      out: its result.
      labels: what to call the leaves.
    """

    builder: ReadBuilder
    logits: list[int]
    positions: list[int]
    leaves: list[int]
    out: Ref
    labels: dict[int, str]

    def label(self, array: Ref) -> str:
        """What to call the array that a read is from: the leaf it came from, if one."""
        while isinstance(array, int) and array in self.builder.source:
            step, _ = self.builder.source[array]
            array = step.args[0] if step.args else Const(0)
        return self.labels.get(array, "an array") if isinstance(array, int) else "an array"


def trace_signature(signature: Signature) -> TracedSteps:
    """The steps of a mask or score."""
    structs = [jax.ShapeDtypeStruct(s, d, weak_type=w) for s, d, w in signature.leaves]
    lead = arguments(signature.logit)
    given = jax.tree.unflatten(signature.tree, structs)

    def call(*args: Any) -> Any:
        return jax.tree.unflatten(signature.tree, args[len(lead) :])(*args[: len(lead)])

    jaxpr = jax.make_jaxpr(call)(*lead, *structs)
    steps = ReadBuilder(differentiated=signature.logit is not None)
    inputs = [steps.input(Type(v.shape, v.dtype)) for v in jaxpr.in_avals]
    logits, positions = inputs[: len(lead) - 4], inputs[len(lead) - 4 : len(lead)]
    for ref, letter, counted in zip(positions, "bhqk", signature.counted, strict=True):
        (steps.bare if counted else steps.given)[ref] = letter
    (out,) = steps.inline(jaxpr, inputs)
    own = inputs[len(lead) :]
    return TracedSteps(
        steps, logits, positions, own, out, dict(zip(own, labels(given), strict=True))
    )


@lru_cache(maxsize=256)
def split_plan(signature: Signature) -> SplitPlan:
    """The plan of a mask or score; cached."""
    return SplitAnalysis(signature).plan()


class SplitAnalysis:
    """Finds the dependence of every value, the operands, and the residue."""

    def __init__(self, signature: Signature) -> None:
        self.signature, counted = signature, signature.counted
        traced = self.traced = trace_signature(signature)
        code = self.code = traced.builder
        positions, logits = traced.positions, traced.logits
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
            if inner or step.prim.name not in _CHEAP or not _is_scalar(self.code, step):
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

    def plan(self) -> SplitPlan:
        """The plan."""
        code, out = self.code, self.traced.out
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
        recipes = [self._feature(kind, ref) for ref, kind in found.items()]
        sources = {ref for recipe in recipes for ref in recipe.sources}
        views = {ref: view for ref in sources if (view := self._as_view(ref)) is not None}
        free = {
            ref
            for recipe in recipes
            for ref in (recipe.ref, *(arg for step in recipe.steps for arg in step.args))
            if isinstance(ref, int) and not self._depends(ref)
        } | {array for array, _ in views.values()}
        captured = dict(
            zip(code.inputs[len(code.inputs) - len(code.captured) :], code.captured, strict=True)
        )
        return SplitPlan(
            self.signature,
            tuple(self.traced.leaves),
            dict(self.positions),
            captured,
            tuple(code.types),
            needed(code.steps, free),
            views,
            tuple(recipes),
            residue,
            tuple(dict.fromkeys((self.traced.label(e.array), e) for e in code.axis_reads)),
            self.counted,
            tuple(dict.fromkeys(self._reason(s) for s in steps if not _is_scalar(code, s))),
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
        for axis, at in zip(read.axes, read.at, strict=True):
            if not isinstance(at, Const) and at not in self.code.bare:
                return None
            layout[axis] = int(at.value) if isinstance(at, Const) else self.code.bare[at]
        letters = [letter for letter in layout if letter and isinstance(letter, str)]
        return (read.array, tuple(layout)) if len(letters) == len(set(letters)) else None

    def _feature(self, kind: Kind, ref: Ref) -> OperandRecipe:
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
        return OperandRecipe(kind, ref, tuple(sources), steps)

    def _reason(self, step: Step) -> str:
        if step.prim.name == "read":
            shape, dtype = self.code.type(step.args[0])
            return f"an array {np.dtype(dtype).name}{list(shape)} is read at computed positions"
        return f"`{step.prim.name}` is not elementwise"


def _is_scalar(code: Builder, step: Step) -> bool:
    """Whether a step is elementwise: it goes from scalars to scalars, with no code of its own."""
    if step.prim.name in RULED:
        body = Builder()
        body.inline(
            step.params[RULED[step.prim.name]], [body.input(code.type(a)) for a in step.args]
        )
        return all(_is_scalar(body, inner) for inner in body.steps)
    types = [code.type(ref) for ref in (*step.args, *step.outs)]
    plain = all(t.shape == () and not jnp.issubdtype(t.dtype, jax.dtypes.extended) for t in types)
    return plain and not any(map(has_body, step.params.values()))

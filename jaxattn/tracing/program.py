"""A traced function as a value: straight-line code, hashable by its structure.

A jaxpr is compared by identity, so the same lambda traced twice would be compiled twice. A
`Program` is compared by what it computes: calls inlined, equal steps merged, captured arrays turned
into inputs, literals kept by value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal, primitives

from ..mesh import varying_alike
from .hashing import RULED, Const, Ref, Type, bind, frozen, literal, type_of


class Step(NamedTuple):
    """One operation: values in, values out."""

    prim: Any
    params: dict[str, Any]
    args: tuple[Ref, ...]
    outs: tuple[int, ...]


# What the calls that are inlined name their body, by primitive.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}

# Operations that say where a value lies and leave it as it is.
_IDENTITIES = {"pvary", "copy", "copy_p", "sharding_constraint", "reshard", "mesh_cast"}


class Builder:
    """Collects the steps of a program; equal steps become one.

    Where it will be differentiated, functions with derivatives of their own are kept as they are.
    """

    def __init__(self, *, differentiated: bool = False) -> None:
        self.calls = _CALLS if differentiated else _CALLS | RULED
        self.types: list[Type] = []
        self.steps: list[Step] = []
        self.inputs: list[int] = []
        self.captured: list[Any] = []
        self.source: dict[int, tuple[Step, int]] = {}
        self._seen: dict[Hashable, tuple[int, ...]] = {}
        self._captures: dict[int, int] = {}

    def new(self, type: Type) -> int:
        """A new value."""
        self.types.append(type)
        return len(self.types) - 1

    def input(self, type: Type) -> int:
        """A new value that the caller gives."""
        self.inputs.append(self.new(type))
        return self.inputs[-1]

    def capture(self, array: Any) -> Ref:
        """The input that stands for an array that the code closes over."""
        if isinstance(array, (bool, int, float, complex, np.generic)):
            return Const(array)
        if id(array) not in self._captures:
            self._captures[id(array)] = self.input(Type(np.shape(array), array.dtype))
            self.captured.append(array)
        return self._captures[id(array)]

    def type(self, ref: Ref) -> Type:
        return type_of(ref) if isinstance(ref, Const) else self.types[ref]

    def definition(self, ref: Ref, name: str) -> Step | None:
        """The step that made `ref`, if its operation is called `name`."""
        if isinstance(ref, Const) or ref not in self.source:
            return None
        step = self.source[ref][0]
        return step if step.prim.name == name else None

    def bind(self, prim: Any, params: dict[str, Any], args: Sequence[Ref], like: Type) -> int:
        """Adds a step with one result."""
        (out,) = self.emit(prim, params, args, [like])
        assert isinstance(out, int)
        return out

    def emit(
        self, prim: Any, params: dict[str, Any], args: Sequence[Ref], types: Sequence[Type]
    ) -> Sequence[Ref]:
        """Adds a step, unless the same step is there already or it does nothing."""
        if self._idle(prim.name, params, args, types):
            return args[:1]
        key = (prim.name, frozen(prim, params, map(self.type, args)), tuple(args))
        if key not in self._seen:
            outs = tuple(self.new(type) for type in types)
            step = Step(prim, params, tuple(args), outs)
            self.steps.append(step)
            self._seen[key] = outs
            for i, out in enumerate(outs):
                self.source[out] = (step, i)
        return self._seen[key]

    def _idle(
        self, name: str, params: dict[str, Any], args: Sequence[Ref], types: Sequence[Type]
    ) -> bool:
        if name in _IDENTITIES:
            return True
        return name in ("convert_element_type", "reshape", "squeeze", "broadcast_in_dim") and (
            self.type(args[0]) == types[0] and isinstance(args[0], int) and len(args) == 1
        )

    def inline(self, jaxpr: Any, args: Sequence[Ref]) -> list[Ref]:
        """Adds the steps of a jaxpr (closed or not) and returns the values of its results."""
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        values: dict[Any, Ref] = dict(zip(jaxpr.invars, args, strict=True))
        values.update(zip(jaxpr.constvars, map(self.capture, consts), strict=True))

        def read(atom: Any) -> Ref:
            return Const(literal(atom)) if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            name, params = eqn.primitive.name, eqn.params
            outs: Sequence[Ref]
            if name in self.calls and self.calls[name] in params:
                outs = self.inline(params[self.calls[name]], ins)
            elif name == "cond" and not eqn.effects:
                outs = self._select(params["branches"], ins[0], ins[1:])
            else:
                types = [Type(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
                outs = self.emit(eqn.primitive, params, ins, types)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _select(self, branches: Sequence[Any], index: Ref, args: Sequence[Ref]) -> list[Ref]:
        """`cond` as a selection among the results of its branches, as `vmap` makes of it."""
        cases = [self.inline(branch, args) for branch in branches]
        if len(cases) == 1:
            return cases[0]
        which: Ref = index
        if len(cases) == 2:
            cast = self.definition(index, "convert_element_type")
            if cast is not None and self.type(cast.args[0]).dtype == np.bool_:
                which = cast.args[0]
            else:
                zero = Const(np.zeros((), self.type(index).dtype))
                which = self.bind(primitives.ne_p, {}, [index, zero], Type((), np.dtype(bool)))
        chosen: list[Ref] = []
        for results in zip(*cases, strict=True):
            if all(result == results[0] for result in results):
                chosen.append(results[0])
                continue
            arrays = [self.array(result) for result in results]
            chosen.append(
                self.bind(primitives.select_n_p, {}, [which, *arrays], self.type(results[0]))
            )
        return chosen

    def array(self, ref: Ref) -> Ref:
        """`ref` with a dtype: Python scalars would be bound with the default one."""
        if isinstance(ref, Const) and not hasattr(ref.value, "dtype"):
            return Const(np.asarray(ref.value))
        return ref


@dataclass(frozen=True, eq=False)
class Program:
    """Straight-line code with a structural `==` and `hash`; calling it runs it.

    Attributes:
      inputs: the values that the caller gives.
      steps: the operations, in order.
      outputs: the values it returns; a single one is returned bare.
      types: shape and dtype of every value.
      name: what to call it in messages; programs of other names may be equal.
      labels: what the user's function calls its last inputs; "" where it has no name.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Ref, ...]
    types: tuple[Type, ...]
    name: str = field(default="program")
    labels: tuple[str, ...] = ()

    @cached_property
    def _key(self) -> Hashable:
        steps = tuple(
            (s.prim.name, frozen(s.prim, s.params, map(self._type, s.args)), s.args, s.outs)
            for s in self.steps
        )
        return self.inputs, steps, self.outputs, self.types

    @cached_property
    def outline(self) -> int:
        """A hash of what it computes, whatever the scalars that are written in the code."""

        def blank(refs: Iterable[Ref]) -> tuple[Hashable, ...]:
            return tuple(type_of(ref) if isinstance(ref, Const) else ref for ref in refs)

        steps = tuple((step.prim.name, blank(step.args), step.outs) for step in self.steps)
        return hash((self.inputs, steps, blank(self.outputs), self.types))

    def _type(self, ref: Ref) -> Type:
        return type_of(ref) if isinstance(ref, Const) else self.types[ref]

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Program) and self._hash == other._hash and self._key == other._key
        )

    def __hash__(self) -> int:
        return self._hash

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: Any) -> Any:
        values = run(self.steps, dict(zip(self.inputs, args, strict=True)))
        results = [out.value if isinstance(out, Const) else values[out] for out in self.outputs]
        return results[0] if len(results) == 1 else results


def run(steps: Iterable[Step], values: dict[int, Any]) -> dict[int, Any]:
    """`values` with the results of `steps` added."""
    values = dict(values)
    for step in steps:
        args = [ref.value if isinstance(ref, Const) else values[ref] for ref in step.args]
        args = varying_alike(args)
        if step.prim.name in _LOOPS:
            results = _LOOPS[step.prim.name](args, step.params)
        else:
            result = bind(step.prim, step.params, args)
            results = result if getattr(step.prim, "multiple_results", False) else [result]
        values.update(zip(step.outs, results, strict=True))
    return values


def _scan(args: list[Any], params: dict[str, Any]) -> list[Any]:
    # JAX 0.12 tells constants, carry and slices apart by a tree of the arguments.
    groups = params["ft_in"].unpack() if "ft_in" in params else None
    consts = len(groups[0]) if groups else params["num_consts"]
    carried = len(groups[1]) if groups else params["num_carry"]
    step = _function(params["jaxpr"], like=args)

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = step(*args[:consts], *carry, *x)
        return outs[:carried], outs[carried:]

    init, xs = args[consts : consts + carried], args[consts + carried :]
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, init, xs, **options)
    return [*carry, *ys]


def _while(args: list[Any], params: dict[str, Any]) -> list[Any]:
    tested, consts = params["cond_nconsts"], params["body_nconsts"]
    test = _function(params["cond_jaxpr"], like=args)
    step = _function(params["body_jaxpr"], like=args)
    return lax.while_loop(
        lambda carry: test(*args[:tested], *carry)[0],
        lambda carry: step(*args[tested : tested + consts], *carry),
        args[tested + consts :],
    )


# Loops are traced anew: the types of what they carry say over which mesh axes it varies, and those
# are the caller's, not those of the trace.
_LOOPS: dict[str, Callable[[list[Any], dict[str, Any]], list[Any]]] = {
    "scan": _scan,
    "while": _while,
}


def _function(jaxpr: Any, like: list[Any]) -> Callable[..., list[Any]]:
    """A jaxpr as a function whose results vary over the mesh axes of `like`."""
    builder = Builder()
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    inputs = [builder.input(Type(v.aval.shape, v.aval.dtype)) for v in inner.invars]
    outputs = builder.inline(jaxpr, inputs)

    def call(*args: Any) -> list[Any]:
        values = run(
            builder.steps, dict(zip(builder.inputs, (*args, *builder.captured), strict=True))
        )
        results = [out.value if isinstance(out, Const) else values[out] for out in outputs]
        return varying_alike([*results, *like])[: len(results)]

    return call


def trace(
    fn: Callable[..., Any], args: Sequence[Any], name: str, *, differentiated: bool = False
) -> tuple[Program, list[Any]]:
    """`fn(*args)` as a program, and the arrays that it closes over.

    The program takes the arguments, then the captured arrays.
    """
    builder = Builder(differentiated=differentiated)
    jaxpr = jax.make_jaxpr(fn)(*args)
    inputs = [builder.input(Type(v.shape, v.dtype)) for v in jaxpr.in_avals]
    outputs = tuple(builder.inline(jaxpr, inputs))
    program = Program(
        tuple(builder.inputs), needed(builder.steps, outputs), outputs, tuple(builder.types), name
    )
    return program, builder.captured


def needed(steps: Iterable[Step], outputs: Iterable[Ref]) -> tuple[Step, ...]:
    """The steps that `outputs` depend on, in order."""
    wanted = {out for out in outputs if isinstance(out, int)}
    kept = []
    for step in reversed(list(steps)):
        if wanted.intersection(step.outs):
            kept.append(step)
            wanted.update(arg for arg in step.args if isinstance(arg, int))
    return tuple(reversed(kept))

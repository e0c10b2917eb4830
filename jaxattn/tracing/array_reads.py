"""Reads of arrays: the many forms in which JAX writes `array[b, 0, q, k]`, in one form.

`read(array, *indices, axes)` takes one element along each of `axes`; indices out of range are
clamped. An index is *bare* where it is a position itself, counted from 0: the array is then the
operand as it is, without a gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from .hashing import Const, Ref, Type
from .program import Builder


class _ReadPrimitive:
    """One element along each of `axes`, clamped; bound like a JAX primitive."""

    name = "read"
    multiple_results = False

    @staticmethod
    def bind(array: Any, *index: Any, axes: tuple[int, ...]) -> Any:
        starts: list[Any] = [np.int32(0)] * array.ndim
        sizes = list(array.shape)
        for axis, at in zip(axes, index, strict=True):
            starts[axis], sizes[axis] = at, 1
        dtype = jnp.result_type(*index)
        starts = [lax.convert_element_type(start, dtype) for start in starts]
        found = lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False)
        return lax.squeeze(found, axes)


READ = _ReadPrimitive()


class Read(NamedTuple):
    """A read: of which array, along which axes, at which indices."""

    array: Ref
    axes: tuple[int, ...]
    at: tuple[Ref, ...]


class AxisRead(NamedTuple):
    """An axis that is read at a bare position.

    The extent has to be the number of positions where they count from 0; given positions have to
    lie below it.
    """

    array: Ref
    axis: int
    extent: int
    position: str


class ReadBuilder(Builder):
    """A builder that brings reads to one form.

    Attributes:
      bare: the values that are positions counted from 0, and their letters.
      given: the values that are positions which the caller gives, and their letters.
      axis_reads: the axes read at bare positions, counted or given.
      bounds: for each read at given positions, these positions and the extents they are read in.
    """

    def __init__(self, *, differentiated: bool = False) -> None:
        super().__init__(differentiated=differentiated)
        self.bare: dict[Ref, str] = {}
        self.given: dict[Ref, str] = {}
        self.axis_reads: list[AxisRead] = []
        self.bounds: dict[Ref, list[tuple[Ref, int]]] = {}
        self._rules: dict[str, Callable[[Any, Sequence[Ref], Type], Ref | None]] = {
            "squeeze": self._squeeze,
            "gather": self._gather,
        }

    def emit(
        self, prim: Any, params: dict[str, Any], args: Sequence[Ref], types: Sequence[Type]
    ) -> Sequence[Ref]:
        rule = self._rules.get(prim.name)
        found = rule(params, args, types[0]) if rule else None
        return super().emit(prim, params, args, types) if found is None else [found]

    def as_read(self, ref: Ref) -> Read | None:
        """The read that `ref` is, if it is one."""
        step = self.definition(ref, "read")
        return step and Read(step.args[0], step.params["axes"], step.args[1:])

    def read(self, array: Ref, index: dict[int, Ref]) -> Ref:
        """The value of `array` at `index`, by axis.

        Reads of reads become one; what is read at a bare `b` or `h` beside computed indices is
        taken first, so that it stays with its row of the batch or its head.
        """
        while (inner := self.as_read(array)) is not None:
            rank = len(self.type(inner.array).shape)
            rest = [axis for axis in range(rank) if axis not in inner.axes]
            index = dict(zip(inner.axes, inner.at, strict=True)) | {
                rest[axis]: at for axis, at in index.items()
            }
            array = inner.array
        index = dict(sorted(index.items()))
        shape = self.type(array).shape
        bounds = [(at, shape[axis]) for axis, at in index.items() if at in self.given]
        if not all(isinstance(at, Const) or at in self.bare for at in index.values()):
            first = {
                axis: at
                for axis, at in index.items()
                if isinstance(at, Const) or self.bare.get(at) in ("b", "h")
            }
            if first:
                array = self._emit_read(array, first)
                # Axes are counted without those taken.
                index = {
                    axis - sum(taken < axis for taken in first): at
                    for axis, at in index.items()
                    if axis not in first
                }
        found = self._emit_read(array, index)
        if bounds:
            self.bounds[found] = bounds
        return found

    def _emit_read(self, array: Ref, index: dict[int, Ref]) -> Ref:
        shape, dtype = self.type(array)
        kept = tuple(n for axis, n in enumerate(shape) if axis not in index)
        params = {"axes": tuple(index)}
        return super().emit(READ, params, [array, *index.values()], [Type(kept, dtype)])[0]

    # --- the forms ---

    def _squeeze(self, params: Any, args: Sequence[Ref], type: Type) -> Ref | None:
        slice = self.definition(args[0], "dynamic_slice")
        if slice is None:
            return None
        array, *starts = slice.args
        shape = self.type(array).shape
        axes = params["dimensions"]
        whole = all(n == shape[a] for a, n in enumerate(self.type(args[0]).shape) if a not in axes)
        if not whole:
            return None
        return self.read(array, {a: self.index(array, a, starts[a]) for a in axes})

    def _gather(self, params: Any, args: Sequence[Ref], type: Type) -> Ref | None:
        array, vector = args
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        axes = tuple(numbers.start_index_map)
        shape = self.type(array).shape
        indices = self._scalars(vector)
        pointwise = (
            indices is not None
            and tuple(sorted(axes)) == tuple(numbers.collapsed_slice_dims)
            and not numbers.operand_batching_dims
            and all(n == (1 if a in axes else shape[a]) for a, n in enumerate(sizes))
            and tuple(numbers.offset_dims) == tuple(range(len(type.shape)))
        )
        mode = getattr(params["mode"], "name", str(params["mode"]))
        if not pointwise or mode not in ("CLIP", "PROMISE_IN_BOUNDS", "FILL_OR_DROP"):
            return None
        assert indices is not None
        if any(
            isinstance(at, Const) and not 0 <= int(at.value) < shape[a]
            for a, at in zip(axes, indices, strict=True)
        ):
            return None
        filled = mode == "FILL_OR_DROP"
        # An explicit fill value is the user's answer for positions beyond the array.
        answered = filled and _answers(params["fill_value"], self.type(array).dtype)
        index = {
            a: self.index(array, a, at, filled=filled, answered=answered)
            for a, at in zip(axes, indices, strict=True)
        }
        known = self.bare if answered else self.bare | self.given
        outside = {a: at for a, at in index.items() if not (at in known or isinstance(at, Const))}
        if not filled or not outside:
            return self.read(array, index)
        if type.shape:
            return None
        found = self.read(array, index)
        for axis, at in outside.items():
            found = self._fill_outside(found, at, shape[axis], params["fill_value"])
        return found

    def _fill_outside(self, found: Ref, at: Ref, extent: int, fill: Any) -> Ref:
        """`found` where `0 <= at < extent`, else `fill`."""
        dtype, flag = self.type(at).dtype, Type((), np.dtype(bool))
        least, most = (Const(np.asarray(n, dtype)) for n in (0, extent - 1))
        inside = self.bind(
            primitives.and_p,
            {},
            [
                self.bind(primitives.ge_p, {}, [at, least], flag),
                self.bind(primitives.le_p, {}, [at, most], flag),
            ],
            flag,
        )
        value = Const(_fill_value(fill, self.type(found).dtype))
        return self.bind(primitives.select_n_p, {}, [inside, value, found], self.type(found))

    def _scalars(self, vector: Ref) -> list[Ref] | None:
        """The scalars that a vector of indices was put together from."""
        shape = self.type(vector).shape
        if len(shape) != 1 or isinstance(vector, Const) or vector not in self.source:
            return None
        step, _ = self.source[vector]
        name, parts = step.prim.name, step.args
        if name == "convert_element_type":
            return self._scalars(parts[0]) if _keeps(step.params["new_dtype"]) else None
        if name in ("broadcast_in_dim", "reshape") and shape == (1,):
            return [parts[0]] if self.type(parts[0]).shape == () else None
        if name == "stack" and all(self.type(part).shape == () for part in parts):
            return list(parts)
        if name != "concatenate":
            return None
        found: list[Ref] = []
        for part in parts:
            scalars = self._scalars(part)
            if scalars is None:
                return None
            found += scalars
        return found

    # --- indices ---

    def index(
        self, array: Ref, axis: int, at: Ref, *, filled: bool = False, answered: bool = False
    ) -> Ref:
        """An index of `axis` without what JAX wraps around it: a constant, a position, or `at`.

        Args:
          array, axis, at: what is read, along which axis, and where.
          filled: whether a read beyond the array is not clamped.
          answered: whether the user gave a fill value; a given position is then an index like any
            other.
        """
        extent = self.type(array).shape[axis]
        plain = self._unwrapped(at, extent)
        if isinstance(plain, Const):
            value = int(plain.value)
            return Const(np.int32(min(max(value, 0), extent - 1)))
        bare = self._uncast(plain)
        if bare in self.bare:
            self.axis_reads.append(AxisRead(array, axis, extent, self.bare[bare]))
            return bare
        inner = self._uncast(self._inner(at, extent))
        if inner in self.given and not answered:
            self.axis_reads.append(AxisRead(array, axis, extent, self.given[inner]))
            return inner
        if extent == 1 and not filled:
            return Const(np.int32(0))
        clipped = self._clipped(plain, extent)
        return at if clipped is None else clipped

    def _unwrapped(self, at: Ref, extent: int) -> Ref:
        """`x` of `x + extent if x < 0 else x`, for `x` a constant or known to count from 0."""
        plain = self._inner(at, extent)
        if plain is not at and isinstance(plain, Const):
            value = int(plain.value)
            return Const(np.int32(value + extent if value < 0 else value))
        return plain if self._counts(plain) else at

    def _inner(self, at: Ref, extent: int) -> Ref:
        """`x` of `x + extent if x < 0 else x`."""
        step = self.definition(at, "select_n")
        if step is None or len(step.args) != 3:
            return at
        negative, plain, wrapped = step.args
        test, shift = self.definition(negative, "lt"), self.definition(wrapped, "add")
        if test is None or shift is None or not _equals(test.args[1], 0):
            return at
        if self._uncast(test.args[0]) != self._uncast(plain) or not _equals(shift.args[1], extent):
            return at
        if self._uncast(shift.args[0]) != self._uncast(plain):
            return at
        return plain

    def _counts(self, ref: Ref) -> bool:
        """Whether a value is never negative: a position counted from 0, or one that is clipped."""
        return self._uncast(ref) in self.bare or self._lesser(ref) is not None

    def _lesser(self, ref: Ref) -> tuple[Ref, Ref] | None:
        """The position and the bound of `min(position, bound)` or `clip(position, 0, bound)`."""
        least = self.definition(self._uncast(ref), "min")
        if least is not None:
            position, bound = least.args
            if isinstance(position, Const):
                position, bound = bound, position
        else:
            clip = self.definition(self._uncast(ref), "clamp")
            if clip is None or not _equals(clip.args[0], 0):
                return None
            position, bound = clip.args[1:]
        position = self._lower_clipped(self._uncast(position))
        if position in self.bare and isinstance(bound, Const) and int(bound.value) >= 0:
            return position, bound
        return None

    def _lower_clipped(self, ref: Ref) -> Ref:
        """`position` of `max(position, 0)`."""
        most = self.definition(ref, "max")
        if most is None:
            return ref
        for plain, bound in (most.args, most.args[::-1]):
            if _equals(bound, 0):
                return self._uncast(plain)
        return ref

    def _clipped(self, plain: Ref, extent: int) -> Ref | None:
        """`b` of `min(b, extent - 1)`: reads clamp anyway. Likewise `h`."""
        found = self._lesser(plain)
        if found and _equals(found[1], extent - 1) and self.bare[found[0]] in ("b", "h"):
            return found[0]
        return None

    def _uncast(self, ref: Ref) -> Ref:
        """A position without casts to other integers that hold it."""
        while (cast := self.definition(ref, "convert_element_type")) is not None:
            if not _keeps(self.type(ref).dtype) or not _keeps(self.type(cast.args[0]).dtype):
                break
            ref = cast.args[0]
        return ref


def _keeps(dtype: Any) -> bool:
    # Positions are int32 and at least 0 where this is asked.
    return jnp.issubdtype(dtype, jnp.integer) and np.dtype(dtype).itemsize >= 4


def _equals(ref: Ref, value: int) -> bool:
    return isinstance(ref, Const) and np.shape(ref.value) == () and int(ref.value) == value


def _answers(fill: Any, dtype: Any) -> bool:
    """Whether a read has a fill value of the user's, other than JAX's default."""
    if fill is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    given, default = _fill_value(fill, dtype), _fill_value(None, dtype)
    both_nan = given != given and default != default
    return bool(given != default) and not bool(both_nan)


def _fill_value(fill: Any, dtype: Any) -> Any:
    if fill is not None:
        return np.asarray(fill, dtype)[()]
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.asarray(np.nan, dtype)[()]
    if dtype == np.bool_:
        return np.bool_(True)
    info = jnp.iinfo(dtype)
    return np.asarray(info.min if info.min < 0 else info.max, dtype)[()]

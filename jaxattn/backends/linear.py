"""Linear functions that bring a transpose of their own, and behave under every transformation.

`jax.custom_derivatives.linear_call` says the same, but can't be batched or differentiated again.
Tangents of attention are such functions: forward mode runs one pass over the tiles, reverse mode
another, the backward, which no transposition of the first would find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..program import varying_alike

Leaves = tuple[Any, ...]
# From the leaves of what is held fixed and those of operands, or cotangents of results.
Flat = Callable[[Leaves, Leaves], Sequence[Any]]


def linear(
    apply: Flat, transpose: Flat, fixed: Leaves, operands: Leaves, like: Leaves
) -> list[Any]:
    """`apply(fixed, operands)`, which is linear in the operands, and transposed by `transpose`.

    Args:
      apply: from what is held fixed and the operands to the results. It is differentiated again by
        JAX, in both.
      transpose: from what is held fixed and cotangents of the results to those of the operands.
        Both functions are compared by identity: made once, they are traced once.
      fixed: arrays.
      operands: arrays of floats.
      like: arrays of the shapes, dtypes and types of the results.
    """
    args = varying_alike([*like, *fixed, *operands])
    return list(
        _linear_p.bind(
            *args, apply=apply, transpose=transpose, results=len(like), operands=len(operands)
        )
    )


_linear_p = Primitive("attention_tangent")
_linear_p.multiple_results = True


def _parts(args: Sequence[Any], results: int, operands: int) -> tuple[Leaves, Leaves, Leaves]:
    """What results are like, what is held fixed, and the operands."""
    return (
        tuple(args[:results]),
        tuple(args[results : len(args) - operands]),
        tuple(args[len(args) - operands :]),
    )


def _apply(*args: Any, apply: Flat, transpose: Flat, results: int, operands: int) -> Sequence[Any]:
    _, fixed, given = _parts(args, results, operands)
    return list(apply(fixed, given))


@lru_cache(maxsize=1024)
def _compiled(apply: Flat, transpose: Flat, results: int, operands: int) -> Any:
    return jax.jit(
        partial(_apply, apply=apply, transpose=transpose, results=results, operands=operands)
    )


@_linear_p.def_impl
def _run(*args: Any, **params: Any) -> Any:
    return _compiled(**params)(*args)


@_linear_p.def_abstract_eval
def _types(*avals: Any, results: int, **_: Any) -> Any:
    return [aval.strip_weak_type() for aval in avals[:results]]


mlir.register_lowering(_linear_p, mlir.lower_fun(_apply, multiple_results=True))


def _derivative(
    primals: Sequence[Any], tangents: Sequence[Any], *, results: int, operands: int, **params: Any
) -> Any:
    like, fixed, given = _parts(primals, results, operands)
    _, of_fixed, of_given = _parts(tangents, results, operands)
    out = _linear_p.bind(*primals, results=results, operands=operands, **params)
    terms = []
    if any(type(t) is not ad.Zero for t in of_given):
        moved = map(ad.instantiate_zeros, of_given)
        terms.append(
            _linear_p.bind(*like, *fixed, *moved, results=results, operands=operands, **params)
        )
    varied = [n for n, t in enumerate(of_fixed) if type(t) is not ad.Zero]
    if varied:

        def of(*some: Any) -> Sequence[Any]:
            values = list(fixed)
            for n, value in zip(varied, some, strict=True):
                values[n] = value
            return tuple(params["apply"](tuple(values), given))

        _, more = jax.jvp(of, [fixed[n] for n in varied], [of_fixed[n] for n in varied])
        terms.append(more)
    return out, [sum(each, start=jnp.zeros_like(o)) for o, *each in zip(out, *terms, strict=True)]


ad.primitive_jvps[_linear_p] = _derivative


def _transposed(
    cotangents: Sequence[Any], *args: Any, transpose: Flat, results: int, operands: int, **_: Any
) -> list[Any]:
    _, fixed, given = _parts(args, results, operands)
    received = tuple(map(ad.instantiate_zeros, cotangents))
    found = transpose(fixed, received)
    # Operands that are known, zeros in all cases, have no cotangent.
    pairs = zip(found, given, strict=True)
    returned = [a if ad.is_undefined_primal(operand) else None for a, operand in pairs]
    return [None] * (len(args) - operands) + returned


ad.primitive_transposes[_linear_p] = _transposed


@lru_cache(maxsize=1024)
def _batched(flat: Flat, fixed: tuple[bool, ...], given: tuple[bool, ...]) -> Flat:
    """A function of leaves, `vmap`ped over the first axis of those that have it."""
    axes = tuple(tuple(0 if yes else None for yes in each) for each in (fixed, given))
    return jax.vmap(lambda f, g: tuple(flat(f, g)), in_axes=axes)


@lru_cache(maxsize=1024)
def _batched_transpose(flat: Flat, fixed: tuple[bool, ...], given: tuple[bool, ...]) -> Flat:
    """The transpose of a batched function: what the batch shares gets the sum of its cotangents."""

    def transpose(of: Leaves, cotangents: Leaves) -> Sequence[Any]:
        over = _batched(flat, fixed, (True,) * len(cotangents))
        found = zip(over(of, cotangents), given, strict=True)
        return [a if yes else a.sum(0, dtype=a.dtype) for a, yes in found]

    return transpose


def _batch(
    args: Sequence[Any], dims: Sequence[Any], *, results: int, operands: int, **params: Any
) -> Any:
    pairs = list(zip(args, dims, strict=True))
    size = next(a.shape[d] for a, d in pairs if d is not None)
    moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in pairs]
    flags = tuple(d is not None for d in dims)
    for n in range(results):
        if not flags[n]:
            moved[n] = jnp.broadcast_to(moved[n], (size, *jnp.shape(moved[n])))
    _, fixed, given = _parts(flags, results, operands)
    out = _linear_p.bind(
        *moved,
        apply=_batched(params["apply"], fixed, given),
        transpose=_batched_transpose(params["transpose"], fixed, given),
        results=results,
        operands=operands,
    )
    return out, [0] * results


batching.primitive_batchers[_linear_p] = _batch

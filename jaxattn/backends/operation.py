"""Functions that JAX treats as one operation, with derivatives of their own.

`jax.custom_jvp` does nearly the same, with two differences. JAX loses its rule when it splits a
function into a known and a linear part, as in the gradient of a `scan`: a second derivative then
differentiates the inside, even if that is a kernel. And JAX transposes its tangents, while
attention has a backward of its own. An operation keeps its rule and its transpose under every
transformation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..mesh import varying_alike

Leaves = Sequence[Any]


class Rules(NamedTuple):
    """What an operation does: functions of sequences of arrays. They are compared by identity.

    Attributes:
      apply: `(fixed, operands) -> results`, linear in the operands, if there are any.
      slope: `(fixed, operands, results, moved) -> tangents` of the results, for tangents `moved` of
        the fixed arrays, None for arrays that are not floats.
      transpose: `(fixed, cotangents) -> cotangents` of the operands, for those of the results.
      names: of the results, for the policies of `jax.checkpoint`.
      differentiated: `fixed -> (rules, like)`, the operation in its place where it is
        differentiated. It has more results after these, which are like these arrays.
    """

    apply: Callable[[Leaves, Leaves], Leaves]
    slope: Callable[[Leaves, Leaves, Leaves, Leaves], Leaves]
    transpose: Callable[[Leaves, Leaves], Leaves] | None = None
    names: tuple[str, ...] = ()
    differentiated: Callable[[Leaves], tuple[Rules, Leaves]] | None = None


def operation(rules: Rules, fixed: Leaves, operands: Leaves, like: Leaves) -> list[Any]:
    """The results of an operation.

    Args:
      rules: what it does.
      fixed, operands: arrays; operands are floats.
      like: arrays of the shapes and dtypes of the results, whose values are not read.
    """
    args = varying_alike([*like, *fixed, *operands])
    return list(_op.bind(*args, rules=rules, results=len(like), operands=len(operands)))


_op = Primitive("attention")
_op.multiple_results = True


def _parts(args: Leaves, results: int, operands: int) -> tuple[Leaves, Leaves, Leaves]:
    """The arrays that results are like, the fixed arrays, and the operands."""
    last = len(args) - operands
    return tuple(args[:results]), tuple(args[results:last]), tuple(args[last:])


def _apply(*args: Any, rules: Rules, results: int, operands: int) -> Leaves:
    _, fixed, given = _parts(args, results, operands)
    return list(rules.apply(fixed, given))


@lru_cache(maxsize=1024)
def _compiled(rules: Rules, results: int, operands: int) -> Any:
    return jax.jit(partial(_apply, rules=rules, results=results, operands=operands))


@_op.def_impl
def _run(*args: Any, **params: Any) -> Any:
    return _compiled(**params)(*args)


@_op.def_abstract_eval
def _types(*avals: Any, results: int, **_: Any) -> Any:
    return [aval.strip_weak_type() for aval in avals[:results]]


mlir.register_lowering(_op, mlir.lower_fun(_apply, multiple_results=True))
# The inside may be partitioned, so lowering depends on devices. JAX has no public way to declare
# that.
dispatch.prim_requires_devices_during_lowering.add(_op)


# --- differentiation ------------------------------------------------------------------------------


def _derivative(
    primals: Leaves, tangents: Leaves, *, rules: Rules, results: int, operands: int
) -> Any:
    like, fixed, given = _parts(primals, results, operands)
    _, of_fixed, of_given = _parts(tangents, results, operands)
    if rules.differentiated is not None:
        rules, more = rules.differentiated(fixed)
        primals = varying_alike([*like, *more, *fixed, *given])
        count = results + len(more)
        tangents = (*[None] * count, *of_fixed, *of_given)
        found, slopes = _derivative(
            primals, tangents, rules=rules, results=count, operands=operands
        )
        return found[:results], slopes[:results]
    found = _op.bind(*primals, rules=rules, results=results, operands=operands)
    if rules.names:
        pairs = zip(found, rules.names, strict=True)
        found = [checkpoint_name(a, name) for a, name in pairs]
    terms = []
    if any(type(t) is not ad.Zero for t in of_given):
        args = (*like, *fixed, *map(ad.instantiate_zeros, of_given))
        terms.append(_op.bind(*args, rules=rules, results=results, operands=operands))
    if any(type(t) is not ad.Zero for t in of_fixed):
        moved = [
            ad.instantiate_zeros(t) if jnp.issubdtype(a.dtype, jnp.floating) else None
            for a, t in zip(fixed, of_fixed, strict=True)
        ]
        terms.append(rules.slope(fixed, given, found, moved))
    return found, [
        sum(each, start=jnp.zeros_like(a)) for a, *each in zip(found, *terms, strict=True)
    ]


def _transposed(
    cotangents: Leaves, *args: Any, rules: Rules, results: int, operands: int
) -> list[Any]:
    _, fixed, given = _parts(args, results, operands)
    assert rules.transpose is not None
    found = rules.transpose(fixed, tuple(map(ad.instantiate_zeros, cotangents)))
    # Operands that are known (they are zeros in all cases) have no cotangent.
    pairs = zip(found, given, strict=True)
    returned = [a if ad.is_undefined_primal(operand) else None for a, operand in pairs]
    return [None] * (len(args) - operands) + returned


ad.primitive_jvps[_op] = _derivative
ad.primitive_transposes[_op] = _transposed


# --- vmap -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _batched(rules: Rules, fixed: tuple[bool, ...], operands: tuple[bool, ...]) -> Rules:
    """The rules over the first axis of the arrays that are batched; all results are."""
    flags = fixed, operands
    of_fixed, of_operands = (tuple(0 if yes else None for yes in e) for e in (fixed, operands))

    def apply(fixed: Leaves, operands: Leaves) -> Leaves:
        over = jax.vmap(lambda f, o: tuple(rules.apply(f, o)), (of_fixed, of_operands))
        return tuple(over(fixed, operands))

    def slope(fixed: Leaves, operands: Leaves, results: Leaves, moved: Leaves) -> Leaves:
        axes = (of_fixed, of_operands, 0, of_fixed)
        over = jax.vmap(lambda *args: tuple(rules.slope(*args)), axes)
        return tuple(over(fixed, operands, tuple(results), tuple(moved)))

    def transpose(fixed: Leaves, cotangents: Leaves) -> Leaves:
        assert rules.transpose is not None
        swap = rules.transpose
        found = jax.vmap(lambda f, c: tuple(swap(f, c)), (of_fixed, 0))(fixed, cotangents)
        # An operand that the batch shares gets the sum.
        pairs = zip(found, operands, strict=True)
        return tuple(a if yes else a.sum(0, dtype=a.dtype) for a, yes in pairs)

    def differentiated(fixed: Leaves) -> tuple[Rules, Leaves]:
        assert rules.differentiated is not None
        swap = rules.differentiated
        found: list[Rules] = []

        def more(fixed: Leaves) -> Leaves:
            inner, like = swap(fixed)
            found.append(inner)
            return tuple(like)

        like = jax.vmap(more, (of_fixed,))(fixed)
        return _batched(found[0], *flags), like

    return Rules(
        apply,
        slope,
        rules.transpose and transpose,
        rules.names,
        rules.differentiated and differentiated,
    )


def _batch(args: Leaves, dims: Leaves, *, rules: Rules, results: int, operands: int) -> Any:
    pairs = list(zip(args, dims, strict=True))
    size = next(a.shape[d] for a, d in pairs if d is not None)
    moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in pairs]
    flags = [d is not None for d in dims]
    for n in range(results):
        if not flags[n]:
            moved[n] = jnp.broadcast_to(moved[n], (size, *jnp.shape(moved[n])))
    _, fixed, given = _parts(flags, results, operands)
    over = _batched(rules, tuple(fixed), tuple(given))
    return _op.bind(*moved, rules=over, results=results, operands=operands), [0] * results


batching.primitive_batchers[_op] = _batch

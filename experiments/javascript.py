"""A mask as a JavaScript function, translated from its jaxpr: the formula is written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "===", "ne": "!=="}
# `|0` wraps around as int32 does, and rounds a quotient toward 0.
_OPERATIONS = _COMPARED | {"add": "+", "sub": "-", "div": "/", "rem": "%"}
_FUNCTIONS = {"max": "Math.max", "min": "Math.min", "abs": "Math.abs", "sign": "Math.sign"}
_FUNCTIONS |= {"mul": "Math.imul"}
_LOGIC = {"and": ("&&", "&"), "or": ("||", "|"), "xor": ("!==", "^")}
_SAME = ("squeeze", "stop_gradient", "copy")


def javascript(build: Callable[..., Any], args: Sequence[Any], name: str) -> str:
    """The JavaScript function `(b, h, q, k, p) => boolean` of a mask.

    Args:
      build: makes the mask of `args`.
      args: integers, or arrays of integers or booleans: the parameters, in `p` of the function.
      name: the mask's name, for errors.

    Raises:
      NotImplementedError: for an operation without a translation.
    """

    def cell(values: Sequence[Any], b: Any, h: Any, q: Any, k: Any) -> Any:
        return build(*values)(b, h, q, k)

    here = np.int32(0)
    traced = jax.make_jaxpr(cell)([jnp.asarray(a) for a in args], here, here, here, here)
    lines: list[str] = []
    names = [f"p[{i}]" for i in range(len(args))] + ["b", "h", "q", "k"]
    (out,) = _inline(traced.jaxpr, [*map(_constant, traced.consts), *names], lines, name)
    return f"(b, h, q, k, p) => {{ {' '.join(lines)} return !!{out}; }}"


def _constant(value: Any) -> str:
    return str(np.asarray(value).tolist()).replace("True", "true").replace("False", "false")


def _inline(jaxpr: Any, given: Sequence[str], lines: list[str], name: str) -> list[str]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))

    def read(at: Any) -> str:
        return _constant(at.val) if isinstance(at, Literal) else env[at]

    for step in jaxpr.eqns:
        args = [read(at) for at in step.invars]
        if (inner := step.params.get("jaxpr")) is not None:
            results = _inline(inner.jaxpr, [*map(_constant, inner.consts), *args], lines, name)
            env.update(zip(step.outvars, results, strict=True))
            continue
        result = f"v{len(lines)}"
        lines.append(f"const {result} = {_expression(step, args, name)};")
        env[step.outvars[0]] = result
    return [read(at) for at in jaxpr.outvars]


def _expression(step: Any, args: list[str], name: str) -> str:
    operation, given, made = step.primitive.name, step.invars[0].aval, step.outvars[0].aval
    if all(size == 1 for size in made.shape) and made.dtype in (jnp.int32, jnp.bool_):
        if operation in _OPERATIONS:
            said = f"({args[0]} {_OPERATIONS[operation]} {args[1]})"
            return said if operation in _COMPARED else f"{said} | 0"
        if operation in _FUNCTIONS:
            return f"{_FUNCTIONS[operation]}({', '.join(args)}) | 0"
        if operation in _LOGIC:
            return f"{args[0]} {_LOGIC[operation][made.dtype != jnp.bool_]} {args[1]}"
        if operation == "not":
            return f"{'!' if made.dtype == jnp.bool_ else '~'}{args[0]}"
        if operation == "neg":
            return f"-{args[0]} | 0"
        if operation == "select_n" and len(args) == 3:
            return f"{args[0]} ? {args[2]} : {args[1]}"
        if operation == "convert_element_type" and given.dtype in (jnp.int32, jnp.bool_):
            return f"{'!!' if made.dtype == jnp.bool_ else '+'}{args[0]}"
        if operation == "dynamic_slice":
            # An index beyond the array is clamped, as in JAX.
            array = args[0]
            for start in args[1:]:
                array = f"at({array}, {start})"
            return array
        if operation in _SAME:
            return args[0]
    raise NotImplementedError(
        f"{name}: got the operation {operation} ({given} to {made}), expected one that "
        "experiments/javascript.py translates; add it there"
    )

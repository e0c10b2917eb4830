"""A mask as a program that JavaScript runs, translated from the library's own trace of it.

The formula is written once, in Python. `mask.why` reads the same steps, so that the page can say
which comparison decided a pair, with its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import Mask, Positions
from jaxattn.tracing.canonical import canonicalize
from jaxattn.tracing.dependence import signature_of, trace_signature
from jaxattn.tracing.hashing import Const
from jaxattn.tracing.labels import labels
from jaxattn.tracing.program import needed
from jaxattn.views.why import title

# The operations of `formula.js` on int32 and booleans.
_OPERATIONS = frozenset(
    "abs add clamp div eq ge gt le lt max min mul ne neg rem select_n sign sub".split()  # noqa: SIM905
)
# What JavaScript writes otherwise for booleans than for integers.
_LOGIC = ("and", "or", "xor", "not")
_SAME = ("broadcast_in_dim", "reshape", "squeeze", "stop_gradient")
_HERE = np.zeros((), np.int32)


def program(mask: Mask, parameters: Sequence[int | None]) -> dict[str, Any]:
    """The steps of a mask, as JSON.

    A value is named by its index: first b, h, q and k, then the mask's arrays and numbers, then
    constants, then one value a step.

    Args:
      mask: a mask.
      parameters: for each leaf of the mask, the index of the parameter that it is; None for a leaf
        that stays as it is.

    Returns:
      title: what `mask.why` calls it.
      inputs: the names of the inputs.
      leaves: for each leaf the index of its parameter, or its value in a list of one.
      constants: the numbers that the formula holds.
      steps: for each step its operation and the indices of its arguments.
      out: the index of the result.
      reads: for each axis of a leaf that is read at a bare position: what to call the leaf, its
        index, the axis, the position. It must have that many entries.
      tokens: how many queries and keys the mask is for; None where it serves any.

    Raises:
      NotImplementedError: for an operation without a translation.
    """
    name = title(mask)
    traced_mask = canonicalize(mask) if jax.tree_util.all_leaves([mask]) else mask
    at = Positions(b=_HERE, h=_HERE, q=_HERE, k=_HERE)
    traced = trace_signature(signature_of(traced_mask, at))
    code = traced.builder
    given = [*jax.tree.leaves(traced_mask), *code.captured]
    leaves = [
        [np.asarray(leaf).tolist()] if parameter is None else parameter
        for leaf, parameter in zip(given, [*parameters, *[None] * len(code.captured)], strict=True)
    ]
    steps = needed(code.steps, [traced.out])
    used = [ref for step in steps for ref in step.args] + [traced.out]
    constants = list(dict.fromkeys(ref for ref in used if isinstance(ref, Const)))
    index = {ref: i for i, ref in enumerate([*code.inputs, *constants])}
    index |= {step.outs[0]: len(index) + i for i, step in enumerate(steps)}
    required = getattr(mask, "required_length", lambda: None)
    return {
        "title": name,
        "inputs": [*"bhqk", *labels(traced_mask, own=True), *["an array"] * len(code.captured)],
        "leaves": leaves,
        "constants": [np.asarray(each.value).tolist() for each in constants],
        "steps": [
            [_operation(step, code, name), *(index[ref] for ref in step.args)] for step in steps
        ],
        "out": index[traced.out],
        "reads": [
            [traced.label(read.array), index[read.array] - 4, read.axis, read.position]
            for read in dict.fromkeys(code.axis_reads)
        ],
        "tokens": required(),
    }


def _operation(step: Any, code: Any, name: str) -> str:
    operation: str = step.prim.name
    args, made = [code.type(arg) for arg in step.args], code.type(step.outs[0])
    if made.dtype in (jnp.int32, jnp.bool_):
        if operation == "read" and step.params["axes"] == tuple(range(len(step.args) - 1)):
            return operation
        if made.shape == () and all(arg.shape == () for arg in args):
            boolean = made.dtype == jnp.bool_
            if operation in _LOGIC:
                return operation if boolean else f"{operation}_int"
            if operation == "convert_element_type" and args[0].dtype in (jnp.int32, jnp.bool_):
                return "to_bool" if boolean else "to_int"
            if operation in _SAME:
                return "same"
            if operation in _OPERATIONS:
                return operation
    raise NotImplementedError(
        f"{name}: got the operation {operation} ({', '.join(map(str, args))} to {made}), expected "
        "one that experiments/javascript.py translates; add it there and to page/formula.js"
    )

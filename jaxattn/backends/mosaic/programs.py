"""The operations of residues of masks and scores that Mosaic GPU can compile."""

from __future__ import annotations

from ...tracing.program import Program
from ..flash import programs
from ..flash.programs import SAME

# Operations that Mosaic GPU compiles on tiles, with one warpgroup to a tile.
OPERATIONS = SAME | {
    "abs",
    "add",
    "add_any",
    "and",
    "clamp",
    "convert_element_type",
    "cos",
    "div",
    "eq",
    "exp",
    "exp2",
    "ge",
    "gt",
    "integer_pow",
    "le",
    "log",
    "log2",
    "logistic",
    "lt",
    "max",
    "min",
    "mul",
    "ne",
    "neg",
    "not",
    "one_minus_square",
    "or",
    "rem",
    "round",
    "rsqrt",
    "select_n",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "sign",
    "sin",
    "sqrt",
    "square",
    "sub",
    "tanh",
    "xor",
}


def unsupported(program: Program) -> str | None:
    """What in a program can't be evaluated in a kernel, or None."""
    return programs.unsupported(program, OPERATIONS, "Mosaic")

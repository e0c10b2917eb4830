"""The explorer: one page, without network, on which masks are chosen, combined and asked."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from javascript import program
from jax.extend.core import Literal

from jaxattn import Mask, masks

PAGE = Path(__file__).with_name("page")
NAMES = {"jax": jax, "jnp": jnp, "masks": masks}
IDS = [0] * 5 + [1] * 7 + [2] * 4
GLOBAL = [i in (0, 8) for i in range(16)]


class Parameter(NamedTuple):
    """A number, or a list of numbers or booleans, one a token."""

    name: str
    start: int | list[int] | list[bool]  # what the page begins with
    least: int = 0  # of a number


class Part(NamedTuple):
    """A mask that the page offers."""

    code: str  # Python; `{name}` stands for a parameter, `{choice}` for one of the choices
    parameters: tuple[Parameter, ...] = ()
    choices: tuple[str, ...] = ("",)  # Python, for what is computed before the page is made
    note: str = ""

    def build(self, choice: str, *values: Any) -> Mask:
        """The mask, with these parameters."""
        names = [parameter.name for parameter in self.parameters]
        code = self.code.format(choice=choice, **{name: name for name in names})
        mask: Mask = eval(code, NAMES | dict(zip(names, values, strict=True)))
        return mask


# Of what is computed from arrays, and is no formula of positions.
MADE = "was computed by JAX when the page was made"
IDS_OF_TOKENS = Parameter("ids", IDS)
LENGTHS = Parameter("lengths", 12)
PARTS = {
    "causal": Part("masks.causal()"),
    "causal(offset)": Part("masks.causal({offset})", (Parameter("offset", 4, -(2**31 - 1)),)),
    "sliding_window": Part(
        "masks.sliding_window({left}, {right})", (Parameter("left", 3), Parameter("right", 0))
    ),
    "prefix_lm": Part("masks.prefix_lm({lengths})", (Parameter("lengths", 5),)),
    "segments": Part("masks.segments({ids})", (IDS_OF_TOKENS,)),
    "key_padding": Part("masks.key_padding(lengths={lengths})", (LENGTHS,)),
    "key_padding(valid)": Part(
        "masks.key_padding({valid})", (Parameter("valid", [i >= 3 for i in range(16)]),)
    ),
    "query_padding": Part("masks.query_padding(lengths={lengths})", (LENGTHS,)),
    "chunked": Part("masks.chunked({size})", (Parameter("size", 4, 1),)),
    "dilated": Part("masks.dilated({rate})", (Parameter("rate", 4, 1),)),
    "global_tokens": Part("masks.global_tokens({n})", (Parameter("n", 2),)),
    "global_tokens(flags)": Part("masks.global_tokens({flags})", (Parameter("flags", GLOBAL),)),
    "neighborhood": Part(
        "masks.neighborhood({choice})",
        choices=(
            "(4, 4), 1",
            "(2, 8), (0, 2)",
            "(8, 8), 1",
            "(8, 8), (1, 2)",
            "(4, 4, 4), 1",
            "(4, 4), 1, prefix=1",
            "(8, 8), 1, tile=(2, 2)",
        ),
    ),
    "block_sparse": Part(
        "masks.block_sparse({choice}, {block})",
        (Parameter("block", 4, 1),),
        (
            "(jnp.arange(4)[:, None] + jnp.arange(4)[None, :]) % 3 == 0",
            "jnp.eye(8, dtype=bool)",
            "jnp.tri(16, dtype=bool)",
        ),
        "Positions beyond the table use its last row or column.",
    ),
    "random_blocks": Part(
        "masks.random_blocks({choice})",
        choices=tuple(
            f"jax.random.key({seed}), 2, 4, {tokens}" for tokens in (16, 64) for seed in (0, 1)
        ),
        note=f"The table of random blocks {MADE}.",
    ),
    "tree": Part(
        "masks.tree({choice})",
        choices=(
            "(jnp.arange(16) - 1) // 2",
            "(jnp.arange(64) - 1) // 2",
            "jnp.maximum(jnp.arange(16) - 3, -1)",
            "jnp.array([-1, 0, 0, -1, 3, 3]), ids=jnp.arange(16) // 3",
        ),
        note=f"The depth-first order of the nodes {MADE}.",
    ),
    "spans": Part(
        "masks.spans({choice})",
        choices=(
            "jnp.array([-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1, 1, 1, -1, -1, -1])",
            "jnp.arange(64) // 16",
        ),
        note=f"The ends of the spans {MADE}.",
    ),
    "top_blocks": Part(
        "masks.top_blocks({choice}, {count}, {block})",
        (Parameter("count", 2), Parameter("block", 2, 1)),
        tuple(f"jax.random.normal(jax.random.key({seed}), (8, 8))" for seed in (0, 1)),
        f"The ranks of the blocks {MADE}.",
    ),
    "shared_prefix": Part(
        "masks.shared_prefix({length}, {ids})", (Parameter("length", 5), IDS_OF_TOKENS)
    ),
    "block_diffusion": Part(
        "masks.block_diffusion({length}, {block})",
        (Parameter("length", 8, 1), Parameter("block", 2, 1)),
    ),
    "full": Part("masks.full()"),
    "empty": Part("masks.empty()"),
    "dense": Part(
        "masks.dense({choice})",
        choices=("jax.random.bernoulli(jax.random.key(0), 0.3, (16, 16))",),
        note="An array: it has no formula.",
    ),
    "from_array": Part(
        "masks.from_array({choice})",
        choices=('1 - jnp.tri(16), "ignore"', "jnp.tri(16, dtype=bool), 'attend'"),
        note="An array: it has no formula.",
    ),
    "predicate": Part(
        "masks.predicate({choice})",
        choices=(
            "lambda b, h, q, k: (q & k) == k",
            "lambda b, h, q, k: jnp.abs(q - k) < 3",
            "lambda b, h, q, k: (q ^ k) % 3 == 0",
        ),
    ),
}
# Masks of the gallery that the page does not offer, and why.
LEFT_OUT = {"per_head": "the page shows one head"}


def traced(part: Part, choice: str) -> tuple[Mask, list[int | None]]:
    """A mask, and for each of its leaves the index of the parameter that it is, if one."""
    starts = [parameter.start for parameter in part.parameters]
    # With a dtype of their own, so that the constructors do not convert them.
    values = [jnp.asarray(each, jnp.asarray(each).dtype) for each in starts]
    mask = part.build(choice, *values)

    def leaves(*given: Any) -> list[Any]:
        return jax.tree.leaves(part.build(choice, *given))

    made = jax.make_jaxpr(leaves)(*values).jaxpr
    order = {var: i for i, var in enumerate(made.invars)}
    return mask, [None if isinstance(out, Literal) else order.get(out) for out in made.outvars]


def part_as_json(name: str) -> dict[str, Any]:
    """A mask of the page, with a program for each of its choices."""
    part = PARTS[name]
    return {
        "code": part.code,
        "note": part.note,
        "choices": part.choices,
        "parameters": [parameter._asdict() for parameter in part.parameters],
        "programs": {choice: program(*traced(part, choice)) for choice in part.choices},
    }


@cache
def formula() -> str:
    """The part of the page's script that needs no browser."""
    parts = json.dumps({name: part_as_json(name) for name in PARTS}, separators=(",", ":"))
    # A script ends at the first `</`, wherever it stands.
    parts = parts.replace("</", "<\\/")
    return f"const PARTS = {parts};\n{(PAGE / 'formula.js').read_text(encoding='utf-8')}"


def page() -> str:
    """The page, with the masks translated to JavaScript."""
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    for mark, text in (
        ("/*STYLE*/", (PAGE / "page.css").read_text(encoding="utf-8")),
        ("/*FORMULA*/", formula()),
        ("/*PAGE*/", (PAGE / "page.js").read_text(encoding="utf-8")),
    ):
        html = html.replace(mark, text)
    return html

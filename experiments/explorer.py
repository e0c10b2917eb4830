"""The explorer: one page, without network, on which masks are chosen, combined and asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from javascript import javascript

from jaxattn import masks

TEMPLATE = Path(__file__).with_name("explorer.html")
IDS = [0] * 5 + [1] * 7 + [2] * 4


class Part(NamedTuple):
    """A mask that the page offers."""

    build: Callable[..., Any]
    code: str  # `{name}` stands for the parameter
    defaults: dict[str, Any]  # a list is an id per token


PARTS = {
    "causal": Part(masks.causal, "masks.causal({offset})", {"offset": 0}),
    "sliding_window": Part(
        masks.sliding_window, "masks.sliding_window({left}, {right})", {"left": 3, "right": 0}
    ),
    "prefix_lm": Part(masks.prefix_lm, "masks.prefix_lm({lengths})", {"lengths": 5}),
    "segments": Part(masks.segments, "masks.segments(jnp.array({ids}))", {"ids": IDS}),
    "key_padding": Part(
        lambda n: masks.key_padding(lengths=n),
        "masks.key_padding(lengths={lengths})",
        {"lengths": 12},
    ),
    "query_padding": Part(
        lambda n: masks.query_padding(lengths=n),
        "masks.query_padding(lengths={lengths})",
        {"lengths": 12},
    ),
    "chunked": Part(masks.chunked, "masks.chunked({size})", {"size": 4}),
    "dilated": Part(masks.dilated, "masks.dilated({rate})", {"rate": 4}),
    "global_tokens": Part(masks.global_tokens, "masks.global_tokens({n})", {"n": 2}),
    "shared_prefix": Part(
        masks.shared_prefix,
        "masks.shared_prefix({length}, jnp.array({ids}))",
        {"length": 4, "ids": IDS},
    ),
    "full": Part(masks.full, "masks.full()", {}),
    "empty": Part(masks.empty, "masks.empty()", {}),
}


def page() -> str:
    """The page, with the masks translated to JavaScript."""
    parts = []
    for name, part in PARTS.items():
        values = [jnp.asarray(value) for value in part.defaults.values()]
        see = javascript(part.build, values, name)
        said = json.dumps({"code": part.code, "defaults": part.defaults})
        parts.append(f"{name}: {{...{said}, see: {see}}}")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*PARTS*/", ",\n".join(parts))

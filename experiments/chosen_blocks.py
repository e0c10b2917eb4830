"""Attention that chooses its blocks by the data: does it learn, and what does it cost?

    python experiments/chosen_blocks.py

The first half of a row holds facts, pairs of a name and a colour. The second half asks for the
colours of names; each block of questions is about one block of facts. A window around the question
cannot see its answer. Blocks are chosen as in MoBA (arXiv 2502.13189), by the products of mean
queries and mean keys, here for a whole block of queries, so that tiles can be skipped. One layer is
trained with all of the past, with a window, and with several numbers of chosen blocks. Then the
attention of longer rows is timed under the same masks.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxattn as ja
from jaxattn import masks
from jaxattn.shapes import Array, Float, Int

HERE = Path(__file__).parent
Params = dict[str, Array]


@dataclass(frozen=True)
class Config:
    """Training and timing with blocks chosen by the data."""

    out: Path = HERE / "results" / "chosen_blocks"
    steps: int = 120
    batch: int = 4
    test: int = 32  # rows on which accuracy is measured
    length: int = 1024  # tokens in a row: 8 blocks of facts, 8 of questions
    block: int = 64
    names: int = 1024  # twice as many as a row has facts
    colours: int = 16  # guessing is right one time in 16
    heads: int = 2
    head_dim: int = 64
    learning_rate: float = 3e-3
    counts: tuple[int, ...] = (1, 2, 4)  # blocks chosen besides the query's own
    seed: int = 0
    timed_length: int = 8192
    timed_block: int = 512  # as large as the largest tiles on CPU
    timed_heads: int = 8
    turns: int = 5


class Row(NamedTuple):
    """Rows of facts, then of questions; a question has no colour, and only its answer counts."""

    names: Int[Array, "B T"]
    colours: Int[Array, "B T"]  # `Config.colours` where it is asked for
    answers: Int[Array, "B half"]


@partial(jax.jit, static_argnums=(0, 2))
def drawn(config: Config, key: Array, rows: int) -> Row:
    """Rows of which every block of questions asks for the names of one block of facts, shuffled."""
    half, block = config.length // 2, config.block

    def row(key: Array) -> Row:
        for_names, for_colours, for_blocks, for_order = jax.random.split(key, 4)
        names = jax.random.permutation(for_names, config.names)[:half]
        colours = jax.random.randint(for_colours, (half,), 0, config.colours)
        asked = jax.random.permutation(for_blocks, half // block)
        order = jax.random.permutation(
            for_order, jnp.tile(jnp.arange(block), (half // block, 1)), axis=1, independent=True
        )
        at = (asked[:, None] * block + order).reshape(-1)
        return Row(
            jnp.concatenate([names, names[at]]),
            jnp.concatenate([colours, jnp.full(half, config.colours)]),
            colours[at],
        )

    return jax.vmap(row)(jax.random.split(key, rows))


# ---------------------------------------------------------------------------------------- the masks


def scores_of_blocks(
    query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], block: int
) -> Float[Array, "B N blocks blocks"]:
    """Products of mean queries and mean keys, -inf where a block is not in the past."""
    B, T, N, H = query.shape
    pooled = [x.reshape(B, T // block, block, N, H).mean(2) for x in (query, key)]
    past = jnp.tri(T // block, k=-1, dtype=bool)
    return jnp.where(past, jnp.einsum("bqnh,bknh->bnqk", *pooled), -jnp.inf)


def chosen(scores: Float[Array, "B N blocks blocks"], count: Any, block: int) -> ja.Mask:
    """The past within a query's own block, and `count` earlier blocks."""
    return masks.causal() & (masks.chunked(block) | masks.top_blocks(scores, count, block))


def mask_of(sees: str, count: Any, q: Array, k: Array, block: int) -> ja.Mask:
    """The mask that a contestant trains and runs with."""
    if sees == "all":
        return masks.causal()
    if sees == "window":
        # As many keys as one chosen block and the query's own hold.
        return masks.sliding_window(2 * block - 1)
    return chosen(scores_of_blocks(q, k, block), count, block)


# ---------------------------------------------------------------------------------------- the model


def start(config: Config, key: Array) -> Params:
    """Weights of one layer."""
    D, inner = config.head_dim, config.heads * config.head_dim
    shapes = {
        "names": (config.names, D),
        "colours": (config.colours + 1, D),
        "query": (D, inner),
        "key": (D, inner),
        "value": (D, inner),
        "out": (inner, config.colours),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(each, shape) * (1 if name in ("names", "colours") else D**-0.5)
        for (name, shape), each in zip(shapes.items(), keys, strict=True)
    }


def logits_of(
    config: Config, params: Params, row: Row, sees: str, count: Any
) -> Float[Array, "B half colours"]:
    """Logits of the colours that are asked for."""
    B, T = row.names.shape
    name, colour = params["names"][row.names], params["colours"][row.colours]
    q, k, v = (
        (x @ params[which]).reshape(B, T, config.heads, config.head_dim)
        for x, which in ((name, "query"), (name, "key"), (colour, "value"))
    )
    out = ja.attention(q, k, v, mask=mask_of(sees, count, q, k, config.block))
    return out.reshape(B, T, -1)[:, T // 2 :] @ params["out"]


def _optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adam(config.learning_rate)


@partial(jax.jit, static_argnums=(0, 1))
def train_step(
    config: Config, sees: str, count: Any, params: Params, state: Any, key: Array
) -> tuple[Params, Any, Float[Array, ""]]:
    """One step of Adam on new rows."""
    row = drawn(config, key, config.batch)

    def loss(params: Params) -> Array:
        logits = logits_of(config, params, row, sees, count)
        return optax.softmax_cross_entropy_with_integer_labels(logits, row.answers).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = _optimizer(config).update(gradient, state)
    return optax.apply_updates(params, updates), state, value


@partial(jax.jit, static_argnums=(0, 1))
def accuracy(config: Config, sees: str, count: Any, params: Params, row: Row) -> Float[Array, ""]:
    """The share of questions that are answered right."""
    logits = logits_of(config, params, row, sees, count)
    return jnp.mean(logits.argmax(-1) == row.answers)


def contestants(counts: tuple[int, ...]) -> dict[str, tuple[str, int]]:
    """Names of contestants, what they see, and how many blocks they choose."""
    return {"all of the past": ("all", 0), "window": ("window", 0)} | {
        f"{count} chosen": ("chosen", count) for count in counts
    }


def learn(config: Config, sees: str, count: int) -> float:
    """The accuracy of a model on new rows, after training. One program serves all counts."""
    key = jax.random.key(config.seed)
    params = start(config, key)
    state = _optimizer(config).init(params)
    for step in range(config.steps):
        given = jax.random.fold_in(key, step)
        params, state, _ = train_step(config, sees, count, params, state, given)
    test = drawn(config, jax.random.fold_in(key, config.steps), config.test)
    return float(accuracy(config, sees, count, params, test))


# ----------------------------------------------------------------------------------------- the cost


@partial(jax.jit, static_argnums=(0, 1))
def forward_and_backward(
    sees: str, block: int, count: Any, q: Array, k: Array, v: Array
) -> tuple[Array, Array, Array]:
    """Gradients of attention, the choice of blocks included."""

    def total(q: Array, k: Array, v: Array) -> Array:
        return ja.attention(q, k, v, mask=mask_of(sees, count, q, k, block), backend="tiled").sum()

    return jax.grad(total, (0, 1, 2))(q, k, v)


def cost(config: Config) -> dict[str, dict[str, float]]:
    """For each contestant, the share of pairs in tiles that are computed, and the median seconds.

    Contestants are timed in turn, each after a call of its own that is not timed.
    """
    shape = (1, config.timed_length, config.timed_heads, config.head_dim)
    q, k, v = jax.random.normal(jax.random.key(config.seed), (3, *shape))
    block, given = config.timed_block, contestants(config.counts)
    seconds: dict[str, list[float]] = {name: [] for name in given}
    for _ in range(config.turns):
        for name, (sees, count) in given.items():
            for timed in (False, True):
                begin = time.perf_counter()
                jax.block_until_ready(forward_and_backward(sees, block, count, q, k, v))
                if timed:
                    seconds[name].append(time.perf_counter() - begin)
    found = {}
    for name, (sees, count) in given.items():
        tiles = ja.tile_map(mask_of(sees, count, q, k, block), q.shape, k.shape)
        computed = float(np.mean(np.asarray(tiles.states) > 0))
        found[name] = {"pairs": computed, "seconds": statistics.median(seconds[name])}
    return found


def main(config: Config) -> None:
    """Trains, times, and prints one table."""
    console = Console()
    if config.length % (2 * config.block) or config.timed_length % config.timed_block:
        raise SystemExit("length: expected a multiple of 2 * block; timed_length: of timed_block")
    begin = time.monotonic()
    given = contestants(config.counts)
    learned = {
        name: learn(config, *what)
        for name, what in track(
            given.items(), "training", console=console, disable=not console.is_terminal
        )
    }
    costs = cost(config)
    table = Table(
        "sees",
        "accuracy",
        "pairs computed",
        "forward and backward",
        title=f"accuracy at {config.length} tokens, cost at {config.timed_length}",
    )
    for name, right in learned.items():
        pairs, seconds = costs[name]["pairs"], costs[name]["seconds"]
        table.add_row(name, f"{right:.1%}", f"{pairs:.1%}", f"{1000 * seconds:.0f} ms")
    console.print(table, highlight=False)
    console.print(f"the whole run took {time.monotonic() - begin:.0f} s", highlight=False)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "chosen_blocks.json"
    settings = asdict(config) | {"out": str(config.out)}
    content = {"config": settings, "accuracy": learned, "cost": costs}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    console.print(str(path), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

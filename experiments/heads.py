"""What the heads of a pretrained model look at, and how few of its keys they need.

    python experiments/heads.py                  # every head of SmolLM2 on a text, as a picture
    python experiments/heads.py cache            # perplexity with a half and a quarter of the cache
    python experiments/heads.py cache --shares 0.1 --seeds 1

The first is one forward pass: statistics come with the output of each layer, and no weights are
formed. A head is called a sink if it puts most of its weight on the first tokens, and local if it
puts most of it on the last ones. The second feeds a text chunk by chunk to caches which forget all
but a share of its tokens after each chunk. README.md has the measured results.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import llama
import numpy as np
import tyro
from command import command
from data import DataError
from flax import nnx
from forgetting import FirstAndLast, FirstAndRandom, Forgetting, HeavyHitters, LatelyHeavy, Random
from generate import FIRST
from llama import Caches, Loaded
from measure_chat import long_text, losses_of
from pictures import draw_heat_maps
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxattn as ja
from jaxattn import masks, stats
from jaxattn.pytrees import pytree
from jaxattn.shapes import Array, Float, Int

NAME = "heads.py"
OUT = Path(__file__).parent / "results" / "heads"

Kind = Literal["whole", "received", "lately", "window", "random", "random-first"]
FORGETTING: dict[Kind, tuple[type[Forgetting], str]] = {
    "received": (HeavyHitters, "half that received most, half the last"),
    "lately": (LatelyHeavy, "half that received most lately, half the last"),
    "window": (FirstAndLast, f"the first {FIRST}, and the last"),
    "random": (Random, "half at random, half the last"),
    "random-first": (FirstAndRandom, f"the same, and the first {FIRST}"),
}


@dataclass(frozen=True)
class Heads:
    """What each head of a pretrained model looks at."""

    model: Path | None = None  # a GGUF file of a Llama; else SmolLM2-135M-Instruct
    tokens: int = 4096  # of Python's reference
    first: int = FIRST  # tokens that count as the first ones
    last: int = 64  # tokens that count as the last ones, a query's own included
    share: float = 0.5  # of the weight that makes a head a sink, or local
    out: Path = OUT  # where the picture and the numbers go


@dataclass(frozen=True)
class FixedSize:
    """Perplexity from caches that forget all but a share of the text."""

    model: Path | None = None  # a GGUF file of a Llama; else SmolLM2-135M-Instruct
    tokens: int = 4096  # of Python's reference
    shares: tuple[float, ...] = (0.5, 0.25)  # of the tokens that a cache keeps
    chunk: int = 64  # tokens after which it forgets
    kinds: tuple[Kind, ...] = get_args(Kind)  # which caches
    seeds: int = 3  # of random choices


# ------------------------------------------------------------------------------------------ heads


@pytree
class Watched(ja.KVCache):
    """A cache that keeps statistics of the last step's weights.

    Attributes:
      asked: a pytree of statistics.
      seen: their values.
    """

    asked: Any = None
    seen: Any = None

    def step(self, *given: Any, **options: Any) -> Any:
        (out, seen), after = super().step(*given, stats=self.asked, **options)
        return out, replace(after, seen=seen)


@partial(jax.jit, static_argnames="graph")
def heads_of(
    graph: Any, params: Any, tokens: Int[Array, "1 T"], first: Any, last: Any
) -> dict[str, Float[Array, "layers N"]]:
    """For each head of each layer, means over a text's tokens, and its largest logit.

    Args:
      graph, params: of a model, as `nnx.split` gives them.
      tokens: of the text.
      first, last: how many tokens count as the first and as the last ones.
    """
    asked = {
        "entropy": stats.entropy(),
        "distance": stats.mean(lambda x, b, h, q, k: q - k),
        "first": stats.mass(masks.predicate(lambda b, h, q, k, n: k < n, first)),
        "last": stats.mass(masks.sliding_window(last - 1)),
        "largest logit": stats.max(),
    }

    def make(heads: int, head_dim: int) -> Watched:
        empty = Watched.create(1, tokens.shape[1], heads, head_dim)
        return replace(empty, asked=asked)

    model = nnx.merge(graph, params)
    _, caches = model.proceed(tokens, model.caches(make))
    layers = [cache.seen for cache in caches]  # of dicts of [1, T, N]
    return {name: jnp.stack([reduced(name, seen[name][0]) for seen in layers]) for name in asked}


def reduced(name: str, found: Float[Array, "T N"]) -> Float[Array, "N"]:
    """A statistic of all queries as one number for each head."""
    return found.max(0) if name == "largest logit" else found.mean(0)


def run_heads(config: Heads, console: Console) -> None:
    loaded = llama.pretrained(config.model)
    ids = long_text(loaded, config.tokens)
    graph, params = nnx.split(loaded.model)
    started = time.monotonic()
    with console.status("one forward pass"):
        found = heads_of(graph, params, jnp.asarray([ids[:-1]]), config.first, config.last)
        jax.block_until_ready(found)
    seconds = time.monotonic() - started
    titles = {
        "entropy": "entropy, nats",
        "distance": "distance, tokens",
        "first": f"weight on the first {config.first} tokens",
        "last": f"weight on the last {config.last} tokens",
        "largest logit": "largest logit",
    }
    # In the order of the titles: `jit` returns dicts in alphabetical order.
    maps = {name: np.asarray(found[name]) for name in titles}
    is_sink, is_local = (maps[name] > config.share for name in ("first", "last"))
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "heads.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["layer", "head", *maps])
        for at in np.ndindex(is_sink.shape):
            rows.writerow([*at, *(f"{each[at]:.6g}" for each in maps.values())])
    draw_heat_maps(config.out / "heads.png", {titles[name]: each for name, each in maps.items()})
    kinds = np.where(is_sink, "sink", np.where(is_local, "local", "neither"))
    names = {**titles, "first": f"first {config.first}", "last": f"last {config.last}"}
    title = "means of each kind of head; first, last: the weight there"
    grid = Table("heads", "number", *(names[name].split(",")[0] for name in maps), title=title)
    for kind in ("sink", "local", "neither"):
        mine = kinds == kind
        means = (f"{each[mine].mean():.2f}" if mine.any() else "" for each in maps.values())
        grid.add_row(kind, f"{mine.sum()} of {mine.size}", *means)
    console.print(grid)
    console.print("layer by layer, a sign for each head: S a sink, L local", highlight=False)
    for layer, row in enumerate(kinds):
        signs = " ".join({"sink": "S", "local": "L", "neither": "."}[kind] for kind in row)
        console.print(f"{layer:4}  {signs}", highlight=False)
    where = np.unravel_index(maps["largest logit"].argmax(), kinds.shape)
    console.print(
        f"{config.tokens:,} tokens in {seconds:.0f} s, with what compiles; the largest logit is "
        f"{maps['largest logit'][where]:.1f}, of head {where[1]} in layer {where[0]}\n"
        f"{config.out / 'heads.png'}, heads.csv",
        highlight=False,
        soft_wrap=True,
    )


# ----------------------------------------------------------------------------------------- caches


def forgetting(
    loaded: Loaded, kind: type[Forgetting], budget: int, chunk: int, seed: int
) -> Caches:
    """Caches of a kind for all layers, each with a key of its own."""
    keys = iter(jax.random.split(jax.random.key(seed), loaded.model.config.layers))
    return loaded.model.caches(lambda **size: kind.made(budget, chunk, next(keys), **size))


def run_fixed_size(config: FixedSize, console: Console) -> None:
    if config.tokens % (2 * config.chunk):
        raise DataError(f"--tokens {config.tokens}: expected a multiple of 2 x --chunk")
    budgets = [round(share * config.tokens) for share in config.shares]
    if not all(FIRST < budget <= config.tokens for budget in budgets):
        raise DataError(f"--shares: expected more than {FIRST} tokens, and at most all")
    loaded = llama.pretrained(config.model)
    ids = long_text(loaded, config.tokens)
    # What is kept, its name, and caches for each seed.
    runs: list[tuple[int, str, list[Callable[[], Caches]]]] = []
    if "whole" in config.kinds:
        whole = partial(ja.KVCache.create, 1, config.tokens)
        runs.append((config.tokens, "all", [partial(loaded.model.caches, whole)]))
    for budget in budgets:
        for name in (name for name in FORGETTING if name in config.kinds):
            kind, label = FORGETTING[name]
            make = partial(forgetting, loaded, kind, budget, config.chunk)
            seeds = range(config.seeds if issubclass(kind, Random) else 1)
            runs.append((budget, label, [partial(make, seed) for seed in seeds]))
    half = config.tokens // 2
    grid = Table("tokens kept", "which", "perplexity", f"of the last {half:,}", "seconds")
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for budget, label, makes in runs:
            task = bar.add_task(f"{budget:,}: {label}", total=len(makes) * config.tokens)
            started = time.monotonic()
            losses = [
                losses_of(loaded, ids, make(), config.chunk, partial(bar.advance, task))
                for make in makes
            ]
            seconds = (time.monotonic() - started) / len(makes)
            cells = (ranged([part[at:] for part in losses]) for at in (0, half))
            grid.add_row(f"{budget:,}", label, *cells, f"{seconds:.0f}")
    console.print(grid)


def ranged(losses: list[Float[np.ndarray, "T"]]) -> str:
    """A perplexity, or the mean and the range of several."""
    found = [math.exp(each.mean()) for each in losses]
    middle = f"{np.mean(found):.2f}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.2f} to {max(found):.2f})"


@command(NAME)
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    console = Console()
    if given[:1] == ["cache"]:
        run_fixed_size(tyro.cli(FixedSize, prog=f"{NAME} cache", args=given[1:]), console)
    else:
        run_heads(tyro.cli(Heads, prog=NAME, description=__doc__, args=given), console)


if __name__ == "__main__":
    llama.keep_programs()
    sys.exit(main())

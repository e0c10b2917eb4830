"""Trains small models with wrong masks, and shows which measure finds each fault.

    python experiments/mask_faults.py

Six masks (a right one and five faults) and four tasks: a small Transformer is trained on each
combination, with the fault in training and in evaluation, as with a real bug. Padding holds random
valid tokens, documents in a row contradict each other, and only the mask says what belongs
together, so no model can learn to avoid the effect of a wrong mask.
`ja.testing.assert_respects_mask` looks for each fault in the same models before they are trained.
Writes faults.png, tables.md (the tables of README.md) and faults.json (the values of every seed)
under `--out`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jaxattn as ja
from jaxattn import masks
from jaxattn.nn.linen import MultiHeadAttention
from jaxattn.shapes import Array, Bool, Float, Int

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

Params = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Train every task with every mask, and report the effect of each fault."""

    out: Path = Path(__file__).parent / "results" / "mask_faults"

    seeds: int = 3  # trained together, in one program
    steps: int = 500  # with the right mask all four tasks are solved by then
    batch: int = 32  # more small steps solve recall sooner than fewer large ones
    test: int = 512  # fresh rows; an accuracy is then known to about 0.01
    d_model: int = 32  # enough for all four tasks with the right mask
    layers: int = 2  # recall needs two: a key to its value, then a question to its key
    heads: int = 2
    learning_rate: float = 5e-3  # at its peak; the schedule ends at 0
    rows: int = 4  # in which leaks are searched, all of them at each position


# --------------------------------------------------------------------------------------- the tasks


class Batch(NamedTuple):
    """Rows of tokens, their labels, and what the model can know only from the mask."""

    tokens: Int[Array, "B T"]
    labels: Int[Array, "B T"]
    asked: Bool[Array, "B T"]  # which labels count
    ids: Int[Array, "B T"]  # documents; padding has the id of one, as in a packed row
    valid: Bool[Array, "B T"]  # False at padding


@dataclass(frozen=True)
class Task:
    """A source of fresh batches, `draw(key, B)`, and the mask that is right for it."""

    name: str
    draw: Callable[[Array, int], Batch]
    measures: str  # the key of the result that the table shows
    causal: bool = True
    packed: bool = True

    @property
    def faults(self) -> tuple[str, ...]:
        """The faults that are possible in this task; some need an order or documents."""
        wants = {"leaky look-ahead": self.causal, "off-by-one causal": self.causal}
        wants["no segment mask"] = self.packed
        return tuple(name for name in FAULTS if wants.get(name, True))


# The same for every task, so that one compiled program trains them all.
T = 24  # tokens in a row
V = 24  # different tokens


def draw_random(key: Array, rows: int) -> Batch:
    """Two documents of uniformly random tokens: nothing predicts the next, the loss is ln V."""
    keys = jax.random.split(key, 3)
    tokens = jax.random.randint(keys[0], (rows, T), 0, V)
    cut = jax.random.randint(keys[1], (rows, 1), 6, 12)
    length = jax.random.randint(keys[2], (rows, 1), 16, T + 1)
    at = jnp.arange(T)[None]  # [1, T]
    follows = (at + 1 < length) & (at + 1 != cut)  # the next token is real, of the same document
    return Batch(
        tokens, jnp.roll(tokens, -1, axis=1), follows, (at >= cut).astype(jnp.int32), at < length
    )


def draw_reverse(key: Array, rows: int) -> Batch:
    """A row to repeat backwards. Only the mask gives its length: padding looks like the row."""
    keys = jax.random.split(key, 2)
    tokens = jax.random.randint(keys[0], (rows, T), 0, V)
    # Four lengths: the best guess without the mask is right 2 times in 5 (late places tell).
    length = 6 + 4 * jax.random.randint(keys[1], (rows, 1), 0, 4)
    at = jnp.arange(T)[None]  # [1, T]
    mirrored = jnp.take_along_axis(tokens, jnp.clip(length - 1 - at, 0, T - 1), axis=1)
    return Batch(tokens, mirrored, at < length, jnp.zeros_like(tokens), at < length)


DOCUMENTS, PAIRS, KEYS = 3, 2, 2  # with their padding and their questions, 24 tokens


def draw_recall(key: Array, rows: int) -> Batch:
    """Three documents of key-value pairs, the same keys in each with other values; then questions.

    Questions, each a key of one document, come last and in random order: at the end of its
    document a question would be answered by the nearest pair, whatever the mask. A document has a
    pair of padding too, in any of its three places: one of its keys, with a wrong value.
    """

    def row(key: Array) -> Batch:
        keys = jax.random.split(key, 6)
        names = jax.random.permutation(keys[0], KEYS)[:PAIRS]
        # All values of a row differ, so that a wrong one is never right by luck.
        values = KEYS + jax.random.permutation(keys[1], V - KEYS)[: DOCUMENTS * (PAIRS + 1)]
        values = values.reshape(DOCUMENTS, PAIRS + 1)  # the last of each is padding's
        fake = names[jax.random.randint(keys[2], (DOCUMENTS, 1), 0, PAIRS)]
        named = jnp.concatenate([jnp.broadcast_to(names[None], (DOCUMENTS, PAIRS)), fake], axis=1)
        pairs = jnp.stack([named, values], axis=-1)  # [document, place, 2]
        real = jnp.broadcast_to(jnp.arange(PAIRS + 1)[None] < PAIRS, named.shape)
        order = jax.random.permutation(
            keys[3], jnp.broadcast_to(jnp.arange(PAIRS + 1)[None], named.shape), axis=1,
            independent=True,
        )  # fmt: skip
        pairs = jnp.take_along_axis(pairs, order[..., None], axis=1)
        real = jnp.take_along_axis(real, order, axis=1)
        asks = jax.random.permutation(keys[4], DOCUMENTS * PAIRS)
        document, pair = asks // PAIRS, asks % PAIRS
        asked = jnp.arange(pairs.size + asks.size) >= pairs.size
        return Batch(
            tokens=jnp.concatenate([pairs.reshape(-1), names[pair]]),
            labels=jnp.concatenate([jnp.zeros(pairs.size, jnp.int32), values[document, pair]]),
            asked=asked,
            ids=jnp.concatenate([jnp.repeat(jnp.arange(DOCUMENTS), 2 * (PAIRS + 1)), document]),
            valid=jnp.concatenate([jnp.repeat(real.reshape(-1), 2), jnp.ones(asks.size, bool)]),
        )

    return jax.vmap(row)(jax.random.split(key, rows))


HALF = 5  # tokens of a source, and of its copy
NOISE = 0.2  # of the source's tokens are wrong, so that the copy's own next token says more


def draw_copy(key: Array, rows: int) -> Batch:
    """Two documents, each a source and its copy; what is learned is the copy, given the source.

    The source is noisy, so the best honest answer is right 4 times in 5 (and by chance), told the
    truth so far or not. Padding stands on the left, on the right, or on both sides.
    """
    keys = jax.random.split(key, 5)
    copies = jax.random.randint(keys[0], (rows, 2, HALF), 0, V)
    wrong = jax.random.bernoulli(keys[1], NOISE, copies.shape)
    sources = jnp.where(wrong, jax.random.randint(keys[2], copies.shape, 0, V), copies)
    documents = jnp.concatenate([sources, copies], axis=2).reshape(rows, 4 * HALF)
    left = jax.random.randint(keys[3], (rows, 1), 0, 5)
    at = jnp.arange(T)[None] - left  # [B, T], from the first document's first token
    valid = (at >= 0) & (at < 4 * HALF)
    tokens = jnp.where(
        valid,
        jnp.take_along_axis(documents, jnp.clip(at, 0, 4 * HALF - 1), axis=1),
        jax.random.randint(keys[4], (rows, T), 0, V),
    )
    asked = valid & (at % (2 * HALF) >= HALF - 1) & (at % (2 * HALF) < 2 * HALF - 1)
    ids = (at >= 2 * HALF).astype(jnp.int32)
    return Batch(tokens, jnp.roll(tokens, -1, axis=1), asked, ids, valid)


TASKS = (
    Task("random tokens", draw_random, "excess"),
    Task("reverse", draw_reverse, "accuracy", causal=False, packed=False),
    Task("recall", draw_recall, "accuracy"),
    Task("copy", draw_copy, "gap"),
)


@partial(jax.jit, static_argnames=("task", "rows"))
def drawn(task: Task, key: Array, rows: int) -> Batch:
    return task.draw(key, rows)


# --------------------------------------------------------------------------------------- the masks

FAULTS = (
    "correct",
    "no padding mask",
    "leaky look-ahead",
    "off-by-one causal",
    "no segment mask",
    "inverted",
)


def mask_of(task: Task, fault: str, batch: Batch) -> ja.Mask:
    """The mask of a batch, with a fault or `"correct"`."""
    order = masks.causal() if task.causal else masks.full()
    document = masks.segments(batch.ids)
    padding = masks.key_padding(batch.valid)
    right = order & document & padding
    return {
        "correct": right,
        "no padding mask": order & document,
        "leaky look-ahead": document & padding,
        "off-by-one causal": masks.causal(1) & document & padding,
        "no segment mask": order & padding,
        "inverted": ~right,
    }[fault]


@partial(jax.jit, static_argnames=("task", "fault"))
def dense(task: Task, fault: str, batch: Batch) -> Bool[Array, "B 1 T T"]:
    """The mask as an array, so that one compiled program trains with all of them."""
    return mask_of(task, fault, batch).dense(T, T, batch=len(batch.tokens))


# --------------------------------------------------------------------------------------- the model


class Model(nn.Module):
    """Tokens to logits: pre-norm, learned positions, and any mask."""

    vocabulary: int
    d_model: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], mask: Any) -> Float[Array, "B T V"]:
        place = self.param("place", nn.initializers.normal(0.2), (tokens.shape[1], self.d_model))
        x = nn.Embed(self.vocabulary, self.d_model)(tokens) + place[None]
        for _ in range(self.layers):
            x = x + MultiHeadAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.d_model)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.d_model)(hidden)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def model_of(config: Config) -> Model:
    return Model(V, config.d_model, config.layers, config.heads)


@partial(jax.jit, static_argnames="config")
def start(config: Config, key: Array) -> Params:
    """Weights of a seed, the same for every task and every mask."""
    tokens = jnp.zeros((1, T), jnp.int32)
    return model_of(config).init(key, tokens, masks.full())["params"]


def mean_where(values: Array, where: Array) -> Float[Array, ""]:
    return jnp.sum(values * where) / jnp.sum(where)


def loss_and_accuracy(
    model: Model, params: Params, batch: Batch, mask: Bool[Array, "B 1 T T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy and accuracy over the labels that count."""
    logits = model.apply({"params": params}, batch.tokens, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    right = jnp.argmax(logits, axis=-1) == batch.labels
    return mean_where(losses, batch.asked), mean_where(right, batch.asked)


@partial(jax.jit, static_argnames="config")
def train(
    config: Config, keys: Array, batches: Batch, mask: Bool[Array, "steps seeds B 1 T T"]
) -> tuple[Params, Float[Array, "steps seeds"]]:
    """All seeds at once: their weights, and the losses on the way.

    Args:
      keys: one a seed, for the weights at the start.
      batches: every leaf `[steps, seeds, B, T]`.
    """
    model = model_of(config)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 10), config.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))

    def step(carry: tuple[Params, Any], data: tuple[Batch, Array]) -> tuple[Any, Array]:
        def one(params: Params, state: Any, batch: Batch, mask: Array) -> tuple[Any, Array]:
            def loss_of(params: Params) -> Array:
                return loss_and_accuracy(model, params, batch, mask)[0]

            loss, gradients = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.vmap(one)(*carry, *data)

    params = jax.vmap(partial(start, config))(keys)
    carry = params, jax.vmap(optimizer.init)(params)
    (params, _), losses = jax.lax.scan(step, carry, (batches, mask))
    return params, losses


@partial(jax.jit, static_argnames=("config", "next_token"))
def evaluate(
    config: Config,
    params: Params,
    batches: Batch,
    mask: Bool[Array, "seeds B 1 T T"],
    next_token: bool,
) -> dict[str, Float[Array, "seeds"]]:
    """For all seeds, on fresh rows: loss minus ln V, accuracy, and the loss of accuracy when the
    model reads its own answers."""
    model = model_of(config)

    def one(params: Params, batch: Batch, mask: Array) -> dict[str, Array]:
        loss, accuracy = loss_and_accuracy(model, params, batch, mask)
        cell = {"excess": loss - math.log(V), "accuracy": accuracy}
        if next_token:
            cell["gap"] = accuracy - free_running(model, params, batch, mask)
        return cell

    return jax.vmap(one)(params, batches, mask)


def free_running(
    model: Model, params: Params, batch: Batch, mask: Bool[Array, "B 1 T T"]
) -> Float[Array, ""]:
    """Accuracy where the model reads its own answers, in a buffer of zeros, not the truth."""
    # The token after a question is its answer, which is not known yet.
    answers = jnp.pad(batch.asked[:, :-1], ((0, 0), (1, 0)))

    def step(t: Array, tokens: Array) -> Array:
        token = jnp.argmax(model.apply({"params": params}, tokens, mask)[:, t], axis=-1)
        token = jnp.where(batch.asked[:, t], token.astype(tokens.dtype), tokens[:, t + 1])
        return tokens.at[:, t + 1].set(token)

    tokens = jax.lax.fori_loop(0, T - 1, step, jnp.where(answers, 0, batch.tokens))
    return mean_where(jnp.roll(tokens, -1, axis=1) == batch.labels, batch.asked)


def leak(config: Config, task: Task, fault: str, seed: Array) -> str | None:
    """The message of `assert_respects_mask` for the untrained model with this fault."""
    params, batch = start(config, seed), drawn(task, seed, config.rows)
    wrong, right = (dense(task, name, batch) for name in (fault, "correct"))

    def fn(tokens: Array) -> Array:
        return model_of(config).apply({"params": params}, tokens, wrong)

    try:
        ja.testing.assert_respects_mask(fn, batch.tokens, right, layers=config.layers)
    except AssertionError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------- the results

Cell = dict[str, list[float]]  # of one task and one fault: a value a seed


def experiment(config: Config, task: Task, faults: Sequence[str]) -> Iterator[tuple[str, Cell]]:
    """One task with each mask in turn, on the same batches from the same weights."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    layout = {
        "train": (config.steps, config.seeds, config.batch),
        "test": (config.seeds, config.test),
    }
    rows = {
        name: drawn(task, jax.random.key(i), math.prod(shape))
        for i, (name, shape) in enumerate(layout.items())
    }

    def folded(name: str, tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(*layout[name], *x.shape[1:]), tree)

    for fault in faults:
        mask = {name: folded(name, dense(task, fault, batch)) for name, batch in rows.items()}
        params, losses = train(config, keys, folded("train", rows["train"]), mask["train"])
        fresh = folded("test", rows["test"])
        cell = evaluate(config, params, fresh, mask["test"], task.measures == "gap")
        # The mean over the last tenth, where the rate is low: one batch alone is noisy.
        cell["training_loss"] = jnp.mean(losses[-max(1, config.steps // 10) :], axis=0)
        yield fault, {name: np.asarray(values).tolist() for name, values in cell.items()}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; no `-0.00`."""
    mean, deviation = (round(float(f(values)), 2) + 0.0 for f in (np.mean, np.std))
    return f"{mean:.2f} ± {deviation:.2f}"


def verdict(cell: Cell, correct: Cell) -> str:
    """The training loss compared with that of the right mask, seed by seed."""
    change = np.subtract(cell["training_loss"], correct["training_loss"])
    # Ten times the difference between equal runs, and large enough to be visible in a curve.
    if change.min() > 0.05:
        return "higher"
    return "lower" if change.max() < -0.05 else "the same" if abs(change).max() < 0.05 else "mixed"


HEADINGS = {
    "random tokens": "random tokens: loss - ln V",
    "reverse": "reverse: accuracy",
    "recall": "recall: accuracy",
    "copy": "copy: teacher-forced - free accuracy",
}


def table(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> Table:
    made = Table("", *columns, title=title, title_justify="left", header_style="")
    for name, cells in rows.items():
        made.add_row(name, *cells)
    return made


def markdown(columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(path: Path, cells: dict[str, dict[str, Cell]], found: dict[str, tuple[int, int]]) -> None:
    """Two heat maps: what the probes show, and what the training loss shows.

    Left, the colour is the distance from the right mask as a share of the probe's range (ln V, or
    1); right, the loss is red where it is higher than with the right mask, blue where lower.
    """
    harm = np.full((len(FAULTS), len(TASKS) + 1), np.nan)
    change = np.full((len(FAULTS), len(TASKS)), np.nan)
    said = [[""] * (len(TASKS) + 1) for _ in FAULTS]
    losses = [["not applicable"] * len(TASKS) for _ in FAULTS]
    for i, fault in enumerate(FAULTS):
        for j, task in enumerate(TASKS):
            said[i][j] = "not applicable"
            if fault not in cells[task.name]:
                continue
            cell, right = cells[task.name][fault], cells[task.name]["correct"]
            value = np.mean(cell[task.measures])
            scale = math.log(V) if task.measures == "excess" else 1.0
            harm[i, j] = abs(value - np.mean(right[task.measures])) / scale
            said[i][j] = spread(cell[task.measures])
            change[i, j] = np.mean(cell["training_loss"]) - np.mean(right["training_loss"])
            losses[i][j] = spread(cell["training_loss"])
        harm[i, -1] = found[fault][0] / found[fault][1]
        said[i][-1] = f"{found[fault][0]} of {found[fault][1]}"
    figure, panels = plt.subplots(
        1, 2, figsize=(15, 4.6), width_ratios=[5, 4], sharey=True, layout="constrained"
    )
    limit = math.log(V)
    maps = (
        (harm, said, "what finds it", {"cmap": "Reds", "vmin": 0, "vmax": 1.4}),
        (change, losses, "final training loss (nats)",
         {"cmap": "RdBu_r", "vmin": -1.3 * limit, "vmax": 1.3 * limit}),
    )  # fmt: skip
    for axis, (values, texts, title, colours) in zip(panels, maps, strict=True):
        axis.imshow(values, aspect="auto", **colours)
        columns = [HEADINGS[task.name].replace(": ", ":\n") for task in TASKS]
        columns = [task.name for task in TASKS] if values is change else [*columns, LEAK]
        axis.set_xticks(
            range(len(columns)), [c.replace(" - ", "\n- ") for c in columns], fontsize=8
        )
        axis.set_yticks(range(len(FAULTS)), FAULTS)
        axis.set_title(title)
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                axis.text(j, i, text, ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


LEAK = "leaks found"


def main(arguments: Sequence[str] | None = None) -> int:
    config = tyro.cli(Config, description=__doc__, args=arguments)
    console, started = Console(), time.monotonic()
    cells: dict[str, dict[str, Cell]] = {task.name: {} for task in TASKS}
    leaks: dict[str, dict[str, str | None]] = {task.name: {} for task in TASKS}
    total = sum(len(task.faults) for task in TASKS)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=2 * total)

        def done(what: str, text: str) -> None:
            progress.update(bar, advance=1, description=what)
            if progress.disable:
                console.print(
                    f"{time.monotonic() - started:4.0f} s  {what}: {text}",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip

        for task in TASKS:
            for fault in task.faults:
                leaks[task.name][fault] = leak(config, task, fault, jax.random.key(0))
                done(f"{task.name}, {fault}", leaks[task.name][fault] or "no leak")
        searched = time.monotonic() - started
        for task in TASKS:
            for fault, cell in experiment(config, task, task.faults):
                cells[task.name][fault] = cell
                text = f"{task.measures} {spread(cell[task.measures])}"
                done(f"{task.name}, {fault}", f"loss {spread(cell['training_loss'])}, {text}")

    found = {}
    for fault in FAULTS:
        tried = [leaks[task.name][fault] for task in TASKS if fault in task.faults]
        found[fault] = (sum(said is not None for said in tried), len(tried))

    def of(task: Task, fault: str, say: Callable[[Task, Cell], str]) -> str:
        return say(task, cells[task.name][fault]) if fault in task.faults else "-"

    def probe(task: Task, cell: Cell) -> str:
        return spread(cell[task.measures])

    def loss(task: Task, cell: Cell) -> str:
        right = cells[task.name]["correct"]
        said = spread(cell["training_loss"])
        return said if cell is right else f"{said}, {verdict(cell, right)}"

    probes = {
        fault: [*(of(task, fault, probe) for task in TASKS), "{} of {}".format(*found[fault])]
        for fault in FAULTS
    }
    losses = {fault: [of(task, fault, loss) for task in TASKS] for fault in FAULTS}
    tables = {
        "what finds it": ([*(HEADINGS[task.name] for task in TASKS), LEAK], probes),
        "final training loss": ([task.name for task in TASKS], losses),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    for title, content in tables.items():
        console.print(table(title, *content), highlight=False)
    (config.out / "tables.md").write_text(
        "\n".join(markdown(*content) for content in tables.values())
    )
    (config.out / "faults.json").write_text(json.dumps({"cells": cells, "leaks": leaks}, indent=1))
    draw(config.out / "faults.png", cells, found)
    console.print(
        f"the search for leaks took {searched:.0f} s, "
        f"the whole run {time.monotonic() - started:.0f} s",
        highlight=False,
    )
    for name in ("faults.png", "tables.md", "faults.json"):
        print(config.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

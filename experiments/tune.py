"""Teaches a pretrained language model to translate, with low-rank adapters on packed examples.

    python experiments/tune.py                                   # SmolLM2-135M-Instruct
    python experiments/tune.py --minutes 10 --rank 32
    python experiments/tune.py --config RUN/config.json --resume  # continue a stopped run
    python experiments/tune.py translate "os gatos são pretos"

Without a verb it trains. `translate` translates sentences with the adapters that a run saved, and
has a `--help` of its own.

Each example is a question, `Translate to English: ...`, and its answer, in the model's own chat
template. A row holds its tokens up to where questions differ once, and then many examples, none of
which sees another. The loss is that of answers alone. README.md has the measured results.

It writes under `--out`: config.json, checkpoints/, metrics.csv, and adapters.safetensors.
Ctrl-C saves a checkpoint and stops.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import adapters
import corpus
import data
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import packing
import sacrebleu
import tyro
from adapters import ADAPTERS
from command import command
from corpus import Pair
from data import DataError, Tokens
from decoder import cross_entropy
from flax import nnx
from generate import NONE, Writer, greedy
from llama import Llama, Loaded
from report import write_metrics
from rich.console import Console
from rich.table import Table
from training import Checkpoints, Pace, Rows, loop
from translate import check_resumable, from_config, load_config, save_config, scores, show_samples

import jaxattn as ja
from jaxattn.shapes import Array, Bool, Float, Int

OUT = Path(__file__).parent / "results" / "tune"


@dataclass(frozen=True)
class Train:
    """Train adapters on the built-in Portuguese to English corpus; evaluate before and after."""

    model: Path | None = None  # a GGUF file of a Llama; by default SmolLM2-135M-Instruct
    out: Path = OUT  # where metrics and adapters go

    adapt: tuple[str, ...] = ("query", "value")  # the projections that get an adapter
    rank: int = 16
    scale: float = 2.0  # of what adapters add

    length: int = 512  # tokens a row
    rows: int = 1  # in a batch
    steps: int = 100
    pairs: int = 2000  # of each category to train on; four minutes see some 1,500 in all
    minutes: float | None = 4.0  # training stops after this time, whatever --steps says
    rate: float = 2e-3  # at its peak, after a tenth of the steps; a cosine takes it to a tenth
    seed: int = 0  # of adapters and batch order
    save_every: int = 100  # steps between checkpoints: a killed run loses at most these
    resume: bool = False  # continue from the last checkpoint under --out
    test: int = 100  # held-out sentences to translate, before and after


# What may differ between a run and its continuation: its length, and what comes after training.
FREE = ("out", "steps", "minutes", "resume", "save_every", "test")


@dataclass(frozen=True)
class Translate:
    """Translate sentences with the adapters that a run saved."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional]
    run: Path = OUT  # the --out of the run
    base: bool = False  # without the adapters, to compare


# ------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """A question and its answer as one text, up to the token that ends the answer."""

    tokens: Tokens
    answer: int  # where the answer begins

    def __len__(self) -> int:
        return len(self.tokens)

    def after(self, start: int) -> Example:
        return Example(self.tokens[start:], self.answer - start)


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Translate to English: {text}"}]


def prompts(loaded: Loaded, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of questions, up to where answers begin."""
    encoded = loaded.tokenizer.encode_batch([loaded.chat(question(text)) for text in texts])
    return [row.ids for row in encoded]


def encode(loaded: Loaded, pairs: Sequence[Pair]) -> list[Example]:
    asked = prompts(loaded, [pair.source for pair in pairs])
    answered = loaded.tokenizer.encode_batch(
        [
            loaded.chat(
                [*question(pair.source), {"role": "assistant", "content": pair.target}], reply=False
            )
            for pair in pairs
        ]
    )
    examples = []
    for prompt, row in zip(asked, answered, strict=True):
        ends = [i for i, token in enumerate(row.ids) if token in loaded.ends and i >= len(prompt)]
        if not ends or row.ids[: len(prompt)] != prompt:
            raise DataError("the chat template does not end answers; use a model made to chat")
        examples.append(Example(np.array(row.ids[: ends[0] + 1], np.int32), len(prompt)))
    return examples


def shared(examples: Sequence[Example]) -> Tokens:
    """The tokens with which all questions begin.

    The last token of a question is not among them: after it comes the first of its own answer.
    """
    least = min(example.answer for example in examples)
    asked = np.stack([e.tokens[: least - 1] for e in examples])
    same = np.all(asked == asked[0], axis=0)
    return asked[0, : np.argmin(np.append(same, False))]


class Batch(NamedTuple):
    """Packed rows, and what is predicted in them: M tokens of answers, the rest of M not counted.

    Document 0 of a row is what all questions begin with. The others continue it.
    """

    tokens: Int[Array, "B T"]
    ids: Int[Array, "B T"]  # the document of each token, -1 where there is none
    places: Int[Array, "B T"]  # of each token in its text, as if that stood alone
    where: Int[Array, "M"]  # the tokens, of B * T, after which a token of an answer follows
    targets: Int[Array, "M"]  # that token
    counted: Bool[Array, "M"]


def batch_of(rows: Sequence[Sequence[Example]], prefix: Tokens, length: int, answers: int) -> Batch:
    """Rows of examples, each without the prefix, as arrays of `length` tokens; M is `answers`."""
    packed = packing.pack([[prefix, *(e.tokens for e in row)] for row in rows], length)
    answered = [
        [np.zeros_like(prefix), *((np.arange(len(e)) >= e.answer).astype(np.int32) for e in row)]
        for row in rows
    ]
    targets = np.flatnonzero(packing.pack(answered, length).tokens)
    padding = 0, answers - len(targets)
    return Batch(
        jnp.asarray(packed.tokens),
        jnp.asarray(packed.ids),
        jnp.asarray(packed.places + len(prefix) * (packed.ids > 0)),
        jnp.asarray(np.pad(targets - 1, padding)),
        jnp.asarray(np.pad(packed.tokens.ravel()[targets], padding)),
        jnp.arange(answers) < len(targets),
    )


def most_answers(examples: Sequence[Example], tokens: int) -> int:
    """Tokens of answers that a batch of so many tokens has at most."""
    return math.ceil(tokens * max((len(e) - e.answer) / len(e) for e in examples))


# --------------------------------------------------------------------------------------- training


def loss_of(model: Llama, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed cross entropy of the tokens of answers, in nats, and their number.

    Logits of those tokens alone are computed: they are a third of the tokens, and V is large.
    """
    prefix = jnp.sum(batch.ids == 0, axis=1)
    mask = ja.masks.shared_prefix(prefix, batch.ids)
    x = model.features(batch.tokens, mask, batch.places)  # [B, T, D]
    logits = model.logits(x.reshape(-1, x.shape[-1])[batch.where])  # [M, V]
    return cross_entropy(logits, batch.targets, batch.counted), jnp.sum(batch.counted)


@lru_cache  # runs of the same settings share a compiled step
def optimizer(peak: float, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam, and its learning rate: a tenth of the steps up, then a cosine down to a tenth."""
    rate = optax.warmup_cosine_decay_schedule(0, peak, max(1, steps // 10), steps, peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)), rate


@partial(jax.jit, static_argnames=("graph", "tx"), donate_argnames=("learnt", "state"))
def train_step(
    graph: Any, tx: optax.GradientTransformation, learnt: Any, state: Any, frozen: Any, batch: Batch
) -> tuple[Any, Any, Float[Array, ""]]:
    """One step of the adapters; also the mean loss before it, in nats a token."""

    def loss_fn(learnt: Any) -> Array:
        total, count = loss_of(nnx.merge(graph, learnt, frozen), batch)
        return total / jnp.maximum(count, 1)

    loss, gradients = jax.value_and_grad(loss_fn)(learnt)
    updates, state = tx.update(gradients, state, learnt)
    return optax.apply_updates(learnt, updates), state, loss


@partial(jax.jit, static_argnames="graph")
def held_out_step(graph: Any, learnt: Any, frozen: Any, batch: Batch) -> Float[Array, "2"]:
    return jnp.stack(loss_of(nnx.merge(graph, learnt, frozen), batch))


def held_out(graph: Any, learnt: Any, frozen: Any, probe: Sequence[Batch]) -> dict[str, float]:
    found = [held_out_step(graph, learnt, frozen, batch) for batch in probe]
    total, count = np.sum([np.asarray(each) for each in found], axis=0)
    return {"held_out_loss": float(total / count)}


def train(
    config: Train,
    model: Llama,
    examples: tuple[list[Example], list[Example]],
    checkpoints: Checkpoints,
    console: Console,
) -> tuple[Rows, bool]:
    """Train the adapters of a model, in place: metrics, and whether it was interrupted."""
    prefix = shared([*examples[0], *examples[1]])
    room = config.length - len(prefix)
    fitting = [[e.after(len(prefix)) for e in side if len(e) <= config.length] for side in examples]
    if not all(fitting):
        raise DataError(f"no example fits into {config.length} tokens; give a larger --length")
    answers = most_answers([*fitting[0], *fitting[1]], config.rows * room)

    def batch_in(rows: Sequence[Sequence[Example]]) -> Batch:
        return batch_of(rows, prefix, config.length, answers)

    def batches(skip: int) -> Iterator[tuple[int, list[list[Example]]]]:
        """Epoch and batch, from the `skip`-th on; an epoch's order follows from its number."""
        for epoch in itertools.count(1):
            rng = np.random.default_rng((config.seed, epoch))
            for batch in packing.filled(fitting[0], config.rows, room, rng):
                if skip == 0:
                    yield epoch, batch
                else:
                    skip -= 1

    probe = [batch_in(rows) for rows in packing.filled(fitting[1], config.rows, room)]
    graph, learnt, frozen = nnx.split(model, ADAPTERS, ...)
    tx, rate = optimizer(config.rate, config.steps)
    state = tx.init(learnt)

    def arrays() -> dict[str, Any]:
        return {"params": nnx.to_pure_dict(learnt), "state": jax.tree.leaves(state)}

    found, rows, before = checkpoints.latest(arrays())
    nnx.replace_by_pure_dict(learnt, found["params"])
    state = jax.tree.unflatten(jax.tree.structure(state), found["state"])
    if not rows:
        rows.append({"step": 0} | held_out(graph, learnt, frozen, probe))

    def do(step: int, batch: list[list[Example]]) -> tuple[Array, int]:
        nonlocal learnt, state
        learnt, state, loss = train_step(graph, tx, learnt, state, frozen, batch_in(batch))
        return loss[None], sum(map(len, itertools.chain(*batch)))

    interrupted = loop(
        Pace(config.steps, config.minutes, config.save_every),
        batches(int(rows[-1]["step"])),
        rows,
        before,
        do=do,
        names=("loss",),
        rate=rate,
        evaluate=lambda: held_out(graph, learnt, frozen, probe),
        save=lambda step, rows, seconds: checkpoints.save(step, arrays(), rows, seconds),
        console=console,
    )
    nnx.update(model, learnt)
    return rows, interrupted


# ------------------------------------------------------------------------------------ translation


def translated(
    loaded: Loaded, model: Llama, texts: Sequence[str], rows: int = 50, length: int = 32
) -> list[str]:
    """The likeliest answers of a model, of at most `length` tokens, so many rows at once."""
    asked = prompts(loaded, texts)
    writer = Writer(model, loaded.ends, chunk=32)  # questions have some 50 tokens
    capacity = max(map(len, asked)) + length
    found: list[str] = []
    for start in range(0, len(asked), rows):
        some = asked[start : start + rows]
        sampling = greedy(len(some))
        caches = model.caches(partial(ja.KVCache.create, len(some), capacity))
        state, first = writer.start(some, caches, [length] * len(some), sampling)
        _, more = writer.advance(state, sampling, length - 1)
        answers = np.column_stack([first, more])
        found += [loaded.tokenizer.decode(row[row != NONE].tolist()).strip() for row in answers]
    return found


# --------------------------------------------------------------------------------------- commands


def run_train(config: Train, console: Console) -> dict[str, tuple[int, int]]:
    """Run the experiment; returns exact matches and pairs of each category, after training."""
    if config.resume:
        check_resumable(config, FREE)
    adapters.check(config.adapt)
    started = time.monotonic()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    loaded = llama.pretrained(config.model)
    pairs = data.without(
        *corpus.generate(
            train_pairs=dict.fromkeys(corpus.CATEGORIES, config.pairs),
            test_pairs=config.test // len(corpus.CATEGORIES),
        )
    )
    examples = encode(loaded, pairs.train), encode(loaded, pairs.test)
    model = loaded.model
    sources = [pair.source for pair in pairs.test]
    say(f"{len(pairs.train):,} pairs to train on; translating {len(pairs.test)} that are held out")
    before = translated(loaded, model, sources)

    adapters.adapt(model, config.adapt, config.rank, config.scale, config.seed)
    _, learnt, frozen = nnx.split(model, ADAPTERS, ...)
    sizes = [sum(x.size for x in jax.tree.leaves(part)) for part in (learnt, frozen)]
    say(f"{sizes[0]:,} weights of adapters beside {sizes[1]:,} that are frozen")
    save_config(config.out / "config.json", config)
    checkpoints = Checkpoints(config.out / "checkpoints", config.resume)
    rows, interrupted = train(config, model, examples, checkpoints, console)
    if interrupted:
        say(f"stopped after {int(rows[-1]['step'])} steps, and saved; to continue:")
        say(f"  python experiments/tune.py --config {config.out}/config.json --resume")
        raise KeyboardInterrupt
    adapters.save(config.out / "adapters.safetensors", nnx.state(model, ADAPTERS))
    write_metrics(config.out / "metrics.csv", rows)

    adapters.merge(model)
    after = translated(loaded, model, sources)
    show_samples(console, pairs.test, after)
    table = compared(pairs.test, {"before": before, "after": after})
    ends = rows[0], rows[-1]
    table.add_row("loss, nats a token", *(f"{row['held_out_loss']:.3f}" for row in ends))
    console.print(table)
    say(
        f"{int(rows[-1]['step'])} steps in {rows[-1]['seconds']:.0f} s; the whole run took "
        f"{time.monotonic() - started:.0f} s"
    )
    for name in ("adapters.safetensors", "metrics.csv"):
        say(str(config.out / name))
    return scores(pairs.test, after)


def compared(test: Sequence[Pair], found: dict[str, list[str]]) -> Table:
    """Exact matches by category, BLEU (2002) and chrF (2015) by sacreBLEU, 1804.08771."""
    table = Table("held out", *found, title=f"{len(test)} pairs")
    right = [scores(test, texts) for texts in found.values()]
    for category, (_, count) in right[0].items():
        table.add_row(f"exact, {category}", *(f"{r[category][0]} of {count}" for r in right))
    references = [[pair.target for pair in test]]
    for name, metric in ("BLEU", sacrebleu.BLEU()), ("chrF", sacrebleu.CHRF()):
        measured = [metric.corpus_score(texts, references).score for texts in found.values()]
        table.add_row(name, *(f"{score:.1f}" for score in measured))
    return table


def run_translate(config: Translate) -> None:
    if not config.texts:
        raise DataError('nothing to translate; give sentences, as in: translate "vinte e um"')
    saved = load_config(config.run / "config.json", Train)
    loaded = llama.pretrained(saved.model)
    if not config.base:
        adapters.adapt(loaded.model, saved.adapt, saved.rank, saved.scale, saved.seed)
        learnt = nnx.state(loaded.model, ADAPTERS)
        adapters.load(config.run / "adapters.safetensors", learnt)
        nnx.update(loaded.model, learnt)
        adapters.merge(loaded.model)
    for line in translated(loaded, loaded.model, config.texts):
        print(line)


@command("tune.py")
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    if given[:1] == ["translate"]:
        run_translate(tyro.cli(Translate, prog="tune.py translate", args=given[1:]))
    else:
        default, given = from_config(given, Train)
        config = tyro.cli(Train, prog="tune.py", description=__doc__, args=given, default=default)
        run_train(config, Console())


if __name__ == "__main__":
    llama.keep_programs()
    sys.exit(main())

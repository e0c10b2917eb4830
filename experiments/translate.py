"""Train a Transformer to translate, with every attention from jaxattn; then use it.

    python experiments/translate.py                                    # the built-in corpus
    python experiments/translate.py --source train.fr.gz --target train.en.gz
    python experiments/translate.py --pairs por.txt --columns 2 1      # Anki: English stands first
    python experiments/translate.py translate "trezentos e vinte e um"

It trains, decodes what was held out, and leaves under `--out`: metrics.csv, loss.png,
attention.png, and model/, which `translate` reads. A corpus that cannot be used gets one line on
stderr and exit status 2. README.md has the measured results.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import corpus
import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from corpus import Pair
from data import Batch, Corpus, DataError, Tokens
from flax import serialization
from flax.training.train_state import TrainState
from pictures import draw_attention, draw_curve
from report import Report
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformer import (
    Params,
    Transformer,
    attention_maps,
    greedy,
    inverse_sqrt,
    masked_loss_and_accuracy,
)

from jaxattn.shapes import Array, Float, Int

OUT = Path(__file__).parent / "results" / "translate"


@dataclass(frozen=True)
class Train:
    """Train on the built-in Portuguese to English corpus, or on files; evaluate; save."""

    pairs: Path | None = None  # tab-separated pairs, .gz or not (Tatoeba, Anki)
    columns: tuple[int, int] = (1, 2)  # which columns of --pairs are source and target, from 1
    source: Path | None = None  # one sentence a line, .gz or not; goes with --target
    target: Path | None = None  # the translation of each line of --source
    test_source: Path | None = None  # held-out lines; else one in 20 is held out by a hash
    test_target: Path | None = None  # the translation of each line of --test-source
    out: Path = OUT  # where metrics, pictures and the model go

    vocabulary: int | None = None  # sub-words of both languages; 1000, or 8000 for files
    longest: int = 64  # longer pairs (in sub-words) are left out of training

    d_model: int = 128  # large enough for the built-in corpus, small enough for two CPU cores
    layers: int = 2  # in the encoder, and again in the decoder
    heads: int = 4
    d_ff: int = 256  # half the paper's ratio: a quarter fewer operations a step, and enough here
    dropout: float = 0.1

    steps: int = 700  # about one pass over the built-in corpus
    minutes: float | None = None  # stop training after so many, whatever --steps says
    batch_tokens: int = 2048  # padded tokens a batch and side
    warmup: int = 200  # the paper's 4000 are for 100,000 steps
    factor: float = 0.5  # of the paper's schedule; the peak is factor / sqrt(d_model * warmup)
    smoothing: float = 0.1
    averaging: float = 0.99  # over about 100 steps; the paper averages its last checkpoints
    seed: int = 0  # of weights, dropout and batch order; the corpus does not depend on it


@dataclass(frozen=True)
class Translate:
    """Translate sentences with a saved model."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional]
    model: Path = OUT / "model"  # what a training run saved


# ------------------------------------------------------------------------------------- the corpus


def load(config: Train) -> Corpus:
    """The one way in for data: files if any are named, else the built-in corpus."""
    if config.pairs and (config.source or config.target):
        raise DataError("--pairs and --source/--target are two ways to say the same; give one")
    if bool(config.source) != bool(config.target):
        raise DataError("--source and --target go together; give both")
    if bool(config.test_source) != bool(config.test_target):
        raise DataError("--test-source and --test-target go together; give both")
    if config.pairs:
        pairs = data.read_pairs(config.pairs, config.columns)
    elif config.source and config.target:
        pairs = data.read_aligned(config.source, config.target)
    elif config.test_source:
        raise DataError("--test-source needs --pairs or --source to train on")
    else:
        return Corpus(*corpus.generate())
    if config.test_source and config.test_target:
        return data.without(pairs, data.read_aligned(config.test_source, config.test_target))
    return data.split(pairs)


# --------------------------------------------------------------------------------------- training


@partial(jax.jit, static_argnames=("smoothing", "averaging"), donate_argnames="state")
def train_step(
    state: State,
    source: Int[Array, "B S"],
    target: Int[Array, "B T+1"],
    key: Array,
    smoothing: float,
    averaging: float,
) -> tuple[State, Float[Array, "2"]]:
    """One Adam step; also the loss and the token accuracy before it."""

    def loss_fn(params: Params) -> tuple[Array, Array]:
        rngs = {"dropout": jax.random.fold_in(key, state.step)}
        logits = state.apply_fn({"params": params}, source, target[:, :-1], True, rngs=rngs)
        return masked_loss_and_accuracy(logits, target[:, 1:], smoothing)

    (loss, accuracy), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    # The rate starts at 0.9 and ends at `averaging`, so that the first weights are soon forgotten.
    rate = jnp.minimum(averaging, (1 + state.step) / (10 + state.step))
    average = optax.incremental_update(state.params, state.average, 1 - rate)
    return state.replace(average=average), jnp.stack([loss, accuracy])


@partial(jax.jit, static_argnames=("model", "smoothing"))
def held_out_step(
    model: Transformer,
    params: Params,
    source: Int[Array, "B S"],
    target: Int[Array, "B T+1"],
    smoothing: float,
) -> Float[Array, "3"]:
    """Loss and token accuracy given the true prefix, each times the number of tokens; and that."""
    logits = model.apply({"params": params}, source, target[:, :-1])
    measured = masked_loss_and_accuracy(logits, target[:, 1:], smoothing)
    count = jnp.sum(target[:, 1:] != data.PAD)
    return jnp.stack([*measured, jnp.array(1.0)]) * count


def held_out(
    config: Train, model: Transformer, params: Params, probe: Sequence[Batch]
) -> dict[str, float]:
    """Mean loss and token accuracy over the held-out batches, as metrics."""
    parts = [held_out_step(model, params, b.source, b.target, config.smoothing) for b in probe]
    loss, accuracy, count = np.sum([np.asarray(part) for part in parts], axis=0)
    return {
        "held_out_loss": float(loss / count),
        "held_out_token_accuracy": float(accuracy / count),
    }


class State(TrainState):
    """Flax's training state, and a moving average of its weights, which is what is evaluated."""

    average: Params


Encoded = tuple[list[Tokens], list[Tokens]]


def train(
    config: Train,
    model: Transformer,
    examples: Encoded,
    test: Encoded,
    widths: Sequence[int],
    console: Console,
) -> tuple[Params, list[dict[str, float]]]:
    """Train for `steps` or `minutes`; the weights, and one row of metrics every 20 steps."""
    # XLA's own generator: dropout by the default one costs a tenth of a step on a CPU, and half a
    # minute of compilation.
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed, impl="rbg"))
    rng = np.random.default_rng(config.seed)
    schedule = inverse_sqrt(config.d_model, config.warmup, config.factor)
    tokens = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(model.init)(init_key, tokens, tokens)["params"]
    state = State.create(
        apply_fn=model.apply,
        params=params,
        average=jax.tree.map(jnp.copy, params),  # a copy: the state's buffers are donated
        tx=optax.adam(schedule, b1=0.9, b2=0.98, eps=1e-9),
    )
    # Enough held-out pairs for a curve; all of them are decoded at the end.
    some = [slice(None, None, max(1, len(side) // 500)) for side in test]
    probe = list(data.batches(test[0][some[0]], test[1][some[1]], widths[-1:], config.batch_tokens))

    def stream() -> Iterator[tuple[int, Batch]]:
        for epoch in itertools.count(1):
            for batch in data.batches(*examples, widths, config.batch_tokens, rng):
                yield epoch, batch

    rates = config.smoothing, config.averaging
    rows: list[dict[str, float]] = []
    waiting: list[Array] = []
    report, started = Report(console, config.steps, config.minutes), time.monotonic()
    since, seen = started, 0
    with report.progress:
        for step, (epoch, batch) in zip(range(1, config.steps + 1), stream(), strict=False):
            state, measured = train_step(state, batch.source, batch.target, dropout_key, *rates)
            waiting.append(measured)
            seen += int(np.sum(batch.target[:, 1:] != data.PAD))
            # Reading a result waits for the device, so that is done every 20 steps only.
            if step == 1 or step % 20 == 0 or step == config.steps:
                loss, accuracy = np.mean([np.asarray(m) for m in waiting], axis=0)
                now = time.monotonic()
                late = config.minutes is not None and now - started > 60 * config.minutes
                row = {
                    "step": step,
                    "epoch": epoch,
                    "seconds": now - started,
                    "loss": float(loss),
                    "token_accuracy": float(accuracy),
                    "learning_rate": float(schedule(step)),
                    "tokens_per_second": seen / (now - since),
                }
                if step % 100 == 0 or step == config.steps or late:
                    row |= held_out(config, model, state.average, probe)
                rows.append(row)
                report.update(row)
                waiting, seen, since = [], 0, time.monotonic()
                if late:
                    break
    return state.average, rows


# ------------------------------------------------------------------------------------- evaluation


def translator(
    model: Transformer, params: Params, tokenizer: Tokenizer, width: int, rows: int
) -> Callable[[Sequence[str]], list[str]]:
    """A function from texts to their greedy translations; one compiled shape, [rows, width]."""
    decode = jax.jit(greedy, static_argnames=("model", "length"))

    def translate(texts: Sequence[str]) -> list[str]:
        whole = data.encode_source(tokenizer, texts)
        cut = sum(len(row) > width for row in whole)
        if cut:
            Console(stderr=True).print(
                f"{cut} of {len(texts)} sources are longer than {width} sub-words; the rest of "
                "them is not translated. A model trained with a larger --longest takes more."
            )
        sources = [row[:width] for row in whole]
        # Of like length together: a batch is decoded for as long as its longest row.
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        out = [""] * len(sources)
        for start in range(0, len(order), rows):
            members = order[start : start + rows]
            padded = np.full((rows, width), data.PAD, np.int32)
            for row, i in enumerate(members):
                padded[row, : len(sources[i])] = sources[i]
            for i, ids in zip(
                members, np.asarray(decode(model, params, padded, width)), strict=False
            ):
                out[i] = data.decode_tokens(tokenizer, ids.tolist())
        return out

    return translate


def scores(test: Sequence[Pair], found: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Exact matches and pairs of each category."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for pair, text in zip(test, found, strict=True):
        counts[pair.category].append(pair.target == text)
    return {category: (sum(right), len(right)) for category, right in counts.items()}


def show_samples(
    console: Console, test: Sequence[Pair], found: Sequence[str], most: int = 10
) -> None:
    """A few held-out pairs of each category, wrong ones among them."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    rng = random.Random(0)
    categories = list(dict.fromkeys(pair.category for pair in test))
    for category in categories:
        members = [i for i, pair in enumerate(test) if pair.category == category]
        rng.shuffle(members)
        members.sort(key=lambda i: test[i].target == found[i])
        few = max(1, most // len(categories) // 2)
        for i in dict.fromkeys(members[:few] + members[-few:]):
            say(f"  {test[i].source}", style="dim")
            say(f"  = {found[i]}")
            if test[i].target != found[i]:
                say(f"  ! {test[i].target}", style="red")


# --------------------------------------------------------------------------------- the saved model


def model_of(config: Train, tokenizer: Tokenizer) -> Transformer:
    return Transformer(
        vocabulary=tokenizer.get_vocab_size(),
        d_model=config.d_model,
        layers=config.layers,
        heads=config.heads,
        d_ff=config.d_ff,
        dropout=config.dropout,
    )


def save(
    folder: Path, config: Train, params: Params, tokenizer: Tokenizer, widths: Sequence[int]
) -> None:
    """Everything `translate` needs: weights, tokenizer, and the sizes of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.msgpack").write_bytes(serialization.to_bytes(params))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = asdict(config) | {"widths": list(widths)}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")


def load_translator(folder: Path) -> tuple[Callable[[Sequence[str]], list[str]], Tokenizer, int]:
    """A saved model's translate function, its tokenizer, and how many tokens it takes."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        weights = (folder / "params.msgpack").read_bytes()
    except FileNotFoundError:
        raise DataError(f"{folder}: no saved model; train one first (translate.py)") from None
    width = settings.pop("widths")[-1]
    known: dict[str, Any] = {name: settings[name] for name in Train.__dataclass_fields__}
    model = model_of(Train(**known), tokenizer)
    params = serialization.msgpack_restore(weights)
    return translator(model, params, tokenizer, width, rows=1), tokenizer, width


# --------------------------------------------------------------------------------------- commands


def write_metrics(path: Path, rows: Sequence[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]), restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})


def run_train(config: Train, console: Console) -> dict[str, tuple[int, int]]:
    """The whole experiment; returns exact matches and pairs of each category."""
    started = time.monotonic()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    pairs = load(config)
    from_files = bool(config.pairs or config.source)
    vocabulary = config.vocabulary or (8000 if from_files else 1000)
    tokenizer = data.train_tokenizer(pairs.train, vocabulary)

    def encode(side: Sequence[Pair]) -> Encoded:
        sources = data.encode_source(tokenizer, [pair.source for pair in side])
        return sources, data.encode_target(tokenizer, [pair.target for pair in side])

    examples, test = encode(pairs.train), encode(pairs.test)
    sizes = [max(len(s), len(t) - 1) for s, t in zip(*examples, strict=True)]
    widths = data.bucket_widths(sizes, config.longest)
    left_out = sum(size > widths[-1] for size in sizes)
    model = model_of(config, tokenizer)
    say(
        f"{len(pairs.train):,} training pairs, {len(pairs.test):,} held out; "
        f"{tokenizer.get_vocab_size():,} sub-words; padded to {', '.join(map(str, widths))} tokens"
        + (f"; {left_out:,} longer pairs left out" if left_out else "")
    )

    params, rows = train(config, model, examples, test, widths, console)
    trained = time.monotonic()
    config.out.mkdir(parents=True, exist_ok=True)
    save(config.out / "model", config, params, tokenizer, widths)
    write_metrics(config.out / "metrics.csv", rows)
    draw_curve(config.out / "loss.png", rows)

    translate = translator(model, params, tokenizer, widths[-1], rows=128)
    found = translate([pair.source for pair in pairs.test])
    result = scores(pairs.test, found)
    draw_example(config.out / "attention.png", model, params, tokenizer, pairs.test, found)

    say("\nheld-out samples (! is the right answer where ours is wrong)")
    show_samples(console, pairs.test, found)
    table = Table("category", "held-out pairs", "exact match", title="greedy translation")
    for category, (right, count) in result.items():
        table.add_row(category, str(count), f"{right / count:.1%}")
    console.print(table)
    if from_files:
        say(bleu(found, [pair.target for pair in pairs.test]))
    say(
        f"{int(rows[-1]['step'])} steps in {rows[-1]['seconds']:.0f} s; held-out token accuracy "
        f"{rows[-1]['held_out_token_accuracy']:.4f}; decoding and pictures in "
        f"{time.monotonic() - trained:.0f} s; everything in {time.monotonic() - started:.0f} s"
    )
    for name in ("loss.png", "attention.png", "metrics.csv", "model"):
        say(str(config.out / name))
    return result


def bleu(found: Sequence[str], references: Sequence[str]) -> str:
    """Corpus BLEU by sacreBLEU (1804.08771) with the signature that makes it comparable."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    score = metric.corpus_score(list(found), [list(references)])
    return f"BLEU {score.score:.1f} ({metric.get_signature()})"


def draw_example(
    path: Path,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    test: Sequence[Pair],
    found: Sequence[str],
) -> None:
    """The cross-attention of one held-out pair, translated right if any is, of middling length."""
    right = [i for i, pair in enumerate(test) if pair.target == found[i]] or list(range(len(test)))
    i = min(right, key=lambda i: abs(len(test[i].source) - 50))  # about ten sub-words: readable
    (source,) = data.encode_source(tokenizer, [test[i].source])
    (target,) = data.encode_target(tokenizer, [found[i]])
    maps = jax.jit(partial(attention_maps, model))(params, source[None], target[None, :-1])
    draw_attention(
        path,
        np.asarray(maps[0]),
        data.labels(tokenizer, source.tolist()),
        data.labels(tokenizer, target[1:].tolist()),
    )


def run_translate(config: Translate) -> None:
    if not config.texts:
        raise DataError('nothing to translate; give sentences, as in: translate "vinte e um"')
    translate, tokenizer, width = load_translator(config.model)
    for text, ids in zip(config.texts, data.encode_source(tokenizer, config.texts), strict=True):
        if len(ids) > width:
            raise DataError(
                f'"{text[:40]}..." has {len(ids)} sub-words; at most {width} were trained'
            )
    for line in translate(config.texts):
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a corpus that cannot be used into one line and exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["translate"]:
            run_translate(tyro.cli(Translate, prog="translate.py translate", args=given[1:]))
        else:
            run_train(tyro.cli(Train, prog="translate.py", args=given), Console())
    except DataError as error:
        print(f"translate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

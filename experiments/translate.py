"""Trains a Transformer that translates, with every attention from jaxattn, and uses it.

    python experiments/translate.py                                    # the built-in corpus
    python experiments/translate.py --source train.fr.gz --target train.en.gz
    python experiments/translate.py --pairs por.txt --columns 2 1      # Anki: English stands first
    python experiments/translate.py --config RUN/config.json --resume  # continue a stopped run
    python experiments/translate.py translate "trezentos e vinte e um"

Without a verb it trains. `translate` translates sentences with a trained model, and has a `--help`
of its own. `--config FILE` takes the settings that a run saved; options override them.

It trains, translates the held-out pairs, and writes under `--out`: config.json, checkpoints/,
metrics.csv, loss.png, attention.png, and model/, which `translate` reads. Ctrl-C saves a checkpoint
and stops. If a corpus cannot be used, the script prints one line on stderr and exits with status 2.
README.md has the measured results.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import corpus
import data
import decoding
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from command import command
from corpus import Pair
from data import Corpus, DataError
from flax import serialization
from pictures import draw_attention, draw_curve
from report import write_metrics
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from training import Checkpoints, Encoded, Schedule, train
from transformer import Params, Transformer, attention_maps

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
    valid_source: Path | None = None  # lines for the held-out loss; else the test lines are
    valid_target: Path | None = None  # the translation of each line of --valid-source
    out: Path = OUT  # where metrics, pictures and the model go

    vocabulary: int | None = None  # sub-words of both languages; 1000, or 8000 for files
    longest: int = 64  # longer pairs (in sub-words) are left out of training

    d_model: int = 128  # large enough for the built-in corpus, small enough for two CPU cores
    layers: int = 2  # in the encoder, and again in the decoder
    heads: int = 4
    d_ff: int = 256  # half the paper's ratio: a quarter fewer operations a step, and enough here
    dropout: float = 0.1  # of embeddings, and of the output of each sub-layer
    attention_dropout: float = 0.1  # of attention weights; the paper uses none
    norm: Literal["pre", "post"] = "post"  # as in the paper; "pre" trains deep stacks better
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights are float32

    steps: int = 700  # about one pass over the built-in corpus
    minutes: float | None = None  # training stops after this time, whatever --steps says
    batch_tokens: int = 2048  # padded tokens in a batch, on each side
    warmup: int = 200  # the paper's 4000 are for 100,000 steps
    factor: float = 0.5  # of the paper's schedule; the peak is factor / sqrt(d_model * warmup)
    smoothing: float = 0.1
    averaging: float = 0.99  # over about 100 steps; the paper averages its last checkpoints
    beams: int = 1  # in the translation at the end; the paper uses 4
    penalty: float = 0.6  # of length, with beams
    seed: int = 0  # of weights, dropout and batch order; the corpus does not depend on it
    save_every: int = 100  # steps between checkpoints: a killed run loses at most these
    resume: bool = False  # continue from the last checkpoint under --out


@dataclass(frozen=True)
class Translate:
    """Translate sentences with a saved model."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional]
    model: Path = OUT / "model"  # saved by a training run
    beams: int = 4
    penalty: float = 0.6  # of length, with beams
    cache: bool = True  # --no-cache computes every prefix anew, with one beam: for measuring


# ------------------------------------------------------------------------------------- the corpus


def load(config: Train) -> Corpus:
    """The training data: the files that are named, otherwise the built-in corpus."""
    if config.pairs and (config.source or config.target):
        raise DataError("--pairs and --source/--target exclude each other; give one of them")
    if bool(config.source) != bool(config.target):
        raise DataError("--source and --target go together; give both")
    for name in ("test", "valid"):
        if bool(getattr(config, f"{name}_source")) != bool(getattr(config, f"{name}_target")):
            raise DataError(f"--{name}-source and --{name}-target go together; give both")
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


# ------------------------------------------------------------------------------------- evaluation


def translator(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    width: int,
    rows: int,
    beams: int = 1,
    penalty: float = 0.6,
    cache: bool = True,
) -> Callable[[Sequence[str]], list[str]]:
    """A function from texts to their translations; one compiled shape, [rows, width]."""
    find: Callable[..., Any] = partial(decoding.recomputed, model)
    if cache:
        find = partial(decoding.search, model, beams=beams, penalty=penalty)
    decode = jax.jit(find, static_argnames="length")

    def translate(texts: Sequence[str]) -> list[str]:
        whole = data.encode_source(tokenizer, texts)
        cut = sum(len(row) > width for row in whole)
        if cut:
            Console(stderr=True).print(
                f"{cut} of {len(texts)} sources are longer than {width} sub-words; the rest of "
                "them is not translated. A model trained with a larger --longest takes more."
            )
        sources = [row[:width] for row in whole]
        # Similar lengths together: decoding a batch takes as long as its longest row.
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        out = [""] * len(sources)
        for start in range(0, len(order), rows):
            members = order[start : start + rows]
            padded = np.full((rows, width), data.PAD, np.int32)
            for row, i in enumerate(members):
                padded[row, : len(sources[i])] = sources[i]
            found = np.asarray(decode(params, padded, length=width))
            for i, ids in zip(members, found, strict=False):
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
    """A few held-out pairs of each category, wrong ones first and marked."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say("\nheld-out samples, chosen so that mistakes come first (! is the right answer)")
    rng = random.Random(0)
    categories = list(dict.fromkeys(pair.category for pair in test))
    for category in categories:
        members = [i for i, pair in enumerate(test) if pair.category == category]
        rng.shuffle(members)
        members.sort(key=lambda i: test[i].target == found[i])
        few = max(1, most // len(categories) // 2)
        wrong = sum(test[i].target != found[i] for i in members)
        say(f"{category}: {wrong} of {len(members)} wrong")
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
        attention_dropout=config.attention_dropout,
        norm=config.norm,
        dtype=jnp.dtype(config.dtype),
    )


def save(folder: Path, params: Params, tokenizer: Tokenizer, widths: Sequence[int]) -> None:
    """Saves what `translate` needs besides the configuration: weights, tokenizer, widths."""
    (folder / "params.msgpack").write_bytes(serialization.to_bytes(params))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "widths.json").write_text(json.dumps(list(widths)) + "\n")


Settings = TypeVar("Settings")  # of the training of an experiment, as `Train` is


def save_config(path: Path, config: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A repeated run should run from the start, even if this one was resumed.
    settings = asdict(config) | {"resume": False}
    path.write_text(json.dumps(settings, indent=2, default=str) + "\n")


def load_config(path: Path, kind: type[Settings]) -> Settings:
    """The configuration that a run saved."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; runs save theirs as config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a saved configuration ({error})") from None
    known: tuple[Field[Any], ...] = fields(kind)  # type: ignore[arg-type]
    unknown = set(found) - {field.name for field in known}
    if unknown:
        raise DataError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
    paths = {field.name for field in known if "Path" in str(field.type)}
    settings: dict[str, Any] = {}
    for name, value in found.items():
        of: Any = Path if name in paths and value is not None else type(value)
        settings[name] = (tuple if of is list else of)(value) if value is not None else None
    return kind(**settings)


# What may differ between a run and its continuation: its length, and what comes after training.
FREE = ("out", "steps", "minutes", "resume", "save_every", "beams", "penalty")


def check_resumable(config: Any, free: Sequence[str] = FREE) -> None:
    """Refuses to continue a run with settings that differ from those of its start."""
    begun = load_config(config.out / "config.json", type(config))
    changed = [
        f"--{field.name.replace('_', '-')} was {getattr(begun, field.name)}"
        for field in fields(config)
        if field.name not in free and getattr(begun, field.name) != getattr(config, field.name)
    ]
    if changed:
        raise DataError(
            f"{config.out}: cannot resume with other settings: {', '.join(changed)}; give the same "
            f"ones, or --config {config.out / 'config.json'}"
        )


def load_translator(
    config: Translate,
) -> tuple[Callable[[Sequence[str]], list[str]], Tokenizer, int]:
    """A saved model's translate function, its tokenizer, and how many tokens it takes."""
    folder = config.model
    try:
        width = json.loads((folder / "widths.json").read_text())[-1]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        weights = (folder / "params.msgpack").read_bytes()
    except FileNotFoundError:
        raise DataError(f"{folder}: no saved model; train one first (translate.py)") from None
    model = model_of(load_config(folder / "config.json", Train), tokenizer)
    params = serialization.msgpack_restore(weights)
    how: dict[str, Any] = {name: getattr(config, name) for name in ("beams", "penalty", "cache")}
    return translator(model, params, tokenizer, width, rows=1, **how), tokenizer, width


# --------------------------------------------------------------------------------------- commands


def run_train(config: Train, console: Console) -> dict[str, tuple[int, int]]:
    """Run the experiment; returns exact matches and pairs of each category."""
    if config.resume:
        check_resumable(config)
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

    save_config(config.out / "config.json", config)
    schedule = Schedule(**{f.name: getattr(config, f.name) for f in fields(Schedule)})
    checkpoints = Checkpoints(config.out / "checkpoints", config.resume)
    valid = test
    if config.valid_source and config.valid_target:
        valid = encode(data.read_aligned(config.valid_source, config.valid_target))
    params, rows, interrupted = train(
        schedule, model, examples, valid, widths, checkpoints, console
    )
    if interrupted:
        say(f"stopped after {int(rows[-1]['step'])} steps, and saved; to continue:")
        say(f"  python experiments/translate.py --config {config.out / 'config.json'} --resume")
        raise KeyboardInterrupt
    trained = time.monotonic()
    save_config(config.out / "model" / "config.json", config)
    save(config.out / "model", params, tokenizer, widths)
    write_metrics(config.out / "metrics.csv", rows)
    draw_curve(config.out / "loss.png", rows)

    how: dict[str, Any] = {"beams": config.beams, "penalty": config.penalty}
    translate = translator(model, params, tokenizer, widths[-1], rows=128 // config.beams, **how)
    found = translate([pair.source for pair in pairs.test])
    result = scores(pairs.test, found)
    draw_example(config.out / "attention.png", model, params, tokenizer, pairs.test, found)

    show_samples(console, pairs.test, found)
    title = f"{config.beams} beam{'s' * (config.beams > 1)}"
    table = Table("category", "held-out pairs", "exact match", title=title)
    for category, (right, count) in result.items():
        table.add_row(category, str(count), f"{right / count:.1%}")
    console.print(table)
    if from_files:
        say(bleu(found, [pair.target for pair in pairs.test]))
    say(
        f"{int(rows[-1]['step'])} steps in {rows[-1]['seconds']:.0f} s; held-out token accuracy "
        f"{rows[-1]['held_out_token_accuracy']:.4f}; decoding and pictures took "
        f"{time.monotonic() - trained:.0f} s; the whole run took {time.monotonic() - started:.0f} s"
    )
    for name in ("loss.png", "attention.png", "metrics.csv", "model"):
        say(str(config.out / name))
    return result


def bleu(found: Sequence[str], references: Sequence[str]) -> str:
    """Corpus BLEU by sacreBLEU (1804.08771) with the signatures that make it comparable.

    Of the text as it is, and, as many papers measure, of the text in lower case.
    """
    import sacrebleu

    lines = []
    for metric in sacrebleu.BLEU(), sacrebleu.BLEU(lowercase=True):
        score = metric.corpus_score(list(found), [list(references)])
        lines.append(f"BLEU {score.score:.1f} ({metric.get_signature()})")
    return "\n".join(lines)


def draw_example(
    path: Path,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    test: Sequence[Pair],
    found: Sequence[str],
) -> None:
    """The cross-attention of one held-out pair of medium length, a right translation if any is."""
    right = [i for i, pair in enumerate(test) if pair.target == found[i]] or list(range(len(test)))
    i = min(right, key=lambda i: abs(len(test[i].source) - 50))  # about ten sub-words: readable
    (source,) = data.encode_source(tokenizer, [test[i].source])
    (target,) = data.encode_target(tokenizer, [found[i]])
    maps = jax.jit(partial(attention_maps, model))(params, source[None], target[None, :-1])[0]
    layers, heads = maps.shape[:2]
    # A row is labelled with the token that it predicts.
    draw_attention(
        path,
        np.asarray(maps),
        data.labels(tokenizer, source.tolist()),
        data.labels(tokenizer, target[1:].tolist()),
        names=[f"layer {n // heads}, head {n % heads}" for n in range(layers * heads)],
        title="cross-attention of the decoder: target token (row) to source token",
    )


def run_translate(config: Translate) -> None:
    if not config.texts:
        raise DataError('nothing to translate; give sentences, as in: translate "vinte e um"')
    translate, tokenizer, width = load_translator(config)
    for text, ids in zip(config.texts, data.encode_source(tokenizer, config.texts), strict=True):
        if len(ids) > width:
            raise DataError(
                f'"{text[:40]}..." has {len(ids)} sub-words; at most {width} were trained'
            )
    for line in translate(config.texts):
        print(line)


@command("translate.py")
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    if given[:1] == ["translate"]:
        run_translate(tyro.cli(Translate, prog="translate.py translate", args=given[1:]))
    else:
        default, given = from_config(given, Train)
        config = tyro.cli(
            Train, prog="translate.py", description=__doc__, args=given, default=default
        )
        run_train(config, Console())


def from_config(given: list[str], kind: type[Settings]) -> tuple[Settings, list[str]]:
    """The configuration that `--config FILE` names, as defaults, and the other arguments."""
    if "--config" not in given:
        return kind(), given
    at = given.index("--config")
    if at + 1 == len(given):
        raise DataError("--config: name the config.json of a run")
    return load_config(Path(given[at + 1]), kind), given[:at] + given[at + 2 :]


if __name__ == "__main__":
    sys.exit(main())

"""Trains a language model on packed documents, with every attention from jaxattn, and uses it.

    python experiments/language_model.py                          # Python's standard library
    python experiments/language_model.py --text a.txt b.txt
    python experiments/language_model.py --config RUN/config.json --resume
    python experiments/language_model.py sample "def read("
    python experiments/language_model.py packing                  # against one document a row
    python experiments/language_model.py context                  # up to 32,768 tokens a row

Without a verb it trains. `sample`, `packing` and `context` each have a `--help` of their own.
`--config FILE` takes the settings that a run saved; options override them.

It writes under `--out`: config.json, checkpoints/, metrics.csv, loss.png, and model/. Ctrl-C saves
a checkpoint and stops. README.md has the measured results.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packing
import tyro
from command import command
from data import DataError, Tokens
from decoder import Decoder, loss_of, sample
from flax import nnx, serialization
from packing import Packed
from pictures import draw_context, draw_losses
from report import write_metrics
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from training import Checkpoints, Pace, Rows, loop

from jaxattn.nn.nnx import MultiHeadAttention
from jaxattn.shapes import Array, Float, Int

OUT = Path(__file__).parent / "results" / "language_model"


@dataclass(frozen=True)
class Train:
    """Train on Python's standard library, or on files; evaluate; save."""

    text: tuple[Path, ...] = ()  # UTF-8 files, .gz or not; else the standard library's sources
    out: Path = OUT  # where metrics, pictures and the model go

    vocabulary: int = 1024  # sub-words; on two cores their logits are a third of a step
    length: int = 512  # tokens a row; longer documents are cut
    rows: int = 4  # in a batch: in a few minutes, many small steps learn more than few large ones

    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2  # keys and values are shared by two query heads
    d_ff: int = 384
    window: int = 128  # in the layers that have one
    full_every: int = 2  # every second layer attends to everything

    steps: int = 900
    minutes: float | None = 4.0  # training stops after this time, whatever --steps says
    warmup: int = 50
    rate: float = 3e-3  # at its peak; a cosine of the steps takes it to a tenth
    decay: float = 0.1  # of weights
    seed: int = 0  # of weights and batch order
    save_every: int = 100  # steps between checkpoints: a killed run loses at most these
    resume: bool = False  # continue from the last checkpoint under --out


@dataclass(frozen=True)
class Sample:
    """Continue texts with a saved model."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional]
    model: Path = OUT / "model"
    tokens: int = 128
    temperature: float = 0.7  # 0 takes the likeliest token
    seed: int = 0


@dataclass(frozen=True)
class Packing:
    """Train twice on the same documents: packed, and one per row; compare loss and speed."""

    steps: int = 60
    length: int = 512
    rows: int = 4
    out: Path = OUT


@dataclass(frozen=True)
class Context:
    """Time and memory of forward and backward as rows grow; all layers but one have windows."""

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dense: tuple[int, ...] = (2048, 4096)  # lengths for attention by the definition too
    window: int = 256
    out: Path = OUT


def model_of(
    config: Train, vocabulary: int, attention: Callable[..., nnx.Module] = MultiHeadAttention
) -> Decoder:
    names = ("d_model", "layers", "heads", "kv_heads", "d_ff", "window", "full_every")
    sizes = {name: getattr(config, name) for name in names}
    return Decoder(vocabulary, **sizes, attention=attention, rngs=nnx.Rngs(config.seed))


# --------------------------------------------------------------------------------------- training


Settings = TypeVar("Settings", bound=Train)
Arrays = Any  # of weights, or of the optimizer


def optimizer(config: Train) -> optax.GradientTransformation:
    """AdamW without the learning rate, which is an argument of the step."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.95),
        optax.add_decayed_weights(config.decay),
    )


@partial(jax.jit, static_argnames=("graph", "tx"), donate_argnames=("params", "state"))
def train_step(
    graph: Any,
    tx: optax.GradientTransformation,
    params: Arrays,
    state: Arrays,
    batch: tuple[Array, Array, Array],
    rate: Float[Array, ""],
) -> tuple[Arrays, Arrays, Float[Array, ""]]:
    """One AdamW step; also the mean loss before it, in nats a token."""

    def loss_fn(params: Arrays) -> Array:
        total, count = loss_of(nnx.merge(graph, params), *batch)
        return total / jnp.maximum(count, 1)

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    return *updated(tx, params, state, gradients, rate), loss


def updated(
    tx: optax.GradientTransformation,
    params: Arrays,
    state: Arrays,
    gradients: Arrays,
    rate: Float[Array, ""],
) -> tuple[Arrays, Arrays]:
    """Weights and the optimizer's state after a step of that rate."""
    updates, state = tx.update(gradients, state, params)
    updates = jax.tree.map(lambda update: -rate * update, updates)
    return optax.apply_updates(params, updates), state


@partial(jax.jit, static_argnames="graph")
def held_out_step(
    graph: Any, params: Arrays, batch: tuple[Array, Array, Array]
) -> Float[Array, "2"]:
    return jnp.stack(loss_of(nnx.merge(graph, params), *batch))


def arrays(packed: Packed) -> tuple[Array, Array, Array]:
    return jnp.asarray(packed.tokens), jnp.asarray(packed.ids), jnp.asarray(packed.places)


def batches(
    documents: Sequence[Tokens], config: Train, skip: int = 0
) -> Iterator[tuple[int, list[list[Tokens]]]]:
    """Epoch and batch, from the `skip`-th batch on; an epoch's order follows from its number."""
    for epoch in itertools.count(1):
        rng = np.random.default_rng((config.seed, epoch))
        for batch in packing.filled(documents, config.rows, config.length, rng):
            if skip == 0:
                yield epoch, batch
            else:
                skip -= 1


def held_out(graph: Any, params: Arrays, probe: Sequence[Any], bytes_: int) -> dict[str, float]:
    """Mean loss in nats a token, and bits per byte of the text that the probe is made of."""
    found = [held_out_step(graph, params, batch) for batch in probe]
    total, count = np.sum([np.asarray(each) for each in found], axis=0)
    return {
        "held_out_loss": float(total / count),
        "bits_per_byte": float(total / math.log(2) / bytes_),
    }


def train(
    config: Train,
    tokenizer: Tokenizer,
    documents: packing.Texts,
    checkpoints: Checkpoints,
    console: Console,
) -> tuple[Decoder, Rows, bool]:
    """Train for `steps` or `minutes`: the model, metrics, and whether it was interrupted."""
    examples = packing.encode(tokenizer, documents.train, config.length)
    some = documents.test[:: max(1, len(documents.test) // 300)]
    test = packing.encode(tokenizer, some, config.length)
    sizes = config.rows, config.length
    probe = [arrays(packing.pack(b, config.length)) for b in packing.filled(test, *sizes)]
    bytes_ = sum(len(document.encode()) for document in some)
    graph, params = nnx.split(model_of(config, tokenizer.get_vocab_size()))
    tx = optimizer(config)
    state = tx.init(params)
    pure = nnx.to_pure_dict(params)
    found, rows, before = checkpoints.latest({"params": pure, "state": jax.tree.leaves(state)})
    nnx.replace_by_pure_dict(params, found["params"])
    state = jax.tree.unflatten(jax.tree.structure(state), found["state"])

    def do(step: int, batch: list[list[Tokens]]) -> tuple[Array, int]:
        nonlocal params, state
        packed = packing.pack(batch, config.length)
        given = arrays(packed), jnp.float32(learning_rate(config, step))
        params, state, loss = train_step(graph, tx, params, state, *given)
        return loss[None], int(np.sum(packed.ids >= 0))

    def save(step: int, rows: Rows, seconds: float) -> None:
        kept = {"params": nnx.to_pure_dict(params), "state": jax.tree.leaves(state)}
        checkpoints.save(step, kept, rows, seconds)

    interrupted = loop(
        Pace(config.steps, config.minutes, config.save_every),
        batches(examples, config, int(rows[-1]["step"]) if rows else 0),
        rows,
        before,
        do=do,
        names=("loss",),
        rate=partial(learning_rate, config),
        evaluate=lambda: held_out(graph, params, probe, bytes_),
        save=save,
        console=console,
    )
    return nnx.merge(graph, params), rows, interrupted


def learning_rate(config: Train, step: int) -> float:
    """Warm-up, then a cosine of the steps to a tenth."""
    warm = min(1.0, step / config.warmup)
    done = min(1.0, step / config.steps)
    return config.rate * warm * (0.55 + 0.45 * math.cos(math.pi * done))


# --------------------------------------------------------------------------------------- commands


def run_train(config: Train, console: Console) -> float:
    """Run the experiment; returns bits per byte of the held-out text."""
    started = time.monotonic()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    documents = packing.read(config.text or packing.standard_library())
    tokenizer = data.byte_pairs(
        documents.train, config.vocabulary, packing.SPECIAL, sentences=False
    )
    config.out.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {"resume": False}
    text = json.dumps(settings, indent=2, default=str) + "\n"
    (config.out / "config.json").write_text(text)
    say(
        f"{len(documents.train):,} documents, {len(documents.test):,} held out; "
        f"{tokenizer.get_vocab_size():,} sub-words; rows of {config.length} tokens"
    )
    checkpoints = Checkpoints(config.out / "checkpoints", config.resume)
    model, rows, interrupted = train(config, tokenizer, documents, checkpoints, console)
    if interrupted:
        say(f"stopped after {int(rows[-1]['step'])} steps, and saved; to continue:")
        say(f"  python experiments/language_model.py --config {config.out}/config.json --resume")
        raise KeyboardInterrupt
    folder = config.out / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = nnx.to_pure_dict(nnx.state(model))
    (folder / "params.msgpack").write_bytes(serialization.to_bytes(_by_name(weights)))
    write_metrics(config.out / "metrics.csv", rows)
    draw_losses(config.out / "loss.png", rows)
    say("\nsamples, at temperature 0.7")
    for prompt in ("def read(", "class Parser", "import "):
        for line in continued(model, tokenizer, (prompt,), 80, 0.7, 0):
            say(line, style="dim")
            say("-" * 40)
    end = rows[-1]
    say(
        f"{int(end['step'])} steps in {end['seconds']:.0f} s; "
        f"{end['bits_per_byte']:.3f} bits per byte held out, loss {end['held_out_loss']:.3f} "
        f"nats a token; the whole run took {time.monotonic() - started:.0f} s"
    )
    for name in ("loss.png", "metrics.csv", "model"):
        say(str(config.out / name))
    return end["bits_per_byte"]


def _by_name(tree: Any) -> Any:
    """Lists of layers as dictionaries, which is how they are restored."""
    return {str(k): _by_name(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def continued(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """Each prompt with its continuation by the model, up to the end of the document."""
    draw = nnx.jit(sample, static_argnums=(2, 3))
    texts = []
    for i, prompt in enumerate(prompts):
        ids = np.array([[packing.BEGIN, *tokenizer.encode(prompt).ids]], np.int32)
        key = jax.random.fold_in(jax.random.key(seed), i)
        found = np.asarray(draw(model, jnp.asarray(ids), tokens, temperature, key))[0].tolist()
        if packing.END in found:
            found = found[: found.index(packing.END)]
        texts.append(prompt + tokenizer.decode(found))
    return texts


def asked(kind: type[Settings], given: list[str], name: str, description: str | None) -> Settings:
    """The settings on a command line; those of the run that `--config FILE` names are defaults."""
    default = kind()
    if "--config" in given[:-1]:
        at = given.index("--config")
        default = load_config(Path(given[at + 1]), kind)
        given = given[:at] + given[at + 2 :]
    return tyro.cli(kind, prog=name, description=description, args=given, default=default)


def load_config(path: Path, kind: type[Settings]) -> Settings:
    """The configuration that a run saved, as settings of that kind."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; train first") from None
    except (ValueError, OSError):
        raise DataError(f"{path}: not the config.json of a run") from None
    known = {field.name for field in fields(kind)}
    if set(found) - known:
        raise DataError(f"{path}: unknown settings {', '.join(sorted(set(found) - known))}")
    found |= {"out": Path(found["out"]), "text": tuple(map(Path, found["text"]))}
    return kind(**found)


def run_sample(config: Sample) -> None:
    if not config.prompts:
        raise DataError('nothing to continue; give texts, as in: sample "def read("')
    saved = load_config(config.model / "config.json", Train)
    tokenizer = Tokenizer.from_file(str(config.model / "tokenizer.json"))
    model = model_of(saved, tokenizer.get_vocab_size())
    state = nnx.state(model)
    empty = nnx.to_pure_dict(state)
    weights = serialization.from_bytes(
        _by_name(empty), (config.model / "params.msgpack").read_bytes()
    )
    leaves = dict(jax.tree_util.tree_leaves_with_path(_by_name(empty)))
    assert len(leaves) == len(jax.tree.leaves(weights))
    nnx.replace_by_pure_dict(state, _like(empty, weights))
    nnx.update(model, state)
    for text in continued(
        model, tokenizer, config.prompts, config.tokens, config.temperature, config.seed
    ):
        print(text)


def _like(shape: Any, named: Any) -> Any:
    """The inverse of `_by_name`: the tree with the keys of `shape`."""
    if not isinstance(shape, dict):
        return named
    return {k: _like(v, named[str(k)]) for k, v in shape.items()}


def run_packing(config: Packing, console: Console) -> None:
    """Train on the same batches of documents, packed and one per row, from the same weights."""
    base = Train(length=config.length, rows=config.rows, steps=config.steps)
    documents = packing.read(packing.standard_library())
    tokenizer = data.byte_pairs(documents.train, base.vocabulary, packing.SPECIAL, sentences=False)
    examples = packing.encode(tokenizer, documents.train, config.length)
    test = packing.encode(tokenizer, documents.test[:300], config.length)
    probe = [
        arrays(packing.pack(batch, config.length))
        for batch in packing.filled(test, config.rows, config.length)
    ]
    table = Table("rows", "held-out loss", "tokens a second", title=f"{config.steps} steps")
    speeds = []
    for name in ("packed", "one document a row"):
        graph, params = nnx.split(model_of(base, tokenizer.get_vocab_size()))
        tx = optimizer(base)
        state = tx.init(params)
        times, seen = [], []
        for step, (_, batch) in zip(
            range(1, config.steps + 1), batches(examples, base), strict=False
        ):
            rows = batch if name == "packed" else packing.padded(batch, 4 * config.rows)
            packed = packing.pack(rows, config.length)
            given = arrays(packed), jnp.float32(learning_rate(base, step))
            start = time.monotonic()
            params, state, loss = train_step(graph, tx, params, state, *given)
            jax.block_until_ready(loss)
            times.append((len(rows), time.monotonic() - start))
            seen.append(int(np.sum(packed.ids >= 0)))
        # A step of a new shape is compiled, and is not counted.
        firsts = {shape: i for i, (shape, _) in reversed(list(enumerate(times)))}.values()
        counted = [i for i in range(len(times)) if i not in firsts]
        speeds.append(sum(seen[i] for i in counted) / sum(times[i][1] for i in counted))
        loss = held_out(graph, params, probe, 1)["held_out_loss"]
        table.add_row(name, f"{loss:.4f}", f"{speeds[-1]:,.0f}")
    console.print(table)
    console.print(f"packed is {speeds[0] / speeds[1]:.1f} times faster", highlight=False)


def run_context(config: Context, console: Console) -> None:
    """Run each length in a process of its own, to measure its peak memory alone."""
    rows = []
    for backend, lengths in (("auto", config.lengths), ("dense", config.dense)):
        for length in lengths:
            arguments = [str(length), str(config.window), backend]
            done = subprocess.run(
                [sys.executable, __file__, "measure", *arguments], capture_output=True, text=True
            )
            if done.returncode:
                raise DataError(f"{length} tokens, {backend}: {done.stderr.strip()[-300:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            say = rows[-1]
            console.print(
                f"{say['length']:>6} tokens, {backend}: {say['seconds']:.2f} s, peak "
                f"{say['peak'] / 2**20:.0f} MiB",
                highlight=False,
            )
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "context.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw_context(config.out / "context.png", rows)
    console.print(str(config.out / "context.png"))


def measure(length: int, window: int, backend: str) -> dict[str, Any]:
    """Seconds of one forward and backward of a row of that length, and the process's peak."""
    model = Decoder(2048, 128, 4, 4, 2, 256, window, 4, rngs=nnx.Rngs(0))
    for block in model.blocks:
        block.attention.backend = backend
    graph, params = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(0), (1, length + 1), 2, 2048)
    ids, places = jnp.zeros_like(tokens), jnp.arange(length + 1)[None]

    @jax.jit
    def run(params: Arrays, tokens: Int[Array, "1 T"]) -> Any:
        def loss_fn(params: Arrays) -> Array:
            return loss_of(nnx.merge(graph, params), tokens, ids, places)[0]

        return jax.value_and_grad(loss_fn)(params)

    jax.block_until_ready(run(params, tokens))
    start = time.monotonic()
    jax.block_until_ready(run(params, tokens))
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"length": length, "backend": backend, "seconds": seconds, "peak": peak}


@command("language_model.py")
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    console = Console()
    name = "language_model.py"
    match given[:1]:
        case ["sample"]:
            run_sample(tyro.cli(Sample, prog=f"{name} sample", args=given[1:]))
        case ["packing"]:
            run_packing(tyro.cli(Packing, prog=f"{name} packing", args=given[1:]), console)
        case ["context"]:
            run_context(tyro.cli(Context, prog=f"{name} context", args=given[1:]), console)
        case ["measure"]:
            print(json.dumps(measure(int(given[1]), int(given[2]), given[3])))
        case _:
            run_train(asked(Train, given, name, __doc__), console)


if __name__ == "__main__":
    sys.exit(main())

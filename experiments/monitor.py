"""Watches the logits of a language model that is trained with Muon, with and without QK-Clip.

    python experiments/monitor.py                       # Python's standard library
    python experiments/monitor.py --rate 0.02 --tau 50
    python experiments/monitor.py --text a.txt b.txt

Muon's updates are large in all directions, so the logits of attention may grow without bound. The
technical report of Kimi K2 (arXiv 2507.20534, section 2.1) shrinks the queries and keys of a head
whose largest logit exceeds tau. Here its largest logit, and its entropy, are statistics that the
layers compute in the pass that computes their output. The same model is trained twice on the same
batches: without the clip, and with it.

It writes under `--out`: monitor.png, the loss, the largest logit and the entropy of every head over
time, and monitor.json. README.md has the measured results.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packing
import tyro
from command import command
from data import DataError, Tokens
from decoder import Decoder, loss_of
from flax import nnx
from language_model import Arrays, Train, arrays, batches, held_out, model_of
from pictures import draw_heads
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxattn import stats
from jaxattn.nn.nnx import MultiHeadAttention
from jaxattn.shapes import Array, Float

# What every layer says of its heads.
ASKED = {"largest": stats.max(), "entropy": stats.entropy()}


@dataclass(frozen=True)
class Config:
    """Train twice with Muon, without and with QK-Clip, and draw what the heads do."""

    text: tuple[Path, ...] = ()  # UTF-8 files, .gz or not; else the standard library's sources
    out: Path = Path(__file__).parent / "results" / "monitor"

    vocabulary: int = 1024
    length: int = 256  # tokens a row; longer documents are cut
    rows: int = 4
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2  # keys are shared by two query heads
    d_ff: int = 384

    steps: int = 180  # of each run
    warmup: int = 20
    rate: float = 0.05  # of Muon and of Adam, which takes what is no matrix
    decay: float = 0.1  # of weights
    seed: int = 0  # of weights and batch order

    tau: float = 30.0  # the largest logit that a head may have


class Seen(NamedTuple):
    """What a step saw before it changed the weights; of a run, with an axis of steps in front."""

    loss: Float[Any, "*S"]
    largest: Float[Any, "*S layers N"]
    entropy: Float[Any, "*S layers N"]


def muon(config: Config) -> optax.GradientTransformation:
    """Muon for the matrices within the layers, Adam for everything else."""
    rate = optax.schedules.linear_schedule(0.0, config.rate, config.warmup)
    # Updates as large as Adam's, so that both take the same rate (arXiv 2502.16982).
    return optax.contrib.muon(
        rate,
        weight_decay=config.decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )


def matrices(params: Arrays) -> Arrays:
    """For each kernel, which axes are the matrix's input and output; None for the other weights."""

    def of(path: Any, weights: Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = [getattr(each, "key", None) for each in path]
        if "kernel" not in names:
            return None
        axes = tuple(range(weights.ndim))
        # Heads and their features go into the last projection of attention; else one axis does.
        inputs = 2 if "out" in names else 1
        return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(of, params)


def clip(model: Decoder, largest: Float[Array, "layers N"], tau: Float[Array, ""]) -> None:
    """QK-Clip: scales each head whose largest logit exceeds tau, so that it becomes tau.

    With gamma = tau / largest, queries and keys of a head are each multiplied by sqrt(gamma). Keys
    that several query heads share are left as they are, and the queries are multiplied by gamma, so
    that no other head changes; the report does so with the shared part of its keys.
    """
    for block, each in zip(model.blocks, largest, strict=True):
        attention = block.attention
        gamma = jnp.where(each > tau, tau / each, 1.0)
        is_shared = attention.key.kernel.shape[1] < len(each)
        both = (attention.query,) if is_shared else (attention.query, attention.key)
        for projection in both:
            factor = gamma[:, None] ** (1 / len(both))
            projection.kernel[...] *= factor[None]
            projection.bias[...] *= factor


def heads_of(seen: nnx.State, real: Float[Array, "B T"]) -> tuple[Array, Array]:
    """The largest logit and the mean entropy of every head, `[layers, N]`, over the real tokens."""
    blocks = [seen["blocks"][i] for i in range(len(seen["blocks"]))]
    each = [value for b in blocks for value in b["attention"]["attention_stats"].get_value()]
    values = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
    where = real[None, ..., None]
    return (
        jnp.max(values["largest"], (1, 2), where=where, initial=-jnp.inf),
        jnp.mean(values["entropy"], (1, 2), where=where),
    )


@partial(jax.jit, static_argnames=("graph", "tx"), donate_argnames=("params", "state"))
def train_step(
    graph: Any,
    tx: optax.GradientTransformation,
    params: Arrays,
    state: Arrays,
    batch: tuple[Array, Array, Array],
    tau: Float[Array, ""],
) -> tuple[Arrays, Arrays, Seen]:
    """A step of Muon, then QK-Clip by the logits of the same forward pass."""

    def loss_fn(params: Arrays) -> tuple[Array, nnx.State]:
        model = nnx.merge(graph, params)
        (total, count), seen = nnx.capture(loss_of, nnx.Intermediate)(model, *batch)
        return total / jnp.maximum(count, 1), seen

    (loss, seen), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    largest, entropy = heads_of(seen, batch[1][:, :-1] >= 0)
    updates, state = tx.update(gradients, state, params)
    model = nnx.merge(graph, optax.apply_updates(params, updates))
    clip(model, largest, tau)
    return nnx.state(model), state, Seen(loss, largest, entropy)


def train(
    config: Config,
    tx: optax.GradientTransformation,
    vocabulary: int,
    examples: Sequence[Tokens],
    probe: Sequence[Any],
    tau: float,
    console: Console,
) -> tuple[Seen, float]:
    """What was seen at each step, and the held-out loss after the last one."""
    name = f"QK-Clip at {tau:g}" if np.isfinite(tau) else "without a clip"
    base = Train(**{each.name: getattr(config, each.name) for each in fields(Config)[:-1]})
    attention = partial(MultiHeadAttention, stats=ASKED)
    graph, params = nnx.split(model_of(base, vocabulary, attention))
    state = tx.init(params)
    found: list[Seen] = []
    is_live = console.is_terminal
    steps = zip(range(1, config.steps + 1), batches(examples, base), strict=False)
    for step, (_, batch) in track(steps, name, config.steps, console=console, disable=not is_live):
        given = arrays(packing.pack(batch, config.length)), jnp.float32(tau)
        params, state, seen = train_step(graph, tx, params, state, *given)
        found.append(jax.tree.map(np.asarray, seen))
        if not is_live and step % 20 == 0:
            say = f"{name}: step {step}/{config.steps}, loss {seen.loss:.3f}"
            console.print(f"{say}, largest logit {seen.largest.max():.1f}", highlight=False)
    loss = held_out(graph, params, probe, 1)["held_out_loss"]
    return Seen(*map(np.stack, zip(*found, strict=True))), loss


def run(config: Config, console: Console) -> None:
    """Both runs, their table, and their picture."""
    started = time.monotonic()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if config.tau <= 0 or config.steps < 1:
        raise DataError(
            f"--tau, --steps: got {config.tau:g} and {config.steps}, expected numbers above 0"
        )
    documents = packing.read(config.text or packing.standard_library())
    tokenizer = data.byte_pairs(
        documents.train, config.vocabulary, packing.SPECIAL, sentences=False
    )
    examples = packing.encode(tokenizer, documents.train, config.length)
    some = documents.test[:: max(1, len(documents.test) // 300)]
    test = packing.encode(tokenizer, some, config.length)
    sizes = config.rows, config.length
    probe = [arrays(packing.pack(b, config.length)) for b in packing.filled(test, *sizes)]
    tx = muon(config)  # one for both runs, so that one program is compiled
    runs: dict[str, Seen] = {}
    table = Table("run", "training", "held out", "largest logit", "lowest entropy of a head")
    for name, tau in (("without a clip", np.inf), (f"QK-Clip at {config.tau:g}", config.tau)):
        given = config, tx, tokenizer.get_vocab_size(), examples, probe, tau, console
        runs[name], loss = train(*given)
        training, largest, entropy = runs[name]
        end = training[-20:].mean(), loss, largest[-1].max(), entropy[-1].min()
        table.add_row(name, *(f"{value:.2f}" for value in end))
    console.print(table)
    config.out.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {
        "out": str(config.out),
        "text": [str(path) for path in config.text],
    }
    lists = {
        name: {kind: values.tolist() for kind, values in seen._asdict().items()}
        for name, seen in runs.items()
    }
    content = json.dumps({"config": settings, "runs": lists}) + "\n"
    (config.out / "monitor.json").write_text(content)
    draw_heads(config.out / "monitor.png", runs, config.tau)
    say(f"the whole run took {time.monotonic() - started:.0f} s")
    for file in ("monitor.png", "monitor.json"):
        say(str(config.out / file))


@command("monitor.py")
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    run(tyro.cli(Config, prog="monitor.py", description=__doc__, args=given), Console())


if __name__ == "__main__":
    sys.exit(main())

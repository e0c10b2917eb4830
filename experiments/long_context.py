"""Trains the language model with each sequence split over several devices, of several processes.

    python experiments/long_context.py                        # 2 processes of 2 devices
    python experiments/long_context.py --processes 4 --data 2 --seq 4
    python experiments/long_context.py --config RUN/config.json --resume --processes 1
    python experiments/long_context.py compare                # with one device: the same losses
    python experiments/long_context.py table                  # memory and time by devices

Without a verb it trains. `compare` and `table` each have a `--help` of their own. `--config FILE`
takes the settings that a run saved; options override them.

One command starts all processes, on this machine, with the CPU as their devices. If one of them
ends or freezes, it says which, and ends the others. Ctrl-C saves a checkpoint and stops. A run
goes on from its last checkpoint with `--resume`, with as many processes and devices as it is given
then. README.md has the measured results.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import data
import jax
import jax.numpy as jnp
import language_model
import numpy as np
import optax
import packing
import processes
import tyro
from command import command
from data import DataError, Tokens
from decoder import Decoder, cross_entropy
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from language_model import load_config, model_of
from packing import Packed
from report import Report, write_metrics
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Grid
from training import Checkpoints, Rows

import jaxattn as ja
from jaxattn.nn.nnx import MultiHeadAttention
from jaxattn.shapes import Array, Bool, Float, Int

NAME = "long_context.py"
OUT = Path(__file__).parent / "results" / "long_context"
AXES = ("data", "seq")

Schedule = Literal["auto", "ring", "heads", "gather"]
LayoutName = Literal["balanced", "contiguous", "zigzag", "cyclic", "striped"]


@dataclass(frozen=True)
class Train(language_model.Train):
    """Train on whole files of Python's standard library, or of --text; save."""

    out: Path = OUT  # where metrics and checkpoints go

    processes: int = 2  # joined by jax.distributed
    data: int = 1  # devices over which the rows of a batch are split
    seq: int = 4  # devices over which each row is split; data * seq devices in all
    schedule: Schedule = "auto"  # how keys reach the queries that see them
    layout: LayoutName = "balanced"  # which tokens a device holds

    length: int = 4096  # tokens a row; longer files are cut
    rows: int = 1  # in a batch
    d_model: int = 64
    d_ff: int = 192
    window: int = 256

    steps: int = 100
    warmup: int = 20
    save_every: int = 20  # steps between checkpoints: a killed run loses at most these
    probe: int = 2  # batches of held-out files, every 100 steps and at the end

    silence: float = 30.0  # seconds without a sign of life after which a process counts as frozen
    grace: float = 60.0  # seconds that processes have to save and end after Ctrl-C


@dataclass(frozen=True)
class Table:
    """Memory, time, traffic and balance of one layer's attention, forward and backward."""

    lengths: tuple[int, ...] = (16384, 131072)
    devices: tuple[int, ...] = (1, 2, 4, 8)
    schedules: tuple[Literal["ring", "heads", "halo", "gather"], ...] = ("ring",)
    layout: LayoutName = "balanced"
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    window: int = 0  # 0: causal without a window
    timed: int = 16384  # tokens up to which it is run too; longer ones are only compiled


# ------------------------------------------------------------------------------------------- model


class SharedAttention(MultiHeadAttention):
    """Attention of a layer over a sequence that the devices of axis "seq" share.

    Args:
      schedule, layout: as in `jaxattn.parallel.attention`.
    """

    def __init__(
        self, *sizes: Any, schedule: str, layout: ja.parallel.Layout, **options: Any
    ) -> None:
        super().__init__(*sizes, **options)
        self.schedule, self.layout = schedule, layout

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "B T D"], *, mask: Any, rope_positions: Int[Array, "B T"], **_: Any
    ) -> Float[Array, "B T D"]:
        """This device's tokens, and the mask of all tokens of the row."""
        assert self.rope is not None
        out = ja.parallel.attention(
            self.rope(self.query(x), rope_positions),
            self.rope(self.key(x), rope_positions),
            self.value(x),
            axis="seq",
            schedule=self.schedule,
            layout=self.layout,
            mask=self.mask & mask,
        )
        return self.out(out)


def layout_of(config: Train) -> ja.parallel.Layout:
    """Which tokens of a row a device holds: layers share the order, so it is of all their masks."""
    masks = ja.masks.causal(), ja.masks.sliding_window(config.window)
    return made_layout(config.layout, masks, config.length, config.seq)


def made_layout(
    name: LayoutName, masks: Sequence[ja.Mask], length: int, ranks: int
) -> ja.parallel.Layout:
    if name == "balanced":
        return ja.parallel.layout(masks, length, ranks)
    made: Callable[[int, int], ja.parallel.Layout] = getattr(ja.parallel, name)
    return made(length, ranks)


def shared_model(config: Train, vocabulary: int) -> Decoder:
    attention = partial(SharedAttention, schedule=config.schedule, layout=layout_of(config))
    return model_of(config, vocabulary, attention)


class Batch(NamedTuple):
    """Rows of documents. Tokens are in the order in which devices hold them, but for `ids`."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    counted: Bool[Array, "B T"]
    places: Int[Array, "B T"]
    ids: Int[Array, "B T"]


# A mask is that of the whole row on every device, so that ids are not split over "seq".
PARTS: Any = Batch._make([*[P("data", "seq")] * 4, P("data")])


def batch_of(packed: Packed, layout: ja.parallel.Layout) -> Batch:
    """Each token with the next one of its document, from rows with one token more."""
    ids = packed.ids
    counted = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    parts = packed.tokens[:, :-1], packed.tokens[:, 1:], counted, packed.places[:, :-1]
    return Batch._make([*layout.shard(parts), ids[:, :-1]])


def make_mesh(config: Train) -> jax.sharding.Mesh:
    automatic = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: config.data * config.seq]
    return jax.make_mesh((config.data, config.seq), AXES, automatic, devices=devices)


def placed(mesh: jax.sharding.Mesh, array: Any, spec: P = P()) -> Array:  # noqa: B008
    """An array that every process has, as the parts of it that its devices hold."""
    whole, sharding = np.asarray(array), NamedSharding(mesh, spec)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def placed_batch(mesh: jax.sharding.Mesh, batch: Batch) -> Batch:
    return Batch(*(placed(mesh, array, spec) for array, spec in zip(batch, PARTS, strict=True)))


def mean_loss(graph: Any, params: Any, batch: Batch) -> Float[Array, ""]:
    """The loss of the whole batch, in nats a token, from the part that this device holds."""
    model = nnx.merge(graph, params)
    logits = model(batch.tokens, batch.ids, batch.places)
    part = cross_entropy(logits, batch.targets, batch.counted), jnp.sum(batch.counted)
    total, count = jax.lax.psum(part, AXES)
    return total / jnp.maximum(count, 1)


def train_step(graph: Any, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> Any:
    """A compiled step: `params, state, loss = step(params, state, batch, rate)`.

    All of it runs on every device. Weights are the same on all of them, and so `shard_map` sums
    their gradients.
    """

    def step(params: Any, state: Any, batch: Batch, rate: Float[Array, ""]) -> Any:
        loss, gradients = jax.value_and_grad(partial(mean_loss, graph))(params, batch)
        return *language_model.updated(tx, params, state, gradients, rate), loss

    shared = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), PARTS, P()), out_specs=P())
    return jax.jit(shared, donate_argnums=(0, 1))


# ------------------------------------------------------------------------------------- one process


def worker(rank: int, port: int, config: Train) -> None:
    """A process of a run: trains on its devices, and tells the launcher each step."""
    # A tenth: nine signs may come late on a busy machine.
    heart = processes.Heart(config.silence / 10)
    stopping = interruption()
    if config.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", config.processes, rank)
        stopping = multihost_utils.reached_preemption_sync_point
    try:
        train(config, heart.tell if rank == 0 else lambda _: None, stopping)
        if config.processes > 1:
            jax.distributed.shutdown()
    except Exception:
        traceback.print_exc()
        processes.end(1)
    processes.end(0)


def interruption() -> Callable[[int], bool]:
    """Whether this process was asked to end. Several have to agree on a step, which JAX does."""
    found: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: found.append(number))
    return lambda step: bool(found)


def train(
    config: Train, tell: Callable[[dict[str, Any]], None], stopping: Callable[[int], bool]
) -> None:
    """Steps from the last checkpoint on, to the last one or until all are asked to end."""
    mesh, layout = make_mesh(config), layout_of(config)
    examples, test, vocabulary = load_tokens(config.out / "tokens.npz")
    graph, params = nnx.split(shared_model(config, vocabulary))
    tx = language_model.optimizer(config)
    state = jax.tree.map(partial(placed, mesh), tx.init(params))
    params = jax.tree.map(partial(placed, mesh), params)
    checkpoints = Checkpoints(config.out / "checkpoints", resume=True)
    kept = {"params": nnx.to_pure_dict(params), "state": jax.tree.leaves(state)}
    found, rows, before = checkpoints.latest(kept)
    nnx.replace_by_pure_dict(params, found["params"])
    state = jax.tree.unflatten(jax.tree.structure(state), found["state"])
    done = int(rows[-1]["step"]) if rows else 0
    for row in rows:
        tell({"earlier": row})

    # A row of T tokens with their targets takes T + 1.
    longer = replace(config, length=config.length + 1)

    def on_devices(batch: Sequence[Sequence[Tokens]]) -> Batch:
        return placed_batch(mesh, batch_of(packing.pack(batch, longer.length), layout))

    some = itertools.islice(packing.filled(test, config.rows, longer.length), config.probe)
    probe = [on_devices(batch) for batch in some]
    step_fn = train_step(graph, tx, mesh)
    evaluate = jax.jit(
        jax.shard_map(partial(mean_loss, graph), mesh=mesh, in_specs=(P(), PARTS), out_specs=P())
    )
    started = time.monotonic()
    stream = language_model.batches(examples, longer, done)
    for step, (epoch, batch) in zip(range(done + 1, config.steps + 1), stream, strict=False):
        began = time.monotonic()
        rate = language_model.learning_rate(config, step)
        params, state, loss = step_fn(params, state, on_devices(batch), np.float32(rate))
        row = {"step": step, "epoch": epoch, "loss": float(loss), "learning_rate": rate}
        now = time.monotonic()
        tokens = sum(len(document) for documents in batch for document in documents)
        row |= {"seconds": before + now - started, "tokens_per_second": tokens / (now - began)}
        stop, last = stopping(step), step == config.steps
        if stop or last or step % 100 == 0:
            row["held_out_loss"] = float(np.mean([float(evaluate(params, b)) for b in probe]))
        rows.append(row)
        tell({"row": row})
        if stop or last or step % config.save_every == 0:
            kept = {"params": nnx.to_pure_dict(params), "state": jax.tree.leaves(state)}
            checkpoints.save(step, kept, rows, before + time.monotonic() - started)
        if stop:
            break
    checkpoints.manager.close()


# ---------------------------------------------------------------------------------------- launcher


def check(config: Train) -> None:
    """Refuses settings that don't fit together, before any process starts."""

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise DataError(message)

    counts = (
        "processes",
        "data",
        "seq",
        "length",
        "rows",
        "steps",
        "save_every",
        "window",
        "probe",
    )
    for name in counts:
        refuse(getattr(config, name) < 1, f"--{name.replace('_', '-')}: expected 1 or more")
    devices = config.data * config.seq
    refuse(
        devices % config.processes > 0,
        f"--processes {config.processes}: expected a divisor of data * seq, {devices} devices",
    )
    refuse(
        config.rows % config.data > 0,
        f"--rows {config.rows}: expected a multiple of --data {config.data}",
    )
    parts = 2 * config.seq if config.layout == "zigzag" else config.seq
    refuse(
        config.length % parts > 0,
        f"--length {config.length}: expected a multiple of {parts}, the parts of a row",
    )
    refuse(
        config.schedule == "heads" and config.heads % config.seq > 0,
        f"--schedule heads: --seq {config.seq} does not divide the {config.heads} heads",
    )
    refuse(
        config.d_model % (2 * config.heads) > 0 or config.heads % config.kv_heads > 0,
        f"--heads {config.heads}: expected a multiple of --kv-heads {config.kv_heads}, and "
        f"--d-model {config.d_model} to be an even multiple of it",
    )
    refuse(not 0 < config.silence < 100, "--silence: expected 0 to 100 seconds, JAX's own limit")


def save_tokens(config: Train) -> None:
    """Text as tokens, once for all processes."""
    documents = packing.read(config.text or packing.standard_library(), cut=False)
    tokenizer = data.byte_pairs(
        documents.train, config.vocabulary, packing.SPECIAL, sentences=False
    )
    arrays: dict[str, Any] = {}
    for name, texts in (("train", documents.train), ("test", documents.test)):
        found = packing.encode(tokenizer, texts, config.length + 1)
        total = sum(map(len, found))
        if name == "train" and total <= config.rows * (config.length + 1):
            raise DataError(
                f"{total:,} tokens of text don't fill a batch; give more text, fewer --rows or a "
                "smaller --length"
            )
        arrays |= {name: np.concatenate(found), f"{name}_ends": np.cumsum(list(map(len, found)))}
    size = tokenizer.get_vocab_size()
    np.savez(config.out / "tokens.npz", vocabulary=size, **arrays)


def load_tokens(path: Path) -> tuple[list[Tokens], list[Tokens], int]:
    """Documents to train on, those held out, and the size of the vocabulary."""
    with np.load(path) as found:
        train, test = (
            np.split(found[name], found[f"{name}_ends"][:-1]) for name in ("train", "test")
        )
        return train, test, int(found["vocabulary"])


def devices_of(count: int) -> dict[str, str]:
    """The environment of a process with so many devices: parts of the CPU."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    name = "--xla_force_host_platform_device_count"
    flags = [flag for flag in flags if not flag.startswith(name)] + [f"{name}={count}"]
    # One core may have to compute the parts of many devices before their collective begins.
    flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=3600")
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def run(config: Train, console: Console) -> Rows:
    """Runs all processes of a training to its end; its metrics."""
    check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    settings = asdict(config) | {"resume": False}
    (config.out / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    save_tokens(config)
    try:
        port = processes.free_port()
    except OSError as error:
        raise DataError(f"no socket on 127.0.0.1, which processes join by ({error})") from None
    devices = config.data * config.seq // config.processes
    console.print(
        f"processes: {config.processes}, devices of each: {devices}; rows of {config.length} "
        f"tokens, each over {config.seq} of the devices",
        highlight=False,
        soft_wrap=True,
    )
    rows: Rows = []
    report = Report(console, config.steps, config.minutes)

    def told(message: dict[str, Any]) -> None:
        for kind, row in message.items():
            rows.append(row)
            if kind == "row":
                report.update(row)

    arguments = [str(port), str(config.out / "config.json")]
    script = str(Path(__file__).resolve())
    commands = [
        [sys.executable, script, "worker", str(rank), *arguments]
        for rank in range(config.processes)
    ]
    limits = processes.Limits(config.silence, config.grace, config.minutes)
    resume = f"python experiments/{NAME} --config {config.out}/config.json --resume"

    def kept() -> str:
        # The folder itself is asked: a rank may end between a save and its message.
        step = Checkpoints(config.out / "checkpoints", resume=True).manager.latest_step()
        return f"the last checkpoint is of step {step}" if step else "there is no checkpoint yet"

    try:
        with report.progress:
            asked = processes.run(commands, config.out / "logs", devices_of(devices), limits, told)
    except processes.ProcessError as error:
        raise processes.ProcessError(
            f"{error}; all processes were ended; {kept()}; to continue: {resume}"
        ) from None
    if asked:
        console.print(f"stopped; {kept()}; to continue:", highlight=False)
        console.print(f"  {resume}", highlight=False, soft_wrap=True)
        raise KeyboardInterrupt
    if not rows:
        raise processes.ProcessError(f"no step was done within {config.minutes} minutes")
    write_metrics(config.out / "metrics.csv", rows)
    return rows


# --------------------------------------------------------------------------------------- commands


def run_train(config: Train, console: Console) -> None:
    started = time.monotonic()
    rows = run(config, console)
    end = rows[-1]
    held_out = f"; held out {end['held_out_loss']:.3f}" if "held_out_loss" in end else ""
    console.print(
        f"{int(end['step'])} steps in {end['seconds']:.0f} s; loss {end['loss']:.3f} nats a token"
        f"{held_out}; the whole run took {time.monotonic() - started:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    console.print(str(config.out / "metrics.csv"), highlight=False, soft_wrap=True)


def run_compare(config: Train, console: Console) -> float:
    """Trains on one device and on all, and returns the largest difference of their losses."""
    one = replace(config, processes=1, data=1, seq=1, schedule="auto", out=config.out / "one")
    runs = [run(one, console), run(replace(config, out=config.out / "many"), console)]
    devices = config.data * config.seq
    grid = Grid("step", "one device", f"{devices} devices", "difference")
    differences = []
    for mine, theirs in zip(*runs, strict=True):
        differences.append(abs(mine["loss"] - theirs["loss"]))
        cells = (f"{x:.6f}" for x in (mine["loss"], theirs["loss"]))
        grid.add_row(str(mine["step"]), *cells, f"{differences[-1]:.1e}")
    console.print(grid)
    console.print(
        f"the largest difference of {len(differences)} losses, in nats a token: "
        f"{max(differences):.1e}",
        highlight=False,
        soft_wrap=True,
    )
    return max(differences)


def run_table(config: Table, console: Console) -> list[dict[str, Any]]:
    """Each measurement in a process of its own, which has as many devices."""
    kind = f"a window of {config.window}" if config.window else "causal"
    title = f"attention of {config.heads} heads of {config.head_dim}, {kind}, {config.layout}"
    names = ("schedule", "tokens", "devices", "memory a device", "seconds", "sent a device",
             "balance")  # fmt: skip
    title, note = f"{title}, forward and backward", "seconds -: compiled, and not run"
    grid = Grid(*names, title=title, caption=note)
    found = []
    cases = list(itertools.product(config.schedules, config.lengths, config.devices))
    with Progress(console=console, disable=not console.is_terminal) as bar:
        for schedule, length, devices in bar.track(cases, description="table"):
            case = asdict(config) | {"schedule": schedule, "length": length, "devices": devices}
            done = subprocess.run(
                [sys.executable, __file__, "measure", json.dumps(case)],
                env=devices_of(devices),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
                raise DataError(f"{schedule}, {length} tokens over {devices}: {last[0]}")
            row = json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            seconds = row["seconds"]
            cells = (
                schedule if devices > 1 else "-",
                f"{length:,}",
                str(devices),
                f"{row['memory'] / 2**20:.1f} MiB",
                "-" if seconds is None else f"{seconds:.2f}",
                f"{row['sent'] / 2**20:.1f} MiB",
                f"{row['balance']:.2f}",
            )
            grid.add_row(*cells)
            if not console.is_terminal:
                console.print("  ".join(cells), highlight=False)
    console.print(grid)
    return found


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """What one layer's attention takes, forward and backward, on this process's devices.

    Args:
      case: the fields of `Table`, and a `schedule`, a `length` and a number of `devices`.

    Returns:
      Bytes of temporary memory on each device, as the compiler counts them; seconds of a second
      call, or None; bytes that a device sends; and the most work of a device by the mean.
    """
    length, devices, window = case["length"], case["devices"], case["window"]
    mask = ja.masks.sliding_window(window) if window else ja.masks.causal()
    layout = made_layout(case["layout"], [mask], length, devices)
    options = {"schedule": case["schedule"], "layout": layout, "mask": mask}
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("seq",), automatic, devices=jax.devices()[:devices])
    parts = P(None, "seq")

    def both(query: Array, key: Array, value: Array, slope: Array) -> Any:
        out, back = jax.vjp(partial(ja.parallel.attention, **options), query, key, value)
        return out, back(slope)

    split = NamedSharding(mesh, parts)
    query, key = (
        jax.ShapeDtypeStruct((1, length, n, case["head_dim"]), jnp.float32, sharding=split)
        for n in (case["heads"], case["kv_heads"])
    )
    given = query, key, key, query
    run = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=parts, out_specs=parts))
    compiled = run.lower(*given).compile()
    seconds = None
    if length <= case["timed"]:
        draw = jax.jit(
            lambda: [jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(given)],
            out_shardings=split,
        )
        arrays = draw()
        jax.block_until_ready(compiled(*arrays))
        started = time.monotonic()
        jax.block_until_ready(compiled(*arrays))
        seconds = time.monotonic() - started
    plan = ja.parallel.explain(query, key, key, ranks=devices, **options)
    memory: Any = compiled.memory_analysis()
    return {
        "memory": memory.temp_size_in_bytes,
        "seconds": seconds,
        "sent": sum(plan.sent) if devices > 1 else 0,
        "balance": plan.balance,
    }


@command(NAME)
def main(given: list[str]) -> int:
    """Runs what the arguments ask for; 1 if a process failed."""
    console = Console()
    try:
        match given[:1]:
            case ["worker"]:
                worker(int(given[1]), int(given[2]), load_config(Path(given[3]), Train))
            case ["compare"]:
                default = Train(steps=20, minutes=None, out=OUT / "compare")
                config = tyro.cli(
                    Train,
                    prog=f"{NAME} compare",
                    description="Train on one device and on all, and compare the losses.",
                    args=given[1:],
                    default=default,
                )
                run_compare(config, console)
            case ["table"]:
                run_table(tyro.cli(Table, prog=f"{NAME} table", args=given[1:]), console)
            case ["measure"]:
                print(json.dumps(measure(json.loads(given[1]))))
            case _:
                run_train(language_model.asked(Train, given, NAME, __doc__), console)
    except processes.ProcessError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

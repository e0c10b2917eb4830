"""Training that can stop and continue: steps, evaluation on held-out data, checkpoints.

A checkpoint holds weights, their average, Adam's moments, the step, and the place in the data. The
order of data and dropout depend only on the seed, the epoch and the step. So a run that was stopped
ends with the same bits as one that was not.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from data import Batch, Tokens
from flax.training.train_state import TrainState
from report import Report
from rich.console import Console
from transformer import Params, Transformer, inverse_sqrt, masked_loss_and_accuracy

from jaxattn.shapes import Array, Float, Int

Encoded = tuple[list[Tokens], list[Tokens]]
Rows = list[dict[str, float]]


class State(TrainState):
    """Flax's training state, and a moving average of its weights, which evaluation uses."""

    average: Params


@dataclass(frozen=True)
class Schedule:
    """How long and how to train; see `translate.Train`."""

    steps: int
    minutes: float | None
    batch_tokens: int
    d_model: int
    warmup: int
    factor: float
    smoothing: float
    averaging: float
    seed: int
    save_every: int


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
    model: Transformer, params: Params, probe: Sequence[Batch], smoothing: float, place: Any
) -> dict[str, float]:
    """Mean loss and token accuracy over the held-out batches, as metrics."""
    parts = [held_out_step(model, params, *place(b), smoothing) for b in probe]
    loss, accuracy, count = np.sum([np.asarray(part) for part in parts], axis=0)
    return {
        "held_out_loss": float(loss / count),
        "held_out_token_accuracy": float(accuracy / count),
    }


class Checkpoints:
    """The last two states of a run, with their metrics."""

    def __init__(self, folder: Path, resume: bool) -> None:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, arrays: Any, rows: Rows, done: float) -> None:
        """Saves the state after a step, and the seconds until then."""
        if step != self.manager.latest_step():
            parts = {
                "state": ocp.args.StandardSave(arrays),
                "rows": ocp.args.JsonSave({"rows": rows, "seconds": done}),
            }
            self.manager.save(step, args=ocp.args.Composite(**parts))

    def latest(self, arrays: Any) -> tuple[Any, Rows, float]:
        """The arrays that were saved last, or those given if there are none."""
        step = self.manager.latest_step()
        if step is None:
            return arrays, [], 0.0
        parts = {"state": ocp.args.StandardRestore(arrays), "rows": ocp.args.JsonRestore()}
        found = self.manager.restore(step, args=ocp.args.Composite(**parts))
        return found["state"], found["rows"]["rows"], found["rows"]["seconds"]


def _arrays(state: State) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "params", "opt_state", "average")}


@contextmanager
def interruptions() -> Iterator[list[bool]]:
    """A list that is no longer empty after Ctrl-C, which raises no exception inside."""
    found: list[bool] = []
    kept = signal.signal(signal.SIGINT, lambda *_: found.append(True))
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, kept)


def everywhere() -> tuple[Callable[[Any], Any], Callable[[Batch], Any], int]:
    """How weights and batches are placed on the devices, and the number of devices.

    Each device has all weights and a part of the rows; the compiler adds up the gradients.
    """
    devices = jax.devices()
    if len(devices) == 1:
        return lambda x: x, lambda b: (b.source, b.target), 1
    mesh = jax.make_mesh((len(devices),), ("data",), (jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    on_all = jax.sharding.NamedSharding(mesh, P())
    rows = jax.sharding.NamedSharding(mesh, P("data"))
    put = partial(jax.device_put, device=on_all)
    return put, lambda b: jax.device_put((b.source, b.target), rows), len(devices)


class Pace(NamedTuple):
    """How long a run lasts, and how often it saves."""

    steps: int
    minutes: float | None
    save_every: int


def loop(
    pace: Pace,
    batches: Iterator[tuple[int, Any]],
    rows: Rows,
    before: float,
    *,
    do: Callable[[int, Any], tuple[Array, int]],
    names: Sequence[str],
    rate: Callable[[int], Any],
    evaluate: Callable[[], dict[str, float]],
    save: Callable[[int, Rows, float], None],
    console: Console,
) -> bool:
    """Steps from the one after the last row's on: metrics, checkpoints, Ctrl-C.

    Args:
      pace: when to stop and to save.
      batches: epochs and batches, beginning with the first that is not done yet.
      rows: metrics so far; every 20 steps one is added.
      before: seconds that the run took before.
      do: one step; what it measured, and how many tokens it saw.
      names: of what is measured.
      rate: the learning rate of a step.
      evaluate: what is held out, every 100 steps.
      save: given the step, the rows, and the seconds so far.

    Returns:
      Whether it was interrupted, after it saved.
    """
    report = Report(console, pace.steps, pace.minutes)
    started = since = time.monotonic()
    waiting: list[Array] = []
    seen = 0
    first = int(rows[-1]["step"]) + 1 if rows else 1
    with interruptions() as interrupted, report.progress:
        for step, (epoch, batch) in zip(range(first, pace.steps + 1), batches, strict=False):
            measured, tokens = do(step, batch)
            waiting.append(measured)
            seen += tokens
            last = step == pace.steps or bool(interrupted)
            # Reading a result waits for the device, so that is done every 20 steps only.
            if step == 1 or step % 20 == 0 or last or step % pace.save_every == 0:
                means = np.mean([np.asarray(m) for m in waiting], axis=0)
                now = time.monotonic()
                seconds = before + now - started
                last |= pace.minutes is not None and seconds > 60 * pace.minutes
                row = {"step": step, "epoch": epoch, "seconds": seconds}
                row |= dict(zip(names, map(float, means), strict=True))
                row |= {
                    "learning_rate": float(rate(step)),
                    "tokens_per_second": seen / (now - since),
                }
                if step % 100 == 0 or last:
                    row |= evaluate()
                rows.append(row)
                report.update(row)
                waiting, seen, since = [], 0, time.monotonic()
            if last or step % pace.save_every == 0:
                save(step, rows, before + time.monotonic() - started)
            if last:
                break
    return bool(interrupted)


def train(
    schedule: Schedule,
    model: Transformer,
    examples: Encoded,
    test: Encoded,
    widths: Sequence[int],
    checkpoints: Checkpoints,
    console: Console,
) -> tuple[Params, Rows, bool]:
    """Train for `steps` or `minutes`: averaged weights, a row of metrics every 20 steps, and
    whether it was interrupted, after a checkpoint."""
    # XLA's own generator: dropout by the default one costs a tenth of a step on a CPU, and half a
    # minute of compilation.
    init_key, dropout_key = jax.random.split(jax.random.key(schedule.seed, impl="rbg"))
    rate = inverse_sqrt(schedule.d_model, schedule.warmup, schedule.factor)
    tokens = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(model.init)(init_key, tokens, tokens)["params"]
    state = State.create(
        apply_fn=model.apply,
        params=params,
        average=jax.tree.map(jnp.copy, params),  # a copy: the state's buffers are donated
        tx=optax.adam(rate, b1=0.9, b2=0.98, eps=1e-9),
    )
    on_all, place, count = everywhere()
    found, rows, before = checkpoints.latest(_arrays(state))
    state = state.replace(**found)
    state = on_all(state.replace(step=jnp.asarray(state.step, jnp.int32)))
    # Enough held-out pairs for a curve; all of them are decoded at the end.
    some = [slice(None, None, max(1, len(side) // 500)) for side in test]
    sizes = widths[-1:], schedule.batch_tokens
    probe = list(data.batches(test[0][some[0]], test[1][some[1]], *sizes, multiple=count))

    def stream(skip: int) -> Iterator[tuple[int, Batch]]:
        """Batches from the `skip`-th on; the order of an epoch depends on its number alone."""
        for epoch in itertools.count(1):
            rng = np.random.default_rng((schedule.seed, epoch))
            found = data.batches(*examples, widths, schedule.batch_tokens, rng, multiple=count)
            for batch in found:
                if skip == 0:
                    yield epoch, batch
                else:
                    skip -= 1

    def do(step: int, batch: Batch) -> tuple[Array, int]:
        nonlocal state
        given = *place(batch), dropout_key, schedule.smoothing, schedule.averaging
        state, measured = train_step(state, *given)
        return measured, int(np.sum(batch.target[:, 1:] != data.PAD))

    def evaluate() -> dict[str, float]:
        return held_out(model, state.average, probe, schedule.smoothing, place)

    def save(step: int, rows: Rows, seconds: float) -> None:
        checkpoints.save(step, _arrays(state), rows, seconds)

    interrupted = loop(
        Pace(schedule.steps, schedule.minutes, schedule.save_every),
        stream(int(state.step)),
        rows,
        before,
        do=do,
        names=("loss", "token_accuracy"),
        rate=rate,
        evaluate=evaluate,
        save=save,
        console=console,
    )
    return jax.device_get(state.average), rows, interrupted

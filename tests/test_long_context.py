"""Training with sequences over devices and processes: losses, checkpoints, and what fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from cases import rng
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import language_model
import long_context
import packing
import processes
from long_context import Train

pytestmark = pytest.mark.usefixtures("as_users_run")

EXPERIMENTS = Path(long_context.__file__).parent


@pytest.fixture
def loopback() -> None:
    try:
        processes.free_port()
    except OSError as error:
        pytest.skip(f"sockets are refused here: {error}")


TINY = {"d_model": 16, "layers": 2, "d_ff": 16, "length": 64, "window": 12, "rows": 2}


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "seq": 2, "schedule": "ring", "layout": "zigzag"},
        {"data": 1, "seq": 4, "schedule": "heads", "layout": "striped"},
    ],
    ids=str,
)
def test_losses_are_those_of_the_language_model(shape: Any) -> None:
    """Of `language_model.train_step`, which knows nothing of devices, with the same weights."""
    config = Train(**TINY, **shape, warmup=2, steps=4)
    make = rng(83)
    documents = [make.integers(2, 30, n).astype(np.int32) for n in make.integers(2, 50, 60)]
    mesh, layout = long_context.make_mesh(config), long_context.layout_of(config)
    tx = language_model.optimizer(config)
    graph, params = nnx.split(language_model.model_of(config, 30))
    shared, _ = nnx.split(long_context.shared_model(config, 30))
    step = long_context.train_step(shared, tx, mesh)
    state = tx.init(params)
    mine = jax.tree.map(lambda a: long_context.placed(mesh, a), (params, state))
    batches = packing.filled(documents, config.rows, config.length + 1)
    for number, batch in zip(range(1, config.steps + 1), batches, strict=False):
        packed = packing.pack(batch, config.length + 1)
        rate = jnp.float32(language_model.learning_rate(config, number))
        given = long_context.placed_batch(mesh, long_context.batch_of(packed, layout))
        *mine, loss = step(*mine, given, rate)
        arrays = language_model.arrays(packed)
        params, state, wanted = language_model.train_step(graph, tx, params, state, arrays, rate)
        np.testing.assert_allclose(loss, wanted, rtol=3e-6)


# --- runs of several processes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> Path:
    words = rng(79).integers(0, 20, 400)
    lines = [f"def f{i}(a{i % 7}):\n    return a{i % 7} + {i % 5}\n\n" for i in words]
    folder = tmp_path_factory.mktemp("text")
    for n in range(40):
        (folder / f"{n}.py").write_text("".join(lines[10 * n : 10 * n + 10]))
    return folder


class Launched:
    """A training of two processes in the background, once it has saved a checkpoint."""

    def __init__(self, text: Path, out: Path, **settings: Any) -> None:
        sizes = TINY | {"vocabulary": 300, "processes": 2, "seq": 2} | settings
        options = [f"--{n.replace('_', '-')}={v}" for n, v in sizes.items()]
        command = [sys.executable, EXPERIMENTS / "long_context.py", "--out", out, *options]
        self.out = out
        self.process = subprocess.Popen(
            [*command, "--text", *sorted(text.glob("*.py"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 120
        while not (out / "checkpoints" / "5").exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        self.workers = psutil.Process(self.process.pid).children()
        self.workers.sort(key=lambda worker: worker.cmdline()[3])

    def end(self, seconds: float) -> tuple[int, str, str]:
        """Status and output, after at most so long, with nothing left behind."""
        out, err = self.process.communicate(timeout=seconds)
        _, alive = psutil.wait_procs(self.workers, 1)
        assert not alive
        return self.process.returncode, out, err


@pytest.fixture
def launched(loopback: None, text: Path, tmp_path: Path) -> Iterator[Any]:
    made: list[Launched] = []

    def launch(**settings: Any) -> Launched:
        made.append(Launched(text, tmp_path / "run", save_every=5, **settings))
        return made[-1]

    yield launch
    for each in made:
        for process in (each.process, *each.workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_killed_run_goes_on_with_other_devices(launched: Any, tmp_path: Path) -> None:
    """The launcher names the rank that died, and the losses are those of one device."""
    run = launched(steps=40, rate=1e-3)
    run.workers[1].kill()
    status, _, err = run.end(10)
    assert status == 1
    assert f"rank 1 (process {run.workers[1].pid}) was killed by SIGKILL" in err
    assert "all processes were ended; the last checkpoint is of step" in err
    assert err.count("\n") == 1
    # One process with four devices goes on.
    saved = language_model.load_config(run.out / "config.json", Train)
    told: list[Any] = []
    here = replace(saved, processes=1, data=2, seq=2, layout="zigzag", save_every=100)
    long_context.train(here, told.append, lambda step: False)
    earlier = [message["earlier"] for message in told if "earlier" in message]
    rows = earlier + [message["row"] for message in told if "row" in message]
    assert 5 <= len(earlier) < 40
    alone = replace(here, data=1, seq=1, out=tmp_path / "alone")
    alone.out.mkdir()
    (alone.out / "tokens.npz").write_bytes((run.out / "tokens.npz").read_bytes())
    told.clear()
    long_context.train(alone, told.append, lambda step: False)
    wanted = [message["row"] for message in told if "row" in message]
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == list(range(1, 41))
    losses = [[row["loss"] for row in each] for each in (rows, wanted)]
    # Roundings grow as weights are trained.
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert wanted[-1]["loss"] < wanted[0]["loss"]
    np.testing.assert_allclose(rows[-1]["held_out_loss"], wanted[-1]["held_out_loss"], rtol=1e-4)


def test_a_frozen_process_is_named(launched: Any) -> None:
    run = launched(steps=3000, silence=3, layers=1)
    run.workers[1].suspend()
    status, _, err = run.end(15)
    assert status == 1
    assert f"rank 1 (process {run.workers[1].pid}) gave no sign of life for 3 s" in err
    assert err.count("\n") == 1


def test_ctrl_c_saves_and_stops(launched: Any) -> None:
    run = launched(steps=3000, layers=1)
    run.process.send_signal(signal.SIGINT)
    status, out, err = run.end(30)
    assert (status, err) == (130, "")
    step = out.split("stopped; the last checkpoint is of step ")[1].split(";")[0]
    assert (run.out / "checkpoints" / step).exists()
    assert "config.json --resume" in out


def test_processes_outlive_no_launcher(tmp_path: Path) -> None:
    code = f"""
    import pathlib, processes, sys
    code = "import processes, time; processes.Heart(0.05); time.sleep(60)"
    limits = processes.Limits(10, 10)
    command = [sys.executable, "-c", code]
    processes.run([command], pathlib.Path({str(tmp_path)!r}), {PATHS!r}, limits, print)
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=PATHS)
    until = time.monotonic() + 20
    while not (found := psutil.Process(launcher.pid).children()):
        assert time.monotonic() < until
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs(found, 10)[1]


PATHS = {**os.environ, "PYTHONPATH": str(EXPERIMENTS)}
BEATING = "import processes, sys, time; heart = processes.Heart(0.05);"


@pytest.mark.parametrize(
    ("code", "limits", "says"),
    [
        ("print('ValueError: no'); processes.end(3)", {}, "rank 1 failed: ValueError: no .*rank-1"),
        ("sys.exit(1)", {}, "rank 1 failed: no message"),
        ("import signal, os; os.kill(os.getpid(), signal.SIGABRT)", {},
         "rank 1 .* was killed by SIGABRT"),
        ("time.sleep(0.2); import signal, os; os.kill(os.getpid(), signal.SIGSTOP)",
         {"silence": 1}, "rank 1 .* gave no sign of life for 1 s"),
        ("import signal; signal.signal(15, signal.SIG_IGN); time.sleep(60)",
         {"minutes": 0.02, "grace": 0.5}, "the ranks did not end within 0.5 s"),
    ],
)  # fmt: skip
def test_what_ends_a_process_is_said(code: str, limits: Any, says: str, tmp_path: Path) -> None:
    waits = "import signal; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    commands = [[sys.executable, "-c", f"{BEATING} {each}"] for each in (waits, code, waits)]
    allowed = processes.Limits(**{"silence": 20, "grace": 20} | limits)
    with pytest.raises(processes.ProcessError, match=says):
        processes.run(commands, tmp_path, PATHS, allowed, print)


def test_all_end_where_one_is_asked_too_early(tmp_path: Path) -> None:
    """A process that does not catch SIGTERM yet ends by it, and the others need not wait."""
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    commands = [[sys.executable, "-c", f"{BEATING} {each}"] for each in (deaf, "time.sleep(60)")]
    started = time.monotonic()
    processes.run(commands, tmp_path, PATHS, processes.Limits(20, 20, minutes=0.02), print)
    assert time.monotonic() - started < 10


def test_what_processes_tell(tmp_path: Path) -> None:
    """Messages arrive whole and in order; after `minutes` all are asked to end."""
    code = """
    import signal, threading, processes
    heart, asked = processes.Heart(0.001), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    for n in range(2000):
        heart.tell({"n": n, "text": "x" * 100})
    while not asked.wait(0.05):
        pass
    heart.tell({"n": "end"})
    """
    told: list[Any] = []
    limits = processes.Limits(20, 20, minutes=0.02)
    commands = [[sys.executable, "-c", textwrap.dedent(code)]]
    assert not processes.run(commands, tmp_path, PATHS, limits, told.append)
    assert [message["n"] for message in told] == [*range(2000), "end"]


# --- commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "missing.txt"], "missing.txt: no such file"),
        (["--config", "nowhere.json"], "nowhere.json: no such file; train first"),
        (["--config", "one.txt"], "one.txt: not the config.json of a run"),
        (["--processes", "3"], "--processes 3: expected a divisor of data * seq, 4 devices"),
        (["--data", "2"], "--rows 1: expected a multiple of --data 2"),
        (["--length", "4098"], "--length 4098: expected a multiple of 4"),
        (["--schedule", "heads", "--seq", "8"], "--schedule heads: --seq 8 does not divide the 4"),
        (["--d-model", "20"], "--heads 4: expected a multiple of --kv-heads 2, and --d-model 20"),
        (["--steps", "0"], "--steps: expected 1 or more"),
        (["--silence", "200"], "--silence: expected 0 to 100 seconds"),
        (
            ["--text", "one.txt", "some.txt"],
            "NUMBER tokens of text don't fill a batch; give more text",
        ),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "some.txt").write_text("some words\n" * 100)
    assert long_context.main(["--out", str(tmp_path / "run"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.sub(r"^(long_context.py: )[\d,]+", r"\1NUMBER", err).startswith(
        f"long_context.py: {says}"
    )
    assert err.count("\n") == 1


def test_the_table_measures_memory_and_traffic() -> None:
    case = {"length": 512, "devices": 4, "schedule": "ring", "layout": "zigzag", "window": 0,
            "heads": 2, "kv_heads": 1, "head_dim": 8, "timed": 512}  # fmt: skip
    found = long_context.measure(case)
    # Keys and values of 128 tokens go round twice, and their gradients once.
    part = 2 * 128 * 8 * 4
    assert found["sent"] == 2 * 3 * part + 4 * part
    assert found["balance"] == 1.0
    assert found["seconds"] > 0
    assert long_context.measure({**case, "length": 1024})["seconds"] is None

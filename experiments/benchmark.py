"""Masked attention against its peers: time, memory, compile time, growth with length.

    python experiments/benchmark.py                       # everything this machine has
    python experiments/benchmark.py --masks causal window --lengths 4096 --repeats 9
    python experiments/benchmark.py --suite shapes        # 40 ordinary shapes: benchmark_shapes.py
    python experiments/benchmark.py --suite stats         # statistics: benchmark_stats.py
    python experiments/benchmark.py --suite gpu           # kernels on a GPU: benchmark_gpu.py
    python experiments/benchmark.py --suite tpu           # kernels on a TPU: benchmark_tpu.py

Every contestant runs in a process of its own. They take turns: one call to warm up, then a timed
one. Each ratio compares two calls that ran one after the other, so that a busy machine slows both;
the median of the ratios is reported. PyTorch is expected in `.venv-peers` (`make peers` makes it).
Without it the table has fewer columns.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from benchmark_gpu import GpuConfig
from benchmark_gpu import main as measure_kernels
from benchmark_shapes import ShapesConfig
from benchmark_shapes import main as measure_shapes
from benchmark_stats import StatsConfig
from benchmark_stats import main as measure_stats
from benchmark_tpu import TpuConfig
from contestant import Contestant
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"

Mask = Literal[
    "full",
    "causal",
    "window",
    "documents",
    "prefix",
    "padding",
    "dilated",
    "neighbourhood",
    "decode",
]
Passes = Literal["forward", "forward+backward"]
OURS = "jaxattn"
PEERS = {"jax.nn": False, "torch-sdpa": True, "torch-flex": True}  # name -> is it PyTorch?


@dataclass
class Config:
    """What to measure."""

    suite: Literal["cpu", "gpu", "tpu", "shapes", "stats"] = "cpu"
    gpu: GpuConfig = field(default_factory=GpuConfig)  # for `--suite gpu`, which reads only this
    tpu: TpuConfig = field(default_factory=TpuConfig)  # likewise for `--suite tpu`
    shapes: ShapesConfig = field(default_factory=ShapesConfig)  # likewise for `--suite shapes`
    stats: StatsConfig = field(default_factory=StatsConfig)  # likewise for `--suite stats`
    masks: tuple[Mask, ...] = (
        "full", "causal", "window", "documents", "prefix", "padding", "dilated", "neighbourhood",
        "decode",
    )  # fmt: skip
    passes: tuple[Passes, ...] = ("forward", "forward+backward")
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    lengths: tuple[int, ...] = (4096,)
    peers: tuple[Literal["jax.nn", "torch-sdpa", "torch-flex"], ...] = (
        "jax.nn", "torch-sdpa", "torch-flex",
    )  # fmt: skip
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    repeats: int = 5  # turns taken by each pair; the median of 5 ignores two disturbances
    growth: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)  # lengths for a window's growth
    memory: int = 32768  # length at which peak memory of causal attention is measured; 0: none
    maps: int = 131072  # length at which tile maps are built; 0: none
    output: Path = HERE / "results" / f"benchmark-{platform.machine()}-{os.cpu_count()}cpu.json"


def contestant(name: str) -> Contestant:
    """The process of a contestant."""
    python = PEERS_PYTHON if PEERS.get(name) else sys.executable
    return Contestant(name, HERE / "benchmark_worker.py", python=python)


def compare(case: dict[str, Any], names: list[str], repeats: int) -> dict[str, Any]:
    """One case, every contestant: median seconds, and the median of the ratios turn by turn."""
    contestants = {name: contestant(name) for name in names}
    prepared = {name: each.ask(prepare=case) for name, each in contestants.items()}
    errors = {name: answer["error"] for name, answer in prepared.items() if "error" in answer}
    fit = [name for name in names if name not in errors]
    times: dict[str, list[float]] = {name: [] for name in fit}
    for _ in range(repeats):
        for name in fit:
            times[name].append(contestants[name].ask(run=True).get("seconds", float("nan")))
    for each in contestants.values():
        each.close()
    ours = times.get(OURS, [])
    return {
        **case,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "first_call_seconds": {name: prepared[name]["seconds"] for name in fit},
        "ratio": {
            name: statistics.median(theirs / mine for theirs, mine in zip(t, ours, strict=True))
            for name, t in times.items()
            if name != OURS and ours
        },
        "errors": errors,
    }


def alone(case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One case of jaxattn in a fresh process: median seconds, and peak memory."""
    ours = contestant(OURS)
    prepared = ours.ask(prepare=case)
    runs = [ours.ask(run=True) for _ in range(repeats)]
    ours.close()
    if "error" in prepared:
        return {**case, "error": prepared["error"]}
    return {
        **case,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "peak_bytes": runs[-1]["peak_bytes"],
    }


def measure(config: Config, console: Console) -> dict[str, Any]:
    """Everything the configuration asks for."""
    names = [OURS] + [n for n in config.peers if not PEERS[n] or PEERS_PYTHON.exists()]
    size = {"B": config.batch, "N": config.heads, "H": config.head_dim}
    cases: list[dict[str, Any]] = [
        {"mask": mask, "passes": passes, "dtype": dtype, "T": T, **size}
        for T in config.lengths
        for dtype in config.dtypes
        for passes in config.passes
        for mask in config.masks
    ]
    growth: list[dict[str, Any]] = [
        {"mask": "window", "passes": "forward+backward", "dtype": "float32", "T": T, **size}
        for T in config.growth
    ]
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "config": {
            name: value
            for name, value in asdict(config).items()
            if name not in ("suite", "gpu", "tpu", "shapes", "stats")
        }
        | {"output": str(config.output.name)},
        "cases": [],
        "growth": [],
        "maps": {},
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("benchmark", total=len(cases) + len(growth) + 2)
        for case in cases:
            bar.update(task, description=f"{case['mask']} {case['passes']} {case['dtype']}")
            result = compare(case, names, config.repeats)
            report["cases"].append(result)
            ratios = ", ".join(f"{n} {r:.2f}x" for n, r in result["ratio"].items())
            mine = result["seconds"].get(OURS, float("nan")) * 1e3
            console.print(
                f"{case['mask']:>14} {case['passes']:<17} {case['dtype']:<9} T={case['T']}: "
                f"{mine:.3g} ms; {ratios} {result['errors'] or ''}"
            )
            bar.advance(task)
        for case in growth:
            bar.update(task, description=f"growth, T={case['T']}")
            report["growth"].append(alone(case, config.repeats))
            bar.advance(task)
        if config.memory:
            causal = {"mask": "causal", "passes": "forward+backward", "dtype": "float32", **size}
            small, large = (alone({**causal, "T": T}, 1) for T in (512, config.memory))
            report["memory"] = {**large, "process_bytes": small.get("peak_bytes")}
        bar.advance(task)
        if config.maps:
            ours = contestant(OURS)
            for mask in config.masks:
                if mask not in ("full", "decode"):
                    reply = ours.ask(map={"mask": mask, "T": config.maps})
                    report["maps"][mask] = reply.get("seconds", reply.get("error"))
            ours.close()
        bar.advance(task)
    return report


def describe_machine() -> dict[str, Any]:
    """The machine on which the numbers were measured."""
    import jax

    torch_version = None
    if PEERS_PYTHON.exists():
        asked = [str(PEERS_PYTHON), "-c", "import torch; print(torch.__version__)"]
        torch_version = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch_version,
        "date": time.strftime("%Y-%m-%d"),
    }


def tables(report: dict[str, Any], console: Console) -> str:
    """The comparison as Markdown, printed as tables too."""
    lines: list[str] = []
    names = [n for n in PEERS if any(n in case["ratio"] for case in report["cases"])]
    groups = {(c["dtype"], c["passes"], c["T"]): [] for c in report["cases"]}  # type: ignore[var-annotated]
    for case in report["cases"]:
        groups[case["dtype"], case["passes"], case["T"]].append(case)
    for (dtype, passes, T), cases in groups.items():
        title = f"{passes}, {dtype}, T={T}"
        header = ["mask", "jaxattn", *(f"against {name}" for name in names), "first call"]
        rows = [
            [
                case["mask"],
                f"{case['seconds'].get(OURS, float('nan')) * 1e3:.3g} ms",
                *(f"{case['ratio'][n]:.2f}x" if n in case["ratio"] else "-" for n in names),
                f"{case['first_call_seconds'].get(OURS, float('nan')):.1f} s",
            ]
            for case in cases
        ]
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        lines += [f"**{title}**", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed against peers by mask, and growth with length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    cases = [c for c in report["cases"] if c["dtype"] == report["cases"][0]["dtype"]]
    last = cases[-1]["passes"]
    cases = [c for c in cases if c["passes"] == last and c["T"] == cases[-1]["T"]]
    names = [n for n in PEERS if any(n in c["ratio"] for c in cases)]
    for i, name in enumerate(names):
        at = [x + i * 0.8 / len(names) for x in range(len(cases))]
        heights = [c["ratio"].get(name, 0) for c in cases]
        left.bar(at, heights, 0.8 / len(names), label=f"against {name}")
    left.axhline(1, color="black", linewidth=0.8)
    left.set_yscale("log")
    left.set_xticks(range(len(cases)), [c["mask"] for c in cases], rotation=30)
    left.set_ylabel("times faster")
    left.set_title(f"{last}, {cases[0]['dtype']}, T={cases[0]['T']}")
    left.legend()
    grown = [g for g in report["growth"] if "seconds" in g]
    if grown:
        first = grown[0]
        right.loglog([g["T"] for g in grown], [g["seconds"] for g in grown], "o-", label="measured")
        line = [first["seconds"] * g["T"] / first["T"] for g in grown]
        right.loglog([g["T"] for g in grown], line, "--", color="grey", label="linear")
        right.set_xlabel("T")
        right.set_ylabel("seconds")
        right.set_title("sliding window of 256, forward+backward")
        right.legend()
    figure.savefig(path, dpi=120)


def main(config: Config) -> None:
    """Measure, print, and write JSON, Markdown and a plot."""
    if config.suite in ("gpu", "tpu"):
        measure_kernels(config.gpu if config.suite == "gpu" else config.tpu)
        return
    if config.suite == "shapes":
        measure_shapes(config.shapes)
        return
    if config.suite == "stats":
        measure_stats(config.stats)
        return
    console, started = Console(), time.monotonic()
    if not PEERS_PYTHON.exists():
        console.print("no .venv-peers: PyTorch is left out (`make peers` installs it)")
    report = measure(config, console)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
    config.output.with_suffix(".md").write_text(tables(report, console))
    plot(report, config.output.with_suffix(".png"))
    for row in report["growth"]:
        console.print(f"window, T={row['T']}: {row.get('seconds', row.get('error'))} s")
    if "memory" in report and "peak_bytes" in report["memory"]:
        peak, base = report["memory"]["peak_bytes"], report["memory"]["process_bytes"]
        console.print(
            f"causal forward+backward at T={config.memory}: peak {peak / 2**20:.0f} MiB, of which "
            f"{base / 2**20:.0f} MiB were in use before"
        )
    for mask, seconds in report["maps"].items():
        console.print(f"tile map of {mask} at T={config.maps}: {seconds} s")
    console.print(f"done in {(time.monotonic() - started) / 60:.0f} minutes")
    for suffix in (".json", ".md", ".png"):
        console.print(str(config.output.with_suffix(suffix)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

"""Attention at 40 ordinary shapes against `jax.nn.dot_product_attention`, in one process.

    python experiments/benchmark.py --suite shapes
    python experiments/benchmark_shapes.py --only swin --masks padding --passes forward

Both are compiled in this process and take turns. Every timed sample follows an untimed call of its
own: memory that the other has just freed would otherwise be charged to it. Each ratio compares two
samples that ran one after the other, and the median of the ratios is reported: how many times
faster jaxattn is. Below 1 it is slower.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Mask = Literal["none", "causal", "padding", "both"]
Dtype = Literal["float32", "bfloat16"]
Passes = Literal["forward", "forward+backward", "eager"]
Run = Callable[[], Any]

# A sample takes at least this long: about 1000 times what reading the clock costs.
SAMPLE = 2e-3
# The fewest turns, which give a median that ignores two disturbances.
TURNS = 5


class Shape(NamedTuple):
    """The sizes of one call, named as in `jaxattn.attention`."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int


SHAPES: dict[str, Shape] = {
    "bert-16": Shape(128, 16, 16, 12, 12, 64),
    "bert-32": Shape(128, 32, 32, 4, 4, 32),
    "bert-64": Shape(32, 64, 64, 8, 8, 64),
    "bert-128": Shape(16, 128, 128, 8, 8, 64),
    "bert-128-one": Shape(1, 128, 128, 12, 12, 64),
    "bert-256": Shape(8, 256, 256, 12, 12, 64),
    "bert-512": Shape(4, 512, 512, 8, 8, 64),
    "minilm-64": Shape(64, 64, 64, 12, 12, 32),
    "vit-197": Shape(8, 197, 197, 12, 12, 64),
    "vit-197-one": Shape(1, 197, 197, 12, 12, 64),
    "vit-tiny-197": Shape(16, 197, 197, 3, 3, 64),
    "vit-257": Shape(4, 257, 257, 16, 16, 64),
    "clip-text-77": Shape(64, 77, 77, 8, 8, 64),
    "clip-text-77-one": Shape(1, 77, 77, 12, 12, 64),
    "whisper-1500": Shape(1, 1500, 1500, 6, 6, 64),
    "whisper-cross": Shape(1, 64, 1500, 6, 6, 64),
    "whisper-cross-step": Shape(4, 1, 1500, 6, 6, 64),
    "swin-stage-1": Shape(64, 49, 49, 3, 3, 32),
    "swin-stage-2": Shape(128, 49, 49, 6, 6, 32),
    "swin-stage-3": Shape(64, 49, 49, 12, 12, 32),
    "swin-v2-64": Shape(256, 64, 64, 3, 3, 32),
    "t5-cross": Shape(32, 64, 200, 4, 4, 64),
    "t5-cross-small": Shape(8, 32, 128, 8, 8, 64),
    "t5-512": Shape(2, 512, 512, 8, 8, 64),
    "decode-1-512": Shape(16, 1, 512, 8, 8, 64),
    "decode-1-128": Shape(32, 1, 128, 8, 8, 64),
    "decode-1-2048-grouped": Shape(8, 1, 2048, 8, 2, 128),
    "decode-1-4096": Shape(1, 1, 4096, 8, 8, 64),
    "decode-4-1024": Shape(4, 4, 1024, 8, 8, 64),
    "decode-16-1024-grouped": Shape(4, 16, 1024, 8, 2, 128),
    "rl-20": Shape(256, 20, 20, 4, 4, 32),
    "decision-60": Shape(64, 60, 60, 1, 1, 128),
    "gpt-256-grouped": Shape(8, 256, 256, 8, 2, 64),
    "gpt-256": Shape(8, 256, 256, 6, 6, 64),
    "gpt-1024": Shape(1, 1024, 1024, 12, 12, 64),
    "llama-512-grouped": Shape(1, 512, 512, 16, 4, 128),
    "gemma-256": Shape(2, 256, 256, 4, 1, 256),
    "set-100": Shape(32, 100, 100, 4, 4, 32),
    "tiny-8": Shape(1, 8, 8, 2, 2, 16),
    "tiny-16": Shape(4, 16, 16, 4, 4, 32),
}


@dataclass
class ShapesConfig:
    """What the suite of shapes measures."""

    only: str = ""  # names that contain this
    masks: tuple[Mask, ...] = ("none", "causal", "padding", "both")
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    passes: tuple[Passes, ...] = ("forward", "forward+backward", "eager")
    backend: str = "auto"
    seconds: float = 0.25  # of turns for each cell, if that is more than the fewest turns
    matmul: int = 1024  # extent of the matrix product that is measured; 0: none
    output: Path = (
        Path(__file__).parent
        / "results"
        / f"benchmark-shapes-{platform.machine()}-{os.cpu_count()}cpu.json"
    )


class Cell(NamedTuple):
    """One comparison."""

    name: str
    mask: Mask
    dtype: Dtype
    passes: Passes


def cells(config: ShapesConfig) -> Iterator[Cell]:
    """The comparisons that a configuration asks for."""
    for name, shape in SHAPES.items():
        for mask in config.masks:
            # jax.nn aligns causal masks to the top left, which nobody wants of other lengths.
            if config.only in name and (shape.T == shape.S or mask in ("none", "padding")):
                for dtype in config.dtypes:
                    for passes in config.passes:
                        yield Cell(name, mask, dtype, passes)


def arguments(cell: Cell) -> dict[str, Any]:
    """Query, key, value, the output's cotangent, and lengths from half of S to S."""
    import jax

    B, T, S, N, K, H = SHAPES[cell.name]
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, H), "g": (B, T, N, H)}
    made: dict[str, Any] = {
        name: jax.random.normal(key, shape).astype(cell.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return made | {"lengths": jax.random.randint(keys[4], (B,), max(S // 2, 1), S + 1)}


def our_mask(name: Mask, lengths: Any) -> Any:
    """The mask as users of jaxattn write it."""
    from jaxattn import masks

    match name:
        case "none":
            return None
        case "causal":
            return masks.causal()
        case "padding":
            return masks.key_padding(lengths=lengths)
    return masks.causal() & masks.key_padding(lengths=lengths)


def ours(cell: Cell, backend: str) -> Callable[..., Any]:
    """The call as users of jaxattn write it."""
    import jaxattn as ja

    def attend(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        mask = our_mask(cell.mask, lengths)
        return ja.attention(query, key, value, mask=mask, backend=backend)

    return attend


def theirs(cell: Cell) -> Callable[..., Any]:
    """The call as users of `jax.nn` write it: padding as an array `[B, 1, 1, S]`."""
    import jax
    import jax.numpy as jnp

    causal, padded = cell.mask in ("causal", "both"), cell.mask in ("padding", "both")

    def attend(query: Any, key: Any, value: Any, lengths: Any) -> Any:
        valid = jnp.arange(key.shape[1])[None] < lengths[:, None]
        mask = valid[:, None, None, :] if padded else None
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)

    return attend


def run_of(attend: Callable[..., Any], cell: Cell) -> Run:
    """A call that waits for its results."""
    import jax

    given = arguments(cell)
    q, k, v, g, lengths = given.values()
    if cell.passes == "eager":
        return lambda: jax.block_until_ready(attend(q, k, v, lengths))
    if cell.passes == "forward":
        forward = jax.jit(attend)
        return lambda: jax.block_until_ready(forward(q, k, v, lengths))

    @jax.jit
    def both(q: Any, k: Any, v: Any, g: Any, lengths: Any) -> Any:
        out, back = jax.vjp(lambda *args: attend(*args, lengths), q, k, v)
        return out, back(g)

    return lambda: jax.block_until_ready(both(q, k, v, g, lengths))


def sample(run: Run, calls: int) -> float:
    """Seconds of one call, after an untimed one."""
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def compare(runs: tuple[Run, Run], seconds: float) -> dict[str, float]:
    """Median seconds of both, and the median of second / first, turn by turn."""
    calls = []
    for run in runs:
        run()
        calls.append(max(1, round(SAMPLE / max(min(sample(run, 1) for _ in range(3)), 1e-7))))
    pairs: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(pairs) < TURNS or time.perf_counter() < until:
            # Each goes first in every second turn.
            order = (0, 1) if len(pairs) % 2 else (1, 0)
            found = {i: sample(runs[i], calls[i]) for i in order}
            pairs.append((found[0], found[1]))
    finally:
        if collecting:
            gc.enable()
    return {
        "seconds": statistics.median(mine for mine, _ in pairs),
        "peer_seconds": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(other / mine for mine, other in pairs),
    }


def backend_of(cell: Cell, backend: str) -> str:
    """The backend that computes our call."""
    import jaxattn as ja

    given = arguments(cell)
    arrays = (given["query"], given["key"], given["value"])
    mask = our_mask(cell.mask, given["lengths"])
    return str(ja.explain(*arrays, mask=mask, backend=backend).backend)


def measure(config: ShapesConfig, console: Console) -> list[dict[str, Any]]:
    """All comparisons that the configuration asks for."""
    import jax

    rows: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    wanted, last = list(cells(config)), ""
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("shapes", total=len(wanted))
        for cell in wanted:
            bar.update(task, description=f"{cell.name} {cell.mask}")
            if cell.name != last:
                # Compiled programs of the shapes before would fill the memory.
                jax.clear_caches()
                last = cell.name
            row: dict[str, Any] = {**cell._asdict(), **SHAPES[cell.name]._asdict()}
            try:
                row["backend"] = backend_of(cell, config.backend)
                runs = (run_of(ours(cell, config.backend), cell), run_of(theirs(cell), cell))
                row |= compare(runs, config.seconds)
            except ValueError as error:  # a named backend that refuses
                row["error"] = str(error)
            rows.append(row)
            result = f"{row['ratio']:.2f}x" if "ratio" in row else row["error"]
            console.print(
                f"{cell.name:>22} {cell.mask:<8} {cell.dtype:<9} {cell.passes:<17} {result}"
            )
            bar.advance(task)
    return rows


def mean(rows: list[dict[str, Any]]) -> float:
    """The geometric mean of the ratios."""
    return math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means, the share of slow cells, and the ten worst."""
    fit = [row for row in rows if "ratio" in row]
    groups = sorted({(row["dtype"], row["passes"]) for row in fit})
    worst = sorted(fit, key=lambda row: row["ratio"])[:10]
    return {
        "geometric_mean": {
            f"{dtype} {passes}": mean(
                [r for r in fit if (r["dtype"], r["passes"]) == (dtype, passes)]
            )
            for dtype, passes in groups
        },
        "cells": len(fit),
        "below_0.95": sum(row["ratio"] < 0.95 for row in fit),
        "worst": [
            f"{r['ratio']:.2f} {r['name']} {r['mask']} {r['dtype']} {r['passes']} ({r['backend']})"
            for r in worst
        ],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A row of Markdown for each shape and mask, a column for each dtype and pass."""
    kinds = list(dict.fromkeys((row["dtype"], row["passes"]) for row in rows))
    header = ["shape", "B, T, S, N, K, H", "mask", "backend", *(" ".join(kind) for kind in kinds)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, mask in dict.fromkeys((row["name"], row["mask"]) for row in rows):
        some = [row for row in rows if (row["name"], row["mask"]) == (name, mask)]
        found = {(row["dtype"], row["passes"]): row.get("ratio") for row in some}
        backends = "/".join(dict.fromkeys(row.get("backend", "-") for row in some))
        ratios = (found.get(kind) for kind in kinds)
        sizes = ", ".join(map(str, SHAPES[name]))
        shown = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append("| " + " | ".join([name, sizes, mask, backends, *shown]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """All ratios in order, a line for each dtype and pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    fit = [row for row in rows if "ratio" in row]
    for dtype, passes in dict.fromkeys((row["dtype"], row["passes"]) for row in fit):
        ratios = sorted(r["ratio"] for r in fit if (r["dtype"], r["passes"]) == (dtype, passes))
        axes.plot(ratios, ".-", label=f"{dtype}, {passes}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("shapes and masks, the slowest first")
    axes.set_ylabel("times faster than jax.nn")
    if fit:
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def matmul_rates(n: int) -> dict[str, float]:
    """Operations per second of a product of squares, by dtype of the factors; the best of ten."""
    import jax
    import jax.numpy as jnp

    rates = {}
    for dtype in ("float32", "bfloat16"):
        a = jnp.ones((n, n), dtype)
        product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32)).lower(a, a)
        run = partial(product.compile(), a, a)
        times = [sample(lambda: jax.block_until_ready(run()), 1) for _ in range(10)]  # noqa: B023
        rates[dtype] = 2 * n**3 / min(times)
    return rates


def main(config: ShapesConfig) -> None:
    """Measure, print, and write JSON, Markdown and a plot."""
    import jax

    console, started = Console(), time.monotonic()
    rates = matmul_rates(config.matmul) if config.matmul else {}
    rows = measure(config, console)
    if not rows:
        console.print(f"no shape has {config.only!r} in its name; they are: {', '.join(SHAPES)}")
        raise SystemExit(2)
    report = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "date": time.strftime("%Y-%m-%d"),
        "config": asdict(config),
        "matmul": rates,
        "summary": summary(rows),
        "cells": rows,
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
    config.output.with_suffix(".md").write_text(table(rows))
    plot(rows, config.output.with_suffix(".png"))
    for dtype, rate in rates.items():
        console.print(f"matrix product {config.matmul}, {dtype}: {rate / 1e9:.0f} GFLOP/s")
    told = report["summary"]
    for group, ratio in told["geometric_mean"].items():
        console.print(f"geometric mean, {group}: {ratio:.2f}x")
    console.print(f"below 0.95: {told['below_0.95']} of {told['cells']} cells; the worst:")
    for line in told["worst"]:
        console.print(f"  {line}")
    console.print(f"done in {(time.monotonic() - started) / 60:.0f} minutes")
    for suffix in (".json", ".md", ".png"):
        console.print(str(config.output.with_suffix(suffix)))


if __name__ == "__main__":
    main(tyro.cli(ShapesConfig, description=__doc__))

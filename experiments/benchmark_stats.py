"""What statistics of the weights cost: beside the plain call, and beside the weights themselves.

    python experiments/benchmark.py --suite stats
    python experiments/benchmark_stats.py --length 8192

First a window in a long sequence, each length in a process of its own: its time, and the memory
that it takes. Then one causal call with the largest logit, the entropy and the mean distance of
every query, forward and with gradients; what every key receives; and the same numbers from weights
written out as with `jax.nn`. These take turns in this process, as in benchmark_shapes.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from benchmark_shapes import Run, compare
from rich.console import Console
from rich.table import Table


@dataclass
class StatsConfig:
    """What the suite of statistics measures."""

    length: int = 4096
    heads: int = 8
    head_dim: int = 64
    seconds: float = 3.0  # of turns for each comparison
    window: int = 256
    long: tuple[int, ...] = (32768, 131072)  # lengths of the window; none: no such part
    output: Path = (
        Path(__file__).parent
        / "results"
        / f"benchmark-stats-{platform.machine()}-{os.cpu_count()}cpu.json"
    )


def asked() -> dict[str, Any]:
    """The statistics that are asked for at once."""
    from jaxattn import stats

    return {
        "largest": stats.max(),
        "entropy": stats.entropy(),
        "distance": stats.mean(lambda x, b, h, q, k: q - k),
    }


def ours(given: Any, mask: Any) -> Callable[..., Any]:
    """The output, and statistics where any are given."""
    import jaxattn as ja

    def attend(query: Any, key: Any, value: Any) -> Any:
        return ja.attention(query, key, value, mask=mask, stats=given)

    return attend


def by_weights(received: bool) -> Callable[..., Any]:
    """The same numbers, causal, from logits and weights `[B, N, T, S]`."""
    import jax
    import jax.numpy as jnp

    def attend(query: Any, key: Any, value: Any) -> Any:
        T, H = query.shape[1], query.shape[3]
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * H**-0.5
        distance = jnp.arange(T)[:, None] - jnp.arange(T)
        seen = distance >= 0
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
        out = jnp.einsum("bnts,bsnh->btnh", weights, value)
        if received:
            return out, {"received": weights.sum(2)}
        lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), -1)
        return out, {
            "largest": jax.lax.stop_gradient(jnp.where(seen, logits, -jnp.inf).max(-1)),
            "entropy": lse - (weights * jnp.where(seen, logits, 0)).sum(-1),
            "distance": (weights * distance).sum(-1),
        }

    return attend


def inputs(length: int, config: StatsConfig) -> tuple[Any, ...]:
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (1, length, config.heads, config.head_dim)) for k in keys)


def run_of(attend: Callable[..., Any], given: tuple[Any, ...], both: bool) -> Run:
    """A call that waits for its results; with `both`, for gradients of the sum of all means too."""
    import jax

    def total(*arrays: Any) -> Any:
        results = attend(*arrays)
        return sum(leaf.sum() for leaf in jax.tree.leaves(results)), results

    fn = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True) if both else attend)
    return lambda: jax.block_until_ready(fn(*given))


def peak_of(length: int, config: StatsConfig) -> dict[str, float]:
    """Seconds of both passes of a window with statistics, and the memory that they took."""
    from jaxattn import masks

    given = inputs(length, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = run_of(ours(asked(), masks.sliding_window(config.window)), given, both=True)
    run()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"length": length, "seconds": seconds, "MiB": (peak - before) / 1024}


def measure(config: StatsConfig) -> dict[str, Any]:
    """How long calls with statistics take, in units of the plain call, and of those by weights."""
    from jaxattn import masks, stats

    given, found = inputs(config.length, config), {}
    received = {"received": stats.received()}
    for name, what, both in (
        ("max, entropy, distance: forward", asked(), False),
        ("max, entropy, distance: both passes", asked(), True),
        ("received: forward", received, False),
    ):
        mine = run_of(ours(what, masks.causal()), given, both)
        plain = compare((run_of(ours(None, masks.causal()), given, both), mine), config.seconds)
        peer = run_of(by_weights(what is received), given, both)
        found[name] = {
            "ms": plain["peer_seconds"] * 1e3,
            "times the plain call": plain["ratio"],
            "times faster than by weights": compare((mine, peer), config.seconds)["ratio"],
        }
    return found


def main(config: StatsConfig) -> None:
    """Measure, print, and write JSON."""
    import jax

    console = Console()
    long = []
    for length in config.long:
        # A process for each, and before this one grows: peaks never fall, and are inherited.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            long.append(pool.submit(peak_of, length, config).result())
        row = long[-1]
        console.print(
            f"window of {config.window}, T = {length}, both passes: {row['seconds']:.2f} s, "
            f"{row['MiB']:.0f} MiB",
            highlight=False,
        )
    found = measure(config)
    table = Table("causal", "ms", "times the plain call", "times faster than by weights")
    for name, row in found.items():
        table.add_row(name, *(f"{number:.3g}" for number in row.values()))
    console.print(table)
    report = {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "config": asdict(config),
        "causal": found,
        "long": long,
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
    console.print(str(config.output))


if __name__ == "__main__":
    main(tyro.cli(StatsConfig, description=__doc__))

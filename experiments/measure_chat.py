"""What serving a language model gains from a queue over pages, a shared prefix, drafts, and a ring.

Each is measured against its plain counterpart on the same requests, hot, in one process. Texts are
from Python's own reference, which every installation has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
from data import DataError
from decoder import cross_entropy
from flax import nnx
from generate import BEYOND, FIRST, NONE, Writer, greedy
from llama import Caches, Loaded
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serve import Request, Server, server_for

import jaxattn as ja
from jaxattn.shapes import Array, Float, Int

Tokens = list[int]


@dataclass(frozen=True)
class Queue:
    """Requests of mixed lengths: one by one, in batches that wait for their longest, and in slots
    that the next request takes as soon as one is free."""

    model: Path | None = None  # a GGUF file of a Llama; else SmolLM2-135M-Instruct
    requests: int = 64
    slots: int = 8
    shortest: int = 8  # tokens of an answer, at most: a number from here
    longest: int = 128  # to here
    page: int = 16  # tokens in a page
    seed: int = 0


@dataclass(frozen=True)
class Prefix:
    """Requests with the same system prompt: computed for each, and computed once."""

    model: Path | None = None  # a GGUF file of a Llama; else SmolLM2-135M-Instruct
    requests: int = 16
    slots: int = 8
    words: int = 300  # of the system prompt
    tokens: int = 16  # of an answer, at most


@dataclass(frozen=True)
class Drafts:
    """Answers token by token, and with drafts from what the text holds already."""

    model: Path | None = None  # a GGUF file of a Llama; else SmolLM2-135M-Instruct
    tokens: int = 128  # of an answer, at most
    trees: tuple[tuple[int, int], ...] = ((1, 4), (2, 4), (1, 8))  # branches, and their depth


@dataclass(frozen=True)
class Window:
    """How well a long text is predicted from a cache of all of it, and from rings."""

    model: Path | None = None  # a GGUF file of a Llama; else SmolLM2-135M-Instruct
    tokens: int = 8192
    window: int = 1024


def passages(seed: int) -> list[str]:
    """Paragraphs of prose from Python's reference, in an order that the seed gives."""
    found = [
        " ".join(paragraph.split())
        for topic in topics.topics.values()
        for paragraph in topic.split("\n\n")
        if paragraph[:1].isalpha() and paragraph.count(" ") > 12
    ]
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order]


def long_text(loaded: Loaded, tokens: int) -> Tokens:
    """The first tokens of a long text from Python's reference, and one more to predict.

    Raises:
      DataError: for more tokens than it has.
    """
    ids = loaded.tokenizer.encode("\n\n".join(passages(3))).ids
    if tokens < 1 or tokens + 1 > len(ids):
        raise DataError(f"--tokens {tokens}: expected 1 to {len(ids) - 1}, all that the text has")
    return ids[: tokens + 1]


def asked(loaded: Loaded, question: str, system: str | None = None) -> Tokens:
    """A question in the model's chat template."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = loaded.chat([*messages, {"role": "user", "content": question}])
    return list(loaded.tokenizer.encode(text).ids)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a second call gives, and its seconds: the first one compiles."""
    run()
    started = time.monotonic()
    return run(), time.monotonic() - started


def together(writer: Writer, requests: Sequence[Request], rows: int, capacity: int) -> list[Tokens]:
    """The answers to some requests as one batch, which goes on until the last has ended."""
    prompts = [list(request.prompt) for request in requests]
    limits = [request.limit for request in requests]
    # A batch that is not full has rows that end at once.
    prompts += [[0]] * (rows - len(prompts))
    limits += [0] * (rows - len(limits))
    caches = writer.model.caches(partial(ja.KVCache.create, rows, capacity))
    sampling = greedy(rows)
    state, first = writer.start(prompts, caches, limits, sampling)
    columns = [first[:, None]]
    while np.asarray(state.left).any():
        state, more = writer.advance(state, sampling, 16)
        columns.append(more)
    found = np.concatenate(columns, 1)
    return [[int(t) for t in row if t != NONE] for row in found[: len(requests)]]


def run_queue(config: Queue, console: Console) -> None:
    loaded = llama.pretrained(config.model)
    writer = Writer(loaded.model, loaded.ends)
    rng = np.random.default_rng(config.seed)
    texts = passages(config.seed)[: config.requests]
    limits = rng.integers(config.shortest, config.longest + 1, config.requests)
    requests = [
        Request(asked(loaded, f"Explain this: {text}"), int(limit))
        for text, limit in zip(texts, limits, strict=True)
    ]
    longest = max(len(r.prompt) + r.limit for r in requests)
    lengths = [len(r.prompt) for r in requests]
    console.print(
        f"{len(requests)} prompts of {min(lengths)} to {max(lengths)} tokens, answers of at most "
        f"{config.shortest} to {config.longest}",
        highlight=False,
    )

    def batches(rows: int) -> list[Tokens]:
        found = []
        for start in bar.track(range(0, len(requests), rows), description=f"batches of {rows}"):
            found += together(writer, requests[start : start + rows], rows, longest)
        return found

    def continuous() -> tuple[list[Tokens], int]:
        server = server_for(writer, requests, config.slots, config.page)
        answers = bar.track(server.run(requests), len(requests), description="in slots")
        found = {answer.number: answer.tokens for answer in answers}
        return [found[number] for number in range(len(requests))], server.most_pages

    grid = Table("requests", "tokens/s", "seconds", "places held, at most", "of its tokens alone")
    plain: list[Tokens] = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        # Only what compiles needs a first run, not all requests.
        together(writer, requests[:1], 1, longest)
        together(writer, requests[: config.slots], config.slots, longest)
        list(server_for(writer, requests, config.slots, config.page).run(requests[: config.slots]))
        for name, run, places in (
            ("one by one", lambda: batches(1), longest),
            (f"batches of {config.slots}", lambda: batches(config.slots), config.slots * longest),
            (f"{config.slots} slots, pages", continuous, 0),
        ):
            started = time.monotonic()
            found: Any = run()
            seconds = time.monotonic() - started
            if not places:
                found, pages = found
                places = pages * config.page
            plain = plain or found
            count = sum(map(len, found))
            same = sum(a == b for a, b in zip(plain, found, strict=True))
            cells = (f"{count / seconds:.1f}", f"{seconds:.1f}", f"{places:,}")
            grid.add_row(name, *cells, f"{same} of {len(found)} answers")
    console.print(grid)


def run_prefix(config: Prefix, console: Console) -> None:
    loaded = llama.pretrained(config.model)
    writer = Writer(loaded.model, loaded.ends)
    words = " ".join(passages(1)).split()[: config.words]
    system = "You answer in one short sentence. You know this: " + " ".join(words)
    subjects = list(topics.topics)[: config.requests]
    requests = [
        Request(asked(loaded, f"What is {name.lower()}?", system), config.tokens)
        for name in subjects
    ]

    def serve(shares: bool) -> tuple[list[Tokens], int]:
        server = server_for(writer, requests, config.slots)
        if not shares:
            slots = len(server.running)
            longest = server.columns * server.page
            server = Server(writer, slots, slots * server.columns, server.page, longest)
        found = {answer.number: answer.tokens for answer in server.run(requests)}
        return [found[number] for number in range(len(requests))], server.most_pages

    grid = Table("system prompt", "seconds", "pages held, at most")
    plain = None
    for name, shares in (("for each request", False), ("once", True)):
        (found, pages), seconds = timed(partial(serve, shares))
        plain = plain or found
        grid.add_row(name, f"{seconds:.1f}", str(pages))
        assert len(found) == len(plain)
    console.print(grid)
    same = sum(a == b for a, b in zip(plain or [], found, strict=True))
    console.print(
        f"{len(requests)} requests of {len(requests[0].prompt)} tokens; the same answers: {same}",
        highlight=False,
    )


def run_drafts(config: Drafts, console: Console) -> None:
    loaded = llama.pretrained(config.model)
    writer = Writer(loaded.model, loaded.ends)
    prose = max(passages(2)[:20], key=len)
    code = "def area(width, height):\n    result = width * height\n    return result\n"
    tasks = {
        "repeat a text": f"Repeat this text word for word: {prose}",
        "rename in code": f"Rename `result` to `total` in this code, and print it:\n{code * 2}",
        "tell a story": "Tell me a story about a fox and a lighthouse.",
    }
    columns = ["answer", "tokens", "token by token"]
    columns += [f"{b} x {d}: tokens a pass, gain" for b, d in config.trees]
    grid = Table(*columns, caption="tokens/s; drafts: branches x depth")
    for name, question in tasks.items():
        prompt = asked(loaded, question)
        capacity = len(prompt) + config.tokens + max(BEYOND, *(1 + b * d for b, d in config.trees))
        request = Request(prompt, config.tokens)
        plain, seconds = timed(partial(together, writer, [request], 1, capacity))
        count = len(plain[0])
        cells = [name, str(count), f"{count / seconds:.1f}"]
        for branches, depth in config.trees:
            run = partial(drafted, writer, request, capacity, branches, depth)
            (found, steps), mine = timed(run)
            differs = "" if found == plain[0] else " (another answer)"
            cells.append(f"{count / max(steps, 1):.2f}, {seconds / mine:.2f}{differs}")
        grid.add_row(*cells)
    console.print(grid)


def drafted(
    writer: Writer, request: Request, capacity: int, branches: int, depth: int
) -> tuple[Tokens, int]:
    """An answer by `advance_drafted`, and the number of passes."""
    caches = writer.model.caches(partial(ja.KVCache.create, 1, capacity))
    state, first = writer.start([request.prompt], caches, [request.limit], greedy(1))
    size = len(request.prompt) + request.limit + 1
    drafting = writer.drafting([request.prompt], first, size)
    found, steps = [first], 0
    while np.asarray(state.left).any():
        state, drafting, more, count = writer.advance_drafted(
            state, drafting, 32, branches=branches, depth=depth
        )
        found.append(more[0])
        steps += count
    return [int(token) for token in np.concatenate(found) if token != NONE], steps


def run_window(config: Window, console: Console) -> None:
    loaded = llama.pretrained(config.model)
    tokens = long_text(loaded, config.tokens)
    chunk, parts = 128, 4
    whole = partial(ja.KVCache.create, 1, config.tokens)
    ring = partial(ja.KVCache.rolling, 1, config.window, chunk=chunk)
    caches = {
        "all tokens": whole,
        f"the last {config.window} and the first {FIRST}": partial(ring, first=FIRST),
        f"the last {config.window}": ring,
    }
    size = config.tokens // parts
    names = [f"{n * size:,} to {(n + 1) * size:,}" for n in range(parts)]
    grid = Table("cache", "MiB", *names, "all", "seconds", title="perplexity by position")
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for name, make in caches.items():
            made = loaded.model.caches(make)
            held = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
            task = bar.add_task(name, total=config.tokens)
            started = time.monotonic()
            losses = losses_of(loaded, tokens, made, chunk, partial(bar.advance, task))
            seconds = time.monotonic() - started
            each = [math.exp(part.mean()) for part in np.array_split(losses, parts)]
            cells = (f"{value:.2f}" for value in (*each, math.exp(losses.mean())))
            grid.add_row(name, f"{held / 2**20:.0f}", *cells, f"{seconds:.0f}")
    console.print(grid)


def losses_of(
    loaded: Loaded,
    tokens: Sequence[int],
    caches: Caches,
    chunk: int,
    advance: Callable[[int], Any] = lambda n: None,
) -> Float[np.ndarray, "T"]:
    """The loss of each token but the first, in nats, from caches that take a chunk at a time."""
    graph, params = nnx.split(loaded.model)
    ids = np.asarray(tokens, np.int32)
    found = []
    for start in range(0, len(ids) - 1, chunk):
        part = ids[start : start + chunk + 1]
        given = np.zeros((1, chunk + 1), np.int32)
        given[0, : len(part)] = part
        counts = jnp.asarray([len(part) - 1], jnp.int32)
        losses, caches = _losses(graph, params, given, counts, caches)
        found.append(np.asarray(losses)[: len(part) - 1])
        advance(len(part) - 1)
    return np.concatenate(found)


@partial(jax.jit, static_argnames="graph", donate_argnames="caches")
def _losses(
    graph: Any, params: Any, tokens: Int[Array, "1 C+1"], counts: Int[Array, "1"], caches: Caches
) -> tuple[Float[Array, "C"], Caches]:
    model = nnx.merge(graph, params)
    x, caches = model.proceed(tokens[:, :-1], caches, counts)
    one = jnp.ones((1, 1), bool)
    each = jax.vmap(lambda l, t: cross_entropy(l[None, None], t[None, None], one))
    return each(model.logits(x)[0], tokens[0, 1:]), caches


VERBS: dict[str, tuple[Any, Callable[[Any, Console], None]]] = {
    "queue": (Queue, run_queue),
    "prefix": (Prefix, run_prefix),
    "drafts": (Drafts, run_drafts),
    "window": (Window, run_window),
}

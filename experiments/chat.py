"""Talks with a pretrained language model, SmolLM2-135M-Instruct, through jaxattn's caches.

    python experiments/chat.py                                  # a conversation; Ctrl-D ends it
    python experiments/chat.py --prompt "Why is the sky blue?"
    python experiments/chat.py --file prompts.txt               # one prompt a line, all at once
    python experiments/chat.py --prompt "the cat sat" --attention 3   # what its heads look at
    python experiments/chat.py queue                            # measurements: queue, prefix,
                                                                # drafts, window

Ctrl-C stops an answer. `queue`, `prefix`, `drafts` and `window` measure what serving gains from
pages, a shared prefix, drafts, and a ring with the first tokens; each has a `--help` of its own.
README.md has the measured results.
"""

from __future__ import annotations

import math
import readline  # noqa: F401  # the arrow keys in `input`
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data
import jax
import jax.numpy as jnp
import llama
import measure_chat
import numpy as np
import tyro
from command import command
from data import DataError
from flax import nnx
from generate import BEYOND, FIRST, NONE, Drafting, Sampling, State, Writer
from llama import Caches, Llama, Loaded
from pictures import draw_attention
from rich.console import Console
from rich.progress import Progress
from serve import Request, server_for
from tokenizers.decoders import DecodeStream
from training import interruptions

import jaxattn as ja
from jaxattn.shapes import Array, Float, Int

NAME = "chat.py"
OUT = Path(__file__).parent / "results" / "chat"


@dataclass(frozen=True)
class Chat:
    """Talk with a pretrained language model."""

    model: Path | None = None  # a GGUF file of a Llama; else SmolLM2-135M-Instruct
    system: str | None = None  # what the model is told first; else its template's own words
    prompt: str | None = None  # answer this, and end
    file: Path | None = None  # answer each line of a file, many at a time, and end

    tokens: int = 256  # of an answer, at most
    temperature: float = 0.2  # 0 takes the likeliest token
    top_p: float = 0.9  # only the likeliest tokens that have this probability together
    seed: int = 0

    context: int = 2048  # tokens of a conversation
    window: int | None = None  # see only this many tokens back, and the first 4; no end to talk
    drafts: bool = False  # guess tokens from the text so far, and verify many at once
    slots: int = 8  # prompts of --file that are answered at a time

    attention: int | None = None  # draw what the heads of this layer look at in --prompt
    out: Path = OUT  # where pictures go


# How many tokens are computed between looks at Ctrl-C, and shown together.
_BURST = 8


class Conversation:
    """A text that grows, and the caches of what was said so far.

    Args:
      writer: the model.
      context: tokens of the whole text, at most.
      window: see `Chat.window`.
    """

    def __init__(self, writer: Writer, context: int, window: int | None = None) -> None:
        self.writer, self.context, self.window = writer, context, window
        self.held: list[int] = []
        self.caches = self._empty()

    def _empty(self) -> Caches:
        if self.window is None:
            make = partial(ja.KVCache.create, 1, self.context + BEYOND)
        else:
            make = partial(ja.KVCache.rolling, 1, self.window, chunk=self.writer.chunk, first=FIRST)
        return self.writer.model.caches(make)

    def answer(
        self, tokens: Sequence[int], limit: int, sampling: Sampling, drafts: bool = False
    ) -> Iterator[list[int]]:
        """What follows the whole text so far, some tokens at a time.

        What the text has in common with the last one is not computed again. The caller may stop
        at any time.

        Raises:
          DataError: for a text that does not fit the context.
        """
        if self.window is None and len(tokens) + limit > self.context:
            raise DataError(
                f"the conversation has {len(tokens)} tokens, and an answer up to {limit}: more "
                f"than the {self.context} of --context; begin anew, or give --window"
            )
        # The last token of an answer may not be in the caches, and one is computed in any case.
        cached = int(self.caches[0].length[0])
        most = min(cached, len(self.held), len(tokens) - 1)
        same = next((i for i in range(most) if self.held[i] != tokens[i]), most)
        if self.window is not None and cached - same > self.writer.chunk:
            # A ring has forgotten what came before.
            self.caches, same = self._empty(), 0
        self.caches = tuple(cache.truncate(same) for cache in self.caches)
        state, first = self.writer.start([tokens[same:]], self.caches, [limit], sampling)
        drafting = self.writer.drafting([tokens], first, len(tokens) + limit + _BURST)
        self.caches, self.held = state.caches, list(tokens)
        shown = [int(token) for token in first if token != NONE]
        while shown:
            # The newest token is not in the caches.
            yield shown
            state, drafting, out = self._more(state, drafting, sampling, drafts)
            self.caches = state.caches
            self.held += shown
            shown = [int(token) for token in out[0] if token != NONE]

    def warm(self, sampling: Sampling, drafts: bool) -> None:
        """Compiles what answers need."""
        for _ in self.answer([0], 2, sampling, drafts):
            pass

    def _more(
        self, state: State, drafting: Drafting, sampling: Sampling, drafts: bool
    ) -> tuple[State, Drafting, Int[np.ndarray, "1 most"]]:
        if not drafts:
            state, out = self.writer.advance(state, sampling, _BURST)
            return state, drafting, out
        state, drafting, out, _ = self.writer.advance_drafted(state, drafting, _BURST)
        return state, drafting, out


def sizes(config: Chat) -> None:
    """Refuses settings that don't fit together."""

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise DataError(message)

    for name in ("tokens", "context", "slots"):
        refuse(getattr(config, name) < 1, f"--{name}: expected 1 or more")
    refuse(None not in (config.prompt, config.file), "expected --prompt or --file, not both")
    refuse(
        config.drafts and config.temperature > 0,
        "--drafts verifies the likeliest token: expected --temperature 0 with it",
    )
    refuse(
        config.file is not None and (config.drafts or config.window is not None),
        "--drafts and --window are for conversations and --prompt, not for --file",
    )
    refuse(
        config.drafts and config.window is not None,
        "--drafts needs all earlier tokens: expected no --window with it",
    )
    refuse(config.window is not None and config.window < 1, "--window: expected 1 or more")
    refuse(config.attention is not None and config.prompt is None, "--attention needs --prompt")


# ---------------------------------------------------------------------------------------- commands


def run_chat(config: Chat, console: Console) -> None:
    sizes(config)
    with console.status("loading the model"):
        loaded = llama.pretrained(config.model)
    if config.attention is not None:
        run_attention(config, loaded, console)
        return
    writer = Writer(loaded.model, loaded.ends)
    if config.file is not None:
        run_file(config, loaded, writer, console)
        return
    conversation = Conversation(writer, config.context, config.window)
    sampling = Sampling.of(1, config.temperature, config.top_p, config.seed)
    with console.status("compiling: the first start takes longest"):
        conversation.warm(sampling, config.drafts)
    messages = [] if config.system is None else [{"role": "system", "content": config.system}]
    if config.prompt is not None:
        said = [*messages, {"role": "user", "content": config.prompt}]
        if reply(config, loaded, conversation, sampling, said, console) is None:
            raise KeyboardInterrupt
        return
    console.print("Ctrl-C stops an answer, Ctrl-D ends the conversation.", style="dim")
    while True:
        try:
            prompt = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if not prompt:
            continue
        said = [*messages, {"role": "user", "content": prompt}]
        try:
            text = reply(config, loaded, conversation, sampling, said, console)
        except DataError as error:
            # The conversation is too long: what was asked last is forgotten.
            print(f"{NAME}: {error}", file=sys.stderr)
            continue
        if text is not None:
            messages = [*said, {"role": "assistant", "content": text}]


def reply(
    config: Chat,
    loaded: Loaded,
    conversation: Conversation,
    sampling: Sampling,
    messages: Sequence[dict[str, str]],
    console: Console,
) -> str | None:
    """Prints an answer as it comes, and its speed; None if Ctrl-C stopped it."""
    tokens = loaded.tokenizer.encode(loaded.chat(messages)).ids
    stream = DecodeStream(skip_special_tokens=True)
    text, count, first = "", 0, math.nan
    started = time.monotonic()
    with interruptions() as interrupted:
        for shown in conversation.answer(tokens, config.tokens, sampling, config.drafts):
            first = time.monotonic() if not count else first
            count += len(shown)
            parts = [stream.step(loaded.tokenizer, token) or "" for token in shown]
            text += "".join(parts)
            print("".join(parts), end="", flush=True)
            if interrupted:
                break
    print()
    seconds = time.monotonic() - first
    speed = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 else ""
    begun = f"{first - started:.2f} s to the first of {count}" if count else "no tokens"
    console.print(f"{len(tokens)} tokens of text; {begun}{speed}", style="dim", highlight=False)
    return None if interrupted else text


def run_file(config: Chat, loaded: Loaded, writer: Writer, console: Console) -> None:
    """Answers the lines of a file, in pages that the requests share."""
    assert config.file is not None
    lines = [line for line in data.read_lines(config.file) if line.strip()]
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    texts = [loaded.chat([*system, {"role": "user", "content": line}]) for line in lines]
    requests = [
        Request(ids, config.tokens, config.temperature, config.top_p, config.seed + number)
        for number, ids in enumerate(loaded.tokenizer.encode(text).ids for text in texts)
    ]
    server = server_for(writer, requests, config.slots)
    started = time.monotonic()
    answers: dict[int, list[int]] = {}
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for answer in bar.track(server.run(requests), len(requests), description="answers"):
            answers[answer.number] = answer.tokens
    seconds = time.monotonic() - started
    for number, line in enumerate(lines):
        print(f"> {line}\n{loaded.tokenizer.decode(answers[number])}\n")
    count = sum(map(len, answers.values()))
    console.print(
        f"{len(lines)} answers, {count} tokens in {seconds:.1f} s: {count / seconds:.1f} tokens/s",
        style="dim",
        highlight=False,
    )


def run_attention(config: Chat, loaded: Loaded, console: Console) -> None:
    """Draws the weights of each head of a layer on the words of --prompt alone."""
    assert config.prompt is not None
    assert config.attention is not None
    model, layer = loaded.model, config.attention
    if not 0 <= layer < model.config.layers:
        raise DataError(
            f"--attention {layer}: expected a layer from 0 to {model.config.layers - 1}"
        )
    ids = loaded.tokenizer.encode(config.prompt).ids
    if not 0 < len(ids) <= 64:
        raise DataError(f"--prompt has {len(ids)} tokens: expected 1 to 64 for a picture")
    maps = np.asarray(attention_maps(model, jnp.asarray([ids]), layer))[0]
    heads = len(maps)
    columns = next(n for n in range(math.isqrt(heads), 0, -1) if heads % n == 0)
    labels = [loaded.tokenizer.decode([token]).replace("\n", "⏎") for token in ids]
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"attention_{layer}.png"
    draw_attention(
        path,
        maps.reshape(-1, columns, *maps.shape[1:]),
        labels,
        labels,
        names=[f"head {n}" for n in range(heads)],
        title=f"layer {layer}: each token (row) to the tokens up to it",
    )
    console.print(str(path), highlight=False, soft_wrap=True)


def attention_maps(model: Llama, tokens: Int[Array, "B T"], layer: int) -> Float[Array, "B N T T"]:
    """The attention weights of one layer."""
    x = model.embedding(tokens)
    for block in model.blocks[:layer]:
        x = block(x)
    _, sown = nnx.capture(model.blocks[layer], nnx.Intermediate)(x, sow_weights=True)
    (maps,) = jax.tree.leaves(sown)
    return maps


@command(NAME)
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    console = Console()
    if given[:1] and given[0] in measure_chat.VERBS:
        settings, run = measure_chat.VERBS[given[0]]
        run(tyro.cli(settings, prog=f"{NAME} {given[0]}", args=given[1:]), console)
    else:
        run_chat(tyro.cli(Chat, prog=NAME, description=__doc__, args=given), console)


if __name__ == "__main__":
    llama.keep_programs()
    sys.exit(main())

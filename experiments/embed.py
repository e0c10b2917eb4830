"""Sentences to embeddings, or to the nearest sentences of a query, with a pretrained encoder.

    python experiments/embed.py sentences.txt --out embeddings.npy
    python experiments/embed.py sentences.txt --query "how do I read a file?"
    cat sentences.txt | python experiments/embed.py --query "how do I read a file?" --top 3
    python experiments/embed.py measure              # padded against packed, in sentences a second

One sentence a line, UTF-8, `.gz` or not. Row n of the output is line n; that of an empty line is 0.
The model is all-MiniLM-L6-v2, which `make embed` installs; `--model FILE` takes the zip archive of
another BERT in the layout of sentence-transformers.
"""

from __future__ import annotations

import ast
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import bert
import data
import numpy as np
import packing
import tyro
import weights
from command import command
from data import DataError, Tokens
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from jaxattn.shapes import Float

OUT = Path(__file__).parent / "results" / "embed"
STDIN = Path("-")

# Every shape of a batch is a program, which takes 1 to 2 seconds to compile on a CPU. So there are
# few widths, and the batches of a width have one number of rows, of about TOKENS tokens together.
WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TOKENS = 1024
# Rows of packed texts: attention to a row of 256 costs twice as much a token as to one of 128.
PACKED = (128, 256, 512)

Way = Literal["packed", "padded"]
WAYS: tuple[Way, ...] = ("packed", "padded")
Embeddings = Float[np.ndarray, "texts D"]


@dataclass(frozen=True)
class Embed:
    """Embed the sentences of a file, or of standard input; with a query, find the nearest."""

    sentences: Annotated[Path, tyro.conf.Positional] = STDIN  # "-" is standard input
    out: Path | None = None  # the .npy file; without a query OUT/embeddings.npy
    query: str | None = None  # print the sentences nearest to it
    top: int = 5  # how many of them
    rows: Way = "packed"  # several sentences in a row, or one and padding
    model: Path | None = None  # a zip archive; else all-MiniLM-L6-v2


@dataclass(frozen=True)
class Measure:
    """Time padded and packed rows on docstrings of Python's standard library."""

    texts: int = 300
    repeats: int = 3
    model: Path | None = None


# ----------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Rows of texts, by their numbers; some rows at the end may be empty."""

    rows: list[list[int]]
    width: int  # T
    most: int  # M, how many texts a row of this kind may hold

    @property
    def texts(self) -> int:
        return sum(map(len, self.rows))


def padded(lengths: Sequence[int], in_order: bool = False, count: int = 32) -> list[Batch]:
    """A text a row, in batches as wide as their longest, rounded up to a width of `WIDTHS`.

    Args:
      lengths: tokens of each text.
      in_order: as they come, `count` in a batch; else texts of like lengths are together.
      count: of texts in a batch that is in order.
    """
    if in_order:
        order = range(len(lengths))
        groups = [list(order[i : i + count]) for i in range(0, len(lengths), count)]
        return [Batch([[i] for i in g], _width(max(lengths[i] for i in g)), 1) for g in groups]
    widths = [_width(length) for length in lengths]
    return [
        batch
        for width in sorted(set(widths))
        for batch in _batches([[i] for i, its in enumerate(widths) if its == width], width, 1)
    ]


def packed(lengths: Sequence[int]) -> list[Batch]:
    """As many texts in a row as it holds; short rows take texts that leave room for others."""
    widest = _width(max(lengths), PACKED)
    widths = [_width(min(2 * length, widest), PACKED) for length in lengths]
    made = []
    for width in sorted(set(widths)):
        some = [i for i, its in enumerate(widths) if its == width]
        rows = packing.fitted([lengths[i] for i in some], width)
        # A text has two tokens or more, [CLS] and [SEP].
        made += _batches([[some[i] for i in row] for row in rows], width, width // 2)
    return made


def batches(way: Way, lengths: Sequence[int]) -> list[Batch]:
    """The batches of a way."""
    return packed(lengths) if way == "packed" else padded(lengths)


def _width(length: int, widths: Sequence[int] = WIDTHS) -> int:
    return next(width for width in widths if width >= length)


def _batches(rows: list[list[int]], width: int, most: int) -> list[Batch]:
    """Batches of so many rows, or a single one with a power of two of them."""
    count = TOKENS // width
    if len(rows) < count:
        count = 1 << (len(rows) - 1).bit_length()
    rows = rows + [[]] * (-len(rows) % count)
    return [Batch(rows[i : i + count], width, most) for i in range(0, len(rows), count)]


def padding(batches: Sequence[Batch], lengths: Sequence[int]) -> float:
    """The share of tokens that belong to no text."""
    return 1 - sum(lengths) / sum(len(batch.rows) * batch.width for batch in batches)


# ------------------------------------------------------------------------------------------ encoder


class Encoder:
    """Texts to embeddings."""

    def __init__(self, path: Path) -> None:
        loaded = bert.load(path)
        self.tokenizer, self.longest = loaded.tokenizer, loaded.longest
        self.width = loaded.model.config.width
        self.graph, self.params = nnx.split(loaded.model)

    def tokens(self, texts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
        """The tokens of each text, and the numbers of the texts that were cut."""
        encoded = self.tokenizer.encode_batch(list(texts))
        cut = [i for i, row in enumerate(encoded) if row.overflowing]
        return [np.array(row.ids, np.int32) for row in encoded], cut

    def embed(
        self,
        texts: Sequence[Tokens],
        batches: Sequence[Batch],
        done: Callable[[int], object] = lambda count: None,
    ) -> Embeddings:
        """Embeddings of texts, of which `batches` holds each once.

        Args:
          texts: tokens of each.
          batches: from `padded` or `packed`.
          done: is told how many texts a batch held.
        """
        found = np.zeros((len(texts), self.width), np.float32)
        for batch in batches:
            rows = packing.pack([[texts[i] for i in row] for row in batch.rows], batch.width)
            given = rows.tokens, rows.ids, rows.places
            embedded = np.asarray(bert.embed(self.graph, self.params, *given, batch.most))
            for row, numbers in enumerate(batch.rows):
                found[numbers] = embedded[row, : len(numbers)]
            done(batch.texts)
        return found


def encoder(path: Path | None) -> Encoder:
    """The encoder of an archive, by default the one that `make embed` installs."""
    return Encoder(path or weights.installed("all_minilm_l6_v2", "model.zip", "embed"))


# ---------------------------------------------------------------------------------------- commands


def read(path: Path) -> list[str]:
    """The lines of a file or of standard input, without spaces around them."""
    if path != STDIN:
        return [line.strip() for line in data.read_lines(path)]
    if sys.stdin.isatty():
        print("a sentence a line; Ctrl-D ends", file=sys.stderr)
    return [line.strip() for line in data.lines_of(sys.stdin.buffer.read(), "standard input")]


def run_embed(config: Embed, console: Console) -> None:
    """Embed, then save or answer the query."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    out = config.out
    if out is None and config.query is None:
        out = OUT / "embeddings.npy"
    if out is not None:
        _checked(out)
    if config.top < 1:
        raise DataError(f"--top {config.top}: expected 1 or more")
    if config.query is not None and not config.query.strip():
        raise DataError("--query is empty; give a text")
    lines = read(config.sentences)
    model = encoder(config.model)
    numbers = [i for i, line in enumerate(lines) if line]
    texts, cut = model.tokens([lines[i] for i in numbers])
    if len(numbers) < len(lines):
        say(f"{len(lines) - len(numbers):,} empty lines, whose rows are 0")
    if cut:
        say(
            f"{len(cut):,} sentences are longer than {model.longest} tokens, and are cut; the "
            f"first is line {numbers[cut[0]] + 1:,}"
        )
    lengths = [len(text) for text in texts]
    made = batches(config.rows, lengths)
    bar = Progress(
        TextColumn("sentences"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        console=console,
        disable=not console.is_terminal,
    )
    started = time.monotonic()

    def done(count: int) -> None:
        bar.advance(task, count)
        speed = bar.tasks[task].completed / (time.monotonic() - started)
        bar.update(task, said=f"{speed:,.0f} a second")

    with bar:
        task = bar.add_task("", total=len(texts), said="")
        found = np.zeros((len(lines), model.width), np.float32)
        found[numbers] = model.embed(texts, made, done)
    seconds = time.monotonic() - started
    say(
        f"{len(texts):,} sentences of {sum(lengths):,} tokens in {seconds:.1f} s, compilation "
        f"included; {padding(made, lengths):.0%} padding"
    )
    if out is not None:
        try:
            with out.open("wb") as file:
                np.save(file, found)
        except OSError as error:
            raise DataError(f"{out}: cannot be written ({error.strerror or error})") from None
        say(f"{out}: {len(lines):,} x {model.width}, float32")
    if config.query is not None:
        asked, _ = model.tokens([config.query])
        (vector,) = model.embed(asked, padded([len(asked[0])]))
        for similarity, number in nearest(found[numbers], vector, config.top):
            print(f"{similarity:.4f}  {lines[numbers[number]]}")


def _checked(out: Path) -> None:
    """Says before the work, not after it, that there is no such place."""
    if out.is_dir():
        raise DataError(f"{out}: a folder; give the name of a .npy file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from None


def nearest(
    embeddings: Embeddings, query: Float[np.ndarray, "D"], top: int
) -> list[tuple[float, int]]:
    """Cosine similarities with the query and numbers of the `top` nearest, the nearest first."""
    similarities = embeddings @ query
    order = np.argsort(-similarities, kind="stable")[:top]
    return [(float(similarities[i]), int(i)) for i in order]


def docstrings(count: int) -> list[str]:
    """So many docstrings of Python's standard library, each on one line, in an order by chance."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found: dict[str, None] = {}
    for path in packing.standard_library():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                found[" ".join(text.split())] = None
    texts = [text for text in found if text]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]]


def run_measure(config: Measure, console: Console) -> None:
    """Time three ways to make rows of the same texts, in turn."""
    model = encoder(config.model)
    texts, _ = model.tokens(docstrings(config.texts))
    lengths = [len(text) for text in texts]
    say = partial(console.print, highlight=False)
    quantiles = np.quantile(lengths, (0.1, 0.5, 0.9)).astype(int)
    say(
        f"{len(texts):,} texts of {min(lengths)} to {max(lengths)} tokens; deciles 1, 5, 9: "
        f"{', '.join(map(str, quantiles))}"
    )
    ways = {
        "padded, as they come": padded(lengths, in_order=True),
        "padded, by length": padded(lengths),
        "packed": packed(lengths),
    }
    found = {name: model.embed(texts, batches) for name, batches in ways.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        for name, batches in ways.items():
            model.embed(texts, batches[:1])
            start = time.monotonic()
            model.embed(texts, batches)
            seconds[name].append(time.monotonic() - start)
    table = Table("rows", "sentences a second", "padding", "times faster", "largest difference")
    first = next(iter(ways))
    for name, batches in ways.items():
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        table.add_row(
            name,
            f"{len(texts) / statistics.median(seconds[name]):,.0f}",
            f"{padding(batches, lengths):.0%}",
            f"{statistics.median(ratios):.2f}",
            f"{np.abs(found[name] - found[first]).max():.1e}",
        )
    console.print(table)


@command("embed.py")
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    name = "embed.py"
    if given[:1] == ["measure"]:
        run_measure(tyro.cli(Measure, prog=f"{name} measure", args=given[1:]), Console())
    else:
        # Standard output is for the answers.
        run_embed(tyro.cli(Embed, prog=name, description=__doc__, args=given), Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())

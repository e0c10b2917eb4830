"""From a corpus to batches: read and check files, train the tokenizer, bucket by length.

Everything here is plain Python and NumPy. A file that cannot be used raises `DataError`, whose
message is the one line a user should see.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import Pair
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxattn.shapes import Int

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("[PAD]", "[START]", "[END]")

Tokens = Int[np.ndarray, "length"]


class DataError(Exception):
    """A corpus that cannot be read; the message is one line and gives the remedy."""


@dataclass(frozen=True)
class Corpus:
    """Pairs to train on, and pairs held out from it."""

    train: list[Pair]
    test: list[Pair]


# ----------------------------------------------------------------------------------------- files


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, `.gz` or not, without their line ends.

    Only the newline ends a line: some corpora hold form feeds or U+2028 inside a sentence.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: not a complete gzip file; compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return lines_of(raw, str(path))


def lines_of(raw: bytes, origin: str) -> list[str]:
    """The lines of a text in UTF-8, as in `read_lines`; `origin` names it in errors."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{origin}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise DataError(f"{origin}: empty")
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n")


def _usable(pairs: list[Pair], origin: str) -> list[Pair]:
    """The pairs with text on both sides; it is an error if there are none."""
    kept = [pair for pair in pairs if pair.source and pair.target]
    if not kept:
        raise DataError(f"{origin}: no line has text on both sides")
    return kept


def read_aligned(source: Path, target: Path, category: str = "all") -> list[Pair]:
    """Pairs from two files, line by line; a line that is empty on either side is skipped."""
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise DataError(
            f"{source} has {len(sources)} lines but {target} has {len(targets)}; "
            "line-aligned files need the same number"
        )
    pairs = [Pair(s.strip(), t.strip(), category) for s, t in zip(sources, targets, strict=True)]
    return _usable(pairs, f"{source} and {target}")


def read_pairs(path: Path, columns: tuple[int, int] = (1, 2), category: str = "all") -> list[Pair]:
    """Pairs from a tab-separated file; `columns`, from 1, hold the source and the target."""
    if min(columns) < 1 or columns[0] == columns[1]:
        raise DataError(f"columns are two different numbers from 1 on, got {columns}")
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) < max(columns):
            raise DataError(
                f"{path}: line {number} has {len(cells)} tab-separated columns, "
                f"and column {max(columns)} was asked for"
            )
        source, target = (cells[column - 1].strip() for column in columns)
        pairs.append(Pair(source, target, category))
    return _usable(pairs, str(path))


def split(pairs: Sequence[Pair], one_in: int = 20, most: int = 1000) -> Corpus:
    """Hold out the sources that hash to 0 modulo `one_in`, at most `most` pairs of them.

    A sentence often has several translations: neither a source nor a target is on both sides.
    """
    test = [pair for pair in pairs if zlib.crc32(pair.source.lower().encode()) % one_in == 0]
    held = {pair.source.lower() for pair in test}, {pair.target.lower() for pair in test}
    train = [
        pair
        for pair in pairs
        if pair.source.lower() not in held[0] and pair.target.lower() not in held[1]
    ]
    if not train or not test:
        raise DataError(
            f"{len(pairs)} pairs are too few to train on some and hold out others; "
            "give more, or a test set of their own"
        )
    return Corpus(train, test[:most])


def without(train: Sequence[Pair], test: Sequence[Pair]) -> Corpus:
    """A corpus with a test set of its own, without training pairs that share a text with it."""
    held = {pair.source.lower() for pair in test}, {pair.target.lower() for pair in test}
    kept = [p for p in train if p.source.lower() not in held[0] and p.target.lower() not in held[1]]
    if not kept:
        raise DataError("every training pair is also in the test set; give other files")
    return Corpus(kept, list(test))


# ------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> Tokenizer:
    """A byte-pair encoding (1508.07909) shared by both languages, as their embedding is.

    It works on bytes, so no text is outside it. Sources are lower-cased (see `encode_source`).
    """
    texts = [text for pair in pairs for text in (pair.source.lower(), pair.target)]
    return byte_pairs(texts, vocabulary, SPECIAL, sentences=True)


def byte_pairs(
    texts: Sequence[str], vocabulary: int, special: Sequence[str], *, sentences: bool
) -> Tokenizer:
    """A byte-pair encoding learnt from texts; the first word of a sentence is like any other."""
    tokenizer = Tokenizer(models.BPE())
    if sentences:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=sentences)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_source(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Source tokens, then EOS; lower-cased, because case says little and users mix it."""
    encoded = tokenizer.encode_batch([text.lower() for text in texts])
    return [np.array([*row.ids, EOS], np.int32) for row in encoded]


def encode_target(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Target tokens between BOS and EOS."""
    encoded = tokenizer.encode_batch(list(texts))
    return [np.array([BOS, *row.ids, EOS], np.int32) for row in encoded]


def decode_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text from the target tokens before the first EOS, without special tokens."""
    ids = list(ids)
    if EOS in ids:
        ids = ids[: ids.index(EOS)]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """A printable label for each token, for the axes of a picture; "_" starts a word."""
    names = dict(enumerate(SPECIAL))
    return [names.get(i) or tokenizer.decode([i]).replace(" ", "_") for i in ids]


# --------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Padded token ids; a row of padding only is an empty example, without any loss."""

    source: Int[np.ndarray, "B S"]
    target: Int[np.ndarray, "B T"]  # BOS ... EOS: inputs are [:, :-1], labels [:, 1:]
    rows: Int[np.ndarray, "B"]  # which example each row is; -1 for an empty one


def bucket_widths(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
    """At most three widths, multiples of 4, that the examples are padded to.

    Each width is one compiled program (some seconds of compilation on a CPU), so there are only
    three, at the quantiles that save about the most padding.
    """
    kept = [length for length in lengths if length <= longest]
    quantiles = np.quantile(kept, (0.45, 0.85, 1.0)) if kept else [longest]
    return tuple(sorted({4 * int(np.ceil(quantile / 4)) for quantile in quantiles}))


def batches(
    sources: Sequence[Tokens],
    targets: Sequence[Tokens],
    widths: Sequence[int],
    tokens: int,
    rng: np.random.Generator | None = None,
    multiple: int = 1,
) -> Iterator[Batch]:
    """One pass over the examples, in batches of about `tokens` padded tokens a side.

    Args:
      sources, targets: one array of ids an example; those longer than the last width are left out.
      widths: the padded widths; an example goes to the first that holds both of its sides.
      tokens: padded tokens a batch and side; the number of rows of a width follows from it.
      rng: shuffles the examples and the order of batches; None keeps the order given.
      multiple: rows of a batch are a multiple of it, for so many devices.
    """
    size = np.array([max(len(s), len(t) - 1) for s, t in zip(sources, targets, strict=True)])
    order = np.arange(len(size)) if rng is None else rng.permutation(len(size))
    bucket = np.searchsorted(np.array(widths), size[order])
    chunks = []
    for index, width in enumerate(widths):
        members = order[bucket == index]
        rows = max(1, tokens // width // multiple) * multiple
        chunks += [(members[i : i + rows], width, rows) for i in range(0, len(members), rows)]
    if rng is not None:
        chunks = [chunks[i] for i in rng.permutation(len(chunks))]
    for members, width, rows in chunks:
        source = np.full((rows, width), PAD, np.int32)
        target = np.full((rows, width + 1), PAD, np.int32)
        which = np.full(rows, -1, np.int32)
        which[: len(members)] = members
        for row, example in enumerate(members):
            source[row, : len(sources[example])] = sources[example]
            target[row, : len(targets[example])] = targets[example]
        yield Batch(source, target, which)

"""Documents from Python's standard library, or from any files, packed into rows of one length."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from data import DataError, Tokens, read_lines
from tokenizers import Tokenizer

from jaxattn.shapes import Int

BEGIN, END = 0, 1
SPECIAL = ("[BEGIN]", "[END]")


@dataclass(frozen=True)
class Texts:
    """Documents to train on, and those of files that were held out."""

    train: list[str]
    test: list[str]


def standard_library() -> list[Path]:
    """The modules of every Python installation, without tests and generated tables."""
    folder = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "encodings", "lib2to3", "__pycache__"}
    found = sorted(p for p in folder.rglob("*.py") if p.stat().st_size > 0)
    return [p for p in found if not skipped.intersection(p.relative_to(folder).parts)]


def read(files: Sequence[Path], cut: bool = True) -> Texts:
    """One document for each definition: files are cut at lines that begin a new one at the margin.

    One file in twenty, by a hash of its name, is held out. Without `cut`, a file is one document.
    """
    texts = Texts([], [])
    for path in files:
        text = "\n".join(read_lines(path))
        side = hashlib.sha256(path.name.encode()).digest()[0] % 20 == 0
        cuts = r"\n(?=(?:def|class|async def|@)[ \w])"
        parts = re.split(cuts, text) if cut else [text]
        (texts.test if side else texts.train).extend(part + "\n" for part in parts if part.strip())
    if not texts.train or not texts.test:
        # Few files: one document in twenty instead.
        whole = texts.train + texts.test
        texts = Texts([d for i, d in enumerate(whole) if i % 20], whole[::20])
    if not texts.train or not texts.test:
        raise DataError("too little text to train and to hold some out; give more files")
    return texts


def encode(tokenizer: Tokenizer, documents: Sequence[str], longest: int) -> list[Tokens]:
    """Documents between BEGIN and END, in pieces of at most `longest` tokens."""
    pieces = []
    for row in tokenizer.encode_batch(list(documents)):
        ids = np.array([BEGIN, *row.ids, END], np.int32)
        pieces += [ids[i : i + longest] for i in range(0, len(ids), longest)]
    return [piece for piece in pieces if len(piece) > 1]


@dataclass(frozen=True)
class Packed:
    """Rows of documents, one after the other; the rest of a row belongs to no document.

    Attributes:
      tokens: the documents' tokens, 0 where there is none.
      ids: the document of each token within its row, from 0; -1 where there is none.
      places: the position of each token in its document.
    """

    tokens: Int[np.ndarray, "B T"]
    ids: Int[np.ndarray, "B T"]
    places: Int[np.ndarray, "B T"]


def pack(rows: Sequence[Sequence[Tokens]], length: int) -> Packed:
    """Rows of documents as arrays."""
    tokens = np.zeros((len(rows), length), np.int32)
    ids, places = np.full_like(tokens, -1), np.zeros_like(tokens)
    for row, documents in enumerate(rows):
        start = 0
        for n, document in enumerate(documents):
            here = slice(start, start + len(document))
            tokens[row, here], ids[row, here] = document, n
            places[row, here] = np.arange(len(document))
            start += len(document)
    return Packed(tokens, ids, places)


Document = TypeVar("Document", bound=Sized)


def filled(
    documents: Sequence[Document], rows: int, length: int, rng: np.random.Generator | None = None
) -> Iterator[list[list[Document]]]:
    """Batches of rows, each filled with the next documents until one does not fit.

    Args:
      documents: no longer than `length`.
      rows, length: of a batch.
      rng: shuffles the documents; None keeps their order.
    """
    order = np.arange(len(documents)) if rng is None else rng.permutation(len(documents))
    batch: list[list[Document]] = [[]]
    room = length
    for i in order:
        document = documents[i]
        if len(document) > room:
            if len(batch) == rows:
                yield batch
                batch = []
            batch.append([])
            room = length
        batch[-1].append(document)
        room -= len(document)
    if rng is None:
        yield batch + [[]] * (rows - len(batch))


def fitted(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of documents, by their numbers, in any order: each in the fullest row with room for it.

    The longest come first, so that short ones fill what is left: best fit decreasing.

    Args:
      lengths: of the documents, at most `width`.
      width: of a row.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        room = next((n for n in range(lengths[i], width + 1) if by_room[n]), None)
        if room is None:
            room = width
            by_room[room].append(len(rows))
            rows.append([])
        row = by_room[room].pop()
        rows[row].append(i)
        by_room[room - lengths[i]].append(row)
    return rows


def padded(batch: Sequence[Sequence[Tokens]], multiple: int) -> list[list[Tokens]]:
    """The same documents, each in a row of its own, and empty rows up to a multiple."""
    rows = [[document] for row in batch for document in row]
    return rows + [[]] * (-len(rows) % multiple)

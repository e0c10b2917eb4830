"""The comparison of language models: what is equal, what is wrong, and what is a tie."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import rng
from tiny_models import vocabulary, write_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import compare_models
import llama
import measure_chat
from compare_models import Agreement

V, WIDTH = len(vocabulary()), 160
SIZES = {
    "prompts": 3, "tokens": 8, "text": 60, "prefill": 20, "prompt": 4, "timed": 2, "batch": 2,
    "chunk": 32, "repeats": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_scripts_run() -> Iterator[None]:
    """What scripts run under: Flax's own code is not strict about promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    """A model whose tokens 2 n and 2 n + 1 are always as likely as each other."""
    found: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    table = np.repeat(rng(149).normal(size=(V // 2, 64)) / 8, 2, axis=0).astype(np.float32)
    write_llama(found, layers=1, tensors={"token_embd.weight": table})
    return found


class Peer:
    """Stands in for transformers; `fault` says which answer is not as it should be."""

    fault = ""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, self

    def close(self) -> None:
        pass

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        return dict(getattr(self, do)(**request))

    def load_decoder(self, path: str, threads: int) -> dict[str, Any]:
        assert threads > 0
        self.loaded = llama.load(Path(path))
        return {"torch": "0.0"}

    def tokens(self, text: str) -> dict[str, Any]:
        ids = self.loaded.tokenizer.encode(text).ids
        return {"ids": [*ids, 1] if self.fault == "token ids" else ids}

    def found(self, ids: list[int]) -> np.ndarray:
        return compare_models.logits_of(self.loaded, ids, WIDTH).copy()

    def logits(self, ids: list[int], out: str) -> dict[str, Any]:
        found = self.found(ids)
        if self.fault == "a logit":
            found[2, 7] += 0.01
        if self.fault == "a tie of logits":
            found[2, found[2].argmax() ^ 1] += 1e-6
        np.save(out, found)
        return {}

    def losses(self, ids: list[int], out: str) -> dict[str, Any]:
        each = jax.nn.log_softmax(self.found(ids[:-1]))[np.arange(len(ids) - 1), np.array(ids[1:])]
        np.save(out, -each * (1.01 if self.fault == "a loss" else 1))
        return {}

    def continuations(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        rows = []
        for prompt in prompts:
            row = list(prompt)
            for _ in range(1 + 2 * steps):
                row.append(int(self.found(row)[-1].argmax()))
            rows.append(row[len(prompt) :])
        # The first of a pair of tokens that are equally likely is the first for both.
        if self.fault in ("a token", "a tie of tokens") and len(rows[0]) > 3:
            token = rows[0][3]
            rows[0][3] = token ^ 1 if self.fault == "a tie of tokens" else (token + 2) % V
        return {"tokens": rows, "prefill": 3.0, "decoding": 2.0}


@pytest.mark.parametrize(
    ("fault", "status", "says"),
    [
        ("", 0, "the likeliest token is another at 0, at 0 without a tie"),
        ("token ids", 1, "WRONG: token ids of 3 prompts"),
        ("a logit", 1, "WRONG: logits of"),
        ("a tie of logits", 0, "the likeliest token is another at 3, at 0 without a tie"),
        ("a token", 1, "3 of 3 are others, 3 without a tie"),
        ("a tie of tokens", 0, "3 of 3 are others, 0 without a tie"),
        ("a loss", 1, "WRONG: perplexity of 60 tokens"),
    ],
)
def test_faults_are_told_from_ties(
    fault: str, status: int, says: str, path: Path, monkeypatch: Any, capsys: Any
) -> None:
    passages = ["the cat sat on 12 the mats and " * 4] * 5
    monkeypatch.setattr(measure_chat, "passages", lambda seed: passages)
    monkeypatch.setattr(compare_models, "Peer", Peer)
    monkeypatch.setattr(Peer, "fault", fault)
    monkeypatch.setattr(llama, "pretrained", llama.load)
    sizes = [word for name, n in SIZES.items() for word in (f"--decoder.{name}", str(n))]
    given = ["--only", "decoder", "--decoder.model", str(path), *sizes]
    assert compare_models.main(given) == status
    out, err = capsys.readouterr()
    assert says in out
    assert out.count("WRONG") == err.count("\n") == status
    for row in ("prompt of 20 tokens", "decoding, one text", "decoding, 2 texts"):
        assert row in out


def test_likeliest_tokens_differ_by_an_error_or_more() -> None:
    """Two logits may each be wrong by the error."""
    seen = Agreement()
    ours = np.array([[1.0, 3.0, 2.9], [5.0, 0.0, 0.0]])
    seen.add(ours, np.array([[1.0, 2.9, 3.0], [5.0, 0.0, 0.0]]))
    assert (seen.positions, seen.scale, len(seen.gaps), seen.wrong) == (2, 5.0, 1, 0)
    assert seen.error == pytest.approx(0.1)
    assert seen.is_tie(0.19)
    assert not seen.is_tie(0.21)


def test_nan_agrees_with_nothing() -> None:
    seen = Agreement()
    for last in (np.nan, 2.0):
        seen.add(np.array([[1.0, last]]), np.array([[1.0, 2.0]]))
    assert not seen.error < 1
    assert not seen.is_tie(0.0)


@pytest.mark.parametrize("name", ["--encoder.timed", "--decoder.batch", "--threads"])
def test_no_size_gets_one_line(name: str, capsys: Any) -> None:
    assert compare_models.main([name, "0"]) == 2
    assert capsys.readouterr().err == f"compare_models.py: {name} 0: expected 1 or more\n"


def test_a_text_that_is_too_short_gets_one_line(path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(measure_chat, "passages", lambda seed: ["the cat"])
    monkeypatch.setattr(compare_models, "Peer", Peer)
    monkeypatch.setattr(llama, "pretrained", llama.load)
    given = ["--only", "decoder", "--decoder.model", str(path), "--decoder.text", "9"]
    assert compare_models.main(given) == 2
    says = "compare_models.py: --decoder.text 9: the text has only 3 tokens\n"
    assert capsys.readouterr().err == says

"""The comparison of language models: what is equal, what is wrong, and what is a tie.

Axes: B rows, T tokens.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from cases import rng
from tiny_models import vocabulary, write_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import compare_models
import compare_models_worker as worker
import gguf
import llama
import measure_chat
import weights
from compare_models import Agreement

pytestmark = pytest.mark.usefixtures("as_users_run")

V, WIDTH = len(vocabulary()), 160
SIZES = {
    "prompts": 3, "tokens": 8, "text": 60, "prefill": 20, "prompt": 4, "timed": 2, "batch": 2,
    "chunk": 32, "repeats": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    """A model whose tokens 2 n and 2 n + 1 are always as likely as each other."""
    found: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    table = np.repeat(rng(149).normal(size=(V // 2, 64)) / 8, 2, axis=0).astype(np.float32)
    write_llama(found, layers=1, tensors={"token_embd.weight": table})
    return found


class Peer:
    """Stands in for other libraries; `fault` says which answer of `faulty` is not as it should be."""

    fault, faulty = "", "transformers"

    def __init__(self, folder: Path, library: str) -> None:
        self.folder, self.library = folder, library
        if library != self.faulty:
            self.fault = ""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        return dict(getattr(self, do)(**request))

    def load_decoder(self, path: str, threads: int, half: bool = False) -> dict[str, Any]:
        assert threads > 0
        self.loaded = llama.load(Path(path))
        return {"name": f"{self.library} 0.0" + ", float16" * half}

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


@pytest.fixture
def compare(path: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    """Compares the tiny model with stand-ins; options are those of the command."""
    passages = ["the cat sat on 12 the mats and " * 4] * 5
    monkeypatch.setattr(measure_chat, "passages", lambda seed: passages)
    monkeypatch.setattr(compare_models, "Peer", Peer)
    monkeypatch.setattr(compare_models, "has_llama_cpp", lambda: False)
    monkeypatch.setattr(llama, "pretrained", llama.load)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    sizes = [word for name, n in SIZES.items() for word in (f"--decoder.{name}", str(n))]
    given = ["--only", "decoder", "--decoder.model", str(path), *sizes]
    return lambda *options: compare_models.main([*given, *options])


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
    fault: str, status: int, says: str, compare: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(Peer, "fault", fault)
    assert compare() == status
    out, err = capsys.readouterr()
    assert says in out
    assert out.count("WRONG") == err.count("\n") == status
    for row in ("prompt of 20 tokens", "decoding, one text", "decoding, 2 texts"):
        assert row in out
    assert out.count("llama.cpp is left out; to add it, run: make peers-llama\n") == 1
    assert out.count("llama.cpp") == 1


@pytest.mark.parametrize("fault", ["", "a logit"])
def test_llama_cpp_is_compared_where_it_is_installed(
    fault: str, compare: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(compare_models, "has_llama_cpp", lambda: True)
    monkeypatch.setattr(Peer, "fault", fault)
    monkeypatch.setattr(Peer, "faulty", "llama.cpp")
    monkeypatch.setenv("COLUMNS", "140")
    assert compare("--decoder.llama-cpp", "float16") == bool(fault)
    out = capsys.readouterr().out
    first, second = out.split("against llama.cpp 0.0, float16:\n")
    assert "against transformers 0.0:\n" in first
    assert (first.count("WRONG"), second.count("WRONG")) == (0, bool(fault))
    assert all(f"times {name}'s" in second for name in ("PyTorch", "llama.cpp"))
    row = next(line for line in second.splitlines() if "decoding, 2 texts" in line)
    assert len(row.split("│")) == 1 + 6 + 1  # a cell for each speed and each ratio
    assert len(list((tmp_path / "cache" / "float32").iterdir())) == 1


def test_llama_cpp_is_sought_where_the_peers_are(monkeypatch: Any) -> None:
    """The environment of the tests does not have it."""
    monkeypatch.setattr(compare_models, "PEERS_PYTHON", Path(sys.executable))
    assert not compare_models.has_llama_cpp()


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


# ---------------------------------------------------------------------------- the other libraries


def test_a_copy_in_float32_holds_the_same_model(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    given = tmp_path / "tiny.gguf"
    arrays = write_llama(given, quantized=True, metadata={"general.file_type": 3})
    copy = weights.in_float32(given)
    (metadata, _), (said, tensors) = weights.read_gguf(given), weights.read_gguf(copy)
    assert said.pop("general.file_type") == gguf.LlamaFileType.ALL_F32
    for name, value in metadata.items():
        if name not in ("general.file_type", "GGUF.kv_count"):
            assert said[name] == value, name
    assert {t.tensor_type.name for t in gguf.GGUFReader(copy).tensors} == {"F32"}
    for name, array in arrays.items():
        assert np.array_equal(tensors.take(name, *array.shape), array)
    tensors.finish()

    written = copy.stat().st_mtime_ns
    assert weights.in_float32(given) == copy
    assert copy.stat().st_mtime_ns == written
    write_llama(given, quantized=True, seed=1)
    assert weights.in_float32(given) != copy


def last_tokens(seen: list[int]) -> np.ndarray:
    """Logits whose likeliest token is the sum of the last two, and of which no two are equal."""
    return -np.abs(np.arange(V) - sum(seen[-2:]) % V - 0.25).astype(np.float32)


class LlamaCpp:
    """Stands in for `llama_cpp`: keeps the tokens of each sequence, and checks their places."""

    __version__, llama_token, GGML_TYPE_F32 = "0.0", ctypes.c_int32, 0
    LLAMA_FLASH_ATTN_TYPE_DISABLED = 0

    def __init__(self) -> None:
        self.live = 0  # contexts and batches that are not freed

    def llama_model_default_params(self) -> Any:
        return SimpleNamespace()

    llama_context_default_params = llama_model_default_params

    def llama_model_load_from_file(self, path: bytes, params: Any) -> str | None:
        return "model" if path == b"whole.gguf" else None

    def llama_model_get_vocab(self, model: str) -> str:
        return "vocabulary"

    def llama_vocab_n_tokens(self, vocabulary: str) -> int:
        return V

    def llama_tokenize(
        self, vocabulary: str, raw: bytes, size: int, out: Any, room: int, begin: bool, known: bool
    ) -> int:
        assert (size, begin, known) == (len(raw), False, True)
        words = raw.split()
        assert len(words) <= room
        out[: len(words)] = list(map(len, words))
        return len(words)

    def llama_init_from_model(self, model: str, params: Any) -> Any:
        self.live += 1
        return SimpleNamespace(params=params, seen={})

    def llama_get_memory(self, context: Any) -> Any:
        return context.seen

    def llama_memory_clear(self, seen: Any, data: bool) -> None:
        seen.clear()

    def llama_batch_init(self, tokens: int, width: int, sequences: int) -> Any:
        self.live += 1
        names = ("token", "pos", "n_seq_id", "logits")
        return SimpleNamespace(
            **{name: [None] * tokens for name in names}, seq_id=[[None] for _ in range(tokens)]
        )

    def llama_batch_free(self, batch: Any) -> None:
        self.live -= 1

    llama_free = llama_batch_free

    def llama_decode(self, context: Any, batch: Any) -> int:
        assert batch.n_tokens <= context.params.n_batch
        assert context.params.n_threads == context.params.n_threads_batch == 2
        found = []
        for n in range(batch.n_tokens):
            assert batch.n_seq_id[n] == 1
            sequence = context.seen.setdefault(batch.seq_id[n][0], [])
            assert batch.pos[n] == len(sequence)
            sequence.append(batch.token[n])
            if batch.logits[n]:
                found.append(last_tokens(sequence))
        assert len(context.seen) <= context.params.n_seq_max
        room = context.params.n_ctx // context.params.n_seq_max
        self.found = np.concatenate(found)
        return int(max(map(len, context.seen.values())) > room)

    def llama_get_logits(self, context: Any) -> Any:
        return self.found.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def llama_cpp(monkeypatch: Any) -> Iterator[LlamaCpp]:
    """The worker with llama.cpp, without llama.cpp."""
    found = LlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", found)
    monkeypatch.delitem(sys.modules, "peer_llama_cpp", raising=False)
    library = importlib.import_module(worker.LIBRARIES["llama.cpp"])
    monkeypatch.setitem(worker.loaded, "library", library)
    yield found
    sys.modules.pop("peer_llama_cpp")


@pytest.mark.parametrize("half", [False, True])
def test_the_worker_continues_many_texts_with_llama_cpp(
    half: bool, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    def ask(do: str, **request: Any) -> dict[str, Any]:
        return dict(json.loads(json.dumps(worker.answer({"do": do, **request}))))

    said = ask("load_decoder", path="whole.gguf", threads=2, half=half)["name"]
    assert said == "llama-cpp-python 0.0" + ", float16" * half
    assert ask("tokens", text="ab c def")["ids"] == [2, 1, 3]

    prompts = [[1, 2, 3], [4, 5, 6]]
    found = ask("continuations", prompts=prompts, steps=2)
    assert found["tokens"] == [[5, 8, 13, 21, 34], [11, 17, 28, 45, 73]]
    assert found["prefill"] > 0
    assert found["decoding"] > 0
    decoder = worker.loaded["decoder"]
    ours = vars(decoder.context.params)
    assert ("type_k" in ours, "flash_attn_type" in ours) == (not half, not half)
    context = decoder.context
    assert ask("continuations", prompts=prompts, steps=2)["tokens"] == found["tokens"]
    assert decoder.context is context

    ids, out = [1, 2, 3, 4, 7], str(tmp_path / "out.npy")
    wanted = np.array([last_tokens(ids[: n + 1]) for n in range(len(ids))])
    ask("logits", ids=ids, out=out)
    assert np.array_equal(np.load(out), wanted)
    ask("losses", ids=ids, out=out)
    each = -jax.nn.log_softmax(wanted[:-1])[np.arange(4), np.array(ids[1:])]
    np.testing.assert_allclose(np.load(out), each, rtol=1e-6)
    assert llama_cpp.live == 1  # one context at a time, and no batch


def test_what_llama_cpp_refuses_is_an_error(llama_cpp: LlamaCpp) -> None:
    with pytest.raises(ValueError, match=r"llama.cpp can't read part.gguf"):
        worker.answer({"do": "load_decoder", "path": "part.gguf", "threads": 2})
    worker.answer({"do": "load_decoder", "path": "whole.gguf", "threads": 2})
    more = worker.loaded["decoder"].begin(1, 2)
    more(np.array([[1, 2]]))
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        more(np.array([[3]]))

"""The Llama of the experiments against NumPy, and what is said of files that are not one."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import nnx
from tiny_models import MERGES, SPECIAL, vocabulary, write_llama

import jaxattn as ja

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import llama
import packing
import weights
from data import DataError

pytestmark = pytest.mark.usefixtures("as_users_run")

V = len(vocabulary())
# Of logits of about 1, in float32.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def texts(*lengths: int) -> list[np.ndarray]:
    return [rng(91, n).integers(0, V, n).astype(np.int32) for n in lengths]


def logits(model: llama.Llama, tokens: Any, *more: Any) -> np.ndarray:
    return np.asarray(nnx.jit(llama.Llama.__call__)(model, jnp.asarray(tokens), *more))


# ------------------------------------------------------------------------------------- the model


def reference(
    arrays: dict[str, np.ndarray],
    tokens: np.ndarray,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    theta: float = 100.0,
    epsilon: float = 1e-5,
) -> np.ndarray:
    """Logits [T, V] of one text, in float64, from the arrays as they lie in the file."""
    weight = {name.removesuffix(".weight"): np.float64(a) for name, a in arrays.items()}
    T, half = len(tokens), weight["token_embd"].shape[1] // heads // 2
    angle = np.arange(T)[:, None] * theta ** (-np.arange(half) / half)  # [T, H/2]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * weight[name]

    def turned(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]  # the two of a pair are neighbors
        pairs = np.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return pairs.reshape(x.shape)

    x = weight["token_embd"][tokens]
    for i in range(sum(name.endswith("attn_norm") for name in weight)):
        at = f"blk.{i}"
        normed = norm(x, f"{at}.attn_norm")
        q = turned((normed @ weight[f"{at}.attn_q"].T).reshape(T, heads, 2 * half))
        k = turned((normed @ weight[f"{at}.attn_k"].T).reshape(T, kv_heads, 2 * half))
        v = (normed @ weight[f"{at}.attn_v"].T).reshape(T, kv_heads, 2 * half)
        out = np.empty_like(q)
        for n in range(heads):
            of = n // (heads // kv_heads)
            scores = q[:, n] @ k[:, of].T / np.sqrt(2 * half)
            scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
            exp = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, n] = exp / exp.sum(-1, keepdims=True) @ v[:, of]
        x = x + out.reshape(T, -1) @ weight[f"{at}.attn_output"].T
        normed = norm(x, f"{at}.ffn_norm")
        gate = normed @ weight[f"{at}.ffn_gate"].T
        hidden = gate / (1 + np.exp(-gate)) * (normed @ weight[f"{at}.ffn_up"].T)
        x = x + hidden @ weight[f"{at}.ffn_down"].T
    return norm(x, "output_norm") @ weight.get("output", weight["token_embd"]).T


@pytest.mark.parametrize(
    "sizes",
    [{}, {"quantized": True}, {"tied": False}, {"heads": 8, "kv_heads": 1, "layers": 1}],
    ids=str,
)
def test_logits_are_those_of_numpy(tmp_path: Path, sizes: dict[str, Any]) -> None:
    """Of a quantized file: those of the numbers that its blocks stand for."""
    arrays = write_llama(tmp_path / "tiny.gguf", **sizes)
    (tokens,) = texts(12)
    found = logits(llama.load(tmp_path / "tiny.gguf").model, tokens[None])[0]
    heads = {name: n for name, n in sizes.items() if name.endswith("heads")}
    np.testing.assert_allclose(found, reference(arrays, tokens, **heads), **CLOSE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], llama.Loaded]:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return write_llama(path), llama.load(path)


def test_packed_texts_are_as_alone(tiny: Any) -> None:
    arrays, loaded = tiny
    rows = [texts(5, 9), texts(2)]
    packed = packing.pack(rows, 16)
    mask = ja.masks.segments(jnp.asarray(packed.ids))
    found = logits(loaded.model, packed.tokens, mask, jnp.asarray(packed.places))
    for row, documents in enumerate(rows):
        for n, document in enumerate(documents):
            here = found[row, packed.ids[row] == n]
            np.testing.assert_allclose(here, reference(arrays, document), **CLOSE)


@pytest.mark.parametrize("chunks", [(1,) * 8, (3, 3, 2)], ids=str)
def test_a_text_in_chunks_is_as_the_whole(tiny: Any, chunks: tuple[int, ...]) -> None:
    arrays, loaded = tiny
    rows = rng(92).integers(0, V, (2, sum(chunks)))
    proceed = nnx.jit(llama.Llama.proceed)
    caches = loaded.model.caches(partial(ja.KVCache.create, 2, 16))
    features = []
    for tokens in np.split(rows, np.cumsum(chunks)[:-1], 1):
        x, caches = proceed(loaded.model, jnp.asarray(tokens), caches)
        features.append(x)
    found = loaded.model.logits(jnp.concatenate(features, 1))
    for row, tokens in zip(found, rows, strict=True):
        np.testing.assert_allclose(row, reference(arrays, tokens), **CLOSE)


def test_prompts_of_different_lengths_go_on(tiny: Any) -> None:
    """What pads a prompt is not kept, and takes no position."""
    arrays, loaded = tiny
    prompts, token = texts(3, 7), np.array([[5], [6]], np.int32)
    padded = np.full((2, 8), 9, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    caches = loaded.model.caches(partial(ja.KVCache.create, 2, 16))
    proceed = nnx.jit(llama.Llama.proceed)
    _, caches = proceed(loaded.model, jnp.asarray(padded), caches, jnp.array([3, 7]))
    x, _ = proceed(loaded.model, jnp.asarray(token), caches)
    for row, prompt in enumerate(prompts):
        want = reference(arrays, np.append(prompt, token[row]))[-1]
        np.testing.assert_allclose(loaded.model.logits(x)[row, 0], want, **CLOSE)


# ----------------------------------------------------------------------------- text in and out


@pytest.mark.parametrize("text", ["the cat", "  12 é 猫\n\tthe", "", " ", "\N{PILE OF POO}"])
def test_texts_come_back_from_their_tokens(tiny: Any, text: str) -> None:
    tokenizer = tiny[1].tokenizer
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokens_are_merges_digits_and_special_ones(tiny: Any) -> None:
    """Each digit is a token, whatever the merges say, and so is each special text."""
    assert "1 2" in MERGES
    found = tiny[1].tokenizer.encode("<|im_start|>the cat12 the<|im_end|>").tokens
    assert found == ["<|im_start|>", "the", "Ġ", "cat", "1", "2", "Ġthe", "<|im_end|>"]
    assert [tiny[1].tokenizer.token_to_id(name) for name in SPECIAL] == [0, 1, 2]


def test_words_of_gpt2_join_digits(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf", layers=1, metadata={"tokenizer.ggml.pre": "gpt-2"})
    assert llama.load(tmp_path / "tiny.gguf").tokenizer.encode("12").tokens == ["12"]


def test_messages_become_a_text(tiny: Any) -> None:
    asked = [{"role": "user", "content": "hi"}]
    begin = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert tiny[1].chat(asked) == begin + "<|im_start|>assistant\n"
    assert tiny[1].chat(asked, reply=False) == begin
    assert tiny[1].ends == (2,)
    assert tiny[1].names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_another_end_of_a_turn_ends_answers_too(tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf", layers=1, metadata={"tokenizer.ggml.eot_token_id": 0})
    assert llama.load(tmp_path / "tiny.gguf").ends == (0, 2)


# ---------------------------------------------------------------------------------------- errors


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        llama.load(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.architecture": "gemma"}, "the architecture is 'gemma', expected 'llama'"),
        ({"llama.block_count": None}, "the metadata lack llama.block_count"),
        ({"llama.attention.head_count": None}, "the metadata lack llama.attention.head_count"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled rotary positions are not supported"),
        ({"llama.rope.dimension_count": 8}, "rotary positions of a part of a head"),
        ({"tokenizer.ggml.tokens": None}, "the metadata lack tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "the metadata lack tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": None}, "the metadata lack tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.eos_token_id": None}, "the metadata lack tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.model": "llama"}, "the tokenizer is 'llama' with words of 'smollm'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "expected 'gpt2' with one of 'gpt-2', 'smollm'"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "the merges of the tokenizer do not fit its tokens"),
        ({"llama.feed_forward_length": 64}, "has shape [96, 64], expected [64, 64]"),
        ({"llama.block_count": 1}, "9 tensors have no place in the model: blk.1.attn_k.weight"),
        ({"llama.block_count": 3}, "no tensor 'blk.2.attn_v.weight'"),
    ],
    ids=str,
)
def test_metadata_that_do_not_fit(tmp_path: Path, metadata: dict[str, Any], said: str) -> None:
    write_llama(tmp_path / "tiny.gguf", metadata=metadata)
    assert said in refusal(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (None, "no tensor 'blk.0.attn_v.weight'; this is the file of another model"),
        (
            np.zeros((32, 32), np.float32),
            "blk.0.attn_v.weight has shape [32, 32], expected [32, 64]",
        ),
        (np.zeros((32, 64), np.float64), "blk.0.attn_v.weight is quantized as F64, which the gguf"),
    ],
    ids=["missing", "shape", "quantization"],
)
def test_tensors_that_do_not_fit(tmp_path: Path, tensor: Any, said: str) -> None:
    write_llama(tmp_path / "tiny.gguf", tensors={"blk.0.attn_v.weight": tensor})
    assert said in refusal(tmp_path / "tiny.gguf")


def test_files_that_end_early(tmp_path: Path) -> None:
    """In the header, in the metadata, in the list of tensors, and in their data."""
    path = tmp_path / "tiny.gguf"
    write_llama(path, layers=1)
    whole = path.read_bytes()
    for end in [0, 3, 6, 20, *range(24, 9000, 499), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert refusal(path).startswith("not a whole GGUF file ("), end


def test_files_that_are_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.gguf") == "no such file"
    assert refusal(tmp_path) == "no such file"
    (tmp_path / "text.gguf").write_text("what a day " * 20)
    assert refusal(tmp_path / "text.gguf").startswith("not a whole GGUF file (")


def test_templates_that_refuse_and_are_none(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(
        DataError, match=r"^the chat template refuses these messages: no role fool$"
    ):
        tiny[1].chat([{"role": "fool", "content": "hi"}])
    write_llama(tmp_path / "tiny.gguf", layers=1, metadata={"tokenizer.chat_template": None})
    with pytest.raises(DataError, match=r"^the model's file has no chat template; use a model"):
        llama.load(tmp_path / "tiny.gguf").chat([])


def test_weights_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="run: make chat"):
        weights.installed("no_such_package_of_weights", "model.gguf", "chat")
    (tmp_path / "tiny_weights").mkdir()
    (tmp_path / "tiny_weights" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="no such file; run: make chat, in a new environment"):
        weights.installed("tiny_weights", "model.gguf", "chat")
    path = tmp_path / "tiny_weights" / "model.gguf"
    path.touch()
    assert weights.installed("tiny_weights", "model.gguf", "chat") == path

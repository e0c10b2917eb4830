"""Tiny random models in the file formats of real ones, written through the formats' own libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "t he", "Ġ the", "c a", "ca t", "1 2", "Ġ Ġ")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + message['role']) }}{% endif %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, a token for each byte, and one for each merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in MERGES)]


def write_llama(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 96,
    tied: bool = True,
    quantized: bool = False,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a random Llama as a GGUF file, with its tokenizer and chat template.

    Args:
      path: of the file.
      layers, width, heads, kv_heads, hidden, tied: as in `llama.Config`.
      quantized: matrices in Q4_1 and embeddings in Q8_0, as files of real models have them; rows
        are then multiples of 32.
      seed: of the weights.
      metadata, tensors: what to write instead or besides; None leaves an entry out. Arrays that
        are not float32 are written as they are.

    Returns:
      The arrays by name, as a reader should see them: in float32, `[to, of]`, and with the two
      features of a rotary pair next to each other.
    """
    known = vocabulary()
    said: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 256,
        "llama.embedding_length": width,
        "llama.feed_forward_length": hidden,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100.0,
        "llama.rope.dimension_count": width // heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": known,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(known) - len(SPECIAL)),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    } | dict(metadata or {})
    shapes = {"token_embd": (len(known), width), "output_norm": (width,)}
    narrow = kv_heads * width // heads
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm": (width,),
            f"blk.{i}.attn_q": (width, width),
            f"blk.{i}.attn_k": (narrow, width),
            f"blk.{i}.attn_v": (narrow, width),
            f"blk.{i}.attn_output": (width, width),
            f"blk.{i}.ffn_norm": (width,),
            f"blk.{i}.ffn_gate": (hidden, width),
            f"blk.{i}.ffn_up": (hidden, width),
            f"blk.{i}.ffn_down": (width, hidden),
        }
    if not tied:
        shapes["output"] = (len(known), width)
    make = np.random.default_rng(seed)
    arrays = {
        f"{name}.weight": (
            make.normal(size=shape) * shape[-1] ** -0.5
            if len(shape) == 2
            else 1 + make.normal(size=shape) / 4
        ).astype(np.float32)
        for name, shape in shapes.items()
    } | dict(tensors or {})

    writer = gguf.GGUFWriter(path, said.pop("general.architecture"))
    for name, value in said.items():
        match value:
            case None:
                pass
            case str():
                writer.add_string(name, value)
            case float():
                writer.add_float32(name, value)
            case int():
                writer.add_uint32(name, value)
            case _:
                writer.add_array(name, value)
    written = {}
    for name, array in arrays.items():
        if array is None:
            continue
        if array.dtype != np.float32:
            writer.add_tensor(name, array)
            continue
        kind = gguf.GGMLQuantizationType.F32
        if quantized and array.ndim == 2:
            embeds = name in ("token_embd.weight", "output.weight")
            kind = gguf.GGMLQuantizationType.Q8_0 if embeds else gguf.GGMLQuantizationType.Q4_1
        stored = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        written[name] = gguf.quants.dequantize(stored, kind).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written

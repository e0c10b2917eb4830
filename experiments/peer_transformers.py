"""transformers on PyTorch, for `compare_models_worker.py`: a language model, and an encoder.

Axes: B rows, T tokens, D features, V the vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, DynamicCache

NAME = f"transformers, PyTorch {torch.__version__}"


class Decoder:
    """As `compare_models_worker.Decoder`."""

    name = NAME

    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        file = Path(path)
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        self.model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(**where)

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        return np.asarray(self.model(torch.tensor([ids])).logits[0])

    def begin(self, rows: int, capacity: int) -> Callable[[np.ndarray], np.ndarray]:
        cache = DynamicCache(config=self.model.config)  # grows as it is filled

        @torch.inference_mode()
        def more(given: np.ndarray) -> np.ndarray:
            found = self.model(
                torch.from_numpy(given), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            return np.asarray(found.logits[:, -1].argmax(-1))

        return more


encoder: dict[str, Any] = {}  # the model, and its tokenizer


def load_encoder(folder: str, longest: int, threads: int) -> dict[str, Any]:
    """Load a BERT and its tokenizer from a folder."""
    torch.set_num_threads(threads)
    encoder["model"] = BertModel.from_pretrained(folder).eval()
    encoder["tokenizer"] = AutoTokenizer.from_pretrained(folder, model_max_length=longest)
    return {"name": NAME}


@torch.inference_mode()
def embed(texts: str, out: str | None = None) -> dict[str, Any]:
    """Embed the texts of a JSON file as sentence-transformers does; answer with the seconds.

    Texts are sorted by their number of characters, the longest first, and padded to the longest of
    each batch of 32. Token features are averaged, and the means get length 1.
    """
    model, tokenizer = encoder["model"], encoder["tokenizer"]
    lines = json.loads(Path(texts).read_text())
    start = time.perf_counter()
    order = np.argsort([-len(line) for line in lines], kind="stable")
    found = np.zeros((len(lines), model.config.hidden_size), np.float32)
    tokens = 0
    for i in range(0, len(order), 32):
        here = order[i : i + 32]
        batch = tokenizer(
            [lines[j] for j in here], padding=True, truncation=True, return_tensors="pt"
        )
        features = model(**batch).last_hidden_state  # [B, T, D]
        real = batch["attention_mask"][..., None].to(features.dtype)
        means = (features * real).sum(1) / real.sum(1)
        found[here] = torch.nn.functional.normalize(means, dim=1).numpy()
        tokens += batch["input_ids"].numel()
    seconds = time.perf_counter() - start
    if out is not None:
        np.save(out, found)
    return {"seconds": seconds, "tokens": tokens}


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {"load_encoder": load_encoder, "embed": embed}

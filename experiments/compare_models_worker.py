"""transformers on PyTorch, in a process of the peers' environment; started by `compare_models.py`.

It reads requests as JSON lines, and answers each with one line. `do` names what to do; texts and
arrays are in files that the request names.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestant import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, DynamicCache

from_disk: dict[str, Any] = {}  # models and tokenizers that were loaded


def load_encoder(folder: str, longest: int, threads: int) -> dict[str, Any]:
    """Load a BERT and its tokenizer from a folder."""
    torch.set_num_threads(threads)
    from_disk["encoder"] = BertModel.from_pretrained(folder).eval()
    from_disk["texts"] = AutoTokenizer.from_pretrained(folder, model_max_length=longest)
    return {"torch": torch.__version__}


def embed(texts: str, out: str | None = None) -> dict[str, Any]:
    """Embed the texts of a JSON file as sentence-transformers does; answer with the seconds.

    Texts are sorted by their number of characters, the longest first, and padded to the longest of
    each batch of 32. Token features are averaged, and the means get length 1.
    """
    encoder, tokenizer = from_disk["encoder"], from_disk["texts"]
    lines = json.loads(Path(texts).read_text())
    start = time.perf_counter()
    order = np.argsort([-len(line) for line in lines], kind="stable")
    found = np.zeros((len(lines), encoder.config.hidden_size), np.float32)
    tokens = 0
    with torch.inference_mode():
        for i in range(0, len(order), 32):
            here = order[i : i + 32]
            batch = tokenizer(
                [lines[j] for j in here], padding=True, truncation=True, return_tensors="pt"
            )
            features = encoder(**batch).last_hidden_state  # [B, T, D]
            real = batch["attention_mask"][..., None].to(features.dtype)
            means = (features * real).sum(1) / real.sum(1)
            found[here] = torch.nn.functional.normalize(means, dim=1).numpy()
            tokens += batch["input_ids"].numel()
    seconds = time.perf_counter() - start
    if out is not None:
        np.save(out, found)
    return {"seconds": seconds, "tokens": tokens}


def load_decoder(path: str, threads: int) -> dict[str, Any]:
    """Load the model and the tokenizer of a GGUF file."""
    torch.set_num_threads(threads)
    where = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="sdpa"
    )
    from_disk["decoder"] = model.eval()
    from_disk["words"] = AutoTokenizer.from_pretrained(**where)
    return {"torch": torch.__version__}


def tokens(text: str) -> dict[str, Any]:
    """The token ids of a text."""
    return {"ids": from_disk["words"](text, add_special_tokens=False)["input_ids"]}


@torch.inference_mode()
def logits(ids: list[int], out: str) -> dict[str, Any]:
    """Logits of the token after each token: a file of [T, V]."""
    np.save(out, from_disk["decoder"](torch.tensor([ids])).logits[0].numpy())
    return {}


@torch.inference_mode()
def losses(ids: list[int], out: str) -> dict[str, Any]:
    """The loss of each token but the first, in nats: a file of [T - 1]."""
    given = torch.tensor(ids)
    found = from_disk["decoder"](given[None, :-1]).logits[0]
    np.save(out, torch.nn.functional.cross_entropy(found, given[1:], reduction="none").numpy())
    return {}


@torch.inference_mode()
def continuations(prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """As `compare_models.continuations`: prompts of one length in a batch, and a cache."""
    model = from_disk["decoder"]

    def more(given: torch.Tensor) -> torch.Tensor:
        found = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].argmax(-1, keepdim=True)

    start = time.perf_counter()
    cache = DynamicCache(config=model.config)
    out = [more(torch.tensor(prompts))]
    prefill, decoding = time.perf_counter() - start, 0.0
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(steps):
            out.append(more(out[-1]))
        decoding = time.perf_counter() - start
    return {"tokens": torch.cat(out, 1).tolist(), "prefill": prefill, "decoding": decoding}


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "load_encoder": load_encoder,
    "embed": embed,
    "load_decoder": load_decoder,
    "tokens": tokens,
    "logits": logits,
    "losses": losses,
    "continuations": continuations,
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    return REQUESTS[request.pop("do")](**request)


if __name__ == "__main__":
    assert sys.argv[1:] == ["transformers"]
    serve(answer)

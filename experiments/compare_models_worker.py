"""Another library's models, in a process of the peers' environment; started by `compare_models.py`.

It reads requests as JSON lines, and answers each with one line. `do` names what to do; texts and
arrays are in files that the request names. The argument names the library.

Axes: B rows, T tokens, V the vocabulary.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from contestant import serve

# The module of each library, which alone imports it.
LIBRARIES = {"transformers": "peer_transformers", "llama.cpp": "peer_llama_cpp"}

More = Callable[[np.ndarray], np.ndarray]


class Decoder(Protocol):
    """A language model."""

    name: str  # of the library, with its version

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits of the token after each token: [T, V]."""

    def begin(self, rows: int, capacity: int) -> More:
        """An empty cache: a function of the next tokens of each row, of which there may be
        `capacity` in all, [B, T]. It gives the likeliest token after each row, [B]."""


loaded: dict[str, Any] = {}  # "decoder": the model of `load_decoder`


def load_decoder(**options: Any) -> dict[str, Any]:
    """Load the model and the tokenizer of a GGUF file."""
    model: Decoder = loaded["library"].Decoder(**options)
    loaded["decoder"] = model
    return {"name": model.name}


def tokens(text: str) -> dict[str, Any]:
    """The token ids of a text."""
    return {"ids": loaded["decoder"].tokens(text)}


def logits(ids: list[int], out: str) -> dict[str, Any]:
    """Logits of the token after each token: a file of [T, V]."""
    np.save(out, loaded["decoder"].logits(ids))
    return {}


def losses(ids: list[int], out: str) -> dict[str, Any]:
    """The loss of each token but the first, in nats: a file of [T - 1]."""
    found = loaded["decoder"].logits(ids[:-1])
    each = [np.logaddexp.reduce(row, dtype=np.float64) for row in found]
    np.save(out, np.array(each) - found[np.arange(len(found)), ids[1:]])
    return {}


def continuations(prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """As `compare_models.continuations`: prompts of one length in a batch, and a cache."""
    given = np.array(prompts)
    more: More = loaded["decoder"].begin(len(given), given.shape[1] + 1 + 2 * steps)
    start = time.perf_counter()
    out = [more(given)]
    prefill, decoding = time.perf_counter() - start, 0.0
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(steps):
            out.append(more(out[-1][:, None]))
        decoding = time.perf_counter() - start
    return {"tokens": np.stack(out, 1).tolist(), "prefill": prefill, "decoding": decoding}


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "load_decoder": load_decoder,
    "tokens": tokens,
    "logits": logits,
    "losses": losses,
    "continuations": continuations,
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    do = request.pop("do")
    return (REQUESTS.get(do) or loaded["library"].REQUESTS[do])(**request)


if __name__ == "__main__":
    (library,) = sys.argv[1:]
    loaded["library"] = importlib.import_module(LIBRARIES[library])
    serve(answer)

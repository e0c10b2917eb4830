"""llama.cpp through the C interface of llama-cpp-python, for `compare_models_worker.py`.

The class `Llama` of that package knows one text at a time; `llama_decode` takes tokens of several.

Axes: B rows, T tokens, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np

REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {}  # it has no encoder


class Decoder:
    """As `compare_models_worker.Decoder`.

    A file in float32 is computed in float32 throughout, unless `half` leaves the attention as
    llama.cpp has it by default: fused, which it does in float16 only, as the cache is.
    """

    def __init__(self, path: str, threads: int, half: bool = False) -> None:
        self.name = f"llama-cpp-python {llama_cpp.__version__}" + ", float16" * half
        self.threads, self.half = threads, half
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if self.model is None:
            raise ValueError(f"llama.cpp can't read {path}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.context: Any = None
        self.size = (0, 0)

    def tokens(self, text: str) -> list[int]:
        raw = text.encode()
        found = (llama_cpp.llama_token * len(raw))()  # a token is of one byte or more
        count = llama_cpp.llama_tokenize(
            self.vocabulary, raw, len(raw), found, len(raw), False, True
        )
        return list(found[:count])

    def empty(self, rows: int, capacity: int) -> Any:
        """A context whose cache is empty: the last one, if it has that size."""
        if self.size != (rows, capacity):
            if self.context is not None:
                llama_cpp.llama_free(self.context)
            params = llama_cpp.llama_context_default_params()
            params.n_seq_max, params.n_ctx = rows, rows * capacity
            params.n_batch = rows * capacity
            params.n_threads = params.n_threads_batch = self.threads
            if not self.half:
                params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
                params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.context = llama_cpp.llama_init_from_model(self.model, params)
            self.size = rows, capacity
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        return self.context

    def decode(self, context: Any, given: np.ndarray, place: int, every: bool) -> np.ndarray:
        """Logits after each row's last token, or after every token; rows stand one by one.

        Args:
          context: of `empty`.
          given: the next tokens of each row, [B, T].
          place: the position of the first.
          every: whether logits of every token are wanted.
        """
        rows, length = given.shape
        batch = llama_cpp.llama_batch_init(given.size, 0, 1)
        batch.n_tokens = given.size
        for n, token in enumerate(given.ravel().tolist()):
            row, t = divmod(n, length)
            batch.token[n], batch.pos[n] = token, place + t
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
            batch.logits[n] = every or t == length - 1
        failed = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        shape = given.size if every else rows, llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape)

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.decode(self.empty(1, len(ids)), np.array([ids]), 0, every=True)

    def begin(self, rows: int, capacity: int) -> Callable[[np.ndarray], np.ndarray]:
        context, place = self.empty(rows, capacity), 0

        def more(given: np.ndarray) -> np.ndarray:
            nonlocal place
            found = self.decode(context, given, place, every=False).argmax(-1)
            place += given.shape[1]
            return found

        return more

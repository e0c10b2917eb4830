"""Small random models of transformers, in a process of the peers' environment.

`what_models_see.py` starts it. It reads requests as JSON lines, and answers each with one line.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import transformers
from contestant import serve
from transformers import AutoConfig, AutoModel

# The settings of architectures that have other names for the sizes of a model, or need more.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
GROUPED: dict[str, Any] = {"num_key_value_heads": 1}
OTHER: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 1, "n_head": 2},
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention"]},
    "gemma3_text": GROUPED
    | {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention"]},
    "gpt2": OF_GPT,
    "gpt_bigcode": OF_GPT,
    "gpt_neo": {"num_layers": 1, "num_heads": 2, "attention_types": [[["local"], 1]]}
    | {"window_size": 3},
    "gptj": OF_GPT | {"rotary_dim": 4},
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 3},
    "modernbert": {"local_attention": 4, "layer_types": ["sliding_attention"]}
    | {"cls_token_id": 1, "sep_token_id": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    | {"decoder_start_token_id": 0},
}

models: dict[str, Any] = {}


def build(name: str) -> dict[str, Any]:
    """Makes a model with random weights; answers with its settings, and transformers' version."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = SIZES | OTHER.get(name, {})
    config = AutoConfig.for_model(name, **settings)
    models[name] = AutoModel.from_config(config, dtype=torch.float32).eval()
    # Larger weights than the usual ones: attention is then far from even.
    with torch.no_grad():
        for weight in models[name].parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.4)
    return {"version": transformers.__version__, "settings": settings}


@torch.inference_mode()
def run(name: str, out: str, **arrays: Any) -> dict[str, Any]:
    """Writes the features of the last layer to a file; other arguments go to the model by name."""
    given = {
        key: torch.tensor(value) if isinstance(value, list) else value
        for key, value in arrays.items()
    }
    np.save(out, models[name](**given).last_hidden_state.numpy())
    return {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    return {"build": build, "run": run}[request.pop("do")](**request)


if __name__ == "__main__":
    assert sys.argv[1:] == ["transformers"]
    serve(answer)

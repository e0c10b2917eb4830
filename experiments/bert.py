"""BERT's encoder in Flax nnx (Devlin et al. 2018, arXiv 1810.04805), as an encoder of sentences.

A layer is `norm(x + attention(x))`, then `norm(x + mlp(x))`: norms after the sums, learnt
positions, an exact GELU, and biases everywhere. Every token sees every token of its text. The
embedding of a text is the mean over its tokens, with length 1 (Reimers and Gurevych 2019, arXiv
1908.10084).

Axes: B rows, T tokens, M texts of a row, D features, N heads of H features, F hidden features of
the feed-forward network, V the vocabulary, P positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import weights
from data import DataError
from flax import nnx
from tokenizers import Tokenizer

import jaxattn as ja
from jaxattn.nn.nnx import MultiHeadAttention, TransformerBlock
from jaxattn.shapes import Array, Float, Int


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    vocabulary: int  # V
    width: int  # D
    layers: int
    heads: int  # N
    hidden: int  # F
    positions: int  # P, tokens of the longest text in training
    types: int  # kinds of text: first or second of a pair
    epsilon: float  # of the norms

    @property
    def head_dim(self) -> int:
        return self.width // self.heads  # H


class Bert(nnx.Module):
    """Token ids to features of each token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        norm = partial(nnx.LayerNorm, epsilon=c.epsilon)
        block = partial(
            TransformerBlock,
            c.width,
            partial(MultiHeadAttention, c.heads),
            c.hidden,
            norm="post",
            norm_layer=norm,
            activation=partial(nnx.gelu, approximate=False),
            rngs=rngs,
        )
        self.words = nnx.Embed(c.vocabulary, c.width, rngs=rngs)  # [V, D]
        self.positions = nnx.Embed(c.positions, c.width, rngs=rngs)  # [P, D]
        self.types = nnx.Embed(c.types, c.width, rngs=rngs)
        self.norm = norm(c.width, rngs=rngs)
        self.blocks = nnx.List([block() for _ in range(c.layers)])

    def __call__(
        self, tokens: Int[Array, "B T"], mask: Any = None, places: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Features of each token.

        Args:
          tokens: texts, each the first of its pair.
          mask: which tokens see each other; by default all of a row.
          places: the position of each token in its own text; by default a row is one text.
        """
        if places is None:
            places = jnp.arange(tokens.shape[1])[None]
        x = self.words(tokens) + self.positions(places) + self.types.embedding[0]  # [B, T, D]
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


@partial(jax.jit, static_argnames=("graph", "texts"))
def embed(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    ids: Int[Array, "B T"],
    places: Int[Array, "B T"],
    texts: int,
) -> Float[Array, "B M D"]:
    """Embeddings of the texts of each row, which do not see each other.

    Args:
      graph, params: of a `Bert`, from `nnx.split`.
      tokens: the rows.
      ids: the text of each token within its row, from 0; -1 where there is none.
      places: the position of each token in its text.
      texts: M, the most texts of a row.

    Returns:
      Vectors of length 1; of texts that are not there, 0.
    """
    model = nnx.merge(graph, params)
    x = model(tokens, ja.masks.segments(ids), places)  # [B, T, D]
    theirs = (ids[:, None, :] == jnp.arange(texts)[None, :, None]).astype(x.dtype)  # [B, M, T]
    # The length becomes 1, so the sum serves as well as the mean.
    sums = jnp.einsum("bmt,btd->bmd", theirs, x, precision="highest")
    lengths = jnp.linalg.norm(sums, axis=-1, keepdims=True)
    return sums / jnp.maximum(lengths, jnp.finfo(x.dtype).tiny)


# ------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Loaded:
    """What the archive of a sentence encoder holds.

    Attributes:
      model: with its weights in float32.
      tokenizer: which cuts texts to `longest` tokens.
      longest: tokens of the longest text, [CLS] and [SEP] among them.
    """

    model: Bert
    tokenizer: Tokenizer
    longest: int


# What the library sentence-transformers calls the steps from text to embedding.
_STEPS = ["Transformer", "Pooling", "Normalize"]
_FILES = ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json")


def load(path: Path) -> Loaded:
    """The model and tokenizer in a zip archive, in the layout of sentence-transformers.

    Raises:
      DataError: for an archive that can't be read, and a model that is not of this kind.
    """
    *texts, tokens, tensors = weights.read_zip(path, *_FILES, "tokenizer.json", "model.safetensors")
    settings = [_parsed(f"{path}, {name}", text) for name, text in zip(_FILES, texts, strict=True)]
    config = config_of(path, settings[0])
    longest = longest_of(path, config, *settings[1:])
    try:
        tokenizer = Tokenizer.from_buffer(tokens)
    except ValueError as error:
        raise DataError(f"{path}: tokenizer.json can't be read ({error})") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    if tokenizer.get_vocab_size() > config.vocabulary:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.get_vocab_size()} tokens, and the model "
            f"embeddings of {config.vocabulary}"
        )
    return Loaded(filled(config, weights.read_safetensors(path, tensors)), tokenizer, longest)


def _parsed(origin: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{origin}: no JSON ({error})") from None


def config_of(path: Path, found: dict[str, Any]) -> Config:
    """The sizes in config.json."""

    def get(name: str) -> Any:
        if name not in found:
            raise DataError(f"{path}: config.json lacks {name}")
        return found[name]

    for name, value, default in (
        ("model_type", "bert", None),
        ("hidden_act", "gelu", "gelu"),
        ("position_embedding_type", "absolute", "absolute"),
    ):
        given = found.get(name, default)
        if given != value:
            raise DataError(f"{path}: {name} is {given!r}, expected {value!r}")
    config = Config(
        vocabulary=get("vocab_size"),
        width=get("hidden_size"),
        layers=get("num_hidden_layers"),
        heads=get("num_attention_heads"),
        hidden=get("intermediate_size"),
        positions=get("max_position_embeddings"),
        types=get("type_vocab_size"),
        epsilon=get("layer_norm_eps"),
    )
    if config.width % config.heads:
        raise DataError(f"{path}: {config.heads} heads do not divide {config.width} features")
    return config


def longest_of(path: Path, config: Config, steps: Any, pooling: Any, settings: Any) -> int:
    """Tokens of the longest text; the steps must be a mean of the features, with length 1."""
    kinds = [step["type"].rsplit(".", 1)[-1] for step in steps]
    if kinds != _STEPS:
        raise DataError(f"{path}: the steps are {', '.join(kinds)}, expected {', '.join(_STEPS)}")
    means = sorted(name for name, used in pooling.items() if name.startswith("pooling") and used)
    if means != ["pooling_mode_mean_tokens"]:
        raise DataError(
            f"{path}: the pooling is {', '.join(means) or 'none'}, expected "
            "pooling_mode_mean_tokens alone"
        )
    if settings.get("do_lower_case"):
        raise DataError(f"{path}: do_lower_case is true; only the tokenizer may change texts")
    longest = settings.get("max_seq_length", config.positions)
    if not 2 < longest <= config.positions:
        raise DataError(
            f"{path}: max_seq_length is {longest}, expected 3 to {config.positions}, for which "
            "there are positions"
        )
    return int(longest)


def filled(config: Config, tensors: weights.Weights) -> Bert:
    """A model with the weights of a file."""
    c, N, H = config, config.heads, config.head_dim
    # No weights are drawn: each is replaced.
    graph, state = nnx.split(nnx.eval_shape(lambda: Bert(c, rngs=nnx.Rngs(0))))

    def table(name: str, rows: int) -> dict[str, Any]:
        return {"embedding": tensors.take(f"embeddings.{name}_embeddings.weight", rows, c.width)}

    def norm(at: str) -> dict[str, Any]:
        names = {"scale": "weight", "bias": "bias"}
        return {
            ours: tensors.take(f"{at}.LayerNorm.{name}", c.width) for ours, name in names.items()
        }

    def linear(at: str, of: int, to: int) -> dict[str, Any]:
        return {
            "kernel": tensors.take(f"{at}.weight", to, of).T,  # [of, to]
            "bias": tensors.take(f"{at}.bias", to),
        }

    def heads(at: str) -> dict[str, Any]:
        found = linear(at, c.width, c.width)
        return {
            "kernel": found["kernel"].reshape(c.width, N, H),
            "bias": found["bias"].reshape(N, H),
        }

    def layer(i: int) -> dict[str, Any]:
        at = f"encoder.layer.{i}"
        out = linear(f"{at}.attention.output.dense", c.width, c.width)
        return {
            "attention": {
                "query": heads(f"{at}.attention.self.query"),
                "key": heads(f"{at}.attention.self.key"),
                "value": heads(f"{at}.attention.self.value"),
                "out": out | {"kernel": out["kernel"].reshape(N, H, c.width)},
            },
            "attention_norm": norm(f"{at}.attention.output"),
            "mlp_in": linear(f"{at}.intermediate.dense", c.width, c.hidden),
            "mlp_out": linear(f"{at}.output.dense", c.hidden, c.width),
            "mlp_norm": norm(f"{at}.output"),
        }

    found = {
        "words": table("word", c.vocabulary),
        "positions": table("position", c.positions),
        "types": table("token_type", c.types),
        "norm": norm("embeddings"),
        "blocks": {i: layer(i) for i in range(c.layers)},
    }
    # The numbers 0 to P - 1, and a layer for the feature of [CLS], which a mean does not use.
    tensors.leave("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
    tensors.finish()
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, found))
    return nnx.merge(graph, state)

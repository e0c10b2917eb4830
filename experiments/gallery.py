"""Every built-in mask: definition, picture, density, and where it is used.

    python experiments/gallery.py

Writes a grid of pictures, which README shows, and a page on which masks are
chosen, combined and asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import explorer
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from rich.console import Console

import jaxattn as ja
from jaxattn import masks

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


class Entry(NamedTuple):
    """A mask of the gallery."""

    make: Callable[[int], ja.Mask]  # for so many tokens
    definition: str
    used: str  # by which models, in which paper


def documents(T: int) -> jax.Array:
    """Ids of three packed documents."""
    return jnp.searchsorted(jnp.array([T // 3, T * 3 // 4]), jnp.arange(T), side="right")


def checkers(T: int) -> jax.Array:
    """A table of blocks of 4 tokens: every third is visible."""
    block = jnp.arange(-(-T // 4))
    return (block[:, None] + block[None, :]) % 3 == 0


def drafts(T: int) -> jax.Array:
    """Parents of a binary tree."""
    return (jnp.arange(T) - 1) // 2


def chosen(T: int) -> jax.Array:
    """Scores of blocks of a twelfth of the tokens."""
    blocks = -(-T // (T // 12))
    return jax.random.normal(jax.random.key(1), (blocks, blocks))


def images(T: int) -> jax.Array:
    """Ids of two images within text."""
    third = T // 3
    return jnp.where(jnp.arange(T) % third < third // 3, -1, jnp.arange(T) // third)


def grid(T: int) -> tuple[int, int]:
    """The sides of a picture of T patches."""
    side = int(T**0.5)
    return T // side, side


GALLERY: dict[str, Entry] = {
    "full": Entry(lambda T: masks.full(), "everything", "BERT, ViT (1810.04805, 2010.11929)"),
    "causal": Entry(lambda T: masks.causal(), "q + offset >= k", "GPT, decoders (1706.03762)"),
    "sliding_window": Entry(
        lambda T: masks.sliding_window(T // 5),
        "-right <= q - k <= left",
        "Longformer, Mistral, Gemma (2004.05150)",
    ),
    "prefix_lm": Entry(
        lambda T: masks.prefix_lm(T // 3),
        "k < lengths[b] or q >= k",
        "T5, PaliGemma (1910.10683)",
    ),
    "segments": Entry(
        lambda T: masks.segments(documents(T)),
        "q_ids[b, q] == k_ids[b, k]",
        "packed training, T5, Llama 3",
    ),
    "key_padding": Entry(
        lambda T: masks.key_padding(lengths=T * 3 // 4), "k < lengths[b]", "batches of any length"
    ),
    "query_padding": Entry(
        lambda T: masks.query_padding(lengths=T * 3 // 4), "q < lengths[b]", "pooling, losses"
    ),
    "chunked": Entry(
        lambda T: masks.chunked(T // 4),
        "q // size == k // size",
        "blockwise BERT (1911.02972), Llama 4",
    ),
    "dilated": Entry(
        lambda T: masks.dilated(4), "(q - k) % rate == 0", "Sparse Transformer (1904.10509)"
    ),
    "global_tokens": Entry(
        lambda T: masks.global_tokens(T // 10) | masks.sliding_window(T // 12, T // 12),
        "q < n or k < n; here with a window",
        "BigBird, Longformer; sinks (2007.14062, 2309.17453)",
    ),
    "neighborhood": Entry(
        lambda T: masks.neighborhood(grid(T), 1),
        "the nearest 2 * radius + 1 on each axis",
        "NATTEN (2204.07143)",
    ),
    "block_sparse": Entry(
        lambda T: masks.block_sparse(checkers(T), 4),
        "table[q // block, k // block]",
        "Sparse Transformer (1904.10509)",
    ),
    "random_blocks": Entry(
        lambda T: masks.random_blocks(jax.random.key(0), 2, T // 8, T),
        "count random blocks of each block of queries",
        "BigBird (2007.14062)",
    ),
    "top_blocks": Entry(
        lambda T: (
            masks.causal() & (masks.chunked(T // 12) | masks.top_blocks(chosen(T), 3, T // 12))
        ),
        "the blocks with the greatest scores; here causal, and its own",
        "MoBA, NSA (2502.13189, 2502.11089)",
    ),
    "spans": Entry(
        lambda T: masks.causal() | masks.spans(images(T)),
        "first[q] <= k <= last[q]; here with causal",
        "Gemma 3, Transfusion (2503.19786, 2408.11039)",
    ),
    "tree": Entry(
        lambda T: masks.tree(drafts(T)),
        "itself, and its ancestors",
        "speculative decoding: SpecInfer (2305.09781)",
    ),
    "shared_prefix": Entry(
        lambda T: masks.causal() & masks.shared_prefix(T // 4, documents(T)),
        "k < length or ids[q] == ids[k]; here causal",
        "Hydragen: answers to one prompt (2402.05099)",
    ),
    "block_diffusion": Entry(
        lambda T: masks.block_diffusion(T // 2, T // 8),
        "its noisy block, and the clean blocks before",
        "BD3-LM (2503.09573)",
    ),
    "per_head": Entry(
        lambda T: masks.per_head([masks.sliding_window(T // 8) & masks.dilated(2)]),
        "what its head's mask says",
        "Sparse Transformer's heads (1904.10509)",
    ),
    "empty": Entry(lambda T: masks.empty(), "nothing", "where | begins"),
    "dense": Entry(
        lambda T: masks.dense(jnp.asarray(np.random.default_rng(0).random((T, T)) < 0.3)),
        "array[q, k]",
        "what has no formula",
    ),
    "predicate": Entry(
        lambda T: masks.predicate(lambda b, h, q, k: (q & k) == k),
        "any function; here (q & k) == k",
        "FlexAttention's mask_mod (2412.05496)",
    ),
    "from_array": Entry(
        lambda T: masks.from_array(1.0 - jnp.tri(T), "ignore"),
        "what another library's array keeps",
        "the tutorial, PyTorch, Keras, Hugging Face",
    ),
}


def draw(tokens: int) -> matplotlib.figure.Figure:
    """All masks in a grid."""
    columns = 6
    lines = -(-len(GALLERY) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 3.1 * lines), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, entry) in zip(axes.flat, GALLERY.items(), strict=False):
        mask = entry.make(tokens)
        axis.axis("on")
        mask.plot(axis, tokens, tokens)
        share = float(np.mean(mask.dense(tokens, tokens)))
        ends = [0, tokens - 1]
        axis.set(xticks=ends, yticks=ends)
        axis.set_ylabel("query", fontsize=8, labelpad=-6)
        axis.set_title(f"{name}  {share:.0%}", fontsize=11, fontweight="bold")
        axis.set_xlabel(f"key\n{entry.definition}\n{entry.used}", fontsize=7.5, labelpad=-8)
    return figure


@dataclass(frozen=True)
class Config:
    """The gallery of masks."""

    picture: Path = HERE / "gallery.png"  # the grid
    page: Path = HERE / "results" / "gallery.html"  # the page
    tokens: int = 48  # queries and keys of the pictures


def main(config: Config) -> None:
    """Writes both files."""
    console = Console()
    for path in (config.picture, config.page):
        path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(config.tokens)
    # Without matplotlib's version: the file changes only when the picture does.
    metadata = {"Software": None}
    figure.savefig(config.picture, dpi=70, metadata=metadata, pil_kwargs={"optimize": True})
    plt.close(figure)
    config.page.write_text(explorer.page(), encoding="utf-8")
    for path in (config.picture, config.page):
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

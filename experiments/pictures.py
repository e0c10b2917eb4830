"""The two pictures of a run: the loss curve and an attention map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from jaxattn.shapes import Float


def draw_curve(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Loss and token accuracy over steps, in training and held out."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    held = [row for row in rows if "held_out_loss" in row]
    for axis, name, title in zip(
        panels, ("loss", "token_accuracy"), ("label-smoothed loss", "token accuracy"), strict=True
    ):
        axis.plot([r["step"] for r in rows], [r[name] for r in rows], label="training (dropout)")
        axis.plot(
            [r["step"] for r in held], [r[f"held_out_{name}"] for r in held], "o-", label="held out"
        )
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_attention(
    path: Path,
    maps: Float[np.ndarray, "N T S"],
    source: Sequence[str],
    target: Sequence[str],
) -> None:
    """One panel a head: rows are target tokens as they are written, columns source tokens.

    Args:
      maps: attention weights; each row of each head sums to 1.
      source, target: a label a token; the target's are what each row predicts.
    """
    heads = len(maps)
    columns = 2 if heads > 1 else 1
    lines = -(-heads // columns)
    size = (columns * (1.5 + 0.35 * len(source)), lines * (1.5 + 0.3 * len(target)))
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for index, axis in enumerate(panels.flat):
        if index >= heads:
            axis.axis("off")
            continue
        axis.imshow(maps[index], cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(source)), source, rotation=90)
        axis.set_yticks(range(len(target)), target)
        axis.set_title(f"head {index}")
    figure.suptitle("cross-attention, last decoder layer: target token (row) to source token")
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""The pictures of the runs: curves, attention maps, growth with the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from jaxattn.shapes import Float


def draw_curve(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Loss and token accuracy over steps, in training and on held-out data."""
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
    maps: Float[np.ndarray, "rows columns T S"],
    source: Sequence[str],
    target: Sequence[str],
    *,
    names: Sequence[str],
    title: str,
) -> None:
    """A panel for each map: its rows are the tokens that look, its columns those looked at.

    Args:
      maps: attention weights; each row of each map sums to 1.
      source, target: a label for each token, of the columns and of the rows.
      names: of the panels, row by row.
      title: of the picture.
    """
    rows, columns = maps.shape[:2]
    size = (columns * (1.5 + 0.35 * len(source)), rows * (1.5 + 0.3 * len(target)))
    figure, panels = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for name, axis, weights in zip(
        names, panels.flat, maps.reshape(-1, *maps.shape[2:]), strict=True
    ):
        axis.imshow(weights, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(source)), source, rotation=90)
        axis.set_yticks(range(len(target)), target)
        axis.set_title(name)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_losses(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Training loss, and bits per byte of held-out text, over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    held = [row for row in rows if "held_out_loss" in row]
    left.plot([r["step"] for r in rows], [r["loss"] for r in rows], label="training")
    left.plot([r["step"] for r in held], [r["held_out_loss"] for r in held], "o-", label="held out")
    left.set(xlabel="step", title="loss, nats a token")
    left.legend()
    right.plot([r["step"] for r in held], [r["bits_per_byte"] for r in held], "o-")
    right.set(xlabel="step", title="bits per byte, held out")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_context(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Time and peak memory against the length of a row, by backend."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, scale, title in zip(
        panels, ("seconds", "peak"), (1, 2**20), ("seconds", "peak memory, MiB"), strict=True
    ):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            mine = [row for row in rows if row["backend"] == backend]
            label = {"auto": "jaxattn", "dense": "dense attention"}[backend]
            values = [row[name] / scale for row in mine]
            axis.loglog([row["length"] for row in mine], values, "o-", label=label)
        axis.set(xlabel="tokens in a row", title=f"forward and backward: {title}")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

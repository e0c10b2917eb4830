"""The pictures of the runs: curves, attention maps, growth with the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def draw_heat_maps(path: Path, maps: dict[str, Float[np.ndarray, "layers N"]]) -> None:
    """A heat map for each number by its title: a row for each layer, a column for each head."""
    layers, heads = next(iter(maps.values())).shape
    size = (len(maps) * (1.5 + 0.22 * heads), 1.5 + 0.2 * layers)
    figure, panels = plt.subplots(
        1, len(maps), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for (title, found), axis in zip(maps.items(), panels.flat, strict=True):
        shown = axis.imshow(found, cmap="viridis", aspect="auto")
        axis.set(xlabel="head", xticks=range(heads))
        axis.set_title(title, fontsize="medium", wrap=True)
        figure.colorbar(shown, ax=axis)
    panels[0, 0].set(ylabel="layer", yticks=range(0, layers, 2))
    figure.savefig(path, dpi=120)
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


def draw_heads(path: Path, runs: Mapping[str, Any], tau: float) -> None:
    """Loss, largest logit and entropy of every head over the steps; a column for each run.

    Args:
      path: of the picture.
      runs: by name, `loss` `[steps]`, and `largest` and `entropy` `[steps, layers, N]`.
      tau: the bound of the largest logit, drawn as a line.
    """
    figure, panels = plt.subplots(
        3, len(runs), figsize=(5 * len(runs), 9), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (name, run) in zip(panels.T, runs.items(), strict=True):
        column[0].plot(run.loss, color="black", linewidth=0.8)
        for axis, values in zip(column[1:], (run.largest, run.entropy), strict=True):
            layers = values.shape[1]
            for layer in range(layers):
                lines = axis.plot(values[:, layer], color=plt.cm.viridis(layer / layers), lw=0.8)
                lines[0].set_label(f"layer {layer + 1}")
        column[1].axhline(tau, color="red", linestyle="--", linewidth=0.8, label="tau")
        column[0].set_title(name)
        column[2].set_xlabel("step")
        for axis in column:
            axis.grid(alpha=0.3)
    for axis, said in zip(
        panels[:, 0],
        ("loss, nats a token", "largest logit of each head", "entropy of each head, nats"),
        strict=True,
    ):
        axis.set_ylabel(said)
    panels[1, 0].set_yscale("log")
    panels[1, 0].legend(loc="lower right")
    figure.savefig(path, dpi=100)
    plt.close(figure)

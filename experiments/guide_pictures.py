"""The pictures of the guides: what scores do, how a mask is computed, how fast it was.

    python experiments/guide_pictures.py

Draws what the blocks of a guide define, and the measured tables of `experiments/README.md`, so that
a picture shows what its page says. Draws those of `how_masking_works.py` too.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import how_masking_works
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from how_masking_works import WIDE
from rich.console import Console

import jaxattn as ja
from jaxattn import masks
from jaxattn.backends.flash import tile_lists
from jaxattn.shapes import Array, Float
from jaxattn.tiles.tile_map import EMPTY, FULL, PARTIAL
from jaxattn.views.cells import COLORS

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).parents[1] / "docs/extensions"))

from blocks import blocks

ROOT = Path(__file__).parents[1]

STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "jaxattn",  # the file changes only when the picture does
}
HUES = ["#1f7a8c", "#e07a1f", "#7a4fa3", "#4f9d4f"]
PLAIN, DARK, RED = "#bbbbbb", "#333333", "#c0392b"


def defined(guide: str, until: str = "$^") -> dict[str, Any]:
    """What the blocks of a guide define, up to a heading."""
    text = re.split(until, (ROOT / "docs" / guide).read_text())[0]
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(text):
            exec(compile(block.code, guide, "exec", dont_inherit=True), found)
    return found


# --- scores ---------------------------------------------------------------------------------------


def applied(score: Any, logits: Array, distances: Array, h: int = 0) -> Array:
    """What a score makes of logits of keys at these distances from the last query."""
    last = int(distances.max())
    return jax.vmap(lambda x, k: score(x, 0, h, last, k))(logits, last - distances)


def draw_score(
    along: str, lines: Sequence[tuple[str, Any, int]], *, spread: float = 1.0, keys: int = 32
) -> Any:
    """What a score makes of a logit, and of the weights of the last query.

    Args:
      along: "distance", at a logit of 0, or "logit", at a distance of 0.
      lines: labels, scores and heads.
      spread: of the query's logits.
      keys: how many there are.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.5), layout="constrained")
    x = jnp.arange(float(keys)) if along == "distance" else jnp.linspace(-60, 60, 121)
    zero = jnp.zeros_like(x)
    logits = spread * jax.random.normal(jax.random.key(0), (keys,))
    distance = jnp.arange(keys)[::-1]
    if along == "logit":
        left.axline((0, 0), slope=1, color=PLAIN, linestyle=":")
    draw_weights(right, logits, color=PLAIN, linewidth=4)
    for (label, score, h), color in zip(lines, HUES, strict=False):
        at = (zero, x) if along == "distance" else (x, zero)
        changed = applied(score, at[0], at[1].astype(int), h)
        left.plot(x, changed, color=color, label=label, drawstyle="steps-mid")
        draw_weights(right, applied(score, logits, distance, h), color=color, linewidth=1.2)
    left.set(xlabel={"distance": "distance q - k", "logit": "logit"}[along], title="new logit")
    left.legend(fontsize=8, handlelength=1, labelspacing=0.3)
    return figure


def draw_weights(axis: Any, logits: Float[Array, "S"], **style: Any) -> None:
    """The weights of the last query."""
    axis.plot(np.asarray(jax.nn.softmax(logits)), **style)
    axis.set(xlabel="key", title="weights of the last query", xticks=[0, len(logits) - 1])


def draw_bias(array: Float[Array, "T S"], score: Any) -> Any:
    """A bias by pairs, and the weights of the last query."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.5), layout="constrained")
    figure.colorbar(left.imshow(array, cmap="RdBu", vmin=-4, vmax=4), ax=left, shrink=0.8)
    left.set(title="added to the logit", xlabel="key", ylabel="query", xticks=[0, 31])
    left.set_yticks([0, 31])
    logits = jax.random.normal(jax.random.key(0), (32,))
    draw_weights(right, logits, color=PLAIN, linewidth=4)
    changed = applied(score, logits, jnp.arange(32)[::-1])
    draw_weights(right, changed, color=HUES[0], linewidth=1.2)
    return figure


def scores() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The scores that `docs/scores.md` makes."""
    made = defined("scores.md", until="\n## Recipes")
    heads = [(f"head {h}", made["alibi"], h) for h in range(4)]
    yield "alibi", lambda: draw_score("distance", heads)
    learned = [(f"head {h}", made["learned"], h) for h in range(2)]
    yield "relative_bias", lambda: draw_score("distance", learned, keys=128)
    caps = [(f"cap {c:g}", made["capped"], h) for h, c in enumerate(made["capped"].cap)]
    yield "soft_cap", lambda: draw_score("logit", caps, spread=10.0)
    warm = made["warm"]
    lines = [(f"t = {t:g}", warm, h) for h, t in enumerate(warm.temperature)]
    yield "temperature", lambda: draw_score("logit", lines)
    yield "bias", lambda: draw_bias(made["added"], made["pairs"])
    own = [(f"strength {s:g}", made["own"], h) for h, s in enumerate(made["own"].params[0])]
    yield "score", lambda: draw_score("distance", own)
    order = [("ALiBi, cap", made["cap_last"], 0), ("cap, ALiBi", made["cap_first"], 0)]
    yield "chain", lambda: draw_score("distance", order)


# --- statistics -----------------------------------------------------------------------------------


def draw_heads() -> Any:
    """The weights of the heads of `docs/statistics.md`, with what is said of them."""
    made = defined("statistics.md", until="\n## What each")
    query, key = made["q"], made["k"]
    weights = ja.attention_weights(query, key, mask=masks.causal(), score=made["score"])
    figure, axes = plt.subplots(1, 4, figsize=(WIDE, 1.9), layout="constrained", sharey=True)
    entropy = made["seen"]["entropy"].mean((0, 1))
    for h, axis in enumerate(axes):
        axis.imshow(np.sqrt(weights[0, h]), cmap="magma_r", vmin=0, vmax=1)
        title = f"head {h}\nentropy {entropy[h]:.1f}"
        axis.set(title=title, xlabel="key", xticks=[0, 63], yticks=[0, 63])
    axes[0].set_ylabel("query")
    return figure


# --- how it works ---------------------------------------------------------------------------------


def draw_predicate(made: dict[str, Any]) -> Any:
    """The parts of a mask, and the whole, with the pair that the guide asks about."""
    figure, axes = plt.subplots(1, 3, figsize=(WIDE, 2.1), layout="constrained", sharey=True)
    mask = made["mask"]
    names = "causal()", "& segments(ids)", "= the mask"
    for axis, part, name in zip(axes, (mask.left, mask.right, mask), names, strict=True):
        part.plot(axis, 8, 8)
        marked(axis, (1.5, 5.5))
        axis.set_title(name, fontsize=9.5)
        axis.set_xlabel("key")
        axis.set_ylabel("query" if axis is axes[0] else "")
    return figure


def marked(axis: Any, corner: tuple[float, float], size: tuple[float, float] = (1, 1)) -> None:
    """A frame around what the guide speaks of."""
    axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=RED, linewidth=2, zorder=3))


def squares(axis: Any, numbers: Sequence[Any], corner: tuple[float, float], down: bool) -> None:
    """Numbers in a row or a column of squares."""
    for i, number in enumerate(numbers):
        x, y = (corner[0], corner[1] + i) if down else (corner[0] + i, corner[1])
        axis.add_patch(Rectangle((x, y), 1, 1, facecolor="white", edgecolor=DARK, linewidth=0.8))
        axis.text(x + 0.5, y + 0.5, str(number), ha="center", va="center", fontsize=8)


def board(
    axis: Any, x: tuple[float, float] = (-1, 8.1), y: tuple[float, float] = (8.1, -1.9)
) -> None:
    """Axes for a board of 8 by 8 squares and what stands around it: no ticks, queries down."""
    axis.set(xlim=x, ylim=y, aspect="equal")
    axis.axis("off")


def draw_states(axis: Any, states: Sequence[Sequence[int]]) -> None:
    """A square for each state, from the corner on."""
    for i, row in enumerate(states):
        for j, state in enumerate(row):
            axis.add_patch(Rectangle((j, i), 1, 1, facecolor=COLORS[state], edgecolor="white"))


def of_tiles(made: dict[str, Any]) -> list[list[int]]:
    found: list[list[int]] = np.asarray(made["tiles"].states)[0, 0].tolist()
    return found


def draw_split(made: dict[str, Any]) -> Any:
    """Operands beside the rows and columns to which they belong, and the residue between them."""
    figure, axis = plt.subplots(figsize=(WIDE, 3.5), layout="constrained")
    board(axis, (-4.2, 13.5), (9.2, -2.7))
    places = {"row": iter([-2.6, -1.3]), "column": iter([-2.6, -1.3])}
    names = {"row": iter(["q", "ids[q]"]), "column": iter(["k", "ids[k]"])}
    for operand in made["operands"]:
        down, at = operand.kind == "row", next(places[operand.kind])
        squares(axis, operand.array.reshape(-1).tolist(), (at, 0) if down else (0, at), down)
        name, centre = next(names[operand.kind]), at + 0.5
        x, y, align = (centre, 8.3, "center") if down else (-0.3, centre, "right")
        axis.text(x, y, name, ha=align, va="top" if down else "center", fontsize=9)
    seen = np.asarray(made["mask"].dense(8, 8))[0, 0]
    draw_states(axis, np.where(seen, FULL, EMPTY).tolist())
    for corner, size in (((2, 6), (1, 1)), ((-2.6, 6), (2.3, 1)), ((2, -2.6), (1, 2.3))):
        marked(axis, (corner[0], corner[1]), (size[0], size[1]))
    axis.text(8.5, 3, "residue:\nq >= k\nand\nids[q] == ids[k]", fontsize=9.5, va="center")
    axis.text(8.5, 6.5, "6 >= 2\nand 1 == 0:\nmasked", fontsize=9.5, va="center", color=RED)
    return figure


def certain(always: bool, never: bool) -> str:
    return "True" if always else "False" if never else "maybe"


def draw_bounds(made: dict[str, Any]) -> Any:
    """Bounds of the operands over tiles of 4 by 4, and what follows from them."""
    figure, axis = plt.subplots(figsize=(WIDE, 4.0), layout="constrained")
    board(axis, (-3.2, 8.1), (8.1, -1.4))
    bounds = [
        [(int(x.min()), int(x.max())) for x in operand.array.reshape(2, 4)]
        for operand in made["operands"]
    ]
    (q, k, ids_q, ids_k), names = bounds, ["EMPTY", "PARTIAL", "FULL"]
    shape = (1, 8, 1, 16)
    states = np.asarray(ja.tile_map(made["mask"], shape, shape, tile=4).states)[0, 0]
    for (i, j), state in np.ndenumerate(states):
        corner = (4 * j, 4 * i)
        axis.add_patch(Rectangle(corner, 4, 4, facecolor=COLORS[state], alpha=0.45, edgecolor=DARK))
        order = certain(q[i][0] >= k[j][1], q[i][1] < k[j][0])
        apart = ids_q[i][1] < ids_k[j][0] or ids_k[j][1] < ids_q[i][0]
        alike = certain(ids_q[i] == ids_k[j] and ids_q[i][0] == ids_q[i][1], apart)
        text = f"q >= k: {order}\nids: {alike}\n\n{names[state]}"
        axis.text(corner[0] + 2, corner[1] + 2, text, ha="center", va="center", fontsize=9.5)
    for i in range(2):
        rows, columns = (
            f"{name} in [{at[i][0]}, {at[i][1]}]\nids in [{of[i][0]}, {of[i][1]}]"
            for name, at, of in (("q", q, ids_q), ("k", k, ids_k))
        )
        axis.text(-0.2, 4 * i + 2, rows, ha="right", va="center", fontsize=9.5)
        axis.text(4 * i + 2, -0.2, columns, ha="center", va="bottom", fontsize=9.5)
    return figure


def visited(made: dict[str, Any]) -> list[list[tuple[int, int]]]:
    """Columns and states of each row's active tiles, in the order of its list."""
    states = made["tiles"].states
    lists = tile_lists.rows(states[:, :, None])
    return [
        [(int(j), int(states[0, 0, i, j])) for j in lists.tile[0, 0, 0, i, : ends[1]]]
        for i, ends in enumerate(lists.ends[0, 0, 0])
    ]


def draw_lists(made: dict[str, Any]) -> Any:
    """The states of tiles, and beside each row of them its list."""
    widths = {"width_ratios": (9.1, 11.6)}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDE, 2.6), layout="constrained", gridspec_kw=widths
    )
    board(left)
    board(right, (-2.6, 9))
    left.text(4, -1.2, "states of tiles", ha="center")
    right.text(4, -1.2, "a list for each row", ha="center")
    draw_states(left, of_tiles(made))
    lists = visited(made)
    draw_states(right, [[state for _, state in row] for row in lists])
    for i, row in enumerate(lists):
        left.text(-0.3, i + 0.5, i, ha="right", va="center", fontsize=8)
        left.text(i + 0.5, -0.2, i, ha="center", va="bottom", fontsize=8)
        right.text(-0.3, i + 0.5, f"row {i}:", ha="right", va="center", fontsize=9)
        for n, (j, state) in enumerate(row):
            numbered(right, (n, i), j, state)
    kinds = (("PARTIAL", PARTIAL), ("FULL", FULL), ("EMPTY", EMPTY))
    for n, (name, state) in enumerate(kinds):
        right.add_patch(Rectangle((4.2, 4.4 + 1.2 * n), 0.9, 0.9, facecolor=COLORS[state]))
        right.text(5.4, 4.9 + 1.2 * n, name, va="center", fontsize=8)
    return figure


def numbered(axis: Any, corner: tuple[float, float], number: int, state: int) -> None:
    """A number in the square of a tile."""
    x, y, color = corner[0] + 0.5, corner[1] + 0.5, "white" if state == FULL else DARK
    axis.text(x, y, number, ha="center", va="center", color=color, fontsize=9)


def draw_order(made: dict[str, Any]) -> Any:
    """The order of the tiles, and the output of one query after each of its own."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 2.6), layout="constrained")
    board(left)
    left.text(4, -0.7, "order of the tiles", ha="center")
    draw_states(left, of_tiles(made))
    rows, query, n = visited(made), 44, 0
    for i, row in enumerate(rows):
        for j, state in row:
            numbered(left, (j, i), n := n + 1, state)
    mine = query // 8
    columns = [j for j, _ in rows[mine]]
    marked(left, (min(columns), mine), (len(columns), 1))
    before = sum(map(len, rows[:mine]))
    at = range(before + 1, before + 1 + len(columns))
    right.plot(at, online(made, query, columns), "o-", color=HUES[0])
    logits, values = row_of(made, query)
    right.axhline(float(jax.nn.softmax(logits) @ values), color=PLAIN, linestyle=":")
    right.set(title=f"output of query {query}", xlabel="after tile", xticks=at)
    return figure


def row_of(made: dict[str, Any], query: int) -> tuple[Array, Array]:
    """Logits of a query, -inf where they are masked, and the values of keys."""
    logits, values = 2 * jax.random.normal(jax.random.key(1), (2, 64))
    return jnp.where(made["documents"].dense(64, 64)[0, 0, query], logits, -jnp.inf), values


def online(made: dict[str, Any], query: int, columns: Sequence[int]) -> list[float]:
    """The output of a query after each of its tiles, from `m`, `l` and `acc` alone."""
    logits, values = row_of(made, query)
    m, l, acc = jnp.float32(-jnp.inf), jnp.float32(0), jnp.float32(0)
    outputs = []
    for j in columns:
        tile = slice(8 * j, 8 * j + 8)
        new = jnp.maximum(m, logits[tile].max())
        e, kept = jnp.exp(logits[tile] - new), jnp.exp(m - new)
        m, l, acc = new, l * kept + e.sum(), acc * kept + e @ values[tile]
        outputs.append(float(acc / l))
    return outputs


# --- speed ----------------------------------------------------------------------------------------

RESULTS = ROOT / "experiments/README.md"


def measured(first: str) -> list[list[str]]:
    """The cells of a table of measurements whose header begins like this, header included."""
    text = RESULTS.read_text()
    table = text[text.index(f"| {first} |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


def long_rows(dtype: str) -> list[list[list[str]]]:
    """The tables of T = 4096: forward, and both passes."""
    return [measured(f"{passes}, {dtype}") for passes in ("forward", "forward+backward")]


def draw_long_rows(tables: list[list[list[str]]]) -> Any:
    """How many times faster than each peer, for each mask, in both passes."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDE, 5.6), layout="constrained", sharey=True)
    figure.set_label(str(tables))
    for axis, (header, *rows) in zip(axes, tables, strict=True):
        for n, peer in enumerate(header[2:]):
            times = np.array([float(row[2 + n]) for row in rows])
            at = np.arange(len(rows)) + 0.28 * (n - 1)
            axis.barh(at, times - 1, 0.26, left=1, color=HUES[n], label=peer.strip("`"))
            for x, y in zip(times, at, strict=True):
                axis.text(max(x, 1) * 1.06, y, f"{x:.1f}", va="center", fontsize=7.5)
        axis.set(title=header[0].split(",")[0], xlim=(0.8, 90))
        times_faster(axis, [1, 3, 10, 30])
    axes[0].set_yticks(range(len(rows)), [row[0] for row in rows])
    axes[0].invert_yaxis()
    above(figure, axes[0])
    return figure


def draw_ordinary_rows(table: list[list[str]]) -> Any:
    """How many times faster than `jax.nn`, for each of the ordinary shapes."""
    header, *rows = table
    figure, axes = plt.subplots(1, 2, figsize=(WIDE, 7.2), layout="constrained", sharey=True)
    figure.set_label(str(table))
    for axis, column in zip(axes, (3, 4), strict=True):
        both = np.array([[float(x) for x in row[column].split("/")] for row in rows])
        for times, name, color in zip(both.T, ("forward", "both passes"), HUES, strict=False):
            axis.plot(times, range(len(rows)), "o", color=color, label=name, markersize=4)
        axis.grid(axis="y", color="#eeeeee")
        axis.set_title(header[column])
        times_faster(axis, [0.5, 1, 2, 4])
    axes[0].set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    above(figure, axes[0])
    return figure


def times_faster(axis: Any, ticks: Sequence[float]) -> None:
    """An axis of ratios, with a line where both are as fast."""
    axis.set(xscale="log", xlabel="times faster")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.tick_params(axis="y", length=0)
    axis.axvline(1, color=DARK, linewidth=0.8)


def above(figure: Any, axis: Any) -> None:
    """The legend of some axes, above all of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)


# --- all of them ----------------------------------------------------------------------------------


def pictures() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The names of the pictures, and what draws them."""
    yield from scores()
    yield "statistics", draw_heads
    made = defined("how_it_works.md", until="\n## What is chosen")
    for draw in (draw_predicate, draw_split, draw_bounds, draw_lists, draw_order):
        yield draw.__name__.removeprefix("draw_"), lambda draw=draw: draw(made)  # type: ignore[misc]
    yield "speed_float32", lambda: draw_long_rows(long_rows("float32"))
    yield "speed_bfloat16", lambda: draw_long_rows(long_rows("bfloat16"))
    yield "speed_ordinary", lambda: draw_ordinary_rows(measured("shape"))


@dataclass(frozen=True)
class Config:
    """The pictures of the guides."""

    out: Path = ROOT / "docs/pictures"  # where they go


def main(config: Config) -> None:
    """Writes all of them."""
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures():
        with plt.rc_context(STYLE):
            figure = draw()
            path = config.out / f"{name}.svg"
            # The label holds the numbers of a measurement, so that a test can compare them.
            metadata = {"Date": None, "Creator": None, "Description": figure.get_label() or None}
            figure.savefig(path, metadata=metadata, facecolor="white")
            plt.close(figure)
        console.print(str(path), soft_wrap=True)
    for path in how_masking_works.figures(config.out):
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

"""How does the mask work in scaled dot-product attention, and why does -1e9 make a key vanish?

    python experiments/how_masking_works.py

Answers step by step, in numbers that the script computes: on the matrices of the tutorial
"Transformer model for language understanding", in every float type, for every way to mask. Writes a
figure for each question under `--out`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import jaxattn as ja
from jaxattn import masks
from jaxattn.masks.conventions import Convention
from jaxattn.shapes import Array, Bool, Float

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

OUT = Path(__file__).parent / "results" / "how_masking_works"

# The tutorial's example: four keys, the last two of them equal, and a query that matches both.
KEY = jnp.array([[10, 0, 0], [0, 10, 0], [0, 0, 10], [0, 0, 10]], jnp.float32)
VALUE = jnp.array([[1, 0], [10, 0], [100, 5], [1000, 6]], jnp.float32)
QUERY = jnp.array([[0, 0, 10]], jnp.float32)
IGNORED = jnp.array([[0, 0, 0, 1]], jnp.float32)  # 1 where a key is ignored, as the tutorial has it

TYPES = jnp.float32, jnp.bfloat16, jnp.float16

# The width of figures, in inches, and the size of their letters, in points: on a phone, where a
# figure is 340 pixels wide, letters of 9 points are 8 pixels high.
WIDE = 5.2
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8}


# --- the ways to mask --------------------------------------------------------------------------


def softmax(logits: Float[Array, "... S"]) -> Float[Array, "... S"]:
    """exp(x - max) / sum exp(x - max), in the dtype of the logits: what libraries compute."""
    e = jnp.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def added(constant: float) -> Callable[..., Any]:
    """softmax(logits + (1 - seen) * constant): the tutorial's way."""

    def weights(logits: Float[Array, "... S"], seen: Bool[Array, "... S"]) -> Any:
        ignored = (~seen).astype(logits.dtype)
        return softmax(logits + ignored * jnp.float32(constant).astype(logits.dtype))

    return weights


def lowest_added(logits: Float[Array, "... S"], seen: Bool[Array, "... S"]) -> Any:
    """softmax(logits + finfo.min where unseen): what Hugging Face models add."""
    bias = jnp.where(seen, 0, jnp.finfo(logits.dtype).min).astype(logits.dtype)
    return softmax(logits + bias)


def infinity_added(logits: Float[Array, "... S"], seen: Bool[Array, "... S"]) -> Any:
    """softmax(logits + -inf where unseen): a float mask of PyTorch's."""
    return softmax(logits + jnp.where(seen, 0, -jnp.inf).astype(logits.dtype))


def replaced(logits: Float[Array, "... S"], seen: Bool[Array, "... S"]) -> Any:
    """softmax(where(seen, logits, finfo.min)): roughly what Flax and jax.nn do."""
    return softmax(jnp.where(seen, logits, jnp.finfo(logits.dtype).min))


def infinite(logits: Float[Array, "... S"], seen: Bool[Array, "... S"]) -> Any:
    """softmax(where(seen, logits, -inf)): a boolean mask of PyTorch's."""
    return softmax(jnp.where(seen, logits, -jnp.inf))


def ours(logits: Float[Array, "... S"], seen: Bool[Array, "... S"]) -> Any:
    """`jaxattn`, with these logits as the products of queries and keys, in their dtype."""
    S = logits.shape[-1]
    rows = logits.reshape(-1, S)
    # A query of S features and keys that are unit vectors have these logits.
    q, k = rows[:, None], jnp.eye(S, dtype=logits.dtype)[:, None]
    found = ja.attention_weights(q, k, mask=seen.reshape(-1, S), scale=1.0)
    return found[0].reshape(logits.shape).astype(logits.dtype)


WAYS: dict[str, Callable[..., Any]] = {
    "add -1e9": added(-1e9),
    "add finfo.min": lowest_added,
    "add -inf": infinity_added,
    "where, finfo.min": replaced,
    "where, -inf": infinite,
    "jaxattn": ours,
}


# --- what is asked ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """Scaled dot-product attention, step by step."""

    logits: np.ndarray
    masked: np.ndarray
    exponentials: np.ndarray
    total: np.ndarray
    weights: np.ndarray
    output: np.ndarray


def step_by_step(constant: float = -1e9) -> Steps:
    """The tutorial's `scaled_dot_product_attention`, with the result of every step."""
    logits = QUERY @ KEY.T / jnp.sqrt(jnp.float32(KEY.shape[-1]))
    masked = logits + IGNORED * constant
    exponentials = jnp.exp(masked - masked.max(-1, keepdims=True))
    total = exponentials.sum(-1, keepdims=True)
    weights = exponentials / total
    steps = logits, masked, exponentials, total, weights, weights @ VALUE
    return Steps(*map(np.asarray, steps))


def thresholds() -> dict[str, tuple[float, float]]:
    """For each type: where `exp` is exactly 0, and where adding it to 1 no longer changes the sum.

    Both are distances below the largest logit, in steps of 1/64.
    """
    distances = np.arange(0, 256, 1 / 64)
    found = {}
    for dtype in TYPES:
        e = jnp.exp(jnp.asarray(-distances, dtype))
        counts = (jnp.ones((), dtype) + e) != 1
        first = [distances[np.argmin(np.asarray(still))] for still in (e != 0, counts)]
        found[jnp.dtype(dtype).name] = float(first[0]), float(first[1])
    return found


def rows_without_keys() -> dict[str, dict[str, np.ndarray]]:
    """The weights of an empty row, for small and for large logits, by each way."""
    small = jnp.array([[1.0, 2.0, 3.0]])
    rows = {"logits 1, 2, 3": small, "logits 100, 200, 300": 100 * small}
    nothing = jnp.zeros((1, 3), bool)
    return {
        name: {way: np.asarray(fn(row, nothing))[0] for way, fn in WAYS.items()}
        for name, row in rows.items()
    }


def in_half_precision() -> dict[str, dict[str, np.ndarray]]:
    """The weights of logits 1, 2, 3, the last one masked, by each way and type."""
    seen = jnp.array([[True, True, False]])
    return {
        jnp.dtype(dtype).name: {
            way: np.asarray(fn(jnp.array([[1, 2, 3]], dtype), seen), np.float32)[0]
            for way, fn in WAYS.items()
        }
        for dtype in TYPES
    }


def gradients() -> dict[str, dict[str, np.ndarray]]:
    """By each way: the gradients of logits and values, where the loss leaves out an empty row.

    There are two queries. The first sees keys 0 and 1, the second sees none. The loss is the output
    of the first.
    """
    seen = jnp.array([[True, True, False], [False, False, False]])
    logits, values = jnp.array([[1.0, 2.0, 3.0]] * 2), jnp.array([1.0, 2.0, 3.0])
    found: dict[str, dict[str, np.ndarray]] = {"logits of 0": {}, "logits of 1": {}, "values": {}}
    for way, fn in WAYS.items():

        def loss(logits: Array, values: Array, fn: Callable[..., Any] = fn) -> Array:
            return (fn(logits, seen) @ values)[0]

        by_logits, by_values = jax.grad(loss, (0, 1))(logits, values)
        for name, row in zip(found, (*by_logits, by_values), strict=True):
            found[name][way] = np.asarray(row)
    return found


@dataclass(frozen=True)
class Spelled:
    """How a library spells the same mask: a query sees itself and the keys before it."""

    library: str
    array: np.ndarray
    read: ja.Mask
    how: str


def conventions() -> list[Spelled]:
    """Causal attention of three tokens in each library's spelling, and how it is read."""
    seen = np.tri(3, dtype=bool)
    lowest = float(jnp.finfo(jnp.float32).min)
    spelled: list[tuple[str, np.ndarray, Convention]] = [
        ("TensorFlow tutorial (look-ahead mask)", 1 - seen.astype(np.float32), "ignore"),
        ("Keras MultiHeadAttention", seen[None], "keras"),
        ("PyTorch scaled_dot_product_attention", seen, "attend"),
        ("PyTorch MultiheadAttention (attn_mask)", ~seen, "ignore"),
        ("Hugging Face, inside a model", np.where(seen, 0, lowest).astype(np.float32), "additive"),
        ("Flax make_causal_mask", np.asarray(nn.make_causal_mask(jnp.ones((1, 3)))), "flax"),
        ("jax.nn.dot_product_attention", seen, "attend"),
    ]
    return [
        Spelled(name, array, masks.from_array(jnp.asarray(array), how), how)
        for name, array, how in spelled
    ]


# --- the answer ---------------------------------------------------------------------------------


def numbers(array: Any) -> str:
    """An array in short numbers, exact where it is 0 or 1."""
    return ", ".join(f"{x:.4g}" for x in np.asarray(array, np.float64).reshape(-1))


def written(array: np.ndarray) -> str:
    """An array as it is written in code."""
    return ", ".join(f"{x}" if array.dtype == bool else f"{x:.4g}" for x in array)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    made = Table(*header, title=title, title_justify="left")
    for row in rows:
        made.add_row(*row)
    return made


def answer(console: Console) -> None:
    """The whole answer, printed."""
    say = console.print
    say("[bold]1. What the mask does[/bold]\n")
    steps, unmasked = step_by_step(), step_by_step(0.0)
    say(
        "Attention gives each key a weight: the share of its value in the output. The query below "
        f"is {numbers(QUERY)}. It matches keys 2 and 3 equally. The mask says: ignore key 3.\n"
    )
    rows = [
        ("logits = q . k / sqrt(d)", unmasked.logits, steps.logits),
        ("+ mask * -1e9", unmasked.masked, steps.masked),
        ("exp(logit - largest)", unmasked.exponentials, steps.exponentials),
        ("their sum", unmasked.total, steps.total),
        ("weights = exp / sum", unmasked.weights, steps.weights),
        ("output = weights . values", unmasked.output, steps.output),
    ]
    header = ("step", "without mask", "with key 3 masked")
    say(table("", header, [(name, numbers(a), numbers(b)) for name, a, b in rows]))
    library, _ = ja.scaled_dot_product_attention(
        QUERY, KEY, VALUE, masks.from_array(IGNORED, "ignore")
    )
    say(
        f"\nThe weight of key 3 went from {numbers(unmasked.weights[0, 3])} to "
        f"{numbers(steps.weights[0, 3])}, and the other keys share it: the weights still sum to "
        f"{numbers(steps.weights.sum())}. The output is what it would be without key 3. "
        f"(jaxattn gives {numbers(library)}.)\n"
    )

    say("[bold]2. Why exactly 0, and not just something small[/bold]\n")
    found = thresholds()
    gap = float(steps.masked[0].max() - steps.masked[0, 3])
    say(
        f"The masked logit is {gap:.4g} below the largest. exp(-{gap:.4g}) is not 0 in "
        "mathematics, but it is too small for any float: it underflows to exactly 0. The distance "
        "at which this happens depends on the type:\n"
    )
    say(
        table(
            "",
            ("type", "exp is 0 from a distance of", "1 + exp is 1 from a distance of"),
            [(name, f"{zero:.4g}", f"{lost:.4g}") for name, (zero, lost) in found.items()],
        )
    )
    distances = np.arange(0, 256, 1 / 64).astype(np.float32)
    subnormal = float(distances[np.argmin(np.exp(-distances) != 0)])
    say(
        f"\n(NumPy in float32 reaches 0 at {subnormal:.4g}: it keeps subnormal numbers, too small "
        "for a full mantissa, which XLA rounds to 0.)\n"
    )
    say(
        "So the number need not be a billion. It has to exceed the spread of the logits by one of "
        "the distances above, and it has to fit into the type. -1e9 has no other purpose.\n"
    )

    say("[bold]3. Where the trick breaks: half precision[/bold]\n")
    half = float(jnp.finfo(jnp.float16).min)
    with np.errstate(over="ignore"):
        overflowed = np.float16(-1e9)
        beyond = np.float16(half) + np.float16(-40)
    with np.errstate(invalid="ignore"):
        nan = np.float16(0) * overflowed
    say(
        f"The lowest float16 is {half:.6g}, so -1e9 is {overflowed} there. At visible pairs it is "
        f"multiplied by 0, which gives {nan}. Weights of logits 1, 2, 3, the last one masked:\n"
    )
    halves = in_half_precision()
    say(
        table(
            "",
            ("way", *halves),
            [(way, *(numbers(halves[name][way]) for name in halves)) for way in WAYS],
        )
    )

    say(
        f"\nAdding the lowest number does not help: {half:.6g} + -40 is {beyond} again, and so is "
        "the sum of two such masks.\n"
    )
    say("[bold]4. A query without any visible key[/bold]\n")
    ulp = float(np.spacing(np.float32(1e9)))
    say(
        "Left padding with a causal mask makes such rows. All logits get the same -1e9. Floats "
        f"near -1e9 are {ulp:.4g} apart: small logits are lost in rounding, large ones are not:\n"
    )
    blind = rows_without_keys()
    say(
        table(
            "",
            ("way", *blind),
            [(way, *(numbers(blind[name][way]) for name in blind)) for way in WAYS],
        )
    )
    say(
        "\nUniform and one-hot weights use masked values, and NaN spoils everything after it. Only "
        "zeros are right: no visible key, no output.\n"
    )

    say("[bold]5. Gradients[/bold]\n")
    slopes = gradients()
    say(
        table(
            "Query 0 sees keys 0 and 1, query 1 sees none, and the loss leaves query 1 out",
            ("way", *(f"d loss / d {name}" for name in slopes)),
            [(way, *(numbers(slopes[name][way]) for name in slopes)) for way in WAYS],
        )
    )
    say(
        "\nA masked pair gets no gradient, whichever way: its weight is a constant 0. But the NaN "
        "of an empty row comes back although its output is not in the loss, because 0 times NaN "
        "is NaN. It reaches the values, which all queries share. With an added -inf it reaches "
        "the logits too, and so every parameter below.\n"
    )

    say("[bold]6. The same mask, as libraries spell it[/bold]\n")
    spelled = conventions()
    say(
        table(
            "",
            ("library", "row of query 1 of 3", "convention for from_array", "sees"),
            [
                (
                    each.library,
                    written(each.array.reshape(-1, 3, 3)[0, 1]),
                    repr(each.how),
                    numbers(each.read.dense(3, 3)[0, 0, 1]),
                )
                for each in spelled
            ],
        )
    )
    alike = all(np.array_equal(e.read.dense(3, 3)[0, 0], np.tri(3, dtype=bool)) for e in spelled)
    say(f"\nAll of them are masks.causal(): {alike}. In jaxattn True means 'may attend'.")


# --- figures ------------------------------------------------------------------------------------


def figures(out: Path) -> list[Path]:
    """One figure for each question."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = {
        "steps.png": draw_steps,
        "underflow.png": draw_underflow,
        "half_precision.png": lambda: draw_ways(in_half_precision(), "weight"),
        "blind_rows.png": lambda: draw_ways(rows_without_keys(), "weight"),
        "gradients.png": lambda: draw_ways(gradients(), "d loss / d ..."),
        "conventions.png": draw_conventions,
    }
    with plt.rc_context(STYLE):
        for name, draw in drawn.items():
            figure = draw()
            figure.savefig(out / name, dpi=140)
            plt.close(figure)
    return [out / name for name in drawn]


def draw_steps() -> Any:
    """Each step of attention, without and with the mask."""
    figure, axes = plt.subplots(1, 3, figsize=(WIDE, 2.4), layout="constrained")
    for axis, name in zip(axes, ("masked", "exponentials", "weights"), strict=True):
        for n, (steps, label) in enumerate(
            ((step_by_step(0.0), "no mask"), (step_by_step(), "key 3 masked"))
        ):
            axis.bar(np.arange(4) + 0.4 * n - 0.2, getattr(steps, name)[0], 0.4, label=label)
        axis.set(title=name, xlabel="key", xticks=range(4))
    axes[0].set_yscale("symlog")
    axes[0].set(title="logits + mask * -1e9", ylim=(-1e10, 1e3), yticks=[-1e9, -1e6, -1e3, 0, 100])
    _legend_below(figure, axes[2], columns=2)
    return figure


def _legend_below(figure: Any, axis: Any, columns: int) -> None:
    """One legend for all axes, where it hides no bar."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def draw_underflow() -> Any:
    """exp of a distance in each type, down to where it is 0."""
    figure, axis = plt.subplots(figsize=(WIDE, 3), layout="constrained")
    distance = jnp.arange(0, 120, 0.25)
    # Each is thinner than the one before it, which it would hide: they have the same values.
    for dtype, width in zip(TYPES, (6, 3.5, 1.5), strict=True):
        e = np.asarray(jnp.exp(-distance.astype(dtype)), np.float64)
        name = jnp.dtype(dtype).name
        alive = e > 0
        (line,) = axis.semilogy(np.asarray(distance)[alive], e[alive], label=name, linewidth=width)
        axis.axvline(
            thresholds()[name][0], color=line.get_color(), linestyle=":", linewidth=width / 2
        )
    axis.set(xlabel="distance below the largest logit", ylabel="exp", title="dotted: 0 from here")
    axis.legend()
    return figure


def draw_ways(found: dict[str, dict[str, np.ndarray]], label: str) -> Any:
    """The results of each way for the same logits; a cross is NaN."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(WIDE, 2.8), layout="constrained", sharey=True
    )
    for axis, (name, ways) in zip(np.ravel(axes), found.items(), strict=True):
        for n, (way, values) in enumerate(ways.items()):
            at = np.arange(len(values)) + 0.14 * (n - 2.5)
            axis.bar(at, np.nan_to_num(values), 0.14, label=way)
            axis.plot(
                at[np.isnan(values)], [0.02] * int(np.isnan(values).sum()), "kx", markersize=4
            )
        axis.set(title=name, xlabel="key", xticks=range(3))
    np.ravel(axes)[0].set_ylabel(f"{label} (x: NaN)")
    _legend_below(figure, np.ravel(axes)[-1], columns=3)
    return figure


def draw_conventions() -> Any:
    """The arrays of the libraries, and the mask that all of them mean."""
    spelled = conventions()
    figure, axes = plt.subplots(4, 2, figsize=(WIDE, 9.2), layout="constrained")
    # Of what is below 0, 0 and above: pale, so that the numbers are read.
    pale = ListedColormap(["#c9ddf2", "#f7f7f7", "#f8d3b8"])
    for axis, each in zip(np.ravel(axes), spelled, strict=False):
        array = each.array.reshape(-1, 3, 3)[0].astype(np.float64)
        axis.imshow(np.sign(array), cmap=pale, vmin=-1, vmax=1)
        for (i, j), x in np.ndenumerate(each.array.reshape(-1, 3, 3)[0]):
            number = f"{x}" if each.array.dtype == bool else f"{x:.2g}"
            axis.text(j, i, number, ha="center", va="center", size=7.5)
        axis.set(title=f'{each.library}\nfrom_array(..., "{each.how}")', xticks=[], yticks=[])
        axis.title.set_fontsize(7.5)
    masks.causal().plot(np.ravel(axes)[-1], T=3)
    return figure


@dataclass(frozen=True)
class Config:
    """How masking works, in numbers."""

    out: Path = OUT  # where the figures go


def main(config: Config) -> None:
    """The answer, then the figures."""
    console = Console(highlight=False, soft_wrap=False)
    answer(console)
    console.print()
    for path in figures(config.out):
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

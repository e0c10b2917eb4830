"""Finds the masks that public libraries really apply, and holds them against the documented ones.

    python experiments/what_models_see.py

Attention layers of JAX's libraries and small random models of transformers run as black boxes:
`ja.testing.visible` finds which outputs depend on which inputs. Then come five layers that are
broken on purpose. Prints a table, and for each disagreement the first cell and the code that shows
it. Writes the table (table.md) and a picture of each disagreement under `--out`. transformers runs
in `.venv-peers` (`make peers` makes it), and is left out without it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import attention_layers
import matplotlib
import numpy as np
import tyro
from attention_layers import CASES
from benchmark import PEERS_PYTHON
from command import command
from contestant import Contestant
from data import DataError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import jaxattn as ja
from jaxattn import masks
from jaxattn.masks.mask import Mask
from jaxattn.shapes import Bool, Float, Int

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt

NAME = "what_models_see.py"
OUT = Path(__file__).parent / "results" / "what_models_see"


@dataclass(frozen=True)
class See:
    """Find the masks of public libraries' attention."""

    out: Path = OUT
    only: str = ""  # libraries and situations that match this regular expression


# ------------------------------------------------------------------------------------ situations


@dataclass(frozen=True)
class Situation:
    """A function under test, and what its documentation promises.

    Attributes:
      library: its name.
      version: its version.
      name: what is called, and how.
      run: from inputs `[B, S, ...]` to outputs `[B, T, ...]`.
      inputs: what it runs on.
      promised: the mask.
      own: whether an output depends on its own input besides, through a query or a residual.
      real: the outputs `[B, T]` about which something is promised; None: all.
      source: code that shows the same.
    """

    library: str
    version: str
    name: str
    run: Any
    inputs: Any
    promised: Mask
    own: bool
    real: Bool[np.ndarray, "B T"] | None
    source: str


def layers() -> Iterator[Situation]:
    """The cases of `attention_layers.py`, of the libraries that are installed."""
    for case in CASES:
        try:
            version = importlib.metadata.version(case.library)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if version or case.library == attention_layers.BROKEN:
            inputs = attention_layers.inputs()
            yield Situation(
                case.library,
                version,
                case.name,
                case.run,
                inputs,
                case.promised,
                case.own,
                None,
                case.source,
            )


# Rows and tokens of the inputs of models.
B, S = 2, 8
CAUSAL, LOCAL = masks.causal(), masks.sliding_window(2)
DECODERS = {
    "bloom": CAUSAL,
    "falcon": CAUSAL,
    "gemma": CAUSAL,
    "gemma2": LOCAL,
    "gemma3_text": LOCAL,
    "gpt2": CAUSAL,
    "gpt_bigcode": CAUSAL,
    "gpt_neo": LOCAL,
    "gpt_neox": CAUSAL,
    "gptj": CAUSAL,
    "llama": CAUSAL,
    "mistral": LOCAL,
    "olmo2": CAUSAL,
    "opt": CAUSAL,
    "phi3": CAUSAL,
    "qwen2": CAUSAL,
    "qwen3": CAUSAL,
    "starcoder2": CAUSAL,
}
ENCODERS = {
    "albert": masks.full(),
    "bert": masks.full(),
    "deberta-v2": masks.full(),
    "distilbert": masks.full(),
    "electra": masks.full(),
    "modernbert": masks.sliding_window(2, 2),
    "mpnet": masks.full(),
    "roberta": masks.full(),
}
BOTH = ("bart", "t5")
# Models without an argument position_ids.
COUNT_THEMSELVES = ("bloom", "opt")


class Models:
    """transformers on PyTorch, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        worker = Path(__file__).with_name("what_models_see_worker.py")
        self.file, self.log = folder / "features.npy", folder / "log"
        self.process = Contestant("transformers", worker, python=PEERS_PYTHON, log=self.log)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request of `what_models_see_worker.py`."""
        answer = self.process.ask(timeout=60, do=do, **request)
        if "error" in answer:
            raise DataError(f"transformers, {do} {request['name']}: {answer['error']}")
        return answer

    def features(
        self, ids: Int[np.ndarray, "B S"], *, name: str, to: str, **arrays: Any
    ) -> Float[np.ndarray, "B T D"]:
        """The last layer's features, with the ids as the argument `to`."""
        given = _plain(arrays) | {to: np.asarray(ids).tolist()}
        self.ask("run", name=name, out=str(self.file), **given)
        return np.load(self.file)

    def situations(self) -> Iterator[Situation]:
        """Every model on whole rows, and with padding; decoders with packed documents too."""
        lengths = np.array([S, S - 3])
        right = np.arange(S) < lengths[:, None]
        left = right[:, ::-1]
        ids = np.array([0, 0, 0, 1, 1, 1, 1, 1])
        places = np.array([0, 1, 2, 0, 1, 2, 3, 4])
        plain: dict[str, tuple[Mask, dict[str, Any], Any]] = {
            "whole rows": (masks.full(), {}, None),
            "padding on the right": (
                masks.key_padding(right),
                {"attention_mask": right.astype(int)},
                right,
            ),
            "padding on the left": (
                masks.key_padding(left),
                {"attention_mask": left.astype(int)},
                left,
            ),
        }
        for name, own in sorted((DECODERS | ENCODERS).items()):
            for what, (more, arrays, real) in plain.items():
                yield self._one(name, what, own & more, "input_ids", arrays, real=real)
            if name in DECODERS and name not in COUNT_THEMSELVES:
                # The cache that calls make by default changes what they see.
                for cache in (True, False):
                    given = {"position_ids": np.tile(places, (B, 1)), "use_cache": cache}
                    what = f"documents by position_ids, use_cache={cache}"
                    yield self._one(name, what, own & masks.segments(ids), "input_ids", given)
        other = _tokens(seed=1)
        for name in BOTH:
            given = {"input_ids": other}
            yield self._one(name, "decoder", masks.causal(), "decoder_input_ids", given)
            given = {"decoder_input_ids": other, "attention_mask": right.astype(int)}
            mask = masks.key_padding(right)
            yield self._one(
                name, "encoder's padding, from the decoder", mask, "input_ids", given, own=False
            )

    def _one(
        self,
        name: str,
        what: str,
        promised: Mask,
        to: str,
        arrays: dict[str, Any],
        *,
        real: Any = None,
        own: bool = True,
    ) -> Situation:
        made = self.ask("build", name=name)
        run = partial(self.features, name=name, to=to, **arrays)
        given = "".join(
            f", {key}={array if isinstance(array, bool) else f'torch.tensor({array})'}"
            for key, array in _plain(arrays).items()
        )
        source = (
            "import torch\n"
            "from transformers import AutoConfig, AutoModel\n"
            f"settings = {made['settings']}\n"
            f"model = AutoModel.from_config(AutoConfig.for_model({name!r}, **settings)).eval()\n"
            f"def see(x): return model({to}=x{given}).last_hidden_state\n"
        )
        inputs = _tokens(seed=0)
        return Situation(
            "transformers",
            made["version"],
            f"{name}, {what}",
            run,
            inputs,
            promised,
            own,
            real,
            source,
        )


def _plain(arrays: dict[str, Any]) -> dict[str, Any]:
    return {key: np.asarray(array).tolist() for key, array in arrays.items()}


def _tokens(seed: int) -> Int[np.ndarray, "B S"]:
    # Ids that no model takes for padding or the end of a text.
    return np.random.default_rng(seed).integers(5, 60, (B, S))


@contextmanager
def transformers(console: Console) -> Iterator[Iterator[Situation]]:
    """The situations of transformers; none without its environment."""
    if not PEERS_PYTHON.exists():
        console.print("transformers is left out: no .venv-peers (make peers makes it)")
        yield iter(())
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder))
        try:
            yield models.situations()
        finally:
            models.process.close()


# --------------------------------------------------------------------------------------- findings


@dataclass(frozen=True)
class Finding:
    """What was found in a situation.

    Attributes:
      situation: which.
      promised, found: on which inputs outputs may depend, and do: `[B, T, S]`.
      wrong: where these differ, in outputs about which something is promised.
      mixed: whether rows of the batch depend on each other.
    """

    situation: Situation
    promised: Bool[np.ndarray, "B T S"]
    found: Bool[np.ndarray, "B T S"]
    wrong: Bool[np.ndarray, "B T S"]
    mixed: bool

    @property
    def agrees(self) -> bool:
        return not self.wrong.any() and not self.mixed

    @property
    def expression(self) -> str:
        """The mask that was found, as an expression of `jaxattn.masks`."""
        described = masks.describe(self.found[:, None])
        return described.expression if described.exact else f"about {described.expression}"

    @property
    def words(self) -> str:
        """What was found, in a line."""
        said = ["rows of the batch depend on each other"] if self.mixed else []
        if self.wrong.any():
            b, q, k = np.argwhere(self.wrong)[0]
            sees = "sees" if self.found[b, q, k] else "does not see"
            said.append(
                f"{self.wrong.sum()} of {self.wrong.size} pairs differ; the first: output {q} of "
                f"row {b} {sees} input {k}"
            )
        return "; ".join(said) or "agrees"


def look(situation: Situation) -> Finding:
    """Finds the mask of a function, and compares it with the promised one."""
    T = np.shape(situation.run(situation.inputs))[1]
    seen = ja.testing.visible(situation.run, situation.inputs, outputs=T)
    found = np.asarray(seen.reach)[:, 0]
    rows, _, S = found.shape
    promised = np.asarray(situation.promised.dense(T, S, batch=rows))[:, 0]
    if situation.own:
        promised = promised | np.eye(T, S, dtype=bool)
    wrong = promised != found
    if situation.real is not None:
        wrong &= situation.real[..., None]
    return Finding(situation, promised, found, wrong, bool(np.asarray(seen.across).any()))


def draw(path: Path, finding: Finding) -> None:
    """The promised mask and the one that was found, in the first row where they differ."""
    b = int(finding.wrong.any((1, 2)).argmax())
    figure, panels = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained")
    pair = {"documented": finding.promised[b], "found": finding.found[b]}
    T, S = pair["found"].shape
    for axis, (title, array) in zip(panels, pair.items(), strict=True):
        masks.dense(array).plot(axis, T, S)
        axis.set_title(title)
    for q, k in np.argwhere(finding.wrong[b]):
        panels[1].plot(k, q, "x", color="tab:red")
    one = finding.situation
    figure.suptitle(f"{one.library} {one.version}, {one.name}, row {b}".replace(" ,", ","))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run_see(config: See, console: Console) -> None:
    """Looks at every situation, and reports."""
    try:
        wanted = re.compile(config.only)
    except re.error as error:
        raise DataError(f"only {config.only!r}: expected a regular expression ({error})") from None
    config.out.mkdir(parents=True, exist_ok=True)
    findings: list[Finding] = []
    with transformers(console) as models, Progress(console=console, transient=True) as bar:
        task = bar.add_task("looking", total=None)
        for situation in (*layers(), *models):
            label = f"{situation.library}, {situation.name}"
            if wanted.search(label):
                bar.update(task, description=label)
                findings.append(look(situation))
    if not findings:
        raise DataError(f"only {config.only!r}: matches no situation")

    columns = ("library", "version", "situation", "documented", "found", "agreement")
    table = Table(*columns)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for finding in findings:
        one = finding.situation
        documented = f"{one.promised}{' and itself' if one.own else ''}"
        cells = (
            one.library, one.version, one.name, documented, finding.expression, finding.words
        )  # fmt: skip
        table.add_row(*map(Text, cells), style=None if finding.agrees else "bold")
        # A bar would end the cell.
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    (config.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(table)
    for finding in findings:
        if not finding.agrees:
            report(finding, config.out, console)
    agree = sum(finding.agrees for finding in findings)
    console.print(f"{agree} of {len(findings)} agree; table.md and pictures are in {config.out}")


def report(finding: Finding, out: Path, console: Console) -> None:
    """A disagreement: what differs, the code that shows it, and its picture."""
    one = finding.situation
    name = re.sub(r"\W+", "_", f"{one.library} {one.name}").strip("_").lower()
    console.print()
    console.print(f"{one.library} {one.version}, {one.name}: {finding.words}", markup=False)
    console.print(one.source, markup=False, highlight=False, soft_wrap=True)
    if finding.wrong.any():
        draw(out / f"{name}.png", finding)
        console.print(str(out / f"{name}.png"), soft_wrap=True)


@command(NAME)
def main(given: list[str]) -> None:
    """Runs what the arguments ask for."""
    run_see(tyro.cli(See, prog=NAME, description=__doc__, args=given), Console())


if __name__ == "__main__":
    sys.exit(main())

"""Tuning with adapters: what learns and what does not, packed rows, answers alone, and the run."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from flax import nnx
from tiny_models import write_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import adapters
import llama
import training
import tune
from adapters import ADAPTERS, PROJECTIONS
from corpus import Pair
from data import DataError

pytestmark = pytest.mark.usefixtures("as_users_run")

PAIRS = [Pair("um", "one", ""), Pair("o gato", "the cat", ""), Pair("12", "twelve", "")]
# Of sums of float32 products, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_llama(path)
    return path


@pytest.fixture
def loaded(file: Path) -> llama.Loaded:
    return llama.load(file)


def learn(model: llama.Llama) -> None:
    """Numbers in the adapters, as after training."""
    learnt = nnx.state(model, ADAPTERS)
    for i, (_, variable) in enumerate(nnx.to_flat_state(learnt)):
        variable[...] = jnp.asarray(rng(95, i).normal(size=variable.shape) / 8, jnp.float32)
    nnx.update(model, learnt)


def logits(model: llama.Llama, tokens: Any) -> np.ndarray:
    return np.asarray(nnx.jit(llama.Llama.__call__)(model, jnp.asarray(tokens)))


# -------------------------------------------------------------------------------------- adapters


def test_adapters_change_nothing_before_they_learn(loaded: llama.Loaded) -> None:
    tokens = rng(96).integers(0, 200, (2, 9))
    before = logits(loaded.model, tokens)
    adapters.adapt(loaded.model, PROJECTIONS, 4, 2.0, 0)
    np.testing.assert_array_equal(logits(loaded.model, tokens), before)


@pytest.mark.parametrize("names", [("query", "value"), PROJECTIONS], ids=len)
def test_merged_weights_are_the_adapters(loaded: llama.Loaded, names: tuple[str, ...]) -> None:
    tokens = rng(96).integers(0, 200, (2, 9))
    before = logits(loaded.model, tokens)
    adapters.adapt(loaded.model, names, 4, 0.5, 0)
    learn(loaded.model)
    with_adapters = logits(loaded.model, tokens)
    assert np.abs(with_adapters - before).max() > 0.05
    adapters.merge(loaded.model)
    assert not jax.tree.leaves(nnx.state(loaded.model, ADAPTERS))
    np.testing.assert_allclose(logits(loaded.model, tokens), with_adapters, **CLOSE)


def test_adapters_come_back_from_their_file(
    loaded: llama.Loaded, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adapters.safetensors"
    adapters.adapt(loaded.model, ("query", "mlp_out"), 4, 2.0, 0)
    learn(loaded.model)
    saved = nnx.state(loaded.model, ADAPTERS)
    adapters.save(path, saved)

    def read(names: tuple[str, ...], rank: int) -> nnx.State:
        model = llama.load(file).model
        adapters.adapt(model, names, rank, 2.0, 1)
        found = nnx.state(model, ADAPTERS)
        adapters.load(path, found)
        return found

    jax.tree.map(np.testing.assert_array_equal, read(("query", "mlp_out"), 4), saved)
    with pytest.raises(DataError, match=r"has shape \[64, 4\], expected \[64, 3\]"):
        read(("query", "mlp_out"), 3)
    with pytest.raises(DataError, match=r"no tensor 'blocks.0.attention.value.down.kernel'"):
        read(("value",), 4)
    with pytest.raises(DataError, match=r"4 tensors have no place in the model: blocks.0.mlp_out"):
        read(("query",), 4)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        read(("query", "mlp_out"), 4)
    path.unlink()
    with pytest.raises(DataError, match="No such file or directory; train first: make tune"):
        read(("query", "mlp_out"), 4)


def test_projections_that_there_are_not() -> None:
    with pytest.raises(DataError, match="no projection gate; there are query, key, value, out, "):
        adapters.check(("query", "gate"))


# -------------------------------------------------------------------------- packing and the loss


def test_examples_are_questions_answers_and_an_end(loaded: llama.Loaded) -> None:
    (example,) = tune.encode(loaded, PAIRS[1:2])
    text = loaded.tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)
    answer = loaded.tokenizer.decode(
        example.tokens[example.answer :].tolist(), skip_special_tokens=False
    )
    assert text.endswith("Translate to English: o gato<|im_end|>\n<|im_start|>assistant\n" + answer)
    assert answer == "the cat<|im_end|>"
    assert example.tokens[: example.answer].tolist() == tune.prompts(loaded, ["o gato"])[0]


def packed(examples: list[tune.Example], rows: list[list[int]], length: int) -> tune.Batch:
    """Rows of the examples of those numbers, after what they share."""
    prefix = tune.shared(examples)
    short = [e.after(len(prefix)) for e in examples]
    return tune.batch_of([[short[i] for i in row] for row in rows], prefix, length, 40)


def test_targets_are_the_tokens_of_answers(loaded: llama.Loaded) -> None:
    batch = packed(tune.encode(loaded, PAIRS), [[0, 2], [1]], 256)
    tokens = np.asarray(batch.targets)[np.asarray(batch.counted)].tolist()
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text == "one<|im_end|>twelve<|im_end|>the cat<|im_end|>"
    at = np.asarray(batch.where)[np.asarray(batch.counted)] + 1
    assert np.asarray(batch.tokens).ravel()[at].tolist() == tokens


def split(model: llama.Llama) -> tuple[Any, Any, Any]:
    return nnx.split(model, ADAPTERS, ...)


def test_packed_rows_are_their_documents(loaded: llama.Loaded) -> None:
    """Loss and gradient are the sums of those of the texts alone, from logits of all tokens."""
    examples = tune.encode(loaded, PAIRS)
    adapters.adapt(loaded.model, ("query", "value", "mlp_in"), 4, 2.0, 0)
    learn(loaded.model)
    graph, learnt, frozen = split(loaded.model)

    @jax.jit
    def alone(learnt: Any, tokens: Any, counted: Any) -> Any:
        def loss(learnt: Any) -> Any:
            scores = nnx.merge(graph, learnt, frozen)(tokens[None, :-1])[0]
            likely = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[1:, None], 1)[:, 0]
            return -jnp.sum(likely * counted[1:])

        return jax.value_and_grad(loss)(learnt)

    @jax.jit
    def together(learnt: Any, batch: tune.Batch) -> Any:
        def loss(learnt: Any) -> Any:
            return tune.loss_of(nnx.merge(graph, learnt, frozen), batch)

        return jax.value_and_grad(loss, has_aux=True)(learnt)

    total, gradient = 0.0, jax.tree.map(jnp.zeros_like, learnt)
    longest = max(map(len, examples))
    for example in examples:
        padding = 0, longest - len(example)  # after the text, so that it is not seen
        counted = np.pad(np.arange(len(example)) >= example.answer, padding)
        given = jnp.asarray(np.pad(example.tokens, padding)), jnp.asarray(counted)
        loss, more = alone(learnt, *given)
        total, gradient = total + loss, jax.tree.map(jnp.add, gradient, more)
    (found, count), grads = together(learnt, packed(examples, [[0, 2], [1]], 256))
    assert count == sum(len(e) - e.answer for e in examples)
    np.testing.assert_allclose(found, total, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, gradient
    )


def test_only_adapters_learn(loaded: llama.Loaded) -> None:
    """All that is differentiated and has Adam's moments is `down` and `up`."""
    adapters.adapt(loaded.model, ("query", "value"), 4, 2.0, 0)
    _, learnt, frozen = split(loaded.model)
    places = [place[-3:-1] for place, _ in nnx.to_flat_state(learnt)]
    names = [(name, part) for name in ("query", "value") for part in ("down", "up")]
    assert sorted(places) == sorted(names * 2)
    others = [place for place, _ in nnx.to_flat_state(frozen)]
    assert not any({"down", "up"} & set(place) for place in others)
    assert sum("base" in place for place in others) == 4


# ------------------------------------------------------------------------------------- the run

SIZES = ["--rank=2", "--length=256", "--rows=2", "--steps=3", "--pairs=8", "--test=5"]


def test_a_run_stops_goes_on_and_is_used(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Ctrl-C saves, --resume ends with the same bits, and `translate` takes the adapters."""
    stop, file = [], tmp_path / "tiny.gguf"
    write_llama(file, layers=1)

    class Stopping(training.Report):
        def update(self, row: Any) -> None:
            super().update(row)
            if stop and row["step"] == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "Report", Stopping)

    def run(name: str, *more: str) -> int:
        return tune.main(
            ["--model", str(file), "--out", str(tmp_path / name), *SIZES, "--save-every=2", *more]
        )

    assert run("whole") == 0
    assert "chrF" in capsys.readouterr().out
    stop.append(True)
    assert run("parts") == 130
    assert "stopped after 2 steps" in capsys.readouterr().out
    assert run("parts", "--resume", "--rank", "3") == 2
    assert "cannot resume with other settings: --rank was 2" in capsys.readouterr().err
    assert tune.main(["--config", str(tmp_path / "parts/config.json"), "--resume"]) == 0
    ends = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    assert (tmp_path / "parts" / "metrics.csv").stat().st_size > 0
    capsys.readouterr()
    assert tune.main(["translate", "um", "o gato", "--run", str(tmp_path / "parts")]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--adapt", "gate", "--test", "5"], "no projection gate; there are query, key, "),
        (["--length", "32", "--test", "5"], "no example fits into 32 tokens; give a larger"),
        (["translate"], "nothing to translate; give sentences"),
        (["translate", "um", "--run", "nowhere"], "nowhere/config.json: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_line_and_status_2(
    arguments: list[str], says: str, file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(file), "--out", "run", "--pairs", "8"]
    assert (
        tune.main(arguments if arguments[0] in ("translate", "--model") else given + arguments) == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tune.py: ")
    assert says in line

"""The language model's parts: packing, its loss, sampling from caches, and a run of a few steps."""

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

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import decoder
import language_model
import packing
import training

pytestmark = pytest.mark.usefixtures("as_users_run")


def documents(count: int, longest: int) -> list[np.ndarray]:
    make = rng(71, count)
    return [
        make.integers(2, 30, make.integers(2, longest + 1)).astype(np.int32) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    return decoder.Decoder(30, 16, 3, 4, 2, 24, window=3, full_every=3, rngs=nnx.Rngs(0))


def test_rows_hold_whole_documents() -> None:
    given = documents(40, 9)
    found = []
    for batch in packing.filled(given, 3, 16):
        assert len(batch) == 3
        packed = packing.pack(batch, 16)
        for row, held in enumerate(batch):
            for n, document in enumerate(held):
                here = packed.ids[row] == n
                np.testing.assert_array_equal(packed.tokens[row, here], document)
                np.testing.assert_array_equal(packed.places[row, here], np.arange(len(document)))
            assert (packed.ids[row] < len(held)).all()
        found += [document for held in batch for document in held]
        rows = packing.padded(batch, 4)
        assert len(rows) % 4 == 0
        assert sum(map(len, rows)) == sum(map(len, batch))
    assert [d.tolist() for d in found] == [d.tolist() for d in given]
    shuffled = [
        d for b in packing.filled(given, 2, 16, np.random.default_rng(0)) for r in b for d in r
    ]
    # What is left over of an epoch may not fill a batch.
    assert 30 < len(shuffled) <= 40


def test_packed_documents_do_not_feel_each_other(model: Any) -> None:
    """Loss and gradients of packed rows are those of each document in a row of its own."""
    batch = next(iter(packing.filled(documents(40, 9), 2, 16)))
    graph, params = nnx.split(model)

    def run(rows: Any) -> Any:
        given = language_model.arrays(packing.pack(rows, 16))

        def loss(params: Any) -> Any:
            total, count = decoder.loss_of(nnx.merge(graph, params), *given)
            return total, count

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (packed, count), slopes = run(batch)
    (alone, same), others = run(packing.padded(batch, 1))
    assert count == same == sum(len(d) - 1 for row in batch for d in row)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), slopes, others)


def test_sampling_from_caches_is_that_of_the_whole(model: Any) -> None:
    """Windows roll over prompt and sample; the likeliest token is that without any cache."""
    prompt = jnp.asarray(rng(73).integers(2, 30, (2, 5)), jnp.int32)
    caches = model.caches(2, 5 + 9, 5)
    assert [cache.window for cache in caches] == [3, 3, None]
    found = nnx.jit(decoder.sample, static_argnums=(2, 3))(model, prompt, 9, 0.0, jax.random.key(0))
    text = np.concatenate([prompt, found], 1)
    logits = nnx.jit(lambda m, t: m(t))(model, jnp.asarray(text))
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, 4:-1], found)
    warm = nnx.jit(decoder.sample, static_argnums=(2, 3))(model, prompt, 9, 5.0, jax.random.key(1))
    assert (np.asarray(warm) != found).any()


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    words = rng(79).integers(0, 20, 3000)
    text = "\n".join(f"def f{i}(a{i % 7}):\n    return a{i % 7} + {i % 5}" for i in words[:200])
    (tmp_path / "a.py").write_text(text)
    return ["--text", str(tmp_path / "a.py")]


SIZES = ["--vocabulary", "300", "--length", "32", "--rows", "4", "--d-model", "16", "--layers", "2",
         "--d-ff", "16", "--steps", "6", "--save-every", "2"]  # fmt: skip


def test_a_run_stops_goes_on_and_is_used(
    tmp_path: Path, texts: list[str], monkeypatch: Any, capsys: Any
) -> None:
    """Ctrl-C saves, --resume ends with the same bits, and `sample` continues a text."""
    stop = []

    class Stopping(training.Report):
        def update(self, row: Any) -> None:
            super().update(row)
            if stop and row["step"] == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "Report", Stopping)

    def run(name: str, *more: str) -> int:
        return language_model.main(["--out", str(tmp_path / name), *texts, *SIZES, *more])

    assert run("whole") == 0
    assert "bits per byte" in capsys.readouterr().out
    stop.append(True)
    assert run("parts") == 130
    assert "stopped after 2 steps" in capsys.readouterr().out
    assert language_model.main(["--config", str(tmp_path / "parts/config.json"), "--resume"]) == 0
    ends = [(tmp_path / name / "model/params.msgpack").read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    for name in ("loss.png", "metrics.csv"):
        assert (tmp_path / "parts" / name).stat().st_size > 0
    capsys.readouterr()
    model = ["--model", str(tmp_path / "parts/model"), "--tokens", "9"]
    assert language_model.main(["sample", "def f", *model]) == 0
    assert capsys.readouterr().out.startswith("def f")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "missing.txt"], "missing.txt: no such file"),
        (["--config", "nowhere.json"], "nowhere.json: no such file; train first"),
        (["sample"], "nothing to continue; give texts"),
        (["sample", "def", "--model", "nowhere"], "nowhere/config.json: no such file; train first"),
        (["--text", "one.txt"], "too little text"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("one")
    assert language_model.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"language_model.py: {says}")
    assert err.count("\n") == 1


def test_the_context_of_one_row(monkeypatch: Any) -> None:
    found = language_model.measure(128, 16, "auto")
    assert found["length"] == 128
    assert found["seconds"] > 0
    assert found["peak"] > 2**20


def test_the_library_is_found_and_cut_into_definitions() -> None:
    files = packing.standard_library()
    assert any(path.name == "textwrap.py" for path in files)
    assert not any("test" in path.parts for path in files)
    texts = packing.read([path for path in files if path.name in ("textwrap.py", "bisect.py")])
    assert any(text.startswith("def wrap(") for text in texts.train + texts.test)

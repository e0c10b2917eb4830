"""What models see: each case of the libraries that are installed, and the report."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import attention_layers
import what_models_see as see
from attention_layers import BROKEN, CASES

# Modules of the packages whose names differ.
MODULES = {"dm-haiku": "haiku"}


@pytest.fixture(autouse=True)
def as_scripts_run(own_errors: None) -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def installed(case: attention_layers.Case) -> bool:
    if case.library == BROKEN:
        return True
    return importlib.util.find_spec(MODULES.get(case.library, case.library)) is not None


@pytest.mark.parametrize(
    "situation", [pytest.param(s, id=f"{s.library}, {s.name}") for s in see.layers()]
)
def test_what_is_documented_is_found_but_for_what_is_known(situation: see.Situation) -> None:
    found = see.look(situation)
    # A softmax over logits that are all the same large negative number is even: the query sees all.
    known = situation.library == BROKEN or "sees no key" in situation.name
    if situation.name == "nnx, decoding with a cache, is_causal" and not found.agrees:
        # Flax 0.12.8: the one query of a step is the first of a causal mask. 0.12.12 is right.
        sees = found.found & ~np.eye(6, dtype=bool)
        assert sees[:, 1:, 0].all()
        assert not sees[..., 1:].any()
        return
    assert found.agrees != known, found.words
    if "sees no key" in situation.name:
        wrong = found.wrong.any((0, 2))
        assert np.flatnonzero(wrong).tolist() == [2]
        assert found.found[:, 2].all()


def test_a_model_that_mixes_rows_is_said_to() -> None:
    (one,) = [s for s in see.layers() if "over the batch" in s.name]
    found = see.look(one)
    assert found.mixed
    assert "rows of the batch depend on each other" in found.words


def test_only_real_outputs_are_held_against_the_mask() -> None:
    (one,) = [s for s in see.layers() if "-5" in s.name]
    real = np.tile(np.arange(6) < 2, (2, 1))
    found = see.look(replace(one, real=real))
    assert not found.wrong[:, 2:].any()
    assert found.wrong[1, :2].any()


def test_the_code_of_a_case_shows_the_same_alone() -> None:
    for case in CASES:
        if installed(case) and case.library in (BROKEN, "jax"):
            names = dict(vars(attention_layers))
            exec(case.source, names)
            run = names[case.run.__name__]
            again = run(attention_layers.inputs())
            np.testing.assert_array_equal(again, case.run(attention_layers.inputs()))
            assert case.source.count("\n") < 10


def test_the_report_names_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(see, "PEERS_PYTHON", tmp_path / "missing")
    assert see.main(["--only", "next token|jax, is_causal$", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "transformers is left out" in shown
    assert "1 of 2 agree" in shown
    assert "np.tri(S, k=1, dtype=bool)" in shown
    table = (tmp_path / "table.md").read_text()
    assert f"| jax | {jax.__version__} | is_causal | causal() | causal() | agrees |" in table
    assert "| causal() | causal(1) | 10 of 72 pairs differ" in table
    assert "the first: output 0 of row 0 sees input 1" in table
    picture = "broken_on_purpose_the_causal_mask_shows_the_next_token.png"
    assert (tmp_path / picture).stat().st_size > 1000


@pytest.mark.parametrize(
    ("only", "words"),
    [("nothing like this", "matches no situation"), ("(", "expected a regular expression")],
)
def test_what_cannot_be_looked_at_is_one_line(
    only: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(see, "PEERS_PYTHON", tmp_path / "missing")
    assert see.main(["--only", only, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1

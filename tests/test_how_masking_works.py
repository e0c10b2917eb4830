"""The answer in numbers, and the gallery: what they say is so."""

from __future__ import annotations

import inspect
import io
import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import gallery
import how_masking_works as how

import jaxattn as ja

pytestmark = pytest.mark.usefixtures("as_users_run")


def test_step_by_step() -> None:
    """Each step follows from the one before, and the masked key is gone, exactly."""
    steps = how.step_by_step()
    np.testing.assert_allclose(steps.logits[0], [0, 0, 100 / 3**0.5, 100 / 3**0.5], rtol=1e-6)
    assert steps.weights[0, 3] == 0
    np.testing.assert_allclose(steps.weights.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(steps.output, [[100, 5]], rtol=1e-6)
    unmasked = how.step_by_step(0.0)
    np.testing.assert_allclose(unmasked.output, [[550, 5.5]], rtol=1e-6)


def test_thresholds_are_where_exp_ends() -> None:
    for name, (zero, unfelt) in how.thresholds().items():
        dtype = jnp.dtype(name)
        step = 1 / 64
        assert jnp.exp(jnp.asarray(-zero, dtype)) == 0
        assert jnp.exp(jnp.asarray(-zero + 8 * step, dtype)) > 0
        # Half an ulp of 1 is felt no longer.
        half = float(jnp.finfo(dtype).eps) / 2
        assert abs(unfelt - -np.log(half)) < 0.1
        assert unfelt < zero


def test_what_blind_rows_become() -> None:
    found = how.rows_without_keys()
    small, large = found.values()
    for way in ("add -1e9", "add finfo.min", "where, finfo.min"):
        np.testing.assert_allclose(small[way], 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(large["add -1e9"], [0, 0, 1])
    for rows in found.values():
        assert np.isnan(rows["where, -inf"]).all()
        assert np.isnan(rows["add -inf"]).all()
        np.testing.assert_array_equal(rows["jaxattn"], 0)


def test_half_precision_and_gradients() -> None:
    halves = how.in_half_precision()
    assert np.isnan(halves["float16"]["add -1e9"]).all()
    for name, ways in halves.items():
        want = np.exp([1, 2]) / np.exp([1, 2]).sum()
        np.testing.assert_allclose(ways["jaxattn"][:2], want, atol=jnp.finfo(name).eps)
        assert ways["jaxattn"][2] == 0
    seeing, blind, values = how.gradients().values()
    for way, gradient in seeing.items():
        assert gradient[2] == 0, way
        np.testing.assert_allclose(gradient, seeing["jaxattn"], atol=1e-6)
    assert {way for way, g in blind.items() if np.isnan(g).any()} == {"add -inf"}
    assert {way for way, g in values.items() if np.isnan(g).any()} == {"add -inf", "where, -inf"}


def test_all_libraries_mean_the_same() -> None:
    for each in how.conventions():
        np.testing.assert_array_equal(each.read.dense(3, 3)[0, 0], np.tri(3, dtype=bool))


def test_the_answer_is_printed_and_drawn(tmp_path: Path) -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    how.answer(console)
    text = console.export_text()
    assert "nan" in text
    assert "All of them are masks.causal(): True" in text
    for path in how.figures(tmp_path):
        assert matplotlib.image.imread(path).std() > 0.01, path


def test_the_gallery_has_every_mask() -> None:
    constructors = {
        name
        for name in ja.masks.__all__
        if inspect.isfunction(made := getattr(ja.masks, name))
        and inspect.signature(made).return_annotation in ("Mask", ja.Mask)
    }
    assert set(gallery.GALLERY) == constructors


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.deep), 6])
def test_the_gallery_is_drawn(every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = dict(list(gallery.GALLERY.items())[::every])
    monkeypatch.setattr(gallery, "GALLERY", shown)
    gallery.main(gallery.Config(tmp_path / "g.png", tmp_path / "g.html", 16))
    assert matplotlib.image.imread(tmp_path / "g.png").std() > 0.1
    page = (tmp_path / "g.html").read_text()
    for entry in gallery.GALLERY.values():
        assert entry.make(16).dense(16, 16).shape == (1, 1, 16, 16)
    assert "Masks of jaxattn" in page


def test_every_picture_of_the_gallery_names_its_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: gallery.GALLERY[name] for name in ("full", "causal")}
    monkeypatch.setattr(gallery, "GALLERY", few)
    figure = gallery.draw(16)
    drawn = figure.axes[: len(few)]
    assert all(axis.get_ylabel() == "query" for axis in drawn)
    assert all(axis.get_xlabel().splitlines()[0] == "key" for axis in drawn)
    assert all(list(axis.get_xticks()) == list(axis.get_yticks()) == [0, 15] for axis in drawn)
    plt.close(figure)


def test_the_readme_shows_the_gallery() -> None:
    root = Path(__file__).parents[1]
    assert "(experiments/gallery.png)" in (root / "README.md").read_text()
    assert matplotlib.image.imread(root / "experiments" / "gallery.png").shape[0] > 500

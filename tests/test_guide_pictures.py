"""The pictures of the guides: they are drawn, and show what stands in the tables."""

from __future__ import annotations

import html
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxattn as ja

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import guide_pictures

ROOT = Path(ja.__file__).parent.parent
pytestmark = pytest.mark.usefixtures("as_users_run")
PICTURES = ROOT / "docs/pictures"


@cache
def drawings() -> dict[str, Any]:
    return dict(guide_pictures.pictures())


def test_the_pictures_of_the_guides_are_those_that_are_drawn() -> None:
    assert {path.stem for path in PICTURES.glob("*.svg")} == set(drawings())
    shown = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for name in drawings():
        assert f"](pictures/{name}.svg)" in shown, f"{name} is on no page"


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.deep), 5])
def test_pictures_are_drawn(every: int) -> None:
    for name in list(drawings())[::every]:
        figure = drawings()[name]()
        figure.canvas.draw()
        assert np.asarray(figure.canvas.buffer_rgba())[..., :3].std() > 5, name
        guide_pictures.plt.close(figure)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("speed_float32", lambda: guide_pictures.long_rows("float32")),
        ("speed_bfloat16", lambda: guide_pictures.long_rows("bfloat16")),
        ("speed_ordinary", lambda: guide_pictures.measured("shape")),
    ],
)
def test_pictures_of_speed_show_the_measured_numbers(name: str, numbers: Any) -> None:
    drawn = html.unescape((PICTURES / f"{name}.svg").read_text())
    assert f"<dc:description>{numbers()}<" in drawn, "`make pictures` draws it anew"


def test_the_loop_in_the_picture_is_exact() -> None:
    made = guide_pictures.defined("how_it_works.md", until="\n## What is chosen")
    logits, values = guide_pictures.row_of(made, 44)
    *_, last = guide_pictures.online(made, 44, [5, 3, 4])
    np.testing.assert_allclose(last, jax.nn.softmax(logits) @ values, rtol=1e-5)

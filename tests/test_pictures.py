"""Pictures by matplotlib and in HTML: they show what the mask says, for every mask."""

from __future__ import annotations

import sys
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from cases import MASKS, everyday

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import jaxattn as ja
from jaxattn import masks
from jaxattn.tiles.tile_map import EMPTY, FULL, PARTIAL
from jaxattn.views.cells import COLORS

B, N, T = 2, 2, 6
IDS = jnp.asarray([0, 0, 0, 1, 1, 1])
PACKED = masks.causal() & masks.segments(IDS)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def image(ax: Any, n: int = 0) -> np.ndarray:
    return np.asarray(ax.images[n].get_array())


def of(name: str) -> Any:
    """A case's mask as a `Mask`, whatever it was given as."""
    return ja.tile_map(MASKS[name](B, N, T, T).mask, (B, T, N, 1), (B, T, N, 1)).mask


SOME = ("causal", "window_per_head", "padding_left", "per_head", "segments_packed", "empty")


@pytest.mark.parametrize("name", everyday(SOME))
def test_a_plot_is_the_mask(name: str) -> None:
    mask = of(name)
    want = np.asarray(mask.dense(T, T, batch=B, heads=N))[1, 1]
    _, own = plt.subplots()
    ax = mask.plot(own, T, T, b=1, h=1)
    assert ax is own
    np.testing.assert_array_equal(image(ax), np.where(want, FULL, EMPTY))
    assert f"{int(want.sum())} of {T * T} pairs" in ax.get_xlabel()
    ax.figure.canvas.draw()


def test_a_composed_mask_is_its_parts_and_the_whole() -> None:
    third = masks.sliding_window(1)
    ax = (PACKED & third).plot()
    panels = ax.figure.axes
    assert [panel.get_title() for panel in panels] == [
        "causal()", "& segments(int32[6], int32[6])", "& sliding_window(1, 0)",
        "causal() & segments(int32[6], int32[6]) & sli…",
    ]  # fmt: skip
    whole = np.min([image(panel) for panel in panels[:-1]], axis=0)
    np.testing.assert_array_equal(image(ax), whole)
    assert [len((masks.causal() | third).plot(T=4).figure.axes)] == [3]
    both = (~masks.causal()).plot(T=4).figure.axes
    assert both[0].get_title() == "~ causal()"
    np.testing.assert_array_equal(image(both[0]) == FULL, image(both[1]) == EMPTY)
    # Of per_head, the parts of the head that is shown.
    heads = masks.per_head([masks.causal(), PACKED])
    assert len(heads.plot(T=T, h=0).figure.axes) == 1
    assert len(heads.plot(T=T, h=1).figure.axes) == 3


def test_large_plots_are_of_tiles() -> None:
    """Sound, of bounded size, and never T x S: an array of these sizes would be 16 GiB."""
    window = masks.sliding_window(9000)
    ax = window.plot(T=131072)
    states = image(ax)
    assert states.shape == (128, 128)
    want = np.asarray(ja.tile_map(window, (1, 131072, 1, 1), (1, 131072, 1, 1), tile=1024).states)
    np.testing.assert_array_equal(states, want[0, 0])
    assert "a cell is 1024 by 1024" in ax.get_xlabel()
    assert ax.get_xlim() == (-0.5, 131071.5)
    # A last cell that sticks out is cut off where the positions end.
    ax = masks.causal().plot(T=1000, S=300)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 299.5), (999.5, -0.5))


def test_tiles_are_drawn_over_the_mask() -> None:
    mask = masks.causal() & masks.sliding_window(12)
    tiles = ja.tile_map(mask, (1, 40, 1, 1), (1, 40, 1, 1), tile=8)
    states = np.asarray(tiles.states)[0, 0]
    for given in (8, (8, 8), tiles):
        ax = mask.plot(T=40, tiles=given)
        colors = [matplotlib.colors.to_hex(p.get_facecolor()) for p in ax.patches[::2]]
        assert colors == [COLORS[int(state)] for state in states.reshape(-1)]
        told = [text.get_text() for text in ax.get_legend().get_texts()]
        assert told == [
            f"{(states == state).sum()} {name}"
            for state, name in ((FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty"))
        ]
    lengths = jnp.asarray([0, 40])
    ax = masks.key_padding(lengths=lengths).plot(T=40, b=1, tiles=20)
    assert ax.get_legend().get_texts()[0].get_text() == "4 full"


def test_weights_are_drawn_on_what_is_seen() -> None:
    q = jax.random.normal(jax.random.key(0), (B, T, N, 4))
    weights = ja.attention_weights(q, q, mask=PACKED)
    for given in (weights, weights[1], weights[1, 1]):
        ax = PACKED.plot(weights=given, b=1, h=1)
        drawn = ax.images[1].get_array()
        np.testing.assert_array_equal(~drawn.mask, np.asarray(PACKED.dense(T, T))[0, 0])
        np.testing.assert_allclose(drawn.filled(0), weights[1, 1])


def titles(page: str) -> list[list[str]]:
    """What the cells of each figure say."""
    root = ElementTree.fromstring(page)
    figures = root.findall("figure")
    tag = "{http://www.w3.org/2000/svg}title"
    return [[title.text or "" for title in figure.iter(tag)] for figure in figures]


@pytest.mark.parametrize("name", everyday(SOME, 2, 1))
def test_every_cell_of_a_page_says_why(name: str) -> None:
    mask = of(name)
    page = mask.html(T, T, b=1, h=1)
    said = titles(page)[-1]
    assert said == [str(mask.why(q, k, 1, 1)) for q in range(T) for k in range(T)]
    dense = np.asarray(mask.dense(T, T, batch=B, heads=N))[1, 1]
    assert [" may see " in words.splitlines()[0] for words in said] == dense.reshape(-1).tolist()
    assert page.count(COLORS[FULL]) >= dense.sum()


def test_pages() -> None:
    """Parts side by side, words for tokens, large masks by tiles, and what a notebook calls."""
    words = ["<s>", "the", "cat", "&", "sat", "."]
    page = PACKED.html(labels=(words, words))
    assert [len(cells) for cells in titles(page)] == [36, 36, 36]
    assert "&lt;s&gt;" in page
    assert "<script" not in page
    assert page == page._repr_html_()
    large = masks.sliding_window(9000).html(131072)
    (said,) = titles(large)
    assert len(said) == 64 * 64
    assert said[0] == "queries 0 to 2047, keys 0 to 2047: some may be seen"
    assert said[64 * 8] == "queries 16384 to 18431, keys 0 to 2047: none may be seen"
    assert masks.causal()._repr_html_() == masks.causal().html()
    shown = []
    jax.jit(lambda n: shown.append(masks.prefix_lm(n)._repr_html_()))(3)
    assert shown == [None]


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: masks.causal().plot(T=0), r"plot\(T\): got 0, expected an integer >= 1"),
        (lambda: masks.causal().html(3, -1), r"html\(S\): got -1"),
        (lambda: masks.causal().plot(T=3, labels=(["a"], ["b"])), r"plot\(labels\): got 1 for the queries, expected 3"),
        (lambda: masks.causal().html(3, labels=(["a"] * 3, ["b"])), r"html\(labels\): got 1 for the keys, expected 3"),
        (lambda: masks.causal().plot(T=3, weights=np.ones((2, 3))), r"plot\(weights\): got shape \[2, 3\], expected \[T, S\] = \[3, 3\]"),
        (lambda: masks.causal().plot(T=3, tiles=ja.tile_map(masks.causal(), (1, 4, 1, 1), (1, 4, 1, 1))), r"plot\(tiles\): got a TileMap of 4 queries and 4 keys, expected 3 and 3"),
        (lambda: masks.segments(jnp.arange(5)).plot(T=4), "got extent 5 along axis 0, which is read at `q`"),
    ],
    ids=range(7),
)  # fmt: skip
def test_errors(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_without_matplotlib(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "jaxattn\[plot\]".*mask.show\(\)'):
        masks.causal().plot()

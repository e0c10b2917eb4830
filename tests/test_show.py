"""Pictures in text, and why: they say what the mask says, for every mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MASKS, everyday, rng

import jaxattn as ja
from jaxattn import masks
from jaxattn.views import diff
from jaxattn.views.text import text
from jaxattn.views.why import why

B, N, T = 2, 2, 6


def verdicts(line: str) -> bool | None:
    return True if " allows it" in line else False if " forbids it" in line else None


@pytest.mark.parametrize("name", everyday(MASKS, 3))
def test_why_is_what_the_mask_says(name: str) -> None:
    """For every mask: the verdict is the mask's, and every part has one with its reasons."""
    mask = ja.tile_map(MASKS[name](B, N, T, T).mask, (B, T, N, 1), (B, T, N, 1)).mask
    given = MASKS[name](B, N, T, T).mask
    dense = np.asarray(mask.dense(T, T, batch=B, heads=N))
    for b, h, q, k in rng(83, len(name)).integers(0, [B, N, T, T], (4, 4)):
        found = why(given, int(q), int(k), int(b), int(h))
        assert found.allowed == bool(found) == dense[b, h, q, k], str(found)
        first, *parts = found.lines
        assert first == (
            f"query {q} {'may' if found.allowed else 'may not'} see key {k} (row {b}, head {h})"
        )
        assert any(verdicts(line) is not None for line in parts)


def test_why_walks_the_algebra() -> None:
    """Words and numbers, for built-in masks and for any function, from what was compared."""
    ids = jnp.asarray([0, 0, 1, 1, 1, 2, 2, 2])
    mask = (masks.causal() & masks.segments(ids)) | ~masks.key_padding(lengths=jnp.asarray([8]))
    assert str(mask.why(q=5, k=4)).splitlines() == [
        "query 5 may not see key 4 (row 0, head 0)",
        "  one is enough:",
        "    causal allows it: q >= k: 5 >= 4",
        "    segments forbids it: q_ids[5] == k_ids[4]: 2 == 1 is false",
        "    the opposite of:",
        "      key_padding allows it: k < lengths[0]: 4 < 8",
    ]
    near = why(lambda b, h, q, k: (q - k < 2) & (ids[q] == ids[k]), 3, 7)
    assert "the function forbids it" in str(near)
    assert "1 == 2 is false" in str(near)
    window = masks.sliding_window(2).why(q=7, k=3)
    assert window.lines[1] == "  sliding_window forbids it: q - k <= left: 4 <= 2 is false"
    heads = masks.per_head([masks.causal(), masks.full()])
    assert heads.why(3, 7, h=1).lines[1:] == (
        "  head 1 has its own:", "    full allows it",
    )  # fmt: skip
    assert "there are 2 heads" in str(heads.why(3, 7, h=2))
    assert masks.dense(jnp.eye(4, dtype=bool)).why(1, 2).lines[1] == (
        "  dense forbids it: array[1, 2] is false"
    )


def cells(picture: str, tall: int) -> np.ndarray:
    """The cells of a picture: every other character of its last lines."""
    return np.array([list(line)[1::2] for line in picture.splitlines()[-tall:]])


@pytest.mark.parametrize("name", ["causal", "window_per_head", "padding_left", "per_head", "empty"])
def test_small_pictures_are_the_mask(name: str) -> None:
    mask = ja.tile_map(MASKS[name](B, N, T, T).mask, (B, T, N, 1), (B, T, N, 1)).mask
    picture = text(mask, T, T, b=1, h=1, color=False)
    want = np.asarray(mask.dense(T, T, batch=B, heads=N))[1, 1]
    np.testing.assert_array_equal(cells(picture, T), np.where(want, "█", "·"))
    assert f"{int(want.sum())} of {T * T} pairs" in picture
    assert "row 1, head 1" in picture


def test_large_pictures_are_sound() -> None:
    """Full cells are full and empty ones empty; what bounds can tell apart is told apart."""
    mask = masks.causal() & masks.sliding_window(40)
    T, S = 130, 201
    picture = cells(text(mask, T, S, color=False), 26)
    assert picture.shape == (26, 51)
    tiles = np.zeros((26 * 5, 51 * 4), bool)
    tiles[:T, :S] = np.asarray(mask.dense(T, S))[0, 0]
    tiles = tiles.reshape(26, 5, 51, 4).swapaxes(1, 2)
    some = tiles.any((2, 3))
    np.testing.assert_array_equal(picture == "·", ~some)
    assert tiles[picture == "█"].any((1, 2)).all()
    assert (picture == "█").sum() > 20
    assert "a cell is 5 by 4" in text(mask, T, S)


def test_labels_sizes_and_colors(capsys: Any, monkeypatch: Any) -> None:
    words = ["the", "cat", "sat"]
    (masks.causal()).show(3, labels=(words, words))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "     t c s",
        "     h a a",
        "     e t t",
        "the ██ · ·",
        "cat ████ ·",
        "sat ██████",
    ]
    masks.segments(jnp.arange(5)).show()
    assert "5 queries, 5 keys: 5 of 25" in capsys.readouterr().out
    masks.causal().show()
    assert "16 queries, 16 keys" in capsys.readouterr().out
    assert "\x1b[32m██\x1b[0m" in text(masks.full(), 2, color=True)
    assert "\x1b" not in text(masks.full(), 2)


@pytest.mark.parametrize(
    ("mask", "size"),
    [
        (masks.causal(), 16),
        (masks.sliding_window(4), 16),
        (masks.sliding_window(256), 1024),
        (masks.causal() & masks.chunked(128), 512),
        (masks.per_head([masks.full(), masks.prefix_lm(jnp.asarray([20, 30]))]), 120),
        (masks.block_sparse(jnp.eye(8, dtype=bool), 32), 256),
        (masks.predicate(lambda b, h, q, k: q // 32 == k // 32), 128),
        (masks.sliding_window(2**30), 16),
        (masks.sliding_window(256) & masks.segments(jnp.arange(5)), 5),
        (ja.tile_map(masks.causal(), (1, 24, 1, 1), (1, 24, 1, 1)), 24),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_size_is_found_that_shows_the_shape(mask: Any, size: int) -> None:
    """Of arrays their own; else so many tokens that what the mask's numbers say is to be seen."""
    assert f"{size} queries, {size} keys" in text(mask, color=False)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("show", lambda mask, **at: mask.show(T, **at)),
        ("plot", lambda mask, **at: mask.plot(T=T, **at)),
        ("html", lambda mask, **at: mask.html(T, **at)),
        ("diff", lambda mask, **at: masks.diff(mask, masks.empty(), T, **at)),
    ],
)
def test_rows_and_heads_have_one_spelling(name: str, look: Any) -> None:
    """`b` and `h`, as in a predicate, in every viewer; whatever else is refused, not ignored."""
    mask = masks.key_padding(lengths=jnp.asarray([0, 3])) & masks.sliding_window(jnp.arange(2))
    look(mask, b=1, h=1)
    for other, ours in (("row", "b="), ("head", "h=")):
        with pytest.raises(
            TypeError, match=rf"^{name}\(\) got an unexpected .*'{other}'; here it is {ours}"
        ):
            look(mask, **{other: 1})
    with pytest.raises(
        TypeError, match=rf"^{name}\(\) got an unexpected .*'colour'; here it is color="
    ):
        look(mask, colour=True)
    for at in ("b", "h"):
        with pytest.raises(ValueError, match=rf"^{name}\({at}\): got 2, expected less than 2, the"):
            look(mask, **{at: 2})
        with pytest.raises(ValueError, match=rf"^{name}\({at}\): got -1, expected an integer >= 0"):
            look(mask, **{at: -1})
        with pytest.raises(TypeError, match=rf"^{name}\({at}\): got 1.0, expected an integer"):
            look(mask, **{at: 1.0})


def test_differences_are_of_one_row_and_head() -> None:
    lengths = masks.key_padding(lengths=jnp.asarray([4, 3]))
    assert masks.diff(lengths, masks.full(), 4).same
    assert masks.diff(lengths, masks.full(), 4, b=1).first == (0, 3)
    heads = masks.per_head([masks.full(), masks.causal()])
    assert masks.diff(heads, masks.causal(), 4, h=1).same
    assert masks.diff(heads, masks.causal(), 4).first == (0, 1)


@pytest.mark.parametrize("seed", range(6))
def test_differences(seed: int) -> None:
    """Found exactly where there are any, in small masks and in downsampled ones."""
    make = rng(89, seed)
    T, S = [(5, 7), (64, 64), (90, 70)][seed % 3]
    a = make.random((T, S)) < 0.5
    b = a.copy()
    for q, k in make.integers(0, [T, S], (seed // 3 * 3, 2)):
        b[q, k] ^= True
    found = masks.diff(jnp.asarray(a), jnp.asarray(b), T, S, color=False)
    assert found.same == (not found) == bool((a == b).all())
    if found.same:
        assert found.first is None
        assert str(found) == f"the same {a.sum()} of {T * S} pairs"
        return
    assert found.first == tuple(np.argwhere(a != b)[0])
    assert f"{(a != b).sum()} of {T * S} pairs differ" in str(found)
    kind = "first" if a[found.first] else "second"
    assert f"which only the {kind} mask allows" in str(found)
    assert any(sign in str(found) for sign in "+-±")


def test_differences_of_large_masks(monkeypatch: Any) -> None:
    """Above the bound: by bounds, then tile by tile; the first pair is the first."""
    monkeypatch.setattr(diff, "_COMPARED", 2**10)
    window = masks.sliding_window(20)
    assert masks.diff(window, masks.causal() & window, 300).same
    # Bounds can't tell these: the same, written with an operation that has none.
    odd = masks.predicate(
        lambda b, h, q, k: jnp.bitwise_count(q ^ k).astype(jnp.int32) * 0 + q >= k
    )
    assert masks.diff(masks.causal(), odd, 100).same
    holes = masks.predicate(lambda b, h, q, k: ((q == 250) & (k == 245)) | ((q == 251) & (k < 240)))
    found = masks.diff(window, window & ~holes, 300)
    assert found.first == (250, 245)
    assert "which only the first mask allows" in str(found)
    assert "±" in str(found)


@pytest.mark.usefixtures("own_errors")
@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: masks.causal().why(1.5, 2), TypeError, r"why\(q\): got 1.5, expected an integer"),
        (lambda: masks.causal().why(1, True), TypeError, r"why\(k\): got True"),
        (lambda: masks.causal().why(1, -2), ValueError, r"why\(k\): got -2, expected a position"),
        (lambda: jax.jit(lambda n: bool(masks.prefix_lm(n).why(1, 2)))(3), TypeError, r"why\(mask\).*traced"),
        (lambda: masks.causal().show(0), ValueError, r"show\(T\): got 0"),
        (lambda: masks.causal().show(2, labels=(["a"], ["b", "c"])), ValueError, r"show\(labels\): got 1 for the queries, expected 2"),
        (lambda: masks.segments(jnp.arange(5)).show(4), ValueError, "got extent 5 along axis 0, which is read at `q`"),
        (lambda: masks.diff(masks.causal(), jnp.ones((4, 4)), 4), TypeError, "mask: got an array of float32"),
    ],
    ids=range(8),
)  # fmt: skip
def test_errors(call: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        call()

"""The explorer's cells, tiles, reasons and code are those of the library."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn.views.why import Asked

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import explorer
import gallery
import javascript

pytestmark = pytest.mark.usefixtures("own_errors")

T = 16
CHOICES = [(name, choice) for name, part in explorer.PARTS.items() for choice in part.choices]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """JavaScript without a browser, with the page's formulas: `engine("1 + 1")` is 2."""
    reason = "install mini-racer, which is JavaScript's engine V8 in a wheel"
    racer = pytest.importorskip("py_mini_racer", reason=reason)
    with racer.MiniRacer() as context:
        context.eval(explorer.formula())
        yield lambda code: json.loads(context.eval(f"JSON.stringify({code})"))


def node(name: str, choice: str | None = None, *p: Any, no: bool = False) -> dict[str, Any]:
    """A mask of a state; by default as the page begins with it."""
    part = explorer.PARTS[name]
    starts = [parameter.start for parameter in part.parameters]
    chosen = part.choices[0] if choice is None else choice
    return {"not": no, "name": name, "choice": chosen, "p": list(p) or starts}


def group(op: str, *of: dict[str, Any], no: bool = False) -> dict[str, Any]:
    return {"not": no, "op": op, "of": list(of)}


CAUSAL, WINDOW, SEGMENTS = node("causal"), node("sliding_window", "", 2, 1), node("segments")
SMALL = node("key_padding", no=True)
# Each with the Python expression that means it.
COMPOSITIONS = {
    "and": group("&", CAUSAL, SEGMENTS, WINDOW),
    "or": group("|", WINDOW, node("global_tokens"), SMALL),
    "xor": group("^", CAUSAL, WINDOW, node("dilated")),
    "not": group("|", CAUSAL, SEGMENTS, no=True),
    "nested": group("&", group("|", CAUSAL, group("^", SEGMENTS, WINDOW)), SMALL),
    "not in not": group("&", group("&", node("full", no=True), no=True), CAUSAL),
    "alone": group("&", group("|", group("^", SEGMENTS))),
}


def python(code: str) -> ja.Mask:
    """The mask that a printed line means to a user."""
    mask: ja.Mask = eval(code, {"jax": jax, "jnp": jnp, "masks": ja.masks})
    return mask


def tokens_of(name: str, choice: str) -> int:
    """A number of tokens that the mask serves."""
    found = javascript.program(*explorer.traced(explorer.PARTS[name], choice))
    extents = [
        np.shape(leaf)[0] for leaf in jax.tree.leaves(python_of(name, choice)) if np.ndim(leaf)
    ]
    return found["tokens"] or (max(extents, default=T) if found["reads"] else T)


def python_of(name: str, choice: str) -> ja.Mask:
    part = explorer.PARTS[name]
    return part.build(choice, *(jnp.asarray(each.start) for each in part.parameters))


def same(engine: Any, state: dict[str, Any], size: int, stride: int = 3) -> None:
    """Cells, tiles, and the reasons of some cells are those of the mask that the code means."""
    said = json.dumps(state)
    mask = python(engine(f"code({said})"))
    assert engine(f"refused({said}, {size}, {size})") is None
    dense = np.asarray(mask.dense(size, size)[0, 0])
    found = engine(f"Array.from(cells({said}, {size}, {size}))")
    np.testing.assert_array_equal(np.reshape(found, (size, size)), dense)
    exact = ja.tile_map(mask, (size, 1, 8), (size, 1, 8), tile=4, exact=True)
    kinds = engine(f"tiles(cells({said}, {size}, {size}), {size}, {size}, 4)")
    names = np.array(["EMPTY", "PARTIAL", "FULL"])
    assert kinds == names[np.asarray(exact.states).ravel()].tolist()
    asked = Asked(mask, np.arange(0, size, stride), np.arange(0, size, stride), 0, 0)
    steps = range(0, size, stride)
    expected = [str(asked.why(i, j)) for i in range(len(steps)) for j in range(len(steps))]
    pairs = [[q, k] for q in steps for k in steps]
    assert engine(f"{pairs}.map(([q, k]) => why({said}, q, k))") == expected


@pytest.mark.parametrize(("name", "choice"), CHOICES, ids=lambda each: each[:24])
def test_a_mask_is_what_its_code_says(engine: Any, name: str, choice: str) -> None:
    size = tokens_of(name, choice)
    same(engine, node(name, choice), size, stride=3 if size == T else 13)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_is_what_its_code_says(engine: Any, name: str) -> None:
    same(engine, COMPOSITIONS[name], T)


@pytest.mark.parametrize(
    "state",
    [
        node("causal(offset)", "", -3),
        node("causal(offset)", "", 2**31 - 1),
        node("sliding_window", "", 0, 5),
        node("segments", "", [3, 3, -1, 3]),
        node("shared_prefix", "", 2, [0, 0, 1, 1, 2, 2]),
        node("chunked", "", 5),
        node("block_diffusion", "", 5, 3),
        node("global_tokens(flags)", "", [False, True, False]),
        node("block_sparse", "jnp.eye(8, dtype=bool)", 3),
    ],
    ids=lambda state: state["name"],
)
def test_parameters_are_numbers_of_the_program(engine: Any, state: dict[str, Any]) -> None:
    lists = [len(value) for value in state["p"] if isinstance(value, list)]
    same(engine, state, *lists or [T])


def test_every_mask_of_the_gallery_is_translated(engine: Any) -> None:
    for name, entry in gallery.GALLERY.items():
        mask = entry.make(T)
        code = javascript.program(mask, [None] * len(jax.tree.leaves(mask)))
        leaves = [leaf[0] for leaf in code["leaves"]]
        asked = f"""((program, leaves) => Array.from({{length: {T * T}}}, (_, i) =>
          Number(run(program, leaves, Math.floor(i / {T}), i % {T})[program.out])))
          ({json.dumps(code)}, {json.dumps(leaves)})"""
        found = np.reshape(engine(asked), (T, T))
        np.testing.assert_array_equal(found, mask.dense(T, T)[0, 0], err_msg=name)


def test_the_page_offers_every_mask_of_the_gallery() -> None:
    offered = {name.partition("(")[0] for name in explorer.PARTS}
    missing = set(gallery.GALLERY) - offered - set(explorer.LEFT_OUT)
    assert not missing, f"add to PARTS of experiments/explorer.py, or to LEFT_OUT: {missing}"
    assert offered <= set(gallery.GALLERY)
    assert not offered.intersection(explorer.LEFT_OUT)


def test_an_operation_without_a_translation_is_named() -> None:
    mask = ja.masks.predicate(lambda b, h, q, k: jax.lax.population_count(q) > k)
    with pytest.raises(NotImplementedError, match="the function: got the operation population_cou"):
        javascript.program(mask, [])


def test_a_mask_that_the_library_refuses_is_refused(engine: Any) -> None:
    for name, sizes in {
        "segments": (T, 8), "key_padding(valid)": (T, 8), "neighborhood": (8, T), "tree": (8, 8),
        "spans": (8, T), "dense": (T, 20), "global_tokens(flags)": (8, 8),
    }.items():  # fmt: skip
        state = json.dumps(group("&", CAUSAL, node(name)))
        assert engine(f"refused({state}, {sizes[0]}, {sizes[1]}).tokens") == T, name
        with pytest.raises(ValueError, match="expected"):
            python(engine(f"code({state})")).dense(*sizes)


def link(engine: Any, state: dict[str, Any]) -> Any:
    return engine(f"fromLink(toLink({json.dumps(state)}))")


def test_a_link_holds_the_state(engine: Any) -> None:
    assert link(engine, engine("start()")) == engine("start()")
    for root in COMPOSITIONS.values():
        state = {"T": 20, "S": 128, "tile": 3, "q": 19, "k": 127, "root": root}
        assert link(engine, state) == state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"T": 0}, "T: got 0"),
        ({"S": "16"}, 'S: got "16"'),
        ({"tile": None}, "tile: got null"),
        ({"root": CAUSAL}, "no group"),
        ({"root": group("+", CAUSAL)}, "operator"),
        ({"root": group("&")}, "empty group"),
        ({"root": group("&", CAUSAL | {"name": "toString"})}, "the mask toString"),
        ({"root": group("&", CAUSAL | {"name": 3})}, "the mask 3"),
        ({"root": group("&", CAUSAL | {"choice": "x"})}, "choice"),
        ({"root": group("&", CAUSAL | {"p": [1]})}, "parameters of causal"),
        ({"root": group("&", node("causal(offset)", "", 1.5))}, "offset: got 1.5"),
        ({"root": group("&", node("chunked", "", 0))}, "size: got 0"),
        ({"root": group("&", node("segments", "", 3))}, "ids: expected"),
        ({"root": group("&", node("segments", "", [[1]]))}, "ids: got"),
        ({"root": group("&", None)}, "the mask undefined"),
        ({"root": group("&", *[CAUSAL] * 40)}, "too many"),
    ],
    ids=str,
)
def test_a_broken_link_says_what_is_wrong(engine: Any, change: dict[str, Any], said: str) -> None:
    state = engine("start()") | change
    caught = f"""(() => {{ try {{ fromLink(toLink({json.dumps(state)})); return ""; }}
      catch (error) {{ return error.message; }} }})()"""
    assert said in engine(caught)


def test_keys_move_the_cell(engine: Any) -> None:
    state = {"T": 16, "S": 8, "tile": 4, "q": 3, "k": 7}
    cases = {
        "ArrowUp": (2, 7), "ArrowDown": (4, 7), "ArrowLeft": (3, 6), "ArrowRight": (3, 7),
        "PageUp": (0, 7), "PageDown": (7, 7), "Home": (3, 0), "End": (3, 7),
    }  # fmt: skip
    for key, (q, k) in cases.items():
        assert engine(f"moved({json.dumps(state)}, {json.dumps(key)})") == {"q": q, "k": k}
    assert engine(f"moved({json.dumps(state)}, 'Tab')") is None


def test_what_is_typed_is_read(engine: Any) -> None:
    assert engine("parse({name: 'ids', start: [0]}, ' 1,2  -3')") == [1, 2, -3]
    assert engine("parse({name: 'flags', start: [true]}, '1 0 1')") == [True, False, True]
    assert engine("unparse([true, false])") == "1, 0"
    for parameter, text in (("start: 1, least: 1", "0"), ("start: 1, least: 0", " "),
                            ("start: [0]", "a"), ("start: [true]", "2"), ("start: [0]", "")):  # fmt: skip
        caught = f"(() => {{ try {{ parse({{name: 'x', {parameter}}}, {text!r}); }} catch {{ return 1; }} }})()"
        assert engine(caught) == 1


def test_the_page_is_one_small_file() -> None:
    page = explorer.page()
    assert not re.findall(r"https?:|//[\w.]+\.\w|<link|<img|\bsrc=|@import|url\(|\bfetch\b", page)
    assert not re.findall(r"/\*(STYLE|FORMULA|PAGE)\*/", page)
    assert len(page.encode()) < 150_000


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    reason = "install playwright, and Chromium (Debian: chromium)"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as started:
        paths = [
            *map(shutil.which, ("chromium", "google-chrome")),
            started.chromium.executable_path,
        ]
        found = next((path for path in paths if path and Path(path).exists()), None)
        if found is None:
            pytest.skip(reason)
        # Containers run as root, and have little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = started.chromium.launch(executable_path=found, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page, opened from a file without network; its errors fail the test."""
    path = tmp_path / "gallery.html"
    path.write_text(explorer.page(), encoding="utf-8")
    context = browser.new_context(viewport={"width": 390, "height": 800}, offline=True)
    opened, errors = context.new_page(), []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text))
    opened.goto(path.as_uri())
    yield opened
    context.close()
    assert not errors


def test_the_page_is_used(page: Any) -> None:
    """By keyboard: a mask is added and changed, a cell is asked, and a reload shows the same."""
    page.focus("#m-add")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "m-add"
    page.get_by_label("left", exact=True).fill("2")
    page.focus("#cells")
    for key in ("End", "PageDown", "ArrowLeft"):
        page.keyboard.press(key)
    mask = python(page.inner_text("#code"))
    assert mask == ja.masks.causal() & ja.masks.sliding_window(2, 0)
    assert page.inner_text("#why") == str(mask.why(7, 14))
    dense = np.asarray(mask.dense(T, T)[0, 0])
    assert f"{100 * dense.mean():.1f}%" in page.inner_text("#sum")
    page.wait_for_function("location.hash.length > 1")
    page.reload()
    assert page.inner_text("#why") == str(mask.why(7, 14))
    assert python(page.inner_text("#code")) == mask


def test_the_picture_shows_the_cells(page: Any) -> None:
    read = f"""() => {{
      const canvas = document.getElementById("cells"), pen = canvas.getContext("2d");
      const side = canvas.width / {T}, colors = [];
      const {{data, width}} = pen.getImageData(0, 0, canvas.width, canvas.height);
      for (let q = 0; q < {T}; q++) for (let k = 0; k < {T}; k++) {{
        const at = 4 * (Math.floor((q + .4) * side) * width + Math.floor((k + .4) * side));
        colors.push(data.slice(at, at + 3).join());
      }}
      return colors;
    }}"""
    colors = np.reshape(page.evaluate(read), (T, T))
    causal = np.tri(T, dtype=bool)
    assert not set(colors[causal]) & set(colors[~causal])
    full = np.kron(np.tri(T // 4, k=-1, dtype=bool), np.ones((4, 4), bool))
    assert len(set(colors[full])) == 1
    assert not set(colors[full]) & set(colors[causal & ~full])


def test_every_mask_of_the_page_can_be_chosen(page: Any) -> None:
    for name in explorer.PARTS:
        page.select_option("#m\\.0-name", name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        assert page.inner_text("#why"), name
    page.select_option("#m\\.0-name", "segments")
    page.fill("#T", "20")
    assert "got 16 entries for 20 queries" in page.inner_text("#sum")
    assert not page.inner_text("#why")
    page.fill("#T", "0")
    assert "queries: got 0, expected" in page.inner_text("#sum")
    page.fill("#T", "20")
    page.click("#fit")
    assert page.input_value("#T") == page.input_value("#S") == "16"
    assert page.inner_text("#why")


def test_a_broken_link_shows_the_first_mask(page: Any) -> None:
    page.evaluate("location.hash = '%7B%22T%22%3A0%7D'")
    page.wait_for_selector("#message:visible")
    assert "T: got 0" in page.inner_text("#message")
    assert page.inner_text("#code") == "masks.causal()"


def test_everything_has_a_name_and_can_be_focused(page: Any) -> None:
    page.click("#m-group")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, canvas, [role]")]
          .filter((each) => !(each.labels?.length || each.textContent.trim()
            || each.ariaLabel || each.id === "message" || each.role === "status" || each.hidden))
          .map((each) => each.outerHTML)"""
    )
    assert not unnamed
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))

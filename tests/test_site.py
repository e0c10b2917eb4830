"""The site: built without warnings, its links lead somewhere, and it answers what people ask."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import jaxattn as ja

pytest.importorskip("furo", reason="Sphinx and its theme, of the extra `docs`, are not installed")
bs4 = pytest.importorskip("bs4", reason="Beautiful Soup, of the extra `docs`, is not installed")

ROOT = Path(ja.__file__).parent.parent
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, without running the guides: `test_guides_run` does that."""
    out = tmp_path_factory.mktemp("site")
    page = out / "extra/explorer.html"
    page.parent.mkdir()
    page.write_text("<html></html>")  # stands for the page that `make gallery` writes
    settings = {"nb_execution_mode": "off", "explorer_page": page, "html_extra_path": page.parent}
    options = [word for name, value in settings.items() for word in ("-D", f"{name}={value}")]
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *options,
         "-d", str(out / "pages"), str(ROOT / "docs"), str(out / "html")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Any]:
    """Each page, parsed."""
    return {
        path.stem: bs4.BeautifulSoup(path.read_text(), "html.parser")
        for path in site.glob("*.html")
    }


# --- what is there --------------------------------------------------------------------------------


def test_every_page_has_a_place_in_the_order_of_reading(pages: dict[str, Any]) -> None:
    """Sphinx warns of pages without one; the side bar shows the order, and llms.txt says it."""
    shown = [a["href"] for a in pages["index"].select(".sidebar-tree a.reference")]
    assert sorted(shown) == sorted(f"{name}.html" for name in PAGES if name != "index")


def internal_links(pages: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The page, the file and the anchor of each link that stays on the site."""
    for name, page in pages.items():
        for tag, attribute in (("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")):
            for each in page.find_all(tag, attrs={attribute: True}):
                parts = urlsplit(each[attribute])
                if not parts.scheme:
                    yield name, unquote(parts.path), unquote(parts.fragment)


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[str, Any]) -> None:
    seen = 0
    anchors = {n: {tag["id"] for tag in p.find_all(id=True)} for n, p in pages.items()}
    for name, path, anchor in internal_links(pages):
        assert not path.startswith("/"), f"{name}: {path} does not open from the file system"
        target = site / path if path else site / f"{name}.html"
        assert target.exists(), f"{name}: {path}"
        if anchor and target.suffix == ".html" and target.stem in anchors:
            assert anchor in anchors[target.stem], f"{name}: {path}#{anchor}"
        seen += 1
    assert seen > 1000


def test_every_picture_has_a_text(pages: dict[str, Any]) -> None:
    found = [(name, image) for name, page in pages.items() for image in page.select("article img")]
    assert len(found) > 5
    for name, image in found:
        assert len(image.get("alt", "")) > 20, f"{name}: {image}"


def test_pages_ask_the_network_for_nothing(pages: dict[str, Any]) -> None:
    for name, page in pages.items():
        loaded = [tag["src"] for tag in page.find_all(["script", "img"], src=True)]
        loaded += [tag["href"] for tag in page.find_all("link", rel="stylesheet")]
        assert not [each for each in loaded if urlsplit(each).scheme], name


def test_the_reference_has_every_public_name(pages: dict[str, Any]) -> None:
    entries = {tag["id"] for tag in pages["reference"].select("dt[id]")}
    for module in (ja, ja.masks, ja.scores, ja.stats, ja.parallel, ja.testing, ja.nn):
        for name in module.__all__:
            thing = getattr(module, name)
            # Types stand once, under the name by which users import them.
            home = "jaxattn" if inspect.isclass(thing) and name in ja.__all__ else module.__name__
            assert not callable(thing) or f"{home}.{name}" in entries, f"{home}.{name}"
    text = pages["reference"].get_text()
    assert "query: Float[*B, T, N, H]" in text
    assert "[ArrayLike" not in text
    assert "Args:" not in text


def test_copies_in_markdown_stand_beside_the_pages(site: Path) -> None:
    for name in PAGES:
        copy = (site / f"{name}.html.md").read_text()
        assert copy.startswith("# "), name
        assert "{toctree}" not in copy, name
        assert "{include}" not in copy, name
        prose = re.sub(r"^(`{3,}).*?^\1$", "", copy, flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#:\s]+)[)#]", prose):
            assert (site / target).exists(), f"{name}: {target}"
    assert "### jaxattn.masks.causal\n" in (site / "reference.html.md").read_text()
    overview = (site / "llms.txt").read_text()
    assert overview.startswith("# jaxattn\n\n> ")
    links = re.findall(r"\]\(([^)]+)\)", overview)
    assert sorted(links) == sorted(f"{name}.html.md" for name in PAGES if name != "index")


def test_the_site_is_small(site: Path) -> None:
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 30e6


def test_what_is_promised_is_tested() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs/promised.md").read_text())
    assert len(named) > 25
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


# --- what people ask ------------------------------------------------------------------------------

# From Stack Overflow, and from the issues of other libraries: the page, the heading under which it is
# answered, and words of the answer.
QUESTIONS = {
    "Why does adding -1e9 make a token disappear?": (
        "how_masking_works", "Why exactly 0?", "It underflows to 0"),
    "Should I use -inf, -1e9 or finfo.min?": (
        "how_masking_works", "What about -inf, and where?", "jnp.where(seen, logits, -inf)"),
    "Why is my attention NaN in float16?": (
        "how_masking_works", "In float16", "-1e9 becomes -inf, and mask * -inf is NaN"),
    "Why is a row that is fully masked NaN, or uniform?": (
        "how_masking_works", "A query that sees no key", "the weights are uniform"),
    "Why are gradients NaN though the loss ignores padding?": (
        "how_masking_works", "Gradients", "the chain rule multiplies its 0 by the NaN"),
    "Does a boolean True mean keep or ignore?": (
        "pitfalls", "The table", "True means “may attend”"),
    "How do I convert a mask of PyTorch?": (
        "coming_from", "PyTorch", 'masks.from_array(array, "ignore")'),
    "What is the attention_mask of a tokenizer here?": (
        "coming_from", "Hugging Face", 'masks.from_array(array, "hf")'),
    "How do I pass use_causal_mask and masks of Keras?": (
        "coming_from", "Keras", 'masks.from_array(array, "keras")'),
    "What is FlexAttention's mask_mod here?": (
        "coming_from", "FlexAttention", "the same function, with jnp for torch"),
    "How do I mask padding in a batch?": ("padding", "Padding", "masks.key_padding(lengths="),
    "Why do results change with the padded length?": (
        "padding", "Padding", "results change with the length to which a batch is padded"),
    "How do I keep packed sequences apart?": ("padding", "Packing", "masks.segments(ids)"),
    "Do positions restart in packed sequences?": (
        "padding", "Packing", "begin again in every document"),
    "How do I combine a causal mask with a padding mask?": (
        "masks", "Arrays in masks", "key_padding"),
    "Is a window of W tokens W or W - 1 to the left?": (
        "windows", "A window of the past", "is sliding_window(W - 1)"),
    "How do I keep attention sinks with a sliding window?": (
        "windows", "Windows that differ by head, with sinks", "| (lambda b, h, q, k: k < 2)"),
    "How do I write a prefix LM mask?": (
        "prefixes", "A prefix that sees itself", "masks.prefix_lm("),
    "How do image tokens see each other within causal text?": (
        "prefixes", "Images within text", "masks.causal() | masks.spans(image)"),
    "Why does my causal mask break with a KV cache?": (
        "positions", "Positions", "The query is taken to be the first token"),
    "Top-left or bottom-right causal alignment?": ("positions", "Positions", "causal(S - T)"),
    "Do I need to repeat keys for grouped queries?": (
        "grouped", "Grouped queries", "passes them as they are"),
    "Why is decoding compiled again for every token?": (
        "decoding", "A cache", "KVCache.create(batch=2, capacity=32"),
    "How do I decode with left padding?": (
        "decoding", "Padded prompts", "Turn prompts with padding before them first"),
    "How do I mask a tree of drafts?": ("trees", "Drafts", "masks.tree(parents, start=6)"),
    "How do I score many answers to one prompt?": (
        "trees", "Answers to one prompt", "masks.shared_prefix(3, answer)"),
    "Can I get attention weights out of fused attention?": (
        "statistics", "From the question to the call", "stats.mass("),
    "How do I add ALiBi or a relative bias to fused attention?": (
        "scores", "Scores", "relative_bias("),
    "Why is it compiled again for each length?": (
        "debugging", "From the symptom to the call", "pass lengths and windows as arrays"),
    "How do I see which tokens my model really attends to?": (
        "debugging", "What does this model really see?", "ja.testing.visible(model, x)"),
    "Why may this query not see that key?": (
        "debugging", "From the question to the call", "mask.why(q=51, k=49)"),
    "Which backend runs, and why is it not faster?": ("debugging", "Slow", "ja.explain(q, q, q"),
    "How do I train on a sequence longer than one device holds?": (
        "parallel", "Inside shard_map", "parallel.attention(q, k, v, axis="),
    "How do I use it in Flax's own modules?": (
        "flax", "Flax’s own modules", "attention_fn=ja.nn.attention_fn()"),
    "How do I pass a mask through nn.scan?": ("flax", "Scanned layers", "nn.broadcast"),
    "Does a checkpoint of Flax's attention load?": (
        "flax", "Checkpoints", "names and shapes are the same"),
}  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_people_ask_is_answered(question: str, pages: dict[str, Any]) -> None:
    page, heading, answer = QUESTIONS[question]
    headings = pages[page].select("article :is(h1, h2, h3)")
    sections = {h.get_text().removesuffix("¶").removesuffix("#"): h.parent for h in headings}
    assert heading in sections
    assert answer in " ".join(sections[heading].get_text().split())


# --- search ---------------------------------------------------------------------------------------

SEARCHES = {
    "sliding window": "windows",
    "NaN": "debugging",
    "padding": "padding",
    "cache": "decoding",
    "drafts": "trees",
    "checkpoints": "flax",
    "packing": "padding",
    "grouped queries": "grouped",
    "positions": "positions",
    "how masking works": "how_masking_works",
}


def test_search_leads_to_the_right_page(site: Path) -> None:
    """Sphinx's own search, asked outside a browser."""
    racer = pytest.importorskip("py_mini_racer", reason="mini-racer is not installed")
    around = """
    const window = globalThis, document = {getElementById: () => null};
    const SPHINX_HIGHLIGHT_ENABLED = false, _ = (text) => text, _ready = () => {};
    window.location = {search: ""};
    class URLSearchParams { constructor(text) { this.text = text } get() { return this.text } }
    """
    static = [site / "_static" / name for name in
              ("base-stemmer.js", "language_data.js", "searchtools.js")]  # fmt: skip
    scripts = [path.read_text() for path in static if path.exists()]
    index = (site / "searchindex.js").read_text()
    ask = f"""
    JSON.stringify({json.dumps(list(SEARCHES))}.map((query) => {{
      window.location.search = query;
      return Search._performSearch(...Search._parseQuery(query)).at(-1)[0];
    }}))
    """
    context = racer.MiniRacer()
    found = json.loads(context.eval("\n".join((around, *scripts, index, ask))))
    assert dict(zip(SEARCHES, found)) == SEARCHES


# --- in a browser ---------------------------------------------------------------------------------


def test_no_page_scrolls_sideways(site: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: chromium)")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (390, 1400):
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                for name in ("index", "masks", "tour", "how_masking_works", "reference"):
                    page.goto(f"file://{site}/{name}.html")
                    beyond = page.evaluate(
                        "document.documentElement.scrollWidth - window.innerWidth"
                    )
                    assert beyond <= 0, f"{name} at {width}"
                page.close()
        browser.close()

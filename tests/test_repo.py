"""The repository: guides and docstrings run, imports point one way, jax alone is enough."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs/extensions"))

from blocks import agrees, blocks

import jaxattn as ja

ROOT = Path(ja.__file__).parent.parent
GUIDES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "experiments/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
MODULES = sorted(m.name for m in pkgutil.walk_packages(ja.__path__, "jaxattn."))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("path", GUIDES, ids=lambda p: str(p.relative_to(ROOT)))
def test_guides_run(path: Path) -> None:
    """Python blocks run from top to bottom, and print the text block right after them."""
    namespace = {"__name__": "guide"}
    for block in blocks(path.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Blank lines, so that a traceback names the line of the guide; and without the
            # `annotations` of this file, which a reader's session does not have.
            code = "\n" * block.line + block.code
            exec(compile(code, str(path), "exec", dont_inherit=True), namespace)
        if block.shown is not None:
            got = printed.getvalue()
            assert agrees(block.shown, got), (
                f"{path.name}:{block.line} shows\n{block.shown}\nand prints\n{got}"
            )


def test_there_is_a_readme_with_code() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [block for block in blocks(readme) if block.shown]
    assert readme.count("\n") <= 180


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: str(p.relative_to(ROOT)))
def test_guides_name_what_exists(path: Path) -> None:
    """Links between files, and paths in the text, lead somewhere."""
    guide = path.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", guide):
        assert (path.parent / link).exists(), link
    for named in re.findall(r"`((?:jaxattn|tests|docs)/[\w/.]+)`", guide):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_every_page_has_one_title_and_a_place_among_the_others(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    if text.strip():  # else it is a file of another folder
        assert re.findall(r"^# .+", text, re.M) == [text.splitlines()[0]]
    home = (ROOT / "docs/index.md").read_text()
    assert path.stem == "index" or re.search(rf"^{path.stem}$", home, re.M)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", ["jaxattn", *MODULES])
def test_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_doctests_are_found() -> None:
    finder = doctest.DocTestFinder()
    found = sum(bool(t.examples) for n in MODULES for t in finder.find(importlib.import_module(n)))
    assert found >= 3


# --- imports --------------------------------------------------------------------------------------

# The rooms and the files beside them, from the ground up. What stands on a line may import what
# stands on the lines above it, imports inside functions included.
LAYERS = [
    "shapes pytrees deprecated",
    "mesh checks",
    "masks",
    "scores describing",
    "tracing stats",
    "tiles",
    "backends",
    "arguments dispatch",
    "attention",
    "explain views testing compat caches parallel",
    "nn",
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer.split()}

# Within a room, what a file may import of it is written before it. Files on one line, and folders,
# do not know each other.
ROOMS = {
    "checks": "arrays | foreign_names integers options user_functions",
    "masks": "results positions conventions | door | mask | by_position by_array | by_table by_function",
    "describing": "terms evaluate | closures cover | fits | search",
    "tracing": "hashing pointwise | program | recompilation_warning array_reads labels | canonical"
    " | dependence | split out_of_range",
    "tiles": "elementwise_rules | array_rules | intervals | tile_map known",
    "views": "array cells why | text plot html | diff | describe",
    "backends": "base operation | bfloat16 problem | formula | flash"
    " | dense rows cudnn tiled triton mosaic tpu | decode | costs",
    "backends/flash": "tile_sizes tile_lists | operands fused | programs nonfinite | exchange | partition | transforms",
    "backends/rows": "parts steps | passes | backend",
    "backends/tiled": "exponential schedule | tile_step | passes | backend",
    "backends/triton": "tiles | kernels | backend",
    "backends/mosaic": "programs memory | tiles | kernels | backend",
    "backends/tpu": "steps | tiles | kernels | backend",
    "caches": "cache | kv_cache paged",
    "testing": "changes depth findings | layers assertions | visible",
    "parallel": "known | layouts plan | attention | explain",
    "nn": "flax_packages rope functional | sowing | attention_fn | linen nnx",
}


def imports(path: Path) -> set[str]:
    """The modules of the library that a file imports anywhere in it, as `room/file`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").split(".")[0] == "jaxattn"
        ):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                inner = ROOT.joinpath(*base, alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add("/".join((*base, alias.name) if is_module else base))
        elif isinstance(node, ast.Import):
            found |= {a.name.replace(".", "/") for a in node.names if a.name.startswith("jaxattn")}
    return {name.removeprefix("jaxattn/") for name in found}


FILES = sorted((ROOT / "jaxattn").rglob("*.py"))


def place(room: str, name: str) -> int:
    """On which line of its room a file is written."""
    lines = [line.split() for line in ROOMS[room].split("|")]
    found = [i for i, line in enumerate(lines) if name in line]
    assert found, f"{room}/{name} has no place in the order of its room"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "jaxattn")))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT / "jaxattn").with_suffix("").parts
    if parts == ("__init__",):
        return
    mine = "/".join(parts)
    for target in imports(path):
        assert target != "jaxattn", f"{mine} imports the whole package"
        theirs = target.split("/")
        shared = 0
        while shared < min(len(parts), len(theirs)) - 1 and parts[shared] == theirs[shared]:
            shared += 1
        room, here, there = "/".join(parts[:shared]), parts[shared], theirs[shared]
        if here == "__init__":
            continue
        if not room:
            assert RANK[there] < RANK[here], f"{mine} imports {target}"
        else:
            assert place(room, there) < place(room, here), f"{mine} imports {target}"


def test_every_file_has_a_place_in_its_room() -> None:
    for path in FILES:
        *room, name = path.relative_to(ROOT / "jaxattn").with_suffix("").parts
        if name != "__init__":
            assert place("/".join(room), name) >= 0 if room else name in RANK
    folders = {str(path.parent.relative_to(ROOT / "jaxattn")) for path in FILES} - {"."}
    assert folders == set(ROOMS)
    for room, order in ROOMS.items():
        for name in order.replace("|", " ").split():
            inner = ROOT / "jaxattn" / room / name
            assert inner.with_suffix(".py").exists() or inner.is_dir(), f"{room}/{name} is gone"


def test_the_import_law_can_see() -> None:
    """The reader of imports finds what is there, in functions too."""
    assert {"arguments", "dispatch"} <= imports(ROOT / "jaxattn/attention.py")
    assert "backends/triton/kernels" in imports(ROOT / "jaxattn/backends/triton/backend.py")
    assert "views/array" in imports(ROOT / "jaxattn/views/__init__.py")


def test_a_call_is_split_at_the_door() -> None:
    """`arguments` splits the mask and the score of a call; what comes after is given the splits."""
    splitting = {
        str(path.relative_to(ROOT / "jaxattn").with_suffix(""))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").endswith("split")
        and "split" in {alias.name for alias in node.names}
    }
    assert {name for name in splitting if not name.startswith("views/")} == {
        "arguments",
        "explain",  # a mask that is not there, which is full
        "parallel/known",  # a conjunct alone, to see which positions it reads
        "tiles/tile_map",
    }


def test_import_needs_jax_alone() -> None:
    code = """
    import sys
    for name in ("flax", "matplotlib", "jaxtyping", "beartype", "optax", "hypothesis"):
        sys.modules[name] = None
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda n, *a: None if sys.modules.get(n, n) is None else found(n, *a)
    import jax.numpy as jnp
    import jaxattn as ja
    x = jnp.ones((1, 4, 2, 8))
    mask = ja.masks.causal() & ja.masks.segments(jnp.zeros(4, jnp.int32))
    assert ja.attention(x, x, x, mask=mask).shape == x.shape
    assert ja.scaled_dot_product_attention(x, x, x)[0].shape == x.shape
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


# --- names and docstrings -------------------------------------------------------------------------


def public(module: ModuleType) -> list[str]:
    return sorted(module.__all__)


def test_public_names() -> None:
    """What `dir` shows is what is documented, and the guides show the main ones."""
    assert len(set(ja.__all__)) == len(ja.__all__)
    for name in ja.__all__:
        assert getattr(ja, name) is not None
    named = {n for n in vars(ja) if not n.startswith("_") and not inspect.ismodule(getattr(ja, n))}
    assert named <= set(ja.__all__)
    guides = "".join(path.read_text() for path in GUIDES)
    for name in ("attention", "explain", "Positions", "dot_product_attention",
                 "scaled_dot_product_attention", "masks", "scores"):  # fmt: skip
        assert name in ja.__all__
        assert name in guides


@pytest.mark.parametrize("family", ["masks", "scores"])
def test_readme_and_guide_name_every_constructor(family: str) -> None:
    module = getattr(ja, family)
    for path in ("README.md", f"docs/{family}.md"):
        text = (ROOT / path).read_text()
        for name in public(module):
            made_here = inspect.isfunction(getattr(module, name))
            if made_here and name not in ("alibi_slopes", "describe", "diff"):
                assert f"`{name}(" in text, f"{path}: {family}.{name}"
    readme = (ROOT / "README.md").read_text()
    assert "masks.diff(" in readme
    assert "masks.describe(" in readme


def sections(guide: str) -> dict[str, str]:
    """The sections of the third level of a guide, by their titles."""
    parts = re.split(r"^### (.+)\n", re.sub(r"^## .+\n", "### \n", guide, flags=re.M), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_mask_has_a_section_with_picture_and_cost() -> None:
    guide = sections((ROOT / "docs/constructors.md").read_text())
    for name in public(ja.masks):
        made = getattr(ja.masks, name)
        if inspect.isfunction(made) and inspect.signature(made).return_annotation == "Mask":
            found = [block for block in blocks(guide[name]) if f"masks.{name}(" in block.code]
            pictures = [block for block in found if ".show(" in block.code]
            assert pictures, name
            assert "pairs visible" in (pictures[0].shown or ""), name
            assert f"`{name}(" in guide[name].split("```")[0], f"{name} without its formula"


def test_every_score_has_a_section_with_code_and_picture() -> None:
    guide = sections((ROOT / "docs/scores.md").read_text())
    for name in public(ja.scores):
        made = getattr(ja.scores, name)
        if inspect.isfunction(made) and inspect.signature(made).return_annotation == "Score":
            assert f"`{name}(" in guide[name].split("```")[0], f"{name} without its formula"
            assert any(f"scores.{name}(" in block.code for block in blocks(guide[name])), name
            assert f"](pictures/{name}.svg)" in guide[name], name


def test_every_statistic_has_a_section_with_code() -> None:
    guide = sections((ROOT / "docs/statistics.md").read_text())
    for name in public(ja.stats):
        if inspect.isfunction(getattr(ja.stats, name)):
            assert f"`{name}(" in guide[name].split("```")[0], f"{name} without its formula"
            assert any(f"stats.{name}(" in block.code for block in blocks(guide[name])), name


def test_every_public_thing_has_a_docstring() -> None:
    places = [ja, ja.masks, ja.parallel, ja.scores, ja.testing]
    for module in places:
        for name in module.__all__:
            thing = getattr(module, name)
            assert inspect.getdoc(thing), f"{module.__name__}.{name}"
            if inspect.isclass(thing) and thing.__module__.startswith("jaxattn"):
                for method, value in vars(thing).items():
                    if not method.startswith("_") and callable(value):
                        assert inspect.getdoc(value), f"{name}.{method}"
            if inspect.isfunction(thing):
                # Every argument that a caller can give is spoken of.
                told = inspect.getdoc(thing) or ""
                if "are those of `jax.nn" in told:
                    continue
                source = told + (inspect.getdoc(ja.attention) or "")
                for argument in inspect.signature(thing).parameters:
                    word = argument.lstrip("_")
                    if module in (ja.masks, ja.scores) and word in ("parts", "array", "table"):
                        continue
                    assert re.search(rf"\b{word}\b", source), f"{module.__name__}.{name}({word})"


@pytest.mark.parametrize("name", ["jaxattn", *MODULES])
def test_every_module_says_what_it_is(name: str) -> None:
    assert (importlib.import_module(name).__doc__ or "").strip()


def test_no_file_is_too_long() -> None:
    """Five hundred lines at most; and no name that would fit any content."""
    for path in FILES:
        lines = path.read_text().count("\n")
        assert lines <= 500, f"{path.name}: {lines} lines"
        assert path.name not in ("utils.py", "common.py", "core.py", "helpers.py")


def test_typed_and_licensed() -> None:
    assert (ROOT / "jaxattn/py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert np.lib.NumpyVersion(jax.__version__.split(".dev")[0]) >= "0.10.0"


# --- what the repository offers: verbs, distributions ---------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()
RECIPES = dict(re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)+)", MAKEFILE, re.M))


def tracked() -> list[str]:
    """Files of the repository, as git has them or, without it, as they lie there."""
    if (ROOT / ".git").exists():
        asked = ["git", "-C", str(ROOT), "ls-files"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    places = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").glob("*.*"), *FILES]
    return [str(path.relative_to(ROOT)) for path in places]


def test_every_verb_is_listed_with_its_time() -> None:
    assert len(RECIPES) > 10
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `make ([a-z-]+)` \|(.+)\|(.+)\|$", listed, re.M)
    told = {verb: time.strip() for verb, _, time in rows}
    verbs = set(re.findall(r"[a-z-]+", re.search(r"PHONY:((?:.*\\\n)*.*)\n", MAKEFILE)[1]))
    assert verbs == set(told)
    assert all(told.values())
    readme = (ROOT / "README.md").read_text()
    assert all(f"make {verb}" in readme for verb in ("test", "experiment"))


def test_every_verb_is_given_its_arguments_or_refuses_them() -> None:
    refusing = set(re.search(r"^WITHOUT_ARGS := (.+)$", MAKEFILE, re.M)[1].split())
    assert refusing < set(RECIPES) | {"peers", "peers-llama", "compile-gpu"}
    for verb, recipe in RECIPES.items():
        assert recipe.rstrip().endswith(" $(ARGS)") != (verb in refusing), verb
    if shutil.which("make"):
        made = ["make", "-n", "-C", str(ROOT), "-o", ".venv/ready", "ARGS=--help"]
        run = subprocess.run([*made, "experiment"], capture_output=True, text=True, check=True)
        assert "experiments/translate.py --help" in run.stdout
        run = subprocess.run([*made, "check"], capture_output=True, text=True, check=False)
        assert run.returncode != 0
        assert "make check takes no ARGS" in run.stderr


def test_runs_leave_git_clean() -> None:
    """Whatever is written by a run is ignored; nothing there is excepted."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "experiments/results/" in ignored
    assert not [line for line in ignored if line.startswith("!")]
    assert not [name for name in tracked() if name.startswith("experiments/results/")]
    for path in (ROOT / "experiments").glob("*.py"):
        for line in path.read_text().splitlines():
            if re.match(r"\s*(OUT|out|output|page)\b.*= .*(HERE|__file__)", line):
                assert '"results"' in line, f"{path.name}: {line}"


def test_a_source_distribution_holds_what_its_tests_need() -> None:
    grafted, included = set(), {"pyproject.toml", "MANIFEST.in"}
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        word, *names = line.split() or ("",)
        {"graft": grafted, "include": included}.get(word, set()).update(names)
    missing = [n for n in tracked() if n.split("/")[0] not in grafted and n not in included]
    assert not missing
    assert "CHANGELOG.md" in included
    assert all((ROOT / name).exists() for name in grafted | included)


def test_skips_say_why() -> None:
    options = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^addopts = "[^"]*-r\w*s\b', options, re.M)
    for path in (ROOT / "tests").glob("test_*.py"):
        for call in re.findall(r"mark\.skipif\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "reason=" in call, path.name


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("show", "text", "views.text"),
        ("show", "diff", "views.diff"),
        ("plot", "plot", "views.plot"),
        ("html", "html", "views.html"),
        ("why", "why", "views.why"),
    ],
)
def test_import_paths_of_before_still_work(old: str, name: str, new: str) -> None:
    module = importlib.import_module(f"jaxattn.{old}")
    with pytest.warns(DeprecationWarning, match=rf"write jaxattn\.{new}\.{name}"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(f"jaxattn.{new}"), name)
    assert getattr(ja, old) is module
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing

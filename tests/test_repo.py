"""The repository: README and docstrings run, imports point one way, jax alone is enough."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

import jaxattn as ja

ROOT = Path(ja.__file__).parent.parent
READMES = sorted(p for p in (ROOT / "README.md", ROOT / "experiments/README.md") if p.exists())
MODULES = sorted(m.name for m in pkgutil.walk_packages(ja.__path__, "jaxattn."))


@pytest.fixture
def as_users_run():
    """JAX's own defaults: users have no strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_readme_runs(path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "readme"}
    for block in re.finditer(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S):
        line = path.read_text()[: block.start()].count("\n") + 1
        # Blank lines, so that a traceback names the line of the README.
        exec(compile("\n" * line + block[1], str(path), "exec"), namespace)


def test_there_is_a_readme_with_code() -> None:
    assert "```python" in (ROOT / "README.md").read_text()


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

# From the ground up; a module may import those of lower rank only. `backends` stands for all.
LAYERS = [
    ["shapes", "mistakes"],
    ["algebra"],
    ["conventions"],
    ["masks", "scores"],
    ["program"],
    ["recompiled"],
    ["reads", "hoist", "pointwise", "rules"],
    ["plan", "rearranging"],
    ["split", "beyond"],
    ["intervals"],
    ["tiles"],
    ["backends"],
    ["request"],
    ["attention"],
    ["explain"],
    ["why", "cells"],
    ["cache"],
    ["paged"],
    ["nn", "parallel", "compat", "show", "plot", "html", "testing"],
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of the library that a file imports when it is imported, as parts of their names."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[:-1]
    found: set[tuple[str, ...]] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").startswith("jaxattn")
        ):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                inner = ROOT.joinpath(*base, alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                found.add((*base, alias.name) if is_module else base)
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")) for a in node.names if a.name.startswith("jaxattn")}
    return found


FILES = sorted((ROOT / "jaxattn").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "jaxattn")))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(ROOT / "jaxattn").with_suffix("").parts
    if parts == ("__init__",):
        return
    assert parts[0] in RANK, f"{parts[0]} has no place in the order of the design"
    for target in imports(path):
        assert target[0] == "jaxattn"
        assert len(target) > 1, f"{path.name} imports the whole package"
        if parts[0] == target[1]:
            own = parts[-1] if parts[-1] != "__init__" else ""
            # Backends share `base`, and what a backend is made of; never another backend. Modules
            # share what lies between their projections; linen and nnx never meet.
            made_of = (
                "base",
                "inputs",
                "lists",
                "loops",
                "steps",
                "transforms",
                "triton",
                "mosaic",
            )
            made_of += ("triton_tiles", "mosaic_tiles", "mosaic_parts")
            shared = (*made_of, "heads", "adapters", target[1])
            assert target[-1] in shared or own in target[-1], (
                f"{'/'.join(parts)} imports {'.'.join(target)}"
            )
        else:
            assert RANK[target[1]] < RANK[parts[0]], f"{'/'.join(parts)} imports {'.'.join(target)}"


def test_the_import_law_can_see() -> None:
    """The reader of imports finds what is there."""
    assert ("jaxattn", "request") in imports(ROOT / "jaxattn/attention.py")
    assert ("jaxattn", "backends", "base") in imports(ROOT / "jaxattn/backends/dense.py")
    assert len({target for path in FILES for target in imports(path)}) > 10


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
    """What `dir` shows is what is documented, and the README shows the main ones."""
    assert len(set(ja.__all__)) == len(ja.__all__)
    for name in ja.__all__:
        assert getattr(ja, name) is not None
    named = {n for n in vars(ja) if not n.startswith("_") and not inspect.ismodule(getattr(ja, n))}
    assert named <= set(ja.__all__)
    readme = (ROOT / "README.md").read_text()
    for name in ("attention", "explain", "Positions", "dot_product_attention",
                 "scaled_dot_product_attention", "masks", "scores"):  # fmt: skip
        assert name in ja.__all__
        assert name in readme


@pytest.mark.parametrize("family", ["masks", "scores"])
def test_readme_names_every_constructor(family: str) -> None:
    module = getattr(ja, family)
    readme = (ROOT / "README.md").read_text()
    for name in public(module):
        made_here = inspect.isfunction(getattr(module, name))
        if made_here and name != "alibi_slopes":
            assert f"`{name}(" in readme, f"{family}.{name}"


def test_every_public_thing_has_a_docstring() -> None:
    places = [ja, ja.masks, ja.scores, ja.testing]
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
    """Five hundred lines, or a reason."""
    reasons = {
        "masks.py": "one line of maths a constructor, and its docstring",
        "intervals.py": "one rule an operation",
        "split.py": "one trace, one plan",
    }
    for path in FILES:
        lines = path.read_text().count("\n")
        assert lines <= 500 or path.name in reasons, f"{path.name}: {lines} lines"
        assert path.name not in ("utils.py", "common.py", "core.py", "helpers.py")


def test_typed_and_licensed() -> None:
    assert (ROOT / "jaxattn/py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert np.lib.NumpyVersion(jax.__version__.split(".dev")[0]) >= "0.10.0"

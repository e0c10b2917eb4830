"""Guides as notebooks: MyST-NB runs their blocks, and the site shows what they really print.

MyST-NB's own cells (```` ```{code-cell} ````) are neither highlighted on a forge nor followed by
their output there. So guides keep plain blocks, and are read as notebooks here.

Some pages are files of other folders: `experiments.md` includes `experiments/README.md`. Links in
them lead from where they stand, and are written anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
from blocks import Block, agrees, blocks
from docutils import nodes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

DOCS = Path(__file__).parents[1]
# Files of other folders, and the pages that include them.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "experiments/README.md": "experiments.md",
}

_INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.M)
# The file that a link of Markdown names.
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


# --- the text of a page ---------------------------------------------------------------------------


def whole(path: Path) -> str:
    """The text of a page, with what it includes, and with links that lead from `docs/`."""
    text = _INCLUDE.sub(lambda found: whole(path.parent / found[1]), path.read_text())
    return LINK.sub(lambda found: _from_docs(path.parent / found[1]), text)


def _from_docs(target: Path) -> str:
    target = target.resolve()
    inside = target.relative_to(DOCS.parent) if target.is_relative_to(DOCS.parent) else target
    return PAGES.get(inside.as_posix()) or Path(os.path.relpath(target, DOCS)).as_posix()


def bring_in(app: Sphinx, name: str, content: list[str]) -> None:
    """Replaces the text of a page by the whole of it, before it is read."""
    path = Path(app.env.doc2path(name))
    for included in _INCLUDE.findall(content[0]):
        # The page is read again when the file changes.
        app.env.note_dependency(str((path.parent / included).resolve()))
    content[0] = whole(path)


# --- blocks as cells ------------------------------------------------------------------------------


def read(text: str) -> nbformat.NotebookNode:
    """A guide as a notebook: its blocks are code cells, and what lies between is Markdown."""
    cells, lines, at = [], [], 0

    def markdown(end: int) -> None:
        if between := text[at:end].strip("\n"):
            cells.append(new_markdown_cell(between))
            lead = len(text[at:end]) - len(text[at:end].lstrip("\n"))
            lines.append(text.count("\n", 0, at + lead))

    for block in blocks(text):
        markdown(block.start)
        cells.append(_cell(block))
        lines.append(block.line)
        at = block.end
    markdown(len(text))
    kernel = {"name": "guides", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "source_map": lines})


def _cell(block: Block) -> nbformat.NotebookNode:
    """A block as a cell. Where cells are not run, it shows what the guide says."""
    code = block.code.rstrip("\n")
    drawn = {"image": {"alt": f"What `{code.splitlines()[-1]}` draws."}}
    outputs = [] if block.shown is None else [new_output("stream", text=block.shown)]
    metadata = {"shown": block.shown, "mystnb": drawn}
    return new_code_cell(code, outputs=outputs, metadata=metadata)


def check(app: Sphinx, doctree: nodes.document) -> None:
    """Warns where a cell printed something else than its guide shows."""
    for cell in doctree.findall(nodes.container):
        shown = cell.get("cell_metadata", {}).get("shown")
        if shown is None:
            continue
        outputs = [
            c for c in cell.findall(nodes.container) if c.get("nb_element") == "cell_code_output"
        ]
        printed = "\n".join(
            text.astext() for each in outputs for text in each.findall(nodes.literal_block)
        )
        if not agrees(shown, printed + "\n"):
            logger.warning("shows\n%s\nand prints\n%s", shown, printed, location=cell)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", bring_in)
    app.connect("doctree-read", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

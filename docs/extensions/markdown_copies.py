"""`llms.txt`, and a copy in Markdown beside each page: `masks.html.md` beside `masks.html`.

This is what tools that read documentation look for (https://llmstxt.org).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from guides import LINK, whole
from reference import written_out
from sphinx import addnodes
from sphinx.application import Sphinx

_TOCTREE = re.compile(r"^```\{toctree\}\n(?::.*\n)*(.*?)^```\n?", re.M | re.S)


def write(app: Sphinx, failure: Exception | None) -> None:
    if failure is not None or app.builder.format != "html":
        return
    for name in sorted(app.env.found_docs):
        copy = Path(app.outdir, f"{name}.html.md")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(plain(app, name))
    Path(app.outdir, "llms.txt").write_text(overview(app))


def plain(app: Sphinx, name: str) -> str:
    """A page as Markdown alone: directives are replaced by what they stand for."""
    text = whole(Path(app.env.doc2path(name)))
    text = LINK.sub(lambda found: _on_the_site(app, found[1]), text)
    return written_out(_TOCTREE.sub(lambda found: _links(app, found[1]), text))


def _on_the_site(app: Sphinx, target: str) -> str:
    """Where a copy of a page, a picture or another file stands."""
    for folder, files in ((app.builder.imagedir, app.env.images), ("_downloads", app.env.dlfiles)):
        names = {str(path): name for path, (_, name) in files.items()}
        if target in names:
            return f"{folder}/{names[target]}"
    page = target.removesuffix(".md")
    return f"{page}.html.md" if page != target else target


def _links(app: Sphinx, names: str) -> str:
    return "".join(f"- {_link(app, name)}\n" for name in names.split())


def _link(app: Sphinx, name: str) -> str:
    return f"[{app.env.titles[name].astext()}]({name}.html.md): {summary(app, name)}"


def summary(app: Sphinx, name: str) -> str:
    """The first paragraph of a page."""
    for node in app.env.get_doctree(name).findall():
        if node.tagname == "paragraph":
            return " ".join(node.astext().split())
    raise ValueError(f"{name} has no paragraph")


def overview(app: Sphinx) -> str:
    """The pages in reading order, each with the question that it answers."""
    home = app.config.root_doc
    parts = [f"# {app.config.project}\n\n> {summary(app, home)}\n"]
    for tree in app.env.get_doctree(home).findall(addnodes.toctree):
        names = "\n".join(name for _, name in tree["entries"])
        parts.append(f"## {tree['caption']}\n\n{_links(app, names)}")
    return "\n".join(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

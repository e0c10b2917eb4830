"""The page on which masks are chosen and asked (`make gallery`), as a part of the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx


def write(app: Sphinx) -> None:
    path = Path(app.config.explorer_page)
    if not path.exists():
        import explorer  # it takes seconds to make, and is kept with the outputs of cells

        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(explorer.page(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("explorer_page", "", "html")
    app.connect("builder-inited", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

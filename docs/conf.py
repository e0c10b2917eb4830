"""How the site is built (`make docs`); the folder `extensions` says how pages are read."""

import hashlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "extensions"), str(ROOT / "experiments")]
# For the cells too, which run in processes of their own; guides to sharding take eight devices.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["JUPYTER_PATH"] = str(HERE / "extensions")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402

import jaxattn  # noqa: E402

project = "jaxattn"
version = release = jaxattn.__version__
copyright = "the authors of jaxattn"

extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "guides",
    "reference",
    "markdown_copies",
    "explorer_page",
]
exclude_patterns = ["extensions"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# --- guides: plain Markdown, run by MyST-NB -------------------------------------------------------

nb_custom_formats = {".md": "guides.read"}
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4


def _digest() -> str:
    """Of what the outputs of cells depend on, besides the cells themselves."""
    found = hashlib.sha256(f"{sys.version} {jax.__version__}".encode())
    for path in sorted([*ROOT.glob("jaxattn/**/*.py"), *ROOT.glob("experiments/explorer.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


_cache = ROOT / "build" / "docs-cache" / _digest()
nb_execution_mode = "cache"
nb_execution_cache_path = str(_cache / "cells")
explorer_page = str(_cache / "explorer" / "explorer.html")
Path(explorer_page).parent.mkdir(parents=True, exist_ok=True)

# --- HTML -----------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"jaxattn {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_search_scorer = str(HERE / "static" / "scorer.js")
html_extra_path = [str(Path(explorer_page).parent)]
html_copy_source = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = ">>> "

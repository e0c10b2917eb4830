"""The reference: docstrings as Markdown, in the order and the groups that a page gives.

    ```{reference} jaxattn.masks
    causal
    sliding_window
    ```

Docstrings of the library are Markdown with the sections of Google's style. Sphinx's autodoc reads
reStructuredText, so the directive writes Markdown, which MyST parses, and which is the page's copy
for readers of plain text too.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Any, NamedTuple

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

# Writes one entry: the kind of object, its signature, and what is said of it.
Entry = Callable[[str, str, str], str]

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):\n((?:(?: .*)?\n)+)", re.M)
_ITEM = re.compile(r"^(\S.*?): (.*(?:\n +.*)*)", re.M)
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.M)
_TITLES = {"Args": "Arguments"}
_SHAPED = re.compile(r"""(Float|Int|Bool|Shaped|UInt32)\[[\w. |]+, ["']([^"']*)["']\]""")


# --- docstrings -----------------------------------------------------------------------------------


def prose(docstring: str) -> str:
    """A docstring as Markdown: sections are titled, arguments are lists, examples are code."""
    text = _SECTION.sub(lambda found: _section(*found.groups()), docstring + "\n")
    return _DOCTEST.sub(lambda found: f"```pycon\n{found.group()}\n```", text)


def _section(name: str, body: str) -> str:
    body = textwrap.dedent(body).strip("\n")
    if name in ("Args", "Attributes", "Raises"):
        items = ((", ".join(f"`{n}`" for n in names.split(", ")), " ".join(text.split()))
                 for names, text in _ITEM.findall(body))  # fmt: skip
        body = "\n".join(f"- {names}: {text}" for names, text in items)
    return f"**{_TITLES.get(name, name)}**\n\n{body}\n\n"


# --- signatures -----------------------------------------------------------------------------------


class Written(NamedTuple):
    """What `inspect` writes as it is, in the place of a type or a default."""

    text: str

    def __repr__(self) -> str:
        return self.text


def signature(thing: Any, *, bound: bool = False) -> str:
    """`(query: Float[*B, T, N, H], *, mask=None) -> Float[*B, T, N, Hv]`."""
    found = inspect.signature(thing)
    parameters = [
        each.replace(annotation=_type(each.annotation), default=_default(each.default))
        for each in list(found.parameters.values())[bound:]
    ]
    return str(
        found.replace(parameters=parameters, return_annotation=_type(found.return_annotation))
    )


def _type(annotation: Any) -> Any:
    """A type as it reads best: shapes without jaxtyping's strings, nothing for `Any`.

    `Float[Array, "*B T N H"] | None` is `Float[*B, T, N, H] | None`.
    """
    if annotation in (Parameter.empty, "Any", "None", Any, None):
        return Parameter.empty
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return Written(_SHAPED.sub(lambda found: found[1] + _axes(found[2]), text))


def _axes(shape: str) -> str:
    return f"[{', '.join(shape.split())}]" if shape else ""


def _default(value: Any) -> Any:
    """A default, if it reads as it is written."""
    short = value is None or isinstance(value, (bool, int, float, str, tuple))
    return value if short or value is Parameter.empty else Written("...")


# --- entries --------------------------------------------------------------------------------------


def entries(module: str, names: list[str], entry: Entry) -> str:
    """The Markdown of several names of a module."""
    home = importlib.import_module(module)
    return "\n\n".join(_entry(f"{module}.{name}", getattr(home, name), entry) for name in names)


def _entry(name: str, thing: Any, entry: Entry) -> str:
    said = prose(inspect.getdoc(thing) or "")
    if not inspect.isclass(thing):
        return entry("function", name + signature(thing), said)
    # The fields of a dataclass are its attributes, which the docstring lists.
    made = signature(thing.__init__, bound=True) if "**Arguments**" in said else ""
    methods = "\n\n".join(_method(*each, entry) for each in _methods(thing))
    return entry("class", name + made, f"{said}\n\n{methods}")


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the library wrote, inherited ones after its own."""
    found = {name: value for each in reversed(cls.__mro__) for name, value in vars(each).items()}
    own = [name for each in cls.__mro__ for name in vars(each) if not name.startswith("_")]
    for name in dict.fromkeys(own):
        function = _function(found[name])
        if inspect.isfunction(function) and function.__module__.startswith("jaxattn."):
            yield name, found[name]


def _function(value: Any) -> Any:
    """The function of a method, a class method, a static method or a property."""
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def _method(name: str, value: Any, entry: Entry) -> str:
    said = prose(inspect.getdoc(value) or "")
    if isinstance(value, property):
        return entry("property", name, said)
    kind = {classmethod: "classmethod", staticmethod: "staticmethod"}.get(type(value), "method")
    return entry(kind, name + signature(_function(value), bound=kind != "staticmethod"), said)


def directive(kind: str, head: str, said: str) -> str:
    """An entry of the site: an object of Sphinx's Python domain, with an anchor."""
    fence = "`" * max(5, *(len(run) + 1 for run in re.findall("`{5,}", said)), 0)
    return f"{fence}{{py:{kind}}} {head}\n{said.strip()}\n{fence}"


def plain(kind: str, head: str, said: str) -> str:
    """An entry of the copy in plain Markdown."""
    level = "###" if kind in ("function", "class") else "####"
    return f"{level} {head.split('(')[0]}\n\n```python\n{head}\n```\n\n{said.strip()}"


class Reference(SphinxDirective):
    """Entries for the names that it lists, of the module that it names."""

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        names = [name for line in self.content for name in line.split()]
        written = entries(self.arguments[0], names, directive)
        lines = StringList(written.splitlines(), f"<{self.arguments[0]}>")
        node = nodes.container()
        self.state.nested_parse(lines, self.content_offset, node)
        return node.children


def written_out(text: str) -> str:
    """A page in which every directive is replaced by its entries."""
    return re.sub(
        r"^```\{reference\} (\S+)\n(.*?)^```$",
        lambda found: entries(found[1], found[2].split(), plain),
        text,
        flags=re.M | re.S,
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("reference", Reference)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

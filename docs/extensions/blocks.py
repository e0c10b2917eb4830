"""Code blocks of guides, and what they print.

A guide is plain Markdown, as a forge or a terminal shows it. A block of `python` is run, and
the block of `text` right after it is what it prints. The tests and the site read guides by
the same rule, so that no guide says anything that is not so.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$\n?)?", re.M | re.S)
# `...` stands for anything, and whitespace may differ, as in doctests.
_SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A block of code in a guide.

    Attributes:
      start, end: where it stands in the text, with what it prints.
      line: the number of its first line, from 1.
      code: what is run.
      shown: what the guide says that it prints; None if it says nothing.
    """

    start: int
    end: int
    line: int
    code: str
    shown: str | None


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a guide, from top to bottom."""
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(*found.span(), line, *found.groups())


def agrees(shown: str, printed: str) -> bool:
    """Whether code printed what the guide shows."""
    return doctest.OutputChecker().check_output(shown, printed, _SAME)

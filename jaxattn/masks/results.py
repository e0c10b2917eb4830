"""What the views of a mask return: `Why`, `Html`, `Diff` and `Description`.

They stand here, below the views that make them, because the methods of `Mask` are typed with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..shapes import Int


@dataclass(frozen=True)
class Why:
    """The answer of `Mask.why`, to be printed.

    Attributes:
      allowed: whether the query may see the key.
      lines: the answer of each part, indented by its depth.
    """

    allowed: bool
    lines: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.allowed

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__


class Html(str):
    """HTML that notebooks render, and that is a string everywhere else."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Diff:
    """Where two masks differ, to be printed.

    Attributes:
      same: whether the same pairs are visible in both.
      first: the first pair `(q, k)`, by query, that is visible in only one; None without any.
      text: what is printed.
    """

    same: bool
    first: tuple[int, int] | None
    text: str

    def __bool__(self) -> bool:
        return not self.same

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class Description:
    """The expression of a mask, to be printed.

    Attributes:
      expression: the expression, in the names of `jaxattn.masks`, and `np`; the first line of what
        is printed.
      mask: the mask that it makes.
      exact: whether it equals what was described, on all pairs.
      cells: the pairs for which it does not, each as `b, h, q, k`; none where it is exact.
      text: what is printed.
    """

    expression: str
    mask: Any
    exact: bool
    cells: Int[np.ndarray, "n 4"]
    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

"""What the views of a mask return: `Why`, `Html` and `Diff`.

They stand here, below the views that make them, because the methods of `Mask` are typed with them.
"""

from __future__ import annotations

from dataclasses import dataclass


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

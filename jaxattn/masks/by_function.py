"""Masks made of functions and of other masks, and the difference of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..checks.foreign_names import VIEWS, with_remedies
from ..checks.integers import check_exact
from .door import views
from .mask import Mask, MaskLike, PerHead, Predicate, as_mask, check_is_predicate

if TYPE_CHECKING:
    # The result of a view behind the door; a type alone, never imported when the code runs.
    from ..views.diff import Diff


def per_head(parts: Sequence[Any]) -> Mask:
    """Head `h` uses `parts[h]`: masks or callables, one for every query head."""
    if not isinstance(parts, Sequence) or not parts:
        raise ValueError(f"per_head(masks): got {parts!r}, expected a list of masks, one a head")
    return PerHead(tuple(as_mask(p, f"per_head(masks[{i}])") for i, p in enumerate(parts)))


def predicate(fn: Callable[..., Any], *args: Any) -> Mask:
    """Any function of positions: `fn(b, h, q, k, *args) -> bool`, for one query and one key.

    Args:
      fn: a pure function; FlexAttention's `mask_mod` signature, with `q`, `k` for `q_idx`,
        `kv_idx`.
      *args: arrays it reads, passed after the positions. They are leaves of the mask; arrays that
        the function closes over become leaves when it is traced.

    An axis read at a bare `b`, `h`, `q` or `k` must have that extent, or, where `positions=` are
    given, hold them (see `Positions`); computed indices follow JAX's rules (out of range is
    clamped).
    """
    if not callable(fn):
        raise TypeError(f"predicate(fn): got {type(fn).__name__}, expected fn(b, h, q, k, *args)")
    check_is_predicate(fn, "predicate(fn)")
    if isinstance(fn, Mask):
        if args:
            raise TypeError(f"predicate(fn): got {fn!r} with arguments, expected a function")
        return fn
    check_exact(args, "predicate(args)")
    return Predicate(fn, args)


@with_remedies(VIEWS, "diff")
def diff(
    first: MaskLike,
    second: MaskLike,
    /,
    T: int,
    S: int | None = None,
    *,
    b: int = 0,
    h: int = 0,
    color: bool | None = None,
) -> Diff:
    """Where two masks differ: for checking one that was rewritten against the old one.

    Args:
      first, second: masks, callables `(b, h, q, k) -> bool`, or boolean arrays; given by place.
      T, S: numbers of queries and of keys; S is T by default.
      b, h: the batch row and the query head that are compared.
      color: whether to colour by ANSI codes; by default on a terminal, unless `NO_COLOR` is set.

    Returns:
      A `Diff`, true if they differ, to be printed: `-` where only the first allows, `+` where only
      the second does. Above 4 million pairs masks are compared by bounds and, where these cannot
      tell, tile by tile: O(T * S) time, O(tile) memory.

    Raises:
      TypeError: for a batch row or a head that is not an integer.
      ValueError: for sizes below 1 or not those of the masks' arrays, and for a row or a head that
        these do not have.

    Example:
      >>> from jaxattn import masks
      >>> print(masks.diff(masks.causal(), lambda b, h, q, k: q > k, 3))
      3 of 9 pairs differ; the first: query 0, key 0, which only the first mask allows
       - · ·
      ██ - ·
      ████ -
    """
    return cast("Diff", views().diff(first, second, T, S, b=b, h=h, color=color))

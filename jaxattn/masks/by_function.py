"""Masks made of functions and of other masks, the difference of two, the words for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..checks.foreign_names import VIEWS, with_remedies
from ..checks.integers import check_exact
from .door import views
from .mask import Mask, MaskLike, PerHead, Predicate, as_mask, check_is_predicate
from .results import Description, Diff


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
    return views().diff(first, second, T, S, b=b, h=h, color=color)


def describe(
    observed: MaskLike,
    /,
    T: int | None = None,
    S: int | None = None,
    *,
    batch: int | None = None,
    heads: int | None = None,
) -> Description:
    """The shortest expression of constructors that equals a mask or an array exactly.

    For an array from someone's code, and for a mask that was written by hand: what is it called?
    The parameters are read off the array. Of most constructors one member is the tightest around
    what is visible (of `causal(offset)`, that with the largest `k - q`); an array that is a
    conjunction at all is the conjunction of these, and a disjunction is the same with visible and
    hidden exchanged. Fewer constructors are shorter; lists with an entry for each token count a
    third as much again. Three or fewer constructors are mostly found; more where all are joined by
    `&`, or all by `|`. What is found is checked on all pairs.

    Args:
      observed: booleans `[T, S]` or `[B|1, N|1, T|1, S|1]`, True where the query may attend to the
        key; or a mask, or a callable `(b, h, q, k) -> bool`. `from_array` reads other conventions.
      T, S: numbers of queries and of keys; by default those of the array, or those that `show`
        chooses for a mask.
      batch, heads: numbers of batch rows and of query heads of a mask; by default those of its
        arrays. An expression speaks of all rows and all heads: `key_padding(lengths=...)` has a
        length for each row, and where heads differ, `per_head([...])` has a mask for each.

    Returns:
      A `Description`, to be printed: its first line is the expression, and evaluates to a mask with
      the names of `jaxattn.masks` and `np`. Where nothing fits exactly, `exact` is False, the
      expression is the nearest that was found, and the pairs that it misses follow, as `diff` shows
      them. `dense(array)` describes nothing and is never the answer.

    Raises:
      TypeError: for what is no mask, and for arrays without known values, as inside `jit`.
      ValueError: for arrays of another rank, for sizes that are not those of the array, and for
        more than 4 million pairs in all rows and heads that differ.

    Example:
      >>> import numpy as np
      >>> from jaxattn import masks
      >>> q, k = np.ogrid[:8, :8]
      >>> print(masks.describe((q >= k) & (q - k < 3) & (k != 2)))
      sliding_window(2) & key_padding(np.array([1, 1, 0, 1, 1, 1, 1, 1], bool))
      equal on all 64 pairs
      >>> masks.describe(lambda b, h, q, k: (q // 4 == k // 4) & (q >= k), T=12).expression
      'causal() & chunked(4)'
    """
    return views().describe(observed, T, S, batch=batch, heads=heads)

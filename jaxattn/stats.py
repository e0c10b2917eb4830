"""Statistics of the weights of attention, computed in the same pass, which never forms them.

A statistic is what a mask and a score are: a function of one cell. `attention(..., stats=)` takes
any pytree of statistics, and returns the same pytree of arrays:

>>> import jax.numpy as jnp, jaxattn as ja
>>> x = jnp.ones((1, 4, 2, 8))
>>> asked = {"entropy": ja.stats.entropy(), "far": ja.stats.mean(lambda x, b, h, q, k: q - k)}
>>> out, seen = ja.attention(x, x, x, mask=ja.masks.causal(), stats=asked)
>>> seen["far"][0, :, 0].tolist()
[0.0, 0.5, 1.0, 1.5]

Let `p` be the softmax weights of a query after score, mask and sinks, before dropout, and `x` a
final logit. Sums are float32 (float64 for float64), whatever the inputs are. Means are
differentiable in all that they depend on, so that an entropy or a distance can be a loss.
Reductions over batch rows, heads or queries are the user's.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from .checks.arrays import described
from .checks.foreign_names import unknown_attribute
from .checks.user_functions import call_user, named
from .masks import full
from .masks.mask import Mask, MaskLike, Scalar, as_mask, leaf_repr
from .pytrees import ByStructure, pytree
from .scores import Score, Scored
from .shapes import Array, ArrayLike, Float

_REAL = (np.floating, np.integer, np.bool_)

__all__ = ["Stat", "argmax", "entropy", "mass", "max", "mean", "received"]

if not TYPE_CHECKING:
    # Hidden from type checkers, for which every name would otherwise exist.
    def __getattr__(name: str) -> Any:
        raise unknown_attribute(__name__, name, sys.modules[__name__])


class Rows(NamedTuple):
    """What is known of each query when its row of weights is done.

    Attributes:
      lse: the LSE without sinks, -inf for empty rows, `[B, T, N]`.
      sinks: the logits of the sinks, as they broadcast to that; None without.
      share: the part of the weight that sinks leave; 1 without.
      means: of the functions of `Stat.means`, by the weights without sinks; 0 for empty rows.
      maxima: of the functions of `Stat.maxima`.
      largest: the values of the functions of `Stat.largest` at the pairs with the largest logits;
        -1 for empty rows.
      received: for each of `Stat.queries` what each key gets.
    """

    lse: Float[Array, "B T N"]
    sinks: Any
    share: Any
    means: Sequence[Float[Array, "B T N"]]
    maxima: Sequence[Float[Array, "B T N"]]
    largest: Sequence[Float[Array, "B T N"]]
    received: Sequence[Float[Array, "B S N"]]


class Stat(ByStructure):
    """A statistic of each row of weights: `means` and `maxima` of functions, and what follows."""

    @property
    def means(self) -> tuple[Score, ...]:
        """Functions `(x, b, h, q, k) -> number` whose means by the weights are needed."""
        return ()

    @property
    def maxima(self) -> tuple[Score, ...]:
        """Functions whose largest values at visible keys are needed."""
        return ()

    @property
    def largest(self) -> tuple[Score, ...]:
        """Functions whose values at the pair with the largest logit are needed."""
        return ()

    @property
    def queries(self) -> tuple[Any, ...]:
        """Weights of queries, `[B, T, N]`, for which is needed what each key gets."""
        return ()

    @property
    def masks(self) -> tuple[Mask, ...]:
        """Masks that are given for the tokens and heads of the call."""
        return ()

    def with_queries(self, moved: Callable[[Array], Array]) -> Stat:
        """The statistic with other weights of queries."""
        return self

    @abstractmethod
    def of(self, rows: Rows) -> Any:
        """The statistic of each query."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(cast(Any, self))
        pairs = [(getattr(self, each.name), each.default) for each in fields]
        given = [
            part.name if isinstance(part, Cell)
            else repr(part) if isinstance(part, (Mask, Score))
            else leaf_repr(part)
            for part, default in pairs
            if part is not default
        ]  # fmt: skip
        return f"{type(self).__name__.lower()}({', '.join(given)})"


def statistics(given: Any) -> list[Any]:
    """The statistics of a pytree, in order."""
    return jax.tree.leaves(given, is_leaf=lambda each: isinstance(each, Stat))


def check_statistics(given: Any) -> None:
    """Checks that the leaves of a pytree are statistics.

    Raises:
      TypeError: for anything else.
    """
    for stat in statistics(given):
        if not isinstance(stat, Stat):
            raise TypeError(
                f"stats: got {described(stat)}, expected a pytree of statistics, as "
                '{"entropy": stats.entropy(), "far": stats.mean(lambda x, b, h, q, k: q - k)}'
            )


def results(given: Any, found: Iterable[Any]) -> Any:
    """A pytree of statistics with their values in their places."""
    tree = jax.tree.structure(given, is_leaf=lambda each: isinstance(each, Stat))
    return jax.tree.unflatten(tree, found)


def bare(given: Any) -> Any:
    """A pytree of statistics without their functions, for which columns stand.

    Calls with new functions that compute the same thing then share a program.
    """

    def stripped(stat: Stat) -> Any:
        fields: dict[str, Any] = {}
        for each in dataclasses.fields(cast(Any, stat)):
            value = getattr(stat, each.name)
            if isinstance(value, Score):
                fields[each.name] = LOGIT
            elif isinstance(value, Mask):
                fields[each.name] = full()
        return dataclasses.replace(cast(Any, stat), **fields)

    return results(given, map(stripped, statistics(given)))


def with_queries(given: Any, moved: Callable[[Array], Array]) -> Any:
    """A pytree of statistics with other weights of queries."""
    return results(given, [stat.with_queries(moved) for stat in statistics(given)])


@pytree
class Cell(Scored):
    """A function of one cell, whose result may be any number."""

    @property
    def name(self) -> str:
        """What the user's function is called."""
        names = (getattr(self.fn, each, None) for each in ("name", "__name__"))
        return next((name for name in names if isinstance(name, str)), type(self.fn).__name__)

    def __call__(
        self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar
    ) -> Float[Array, ""]:
        result = call_user(self.fn, (logit, b, h, q, k), repr(self), "x, b, h, q, k")
        name = named(repr(self), self.fn)
        try:
            number = jnp.asarray(result)
        except (TypeError, ValueError):
            number = None
        real = number is not None and any(jnp.issubdtype(number.dtype, kind) for kind in _REAL)
        if number is None or number.shape != () or not real:
            got = type(result).__name__ if number is None else f"{number.dtype}{list(number.shape)}"
            raise TypeError(f"{name}: for one cell it returned {got}, expected a single number")
        return number.astype(logit.dtype)

    def __repr__(self) -> str:
        return f"stat({self.name})"


def _cell(given: Any, where: str) -> Score:
    if isinstance(given, Score):
        return given
    if isinstance(given, Mask):
        raise TypeError(f"{where}: got the mask {given!r}, expected a function; stats.mass(mask)")
    if not callable(given) or hasattr(given, "dtype"):
        raise TypeError(
            f"{where}: got {type(given).__name__}, expected a function (x, b, h, q, k) -> number"
        )
    return Cell(given, ())


def logit(x: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Scalar:
    """The final logit itself."""
    return x


# The final logit itself.
LOGIT = Cell(logit, ())


@pytree
class Mean(Stat):
    """The statistic that `mean` makes."""

    fn: Score

    @property
    def means(self) -> tuple[Score, ...]:
        return (self.fn,)

    def of(self, rows: Rows) -> Any:
        return rows.means[0] * rows.share


def mean(fn: Callable[..., Any]) -> Stat:
    """The mean of a function by the weights: the sum over keys of `p * fn(x, b, h, q, k)`.

    0 for a query that sees no key. With sinks, weights add up to less than 1.

    Args:
      fn: a function of a final logit and its positions; a mask is for `mass`.

    Returns, from `attention`, float32 `[B, T, N]`.
    """
    return Mean(_cell(fn, "mean(fn)"))


@pytree
class Max(Stat):
    """The statistic that `max` makes."""

    fn: Score

    @property
    def maxima(self) -> tuple[Score, ...]:
        return (self.fn,)

    def of(self, rows: Rows) -> Any:
        return rows.maxima[0]


def max(fn: Callable[..., Any] | None = None) -> Stat:
    """The largest value of a function at a query's visible keys; by default of the final logits.

    -inf for a query that sees no key. No gradient flows through it.
    """
    return Max(LOGIT if fn is None else _cell(fn, "max(fn)"))


def _key(x: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Scalar:
    return k


@pytree
class ArgMax(Stat):
    """The statistic that `argmax` makes."""

    @property
    def largest(self) -> tuple[Score, ...]:
        return (Cell(_key, ()),)

    def of(self, rows: Rows) -> Any:
        # Of weights that are NaN none is the largest.
        return jnp.where(jnp.isfinite(rows.lse), rows.largest[0], -1).astype(jnp.int32)


def argmax() -> Stat:
    """The position of the key with a query's largest weight, the first of several; int32.

    -1 for a query that sees no key, or whose weights are NaN. Exact up to position 2^24.
    """
    return ArgMax()


@pytree
class Received(Stat):
    """The statistic that `received` makes."""

    # A number and not an array, so that it may be an attribute of a module.
    weight: Any = 1.0

    @property
    def queries(self) -> tuple[Any, ...]:
        return (jnp.asarray(self.weight),)

    def with_queries(self, moved: Callable[[Array], Array]) -> Stat:
        return Received(*map(moved, self.queries))

    def of(self, rows: Rows) -> Any:
        return rows.received[0]


def received(weight: Float[ArrayLike, "..."] | None = None) -> Stat:
    """What each key gets: the sum over queries of `weight * p`, `[B, S, N]`.

    It takes a second pass, which is no longer than the first.

    Args:
      weight: of each query, floats that broadcast to `[B, T, N]`; 1 by default.
    """
    if weight is None:
        return Received()
    try:
        array = None if isinstance(weight, (str, bytes)) else jnp.asarray(weight)
    except (TypeError, ValueError, OverflowError):
        array = None
    if array is None or not any(jnp.issubdtype(array.dtype, kind) for kind in _REAL):
        got = getattr(array, "dtype", type(weight).__name__)
        raise TypeError(f"received(weight): got {got}, expected numbers, one for each query")
    return Received(array)


@pytree
class Entropy(Stat):
    """The statistic that `entropy` makes."""

    @property
    def means(self) -> tuple[Score, ...]:
        return (LOGIT,)

    def of(self, rows: Rows) -> Any:
        empty = rows.lse == -jnp.inf
        lse = jnp.where(empty, 0, rows.lse)
        if rows.sinks is None:
            return jnp.where(empty, 0, lse - rows.means[0])
        # A sink of -inf takes no part: 0 * inf is NaN.
        limits = jnp.finfo(lse.dtype)
        sinks = jnp.clip(rows.sinks, limits.min, limits.max)
        level = jnp.logaddexp(lse, sinks)
        found = level - rows.share * rows.means[0] - (1 - rows.share) * sinks
        return jnp.where(empty, 0, found)


def entropy() -> Stat:
    """The entropy of a query's weights in nats: `LSE` minus the mean of the final logits.

    0 for a query that sees no key. A sink counts as one more key: with the logit s of the sink, it
    is `log(e^LSE + e^s) - sum(p * x) - p_sink * s`.
    """
    return Entropy()


@pytree
class Mass(Stat):
    """The statistic that `mass` makes."""

    mask: Mask

    @property
    def means(self) -> tuple[Score, ...]:
        return (Shown(self.mask),)

    @property
    def masks(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def of(self, rows: Rows) -> Any:
        return rows.means[0] * rows.share


@pytree
class Shown(Score):
    """A mask as a function of a cell: 1 where it shows the pair, else 0."""

    mask: Mask

    def __call__(
        self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar
    ) -> Float[Array, ""]:
        return jnp.asarray(self.mask(b, h, q, k)).astype(logit.dtype)

    def __repr__(self) -> str:
        return repr(self.mask)


def mass(mask: MaskLike) -> Stat:
    """The share of a query's weight on the pairs of a mask: sinks, its own document, images."""
    return Mass(as_mask(mask, "mass(mask)"))

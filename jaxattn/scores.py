"""Scores: functions that change the logits of visible pairs, with parameters that learn.

A score is a function of one logit and its positions, `score(logit, b, h, q, k) -> logit`, applied
to `scale * query . key` before the mask removes the masked pairs. Its parameters are leaves:
they may be traced, new values reuse the compiled program, and gradients flow to them.
"""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .checks.arrays import array_of
from .checks.foreign_names import unknown_attribute
from .checks.integers import check_exact, concrete, plain
from .checks.options import flag
from .checks.user_functions import call_user, named, one_float, uncalled
from .masks.conventions import removes
from .masks.mask import Mask, Scalar, attributes, call_repr, leaf_repr
from .pytrees import ByStructure, pytree, static
from .shapes import Array, ArrayLike, Float

__all__ = [
    "Score",
    "alibi",
    "alibi_slopes",
    "bias",
    "chain",
    "relative_bias",
    "score",
    "soft_cap",
    "temperature",
]


if not TYPE_CHECKING:
    # Hidden from type checkers, for which every name would otherwise exist.
    def __getattr__(name: str) -> Any:
        raise unknown_attribute(__name__, name, sys.modules[__name__])


class Score(ByStructure):
    """A function of one logit and its positions.

    The one required method is `__call__(logit, b, h, q, k)`, written for a single pair: the logit
    a float32 (or float64) scalar, the positions int32 scalars. A class of yours needs nothing else,
    and may hold arrays, which learn.

    Scores see 0 in place of the logits of masked pairs. They have to be finite
    there, in value and in gradient, at every pair of positions.
    """

    # The remedy in the error for a score that is given as a mask.
    not_a_mask: ClassVar[str] = (
        "scores change logits and mask no pairs: pass it as score=, beside mask="
    )

    def __call__(
        self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar
    ) -> Float[Array, ""]:
        raise TypeError(f"{type(self).__name__} is a Score without __call__(logit, b, h, q, k)")

    def __repr__(self) -> str:
        return attributes(self)


class BuiltInScore(Score, ABC):
    """A score of the library: a pytree whose fields are its arguments, and one line of maths."""

    @abstractmethod
    def formula(self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        """The logit that takes the place of `logit`."""

    def __call__(
        self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar
    ) -> Float[Array, ""]:
        return one_float(self.formula(logit, b, h, q, k), repr(self)).astype(logit.dtype)

    def __repr__(self) -> str:
        return call_repr(self)


@pytree
class Scored(Score):
    """A score from a user's function `fn(logit, b, h, q, k, *params)` and its parameters."""

    fn: Callable[..., Any] = static()
    params: tuple[Any, ...] = ()

    def __call__(
        self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar
    ) -> Float[Array, ""]:
        args = (logit, b, h, q, k, *self.params)
        result = call_user(self.fn, args, repr(self), "logit, b, h, q, k")
        return one_float(result, named(repr(self), self.fn)).astype(logit.dtype)

    def __repr__(self) -> str:
        if isinstance(traced := getattr(self.fn, "name", None), str):
            return traced
        if isinstance(self.fn, Score):
            return repr(self.fn)
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        return f"score({', '.join([name, *map(leaf_repr, jax.tree.leaves(self.params))])})"


@pytree
class Chain(Score):
    """Scores one after the other, in the order written."""

    parts: tuple[Score, ...]

    def __call__(
        self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar
    ) -> Float[Array, ""]:
        for part in self.parts:
            logit = part(logit, b, h, q, k)
        return logit

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.parts))})"


def as_score(given: Any, where: str = "score") -> Score:
    """A `Score` from a score or from a callable `(logit, b, h, q, k) -> logit`.

    Raises:
      TypeError: for anything else.
    """
    if isinstance(given, Score):
        return given
    if callable(given) and not hasattr(given, "dtype"):
        _check_is_function(given, where)
        uncalled(given, where)
        return Scored(given, ())
    raise TypeError(
        f"{where}: got {type(given).__name__}, expected a Score or a callable "
        "(logit, b, h, q, k) -> logit; an array is added to the logits by scores.bias(array)"
    )


def _check_is_function(given: Any, where: str) -> None:
    if isinstance(given, Mask):
        raise TypeError(
            f"{where}: got the mask {given!r}, expected a Score; masks remove pairs and change no "
            "logits: pass it as mask=, beside score="
        )


def _parameter(given: Any, name: str, ranks: dict[int, str]) -> Any:
    """A float parameter: Python numbers stay as they are, everything else becomes a jax array."""
    expected = " or ".join(ranks.values())
    number = isinstance(given, (int, float))
    array = float(given) if number else array_of(given, name, f"floats {expected}")
    if not isinstance(array, float) and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected floats {expected}")
    if np.ndim(array) not in ranks:
        raise ValueError(f"{name}: got shape {list(np.shape(array))}, expected {expected}")
    return array


def _per_head(parameter: Any, h: Any, dtype: Any) -> Any:
    return jnp.asarray(parameter[h] if np.ndim(parameter) else parameter, dtype)


@pytree
class Alibi(BuiltInScore):
    """The score that `alibi` makes."""

    slopes: Any

    def formula(self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        distance = jnp.abs(q - k).astype(logit.dtype)
        return logit - _per_head(self.slopes, h, logit.dtype) * distance


def alibi(slopes: Float[ArrayLike, "*N"] | float) -> Score:
    """Attention with linear biases: `logit - slopes[h] * |q - k|`.

    Args:
      slopes: one a head, `[N]`, or one for all; `alibi_slopes(N)` are the paper's.

    Source: ALiBi, arXiv 2108.12409.
    """
    return Alibi(_parameter(slopes, "alibi(slopes)", {0: "[]", 1: "[N]"}))


def alibi_slopes(heads: int) -> Float[Array, "heads"]:
    """The slopes of ALiBi: `2 ** (-8 i / n)` for i = 1..n where n heads are a power of two.

    For other numbers, the slopes of the largest power of two below, then every other one of the
    next. Source: arXiv 2108.12409, section 3.
    """
    heads = plain(heads, "alibi_slopes(heads)", 1)
    below = 2 ** (heads.bit_length() - 1)

    def slopes(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    return jnp.asarray(slopes(below) + slopes(2 * below)[::2][: heads - below], jnp.float32)


@pytree
class SoftCap(BuiltInScore):
    """The score that `soft_cap` makes."""

    cap: Any

    def formula(self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        cap = _per_head(self.cap, h, logit.dtype)
        return cap * jnp.tanh(logit / cap)


def soft_cap(cap: Float[ArrayLike, "*N"] | float) -> Score:
    """Logits kept within (-cap, cap): `cap * tanh(logit / cap)`.

    Args:
      cap: a positive float, or one a head, `[N]`.

    Source: Gemma 2, arXiv 2408.00118, section 2.
    """
    parameter = _parameter(cap, "soft_cap(cap)", {0: "[]", 1: "[N]"})
    _positive(parameter, "soft_cap(cap)")
    return SoftCap(parameter)


def _positive(parameter: Any, name: str) -> None:
    values = concrete(parameter)
    if values is not None and not (values > 0).all():
        raise ValueError(f"{name}: got {parameter}, expected a number above 0")


@pytree
class Temperature(BuiltInScore):
    """The score that `temperature` makes."""

    temperature: Any

    def formula(self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        return logit / _per_head(self.temperature, h, logit.dtype)


def temperature(temperature: Float[ArrayLike, "*N"] | float) -> Score:
    """Softmax temperature: `logit / temperature`.

    Args:
      temperature: a positive float, or one a head, `[N]`; above 1 flattens the weights.
    """
    parameter = _parameter(temperature, "temperature(temperature)", {0: "[]", 1: "[N]"})
    _positive(parameter, "temperature(temperature)")
    return Temperature(parameter)


def _bucket(distance: Any, buckets: int, max_distance: Any, bidirectional: bool) -> Any:
    """T5's bucket of `distance = k - q`."""
    offset: Any = 0
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # The logarithm's branch is taken for larger distances only; max() keeps it finite elsewhere.
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
    growth = jnp.log(ratio) / jnp.log(max_distance / exact) * (buckets - exact)
    far = jnp.minimum(exact + growth.astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


@pytree
class RelativeBias(BuiltInScore):
    """The score that `relative_bias` makes."""

    table: Any
    max_distance: Any = field(kw_only=True)
    bidirectional: bool = static(default=True, kw_only=True)

    def formula(self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        buckets = self.table.shape[1]
        bucket = _bucket(k - q, buckets, self.max_distance, self.bidirectional)
        return logit + self.table[h, bucket].astype(logit.dtype)


def relative_bias(
    table: Float[ArrayLike, "N buckets"], *, max_distance: int = 128, bidirectional: bool = True
) -> Score:
    """T5's learned bias by bucketed distance: `logit + table[h, bucket(k - q)]`.

    Half of the buckets (of each direction) are single distances, the other half grow
    logarithmically up to `max_distance`; all beyond share the last.

    Args:
      table: `[N, buckets]`; T5 learns 32 buckets. (T5's checkpoints hold it as `[buckets, N]`.)
      max_distance: where the last bucket begins.
      bidirectional: as in T5's encoder, half of the buckets are for keys after the query; False,
        as in its decoder, spends all on keys before it.

    Source: T5, arXiv 1910.10683, section 2.1.
    """
    array = _parameter(table, "relative_bias(table)", {2: "[N, buckets]"})
    both = flag(bidirectional, "relative_bias(bidirectional)")
    least = 4 if both else 2
    if array.shape[1] < least or (both and array.shape[1] % 2):
        raise ValueError(
            f"relative_bias(table): got {array.shape[1]} buckets, expected at least {least}"
            + (" and an even number" if both else "")
        )
    exact = array.shape[1] // (4 if both else 2)
    max_distance = plain(max_distance, "relative_bias(max_distance)", 1)
    if max_distance <= exact:
        raise ValueError(
            f"relative_bias(max_distance): got {max_distance}, expected more than {exact}, the "
            "distances that have a bucket each"
        )
    return RelativeBias(array, max_distance=float(max_distance), bidirectional=both)


@pytree
class Bias(BuiltInScore):
    """`logit + array[q, k]`, or `logit + array[b, h, q, k]`; the array may hold -inf."""

    array: Any

    def formula(self, logit: Scalar, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        if np.ndim(self.array) == 2:
            return logit + self.array[q, k].astype(logit.dtype)
        # An extent of 1 means "the same for all"; the shape says which axes have it.
        index = (0 if n == 1 else at for n, at in zip(self.array.shape, (b, h, q, k), strict=True))
        return logit + self.array[tuple(index)].astype(logit.dtype)


def bias(array: Float[ArrayLike, "..."]) -> Score:
    """An array added to the logits: `logit + array[b, h, q, k]`.

    Args:
      array: finite floats `[T, S]` or `[B|1, N|1, T|1, S|1]`. It learns like any parameter. Use a
        mask to remove pairs: numbers like -1e9 in a bias raise a warning. Where `positions=` are
        given the array has to have an entry for each: known positions beyond it raise an error,
        traced ones give NaN for visible pairs.
    """
    values = concrete(array)
    if values is not None and (values == -np.inf).any():
        raise ValueError(
            "bias(array): got -inf, expected finite floats; use a mask to remove pairs: "
            "masks.from_array(array, 'additive')"
        )
    allowed = {2: "[T, S]", 4: "[B|1, N|1, T|1, S|1]"}
    parameter = _parameter(array, "bias(array)", allowed)
    if values is not None and (low := values <= removes(parameter.dtype)).any():
        warnings.warn(
            f"bias(array): got {values[low].flat[0]:g}, as in an array that removes pairs; a "
            "bias leaves them visible: none is skipped, and a query without another visible key "
            "attends to them. masks.from_array(array, 'additive') reads such an array as a mask",
            stacklevel=2,
        )
    return Bias(parameter)


def chain(*parts: Any) -> Score:
    """Scores one after the other, in the order written: `chain(f, g)` is `g(f(logit))`."""
    if not parts:
        raise ValueError("chain(): got no scores, expected at least one")
    return Chain(tuple(as_score(part, f"chain(scores[{i}])") for i, part in enumerate(parts)))


def score(fn: Callable[..., Any], *params: Any) -> Score:
    """Any function of a logit and its positions: `fn(logit, b, h, q, k, *params) -> logit`.

    Args:
      fn: a pure function for one cell; FlexAttention's `score_mod` signature.
      *params: arrays it reads, passed after the positions. They are leaves, and learn; so do
        float arrays that the function closes over.
    """
    if not callable(fn):
        raise TypeError(f"score(fn): got {type(fn).__name__}, expected fn(logit, b, h, q, k, ...)")
    _check_is_function(fn, "score(fn)")
    if isinstance(fn, Score):
        if params:
            raise TypeError(f"score(fn): got the score {fn!r} with parameters, expected a function")
        return fn
    check_exact(params, "score(params)")
    return Scored(fn, params)

"""Checks the arguments of `attention`, and makes a `Call` of them."""

from __future__ import annotations

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from .backends import base
from .backends.base import Call
from .checks import options
from .checks.arrays import array_of, described
from .checks.integers import concrete
from .masks.mask import Mask, PerHead, as_mask, check_tokens, parts_of
from .masks.positions import Positions, as_positions
from .scores import Score, as_score
from .shapes import Array, ArrayLike
from .stats import LOGIT, bare, check_statistics, statistics
from .tiles.tile_map import TileMap
from .tracing.out_of_range import guarded
from .tracing.split import Split, split


class Options(TypedDict, total=False):
    """Keyword arguments of `attention`, but for `return_lse` and `stats`, for type checkers."""

    mask: Any
    score: Any
    scale: Any
    sinks: ArrayLike | None
    positions: Positions | None
    dropout_rate: Any
    dropout_seed: Any
    precision: Any
    backend: str


def checked_call(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    sinks: Any = None,
    positions: Any = None,
    dropout_rate: Any = 0.0,
    dropout_seed: Any = None,
    precision: Any = None,
    stats: Any = None,
) -> Call:
    """The arguments of `attention` as a `Call`; arguments without a batch become one row.

    The mask and the score are split here, once for everything that looks at them later.

    Raises:
      TypeError, ValueError: for arguments that do not fit; the message names the argument, what
        came, what was expected, and the remedy.
    """
    arrays = {"query": query, "key": key, "value": value}
    query, key, value = (_array(name, given) for name, given in arrays.items())
    batched = query.ndim == 4
    for name, array in (("key", key), ("value", value)):
        if array.ndim != query.ndim:
            raise ValueError(
                f"{name}: got shape {list(array.shape)}, expected rank {query.ndim} as of the "
                f"query, {list(query.shape)}"
            )
    if not batched:
        query, key, value = map(_one_row, (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"key, value: got dtypes {key.dtype}, {value.dtype}, expected {query.dtype}, the "
            "query's; cast them"
        )
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    for name, array, expected in (
        ("key", key, [B, "S", "K", H]),
        ("value", value, [B, S, K, "Hv"]),
    ):
        fits = all(isinstance(e, str) or e == n for n, e in zip(array.shape, expected, strict=True))
        if not fits:
            raise ValueError(
                f"{name}: got shape {_shown(array, batched)}, expected "
                f"[{', '.join(map(str, expected if batched else expected[1:]))}] with a query of "
                f"shape {_shown(query, batched)}; axes are [batch, length, heads, head dimension]"
            )
    if K == 0 or N % K:
        raise ValueError(
            f"key: got {K} heads, expected a divisor of the query's {N}: every key head serves "
            "N / K query heads"
        )
    at = as_positions(positions).checked(B, N, T, S)
    tiles, visible, scored = None, None, None
    if mask is not None:
        if isinstance(mask, TileMap):
            tiles, mask = mask.for_call(B, N, T, S, positions), mask.mask
        mask = _mask(mask, B, N, T, S)
        _check_mask(mask, "mask", at, (B, N, T, S))
    if mask is not None and not _has_nothing(mask, B, N, T, S):
        visible = split(mask, at)
        visible.check_extents(B, N, T, S)
        if positions is not None and tiles is None:
            visible = split(guarded(visible.given, positions, (B, N, T, S)), at)
    score = None if score is None else as_score(score)
    if score is not None and not _has_nothing(score, B, N, T, S):
        logit = base.accumulator(query.dtype)
        scored = split(score, at, logit=logit)
        scored.check_extents(B, N, T, S)
        if positions is not None:
            seen = None if visible is None else visible.given
            inside = guarded(scored.given, positions, (B, N, T, S), mask=seen, logit=logit)
            scored = split(inside, at, logit=logit)
    means, maxima, largest = _columns(
        stats, positions, at, visible, base.accumulator(query.dtype), (B, N, T, S)
    )
    return Call(
        query=query,
        key=key,
        value=value,
        mask=visible,
        score=scored,
        scale=_scale(scale, H),
        sinks=_sinks(sinks, N),
        positions=at,
        dropout=_dropout(dropout_rate, dropout_seed),
        stats=bare(stats),
        means=means,
        maxima=maxima,
        largest=largest,
        tiles=tiles,
        precision=options.precision(precision, "precision"),
    )


def _columns(
    given: Any,
    positions: Positions | None,
    at: Positions,
    visible: Split[Mask] | None,
    logit: Any,
    sizes: tuple[int, int, int, int],
) -> list[tuple[Split[Score], ...]]:
    """The functions of which statistics need means, maxima, and values at the largest logit."""
    seen = None if visible is None else visible.given

    def column(fn: Score) -> Split[Score]:
        part = split(fn, at, logit=logit)
        try:
            part.check_extents(*sizes)
        except ValueError as error:
            error.add_note(f"It is read by {fn!r}, in stats=.")
            raise
        if positions is None:
            return part
        return split(guarded(fn, positions, sizes, mask=seen, logit=logit), at, logit=logit)

    found: list[list[Split[Score]]] = [[], [], []]
    check_statistics(given)
    for stat in statistics(given):
        for mask in stat.masks:
            _check_mask(mask, "mass(mask)", at, sizes)
        for fns, parts in zip((stat.means, stat.maxima, stat.largest), found, strict=True):
            parts += map(column, fns)
    check_weights(given, sizes[:3])
    _, maxima, largest = found
    if largest:
        maxima.append(column(LOGIT))
    return [tuple(parts) for parts in found]


def _check_mask(mask: Mask, name: str, at: Positions, sizes: tuple[int, int, int, int]) -> None:
    """Checks what masks say of the numbers of tokens and heads that they are for."""
    _, N, T, S = sizes
    check_tokens(mask, at, T, S, name)
    if at.h is None:
        _check_heads(mask, N, name)


def check_weights(stats: Any, sizes: tuple[int, int, int]) -> None:
    """Checks that weights of queries in statistics broadcast to `[B, T, N]`, for sizes B, N, T.

    Raises:
      ValueError: for other shapes.
    """
    B, N, T = sizes
    for weight in (weight for stat in statistics(stats) for weight in stat.queries):
        full = (B, T, N)[3 - min(weight.ndim, 3) :]
        if weight.ndim > 3 or any(n not in (1, e) for n, e in zip(weight.shape, full, strict=True)):
            raise ValueError(
                f"received(weight): got shape {list(weight.shape)}, expected what broadcasts to "
                f"[B, T, N] = [{B}, {T}, {N}], a number for each query"
            )


def swapped(call: Call) -> str | None:
    """A warning for a call whose lengths and heads look exchanged, or None.

    They look so in self-attention with more heads than tokens, if no array in the mask or score has
    the length of the tokens. This is a guess; nothing proves it.
    """
    _, T, S, N, K, *_ = call.sizes
    if base.symbolic(T, S) or not (1 < T == S and N == K and N > T):
        return None
    for part in (call.mask, call.score):
        if part is not None and any(extent.position in "qk" for _, extent in part.plan.axis_reads):
            return None
    return (
        f"query: got {T} tokens with {N} heads; axes are [batch, length, heads, head dimension]. "
        f"If these are {T} heads of {N} tokens, swap them: jnp.swapaxes(query, -3, -2), and "
        "likewise key and value"
    )


def _shown(array: Any, batched: bool) -> list[int]:
    return list(array.shape if batched else array.shape[1:])


def _one_row(array: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1, *array.shape), array.dtype)
    return array[None]


def _array(name: str, given: Any) -> Any:
    array = given
    if not isinstance(given, jax.ShapeDtypeStruct):
        array = array_of(given, name, "an array")
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.itemsize < 2:
        raise TypeError(
            f"{name}: got dtype {array.dtype}, expected float16, bfloat16, float32 or float64"
        )
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{name}: got shape {list(array.shape)}, expected [batch, length, heads, head "
            "dimension] or, without a batch, [length, heads, head dimension]"
        )
    return array


def _mask(given: Any, B: int, N: int, T: int, S: int) -> Mask:
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        mask, shape = as_mask(given), tuple(given.shape)
        full = (T, S) if len(shape) == 2 else (B, N, T, S)
        broadcasts = len(shape) == 4
        allowed = all(n == e or (broadcasts and n == 1) for n, e in zip(shape, full, strict=True))
        if not allowed:
            expected = (
                f"[T, S] = [{T}, {S}]" if len(shape) == 2 else (f"[{B}|1, {N}|1, {T}|1, {S}|1]")
            )
            raise ValueError(
                f"mask: got a boolean array of shape {list(shape)}, expected {expected}; for "
                "[B, S] padding use masks.key_padding(valid)"
            )
        return mask
    return as_mask(given)


def _has_nothing(part: Mask | Score, *sizes: int) -> bool:
    """Whether a mask or score has an array without entries, for a call without pairs.

    A function that reads such an array can't even be traced.
    """
    return 0 in sizes and any(0 in np.shape(leaf) for leaf in jax.tree.leaves(part))


def _check_heads(mask: Mask, N: int, name: str) -> None:
    """Checks that `per_head` has one mask for each query head."""
    if isinstance(mask, PerHead) and len(mask.parts) != N:
        raise ValueError(
            f"{name}: got per_head of {len(mask.parts)} masks, expected {N}, one for each query "
            "head"
        )
    for part in parts_of(mask):
        _check_heads(part, N, name)


def _real(name: str, given: Any, expected: str) -> Any:
    """One real number. Python integers become floats, so that 1 and 1.0 share a program."""
    try:
        array = given if hasattr(given, "dtype") else np.asarray(given)
        number = np.ndim(array) == 0 and not isinstance(given, (str, bytes))
        kinds = (np.floating, np.integer)
        if number and any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            return float(given) if isinstance(given, int) else given
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name}: got {described(given)}, expected {expected}")


def _scale(given: Any, H: int) -> Any:
    if given is None:
        return float(max(H, 1) ** -0.5)
    number = _real("scale", given, "one real number")
    if not isinstance(number, jax.core.Tracer) and not np.isfinite(number):
        raise ValueError(f"scale: got {number}, expected a finite number")
    return number


def _dropout(rate: Any, seed: Any) -> base.Dropout | None:
    rate = _real("dropout_rate", rate, "a probability from 0 to 1")
    is_known = not isinstance(rate, jax.core.Tracer)
    if is_known and not 0 <= float(rate) <= 1:
        raise ValueError(f"dropout_rate: got {rate!r}, expected a probability from 0 to 1")
    array = None if seed is None else _seed(seed)
    if is_known and float(rate) == 0:
        return None
    if array is None:
        raise ValueError(
            f"dropout_seed: got None with dropout_rate={rate}, expected a uint32 or a "
            "jax.random.key; dropout_rate=0.0 turns dropout off"
        )
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(array).reshape(-1, 2)
        return base.Dropout(rate, words[0] if len(words) == 1 else words[0] ^ words[1])
    wide = array.dtype.itemsize > 4
    words = jnp.asarray(array.astype(np.uint32))
    if words.ndim:
        return base.Dropout(rate, words)
    # Both halves of a traced seed of 64 bits.
    upper = (array >> 32).astype(np.uint32) if wide else 0
    return base.Dropout(rate, jnp.stack([words, jnp.asarray(upper, jnp.uint32)]))


def _seed(seed: Any) -> Any:
    """A seed as an array, checked, without an operation that could be traced: it may be unused."""
    expected = "a uint32 or a jax.random.key"
    if isinstance(seed, (int, np.integer)) and not 0 <= seed < 2**32:
        raise ValueError(
            f"dropout_seed: got {seed}, expected 0 <= seed < 2**32 or a jax.random.key; "
            "jax.random.key(seed) takes larger ones"
        )
    array = seed
    if not isinstance(seed, jax.Array):
        array = array_of(seed, "dropout_seed", expected, np.asarray)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        if array.shape != ():
            raise ValueError(f"dropout_seed: got keys of shape {list(array.shape)}, expected one")
        return array
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape not in ((), (2,)):
        got = type(seed).__name__ if array.dtype.hasobject else f"{array.dtype}{list(array.shape)}"
        raise TypeError(f"dropout_seed: got {got}, expected {expected}")
    values = concrete(array) if array.dtype.itemsize > 4 else None
    if values is not None and ((values < 0) | (values >= 2**32)).any():
        raise ValueError(
            f"dropout_seed: got {values}, expected numbers from 0 to 2**32 - 1 or a jax.random.key"
        )
    return array


def _sinks(given: Any, heads: int) -> Array | None:
    if given is None:
        return None
    array = array_of(given, "sinks", f"floats [N] = [{heads}]")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"sinks: got dtype {array.dtype}, expected floats [N] = [{heads}]")
    if array.shape != (heads,):
        raise ValueError(f"sinks: got shape {list(array.shape)}, expected [N] = [{heads}]")
    return array

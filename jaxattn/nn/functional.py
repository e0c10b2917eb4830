"""What attention modules do between their projections; linen and nnx share it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..attention import attention, attention_weights
from ..caches.cache import Cache, over
from ..caches.kv_cache import KVCache
from ..checks import options
from ..checks.arrays import array_of, described
from ..checks.integers import plain
from ..checks.user_functions import named, uncalled
from ..masks.mask import Mask, as_mask
from ..masks.positions import Positions, as_positions
from ..pytrees import ByStructure, pytree
from ..scores import Score
from ..shapes import Array, Float, Int
from ..stats import check_statistics, statistics

C = TypeVar("C", bound=Cache)

# What makes each attribute of a function of positions.
_WRAPPED = {"mask": "masks.predicate(fn)", "score": "scores.score(fn)", "stats": "stats.mean(fn)"}


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of `MultiHeadAttention`, apart from `cache`, for type checkers."""

    mask: Any
    score: Any
    stats: Any
    positions: Any
    rope_positions: Array | None
    counts: Array | None
    deterministic: bool | None
    sow_weights: bool


class BlockOptions(AttentionOptions, total=False):
    """Keyword arguments of `TransformerBlock`, apart from `cache`, for type checkers."""

    memory: Array | Cache | None
    memory_mask: Any


def sizes(
    module: str, features: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """Key heads and head dimension, checked.

    Raises:
      TypeError: for what is no integer.
      ValueError: for sizes below 1, and head counts that do not divide.
    """
    plain(num_heads, f"{module}(num_heads)", 1)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check_sizes(module, qkv_features=features, head_dim=head_dim, num_kv_heads=kv_heads)
    if head_dim is None and features % num_heads:
        raise ValueError(
            f"{module}(qkv_features): got {features}, expected a multiple of "
            f"num_heads={num_heads}; or give head_dim"
        )
    if num_heads % kv_heads:
        raise ValueError(
            f"{module}(num_kv_heads): got {kv_heads}, expected a divisor of num_heads={num_heads}"
        )
    return kv_heads, features // num_heads if head_dim is None else head_dim


def check_rngs(name: str, rngs: Any, stream: str) -> None:
    """Checks that what should be `nnx.Rngs` has a stream of random numbers."""
    if not callable(getattr(rngs, stream, None)):
        raise TypeError(f"{name}: got {described(rngs)}, expected nnx.Rngs, as nnx.Rngs(0)")


def check_size(module: str, name: str, size: Any) -> None:
    """Checks a number on which shapes depend."""
    plain(size, f"{module}({name})", 1)


def check_sizes(module: str, **sizes: int | None) -> None:
    """Checks numbers on which shapes depend; None is left for others to fill in."""
    for name, size in sizes.items():
        if size is not None:
            check_size(module, name, size)


def check_rate(module: str, rate: float) -> None:
    """Checks a dropout rate, also where it is not used."""
    number = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool)
    if not number or not 0 <= rate <= 1:
        raise ValueError(
            f"{module}(dropout_rate): got {described(rate)}, expected a probability from 0 to 1"
        )


def check_types(module: str, dtype: Any, param_dtype: Any) -> None:
    """Checks the dtypes of a module; that of the computation may be None."""
    if dtype is not None:
        options.dtype(dtype, f"{module}(dtype)")
    options.dtype(param_dtype, f"{module}(param_dtype)")


def check_attributes(module: str, rope: Any, precision: Any, flags: dict[str, Any]) -> Any:
    """Checks attributes of attention that are read only where they are used.

    Returns:
      The precision, a name as what it names.
    """
    check_flags(module, flags)
    named = options.precision(precision, f"{module}(precision)")
    if rope is not None and (isinstance(rope, type) or not callable(rope)):
        uncalled(rope, f"{module}(rope)")
        raise TypeError(
            f"{module}(rope): got {described(rope)}, expected a RoPE, or a function of "
            "[B, T, N, H] and positions"
        )
    return named


def check_flags(module: str, flags: dict[str, Any]) -> None:
    """Checks attributes that are True or False; `deterministic` may be None too."""
    for name, given in flags.items():
        if name != "deterministic" or given is not None:
            options.flag(given, f"{module}({name})")


def check_functions(module: str, **functions: Any) -> None:
    """Checks that attributes are functions, or what is called like one."""
    for name, given in functions.items():
        if not callable(given):
            raise TypeError(f"{module}({name}): got {described(given)}, expected a function")


def check_memory(memory: Any, mask: Any) -> None:
    """Checks that no mask is given of a memory that is not there."""
    if memory is None and mask is not None:
        raise ValueError(
            "memory_mask: got a value without a memory, expected None; the mask of self-attention "
            "is mask="
        )


def check_call(deterministic: Any, sow_weights: Any, stats: Any) -> None:
    """Checks arguments of a call that may not be used in it."""
    options.optional_flag(deterministic, "deterministic")
    options.flag(sow_weights, "sow_weights")
    check_statistics(stats)


def axes_of(module: str, sharding: Any) -> tuple[str | None, str | None, str | None]:
    """The mesh axes for features, heads and head dimension; without a sharding none."""
    if sharding is None:
        return None, None, None
    try:
        names = () if isinstance(sharding, (str, bytes, dict)) else tuple(sharding)
    except TypeError:
        names = ()
    if len(names) != 3 or not all(each is None or isinstance(each, str | tuple) for each in names):
        raise ValueError(
            f"{module}(sharding): got {sharding!r}, expected mesh axes for (features, heads, head "
            'dimension), such as ("data", "model", None)'
        )
    by_feature, by_head, by_dim = names
    return by_feature, by_head, by_dim


@pytree
class Asked(ByStructure):
    """Statistics as an attribute of a module, where a dictionary or a list would have no hash."""

    stats: Any

    def __repr__(self) -> str:
        return repr(self.stats)


def asked(stats: Any) -> Any:
    """Statistics, or a function that makes them, as an attribute."""
    return stats if stats is None or callable(stats) or isinstance(stats, Asked) else Asked(stats)


def made(module: str, name: str, attribute: Any) -> Any:
    """What a module's attribute says: the mask, score or statistics, or what their factory makes.

    Raises:
      TypeError: for a function of positions, which is no factory.
      ValueError: for one with arrays: in a module they would be constants of the program.
    """
    if callable(attribute) and not isinstance(attribute, (Mask, Score)):
        _check_is_factory(f"{module}({name})", attribute, _WRAPPED[name])
        return attribute()
    if any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(attribute)):
        raise ValueError(
            f"{module}({name}): got {attribute!r}, which holds arrays; expected one without, "
            f"or a function that makes it; the call takes it as {name}=, where its arrays are "
            "arguments of the program"
        )
    found = attribute.stats if isinstance(attribute, Asked) else attribute
    if name == "stats":
        check_statistics(found)
    return found


def _check_is_factory(where: str, given: Callable[..., Any], wrapped: str) -> None:
    try:
        taken = inspect.signature(given)
    except ValueError:
        # Those of some types of Python's own are not known.
        uncalled(given, where)
        return
    try:
        taken.bind()
    except TypeError:
        uncalled(given, where)
        raise TypeError(
            f"{named(where, given)}: got a function of ({', '.join(taken.parameters)}), expected "
            f"one that is called without arguments and makes it; for a function of positions: "
            f"{wrapped}"
        ) from None


def check_norm(norm: str) -> None:
    """Checks the name that says where a block has its norms."""
    if norm not in ("pre", "post"):
        raise ValueError(f"TransformerBlock(norm): got {norm!r}, expected 'pre' or 'post'")


def check_inputs(name: str, given: Any, width: int | None) -> None:
    """Checks an array to be projected: its features, where their number is known.

    Raises:
      TypeError: for anything but an array of numbers; for a mask, the message says to give it by
        name.
      ValueError: for another number of features, and for more than one batch axis.
    """
    shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
    if isinstance(given, Mask) or dtype == jnp.bool_ or (shape is None and callable(given)):
        what = f"{given!r}" if shape is None else f"booleans {list(shape)}"
        raise TypeError(
            f"{name}: got {what}, which reads as a mask, expected an array [B, T, features]; a "
            "mask is given by name, as layer(x, mask=...)"
        )
    if shape is None or dtype is None:
        raise TypeError(
            f"{name}: got {type(given).__name__}, expected an array [B, T, features] or "
            "[T, features]"
        )
    features = "features" if width is None else width
    if len(shape) not in (2, 3) or width not in (None, shape[-1]):
        raise ValueError(
            f"{name}: got shape {list(shape)}, expected [B, T, {features}] or [T, {features}], the "
            "features that the module was made for"
        )


def _check_cache(name: str, cache: Cache, query: Array, key: Array | None) -> None:
    """Checks that a cache fits this module and this batch."""
    if not isinstance(cache, Cache):
        raise TypeError(
            f"{name}: got {type(cache).__name__}, expected a cache, as of ja.KVCache.create"
        )
    batch, (K, H) = cache.length.shape[0], cache.key[0].shape[1::2]
    B, _, N, width = query.shape
    fits = (batch, H, N % K) == (B, width, 0)
    heads = f"a divisor of {N} as heads"
    if key is not None:
        fits, heads = fits and key.shape[2] == K, f"heads={key.shape[2]}"
    if not fits:
        raise ValueError(
            f"{name}: got {cache!r}, expected batch={B}, head_dim={width} and {heads}, those of "
            "the inputs and of this module; create it with these sizes, one for each layer"
        )
    if cache.dtype != query.dtype:
        raise TypeError(
            f"{name}: got {cache!r}, expected dtype={query.dtype}, that of the queries; create it "
            f"with dtype=jnp.{query.dtype}, and stored= for what its memory holds, or give the "
            f"module dtype=jnp.{cache.dtype}"
        )


def both(first: Any, second: Any) -> Any:
    """The mask of the pairs that both allow; `None` allows all."""
    if first is None or second is None:
        return second if first is None else first
    return as_mask(first) & second


def remembered(
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    rope: Callable[[Array, Array], Array] | None,
) -> KVCache:
    """A cache with projected keys and values, for any number of calls."""
    if key.ndim != 4:
        raise ValueError(
            f"remember(inputs_kv): got keys of shape {list(key.shape)}, expected a batch: "
            "inputs [B, S, features]"
        )
    B, S, K, H = key.shape
    key = key if rope is None else rope(key, jnp.arange(S))
    empty = KVCache.create(B, S, K, H, value_dim=value.shape[-1], dtype=key.dtype)
    return empty.append(key, value)


def of_queries(x: Array, positions: Positions | None, cache: Cache | None) -> Positions | None:
    """Where the tokens of a block are, also as they attend to a memory: part of a sequence gives
    what the whole gives."""
    q = as_positions(positions).q if cache is None else cache.upcoming(x.shape[-2])
    return None if q is None else Positions(q=q)


def attend(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"] | None,
    value: Float[Array, "*B S K Hv"] | None,
    *,
    memory: Cache | None = None,
    cache: Cache | None = None,
    counts: Int[Array, "B"] | None = None,
    rope: Callable[[Array, Array], Array] | None = None,
    rope_positions: Int[Array, "*Bp T"] | None = None,
    positions: Positions | None = None,
    sow: Callable[[str, Any], Any],
    sow_weights: bool = False,
    stats: Any = None,
    **options: Any,
) -> tuple[Array, Cache | None]:
    """Rotary embeddings, the cache, and attention, in that order.

    Args:
      query, key, value: projected; key and value are None if there is a memory.
      memory: a cache to attend to, to which nothing is appended.
      cache: a cache to which key and value are appended.
      sow: a function that is given "attention_weights" with the weights, if `sow_weights`, and
        "attention_stats" with the values of the statistics, if there are any.
      **options: those of `attention`.

    Returns:
      The output, and the cache after; `None` without one.
    """
    given = as_positions(positions)
    T, N, _ = query.shape[-3:]
    if cache is not None and (memory is not None or positions is not None):
        name = "inputs_kv" if memory is not None else "positions"
        raise ValueError(
            f"{name}: got a value, and cache= a {type(cache).__name__}; expected only one of them: "
            "a cache has the positions of its keys"
        )
    if rope_positions is not None:
        rope_positions = _turning(rope_positions, query)
    if counts is not None and cache is None:
        raise ValueError(
            "counts: got a value without a cache, expected None: counts are the tokens that a "
            "cache keeps; without one, use mask=masks.key_padding(lengths=counts)"
        )
    if memory is not None and (given.b, given.h, given.k) != (None, None, None):
        raise ValueError(
            "positions: got more than q with a memory, expected only q: the memory has the "
            "positions of its keys"
        )
    if (cache is not None or memory is not None) and query.ndim != 4:
        raise ValueError(
            f"inputs_q: got queries of shape {list(query.shape)} with a cache, expected a batch: "
            "inputs [B, T, features]"
        )
    if cache is not None:
        _check_cache("cache", cache, query, key)
    if memory is not None:
        _check_cache("inputs_kv", memory, query, None)
    if key is not None and key.shape[:-3] != query.shape[:-3]:
        raise ValueError(
            f"inputs_kv: got a batch of {list(key.shape[:-3])}, expected "
            f"{list(query.shape[:-3])}, that of inputs_q"
        )
    B = query.shape[0] if query.ndim == 4 else 1
    given = given.checked(B, N, T, T if key is None else key.shape[-3])
    q_at = cache.upcoming(T) if cache is not None else _counted(given.q, query)
    if rope is not None:
        query = rope(query, q_at if rope_positions is None else rope_positions)
        if key is not None:
            of_keys = q_at if cache is not None else _counted(given.k, key)
            key = rope(key, of_keys if rope_positions is None else _turning(rope_positions, key))
    watched = bool(statistics(stats))
    if watched:
        options["stats"] = stats
    if cache is None and memory is None:
        assert key is not None
        assert value is not None
        keys, at = key, given
        out: Any = attention(query, key, value, positions=at, **options)
    else:
        # Without a named backend, the cache takes the one made for few queries.
        asked = {n: o for n, o in options.items() if (n, o) != ("backend", "auto")}
        q_at = jnp.broadcast_to(q_at, query.shape[:2])
        if memory is not None:
            out, source = over(memory, query, q_at, **asked), memory
        else:
            assert cache is not None
            assert key is not None
            assert value is not None
            out, cache = cache.step(query, key, value, counts, **asked)
            source = cache
        if sow_weights:
            options |= {"mask": both(options["mask"], source.mask)}
            keys, at = source.read()[0], Positions(q=q_at, k=source.positions)
    if watched:
        out, seen = out
        sow("attention_stats", seen)
    if sow_weights:
        of = {name: options[name] for name in ("mask", "score", "sinks", "precision")}
        sow("attention_weights", attention_weights(query, keys, positions=at, **of))
    return out, cache


def _counted(positions: Any, x: Float[Array, "*B T N H"]) -> Int[Array, "..."]:
    """Checked positions of tokens, by default 0, 1, 2, ..."""
    if positions is None:
        return jnp.arange(x.shape[-3], dtype=jnp.int32)
    return positions if x.ndim == 4 else positions[0]


def _turning(positions: Any, x: Float[Array, "*B T N H"]) -> Array:
    """`rope_positions`, checked: they would else broadcast to tokens that they do not belong to."""
    found = array_of(positions, "rope_positions", "integers [T] or [B, T]")
    if not any(jnp.issubdtype(found.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(f"rope_positions: got dtype {found.dtype}, expected integers")
    *batch, T = x.shape[:-2]
    fits = [(T,), *((n, T) for n in (*batch, 1) if batch)]
    if found.shape not in fits:
        expected = " or ".join(str(list(shape)) for shape in fits[: 1 + len(batch)])
        raise ValueError(
            f"rope_positions: got shape {list(found.shape)}, expected {expected}, one for each of "
            "the queries and keys; where these are not as many, positions=Positions(q=, k=)"
        )
    return found

"""NaN and infinities: engines never see them, and results have them where the mask says so.

Engines multiply whole tiles, where a weight of 0 times NaN is NaN. So they are given finite
numbers, or replace others themselves where they copy them (`Engine.cleans`). If a number was not
finite, the mask is evaluated once more to find what it reaches. In the forward this is
`formula.reach`, pair by pair. In the backward, affected rows get weights of NaN: these make the
gradients of what the rows see NaN, and no others. If everything is finite, this costs one pass over
the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...mesh import constant
from ...shapes import Array, Bool
from .. import base, formula
from ..problem import Config, Gradients, Inputs, by_key_head, joined
from .operands import backward_rows, cleaned, padded

# Products below this are finite in float32, in powers of 2 too.
_LARGE = 1e37


def forward(config: Config, x: Inputs) -> tuple[Array, Array]:
    """Output `[B, T, N, Hv]` and LSE `[B, T, N]` by the config's engine."""
    engine = config.engine
    assert engine is not None
    if engine.decided is not None:
        out, lse = _by_engine(config, x, engine.decided)
        return _with_nonfinite(config, x, out), lse
    out, lse = _by_engine(config, x, engine.forward)
    if engine.exact:
        return out, lse

    def with_nonfinite(x: Inputs, start: Any, rows: int, found: Any) -> Any:
        out, lse = found
        seen = _seen(config, x, start, rows)
        # A row without any weight is empty, or all its visible logits are -inf: the mask decides.
        nothing = (lse == -jnp.inf) & jnp.swapaxes(seen.any(-1), 1, 2)
        out = _with_values(x, seen, out)
        return _undefined(config, nothing, out), _where(nothing, jnp.nan, lse)

    wrong = ~base.surely_finite(x.value) | _doubtful(config, x, lse)
    return _corrected(x, wrong, with_nonfinite, (out, lse))


def with_weights(config: Config, x: Inputs) -> tuple[Array, Array, Array]:
    """Output, LSE, and weights `[B, N, T, S]` by the passes `Engine.keeping` of the engine."""
    assert config.engine is not None
    assert config.engine.keeping is not None
    out, lse, weights = config.engine.keeping.forward(config, x.grouped())
    return _with_nonfinite(config, x, joined(out, 2)), joined(lse, 2), joined(weights, 1)


def of_some_keys(config: Config, x: Inputs) -> tuple[Array, Array, Bool[Array, ""]]:
    """Output and LSE over some of the keys, and whether `decided` is needed.

    The LSE of a query whose visible logits are all -inf is -inf: with other keys it may be finite.
    """
    assert config.engine is not None
    out, lse = _by_engine(config, x, config.engine.forward)
    return _with_nonfinite(config, x, out), lse, _doubtful(config, x, lse)


def _with_nonfinite(config: Config, x: Inputs, out: Array) -> Array:
    """The output of an engine, with what visible values that are not finite add to it."""

    def more(x: Inputs, start: Any, rows: int, out: Any) -> Any:
        return _with_values(x, _seen(config, x, start, rows), out)

    found: Array = _corrected(x, ~base.surely_finite(x.value), more, out)
    return found


def decided(
    config: Config, x: Inputs, out: Array, lse: Array, doubtful: Bool[Array, ""]
) -> tuple[Array, Array]:
    """Output and LSE, NaN where the LSE over all keys is -inf though a key is visible.

    Of the keys and values in `x` only the number is read.
    """

    def where_seen(x: Inputs, start: Any, rows: int, found: Any) -> Any:
        B, S, K, _ = x.key.shape
        seen = _reached(config, x, jnp.ones((B, K, S, 1), bool), start, rows)[..., 0]
        out, lse = found
        nothing = (lse == -jnp.inf) & seen
        return _undefined(config, nothing, out), _where(nothing, jnp.nan, lse)

    found: tuple[Array, Array] = _corrected(x, doubtful, where_seen, (out, lse))
    return found


def that_see(
    config: Config, x: Inputs, flags: Bool[Array, "B S K"], bad: Bool[Array, "B T N"]
) -> Bool[Array, "B T N"]:
    """The queries that are bad already or see a key with a flag; only shapes of keys are read."""
    by_head = jnp.swapaxes(flags, 1, 2)[..., None]

    def more(x: Inputs, start: Any, rows: int, bad: Array) -> Array:
        return bad | _reached(config, x, by_head, start, rows)[..., 0]

    found: Array = _corrected(x, flags.any(), more, bad)
    return found


def _by_engine(config: Config, x: Inputs, forward: Callable[..., Any]) -> tuple[Array, Array]:
    assert config.engine is not None
    given = x if config.engine.cleans else x._replace(value=base.finite(x.value))
    out, lse = forward(config, given.grouped())
    return joined(out, 2), joined(lse, 2)


def _doubtful(config: Config, x: Inputs, lse: Array) -> Bool[Array, ""]:
    """Whether a row without any weight may see a key."""
    weighty = lse.min() > -jnp.inf
    if config.score is not None:
        return ~weighty
    none = constant(weighty, (), bool)
    return lax.cond(weighty, lambda: none, lambda: _extreme(x) | none)


def _corrected(
    x: Inputs,
    wrong: Bool[Array, ""],
    correct: Callable[[Any, Any, int, Any], Any],
    results: Any,
    given: Any = None,
) -> Any:
    """Results `[B, T, ...]`, put right some rows at a time if they are wrong.

    `correct(given, start, rows, results)` puts these rows of the results right from what is given,
    by default `x`, and would change nothing a second time. Without a round the loop leaves all
    where it is, while results that go through a branch of a `cond` are copied.
    """
    size, T = formula.rows_at_once(x), x.query.shape[1]

    def body(n: Any, results: Any) -> Any:
        # With the barrier, what is the same in all rounds is not computed before the loop.
        n, here = lax.optimization_barrier((n, fixed))
        start = jnp.minimum(n * size, T - size)
        parts = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, 1), results)
        parts = correct(here, start, size, parts)
        return jax.tree.map(
            lambda a, part: lax.dynamic_update_slice_in_dim(a, part, start, 1), results, parts
        )

    fixed = lax.stop_gradient(x if given is None else given)
    rounds = _where(~wrong, 0, jnp.full_like(wrong, -(-T // size), jnp.int32))
    return lax.fori_loop(np.int32(0), rounds, body, results)


def _undefined(config: Config, flags: Array, out: Array) -> Array:
    """The output, NaN where flags are True; maxima over visible pairs are what they are."""
    flags = flags[..., None]
    if maxima := _maxima(config):
        # No array of NumPy: JAX 0.10's custom_partitioning refuses those.
        columns = lax.broadcasted_iota(jnp.int32, (1, 1, 1, out.shape[-1]), 3)
        flags = flags & (columns < out.shape[-1] - maxima)
    return _where(flags, jnp.nan, out)


def _maxima(config: Config) -> int:
    """The number of columns that are no means; they are the last."""
    return sum(not column.mean for column in config.columns)


def _where(flags: Array, number: float, array: Array) -> Array:
    """The array, with a number where flags are True."""
    # Not `jnp.where`, a function of its own in the program, which XLA then has to inline.
    flags = jnp.broadcast_to(flags, array.shape)
    return lax.select(flags, lax.full_like(array, number), array)


def _extreme(x: Inputs) -> Bool[Array, ""]:
    """Whether a product of a query and a key, scaled, may be -inf."""
    dtype = x.scale.dtype
    most = [jnp.abs(a).max().astype(dtype) for a in (x.query, x.key, x.scale)]
    # Not `>`, which NaN would pass.
    return ~(most[0] * most[1] * jnp.maximum(most[2], 1) * x.query.shape[-1] < _LARGE)


def _reached(
    config: Config, x: Inputs, flags: Bool[Array, "B K S C"], start: Any, rows: int
) -> Bool[Array, "B rows N C"]:
    """For each of some queries, whether any visible key has a flag."""
    seen = _seen(config, x, start, rows)
    return jnp.moveaxis(formula.reach(seen, flags, x.query.shape[2]), 1, 2)


def _seen(config: Config, x: Inputs, start: Any, rows: int) -> Bool[Array, "#B #N rows S"]:
    """The mask of some queries."""
    seen = formula.visible(config, x, start, rows)
    return jnp.ones((1, 1, rows, x.key.shape[1]), bool) if seen is None else seen


def _with_values(x: Inputs, seen: Bool[Array, "#B #N rows S"], out: Array) -> Array:
    """The output `[B, rows, N, Hv]`, with what visible values that are not finite add to it."""
    value, N = jnp.moveaxis(x.value, 1, 2), x.query.shape[2]
    more = jnp.moveaxis(formula.nonfinite_sums(seen, value, N, out.dtype), 1, 2)
    return out + padded(more, {3: out.shape[3]})


def backward(
    config: Config, groups: int, x: Inputs, out: Array, lse: Array, *more: Array
) -> Gradients:
    """Cotangents of the inputs by the config's engine; see `Engine`.

    `more` are the weights, if `with_weights` gave them, and the cotangents of output and LSE.
    """
    assert config.engine is not None
    *weights, d_out, d_lse = more
    # XLA would evaluate a constant, such as the cotangent of a plain sum, while it compiles.
    d_out = lax.optimization_barrier(d_out)
    alive = lse != -jnp.inf
    if maxima := _maxima(config):
        # They have no gradient, and may be infinite.
        means = out.shape[-1] - maxima
        out, d_out = (padded(a[..., :means], {3: out.shape[-1]}) for a in (out, d_out))
    products = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)

    def that_see_others(given: Any, start: Any, rows: int, bad: Array) -> Array:
        # Of what is visible, values that are not finite are in the output; keys need not be.
        x, *of_rows = given
        finite = (base.all_finite(lax.dynamic_slice_in_dim(a, start, rows, 1), -1) for a in of_rows)
        keys = jnp.swapaxes(~base.all_finite(x.key, -1), 1, 2)[..., None]
        seen = _reached(config, x, keys, start, rows)[..., 0]
        return reduce(jnp.logical_or, map(jnp.logical_not, finite), bad | seen)

    # If products are finite, outputs and cotangents are.
    wrong = ~base.surely_finite(products) | ~base.surely_finite(x.key)
    given: tuple[Any, ...] = (x, out, d_out)
    if config.score is not None:
        # Such as a cap, which makes finite logits of a query that is infinite.
        wrong = wrong | ~base.surely_finite(x.query)
        given = (*given, x.query)
    bad = alive & _corrected(x, wrong, that_see_others, ~jnp.isfinite(lse), given)
    K, grouped = x.key.shape[2], x.grouped()
    d_out, lse, delta = (
        by_key_head(a, 2, K) for a in (d_out, _where(bad, jnp.nan, lse), products - d_lse)
    )
    if not config.engine.cleans:
        grouped, d_out = cleaned(grouped, lse, d_out)
    run = config.engine.backward
    if weights:
        assert config.engine.keeping is not None
        run = config.engine.keeping.backward
    kept = (by_key_head(a, 1, K) for a in weights)
    g = run(config, groups, grouped, *kept, *backward_rows(lse, delta), d_out)
    score = tuple(None if part is None else joined(part, 1) for part in g.score)
    return g._replace(query=joined(g.query, 2), score=score)


def tangent(config: Config, x: Inputs, moved: tuple[Array, ...]) -> tuple[Array, Array]:
    """Tangents of output and LSE, for those of `x.floats()`."""
    assert config.engine is not None
    engine = config.engine.differentiable
    run = partial(formula.by_rows if engine is None else forward, config)
    (out, lse), (d_out, d_lse) = jax.jvp(lambda *f: run(x.with_floats(f)), x.floats(), moved)
    lost = ~jnp.isfinite(lse) & (lse != -jnp.inf)
    return _where(~jnp.isfinite(out), jnp.nan, d_out), _where(lost, jnp.nan, d_lse)

"""The calls that `make compile-gpu` and `make compile-tpu` compile: every kernel, every feature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxattn as ja
from jaxattn import masks, scores, stats

# Lengths and heads do not matter to the compilers, as long as every tile is whole.
B, T, N, K = 2, 1024, 4, 2


class Case(NamedTuple):
    """A call to compile, and whether its kernels must fit into the registers.

    Attributes:
      name: of the case.
      H, dtype, options: of the call.
      fits: whether its kernels must fit into the registers.
      backend: that computes it.
      extents: batch rows and tokens of each.
    """

    name: str
    H: int
    dtype: Any
    options: dict[str, Any]
    fits: bool = True
    backend: str = "triton"
    extents: tuple[int, int] = (B, T)


def cases() -> Iterator[Case]:
    """Every head dimension that has its own tiles; then a kernel with every feature at once."""
    wide = [(H, dtype) for dtype in (jnp.bfloat16, jnp.float32) for H in (64, 128, 256)]
    for H, dtype in wide:
        # True float32 products of many columns: their factors fill the registers. The compiler of
        # JAX 0.10 wants a few more for the widest heads.
        fits = (dtype != jnp.float32 and (H < 256 or jax.__version_info__ >= (0, 11))) or H == 64
        yield Case("causal", H, dtype, {"mask": masks.causal()}, fits)
    yield Case("no mask, ragged head", 80, jnp.bfloat16, {})
    ids = jnp.zeros((B, T), jnp.int32)
    window = masks.segments(ids) & masks.sliding_window(jnp.arange(N) + 100)
    yield Case("segments and windows", 128, jnp.bfloat16, {"mask": window})
    distance = {"mask": masks.causal(), "score": scores.relative_bias(jnp.ones((N, 32)))}
    table = {"mask": masks.causal(), "score": scores.bias(jnp.ones((1, N, T, T)))}
    everything = {
        "mask": masks.dense(jnp.ones((T, T), bool)) & masks.segments(ids),
        "score": scores.chain(scores.alibi(jnp.ones(N)), scores.soft_cap(5.0)),
        "dropout_rate": 0.1,
        "dropout_seed": 1,
    }
    asked = {
        "top": stats.max(),
        "entropy": stats.entropy(),
        "far": stats.mean(lambda x, b, h, q, k: abs(q - k)),
    }
    all_statistics = asked | {"key": stats.argmax(), "received": stats.received()}
    statistics = {"mask": masks.causal(), "stats": asked}
    for H, dtype in wide:
        # Hundreds of bytes are spilled: a little slower, and rare.
        yield Case("everything", H, dtype, everything, fits=False)
        yield Case("statistics", H, dtype, statistics, fits=dtype != jnp.float32 and H < 256)
    yield Case("all statistics", 64, jnp.bfloat16, everything | {"stats": all_statistics}, False)
    for H in (64, 128):
        # With grouped heads, the keys' kernels of 128 columns lack a dozen registers.
        yield Case("causal", H, jnp.bfloat16, {"mask": masks.causal()}, H == 64, "mosaic")
        window_score = {"mask": window, "score": scores.soft_cap(5.0)}
        yield Case("windows, a cap", H, jnp.bfloat16, window_score, False, "mosaic")
        yield Case("statistics", H, jnp.bfloat16, statistics, False, "mosaic")
        yield Case("a table of distances", H, jnp.bfloat16, distance, fits=False)
        yield Case("a table of pairs", H, jnp.bfloat16, table, fits=False)


def gradients(case: Case) -> Callable[..., Any]:
    """Everything that a call computes: output, LSE, statistics, and gradients, also of scores."""

    def loss(query: Any, key: Any, value: Any, score: Any) -> Any:
        options = case.options | ({} if score is None else {"score": score})
        out, lse, *seen = ja.attention(
            query, key, value, backend=case.backend, return_lse=True, **options
        )
        total = out.astype(jnp.float32).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()
        return total + sum(each.astype(jnp.float32).sum() for each in jax.tree.leaves(seen))

    return jax.value_and_grad(loss, (0, 1, 2, 3), allow_int=True)


def arguments(case: Case, device: Any) -> list[Any]:
    """What `gradients` takes, as shapes on a device."""
    where = jax.sharding.SingleDeviceSharding(device)
    shapes = [(*case.extents, heads, case.H) for heads in (N, K, K)]
    arrays = [jax.ShapeDtypeStruct(shape, case.dtype, sharding=where) for shape in shapes]
    return [*arrays, case.options.get("score")]

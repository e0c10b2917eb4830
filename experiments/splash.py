"""JAX's splash attention for TPUs, with the masks of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_gpu_worker import DOCUMENT, WINDOW, prefix_length

# As large as jaxattn's tiles; its own default is 128.
BLOCK = 512


def splash(name: str, T: int, N: int, interpret: bool = False) -> Callable[..., Any]:
    """Attention `(q, k, v)`, `[N, T, H]`, of one batch row; queries are not scaled.

    Documents are segment ids beside a causal mask. That is how splash takes ids that are data: it
    does not know them when it chooses its blocks.

    Raises:
      ValueError: for another mask than the five that it is given here.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as ops

    if name != "documents":
        return _kernel(name, T, N, interpret)
    kernel, ids = _kernel("causal", T, N, interpret), jnp.arange(T, dtype=jnp.int32) // DOCUMENT
    return lambda q, k, v: kernel(q, k, v, segment_ids=ops.SegmentIds(ids, ids))


@lru_cache(maxsize=4)
def _kernel(name: str, T: int, N: int, interpret: bool) -> Callable[..., Any]:
    """Splash looks at every tile on the host: one to two minutes for 131072 tokens."""
    from jax.experimental.pallas.ops.tpu import splash_attention as ops
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as given

    class Prefix(given.Mask):
        """Computed where it is read: the array of a long one would not fit in memory."""

        shape = T, T

        def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
            q, k = (np.arange(T)[part] for part in at)
            return (k < prefix_length(T)) | (q[:, None] >= k)

    masks: dict[str, Callable[[], Any]] = {
        "full": lambda: given.FullMask((T, T)),
        "causal": lambda: given.CausalMask((T, T)),
        "window": lambda: given.LocalMask((T, T), (WINDOW, 0), 0),
        "prefix": Prefix,
    }
    if name not in masks:
        raise ValueError(f"splash has no {name}; here it is given {', '.join(masks)}, documents")
    side = min(BLOCK, T)
    # It is kept: its arrays must not belong to what is being traced.
    with jax.ensure_compile_time_eval():
        kernel: Callable[..., Any] = ops.make_splash_mha(
            given.MultiHeadMask([masks[name]()] * N),
            block_sizes=ops.BlockSizes(side, side, side, side, side, side, side, side),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
    return kernel

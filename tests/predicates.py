"""Predicates as users write them, as for FlexAttention, and their brute force."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import masks
from jaxattn.masks.mask import Mask, as_mask
from jaxattn.masks.positions import Positions

# Ragged for tiles of 16 x 32, and for their halves.
B, N, T, S = 2, 3, 41, 53
TILE = (16, 32)

_random = np.random.default_rng(7)
IDS_K = np.sort(_random.integers(0, 5, (B, S))).astype(np.int32)
IDS_Q = IDS_K[:, :T]
MIXED_Q, MIXED_K = _random.permuted(IDS_Q, axis=1), _random.permuted(IDS_K, axis=1)
LENGTHS = np.array([17, 40], np.int32)
WINDOWS = np.array([3, 11, 60], np.int32)
DENSE = _random.random((T, S)) < 0.5
DENSE4 = _random.random((B, N, T, S)) < 0.5
TABLE = _random.random((B, N, 9, 11)) < 0.4
OFFSETS = np.array([0, 9, 20, 33, 60], np.int32)
NEAR = np.array([1, 0, 1, 1, 0, 1], bool)
VISITED = _random.integers(0, S, (T, 4)).astype(np.int32)


# Programs that run once: what is compiled badly is compiled fast.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def brute(mask: Any, positions: Positions | None = None) -> np.ndarray:
    """Every cell, `[B, N, T, S]`."""
    return np.asarray(quick(lambda at: as_mask(mask).dense(T, S, B, N, at))(positions))


def tile_states(cells: np.ndarray, tile: tuple[int, int] = TILE) -> np.ndarray:
    """The states of the tiles of `cells [B, N, T, S]`, by looking at every cell."""
    b, n, t, s = cells.shape
    found = np.zeros((b, n, -(-t // tile[0]), -(-s // tile[1])), np.int8)
    for i in range(found.shape[2]):
        for j in range(found.shape[3]):
            part = cells[:, :, i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            found[:, :, i, j] = part.any((2, 3)).astype(np.int8) + part.all((2, 3))
    return found


def _document(q: Any, offsets: Any) -> Any:
    return jnp.searchsorted(offsets, q, side="right") - 1


def users() -> dict[str, Callable[..., Any]]:
    """Functions `(b, h, q, k) -> bool` that close over arrays."""
    ids_q, ids_k, mixed_q, mixed_k = map(jnp.asarray, (IDS_Q, IDS_K, MIXED_Q, MIXED_K))
    lengths, windows, dense, dense4 = map(jnp.asarray, (LENGTHS, WINDOWS, DENSE, DENSE4))
    table, offsets, near, visited = map(jnp.asarray, (TABLE, OFFSETS, NEAR, VISITED))
    return {
        "lambda": lambda b, h, q, k: q - k < 7,
        "documents": lambda b, h, q, k: (ids_q[b, q] == ids_k[b, k]) & (q >= k),
        "mixed documents": lambda b, h, q, k: mixed_q[b, q] == mixed_k[b, k],
        "prefix list": lambda b, h, q, k: (k < lengths[b]) | (q >= k),
        "window a head": lambda b, h, q, k: jnp.abs(q - k) <= windows[h],
        "searchsorted": lambda b, h, q, k: _document(q, offsets) == _document(k, offsets),
        "relative": lambda b, h, q, k: q - offsets[ids_q[b, q]] >= k - offsets[ids_k[b, k]],
        "modulo": lambda b, h, q, k: (q // 4 + k) % 3 == 0,
        "dilated": lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k),
        "table of blocks": lambda b, h, q, k: table[b, h, q // 5, k // 5],
        "table, clipped": lambda b, h, q, k: table[jnp.minimum(b, 1), h, q // 8, k // 8],
        "table of distances": lambda b, h, q, k: near[jnp.clip(q - k, 0, 5)],
        "dense": lambda b, h, q, k: dense[q, k],
        "dense, one by one": lambda b, h, q, k: dense4[b][h][q][k],
        "dense, transposed": lambda b, h, q, k: dense4.transpose(3, 2, 1, 0)[k, q, h, b],
        "dense, first head": lambda b, h, q, k: dense4[b, 0, q, k],
        "dense, last row": lambda b, h, q, k: dense4[-1, h, q, k],
        "dense, take": lambda b, h, q, k: jnp.take(dense, q, axis=0)[k],
        "dense, clipped": lambda b, h, q, k: dense4[jnp.minimum(b, B - 1), h, q, k],
        "dense, of numbers": lambda b, h, q, k: dense.astype(jnp.float32)[q, k] > 0.5,
        "dense, flipped": lambda b, h, q, k: dense[T - 1 - q, k],
        "visited": lambda b, h, q, k: jnp.any(visited[q] == k),
        "cond": lambda b, h, q, k: lax.cond(
            q > k, lambda: q % 3 == k % 3, lambda: k - q < windows[h]
        ),
        "switch": lambda b, h, q, k: lax.switch(
            h, [lambda: q >= k, lambda: q == k, lambda: k < lengths[b]]
        ),
        "where": lambda b, h, q, k: jnp.where(k < 4, True, jnp.where(q < 9, k <= q, q - k < 5)),
        "scan": lambda b, h, q, k: (
            lax.fori_loop(0, 3, lambda i, x: x + q * i, jnp.int32(0)) >= 2 * k
        ),
        "stack": lambda b, h, q, k: jnp.any(jnp.stack([q, k, h]) == 3),
        "floats": lambda b, h, q, k: jnp.sqrt(q.astype(jnp.float32)) > 0.7 * k.astype(jnp.float32),
        "bits": lambda b, h, q, k: (q ^ k) & 8 == 0,
        "jit": jax.jit(lambda b, h, q, k: jax.checkpoint(lambda x: x >= k)(q)),
    }


def neighbours(b: Any, h: Any, q: Any, k: Any, shape: Any, radius: Any) -> Any:
    """`masks.neighborhood` for any T and S."""
    near, stride = True, 1
    for extent, reach in zip(reversed(shape), reversed(radius), strict=True):
        at, seen = q // stride % extent, k // stride % extent
        near &= jnp.abs(jnp.clip(at, reach, extent - 1 - reach) - seen) <= reach
        stride = stride * extent
    return near


def library() -> dict[str, Mask]:
    """Masks of the library, alone and composed."""
    ids = (jnp.asarray(IDS_Q), jnp.asarray(IDS_K))
    flags = jnp.asarray(IDS_Q[:, :T] == 1)
    causal, window = masks.causal(), masks.sliding_window(7, 2)
    parts = [masks.causal(), masks.dilated(2), masks.sliding_window(4, 4)]
    return {
        "full": masks.full(),
        "empty": masks.empty(),
        "causal": causal,
        "window": window,
        "window a head": masks.sliding_window(jnp.asarray(WINDOWS), 0),
        "offset": masks.causal(jnp.asarray(LENGTHS) - 20),
        "prefix": masks.prefix_lm(jnp.asarray(LENGTHS)),
        "segments": masks.segments(*ids),
        "segments & causal": masks.segments(*ids) & causal,
        "segments & window": masks.segments(*ids) & window,
        "key padding": masks.key_padding(lengths=jnp.asarray(LENGTHS)),
        "query padding": masks.query_padding(flags),
        "padding & causal": masks.key_padding(lengths=jnp.asarray(LENGTHS)) & causal,
        "chunked": masks.chunked(8),
        "chunked & causal": masks.chunked(12) & causal,
        "dilated": masks.dilated(5),
        "dilated & causal": masks.dilated(3) & causal,
        "dilated & window": masks.dilated(7) & masks.sliding_window(20, 20),
        # Not by its constructor: T and S are not those of a grid.
        "neighborhood": masks.predicate(neighbours, (7, 8), (1, 1)),
        "global tokens": masks.global_tokens(3) | window,
        "global tokens & causal": (masks.global_tokens(counts=jnp.array([2, 0])) | window) & causal,
        "blocks": masks.block_sparse(jnp.asarray(TABLE), 5),
        "blocks & causal": masks.block_sparse(jnp.asarray(TABLE[0, 0]), 8) & causal,
        "random blocks": masks.random_blocks(jax.random.key(0), 2, 8, 64),
        "block diffusion": masks.block_diffusion(24, 4),
        "heads": masks.per_head(parts),
        "dense": masks.dense(DENSE),
        "dense4": masks.dense(DENSE4[:1]),
        "not causal": ~causal,
        "not segments": ~masks.segments(*ids),
        "not (window or blocks)": ~(window | masks.block_sparse(jnp.asarray(TABLE), 5)),
        "xor": causal ^ window,
    }


def everything() -> dict[str, Mask]:
    """All of them."""
    made = {f"user: {name}": as_mask(fn) for name, fn in users().items()}
    return made | library()


EVERYTHING = tuple(everything())


@cache
def library_states(name: str) -> np.ndarray:
    """The states of a mask of the library, by brute force."""
    return tile_states(brute(library()[name]))

"""What a call costs on CPU, by backend: the estimates by which "auto" chooses.

    time = cells * (cell + product * (H + Hv)) + numbers * number + units * unit

Cells are the pairs of a query and a key that a backend computes in all heads, with the padding of
its tiles. Numbers are those of queries, keys, values and outputs, which are copied to where
products read them fastest. Units are the pairs of a batch row and a key head.

The constants are nanoseconds of a forward pass, fitted to calls in float32 of 1 to 512 queries, on
2 cores of an EPYC with AVX2 and JAX 0.12. The estimates were off by a third on average: what
matters is which is the least. That was nearly always the same with the backward, and in 16 bits.
Where `tiled` and `rows` multiply in bfloat16, a product costs them half.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from ..tiles import known
from ..tiles.tile_map import EMPTY
from . import base, bfloat16, decode, rows
from .base import Call
from .tiled import backend as tiled

# A multiplication and an addition of a product of matrices: 120 GFLOP/s.
PRODUCT = 1 / 60

# The share of that in bfloat16, where a processor has a unit for it.
NARROW = 0.5

# Logits of one batch row, 8 MB of float32, up to which whole rows are computed: beyond, they would
# leave the caches, and take more memory than their speed is worth.
MOST_OF_ROW = 2**21


class Price(NamedTuple):
    """Nanoseconds of a backend, see above."""

    cell: float
    number: float
    unit: float


ROWS = Price(1.44, 1.24, 0)
TILED = Price(1.87, 1.86, 1000)
# Of a cell, on AVX-512: reading keys in place is slower with several queries.
DECODE = Price(9, 1.05, 4000)


def estimates(call: Call) -> dict[str, float]:
    """Milliseconds of a forward pass, by backend, of those that can compute the call."""
    B, T, S, N, K, H, Hv = call.sizes
    numbers = B * (T * N + S * K) * (H + Hv)

    def cost(price: Price, cells: float, share: float = 1) -> float:
        each = price.cell + share * PRODUCT * (H + Hv)
        return (cells * each + numbers * price.number + B * K * price.unit) / 1e6

    cells = B * N * T * S
    narrow = jnp.dtype(bfloat16.factors(call)).itemsize < jnp.dtype(base.factors(call)).itemsize
    share = NARROW if narrow else 1
    found = {"tiled": cost(TILED, B * N * _in_tiles(call), share)}
    if N * T * S <= MOST_OF_ROW and rows.refuse(call) is None:
        found["rows"] = cost(ROWS, cells, share)
    if decode.refuse(call) is None:
        # It reads keys where they are, in as many bytes as they have.
        wide = jnp.dtype(base.accumulator(call.query.dtype)).itemsize
        number = DECODE.number * jnp.dtype(call.key.dtype).itemsize / wide
        found["decode"] = cost(DECODE._replace(number=number), cells)
    return found


def _unknown(rows: int, columns: int) -> float:
    """The share of tiles assumed of a mask with numbers or arrays; new values don't change it.

    That of a causal mask on as many tiles a side, and half a tile more in each row: the tiles to
    compute are found when the call runs. At 256 squared, two tiles a side, `rows` is faster then,
    and `tiled` from 384 on.
    """
    most = max(rows, columns)
    return min(1.0, (most + 2) / (2 * most))


def _in_tiles(call: Call) -> float:
    """Pairs of a head in the tiles that have to be computed, the last ones whole."""
    B, T, S, N, *_ = call.sizes
    tile = tiled.tile_of(call, None, call.tiles, B * N)
    rows, columns = (-(-n // each) for n, each in zip((T, S), tile, strict=True))
    share = 1.0
    if call.mask is not None:
        states = known.states(call.mask, call.positions, (B, N, T, S), tile)
        # Of a mask that all queries share, as of padding, all tiles are assumed.
        by_query = any(kind not in ("column", "head") for kind in call.mask.kinds)
        share = _unknown(rows, columns) if by_query else 1.0
        if states is not None:
            share = 1 - b"".join(states).count(EMPTY) / (rows * columns)
    return share * math.prod((rows, columns, *tile))

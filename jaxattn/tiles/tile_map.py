"""Tile maps: which tiles of a mask are EMPTY, PARTIAL or FULL.

A `TileMap` is a mask together with its tile map, to be built once and shared by layers:

    tiles = tile_map(mask, query.shape, key.shape)
    for layer in layers:
        x = attention(..., mask=tiles)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..checks import integers
from ..checks.arrays import described
from ..checks.integers import concrete
from ..checks.options import flag
from ..masks.mask import Mask, MaskLike, Scalar, as_mask, check_tokens
from ..masks.positions import Positions, as_positions
from ..mesh import automatic
from ..pytrees import pytree, static
from ..shapes import Array, ArrayOrStruct, Bool, Int, Shaped
from ..tracing.canonical import canonicalize
from ..tracing.out_of_range import guarded
from ..tracing.split import Operand, Split, split
from . import intervals

EMPTY, PARTIAL, FULL = 0, 1, 2

# Square, as causal masks waste least of them; small enough that a window of a few hundred keys
# leaves most tiles empty, large enough that the map of 131072 positions has only 262144.
TILE = (256, 256)


@pytree
class TileStates:
    """The states of a mask's tiles, without the mask.

    Attributes:
      states: int8 `[B|1, N|1, nq, nk]`.
      tile: queries and keys in a tile.
    """

    states: Int[ArrayOrStruct, "B N nq nk"]
    tile: tuple[int, int] = static()


@pytree
class TileMap(Mask):
    """A mask with the states of its tiles.

    Attributes:
      mask: the mask itself; a `TileMap` allows what it allows.
      states: int8 `[B|1, N|1, nq, nk]`: EMPTY = 0, PARTIAL = 1 (perhaps mixed), FULL = 2.
      tile: queries and keys in a tile.
      sizes: `(B, N, T, S)` that the map was made for.
      counted: which of the positions b, h, q, k were counted from 0.
      positions: the others, as they were given.
    """

    mask: Mask
    states: Int[ArrayOrStruct, "B N nq nk"]
    tile: tuple[int, int] = static()
    sizes: tuple[int, int, int, int] = static()
    counted: tuple[bool, bool, bool, bool] = static(default=(True, True, True, True))
    positions: Positions = Positions()

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        return self.mask(b, h, q, k)

    def check(self, B: int, N: int, T: int, S: int, positions: Positions | None = None) -> None:
        """Checks that the map may be used for a call.

        Raises:
          ValueError: for a call of other sizes, or at positions that are known to be others than
            those that the map was made for.
        """
        if self.sizes != (B, N, T, S):
            names = ", ".join(
                f"{name} = {mine}, not {given}"
                for name, mine, given in zip("BNTS", self.sizes, (B, N, T, S), strict=True)
                if mine != given
            )
            raise ValueError(
                f"mask: got a TileMap made for {names}; expected one of these sizes: make another "
                "with tile_map(mask, query.shape, key.shape), or pass its .mask"
            )
        counted = counts(positions)
        if self.counted != counted:
            names = " and ".join(
                f"positions.{at}"
                for at, mine, given in zip("bhqk", self.counted, counted, strict=True)
                if mine != given
            )
            raise ValueError(
                f"mask: got a TileMap and {names} from only one of tile_map() and this call; give "
                "the same positions to both"
            )
        for at in "bhqk":
            if self._alike(at, positions) is False:
                raise ValueError(
                    f"mask: got a TileMap made for other positions.{at} than those of this call; "
                    "make another with tile_map(mask, query.shape, key.shape, "
                    "positions=positions), or pass its .mask"
                )

    def for_call(
        self, B: int, N: int, T: int, S: int, positions: Positions | None = None
    ) -> TileStates | None:
        """The states for a call of these sizes, or None where positions may be others.

        Traced positions may be, unless they are the same objects. A backend that wants states then
        finds them anew.

        Raises:
          ValueError: as `check`.
        """
        self.check(B, N, T, S, positions)
        alike = all(self._alike(at, positions) for at in "bhqk")
        return TileStates(self.states, self.tile) if alike else None

    def _alike(self, name: str, positions: Positions | None) -> bool | None:
        """Whether positions equal those of the map; `None` where that is not known."""
        mine, other = getattr(self.positions, name), getattr(positions or Positions(), name)
        if mine is other:
            return True
        first, second = concrete(mine), concrete(other)
        if first is None or second is None:
            return None
        # One row stands for all.
        return bool((np.atleast_2d(first) == np.atleast_2d(second)).all())

    def __repr__(self) -> str:
        B, N, T, S = self.sizes
        name = f"TileMap({self.mask!r}, B={B}, N={N}, T={T}, S={S}, tile={self.tile})"
        if isinstance(self.states, jax.core.Tracer) or not hasattr(self.states, "shape"):
            return name
        return f"{name}\n{summary(np.asarray(self.states))}"


def counts(positions: Positions | None) -> tuple[bool, bool, bool, bool]:
    """Which of the positions b, h, q, k are counted from 0."""
    given = positions or Positions()
    return given.b is None, given.h is None, given.q is None, given.k is None


def summary(states: np.ndarray) -> str:
    """Counts by state, and a picture of the first head: `#` full, `+` partial, `.` empty."""
    total = max(states.size, 1)
    empty, partial_, full = (int((states == state).sum()) for state in (EMPTY, PARTIAL, FULL))
    lines = [
        f"{full} full, {partial_} partial, {empty} empty of {states.size} tiles: "
        f"{(full + partial_) / total:.1%} to compute"
    ]
    first = states[0, 0] if states.size else np.zeros((0, 0), np.int8)
    # At most 16 lines of 32: a group is full or empty only if all of it is.
    by = [-(-first.shape[0] // 16) or 1, -(-first.shape[1] // 32) or 1]
    for i in range(0, first.shape[0], by[0]):
        groups = [first[i : i + by[0], j : j + by[1]] for j in range(0, first.shape[1], by[1])]
        lines.append("".join(".+#"[int(g[0, 0]) if (g == g[0, 0]).all() else 1] for g in groups))
    return "\n".join(lines)


def tile_map(
    mask: MaskLike,
    query_shape: Sequence[int] | Shaped[ArrayOrStruct | np.ndarray, "..."],
    key_shape: Sequence[int] | Shaped[ArrayOrStruct | np.ndarray, "..."],
    *,
    positions: Positions | None = None,
    tile: int | tuple[int, int] = TILE,
    exact: bool = False,
) -> TileMap:
    """The states of the tiles of a mask.

    Args:
      mask: a mask, a callable `(b, h, q, k) -> bool`, or a boolean array.
      query_shape, key_shape: `[B, T, N, H]` and `[B, S, K, H]`, or without B; or the query and the
        key themselves.
      positions: the positions of queries and keys, where they are not 0, 1, 2, ...
      tile: queries and keys in a tile; one number for both.
      exact: evaluate every element, tile by tile, instead of bounds: O(T * S) time, O(tile) memory,
        no PARTIAL tile that is not truly mixed.

    Returns:
      The map; a mask too, to be passed wherever masks are.

    Raises:
      ValueError: for shapes of other ranks, and for tiles below 1.
    """
    B, T, N = _extents("query_shape", query_shape)
    keys, S, _ = _extents("key_shape", key_shape)
    if keys != B:
        raise ValueError(f"key_shape: got {keys} batch rows, expected {B}, those of query_shape")
    exact = flag(exact, "exact")
    sides = tile if isinstance(tile, (tuple, list)) else (tile, tile)
    if len(sides) != 2:
        raise ValueError(f"tile: got {tile!r}, expected one integer or two, at least 1")
    rows, columns = (integers.plain(side, "tile", 1) for side in sides)
    stand = as_positions(positions)
    given = stand.checked(B, N, T, S)
    stand = jax.tree.map(jnp.asarray, stand)
    plain = as_mask(mask.mask if isinstance(mask, TileMap) else mask)
    check_tokens(plain, given, T, S)
    canonical = guarded(canonicalize(plain), stand, (B, N, T, S))
    found = _states(split(canonical, given), given, (B, N, T, S), (rows, columns), exact)
    return TileMap(canonical, found, (rows, columns), (B, N, T, S), counts(given), stand)


def _extents(name: str, given: Any) -> tuple[int, int, int]:
    # An array of queries or of keys stands for its shape.
    shape = given.shape if getattr(given, "ndim", 1) != 1 else given
    if not isinstance(shape, (Sequence, np.ndarray, jax.Array)) or isinstance(shape, (str, bytes)):
        raise TypeError(
            f"{name}: got {described(shape)}, expected [B, length, heads, H] or without B, or the "
            "array itself"
        )
    if len(shape) not in (3, 4):
        raise ValueError(f"{name}: got {tuple(shape)}, expected [B, length, heads, H] or without B")
    sizes = [integers.plain(n, f"{name}[{i}]", 0) for i, n in enumerate(shape)]
    *batch, length, heads, _ = sizes
    return (*batch, 1)[0], length, heads


@partial(jax.jit, static_argnums=(2, 3, 4))
def _states(
    parts: Split[Any],
    positions: Positions,
    sizes: tuple[int, int, int, int],
    tile: tuple[int, int],
    exact: bool,
) -> Int[Array, "B N nq nk"]:
    find = streamed if exact else intervals.states

    def run(parts: Split[Any], positions: Positions) -> Any:
        return find(parts, parts.operands(positions, *sizes), *tile, *sizes[2:])

    return automatic(run, (parts, positions), jax.sharding.PartitionSpec())


def streamed(
    split: Split[Any], operands: Sequence[Operand], tile_q: int, tile_k: int, T: int, S: int
) -> Int[Array, "B N nq nk"]:
    """The states by evaluating every element, one tile after the other; as `intervals.states`."""
    nq, nk = -(-T // tile_q), -(-S // tile_k)
    size_q, size_k = min(tile_q, T), min(tile_k, S)

    def state(tile: tuple[Any, Any]) -> Any:
        i, j = tile
        # The last tile is moved back into the array; pairs that other tiles have are left out.
        q, k = jnp.minimum(i * tile_q, T - size_q), jnp.minimum(j * tile_k, S - size_k)
        found = split.residue(*(op.tile(q, k, size_q, size_k, S) for op in operands))
        found = jnp.broadcast_to(found, (*_lead(found), size_q, size_k))
        new = jnp.broadcast_to(
            (q + jnp.arange(size_q) >= i * tile_q)[:, None]
            & (k + jnp.arange(size_k) >= j * tile_k)[None, :],
            found.shape,
        )
        some, all_ = (found & new).any((-2, -1)), (found | ~new).all((-2, -1))
        return some.astype(jnp.int8) + all_.astype(jnp.int8)

    i, j = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(nq), jnp.arange(nk), indexing="ij"))
    found = lax.map(state, (i, j))
    return jnp.moveaxis(found, 0, -1).reshape(*found.shape[1:], nq, nk)


def _lead(found: Any) -> tuple[int, int]:
    lead = (1, 1, *found.shape[:-2])[-2:]
    return lead[0], lead[1]

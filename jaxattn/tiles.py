"""Tile maps: which tiles of a mask are empty, mixed or full, and the list of those to compute.

A `TileMap` is a mask that brings its map along, to be built once and shared by layers:

    tiles = tile_map(mask, query.shape, key.shape)
    for layer in layers:
        x = attention(..., mask=tiles)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import intervals
from .algebra import Mask, MaskLike, Scalar, as_mask, check_tokens
from .beyond import within
from .hoist import hoist
from .integers import known
from .positions import Positions
from .pytrees import pytree, static
from .shapes import Array, Bool, Form, Int, Shaped
from .split import Operand, Split, split

EMPTY, PARTIAL, FULL = 0, 1, 2

# Square, as causal masks waste least of them; small enough that a window of a few hundred keys
# leaves most tiles empty, large enough that the map of 131072 positions has only 262144.
TILE = (256, 256)


class Active(NamedTuple):
    """Tiles to compute: `b[n], h[n], i[n], j[n]` for n below `total`, then zeros.

    `i` counts tiles of queries and `j` tiles of keys; `b` and `h` are 0 where the mask does not
    depend on them.
    """

    b: Int[Array, "tiles"]
    h: Int[Array, "tiles"]
    i: Int[Array, "tiles"]
    j: Int[Array, "tiles"]
    total: Int[Array, ""]


def active(
    states: Int[Array, "B N nq nk"],
    kinds: Sequence[int] = (PARTIAL, FULL),
    *,
    key_major: bool = False,
) -> Active:
    """The tiles whose state is one of `kinds`, as a list of fixed length with a traced total.

    Args:
      states: as of a `TileMap`.
      kinds: which states are listed.
      key_major: order by (b, h, j, i), so that tiles of the same keys follow each other, instead
        of (b, h, i, j).
    """
    listed = jnp.zeros(states.shape, bool)
    for kind in kinds:
        listed = listed | (states == kind)
    if key_major:
        listed = jnp.swapaxes(listed, 2, 3)
    flat = listed.reshape(-1)
    # Where the n-th listed tile is: the place to which a running count sends it.
    place = jnp.where(flat, jnp.cumsum(flat, dtype=jnp.int32) - 1, flat.size)
    order = jnp.zeros(flat.size, jnp.int32)
    order = order.at[place].set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop")
    at = []
    for extent in reversed(listed.shape):
        at.append(order % max(extent, 1))
        order = order // max(extent, 1)
    j, i, h, b = at
    return Active(b, h, *((j, i) if key_major else (i, j)), flat.sum(dtype=jnp.int32))


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
    states: Int[Form, "B N nq nk"]
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

    def for_call(self, B: int, N: int, T: int, S: int, positions: Positions | None = None) -> Mask:
        """What a call uses: the map, or its mask alone where positions may be others.

        Of traced positions nobody knows, unless they are the same objects. The states of the map
        are then left behind, and a backend that wants some finds them anew.

        Raises:
          ValueError: as `check`.
        """
        self.check(B, N, T, S, positions)
        return self if all(self._alike(at, positions) for at in "bhqk") else self.mask

    def _alike(self, name: str, positions: Positions | None) -> bool | None:
        """Whether positions are those of the map; `None` where that is not known."""
        mine, other = getattr(self.positions, name), getattr(positions or Positions(), name)
        if mine is other:
            return True
        first, second = known(mine), known(other)
        if first is None or second is None:
            return None
        # One row stands for all.
        return bool((np.atleast_2d(first) == np.atleast_2d(second)).all())

    def active(self, kinds: Sequence[int] = (PARTIAL, FULL), *, key_major: bool = False) -> Active:
        """The tiles to compute; see `active`."""
        return active(self.states, kinds, key_major=key_major)

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
    query_shape: Sequence[int] | Shaped[Form | np.ndarray, "..."],
    key_shape: Sequence[int] | Shaped[Form | np.ndarray, "..."],
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
    tiles = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(tiles) != 2 or any(not isinstance(n, int) or n < 1 for n in tiles):
        raise ValueError(f"tile: got {tile!r}, expected one integer or two, at least 1")
    given = (positions or Positions()).checked(B, N, T, S)
    stand = jax.tree.map(jnp.asarray, positions or Positions())
    plain = as_mask(mask.mask if isinstance(mask, TileMap) else mask)
    check_tokens(plain, given, T, S)
    hoisted = within(hoist(plain), stand, (B, N, T, S))
    found = _states(split(hoisted, given), given, (B, N, T, S), tiles, exact)
    return TileMap(hoisted, found, tiles, (B, N, T, S), counts(given), stand)


def _extents(name: str, given: Any) -> tuple[int, int, int]:
    # An array of queries or of keys stands for its shape.
    shape = given.shape if getattr(given, "ndim", 1) != 1 else given
    if len(shape) not in (3, 4):
        raise ValueError(f"{name}: got {tuple(shape)}, expected [B, length, heads, H] or without B")
    length, heads, _ = shape[-3:]
    return (int(shape[0]) if len(shape) == 4 else 1), int(length), int(heads)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _states(
    parts: Split,
    positions: Positions,
    sizes: tuple[int, int, int, int],
    tile: tuple[int, int],
    exact: bool,
) -> Int[Array, "B N nq nk"]:
    find = streamed if exact else intervals.states

    def run(parts: Split, positions: Positions) -> Any:
        return find(parts, parts.operands(positions, *sizes), *tile, *sizes[2:])

    for leaf in jax.tree.leaves((parts, positions)):
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty and jax.sharding.AxisType.Explicit in mesh.axis_types:
            # Inside, the axes are automatic: XLA partitions the work as it likes.
            run = jax.sharding.auto_axes(run, out_sharding=jax.sharding.PartitionSpec())
            with jax.sharding.use_abstract_mesh(mesh):
                return run(parts, positions)
    return run(parts, positions)


def streamed(
    split: Split, operands: Sequence[Operand], tile_q: int, tile_k: int, T: int, S: int
) -> Int[Array, "B N nq nk"]:
    """The states by evaluating every element, one tile after the other; as `intervals.states`."""
    nq, nk = -(-T // tile_q), -(-S // tile_k)
    size_q, size_k = min(tile_q, T), min(tile_k, S)

    def state(tile: tuple[Any, Any]) -> Any:
        i, j = tile
        # The last tile is moved back into the array; what it has in common with others is left out.
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

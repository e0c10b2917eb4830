"""Tiles: which tiles of a mask are EMPTY, PARTIAL or FULL, without computing every pair.

What comes in: the operands and the residue of a mask, from `jaxattn.tracing`. What goes out: the
state of every tile, int8 `[B|1, N|1, nq, nk]`, from which backends list the tiles to compute.

The files, in the order to read them:

- `intervals`: the bounds of operands on a tile, and the residue evaluated on bounds.
- `elementwise_rules`, `array_rules`: the bounds of an operation's result, one rule an operation.
- `tile_map`: `tile_map()`, what it returns, and the exact states, by evaluating every pair.

The example that every room carries on: two packed documents, each causal, in tiles of 3 x 3.

>>> import jax.numpy as jnp
>>> from jaxattn import Positions, masks, tile_map
>>> from jaxattn.tiles.intervals import bounds_of, interpret
>>> from jaxattn.tracing.split import split
>>> ids = jnp.array([[0, 0, 0, 1, 1, 1]])
>>> mask = masks.segments(ids) & masks.causal()
>>> parts = split(mask)

Every operand is held between two bounds. Those of the second tile of the first row, queries 0 to 2
and keys 3 to 5:

>>> bounds = [bounds_of(op, 3, 3, 6, 6) for op in parts.operands(Positions(), 1, 1, 6, 6)]
>>> for name, row, column in (("ids", *bounds[:2]), ("positions", *bounds[2:])):
...     print(name, *(int(bound[0, 0, 0, 0]) for bound in row), end=", ")
...     print(*(int(bound[0, 0, 0, 1]) for bound in column))
ids 0 0, 1 1
positions 0 2, 3 5

There `0 == 1` is False, so the tile is EMPTY. On the diagonal `q >= k` is unknown: PARTIAL.

>>> least, most = interpret(parts, bounds)
>>> (least.astype(int) + most.astype(int))[0, 0].tolist()
[[1, 0], [0, 1]]
>>> tile_map(mask, (1, 6, 1, 8), (1, 6, 1, 8), tile=3).states[0, 0].tolist()
[[1, 0], [0, 1]]
"""

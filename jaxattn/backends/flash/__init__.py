"""What the engines share that compute attention tile by tile: `tiled`, `triton`, `mosaic`
and `tpu`.

`rows` shares it too, with one tile of all queries and keys.

A `Config` and `Inputs` come in, output and LSE go out, under any transformation of JAX. For two
documents of 4 tokens, `ids[b, q] == ids[b, k] & (q >= k)` in tiles of 2 x 2 has the states

    1 0 0 0     1: PARTIAL, the residue `(r == c) & (q >= k)` is evaluated
    2 1 0 0     2: FULL, every pair is visible
    0 0 1 0     0: EMPTY, the tile is never visited
    0 0 2 1

Read in this order:

- `tile_sizes`: numbers of queries, keys and heads, rounded up to whole tiles.
- `tile_lists`: the active tiles of each row, PARTIAL ones first. Row 1 of the example: 1, then 0.
- `operands`: rows `ids[b, q]` and columns `ids[b, k]` are padded to whole tiles, each tile reads
  its 2 numbers of each, and gradients of operands are summed over what shares them.
- `nonfinite`: engines see finite numbers only; NaN and infinities are put back afterwards.
- `exchange`: where devices share a sequence, each of them has two tokens of the example, say, and
  all of `ids`. It computes its own rows of tiles while keys come from the other devices.
- `fused`, `programs`: what the engines that are kernels share: columns of statistics, and residues
  as programs of operations that a kernel has.
- `transforms`: derivatives, `vmap` and sharding around an engine's forward and backward.
"""

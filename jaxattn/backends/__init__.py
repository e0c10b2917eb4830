"""The ways to compute attention: a checked `Call` comes in, an output and an LSE come out.

The mask and score of a call are split already. In all rooms below, the example is the mask
`ids[b, q] == ids[b, k] & (q >= k)`, two documents of 4 tokens each. Its operands are a row
`ids[b, q]` as `[B, 1, T]`, a column `ids[b, k]` as `[B, 1, S]`, and the positions q and k as a row
and a column. Its residue is `(r == c) & (q >= k)`.

Read in this order:

- `base`: what a backend is given and what it promises; numbers that all of them compute alike.
- `problem`: the arrays of a call, and the residues that are evaluated on them.
- `formula`, `operation`: attention as the formula, with derivatives of its own under JAX.
- `dense`: the definition. Its residue is evaluated once, on `[T, S]`: 64 pairs of the example.
- `decode`: the same formula for few queries, with keys and values read where they are.
- `rows`: whole rows of logits, a few batch rows at a time.
- `cudnn`: NVIDIA's kernels, for masks that they know. They do not know `ids`.
- `flash`: what the engines share that compute only active tiles: `tiled`, `triton`, `mosaic`.
  Cut into 2 x 2, the example has 16 tiles. Two are FULL, four PARTIAL, and ten are EMPTY: nothing
  is computed there.
"""

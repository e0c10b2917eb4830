"""Tracing: a mask or a score, taken apart into operands and a residue.

What comes in: a mask or score, and which positions are given. What goes out: a `Split`. Its
operands are arrays, computed once for each query (row), key (column), head or distance (diagonal),
or given for all pairs (grid). Its residue is a small program of operands that a backend evaluates
for each pair of a tile.

The files, in the order to read them:

- `split`: the result, and how operands are computed. Read it first and last.
- `program`, `hashing`: traced code as a value that is equal to another if it computes the same.
- `canonical`: users' functions as programs, with the arrays that they close over as leaves.
- `array_reads`: the many ways in which JAX writes `array[b, q]`, brought to one.
- `dependence`: on which positions each value depends; from that the operands and the residue.
- `out_of_range`: what a mask is at positions that its arrays do not reach.
- `pointwise`, `labels`, `recompilation_warning`: broadcasting; names in messages; a warning.

The example that every room carries on: two packed documents, each causal.

>>> import jax.numpy as jnp
>>> from jaxattn import Positions, masks
>>> from jaxattn.tracing.split import split
>>> ids = jnp.array([[0, 0, 0, 1, 1, 1]])
>>> parts = split(masks.segments(ids) & masks.causal())

`ids[b, q]` depends on the query alone and `ids[b, k]` on the key alone; so do the positions:

>>> for operand in parts.operands(Positions(), B=1, N=1, T=6, S=6):
...     print(operand.kind, operand.array.shape, operand.array[0, 0])
row (1, 1, 6) [0 0 0 1 1 1]
column (1, 1, 6) [0 0 0 1 1 1]
row (1, 1, 6) [0 1 2 3 4 5]
column (1, 1, 6) [0 1 2 3 4 5]

What is left for each pair of a query and a key is `(row == column) & (row >= column)`:

>>> [step.prim.name for step in parts.program.steps], parts.elementwise
(['eq', 'ge', 'and'], True)

`jaxattn.tiles` evaluates the same residue on whole tiles.
"""

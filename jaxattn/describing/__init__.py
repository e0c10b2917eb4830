"""Describing: from an array of visible pairs to an expression of `jaxattn.masks`.

In comes a boolean array `[B, N, T, S]`; out comes a `Term`, the text of an expression with the
cells that it allows. Parameters are read off the array; nothing is tried out blindly.

Most constructors are families with a tightest member. The closure of an array in a family is the
member that allows all of its cells and as few others as can be: the closure in `causal` has the
largest `k - q` among the visible pairs as its offset. If an array is a conjunction of members of
some families at all, it is the conjunction of its closures in them. So a conjunction is found by
computing every closure, and by choosing the fewest that together hide what the array hides. A
disjunction is the same with visible and hidden exchanged, by De Morgan.

The files, in the order to read them:

- `terms`: expressions, their texts and their weights.
- `closures`: the tightest member of each family that has one.
- `fits`: members of the other families (trees, grids, tables) that fit between what must be visible
  and what must be hidden.
- `cover`: the fewest terms that together hide given cells.
- `search`: conjunctions, disjunctions and mixtures of both; heads; the nearest, if nothing fits.

>>> import numpy as np
>>> from jaxattn.describing.closures import closures
>>> from jaxattn.describing.search import described
>>> q, k = np.ogrid[:6, :6]
>>> array = ((q >= k) & (q - k <= 2) & (k < 4))[None, None]
>>> [term.text for term in closures(array)][:4]
['causal()', '~causal(-3)', 'sliding_window(2)', 'prefix_lm(0)']
>>> described(array).text
'sliding_window(2) & key_padding(lengths=4)'
"""

"""Views: look at a mask, and ask it.

In come a mask and, if wanted, the numbers of queries and keys; out come an array, a text, a figure,
a page, or an explanation. The methods of `Mask` (`dense`, `show`, `plot`, `html`, `why`) and
`masks.diff` and `masks.describe` are these functions; they are attached to masks at the end of this
file. On the example of all rooms, tokens of two documents under a causal mask:

>>> import jax.numpy as jnp
>>> from jaxattn import masks
>>> mask = masks.segments(jnp.array([0, 0, 0, 1, 1, 1])) & masks.causal()
>>> mask.show(color=False)
segments(int32[6], int32[6]) & causal(), 6 queries, 6 keys: 12 of 36 pairs, 33.3%
██ · · · · ·
████ · · · ·
██████ · · ·
 · · ·██ · ·
 · · ·████ ·
 · · ·██████
>>> print(mask.why(q=3, k=2))
query 3 may not see key 2 (row 0, head 0)
  segments forbids it: q_ids[3] == k_ids[2]: 1 == 0 is false
  causal allows it: q >= k: 3 >= 2

Nothing here is written for one mask or another: pictures are made of tile states, explanations of
the traced function. Read `array` (every pair), then `cells` (the cells of a picture) and `text`,
`plot` and `html`, which draw them; `diff` compares two masks; `why` reads what a trace compared;
`describe` finds the words for an array.
"""

from ..masks import door
from . import array, describe, diff, html, plot, text, why

__all__ = ["describe", "diff", "html", "plot", "text", "why"]

door.attach(
    door.Views(
        dense=array.dense,
        text=text.text,
        plot=plot.plot,
        html=html.html,
        notebook=html.default,
        why=why.why,
        diff=diff.diff,
        describe=describe.describe,
    )
)

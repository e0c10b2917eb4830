"""Attention on whole rows of logits, some batch rows at a time: what short rows cost least.

    forward   s = q k'              p = e^(s - max)         out = p v / sum(p)
    backward  s' = k q'             p' = e^(s' - lse)
              dv = p' do            dp' = v do'             ds' = p' (dp' - delta)
              dk = ds' q            dq' = k' ds'

The logits of a step stay in the caches, and every step uses the memory of the one before. XLA would
otherwise set aside fresh pages in every call.

Products have heads in front, and no transposed left factor: these go to the fastest library that
XLA has on CPU. The copies in that order are made of a step's part alone, and numbers that are not
finite are replaced on the way, at no cost.

Where weights take no more memory than inputs and outputs, the forward of a call that is
differentiated keeps them. The backward then has a product and an exponential less.

Read in this order: `backend` (what is refused, what is kept), `passes` (forward and backward),
`parts` (mask, logits, score, dropout, products), `steps` (some batch rows at a time).
"""

from .backend import (
    LIMITS,
    STATISTICS,
    WHY,
    build,
    footprint,
    prepare,
    refuse,
    run,
)

__all__ = [
    "LIMITS",
    "STATISTICS",
    "WHY",
    "build",
    "footprint",
    "prepare",
    "refuse",
    "run",
]

"""Attention over one sequence that several devices share (context parallelism).

Every device holds a part of the sequence, and a part is nothing but positions: any mask, any score
and any layout of tokens work, forward and backward, as on one device.

>>> from jaxattn import masks, parallel
>>> layout = parallel.layout(masks.causal(), 4096, ranks=4)
>>> layout.ranks, layout.block
(4, 64)

Read `layouts` (which tokens a device holds), `plan` (what moves between devices, and the choice),
then `attention`, and `explain`, which shows it all without running it.
"""

from .attention import attention
from .explain import Plan, explain
from .layouts import Layout, contiguous, cyclic, layout, striped, zigzag

__all__ = [
    "Layout",
    "Plan",
    "attention",
    "contiguous",
    "cyclic",
    "explain",
    "layout",
    "striped",
    "zigzag",
]

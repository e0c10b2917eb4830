"""TODO room."""

from ..masks import door
from . import array, diff, html, plot, text, why

__all__ = ["diff", "html", "plot", "text", "why"]

door.attach(
    door.Views(
        dense=array.dense,
        text=text.text,
        plot=plot.plot,
        html=html.html,
        notebook=html.default,
        why=why.why,
        diff=diff.diff,
    )
)

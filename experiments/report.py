"""What a training run says while it runs."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Report:
    """Training progress: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console, steps: int, minutes: float | None) -> None:
        self.console, self.steps, self.minutes = console, steps, minutes
        self.printed = time.monotonic()
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, said="")

    def update(self, row: dict[str, float]) -> None:
        step, seconds = int(row["step"]), row["seconds"]
        left = (self.steps - step) * seconds / step
        if self.minutes is not None:
            left = max(0.0, min(left, 60 * self.minutes - seconds))
        said = (
            f"loss {row['loss']:.3f}  token accuracy {row['token_accuracy']:.4f}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left"
        )
        self.progress.update(self.task, completed=step, said=said, refresh=True)
        # Every ten seconds: often enough to see it live, seldom enough for a log file.
        due = time.monotonic() - self.printed > 10 or step in (1, self.steps)
        if self.progress.disable and due:
            self.printed = time.monotonic()
            text = f"step {step}/{self.steps}  {said}"
            self.console.print(text, highlight=False, soft_wrap=True)

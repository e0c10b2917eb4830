"""What a training run says while it runs, and the table it leaves."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path

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
        shown = {"token_accuracy": "token accuracy {:.4f}", "bits_per_byte": "{:.3f} bits per byte"}
        more = [text.format(row[name]) for name, text in shown.items() if name in row]
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        said = "  ".join([f"loss {row['loss']:.3f}", *more, speed, f"{left:.0f} s left"])
        self.progress.update(self.task, completed=step, said=said, refresh=True)
        # Every ten seconds: often enough to see it live, seldom enough for a log file.
        due = time.monotonic() - self.printed > 10 or step in (1, self.steps)
        if self.progress.disable and due:
            self.printed = time.monotonic()
            text = f"step {step}/{self.steps}  {said}"
            self.console.print(text, highlight=False, soft_wrap=True)


def write_metrics(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """The rows as CSV; the last one names the columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]), restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})

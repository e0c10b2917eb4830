"""The progress of a training run on the terminal, and its metrics as a table."""

from __future__ import annotations

import csv
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# The estimate is the median pace of the last rows: of three, so that one row that compiled does not
# count; of five at most, so that the estimate follows a machine that becomes busy.
_FEWEST, _LATEST = 3, 5


class Report:
    """Training progress: a bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, console: Console, steps: int, minutes: float | None) -> None:
        self.console, self.steps, self.minutes = console, steps, minutes
        self.printed = time.monotonic()
        self.before: tuple[int, float] | None = None
        self.paces: deque[float] = deque(maxlen=_LATEST)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, said="")

    def left(self, row: dict[str, float]) -> float | None:
        """Seconds that are left after a row; None until enough rows are known. Call it once a row.

        The first row does not count, because its step was compiled.
        """
        step, seconds = int(row["step"]), row["seconds"]
        if self.before is not None:
            self.paces.append((seconds - self.before[1]) / (step - self.before[0]))
        self.before = step, seconds
        if len(self.paces) < _FEWEST:
            return None
        left = (self.steps - step) * statistics.median(self.paces)
        return left if self.minutes is None else max(0.0, min(left, 60 * self.minutes - seconds))

    def update(self, row: dict[str, float]) -> None:
        step, left = int(row["step"]), self.left(row)
        shown = {"token_accuracy": "token accuracy {:.4f}", "bits_per_byte": "{:.3f} bits per byte"}
        more = [text.format(row[name]) for name, text in shown.items() if name in row]
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        ends = [] if left is None else [f"{left:.0f} s left"]
        said = "  ".join([f"loss {row['loss']:.3f}", *more, speed, *ends])
        self.progress.update(self.task, completed=step, said=said, refresh=True)
        # Every ten seconds: often enough to watch, rarely enough for a log file.
        due = time.monotonic() - self.printed > 10 or step in (1, self.steps)
        if self.progress.disable and due:
            self.printed = time.monotonic()
            text = f"step {step}/{self.steps}  {said}"
            self.console.print(text, highlight=False, soft_wrap=True)


def write_metrics(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Writes the rows as CSV; the keys of the last one are the columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]), restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})

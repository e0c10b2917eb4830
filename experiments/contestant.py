"""A contestant of a benchmark: a process of its own that answers requests in JSON lines.

Both ends are here: `Contestant` asks, `serve` answers. Only the standard library is needed, because
contestants run in environments of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Contestant:
    """A process that runs one contestant's cases."""

    def __init__(
        self,
        name: str,
        worker: Path,
        *,
        python: str | Path = sys.executable,
        environment: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        with open(os.devnull if log is None else log, "a") as errors:
            self.process = subprocess.Popen(
                [str(python), str(worker), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ | (environment or {}),
            )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def ask(self, timeout: float | None = None, **request: Any) -> dict[str, Any]:
        """The answer to one request, or `{"error": ...}`.

        After `timeout` seconds the process is killed: it may hang in a kernel.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            # Each answer is one line: nothing stays in the buffer, where select would not find it.
            if timeout is not None:
                ready, _, _ = select.select([self.process.stdout], [], [], max(timeout, 0))
                if not ready:
                    self.kill()
                    return {"error": f"no answer in {timeout:.0f} s: killed", "killed": True}
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            self.kill()
            return {"error": "the process died", "killed": True}
        return dict(json.loads(line))

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        # A process inside the driver ends when the driver releases it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def close(self) -> None:
        """End the process when it has answered; kill it if it does not end."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers requests until standard input ends; an exception is an answer too."""
    # Libraries print to standard output: answers get a channel of their own.
    channel = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=channel, flush=True)

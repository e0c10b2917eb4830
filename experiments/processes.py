"""Several processes on one machine that live and die together, and what a launcher hears of them.

A launcher starts a process for each rank with `run`, and each rank says that it lives with
`Heart`. Collectives wait for all ranks, so when one ends or freezes, the others wait for ever, and
nothing that they do says for which. So a thread of each rank writes to a pipe of its own. The pipe
of a rank that ended is closed, and that of a frozen one falls silent. A rank whose launcher died
can't write, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PIPE = "LAUNCHER_PIPE"

# Importing JAX and its friends takes seconds, and eight processes at once on two cores a minute.
# Until then a process has no heart.
_STARTING = 180.0


class ProcessError(Exception):
    """A rank that ended or froze; the message is one line."""


@dataclass(frozen=True)
class Limits:
    """How long a launcher waits.

    Attributes:
      silence: seconds without a sign of life after which a rank counts as frozen.
      grace: seconds that ranks have to save and end when they are asked to.
      minutes: after which they are asked to, or None.
    """

    silence: float
    grace: float
    minutes: float | None = None


# ------------------------------------------------------------------------------------------- ranks


class Heart:
    """Tells the launcher that this process lives, from a thread that waits for no collective."""

    def __init__(self, every: float) -> None:
        self.pipe = int(os.environ[PIPE])
        self.every = every
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            self.tell({})
            time.sleep(self.every)

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message of at most 4096 bytes, which a pipe keeps in one piece."""
        try:
            os.write(self.pipe, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            # Nobody watches the ranks any more.
            os._exit(1)


def end(status: int) -> NoReturn:
    """Ends this process at once: what JAX does at exit waits for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---------------------------------------------------------------------------------------- launcher


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    pipe: int
    log: Path
    heard: float
    started: bool = False
    rest: bytes = b""

    def messages(self) -> list[dict[str, Any]] | None:
        """What the rank wrote since the last time; None once it ended."""
        read = os.read(self.pipe, 2**16)
        if not read:
            return None
        *lines, self.rest = (self.rest + read).split(b"\n")
        self.heard, self.started = time.monotonic(), True
        return [message for message in map(json.loads, lines) if message]


def run(
    commands: Sequence[Sequence[str]],
    logs: Path,
    environment: Mapping[str, str],
    limits: Limits,
    told: Callable[[dict[str, Any]], None],
) -> bool:
    """Runs a process for each rank to its end.

    Ctrl-C and SIGTERM ask all ranks to save and end, by SIGTERM. The second one kills them.

    Args:
      commands: of the ranks, in their order.
      logs: the folder for what they print, `rank-0.log` and so on.
      environment: their environment.
      limits: how long to wait.
      told: given each message of a rank.

    Returns:
      Whether they were asked to end by Ctrl-C or SIGTERM.

    Raises:
      ProcessError: after a rank failed, was killed, or froze, and all others were killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ranks: list[_Rank] = []
    try:
        with _asked() as asked:
            for number, command in enumerate(commands):
                ranks.append(_start(command, logs / f"rank-{number}.log", environment))
            _watch(ranks, limits, told, asked)
            return bool(asked)
    finally:
        for rank in ranks:
            # Not SIGTERM, which JAX catches, and a frozen process does not see.
            rank.process.kill()
            rank.process.wait()
            os.close(rank.pipe)


def _start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> _Rank:
    pipe, theirs = os.pipe()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**environment, PIPE: str(theirs)},
            pass_fds=[theirs],
            # Ctrl-C on the terminal is for the launcher alone, which tells all ranks together.
            start_new_session=True,
        )
    os.close(theirs)
    return _Rank(process, pipe, log, time.monotonic())


@contextmanager
def _asked() -> Iterator[list[int]]:
    """The signals so far that ask to end."""
    found: list[int] = []
    both = (signal.SIGINT, signal.SIGTERM)
    kept = [signal.signal(number, lambda number, _: found.append(number)) for number in both]
    try:
        yield found
    finally:
        for number, handler in zip(both, kept, strict=True):
            signal.signal(number, handler)


def _watch(
    ranks: Sequence[_Rank],
    limits: Limits,
    told: Callable[[dict[str, Any]], None],
    asked: Sequence[int],
) -> None:
    began = time.monotonic()
    deadline = None
    with selectors.DefaultSelector() as pipes:
        for number, rank in enumerate(ranks):
            pipes.register(rank.pipe, selectors.EVENT_READ, (number, rank))
        while pipes.get_map():
            for key, _ in pipes.select(0.2):
                number, rank = key.data
                messages = rank.messages()
                for message in messages or []:
                    told(message)
                if messages is None:
                    pipes.unregister(rank.pipe)
                    if _ended_early(number, rank, deadline is not None):
                        # The others can't save without it.
                        return
            # After all pipes were read: this process may have been stopped itself, and they full.
            now = time.monotonic()
            for key in pipes.get_map().values():
                number, rank = key.data
                allowed = limits.silence if rank.started else _STARTING
                if now - rank.heard > allowed:
                    raise ProcessError(
                        f"rank {number} (process {rank.process.pid}) gave no sign of life for "
                        f"{allowed:g} s"
                    )
            over = limits.minutes is not None and now - began > 60 * limits.minutes
            if (asked or over) and deadline is None:
                deadline = now + limits.grace
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        rank.process.send_signal(signal.SIGTERM)
            if len(asked) > 1:
                raise ProcessError("interrupted twice")
            if deadline is not None and now > deadline:
                raise ProcessError(f"the ranks did not end within {limits.grace:g} s")


def _ended_early(number: int, rank: _Rank, asked: bool) -> bool:
    """Whether a rank that closed its pipe was asked to end before it could catch SIGTERM.

    Raises:
      ProcessError: if it failed, or was killed.
    """
    try:
        status = rank.process.wait(10)
    except subprocess.TimeoutExpired:
        raise ProcessError(f"rank {number} closed its pipe and did not end") from None
    if asked and status == -signal.SIGTERM:
        return True
    if status < 0:
        name = signal.Signals(-status).name
        raise ProcessError(f"rank {number} (process {rank.process.pid}) was killed by {name}")
    if status:
        lines = rank.log.read_text(errors="replace").strip().splitlines() or ["no message"]
        raise ProcessError(f"rank {number} failed: {lines[-1][:300]} (all of it: {rank.log})")
    return False


def free_port() -> int:
    """A port of the loopback address that nobody listens on.

    Raises:
      OSError: where sockets are refused.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

"""How a script ends: what came to nothing is one line and a status, never a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from data import DataError


def command(name: str) -> Callable[[Callable[[list[str]], int | None]], Callable[..., int]]:
    """A script's main function, from one that takes the arguments of the command line.

    The exit status is what that function returns, 0 for None; 2 for unusable input (`DataError`),
    with its one line on standard error; 130 after Ctrl-C.
    """

    def of(run: Callable[[list[str]], int | None]) -> Callable[..., int]:
        @functools.wraps(run)
        def main(arguments: Sequence[str] | None = None) -> int:
            try:
                return run(list(sys.argv[1:] if arguments is None else arguments)) or 0
            except DataError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                return 130

        return main

    return of

"""Errors that a user can cause, and how a stage reports them: one line, exit code 1, no traceback."""

import io
import sys
from collections.abc import Callable

LONGEST = 1000  # characters of a message: what it quotes may be a megabyte


class UserError(Exception):
    """What is wrong, where, and what would be right, in one line. Anything else that escapes is a bug of ours."""

    def __init__(self, message: str) -> None:
        line = one_line(message)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} ... {line[-250:]}")


def one_line(text: str) -> str:
    """Text from elsewhere for a terminal: without line breaks, and what would steer the terminal is written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def run_stage(main: Callable[[], None]) -> None:
    """Runs a stage's `main`; a UserError becomes `error: ...` on stderr, any other exception keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a policy says must not end a run in a Latin-1 terminal
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

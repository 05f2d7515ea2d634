"""Errors that a user can cause, and how a stage reports them: one line, exit code 1, no traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, where, and what would be right, in one line. Anything else that escapes is a bug of ours."""


def run_stage(main: Callable[[], None]) -> None:
    """Runs a stage's `main`; a UserError becomes `error: ...` on stderr, any other exception keeps its traceback."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)

"""Errors that a user can cause, and how a stage reports them: one line, exit code 1, no traceback."""

import difflib
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

LONGEST = 1000  # characters of a message; a quoted value may be a megabyte long


class UserError(Exception):
    """A user's mistake, in one line: what is wrong, where, and what would be right. Other exceptions are bugs of
    ours."""

    def __init__(self, message: str) -> None:
        line = one_line(message)
        super().__init__(cut(line, LONGEST))


def cut(line: str, longest: int) -> str:
    """Shorten a long line to its beginning and its end. The end holds the advice and starts with a clause."""
    if len(line) <= longest:
        return line
    start, end = line[: longest * 3 // 5], line[-longest * 2 // 5 + 10 :]
    clause = re.search(r"(?<=[.;!?]) | (?=\()", end) or re.search(" ", end)
    blank = start.rfind(" ")
    # a quoted word may be a megabyte long: then cut inside the word
    start = start[:blank] if blank > len(start) // 2 else start
    return f"{start} ... {end[clause.end() :] if clause else end}"


def one_line(text: str) -> str:
    """Text from elsewhere as one printable line: line breaks become blanks, control characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def nearest(wrong: str, known: Iterable[str]) -> str | None:
    """Return a known name that ends or begins with `wrong`, or is similar to it; else None."""
    known = list(known)
    near = [name for name in known if name.endswith(f".{wrong}")]
    near += sorted((name for name in known if len(wrong) > 2 and name.startswith(wrong)), key=len)
    near += difflib.get_close_matches(wrong, known, n=1)
    return near[0] if near else None


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` if there is a `nearest` name, else an empty text."""
    near = nearest(wrong, known)
    return f"; did you mean {near!r}?" if near else ""


def run_stage(main: Callable[[], None], arguments: bool = False) -> None:
    """Run a stage's `main`. A UserError becomes `error: ...` on stderr, any other exception keeps its traceback. A
    `main` without `arguments` takes only -h and --help, which print the module's docstring."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a completion that a Latin-1 terminal cannot show must not end the run, and a log must show each line at once
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if "JPY_PARENT_PID" in os.environ:
        # a notebook's cell looks like a terminal to its commands, but it keeps each redrawing of a progress bar
        for stream in (sys.stdout, sys.stderr):
            stream.isatty = lambda: False  # type: ignore[method-assign]
    try:
        if not arguments and {"-h", "--help"} & set(sys.argv[1:]):
            print(sys.modules[main.__module__].__doc__)
            return
        if not arguments and sys.argv[1:]:
            raise UserError(
                f"{' '.join(sys.argv[1:])}: no arguments are taken here; choose in params.yaml, or by `dvc exp run -S`"
            )
        _check_python()
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        if not arguments:
            raise
        # `head`, or another reader of the output, has closed the pipe; Python would complain again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted" if arguments else "interrupted; the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        gc.freeze()  # else Python searches torch and transformers for garbage at exit, which takes a second


def _check_python() -> None:
    """Raises UserError if Python runs another project's stage, or runs without the docstrings that a library needs."""
    package = Path(__file__).parent
    here = Path(package.name)
    if sys.flags.safe_path and here.is_dir() and not here.samefile(package):
        # in its own folder, an experiment would run the workspace's code
        raise UserError(
            f"Python imports {package}, not {here.resolve()}, where it was started: `unset PYTHONSAFEPATH`, and leave "
            "out -P"
        )
    if sys.flags.optimize > 1:
        raise UserError(
            "Python runs without docstrings, which transformers reads: `unset PYTHONOPTIMIZE`, or set it to 1"
        )

"""How many faults the tests injected, and how many of them the pipeline survived.

`make test` injects a few faults of each kind, `make test-all` also those that are marked exhaustive. `make test-faults`
injects all of them in full number and writes docs/reliability.json.

    python -m tests.faults    # docs/reliability.json -> the table of docs/RELIABILITY.md
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

FULL = os.environ.get("FAULTS") == "full"
COUNTS = Path(__file__).resolve().parents[1] / "docs/reliability.json"
injected: Counter[str] = Counter()
survived: Counter[str] = Counter()


def rounds(full: int, few: int) -> int:
    """How often to inject: `full` under `make test-faults`, else `few`."""
    return full if FULL else few


def first(number: int, cases: Iterable[Any]) -> list[Any]:
    """Cases of parametrize: the first of them run under `make test`, the others are exhaustive."""
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.exhaustive] * (at >= number)) for at, case in enumerate(listed)]


@contextlib.contextmanager
def fault(kind: str) -> Iterator[None]:
    """Counts one fault of this kind; it is survived when the block, which injects it and checks what came of it, ends
    without an exception."""
    injected[kind] += 1
    yield
    survived[kind] += 1


def save() -> None:
    """Puts the counts of this process in the place of earlier ones of the same kinds."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
    counts |= {kind: {"injected": number, "survived": survived[kind]} for kind, number in injected.items()}
    COUNTS.write_text(json.dumps(dict(sorted(counts.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table() -> str:
    rows = json.loads(COUNTS.read_text(encoding="utf-8"))
    lines = ["| fault | injected | survived | lost |", "|---|---|---|---|"]
    lines += [
        f"| {kind} | {row['injected']} | {row['survived']} | {row['injected'] - row['survived']} |"
        for kind, row in rows.items()
    ]
    total, whole = (sum(row[name] for row in rows.values()) for name in ("injected", "survived"))
    return "\n".join([*lines, f"| **all** | {total} | {whole} | {total - whole} |"])


if __name__ == "__main__":
    print(table())

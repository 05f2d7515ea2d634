"""What is told of the terms of a sum beside the verdict: one that drowns the others, one that has died. No verdict by
itself: a run whose reward is nearly one term alone may be healthy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.diagnosis.cures import rounded
from pipeline.file_io import total

DOMINANT = 0.9  # share of the signal, mean over the run's steps
DEAD_STEPS = 5  # at the end of a run, in none of which a term differs between two completions of a prompt

TermRow = Mapping[str, Any]  # of terms.jsonl


@dataclass(frozen=True)
class Note:
    kind: Literal["dominant", "dead"]
    term: str
    short: str  # one sentence, for the headline
    advice: str
    weight: float | None = None  # what the term's should be; None: no weight would help

    @property
    def text(self) -> str:
        return f"{self.short} {self.advice}"


def notes(terms: Mapping[str, Sequence[TermRow]], combine: str) -> list[Note]:
    """The notes on a run, from its rows of terms.jsonl by term; none where the reward is no sum.

    dominant: the mean over the steps of a term's share is above DOMINANT, and another term that counts is alive. Its
    weight should be such that its spread within a prompt is the mean of theirs. dead: in the last DEAD_STEPS steps or
    more a term that counts has no spread within any prompt.
    """
    counted = {name: own for name, own in terms.items() if own[-1]["weight"] != 0}
    since = {name: dead_since(own) for name, own in counted.items()}
    alive = {name: own for name, own in counted.items() if since[name] is None}
    found = [dominant_note(name, alive, combine) for name in alive if len(alive) > 1]
    found += [dead_note(name, own[-1], since[name]) for name, own in counted.items()]
    return [note for note in found if note is not None]


def dead_since(rows: Sequence[TermRow]) -> int | None:
    """The step from which on a term has had no spread to the end; None where that is too few steps."""
    silent = 0
    while silent < len(rows) and rows[-1 - silent]["std_within_weighted"] == 0:
        silent += 1
    return int(rows[-silent]["step"]) if silent >= DEAD_STEPS else None


def dead_note(name: str, last: TermRow, since: int | None) -> Note | None:
    if since is None:
        return None
    when = f"since step {since}" if since else "from the start"
    said = "says nothing"
    if last["mean"] is not None:
        said = f"gives all completions of a prompt the same, last {last['mean']:.4g}"
    advice = f"It {said}: no weight makes a difference; leave it out, or have it tell bad from worse."
    return Note("dead", name, f"`{name}` is dead {when}.", advice)


def dominant_note(name: str, alive: Mapping[str, Sequence[TermRow]], combine: str) -> Note | None:
    share = mean_of(alive[name], "share")
    if not share > DOMINANT:  # NaN, too
        return None
    # normalised terms have a spread of 1 each
    column = "weight" if combine == "normalized" else "std_within_weighted"
    spreads = {term: abs(mean_of(rows, column)) for term, rows in alive.items()}
    others = [spread for term, spread in spreads.items() if term != name]
    weight = alive[name][-1]["weight"]
    better = rounded(weight * total(others) / len(others) / spreads[name])
    advice = f"A weight of {better:g} instead of {weight:g} would make it differ within a prompt as much as "
    advice += f"`{next(term for term in alive if term != name)}` does" if len(others) == 1 else "the others do"
    advice += "." if combine == "normalized" else ", and so would `combine: normalized`, in every prompt."
    return Note("dominant", name, f"`{name}` carries {share:.0%} of the signal.", advice, better)


def mean_of(rows: Sequence[TermRow], column: str) -> float:
    """Over the steps where it is defined."""
    values = [row[column] for row in rows if row[column] is not None]
    return total(values) / len(values) if values else math.nan

"""By how much the held-out gains of configurations differ: which are comparable, and the table."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.report import comparison
from pipeline.report.comparison import Configuration
from pipeline.report.table import markdown_table
from pipeline.runs.gain_differences import ALPHA, Difference, Gains, Limits, answer
from pipeline.tracking.mlflow_store import PARAM_CHARACTERS

# the tables that compared gains have in common; a condition may name the model instead
ALIKE = ("reward", "encoder", "classifiers", "model")


class Compared(NamedTuple):
    configuration: Configuration
    against: Configuration
    difference: Difference


def gains(configuration: Configuration) -> Gains:
    """The gain of each seed that has one."""
    return {each.params["seed"]: each.gain for each in configuration.trainings if each.gain is not None}


def comparable(found: Iterable[Configuration], alike: Sequence[str]) -> dict[object, list[Configuration]]:
    """The configurations with a gain, in groups that share the held-out prompts, the `evaluate` parameters, and the
    tables of the selectors `alike`."""
    groups: dict[object, list[Configuration]] = {}
    for each in found:
        if gains(each):
            chosen = sorted(item for item in each.params.items() if item[0].partition(".")[0] in alike)
            cut = any(len(value) >= PARAM_CHARACTERS for _, value in chosen)
            (measured,) = {training.measured for training in each.trainings if training.gain is not None}
            # nobody knows whether values that the record has cut are the same
            kind = (*chosen, measured, each.trainings[0].config if cut else "")
            groups.setdefault(kind, []).append(each)
    return groups


def intervals(compared: Sequence[Compared]) -> tuple[list[Limits | None], int]:
    """The interval of each comparison, and how many there are: all of them hold together."""
    count = sum(each.difference.error is not None for each in compared)
    return [each.difference.interval(max(1, count)) for each in compared], count


def differences_markdown(compared: Sequence[Compared]) -> str:
    """The text below the table: the differences with their intervals; empty if none are compared."""
    if not compared:
        return ""
    limits, count = intervals(compared)
    line = "difference: held-out gain minus that of the configuration in `against`, in units of the reward"
    if count:
        line += f"; interval: {100 * (1 - ALPHA / count):.4g}%, over seeds (Student's t)"
    if count > 1:
        line += f", so that all {count} intervals hold together with 95% (Bonferroni)"
    rows = [["configuration", "against", "difference", "interval", "seeds", "gain is"]]
    for each, interval in zip(compared, limits, strict=True):
        between = " to ".join(signed(end) for end in interval) if interval else ""
        labels = [each.configuration.label(), each.against.label()]
        rows.append([*labels, signed(each.difference.mean), between, seeds_of(each), answer(interval)])
    return f"\n{line}\n\n{markdown_table(rows)}"


def signed(value: float) -> str:
    return comparison.format_mean_std(comparison.Spread(value, None, 1), "+")


def seeds_of(compared: Compared) -> str:
    """`3 paired` or `3 and 4`; if some were left out, also of how many."""
    used = compared.difference
    there = [len(gains(each)) for each in (compared.configuration, compared.against)]
    text = f"{len(used.seeds)} paired" if used.paired else f"{len(used.seeds)} and {len(used.other_seeds)}"
    left_out = [len(used.seeds), len(used.other_seeds)] != there
    return text + (f" (of {there[0]} and {there[1]})" if left_out else "")


def differences_csv(found: Sequence[Configuration], compared: Sequence[Compared]) -> str:
    """The differences with all digits, one row per comparison; low and high are empty for too few seeds."""
    limits, count = intervals(compared)
    names = ["against", "difference", "low", "high", "level", "paired", "seeds", "against_seeds", "gain_is"]
    rows = [[*found[0].shown, *names]]
    for (each, against, gained), interval in zip(compared, limits, strict=True):
        ends = [*map(str, interval), str(1 - ALPHA / count)] if interval else ["", "", ""]
        seeds = [" ".join(gained.seeds), " ".join(gained.other_seeds)]
        cells = [str(gained.mean), *ends, "yes" if gained.paired else "no", *seeds, answer(interval)]
        rows.append([*each.shown.values(), against.label(), *cells])
    return comparison.csv_text(rows)

"""Many runs by configuration: which parameters tell them apart, and mean ± std over seeds of what became of them."""

import csv
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pipeline.config.schema import SELECTORS
from pipeline.diagnosis.verdict import TITLES
from pipeline.errors import one_line
from pipeline.report.table import markdown_table
from pipeline.tracking.summaries import RunSummary

LAST_STEPS = 5  # as in summary.json
ABSENT = "–"  # a parameter that a configuration does not have
CELL = 60  # characters of a parameter in the table
NUMBERS = {  # column of the table -> column of the history (mean of the last steps); None: the held-out difference
    "training reward": "reward_mean",
    "held-out gain": None,
    "entropy": "entropy",
    "different, %": "distinct_completions",
}
LEGEND = (
    f"training reward, entropy (nats a token) and share of different completions: of the last {LAST_STEPS} steps; "
    "held-out gain: reward on held-out prompts, trained policy minus reference model"
)
OVER_SEEDS = "mean ± standard deviation over seeds"
OF_ONE_SEED = "of one seed, the gain with its 95% interval over held-out prompts"


class Configuration(NamedTuple):
    """Runs that differ in their seed alone."""

    shown: dict[str, str]  # the parameters that differ between the configurations
    params: dict[str, str]
    trainings: list[RunSummary]  # one per seed, sorted by seed

    @property
    def reward(self) -> str:
        return self.params["reward"]

    def label(self, without: str = "") -> str:
        """recipe=stable lr=0.0001, or what else tells it apart."""
        return "  ".join(f"{key}={value}" for key, value in self.shown.items() if key != without) or "all"


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; std is None for fewer than two."""

    mean: float | None
    std: float | None
    seeds: int


def configurations(trainings: Iterable[RunSummary]) -> tuple[list[Configuration], int]:
    """The configurations in the order of their values, and how many trainings are left out.

    MLflow keeps every run that there ever was. Of a configuration only the runs of the newest code and data count, and
    of each seed only the newest run. Only gains that were measured alike count.
    """
    groups: dict[str, list[RunSummary]] = {}
    total = 0
    for training in sorted(trainings, key=lambda training: training.made, reverse=True):
        total += 1
        groups.setdefault(training.config, []).append(training)
    kept = []
    for group in groups.values():
        of_seed: dict[str, RunSummary] = {}
        for training in group:
            if (training.code, training.data) == (group[0].code, group[0].data):
                of_seed.setdefault(training.params["seed"], training)
        kept.append(same_evaluation([of_seed[seed] for seed in sorted(of_seed, key=natural)]))
    params = [{key: value for key, value in group[0].params.items() if key != "seed"} for group in groups.values()]
    shown = cells(params, list(groups))
    found = [Configuration(*each) for each in zip(shown, params, kept, strict=True)]
    found.sort(key=lambda each: [natural(each.params["reward"]), *map(natural, each.shown.values())])
    return found, total - sum(map(len, kept))


def cells(configured: Sequence[dict[str, str]], digests: Sequence[str]) -> list[dict[str, str]]:
    """Return the table's cells of each configuration: the parameters that differ, long ones shortened.

    If the cells of two configurations look alike, the beginning of the configuration's digest tells them apart.
    """
    names = differing(configured)
    shown = [{name: shortened(one_line(params.get(name, ABSENT))) for name in names} for params in configured]
    if len({tuple(each.values()) for each in shown}) == len(shown):
        return shown
    length = next(size for size in range(8, 65) if len({each[:size] for each in digests}) == len(digests))
    return [each | {"config": value[:length]} for each, value in zip(shown, digests, strict=True)]


def shortened(text: str) -> str:
    """A text for a cell; a long text is cut to its two ends."""
    return text if len(text) <= CELL else f"{text[: CELL // 2 - 2]} … {text[-(CELL // 2 - 1) :]}"


def same_evaluation(group: list[RunSummary]) -> list[RunSummary]:
    """Drop the gains that were not measured on the same prompts and in the same way as most gains.

    The first seed breaks ties. Time cannot break them: MLflow's is that of training, DVC's that of the evaluation.
    """
    ways = Counter(training.measured for training in group if training.gain is not None)
    how = ways.most_common(1)[0][0] if ways else None  # of equal counts, that of the first seed
    return [
        training if training.measured == how else training._replace(gain=None, gain_interval=None) for training in group
    ]


def caveats(found: Sequence[Configuration]) -> list[str]:
    """Differences that the parameters do not show and that make rows of the table incomparable."""
    trainings = [training for each in found for training in each.trainings]
    again, texts = "run all of them again to compare them", []
    if (versions := len({training.code for training in trainings})) > 1:
        texts.append(f"{versions} versions of the code or of custom/ made these; {again}")
    if changed(trainings, ("prompts", "model", "encoder"), lambda training: training.data):
        texts.append(f"prompts or checkpoints of the same parameters were not always the same files; {again}")
    evaluated = [training for training in trainings if training.gain is not None]
    dropped = [training for training in trainings if training.gain is None and training.measured is not None]
    if dropped or changed(evaluated, ("prompts",), lambda training: training.measured):
        texts.append(
            "held-out gains were measured on different prompts, or with other `evaluate` parameters, and are averaged "
            "only where they were not; `dvc exp run` with the same ones measures again and trains nothing"
        )
    return texts


def changed(
    trainings: Sequence[RunSummary], selectors: Sequence[str], what: Callable[[RunSummary], str | None]
) -> bool:
    """Whether `what` differs between trainings that select the same tables."""
    seen: dict[tuple[tuple[str, str], ...], set[str | None]] = {}
    for training in trainings:
        chosen = sorted(item for item in training.params.items() if item[0].partition(".")[0] in selectors)
        seen.setdefault(tuple(chosen), set()).add(what(training))
    return any(len(values) > 1 for values in seen.values())


def differing(configured: Sequence[dict[str, str]]) -> list[str]:
    """The parameters that tell configurations apart, selectors first. The keys of a table differ wherever its selector
    does, so they are named only if they differ under one value of the selector."""
    names = list(dict.fromkeys(key for params in configured for key in params))
    found = [name for name in SELECTORS if len({params.get(name) for params in configured}) > 1]
    for name in names:
        if name not in SELECTORS:
            selector = name.partition(".")[0]
            values: dict[str | None, set[str | None]] = {}
            for params in configured:
                values.setdefault(params.get(selector), set()).add(params.get(name))
            if any(len(several) > 1 for several in values.values()):
                found.append(name)
    return found


def natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key that compares numbers inside texts as numbers: step1000 before step16000, 3e-05 before 0.0001."""
    try:
        return [(0, float(text), "")]
    except ValueError:
        return [(1, float(part), "") if part.isdecimal() else (2, 0.0, part) for part in re.split(r"(\d+)", text)]


def spread(values: Iterable[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    if not known:
        return Spread(None, None, 0)
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def final_value(training: RunSummary, column: str) -> float | None:
    """Mean over the last LAST_STEPS steps of a training, None where the column is undefined in all of them."""
    steps = range(length(training) - LAST_STEPS, length(training))
    curve = training.curve(column)
    values = [curve[step] for step in steps if step in curve]
    return statistics.fmean(values) if values else None


def length(training: RunSummary) -> int:
    """Steps done. The learning rate of a step is always defined."""
    return max([step for column in ("lr", "reward_mean") for step in training.curve(column)], default=-1) + 1


def legend(found: Sequence[Configuration]) -> str:
    """The legend below the table."""
    counts = {len(each.trainings) > 1 for each in found}
    return "; ".join([*([OVER_SEEDS] if True in counts else []), *([OF_ONE_SEED] if False in counts else []), LEGEND])


def of_seed(training: RunSummary, title: str) -> float | None:
    """A number of the table, for one training."""
    column = NUMBERS[title]
    if column is None:
        return training.gain
    value = final_value(training, column)
    return 100 * value if "%" in title and value is not None else value


def number(configuration: Configuration, title: str) -> Spread:
    """A number of the table over the seeds of a configuration."""
    return spread(of_seed(training, title) for training in configuration.trainings)


def verdicts(configuration: Configuration) -> str:
    """How many seeds ended how: `3 healthy, 2 misaligned objective from step 0 (then 2 empty completions)`."""
    groups: dict[str | None, list[RunSummary]] = {}
    for training in configuration.trainings:
        kinds = training.kinds
        groups.setdefault(None if kinds is None else kinds[0] if kinds else "healthy", []).append(training)
    texts = []
    for kind, group in sorted(groups.items(), key=lambda item: (item[0] != "healthy", item[0] is None, -len(item[1]))):
        text = f"{len(group)} {'not diagnosed' if kind is None else title(kind)}"
        onsets = sorted(training.onset for training in group if training.onset is not None)
        if onsets:
            text += f" from step {onsets[0]}" + (f"–{onsets[-1]}" if onsets[-1] != onsets[0] else "")
        later = Counter(title(other) for training in group for other in (training.kinds or ())[1:])
        if later:
            text += f" (then {', '.join(f'{count} {name}' for name, count in later.most_common())})"
        texts.append(text)
    return ", ".join(texts)


def title(kind: str) -> str:
    """The verdict's words, in the middle of a sentence."""
    names: dict[str, str] = {str(known): name for known, name in TITLES.items()}
    return names.get(kind, kind).lower()


def format_mean_std(value: Spread, sign: str = "") -> str:
    """−5.53 ± 0.09: three digits of the larger number, two if it is below 1."""
    if value.mean is None:
        return ""
    largest = max(abs(value.mean), value.std or 0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    places = min(6, max(0, 2 - power if power >= 0 else 1 - power))
    text = f"{value.mean:{sign}.{places}f}" + (f" ± {value.std:.{places}f}" if value.std is not None else "")
    return text.replace("-", "−")


def format_interval(configuration: Configuration) -> str:
    """(+0.20 to +0.80): the interval of a single seed's gain, which has no standard deviation."""
    if len(configuration.trainings) > 1 or (interval := configuration.trainings[0].gain_interval) is None:
        return ""
    return f" ({interval[0]:+.2g} to {interval[1]:+.2g})".replace("-", "−")


def steps_of(configuration: Configuration) -> str:
    lengths = sorted({length(training) for training in configuration.trainings})
    return str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"


def markdown(found: Sequence[Configuration]) -> str:
    """The table, its columns aligned so that it reads as plain text too."""
    titles = [*found[0].shown, "seeds", "steps", *NUMBERS, "verdict"]
    rows = [titles]
    for each in found:
        numbers = [number(each, name) for name in NUMBERS]
        cells = [
            format_mean_std(value, "+" if "gain" in name else "")
            + (format_interval(each) if NUMBERS[name] is None else "")
            + (f" (n={value.seeds})" if partial(value, each) else "")
            for name, value in zip(NUMBERS, numbers, strict=True)
        ]
        seeds = str(len(each.trainings)) if len(each.trainings) > 1 else "n=1"
        rows.append([*each.shown.values(), seeds, steps_of(each), *cells, verdicts(each)])
    return markdown_table(rows)


def partial(value: Spread, configuration: Configuration) -> bool:
    """Whether only some seeds have this number, because not all were evaluated."""
    return 0 < value.seeds < len(configuration.trainings)


def table_csv(found: Sequence[Configuration]) -> str:
    """The table with all digits; std is empty for one seed. The last columns have the numbers of each seed, in the
    order of `seeds`, and the 95% interval of its gain; - is undefined."""
    names = {name: re.sub(r"\W+", "_", name).strip("_") for name in NUMBERS}
    parts = [f"{name}_{part}" for name in names.values() for part in ("mean", "std", "seeds")]
    by_seed = [f"{name}_by_seed" for name in (*names.values(), "gain_low", "gain_high")]
    rows = [[*found[0].shown, "seeds", "steps", *parts, "verdict", "experiments", *by_seed]]
    for each in found:
        numbers = [cell for name in NUMBERS for cell in number(each, name)]
        seeds = " ".join(training.params["seed"] for training in each.trainings)
        cells = [*each.shown.values(), seeds, steps_of(each), *numbers, verdicts(each)]
        rows.append(["" if cell is None else str(cell) for cell in cells])
        rows[-1].append(" ".join(training.name for training in each.trainings))
        of_seeds = [[of_seed(training, name) for training in each.trainings] for name in NUMBERS]
        of_seeds += [
            [training.gain_interval and training.gain_interval[end] for training in each.trainings] for end in (0, 1)
        ]
        rows[-1] += [" ".join("-" if value is None else str(value) for value in values) for values in of_seeds]
    return csv_text(rows)


def band(configuration: Configuration, column: str) -> dict[int, Spread]:
    """Mean and std over the seeds of each step that any of them has."""
    curves = [training.curve(column) for training in configuration.trainings]
    return {step: spread(curve.get(step) for curve in curves) for step in sorted(set().union(*curves))}


def curves_csv(found: Sequence[Configuration], column: str) -> str:
    """The numbers of the figure: one row per configuration and step."""
    rows = [[*found[0].shown, "step", f"{column}_mean", f"{column}_std", "seeds"]]
    for each in found:
        for step, value in band(each, column).items():
            rows.append([*each.shown.values(), *("" if cell is None else str(cell) for cell in (step, *value))])
    return csv_text(rows)


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

"""`reinforce compare`: many experiments by configuration, mean ± std over seeds, and by how much their gains differ.

Prints the tables; writes them, the learning curves and their figure to reports/compare/.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation

from pipeline.config.schema import SELECTORS
from pipeline.errors import UserError, did_you_mean
from pipeline.file_io import write_text
from pipeline.report import comparison, comparison_figure, style
from pipeline.report.comparison import Configuration
from pipeline.report.gain_table import ALIKE, Compared, comparable, differences_csv, differences_markdown, gains
from pipeline.runs.gain_differences import difference
from pipeline.tracking import mlflow_store
from pipeline.tracking.summaries import RunSummary, from_dvc, from_mlflow, readable

NONE_YET = "queue some, as `dvc exp run --queue -S recipe=notebook,stable -S 'seed=range(0,3)'`, and `dvc queue start`"


def main(options: argparse.Namespace) -> None:
    """Raises UserError if there is nothing to compare, or an option names something that does not exist."""
    with readable():
        chosen = choose(read(options), options.experiments, options.where)
        check_metric(options.metric, chosen)
        found, left_out = comparison.configurations(chosen)
        compared, notes = compare_gains(found, options.against)
        table = f"{comparison.markdown(found)}\n{comparison.legend(found)}\n" + differences_markdown(compared)
        source = "MLflow's runs" if options.source == "mlflow" else "DVC's experiments"
        texts = {
            "table.md": table,
            "table.csv": comparison.table_csv(found),
            "differences.csv": differences_csv(found, compared),
            "curves.csv": comparison.curves_csv(found, options.metric),
            "curves.svg": style.svg(comparison_figure.curves(found, options.metric, source)),
        }
    for name, text in texts.items():
        write_text(options.out / name, text)
    print(table)
    if left_out:
        print(f"{left_out} more left out: the same parameters and seed again, or made by older code or data\n")
    for note in [*comparison.caveats(found), *notes]:
        print(f"note: {note}\n")
    if len(comparison_figure.look_of(found)) > comparison_figure.LOOKS:
        print(
            f"more than {comparison_figure.LOOKS} configurations: lines of the figure look alike; choose by --where\n"
        )
    print(f"tables and curves: {options.out}/table.md, table.csv, differences.csv, curves.csv, curves.svg")


def read(options: argparse.Namespace) -> list[RunSummary]:
    """All finished runs, from MLflow or DVC. Raises UserError if there is none."""
    if options.source == "mlflow":
        if found := from_mlflow():
            return found
        store = mlflow_store.without_password(mlflow_store.store_uri())
        raise UserError(f"no finished run in MLflow's store {store}: {NONE_YET}; or read `--from dvc`")
    if found := from_dvc(every_commit=options.all_commits or bool(options.experiments)):
        return found
    raise UserError(f"this commit and its experiments hold no run: {NONE_YET}; or look at --all-commits")


def choose(found: Sequence[RunSummary], names: Sequence[str], where: Sequence[str]) -> list[RunSummary]:
    """The runs with these names, or all runs, that fit every `key=value,value`. Raises UserError naming a missing
    run."""
    for name in names:
        if name not in {training.name for training in found}:
            raise UserError(f"there is no finished experiment {name!r}{nearest(name, (each.name for each in found))}")
    named = [place for place, training in enumerate(found) if not names or training.name in names]
    kept = fitting("--where", where, [training.params for training in found], named, "run")
    return [found[place] for place in kept]


def fitting(
    option: str, conditions: Sequence[str], params: Sequence[Mapping[str, str]], kept: Sequence[int], what: str
) -> list[int]:
    """The indices in `kept` whose `params` fit every `key=value,value`. Raises UserError for an unknown key, or if none
    is left."""
    known = {name for each in params for name in each}
    for condition in conditions:
        key, equals, values = condition.partition("=")
        if not equals:
            raise UserError(f"{option} {condition!r}: should be KEY=VALUE, such as recipe=stable")
        if key not in known and (selected := as_selected(key)):
            # the key as a sweep names it: it holds for the runs that select this table
            selector, table, key = selected
            kept = [place for place in kept if params[place].get(selector) == table]
        if key not in known:
            raise UserError(f"{option} {condition!r}: no {what} has a parameter {key!r}{nearest(key, known)}")
        wanted = (values, *values.split(","))
        kept = [place for place in kept if any(same(params[place].get(key), value) for value in wanted)]
        if not kept:
            there = sorted({each.get(key, "none") for each in params}, key=comparison.natural)
            values = ", ".join(map(comparison.shortened, there))
            raise UserError(f"{option} {condition!r}: no {what} is left; the values of {key} are {values}")
    return list(kept)


def as_selected(key: str) -> tuple[str, str, str] | None:
    """(selector, table, key of a run's parameters) for a key as `-S` has it: recipes.stable.lr is recipe.lr where
    recipe is stable. None for other keys."""
    tables, _, rest = key.partition(".")
    table, dot, name = rest.partition(".")
    selector = next((selector for selector, plural in SELECTORS.items() if plural == tables), None)
    return (selector, table, f"{selector}.{name}") if selector and dot else None


def same(value: str | None, wanted: str) -> bool:
    """Whether both are the same text or the same number: 3e-5 and 3e-05."""
    if value is None or value == wanted:
        return value == wanted
    try:
        return Decimal(value) == Decimal(wanted)  # exact: as floats, some seeds beyond 2**53 would be equal
    except InvalidOperation:
        return False


def check_metric(metric: str, trainings: Sequence[RunSummary]) -> None:
    known = set().union(*(training.columns for training in trainings))
    if metric not in known:
        raise UserError(f"--metric {metric!r}: history.csv has no such column{nearest(metric, known)}")


def nearest(wrong: str, known: Iterable[str]) -> str:
    known = sorted(set(known))
    return did_you_mean(wrong, known) or f"; there are {', '.join(known[:20])}"


# --- differences of held-out gains


def compare_gains(found: Sequence[Configuration], conditions: Sequence[str]) -> tuple[list[Compared], list[str]]:
    """Compare each configuration with the comparable one that fits every condition. Returns also notes on what is not
    compared.

    Without conditions, compare the second with the first wherever exactly two are comparable. Different models are
    comparable if a condition names one. Raises UserError if no configuration fits the conditions, or several comparable
    ones do.
    """
    alike = [key for key in ALIKE if key != "model" or not any(each.startswith("model") for each in conditions)]
    groups = comparable(found, alike)
    if conditions:
        params = [{**each.shown, **each.params} for each in found]
        fit = fitting("--against", conditions, params, range(len(found)), "configuration")
        bases = comparable([found[place] for place in fit], alike)
    else:
        bases = {kind: group[:1] for kind, group in groups.items() if len(group) == 2}
    compared, alone, unmatched = [], [], []
    for kind, group in groups.items():
        base = bases.get(kind, [])
        if len(base) > 1:
            raise UserError(
                f"--against {' '.join(conditions)!r}: should fit one of the configurations that are comparable, not "
                f"{len(base)}: {'; '.join(each.label() for each in base)}; give --against again to choose"
            )
        others = [each for each in group if each not in base]
        if base:
            compared += [Compared(each, base[0], difference(gains(each), gains(base[0]))) for each in others]
            alone += [] if others else base
        else:
            unmatched += others
    reasons = {
        "nothing is comparable with": alone,
        f"not compared, as nothing of the same {', '.join(alike)} and held-out prompts fits --against": unmatched,
        "not compared, without a held-out gain": [each for each in found if not gains(each)],
    }
    notes = [f"{why}: {'; '.join(each.label() for each in those)}" for why, those in reasons.items() if those]
    return compared, notes if conditions else []

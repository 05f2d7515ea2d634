"""`reinforce compare`: many experiments by configuration, mean ± std over seeds.

Prints the table; writes it, the learning curves and their figure to reports/compare/.
"""

import argparse
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation

from pipeline.config.schema import SELECTORS
from pipeline.errors import UserError, did_you_mean
from pipeline.file_io import write_text
from pipeline.report import comparison, comparison_figure, style
from pipeline.tracking import mlflow_store
from pipeline.tracking.summaries import RunSummary, from_dvc, from_mlflow, readable

NONE_YET = "queue some, as `dvc exp run --queue -S recipe=notebook,stable -S 'seed=range(0,3)'`, and `dvc queue start`"


def main(options: argparse.Namespace) -> None:
    """Raises UserError where there is nothing to compare, or where an option names what is not there."""
    with readable():
        chosen = choose(read(options), options.experiments, options.where)
        check_metric(options.metric, chosen)
        found, left_out = comparison.configurations(chosen)
        table = comparison.markdown(found)
        source = "MLflow's runs" if options.source == "mlflow" else "DVC's experiments"
        texts = {
            "table.md": f"{table}\n{comparison.legend(found)}\n",
            "table.csv": comparison.table_csv(found),
            "curves.csv": comparison.curves_csv(found, options.metric),
            "curves.svg": style.svg(comparison_figure.curves(found, options.metric, source)),
        }
    for name, text in texts.items():
        write_text(options.out / name, text)
    print(f"{table}\n{comparison.legend(found)}\n")
    if left_out:
        print(f"{left_out} more left out: the same parameters and seed again, or made by older code or data\n")
    for caveat in comparison.caveats(found):
        print(f"note: {caveat}\n")
    if len(comparison_figure.look_of(found)) > comparison_figure.LOOKS:
        print(
            f"more than {comparison_figure.LOOKS} configurations: lines of the figure look alike; choose by --where\n"
        )
    print(f"table and curves: {options.out}/table.md, table.csv, curves.csv, curves.svg")


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
    """Those of these names, or all, that fit every `key=value,value`. Raises UserError naming what is not there."""
    for name in names:
        if name not in {training.name for training in found}:
            raise UserError(f"there is no finished experiment {name!r}{nearest(name, (each.name for each in found))}")
    kept = [training for training in found if not names or training.name in names]
    for condition in where:
        key, equals, values = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition!r}: should be KEY=VALUE, such as recipe=stable")
        known = {name for training in found for name in training.params}
        if key not in known and (selected := as_selected(key)):
            # a sweep's name of the key: of the runs that select this table, it is the value of theirs
            selector, table, key = selected
            kept = [each for each in kept if each.params.get(selector) == table]
        if key not in known:
            raise UserError(f"--where {condition!r}: no run has a parameter {key!r}{nearest(key, known)}")
        kept = [
            each for each in kept if any(same(each.params.get(key), value) for value in (values, *values.split(",")))
        ]
        if not kept:
            there = sorted({training.params.get(key, "none") for training in found}, key=comparison.natural)
            values = ", ".join(map(comparison.shortened, there))
            raise UserError(f"--where {condition!r}: no run is left; the values of {key} are {values}")
    return kept


def as_selected(key: str) -> tuple[str, str, str] | None:
    """(selector, table, key of a run's parameters) for a key as `-S` has it: recipes.stable.lr is recipe.lr where
    recipe is stable. None for other keys."""
    tables, _, rest = key.partition(".")
    table, dot, name = rest.partition(".")
    selector = next((selector for selector, plural in SELECTORS.items() if plural == tables), None)
    return (selector, table, f"{selector}.{name}") if selector and dot else None


def same(value: str | None, wanted: str) -> bool:
    """As text, or as the same number: 3e-5 and 3e-05."""
    if value is None or value == wanted:
        return value == wanted
    try:
        return Decimal(value) == Decimal(wanted)  # exactly: as floats, seeds beyond 2**53 would be the same
    except InvalidOperation:
        return False


def check_metric(metric: str, trainings: Sequence[RunSummary]) -> None:
    known = set().union(*(training.columns for training in trainings))
    if metric not in known:
        raise UserError(f"--metric {metric!r}: history.csv has no such column{nearest(metric, known)}")


def nearest(wrong: str, known: Iterable[str]) -> str:
    known = sorted(set(known))
    return did_you_mean(wrong, known) or f"; there are {', '.join(known[:20])}"

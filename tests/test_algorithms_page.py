"""The comparison of algorithms: which rate is chosen, which runs are left, and the tables' numbers."""

import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks import algorithms, algorithms_page
from benchmarks.algorithms import RECIPES, SEEDS, TASKS, TUNING, Plan
from pipeline.config.load import load_params
from tests.project import ROOT

RATES = algorithms.RATES["arithmetic"]


def made(group: str, recipe: str, rate: float, seed: int, end: float, task: str = "arithmetic") -> dict[str, Any]:
    """A run of three steps with 8 samples each, whose held-out reward goes from 0.5 to `end`."""
    found = {"group": group, "task": task, "recipe": recipe, "lr": rate, "seed": seed}
    return found | {"reward": [0.5, 0.6, end], "samples": [8, 8, 8], "heldout": [[0, 0.5], [3, end]]}


def tuned(recipe: str, ends: dict[float, tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        made("tuning", recipe, rate, seed, end)
        for rate, pair in ends.items() for seed, end in zip(TUNING, pair, strict=True)
    ]  # fmt: skip


def test_the_rate_with_the_best_mean_is_chosen_once_all_are_there() -> None:
    low, middle, *high = RATES
    rows = tuned("grpo", {low: (0.6, 0.6), middle: (0.9, 0.5), **dict.fromkeys(high, (1.0, 0.0))})
    assert algorithms.chosen_rate(rows, "arithmetic", "grpo") == middle
    assert algorithms.chosen_rate(rows[:-1], "arithmetic", "grpo") is None
    assert algorithms.chosen_rate(rows, "length", "grpo") is None
    assert algorithms.chosen_rate([*rows, made("report", "grpo", low, 0, 9.0)], "arithmetic", "grpo") == middle


def test_runs_of_the_report_wait_for_the_rate_and_use_other_seeds() -> None:
    assert not set(TUNING) & set(SEEDS)
    assert len(SEEDS) >= 5
    assert {plan.group for plan in algorithms.plans([])} == {"tuning"}
    rows = tuned("rloo", {rate: (rate, rate) for rate in RATES})
    left = algorithms.left(rows, timed=False)
    assert [plan for plan in left if plan.group == "report"] == [
        Plan("report", "arithmetic", "rloo", RATES[-1], seed) for seed in SEEDS
    ]
    assert not [plan for plan in left if (plan.group, plan.task, plan.recipe) == ("tuning", "arithmetic", "rloo")]
    assert len(left) == len(SEEDS) + len(RATES) * len(TUNING) * (len(RECIPES) * len(TASKS) - 1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("group", ["tuning", "time"])
def test_every_run_has_valid_parameters(tmp_path: Path, task: str, group: str) -> None:
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    for recipe in RECIPES:
        apply_overrides(path, Plan(group, task, recipe, 0.00003, 7).overrides())
        params = load_params(path)
        assert (params.recipe, params.selected_recipe.lr, params.seed) == (recipe, 0.00003, 7)
        assert params.train.steps == (
            algorithms.TIMED_STEPS if group == "time" else {"arithmetic": 200, "length": 30}[task]
        )


def test_means_over_seeds_have_scipy_s_intervals() -> None:
    values = [0.5, 0.75, 1.5]
    found = algorithms_page.mean_over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert str(algorithms_page.mean_over_seeds([0.5])) == "0.5"


def test_samples_until_a_level_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms_page, "WINDOW", 2)
    row = made("report", "rloo", 0.1, 0, 1.0) | {"reward": [0.5, 0.9, 0.8, 1.0], "samples": [8, 16, 8, 8]}
    assert algorithms_page.samples_until(row, 0.85) == 32  # 0.7, then 0.85
    assert algorithms_page.samples_until(row, 0.95) == math.inf
    assert algorithms_page.reach([row], 0.85) == "1 of 1, 0.032"
    assert algorithms_page.reach([row], 0.95) == "0 of 1"


def test_the_tables_are_of_the_chosen_rate_and_paired_by_seed() -> None:
    rows = [row for recipe in ("rloo", "grpo", "dapo") for row in tuned(recipe, {rate: (rate, rate) for rate in RATES})]
    best, other = RATES[-1], RATES[0]
    for seed in SEEDS:
        rows += [made("report", "rloo", best, seed, 0.7 + seed / 100), made("report", "rloo", other, seed, 0.0)]
        rows.append(made("report", "grpo", best, seed, 0.8 + seed / 100 + (0.002 if seed % 2 else 0)))
        rows.append(made("report", "dapo", best, seed, 0.7 + (4 - seed) / 100))
    reached = algorithms_page.algorithms_table(rows, "arithmetic")
    differences = [line.split("|") for line in algorithms_page.differences_table(rows, "arithmetic").splitlines()]
    assert "`rloo`" in reached
    assert reached.count("0 of 5") == 3
    assert "0.22 ± 0.02" in reached  # 0.20 to 0.24: t(4, 97.5%) 0.0158 / sqrt 5
    told = {cells[1].strip(): (float(cells[2]), cells[4].strip()) for cells in differences[2:]}
    assert told == {
        "`grpo`": (0.101, "higher"),
        "`dapo`": (pytest.approx(0.0, abs=1e-9), "cannot tell"),
    }
    assert "97.5% interval" in "".join(differences[0])  # two comparisons


def test_the_page_holds_the_tables_place() -> None:
    text = algorithms_page.PAGE.read_text()
    assert text.count(algorithms_page.BEGIN) == text.count(algorithms_page.END) == 1

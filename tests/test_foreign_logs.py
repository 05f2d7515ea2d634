"""`reinforce diagnose LOG`: logs that trl wrote (benchmarks/trl_logs.py), our own history, and what people have."""

import csv
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import __main__ as cli
from pipeline.diagnosis.calibration import null_statistics
from pipeline.diagnosis.foreign import NAMES, first_rows, history_rows, judge, text_metrics
from pipeline.diagnosis.verdict import IN_TRAINING, findings
from pipeline.errors import UserError
from pipeline.file_io import read_jsonl, write_csv, write_jsonl
from pipeline.rl.metrics import CALIBRATION_COLUMNS, HISTORY_COLUMNS
from pipeline.runs.foreign_logs import read_completions, read_log
from pipeline.tracking import mlflow_store
from tests.error_lines import check_line
from tests.project import ROOT

LOGS = ROOT / "tests/logs"
NORMAL = {  # of a batch without learning: mean and spread
    "reward_mean": (-6.5, 0.06), "reward_std_within": (0.45, 0.03), "entropy": (3.7, 0.05), "ref_logprob": (-3.6, 0.08),
    "empty_share": (0.03, 0.02), "distinct_completions": (0.97, 0.02), "repeated_3grams": (0.02, 0.01),
}  # fmt: skip
SE = 0.06  # of the reward, of 16 prompts: their means differ by 0.24


def batches(count: int, seed: int = 1) -> list[dict[str, float]]:
    draw = random.Random(seed)
    rows = []
    for step in range(count):
        row = dict.fromkeys(HISTORY_COLUMNS, 0.0) | {name: draw.gauss(*normal) for name, normal in NORMAL.items()}
        rows.append(row | {"step": float(step), "reward_se": SE, "reward_std_between": 4 * SE})
    return rows


def collapsed(onset: int = 12) -> list[dict[str, float]]:
    return [row | {"empty_share": 0.9, "reward_mean": -7.5} if row["step"] >= onset else row for row in batches(20)]


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    monkeypatch.setattr(sys, "argv", ["reinforce", "diagnose", *map(str, arguments)])
    cli.run()
    return capsys.readouterr().out


def content(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    return dict(json.loads(said(monkeypatch, capsys, *arguments, "--json")))


# --- trl's logs

COMPLETIONS = LOGS / "grpo-collapsed/completions.jsonl"
WITHOUT_KL = {"misaligned", "repetition", "gibberish", "hacking", "mode"}


@pytest.mark.parametrize(
    ("log", "completions", "verdict", "onset", "lacking"),
    [
        ("grpo-healthy", True, "healthy", None, {"misaligned", "gibberish", "hacking"}),
        ("grpo-healthy", False, "healthy", None, {"misaligned", "gibberish", "repetition", "hacking", "mode"}),
        ("grpo-collapsed", True, "repetition", 8, {"misaligned", "gibberish", "hacking"}),
        ("grpo-collapsed", False, "mode", 8, WITHOUT_KL),
        ("rloo-healthy", False, "healthy", None, {"misaligned", "gibberish", "repetition", "hacking", "mode"}),
        ("rloo-collapsed", False, "empty", 9, {"misaligned", "gibberish", "repetition", "hacking", "mode"}),
    ],
)
def test_trl_s_logs(
    log: str, completions: bool, verdict: str, onset: int | None, lacking: set[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = ["--completions", LOGS / log / "completions.jsonl"] if completions else []
    found = content(monkeypatch, capsys, LOGS / log / "trainer_state.json", *more)
    assert (found["verdict"], found["onset"]) == (verdict, onset)
    assert found["not_made"].keys() == lacking
    assert found["not_made"]["misaligned"] == ["logprob_gap, truncation_gap"]
    assert "recipe" not in json.dumps(found), "no setting of ours is theirs"


def test_a_person_reads_what_was_not_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(monkeypatch, capsys, LOGS / "grpo-collapsed").splitlines()
    assert lines[0].startswith("mode: From step 8 on the policy gives almost the same completion every time; entropy: ")
    assert lines[0].endswith(" in the first 6 rows.")
    assert "compared with: the first 6 rows" in lines
    assert "not made: gibberish (lacks ref_logprob, or ref_bits_per_byte)" in lines
    assert "not made in full: mode (lacks distinct_completions)" in lines
    assert lines[-1] == "--completions FILE would tell empty_share, distinct_completions, repeated_3grams"


def test_parquet_as_trl_writes_it_is_the_same(tmp_path: Path) -> None:
    import pandas as pd

    rows = pd.DataFrame(read_jsonl(COMPLETIONS))
    for step, part in rows.groupby("step"):
        part.to_parquet(tmp_path / f"completions_{step:05d}.parquet")
    assert read_completions(tmp_path) == read_completions(COMPLETIONS)
    talk = [[{"role": "assistant", "content": text}] for text in rows["completion"]]
    rows.assign(completion=talk).to_parquet(tmp_path / "talk.parquet")
    assert read_completions(tmp_path / "talk.parquet") == read_completions(COMPLETIONS)


def test_the_bound_on_empty_completions_holds_on_trl_s_texts() -> None:
    texts = read_completions(COMPLETIONS)
    rows = history_rows(read_log(LOGS / "grpo-collapsed"), HISTORY_COLUMNS)
    assert all(row["empty_share"] <= texts[row["step"]]["empty_share"] + 1e-9 for row in rows)


# --- rldoctor's simulated runs: drawn curves under trl's names, each with what was drawn into it

SIMULATED = {
    "entropy_collapse": {"mode"}, "clip_saturation": {"mode"}, "kl_blowup": {"gibberish", "hacking"},
    "saturated_groups": {"healthy", "mode"},
}  # fmt: skip


def test_rldoctor_s_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate = pytest.importorskip("rl_doctor.simulate")
    for scenario in simulate.SCENARIOS:
        for seed in range(3):
            write_jsonl(tmp_path / "run.jsonl", simulate.simulate(scenario, seed=seed)[0])
            found = content(monkeypatch, capsys, tmp_path / "run.jsonl")
            assert found["verdict"] in SIMULATED.get(scenario, {"healthy"}), (scenario, seed)


# --- our own runs


def test_our_history_with_its_calibration_is_judged_as_the_stage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, calibration = collapsed(), [{**row, "batch": row["step"]} for row in batches(8, seed=2)]
    calibration = [{name: row.get(name, 9.0) for name in CALIBRATION_COLUMNS} for row in calibration]  # shuffled: 9
    write_csv(tmp_path / "history.csv", rows)
    write_csv(tmp_path / "calibration.csv", calibration)
    found = content(monkeypatch, capsys, tmp_path / "history.csv", "--calibration", tmp_path / "calibration.csv")
    stage = findings(rows, null_statistics(calibration, 16), len(rows))
    assert [(each["kind"], each["onset"]) for each in found["findings"]] == [(each.kind, each.onset) for each in stage]
    shown = [[evidence["threshold"] for evidence in each["evidence"]] for each in found["findings"]]
    assert shown == [[evidence.limit.threshold for evidence in each.evidence] for each in stage]
    assert found["not_made"] == {}
    assert found["compared_with"] == "for the reference"


def test_the_committed_run_is_healthy_by_all_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = content(monkeypatch, capsys, ROOT / "reports/train/history.csv")
    stage = json.loads((ROOT / "reports/diagnosis.json").read_text())
    assert (found["verdict"], found["onset"]) == (stage["verdict"], stage["onset"])
    assert found["made"].keys() == set(IN_TRAINING)


@pytest.mark.parametrize("ours", [True, False])
def test_a_run_of_mlflow_s_is_read(
    ours: bool, tracking_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours has its calibration among its artifacts; another trainer's has trl's names."""
    client, experiment = mlflow_store.open_store()
    run = client.create_run(experiment, tags={"train_key": "1f" * 32} if ours else {}).info.run_id
    if ours:
        write_csv(tracking_folder / "calibration.csv", batches(8, seed=2))
        client.log_artifact(run, str(tracking_folder / "calibration.csv"), "tables")
    names = {"entropy": "train/entropy", "reward_mean": "train/reward_mean"} if ours else {"entropy": "entropy"}
    for row in batches(12):
        for name, theirs in names.items():
            client.log_metric(run, theirs, 0.01 if row["step"] >= 9 else row[name], step=int(row["step"]))
    found = content(monkeypatch, capsys, f"mlflow:{run}")
    assert (found["verdict"], found["onset"]) == ("mode", 9)
    assert found["compared_with"] == ("for the reference" if ours else "in the first 3 rows")


def test_an_mlflow_run_that_is_not_there_is_one_line(tracking_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reinforce", "diagnose", "mlflow:0123"])
    with pytest.raises(UserError, match="0123"):
        cli.run()
    (tracking_folder / "mlflow.db").unlink()
    with pytest.raises(UserError, match="no MLflow store at"):
        cli.run()
    assert not (tracking_folder / "mlflow.db").exists(), "looking makes none"


# --- the first rows in place of batches without learning


def test_first_rows_raise_few_false_alarms() -> None:
    """Where nothing is learnt: as seldom as batches of the reference do."""
    alarms = sum(bool(judge(batches(24, seed), [], first_rows(24)).found) for seed in range(300))
    assert alarms <= 6  # P(more than 6 | 1%) = 4%


def test_a_drift_at_the_start_hides_no_collapse() -> None:
    rows = [row | {"entropy": 3.7 - 0.15 * min(row["step"], 8)} for row in batches(30)]
    rows = [row | {"entropy": 0.2} if row["step"] >= 20 else row for row in rows]
    assert [(each.kind, each.onset) for each in judge(rows, [], first_rows(30)).found] == [("mode", 20)]


def test_pieces_repeat_as_tokens_do() -> None:
    """Against the pocket model's own tokens, on trl's completions from varied to one text."""
    from transformers import AutoTokenizer

    from pipeline.diagnosis.text import repeated_ngrams

    tokenizer, rows = AutoTokenizer.from_pretrained(ROOT / "data/pocket/checkpoint"), read_jsonl(COMPLETIONS)
    for step in (1, 5, 8, 24):
        texts = [row["completion"] for row in rows if row["step"] == step]
        tokens = repeated_ngrams([tokenizer(text)["input_ids"] for text in texts], 3)
        assert text_metrics(texts)["repeated_3grams"] == pytest.approx(tokens, abs=0.05)


# --- logs as people have them


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    state = json.loads((LOGS / "grpo-collapsed/trainer_state.json").read_text())
    history = [row for row in state["log_history"] if "reward" in row]
    expected = read_log(LOGS / "grpo-collapsed")
    (tmp_path / "list.json").write_text(json.dumps(history))
    write_jsonl(tmp_path / "lines.jsonl", [{"step": row.pop("step"), "data": dict(row)} for row in map(dict, history)])
    for name, prefix, delimiter in (("plain", "", ","), ("wandb", "train/", ","), ("chart", "my run - train/", ";")):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8-sig", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow([("_step" if key == "step" else f"{prefix}{key}") for key in history[0]])
            table.writerows([row.values() for row in history])
    for file in sorted(tmp_path.iterdir()):
        assert read_log(file) == expected, file.name


def test_rows_of_one_step_belong_together_and_the_later_value_counts(tmp_path: Path) -> None:
    rows = [{"step": 2, "entropy": 1.0}, {"step": 1, "entropy": 3.0, "reward": 0.5}, {"step": 2, "reward": 0.7},
        {"step": 2, "eval_reward": 9.0}, {"step": 2, "entropy": 2.0}, {"train_runtime": 5.0}]  # fmt: skip
    write_jsonl(tmp_path / "log.jsonl", rows)
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1.0, "entropy": 3.0, "reward_mean": 0.5}, {"step": 2.0, "entropy": 2.0, "reward_mean": 0.7},
    ]  # fmt: skip


def test_updates_on_one_batch_are_one_row_and_a_nan_in_them_counts(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "entropy": 3.0, "grad_norm": math.nan if step == 7 else 1.0}
        | ({"reward": 0.5} if step % 2 == 0 else {})) for step in range(20)]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    rows = history_rows(read_log(tmp_path / "log.jsonl"), HISTORY_COLUMNS)
    assert [row["step"] for row in rows] == [*range(0, 20, 2)]
    (numeric,) = judge(rows, [], 3).found
    assert (numeric.kind, rows[numeric.onset]["step"]) == ("numeric", 8.0)


def test_completions_of_some_steps_are_judged_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "log.jsonl", [{"step": step, "reward": step % 3} for step in range(40)])
    texts = [{"step": step, "completion": " " if step >= 20 else f"{step} and {i}"} for step in range(0, 40, 5)
        for i in range(8)]  # fmt: skip
    write_jsonl(tmp_path / "said.jsonl", texts)
    found = content(monkeypatch, capsys, tmp_path / "log.jsonl", "--completions", tmp_path / "said.jsonl")
    assert (found["verdict"], found["onset"]) == ("empty", 20)


BAD = {  # content -> what its one line says
    "": "empty; should be trl's trainer_state.json",
    "{": "line 1: not JSON",
    '{"step": 1}\n{"step": ': "line 2: not JSON",
    "[1, 2]": "no rows of names and values",
    '{"log_history": []}': "no rows",
    "reward,entropy\n1,2\n": "no column of steps (step, global_step",
    "stepp,reward\n1,2\n": "did you mean 'step'?",
    "step,colour\n1,2\n": "no column that we know, such as reward_mean, reward, entropy",
    "step,entropyy\n1,2\n": "did you mean 'entropy'?",
    "step,reward\nx,2\n": "no number in the column 'step'",
    "step,reward\n1,2,3\n": "line 2: 3 cells under 2 names",
    "step,reward,reward\n1,2,3\n": "two columns are called 'reward'",
    "step,a - reward,b - reward\n1,2,3\n": "'a - reward' and 'b - reward' mean the same to us",
    "step,reward\n1,\n": "no step with a reward",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_log_is_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text(text)
    monkeypatch.setattr(sys, "argv", ["reinforce", "diagnose", str(tmp_path / "log")])
    with pytest.raises(UserError, match=re.escape(BAD[text])) as refused:
        cli.run()
    check_line(str(refused.value))


def test_other_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, texts = tmp_path / "log.csv", tmp_path / "texts.jsonl"
    log.write_text("step,reward\n1,2\n2,3\n")
    texts.write_text('{"step": 5, "completion": "a"}\n')
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff")
    for arguments, expected in (
        ([tmp_path / "none.csv"], "none.csv: no such file"),
        ([tmp_path], "a folder without trainer_state.json"),
        ([tmp_path / "image.csv"], "not text in UTF-8"),
        ([log, "--first", "2"], "--first 2: should be 2 to 1"),
        ([log, "--calibration", tmp_path / "none.csv"], "none.csv: no such file"),
        ([log, "--calibration", texts], "no table of numbers"),
        ([log, "--completions", tmp_path], "a folder without .parquet files"),
        ([log, "--completions", log], "no column of completions"),
        ([log, "--completions", texts], "no step of the log has eight completions"),
        (["--json"], "--json goes with a LOG"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)) as refused:
            said(monkeypatch, capsys, *arguments)
        check_line(str(refused.value))


def test_a_short_log_and_one_without_a_check_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.csv").write_text("step,reward\n1,2\n2,3\n")
    found = content(monkeypatch, capsys, tmp_path / "log.csv")
    assert (found["verdict"], found["made"]) == ("unknown", {})
    assert found["not_made"].keys() == set(IN_TRAINING)


def test_it_needs_no_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(LOGS / "rloo-collapsed/trainer_state.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert said(monkeypatch, capsys, "trainer_state.json").startswith("empty: From step 9 on most completions are")
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_state.json"]


NUMBERS = st.one_of(st.none(), st.floats(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=1))
KEYS = st.sampled_from(["step", "reward", "reward_std", "entropy", "kl", "loss", "grad_norm", "completions/mean_length",
    "completions/clipped_ratio", "frac_reward_zero_std", "empty_share", "nonfinite", "x"])  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(KEYS, NUMBERS, max_size=8), max_size=14), start=st.text(max_size=3))
def test_any_table_is_judged_or_refused_in_one_line(
    rows: list[dict[str, Any]], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(start + "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["reinforce", "diagnose", str(file), "--json"])
    try:
        cli.run()
    except UserError as refused:
        check_line(str(refused))


def test_the_names_are_those_of_the_docs_table() -> None:
    """docs/METRICS.md has them as read in the other libraries' sources."""
    rows = [line.split("|") for line in (ROOT / "docs/METRICS.md").read_text().splitlines() if line.startswith("| `")]
    documented = {row[1].strip(" `"): " ".join(row[6:]) for row in rows if len(row) > 8}
    for ours, names in NAMES.items():
        column = {"cut_off_share": "ended_share", "token_kl": "ref_kl_k3"}.get(ours, ours)
        assert all(f"`{name}`" in documented[column] for name in names), ours

"""Tracking: the MLflow record is complete, holds nothing twice, and never stops training."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from hashlib import md5
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.commands import ui
from pipeline.errors import UserError
from pipeline.runs import workspace
from pipeline.runs.follower import follower
from pipeline.stages import track
from pipeline.tracking import mlflow_store, presentation, record, summaries
from tests import mlflow_runs
from tests.mlflow_runs import (
    COLUMNS,
    KEY,
    PARAMS,
    START_MS,
    STEPS,
    assert_complete,
    belong_together,
    evaluation,
    grow,
    identity,
    lose_database,
    make_reports,
    start_trainer,
    stored_runs,
    timestamp,
    train_live,
    value,
    wait_until,
    write,
    write_diagnosis,
)
from tests.project import ROOT
from tests.reports import keep_all
from tests.seal import POLICY, edit


def test_importing_tracking_does_not_import_mlflow():
    modules = "pipeline.tracking.mlflow_store, pipeline.stages.track, pipeline.commands.ui"
    code = f"import {modules}, sys; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_workspace_is_dvcs(tracking_folder, monkeypatch):
    assert workspace.root() == tracking_folder
    monkeypatch.setenv("DVC_ROOT", str(tracking_folder / "main"))
    assert mlflow_store.store_uri() == f"sqlite:///{tracking_folder}/main/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert mlflow_store.store_uri() == f"sqlite:///{tracking_folder}/main/runs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflow_store.store_uri() == "http://127.0.0.1:5000"


def test_live_then_track_is_the_full_record(tracking_folder, capsys):
    train_live(STEPS, status="FINISHED")
    assert capsys.readouterr().err == ""
    assert_complete()
    make_reports()
    track.main()
    client, run = assert_complete()
    assert run.info.run_name == "embedding-stable-pocket-s0-1f1f1f1f"
    assert run.data.params["recipe.lr"] == "0.0001"
    assert run.data.metrics["evaluate/embedding/policy/mean"] == -6.5
    assert run.data.metrics["time/seconds_sample"] == 0.5
    inputs = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
    assert inputs == {"prompts-pocket": "a1" * 8, "checkpoint-pocket": "b2" * 8}
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"figures", "tables", "report.html"}
    tables = {item.path for item in client.list_artifacts(run.info.run_id, "tables")}
    assert tables >= {"tables/history.csv", "tables/samples.jsonl", "tables/completions.jsonl"}
    assert run.info.artifact_uri.startswith((tracking_folder / "mlartifacts").as_uri())


@pytest.mark.parametrize("fits", [True, False])
def test_all_completions_are_an_artifact_if_they_fit(tracking_folder, monkeypatch, capsys, fits):
    make_reports()
    keep_all(Path("reports"), steps=2, prompts=2, group=2)
    belong_together()
    size = Path("reports/train/samples/all.parquet").stat().st_size
    monkeypatch.setattr(record, "LARGEST_ARTIFACT", size if fits else size - 1)
    track.main()
    client, (run,) = stored_runs()
    tables = {item.path for item in client.list_artifacts(run.info.run_id, "tables")}
    assert ("tables/all.parquet" in tables) == fits
    assert ("all.parquet is no artifact in MLflow" in capsys.readouterr().err) == (not fits)


def test_the_held_out_curve_and_the_best_policy_are_in_mlflow(tracking_folder):
    """Computed again with another reward, beside what was there: the run is not made anew."""
    make_reports()
    found = {"mean": None, "low": None, "high": None}
    gain = {"prompts": 50, "difference": {"mean": 0.5, "low": 0.25, "high": 0.75}}
    ids = set()
    for mean in (-6.0, -6.0, -7.0):
        row = {"step": 10, "reward": "words", "mean": mean, "low": None, "high": None, "sqrt_kl": 2.0, "gain": found,
               "spread": 1.0, "best_step": 0, "since_best": found, "trained_since_best": found}  # fmt: skip
        write(Path("reports/evaluate/curve.jsonl"), json.dumps(row) + "\n")
        edit(Path("reports/diagnosis.json"), best={"step": 10, "weights": "data/best", "reported_on": gain})
        belong_together()
        track.main()
        ids.add(stored_runs()[1][0].info.run_id)
    assert len(ids) == 1
    assert [(point.step, point.value) for point in history("heldout/words/mean")] == [(10, -6.0), (10, -7.0)]
    assert [(point.step, point.value) for point in history("heldout/sqrt_kl")] == [(10, 2.0)]
    metrics = stored_runs()[1][0].data.metrics
    assert metrics["heldout/words/mean"] == -7.0
    assert "heldout/words/low" not in metrics
    assert {key: value for key, value in metrics.items() if key.startswith("best/")} == {
        "best/step": 10.0, "best/gain/mean": 0.5, "best/gain/low": 0.25, "best/gain/high": 0.75,
    }  # fmt: skip


def status_after(steps):
    """Of the run, once MLflow has the step before."""
    wait_until(lambda: stored_runs()[1] and len(history("train/entropy")) == steps)
    return stored_runs()[1][0].info.status


def history(key):
    client, runs = stored_runs()
    return client.get_metric_history(runs[0].info.run_id, key)


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [("", "FINISHED"), ("signal", "KILLED")])
def test_a_process_follows_the_trainer_and_ends_with_it(tracking_folder, end, status):
    trainer = start_trainer(end)
    assert trainer.communicate(timeout=300)[1] == ""
    run = stored_runs()[1][0]
    assert (run.info.status, run.data.tags["pid"]) == (status, str(trainer.pid))
    assert [metric.step for metric in history("train/entropy")] == list(range(STEPS))


@pytest.mark.slow
def test_a_killed_trainer_leaves_its_last_state_in_mlflow_and_no_process(tracking_folder):
    trainer = start_trainer("waits")
    assert status_after(STEPS) == "RUNNING"
    os.killpg(trainer.pid, signal.SIGKILL)
    assert trainer.communicate(timeout=300)[1] == "", "its follower holds stderr until it ends"
    assert status_after(STEPS) == "KILLED"


@pytest.mark.slow
def test_ctrl_c_does_not_reach_the_follower(tracking_folder):
    trainer = start_trainer("waits")
    assert status_after(STEPS) == "RUNNING"
    os.killpg(trainer.pid, signal.SIGINT)
    assert "warning" not in trainer.communicate(timeout=300)[1]
    assert status_after(STEPS) == "FAILED"  # `train` itself catches it, and ends as KILLED


def test_resumed_training_logs_nothing_twice(tracking_folder, monkeypatch):
    train_live(7)  # killed after step 6; the resume state is of step 4
    assert stored_runs()[1][0].info.status == "KILLED"
    monkeypatch.setattr(mlflow_runs, "START_MS", START_MS + 5_000_000)
    train_live(STEPS, start=5, status="FINISHED")
    assert_complete()
    make_reports()
    track.main()
    assert_complete()


def test_repeated_training_is_the_same_run(tracking_folder, monkeypatch):
    """`dvc repro -f` trains again with other clock times."""
    train_live(STEPS, status="FINISHED")
    make_reports()
    track.main()
    before = stored_runs()[1][0].info.end_time
    monkeypatch.setattr(mlflow_runs, "START_MS", START_MS + 5_000_000)
    train_live(7, status="KILLED")
    assert_complete()
    assert stored_runs()[1][0].info.end_time == before


def test_half_logged_run_is_completed(tracking_folder):
    train_live(4, status="KILLED")
    make_reports()
    track.main()
    client, run = assert_complete()
    assert run.info.end_time == timestamp(STEPS - 1) or run.info.end_time >= run.info.start_time
    times = client.get_metric_history(run.info.run_id, "train/entropy")
    assert [metric.timestamp for metric in times] == [timestamp(step) for step in range(STEPS)]


def test_lost_database_is_rebuilt_from_files(tracking_folder):
    make_reports(timings=False)
    track.main()
    first = (tracking_folder / "reports/track/track.json").read_bytes()
    lose_database()
    track.main()
    _, run = assert_complete()
    assert (tracking_folder / "reports/track/track.json").read_bytes() == first
    assert run.info.start_time <= run.info.end_time


def test_running_track_again_changes_nothing(tracking_folder):
    make_reports()
    track.main()
    first = (tracking_folder / "reports/track/track.json").read_bytes()
    client, run = assert_complete()
    points, files = (
        sorted(mlflow_store.logged_points(client, run)),
        sorted((tracking_folder / "mlartifacts").rglob("*")),
    )
    track.main()
    client, again = assert_complete()
    assert sorted(mlflow_store.logged_points(client, again)) == points
    assert sorted((tracking_folder / "mlartifacts").rglob("*")) == files
    assert len(again.inputs.dataset_inputs) == 2
    assert (again.info.start_time, again.info.end_time) == (run.info.start_time, run.info.end_time)
    assert (tracking_folder / "reports/track/track.json").read_bytes() == first
    expected = {"train_key": KEY, "metrics_logged": STEPS * len(COLUMNS) - 1 + 4, "steps": STEPS}
    assert expected.items() <= json.loads(first).items()
    assert str(tracking_folder) not in first.decode()
    assert run.info.run_id not in first.decode()


def test_new_evaluation_updates_the_run(tracking_folder):
    make_reports()
    track.main()
    earlier = stored_runs()[1][0].data.tags["evaluate_key"]
    write(Path("reports/evaluate/metrics.json"), json.dumps(evaluation(-7.0)))
    belong_together()
    track.main()
    client, run = assert_complete()
    assert run.data.metrics["evaluate/embedding/policy/mean"] == -7.0
    assert run.data.tags["evaluate_key"] != earlier
    assert len(client.get_metric_history(run.info.run_id, "evaluate/embedding/win_rate")) == 1


def test_run_that_contradicts_the_files_is_made_anew(tracking_folder, capsys):
    make_reports()
    client, experiment = mlflow_store.open_store()
    run = mlflow_store.create_run(client, experiment, KEY, PARAMS, START_MS)
    mlflow_store.log_points(client, run.info.run_id, [mlflow_store.Point("train/loss", 3, 99.0, START_MS)])
    track.main()
    assert "differs from" in capsys.readouterr().err
    assert assert_complete()[1].info.run_id != run.info.run_id


def test_experiment_names_the_run(tracking_folder, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "lucky-otter")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "d" * 40)
    make_reports()
    track.main()
    monkeypatch.delenv("DVC_EXP_NAME")
    track.main()  # by hand, later
    _, run = assert_complete()
    assert run.info.run_name == "embedding-stable-pocket-s0-lucky-otter"
    assert run.data.tags["dvc_exp_name"] == "lucky-otter"


def test_the_verdict_is_in_the_tags_and_follows_the_file(tracking_folder):
    make_reports()
    write_diagnosis("empty", 8, ["empty", "step-size"], "dvc exp run -S seed=1")
    track.main()
    tags = stored_runs()[1][0].data.tags
    assert (tags["verdict"], tags["collapse_onset"], tags["collapse_kinds"]) == ("empty", "8", "empty, step-size")
    assert tags["cure"] == "dvc exp run -S seed=1"
    write_diagnosis("empty", 8, ["empty"], f"dvc exp run -S ++rewards.mine.words=[{'word,' * 2000}end]")
    track.main()
    assert stored_runs()[1][0].data.tags["cure"] == "in reports/diagnosis.json", "half of a command is another one"
    write_diagnosis()
    track.main()
    tags = stored_runs()[1][0].data.tags
    assert {tags[key] for key in ("collapse_onset", "collapse_kinds", "cure")} == {"none"}
    assert tags["verdict"] == "healthy"


def test_the_held_out_gain_stands_beside_the_verdict(tracking_folder):
    make_reports()
    track.main()
    assert stored_runs()[1][0].data.tags["heldout_gain"] == "undefined"
    metrics = evaluation(0.5)
    metrics["embedding"]["difference"] = {"mean": 0.4812, "low": 0.2, "high": 0.8}
    write(Path("reports/evaluate/metrics.json"), json.dumps(metrics))
    belong_together()
    track.main()
    assert stored_runs()[1][0].data.tags["heldout_gain"] == "+0.481 (95% interval +0.2 to +0.8)"
    (training,) = summaries.from_mlflow()
    assert (training.gain, training.gain_interval) == (0.4812, (0.2, 0.8))


def test_reward_and_entropy_are_the_first_charts(tracking_folder):
    """MLflow makes a section of charts for each name before the last slash, sections and charts sorted by name."""
    make_reports()
    track.main()
    metrics = stored_runs()[1][0].data.metrics
    section = lambda name: name.rpartition("/")[0]  # noqa: E731
    charts = sorted(metrics, key=lambda name: (section(name), name))
    assert charts[:2] == ["curves/entropy", "curves/reward_mean"]
    assert section(charts[2]) != "curves"
    for name in presentation.FIRST_METRICS:
        points = [[(point.step, point.value) for point in history(f"{group}/{name}")] for group in ("curves", "train")]
        assert points[0] == points[1] == [(step, value(name, step)) for step in range(STEPS)]


def note():
    return stored_runs()[1][0].data.tags.get("mlflow.note.content")


def test_the_description_follows_the_files_until_a_person_edits_it(tracking_folder):
    train_live(STEPS, status="FINISHED")
    assert note() is None
    make_reports()
    track.main()
    client, (run,) = stored_runs()
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/report.html"
    gain = f"Held-out gain over the reference model: undefined. [Report]({page}?workflowType=machine_learning)"
    assert note() == f"**healthy.** The verdict in words.\n\n{gain}"
    write_diagnosis("empty", 8, ["empty"], headline="From step 8 on most completions are empty.")
    track.main()
    assert note().startswith("**empty.** From step 8 on most completions are empty.\n\nHeld-out gain ")
    for edited in ("mine", ""):
        client.set_tag(run.info.run_id, "mlflow.note.content", edited)
        write_diagnosis()
        track.main()
        assert note() == edited


def test_a_description_from_before_ours_is_kept(tracking_folder):
    train_live(STEPS, status="FINISHED")
    client, (run,) = stored_runs()
    client.set_tag(run.info.run_id, "mlflow.note.content", "with the larger learning rate")
    make_reports()
    track.main()
    assert note() == "with the larger learning rate"


def test_a_description_whose_digest_a_kill_has_lost_is_still_ours(tracking_folder):
    make_reports()
    track.main()
    client, (run,) = stored_runs()
    client.delete_tag(run.info.run_id, presentation.NOTE_DIGEST)
    track.main()
    write_diagnosis(headline="Otherwise.")
    track.main()
    assert note().startswith("**healthy.** Otherwise.")


def test_the_experiment_says_what_it_holds_and_which_columns_to_show(tracking_folder):
    make_reports()
    track.main()
    client, (run,) = stored_runs()
    tags = client.get_experiment(run.info.experiment_id).tags
    assert f"#/experiments/{run.info.experiment_id}/runs?" in tags["mlflow.note.content"]
    columns = json.loads(json.loads(tags[presentation.VIEW_TAG])["state"])["selectedColumns"]
    held = (
        {"attributes.`Run Name`"}
        | {f"params.`{key}`" for key in run.data.params}
        | {f"tags.`{key}`" for key in run.data.tags}
    )
    assert held >= set(columns)


def test_an_experiment_gets_what_it_lacks_and_keeps_what_it_has(tracking_folder):
    client = mlflow_store.open_store()[0]
    client.rename_experiment(client.get_experiment_by_name("reinforce").experiment_id, "another")
    experiment = client.create_experiment("reinforce", tags={"mlflow.note.content": "ours", "team": "a"})
    mlflow_store.open_store()
    assert client.get_experiment(experiment).tags.keys() == {"mlflow.note.content", "team"}, "looking changes nothing"
    for state in ("new", "complete"):
        train_live(STEPS, status="FINISHED", key=md5(state.encode()).hexdigest() * 2)
        assert client.get_experiment(experiment).tags == {
            **presentation.experiment_tags(experiment),
            "mlflow.note.content": "ours",
            "team": "a",
        }


def test_ui_opens_no_page_whose_view_is_missing(tracking_folder, monkeypatch):
    """Where it is there, nothing slow is done: mlflow is not asked."""
    client, experiment = mlflow_store.open_store()
    assert presentation.VIEW_TAG not in client.get_experiment(experiment).tags
    assert ui._experiment_id() == experiment
    assert presentation.VIEW_TAG in client.get_experiment(experiment).tags
    monkeypatch.setattr(mlflow_store, "open_store", lambda: pytest.fail("mlflow is asked"))
    assert ui._experiment_id() == experiment


def test_a_diagnosis_of_another_make_is_refused(tracking_folder):
    make_reports()
    write(Path("reports/diagnosis.json"), '{"verdict": "healthy"}')
    with pytest.raises(UserError, match=r"reports/diagnosis\.json: has no onset"):
        track.main()


def test_git_commit_and_changes_are_tags(tracking_folder):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    write(Path("params.yaml"), "seed: 0\n")
    for arguments in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    write(Path(".gitignore"), "/mlflow.db*\n/mlartifacts/\n/.checkpoints/\n/.locks/\n/data/\n/.gitignore\n")
    make_reports()
    track.main()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    tags = stored_runs()[1][0].data.tags
    assert (tags["git_commit"], tags["git_dirty"]) == (commit, "false")  # reports are not changes of the project's
    write(Path("params.yaml"), "seed: 1\n")
    track.main()
    assert stored_runs()[1][0].data.tags["git_dirty"] == "true"


def test_more_than_a_batch(tracking_folder):
    params = PARAMS | {f"reward.params.{number}": "é" * 2000 for number in range(130)}
    train_live(300, flush_every=290, params=params)
    make_reports(steps=300, params=params)
    track.main()
    _, run = assert_complete(steps=300)
    assert len(run.data.params) == len(params) + 1
    assert len(run.data.params["reward.params.7"]) == mlflow_store.PARAM_CHARACTERS


@pytest.mark.parametrize("kind", ["refused", "unknown", "unwritable", "corrupt", "directory"])
def test_bad_store_warns_live_and_fails_track(tracking_folder, monkeypatch, capsys, kind):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    write(tracking_folder / "corrupt.db", "no database " * 1000)
    uri = {
        "refused": f"http://user:secret@127.0.0.1:{port}",
        "unknown": "nonsense://store",
        "unwritable": "sqlite:////proc/nowhere/mlflow.db",
        "corrupt": f"sqlite:///{tracking_folder}/corrupt.db",
        "directory": f"sqlite:///{tracking_folder}",
    }[kind]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    train_live(STEPS, status="FINISHED")
    assert time.monotonic() - started < 30
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("warning: MLflow: ")
    assert "secret" not in warnings[0]
    make_reports()
    with pytest.raises(UserError, match=r"reinforce track") as failure:
        track.main()
    assert "secret" not in str(failure.value)
    assert not Path("reports/track/track.json").exists()
    assert Path(f".checkpoints/{KEY}").exists()


def test_store_that_comes_back_gets_everything(tracking_folder, capsys):
    write(tracking_folder / "mlflow.db", "no database " * 1000)

    def mended(step):
        if step == 5:
            assert "not a database" in capsys.readouterr().err
            (tracking_folder / "mlflow.db").unlink()

    train_live(STEPS, status="FINISHED", meanwhile=mended)
    assert capsys.readouterr().err == ""
    assert_complete()


def test_a_database_lost_while_the_run_grows_gets_everything(tracking_folder, empty_store, capsys):
    def lost(step):
        if step == 5:
            lose_database()
            shutil.copy(empty_store, tracking_folder)

    train_live(STEPS, flush_every=2, status="FINISHED", meanwhile=lambda step: lost(step + 1))
    assert re.findall("warning: MLflow: .*not found", capsys.readouterr().err)
    assert_complete()


def test_machine_without_mlflow_trains_on(tracking_folder, monkeypatch, capsys):
    for name in ("mlflow", "mlflow.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with follower(grow(0), identity()):
        pass
    said = capsys.readouterr().err
    assert said == "warning: MLflow: mlflow is not installed; training goes on, `track` completes the record\n"
    make_reports()
    with pytest.raises(UserError, match="not installed"):
        track.main()


def test_a_database_server_that_is_not_there_is_one_line_at_once(tracking_folder, monkeypatch):
    """mlflow tries ten times, for a hundred seconds."""
    from mlflow.store.db import utils

    make_reports()
    monkeypatch.setattr(utils.time, "sleep", lambda _: pytest.fail("it is tried again"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://ann:pa/ss@127.0.0.1:9/db")
    with pytest.raises(UserError, match=r"^MLflow store postgresql\+psycopg://127\.0\.0\.1:9/db: .*refused") as error:
        track.main()
    assert "pa/ss" not in str(error.value)


def test_deleted_experiment_is_one_line(tracking_folder):
    client, experiment = mlflow_store.open_store()
    client.delete_experiment(experiment)
    make_reports()
    with pytest.raises(UserError, match="mlflow experiments restore") as refused:
        track.main()
    do_as_said(refused.value)
    track.main()
    assert_complete()


def do_as_said(refused):
    """Runs the first command that a message names."""
    command = re.findall("`([^`]+)`", str(refused))[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr[-2000:])


@pytest.mark.slow
def test_the_command_for_an_older_store_runs(tracking_folder):
    """MLflow 3.17 upgrades those that lack a table by itself, and no real one lacks less."""
    said = mlflow_store.describe_error(OSError("Detected out-of-date database schema"))
    assert f"`mlflow db upgrade sqlite:///{tracking_folder}/mlflow.db` helps" in said
    do_as_said(said)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("one\ntwo of it\n[SQL: SELECT 1]\n[parameters: (1,)]\n(Background on this error at: x)", "one two of it"),
        (
            "API request to endpoint /api/2.0/x failed with error code 407 != 200. Response body: '<html><head>"
            "<title>ERR_CACHE_ACCESS_DENIED</title></head>'",
            "API request to endpoint /api/2.0/x failed with error code 407 != 200. A web page was the answer: "
            "ERR_CACHE_ACCESS_DENIED; a proxy or gateway between here and the server answers so: see HTTP_PROXY, "
            "HTTPS_PROXY and NO_PROXY",
        ),
        (
            "HTTPConnectionPool(host='h', port=1): Max retries exceeded with url: /x (Caused by ResponseError("
            "'too many 503 "
            "error responses'))",
            "503 was the answer again and again; a proxy or gateway between here and the server answers so: see "
            "HTTP_PROXY, HTTPS_PROXY and NO_PROXY",
        ),
        ("failed with error code 403 != 200. Response body: 'no rights on it'",
        "failed with error code 403 != 200. Response body: 'no rights on it'"),
    ],
)  # fmt: skip
def test_the_store_is_quoted_to_the_end_of_what_it_says(monkeypatch, error, said):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:1")
    assert mlflow_store.describe_error(OSError(error)) == f"http://h:1: {said}"


def test_a_long_reason_keeps_its_last_sentence(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:1")
    said = mlflow_store.describe_error(OSError("x" * 300 + " and so on. " * 90 + "Then run it again."))
    assert len(said) < 520
    assert said.endswith("so on. Then run it again.")


def test_files_of_another_run_are_refused(tracking_folder):
    """As `dvc repro train`, `git checkout` without `dvc checkout` and a killed `dvc repro` leave them."""
    for key in ("22" * 32, KEY):
        make_reports(key)
        track.main()
    before = stored_runs()
    other = POLICY | {"model.safetensors": "77" * 32}
    kept = {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()}

    def refused(files, stages):
        message = f"^{re.escape(str(files))}: of another run than reports/train/summary.json; "
        message += "`dvc checkout` brings back .*, " if stages == "train" else ""
        with pytest.raises(UserError, match=f"{message}`dvc repro -f -s {stages} && dvc repro` makes them anew$"):
            track.main()
        for path, content in kept.items():
            path.write_bytes(content)

    for name in ("calibration.csv", "history.csv", "samples.jsonl", "heldout.jsonl"):
        path = Path("reports/train", name)
        path.write_text(path.read_text()[:-2] + "7\n")
        refused(path, "train")
    edit(Path("reports/train/run.json"), train_key="22" * 32)
    refused("reports/train/run.json", "train")
    edit(Path("reports/diagnosis.json"), history="77" * 32)
    # what the page shows is not what is there
    refused("reports/diagnosis.json, reports/page/report.html", "diagnose plot")
    edit(Path("reports/diagnosis.json"), digests=[{"heldout.jsonl": "77" * 32}])
    refused("reports/diagnosis.json, reports/page/report.html", "diagnose plot")
    write(Path("reports/evaluate/metrics.json"), json.dumps(evaluation(-9.0)))
    refused("reports/evaluate/metrics.json", "evaluate")
    for file in ("reports/evaluate/completions.jsonl", "reports/evaluate/curve.jsonl"):
        write(Path(file), "{}\n")
        refused(file, "evaluate")
    belong_together(policy=other)  # which train then says it was
    summary = kept[Path("reports/train/summary.json")]
    Path("reports/train/summary.json").write_bytes(summary)
    refused(
        "reports/evaluate/metrics.json, reports/evaluate/completions.jsonl, reports/evaluate/curve.jsonl, "
        "reports/page/report.html",
        "evaluate plot",
    )
    write(Path("reports/page/report.html"), "<h1>Report</h1>" + KEY)
    refused("reports/page/report.html", "plot")
    write(Path("reports/figures/reward.png"), "of another run")
    with pytest.raises(
        UserError, match=r"^reports/figures/reward.png: is not the figure in reports/page/report.html; run `dvc"
    ):
        track.main()
    make_reports(KEY)
    edit(Path("reports/train/summary.json"), steps=STEPS + 1)
    with pytest.raises(UserError, match=f"{STEPS} rows, and .* says {STEPS + 1} steps"):
        track.main()
    after = stored_runs()
    assert [run.to_dictionary() for run in before[1]] == [run.to_dictionary() for run in after[1]], (
        "nothing was written, nothing deleted"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ann:pa/ss@h/db", "postgresql://h/db"),
        ("postgresql://ann:p@ss@h:5432/db: no", "postgresql://h:5432/db: no"),
        ("at https://ann:secret@h:1/x and postgresql://bob:s@i/db", "at https://h:1/x and postgresql://i/db"),
        ("mysql://h/db?user=ann&password=secret&ssl=1", "mysql://h/db?user=ann&password=…&ssl=1"),
        ("sqlite:////home/ann@uni/mlflow.db", "sqlite:////home/ann@uni/mlflow.db"),
        ("http://127.0.0.1:5000: no answer", "http://127.0.0.1:5000: no answer"),
    ],
)
def test_no_password_is_printed(text, shown):
    assert mlflow_store.without_password(text) == shown


def test_a_long_address_is_cut_after_its_password_is_taken_out(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://ann:{'x' * 400}@h/db")
    assert mlflow_store.describe_error(OSError("no")) == "postgresql://h/db: no"


@pytest.mark.parametrize(
    "file", ["reports/train/history.csv", "reports/page/report.html", "reports/evaluate/metrics.json"]
)
def test_missing_file_is_named(tracking_folder, file):
    make_reports()
    Path(file).unlink()
    with pytest.raises(UserError, match=file):
        track.main()
    assert stored_runs()[1] == []


def test_resume_state_goes_only_when_outputs_are_committed(tracking_folder):
    make_reports()
    folder = Path(f".checkpoints/{KEY}")
    state = folder / "state-00000002.pt"
    write(state, "two steps")
    track.main()
    assert state.exists()  # no lock: run by hand before a first `dvc repro`
    digest = md5(Path("reports/train/run.json").read_bytes()).hexdigest()
    lock = "stages:\n  train:\n    outs:\n    - {path: data/policy, md5: %s}\n"
    lock += "    - {path: reports/train/run.json, md5: %s}\n"
    for policy, run in (("aa.dir", "00" * 16), ("", digest)):
        write(Path("dvc.lock"), lock % (policy, run))
        track.main()
        assert state.exists()
    write(Path("dvc.lock"), lock % ("aa.dir", digest))
    with FileLock(f".checkpoints/{KEY}.lock"):  # a trainer at work
        track.main()
    assert state.exists()
    track.main()
    assert [path.name for path in folder.iterdir()] == ["timings.csv"]  # which is nowhere else but in MLflow
    assert_complete()


def test_dead_runs_are_ended_by_hand_only(tracking_folder, monkeypatch, capsys):
    make_reports()
    client, experiment = mlflow_store.open_store()
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    processes = {"dead": (socket.gethostname(), finished.pid), "alive": (socket.gethostname(), os.getpid())}
    for name, (host, pid) in {**processes, "elsewhere": ("another", finished.pid)}.items():
        client.create_run(experiment, tags={"train_key": name, "host": host, "pid": str(pid)}, run_name=name)
    statuses = lambda: {name: stored_runs(name)[1][0].info.status for name in (*processes, "elsewhere")}  # noqa: E731
    track.main()
    assert set(statuses().values()) == {"RUNNING"}
    monkeypatch.delenv("DVC_STAGE")
    track.main()
    assert statuses() == {"dead": "KILLED", "alive": "RUNNING", "elsewhere": "RUNNING"}
    assert "1 runs are RUNNING on other hosts" in capsys.readouterr().out


@pytest.mark.slow
def test_many_processes_open_a_new_store_at_once(tracking_folder):
    code = "import sys; from tests.mlflow_runs import train_live; train_live(6, key=sys.argv[1], status='FINISHED')"
    keys = [digit * 64 for digit in "123"]
    Path("mlflow.db").unlink()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainers = [
        subprocess.Popen([sys.executable, "-c", code, key], env=environment, stderr=subprocess.PIPE) for key in keys
    ]
    assert [trainer.communicate()[1] for trainer in trainers] == [b""] * len(keys)
    for key in keys:
        client, runs = stored_runs(key)
        assert len(runs) == 1
        assert len(client.get_metric_history(runs[0].info.run_id, "train/entropy")) == 6


def test_a_long_message_of_ours_keeps_its_advice_whole():
    said = str(UserError("params.yaml: " + "x y " * 1000 + "is too long; run `dvc repro train`, or not"))
    assert len(said) <= 1000
    assert said.startswith("params.yaml: x y")
    assert said.endswith("is too long; run `dvc repro train`, or not") or said.endswith(
        " ... run `dvc repro train`, or not"
    )

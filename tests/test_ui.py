"""MLflow's pages in a real browser: three tracked runs are found, compared and opened as a user would."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from pipeline.__main__ import build_parser
from pipeline.commands import ui
from pipeline.errors import UserError
from pipeline.stages import track
from pipeline.tracking import mlflow_store
from pipeline.tracking.presentation import COLUMNS, TRAINING
from tests import mlflow_runs
from tests.browser import CHROMIUM, FLAGS
from tests.mlflow_runs import PARAMS, belong_together, evaluation, timestamp, write, write_diagnosis
from tests.project import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium"),
]
STEPS = 50
RUNS = {
    "lucky-otter": ("embedding", "stable"),
    "sober-crane": ("embedding", "notebook"),
    "brave-finch": ("length", "stable"),
}


def make_reports(number, reward, recipe):
    """Reports of a made-up training that learns (stable) or collapses (notebook), and its resume state's clock."""
    key, sign = f"{number}f" * 32, 1 if recipe == "stable" else -1
    params = PARAMS | {"reward": reward, "recipe": recipe, "train.steps": STEPS}
    mlflow_runs.make_reports(key, STEPS, params)
    history, timings = ["step,reward_mean,entropy,ref_kl_k1"], ["step,timestamp_ms,seconds_sample"]
    for step in range(STEPS):
        progress = 1 - math.exp(-step / 15)
        history.append(f"{step},{-7 + sign * progress},{3 - progress * (1.5 - sign)},{0.2 * progress}")
        timings.append(f"{step},{timestamp(step) + number * 1_000_000},0.5")
    write(Path("reports/train/history.csv"), "\n".join(history) + "\n")
    write(Path(f".checkpoints/{key}/timings.csv"), "\n".join(timings) + "\n")
    write(Path("reports/evaluate/metrics.json"), json.dumps(evaluation(0.5 * sign, reward)))
    write_diagnosis("healthy" if sign > 0 else "mode", None if sign > 0 else 12)
    belong_together(f"Report of {reward} with {recipe}")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three tracked runs in a new store in the current directory: run name -> run id."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):  # the project's root
        write(Path(name), "")
    Path("pipeline").symlink_to(ROOT / "pipeline")
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for number, (name, (reward, recipe)) in enumerate(RUNS.items(), start=1):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        make_reports(number, reward, recipe)
        track.main()
    client, experiment = mlflow_store.open_store()
    return {run.info.run_name: run.info.run_id for run in client.search_runs([experiment])}


def test_a_server_s_password_is_not_printed(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@tracking.example.org:8443/mlflow")
    with pytest.raises(UserError, match=r"names a server already: open https://tracking.example.org:8443/mlflow$"):
        ui.main(build_parser().parse_args(["ui"]))


@pytest.fixture
def server(runs, tmp_path):
    """Our UI on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline", "ui", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
    started = time.monotonic()
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() - started < 180  # a loaded machine takes its time
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(30_000)
        yield page
        browser.close()


def test_three_runs_side_by_side(server, runs, page, tmp_path):
    assert_only_this_machine_reaches(server)
    pictures = Path(os.environ.get("SCREENSHOTS") or tmp_path / "screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    names = [f"{reward}-{recipe}-pocket-s0-{name}" for name, (reward, recipe) in RUNS.items()]
    assert sorted(runs) == sorted(names)

    # The run table, by the address that `reinforce ui` prints.
    printed = (tmp_path / "server.log").read_text()
    page.goto(re.search(rf"{server}\S+", printed).group())
    page.get_by_label("Close").first.click()  # MLflow's assistant opens itself on a first visit
    for name in names:
        page.get_by_text(name, exact=True).wait_for()
    wait_for_columns(page)
    page.get_by_text("Trainings of language models with REINFORCE", exact=False).wait_for()
    page.screenshot(path=pictures / "opened.png")
    page.get_by_role("button", name="Columns").click()
    page.get_by_placeholder("Search columns").fill("train/")
    page.get_by_text("train/reward_mean", exact=True).click()
    page.keyboard.press("Escape")
    page.get_by_text("-6.038", exact=False).first.wait_for()  # -7 + 1 - exp(-49/15)
    assert page.get_by_text("-7.96", exact=False).count() >= 1  # -7 - 1 + exp(-49/15)
    page.screenshot(path=pictures / "runs.png")

    # Their curves over one another.
    experiment = page.url.split("/experiments/")[1].split("/")[0]
    page.goto("about:blank")  # the page waits for ever where only the view is taken out of its address
    page.goto(f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART&{TRAINING}")
    wait_for_curves(page, 6)
    page.screenshot(path=pictures / "first-charts.png")
    text = page.inner_text("body")
    places = [text.index(name) for name in ("curves/entropy", "curves/reward_mean", "evaluate/")]
    assert places == sorted(places)
    page.get_by_placeholder("Search metric charts").fill("train/")
    page.get_by_text("train/reward_mean", exact=True).first.wait_for()
    wait_for_curves(page, 9)  # three metrics of three runs
    page.screenshot(path=pictures / "charts.png")

    # The compare page.
    ids, experiments = quote(json.dumps([runs[name] for name in names])), quote(json.dumps([experiment]))
    page.goto(f"{server}/#/compare-runs?runs={ids}&experiments={experiments}&{TRAINING}")
    page.get_by_text("Comparing 3 Runs from 1 Experiment").wait_for()
    page.locator(".js-plotly-plot .parcoords, .js-plotly-plot svg").first.wait_for()
    text = page.inner_text("body")
    for expected in [*names, "train/reward_mean", "evaluate/embedding/win_rate", "-6.038", "-7.962"]:
        assert expected in text
    page.screenshot(path=pictures / "compare.png")

    # One run: its description leads to its report, which is among its artifacts.
    page.goto(f"{server}/#/experiments/{experiment}/runs/{runs[names[1]]}?{TRAINING}")
    page.get_by_text("The verdict in words.", exact=False).wait_for()
    page.screenshot(path=pictures / "run.png")
    with page.expect_popup() as popup:
        page.get_by_role("link", name="Report", exact=True).click()
    popup.value.frame_locator("iframe").get_by_text("Report of embedding with notebook").wait_for()
    page.goto(f"{server}/#/experiments/{experiment}/runs/{runs[names[0]]}/artifacts?{TRAINING}")
    for name in ("figures", "tables", "report.html"):
        page.get_by_text(name, exact=True).first.wait_for()
    page.get_by_text("report.html", exact=True).first.click()
    page.frame_locator("iframe").get_by_text("Report of embedding with stable").wait_for()
    page.screenshot(path=pictures / "report.png")


def wait_for_columns(page):
    """Waits until the run table shows our columns from left to right; in the page's text they stand in any order."""
    page.wait_for_function(
        """names => {
            const left = header => header.getBoundingClientRect().x
            const headers = [...document.querySelectorAll('[role=columnheader]')]
            const shown = headers.sort((a, b) => left(a) - left(b)).map(header => header.getAttribute('col-id'))
            return shown.filter(name => names.includes(name)).join() == names.join()
        }""",
        arg=[*COLUMNS],
    )


def wait_for_curves(page, number):
    """Waits until the charts hold so many curves with a point for every step."""
    whole = f"curve => curve.x && curve.x.length == {STEPS}"
    plots = "[...document.querySelectorAll('.js-plotly-plot')]"
    page.wait_for_function(f"{plots}.flatMap(plot => plot.data || []).filter({whole}).length >= {number}")


def assert_only_this_machine_reaches(server):
    """Every socket that listens in the server's family of processes; and a page elsewhere that calls itself this
    host."""
    port = int(server.rpartition(":")[2])
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    (pid,) = {each.pid for each in listening if each.laddr.port == port} & {os.getpid(), *children()}
    assert pid != os.getpid()
    addresses = {each.laddr.ip for each in listening if each.pid in children()}
    assert addresses == {"127.0.0.1"}
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}

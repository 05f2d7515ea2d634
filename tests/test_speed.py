"""The speed benchmark's arithmetic, and that its page shows what was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import flat_groups, gpu, long_completions, material, notebook_loop, real_steps, speed, utilization
from tests.models import tiny_neox
from tests.project import ROOT

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    ("results", "tables", "least"),
    [
        (speed.RESULTS, speed.tables, 20),
        (utilization.RESULTS, utilization.table, 10),
        (long_completions.RESULTS, long_completions.table, 5),
    ],
)
def test_the_page_shows_the_tables_of_the_measured_run(
    results: Path, tables: Callable[[Any], list[str]], least: int
) -> None:
    page = (ROOT / "docs/SPEED.md").read_text(encoding="utf-8").splitlines()
    printed = tables(json.loads((ROOT / results).read_text(encoding="utf-8")))
    assert len(printed) >= least
    assert [line for line in printed if line not in page] == []


def test_a_share_of_the_matrix_rate_is_of_the_same_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else was measured; what was measured already is not measured again, nor added to on another CPU."""
    rates = {"AVX2 alone, float32": 8e9, "as it is, float32": 4e9, "as it is, bfloat16": 16e9}
    measured = []

    def measure(arm: tuple[str, ...], variables: dict[str, str]) -> dict[str, Any]:
        precision = arm[arm.index("--precision") + 1] if "--precision" in arm else "float32"
        measured.append(arm)
        if arm[0] == "matmul":
            return {"flops_per_second": rates[f"{'AVX2 alone' if variables else 'as it is'}, {precision}"]}
        phases = {f"seconds_{phase}": [0.5] for phase in ("sample", "reference", "update")}
        samples = {"ours": 12, "notebook": 6, "trl": 3}[arm[0]]
        return {"samples": samples, "seconds": [2.0], "phases": phases, "flops": 4e9, "digest": "left out"}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(utilization, "find_spec", lambda _: object())
    results = tmp_path / "found.json"
    for _ in range(2):
        utilization.run(1, results)
    assert len(measured) == len(utilization.plan()) == 17
    rows = [[cell.strip() for cell in line.split("|")] for line in utilization.table(json.loads(results.read_text()))]
    shares = {(row[1], row[2], row[3]): row[5:9] for row in rows if len(row) > 5 and "pythia" in row[2]}
    assert shares["as it is", "pythia-70m", "float32"] == ["50.0%", "6.0", "2.0", "4.0"]
    assert shares["as it is", "pythia-160m", "bfloat16"][0] == "12.5%"
    assert shares["AVX2 alone", "pythia-70m", "float32"][0] == "25.0%"
    monkeypatch.setattr(utilization, "cpu_type", lambda: "another")
    with pytest.raises(SystemExit, match="was begun on another CPU"):
        utilization.run(2, results)
    assert "round" in capsys.readouterr().err


def test_a_gradient_without_flat_groups_is_measured_beside_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"SHAPE": "pythia-14m", "PROMPTS": 4, "SAMPLES": 2, "MICRO_BATCH": 4, "ROUNDS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(flat_groups, name, value)
    flat_groups.main()
    assert [line.count("%") for line in capsys.readouterr().out.splitlines()] == [4, 0, 4, 4]


def test_a_gpu_s_figures_name_it_and_lie_beside_the_cpu_s() -> None:
    found = json.loads((ROOT / speed.RESULTS).read_text(encoding="utf-8"))
    assert speed.tables(found | {"gpu": "X, CUDA 13.0"})[0] == "On a GPU: X, CUDA 13.0."
    assert speed.results("cuda") != speed.results("cpu") == speed.RESULTS


def test_a_rate_is_the_median_over_rounds_and_steps() -> None:
    runs: list[dict[str, Any]] = [{"samples": 10, "seconds": [1.0, 5.0]}, {"samples": 10, "seconds": [2.0]}]
    assert speed.rate(runs) == 5


def test_long_completions_are_measured_once_each_and_set_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([(1.0, 4), (2.0, 8), (3.0, 6), (8.0, 8)])  # seconds and MiB: ours and generate, in two rounds
    asked: list[list[str]] = []

    def arm(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        seconds, size = next(found)
        return SimpleNamespace(returncode=0, stdout=json.dumps({"seconds": seconds, "bytes": size * 2**20}))

    monkeypatch.setattr(long_completions, "find_spec", lambda name: None)
    monkeypatch.setattr(long_completions, "subprocess", SimpleNamespace(run=arm))
    for rounds in ("1", "2", "2"):  # the first one was ended, the last has nothing left to do
        arguments = ["run", "--tokens", "128", "--rounds", rounds, "--results", str(tmp_path / "found.json")]
        monkeypatch.setattr("sys.argv", ["long_completions", *arguments])
        long_completions.main()
    assert [command[command.index("--arm") + 1] for command in asked] == ["ours", "generate"] * 2
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
    assert cells[5:8] == ["2.0", "5.0, 2.5 times", "not measured"]
    assert cells[8:11] == ["5", "8, 1.6 times", "not measured"]


def test_the_notebook_s_loop_learns_from_the_prompts_it_is_given() -> None:
    """One step moves the weights by Adam's first update, lr for each parameter that has a gradient."""
    tokenizer, _ = material.tokenizer()
    policy = tiny_neox(len(tokenizer), dtype=torch.float32, eos_logit=-1.0)
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    torch.manual_seed(0)
    reward = lambda text: notebook_loop.has_length(text, 40)  # noqa: E731
    mean = notebook_loop.step(policy, tokenizer, optimizer, ["Hello", "I'm sorry"], reward, num_mc_samples=3)
    assert mean < 0
    moved = max((p - was).abs().max().item() for p, was in zip(policy.parameters(), before, strict=True))
    assert moved == pytest.approx(3e-4, rel=0.05)


@pytest.mark.parametrize("installed", [True, False])
def test_an_encoder_of_bert_s_shape_rewards_nearness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """Also where MiniLM's package, whose tokenizer it takes, is not installed."""
    if not installed:
        monkeypatch.setattr(material, "find_spec", lambda _: None)
    material.write_encoder(tmp_path)
    distance = notebook_loop.bert_distance(tmp_path, "Hi there!")
    assert distance("Hi there!").item() == 0
    assert distance("Something else").item() < 0


def test_a_step_of_ours_is_measured_and_repeats_itself() -> None:
    arm = ("ours", "--shape", "pythia-14m", "--prompts", "2", "--samples", "2")
    first, second = speed.measure(arm), speed.measure(arm)
    assert first["samples"] == 4
    assert first["digest"] == second["digest"]


def test_real_steps_run_as_train_does_them() -> None:
    sizes = {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 4, "threads": 1, "precision": "float32"}
    (found,) = real_steps.measure("pythia-14m", sizes)
    assert found["bytes"] > 0


def test_the_tables_of_a_gpu_say_what_failed_and_what_differs() -> None:
    run = {"samples": 1024, "seconds": [0.5] * 50, "peak_mib": 2**10, "digest": "a", "flops": 1e12}
    arms: dict[str, Any] = {
        "experiment": run, "experiment, again": run | {"digest": "b"}, "trl": {"failed": "No module named 'trl'"},
        "matmul bfloat16": {"flops_per_second": 4e12},
    }  # fmt: skip
    said = "\n".join(gpu.tables({"gpu": "X, CUDA 13.0", "arms": arms}))
    assert "* 50 steps in 25.0 s (goal: 60 s)" in said
    assert "**the two runs differ**" in said
    assert "50.0%" in said
    assert said.endswith("* trl: No module named 'trl'")
    arms["experiment, again"] = run
    assert "both runs have the same bytes" in "\n".join(gpu.tables({"gpu": "X", "arms": arms}))

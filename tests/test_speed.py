"""The speed benchmark's arithmetic, and that its page shows what was measured."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, long_completions, material, notebook_loop, real_steps, speed
from tests.models import tiny_neox
from tests.project import ROOT

pytestmark = pytest.mark.numeric


def test_the_page_shows_the_tables_of_the_measured_run() -> None:
    page = (ROOT / "docs/SPEED.md").read_text(encoding="utf-8").splitlines()
    printed = speed.tables(json.loads((ROOT / speed.RESULTS).read_text(encoding="utf-8")))
    assert len(printed) > 20
    assert [line for line in printed if line not in page] == []


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

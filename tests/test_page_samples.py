"""All completions of a run, `train.keep_samples: all`, read: which of them the report shows, and whose they are."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import pipeline
from pipeline.errors import UserError
from pipeline.report import inputs, page, samples
from tests.reports import keep_all, reports


def test_load_run_has_them_or_says_why_not(tmp_path: Path) -> None:
    folder = reports(tmp_path / "reports", steps=2)
    with pytest.raises(UserError, match=r"kept\.json: .*train\.keep_samples: all"):
        _ = pipeline.load_run(tmp_path).all_samples
    rows = keep_all(folder, steps=2, prompts=3, group=3)
    assert len(pipeline.load_run(tmp_path).all_samples) == len(rows) == 18


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: path.unlink(), "no such file; `dvc checkout` brings it back"),
    (lambda path: path.write_bytes(b""), "of another run than .*kept.json"),
])  # fmt: skip
def test_completions_that_are_missing_or_others_are_named(tmp_path: Path, damage: Any, said: str) -> None:
    folder = reports(tmp_path / "reports", steps=2)
    keep_all(folder, steps=2, prompts=3, group=3)
    damage(folder / "train/samples/all.parquet")
    with pytest.raises(UserError, match=said):
        inputs.load(folder)


STEPS, PROMPTS, GROUP = 5, 7, 3


@pytest.fixture
def kept(tmp_path: Path) -> inputs.Inputs:
    folder = reports(tmp_path / "reports", steps=STEPS)
    keep_all(folder, steps=STEPS, prompts=PROMPTS, group=GROUP)
    return inputs.load(folder)


def size_of(prompts: dict[int, list[dict[str, Any]]]) -> int:
    """Bytes in the page."""
    return sum(len(samples.script_json(of_step).encode()) for of_step in prompts.values())


def test_the_page_shows_all_completions_where_there_is_room(kept: inputs.Inputs) -> None:
    shown = samples.shown_samples(kept)
    assert shown.rule == "All 105 completions of training."
    texts = [row["completion"] for row in pd.read_parquet(kept.all_samples).to_dict("records")]
    pieces = ["".join(c["pieces"]) for of_step in shown.prompts.values() for p in of_step for c in p["completions"]]
    assert pieces == texts
    drawn = page.render(kept, *2 * [dict.fromkeys(page.CAPTIONS, b"\x89PNG")])
    assert "All 105 completions of training." in drawn


def test_beyond_the_limit_the_page_shows_whole_prompts(kept: inputs.Inputs) -> None:
    """As many of each step, as many as fit; before them none of the first completions is lost."""
    base = samples.shown_samples(kept._replace(all_samples=None))
    assert base.rule == "40 of 105 completions of training: the first completions of each step."
    assert "keep_samples=all" in base.rest
    seen = set()
    for limit in range(size_of(base.prompts) + 20, size_of(base.prompts) + 40_000, 1500):
        shown = samples.shown_samples(kept, limit)
        assert size_of(shown.prompts) <= limit
        counts = {tuple(len(p["completions"]) for p in of_step) for of_step in shown.prompts.values()}
        (counts,) = counts
        most = sum(number == GROUP for number in counts)
        assert counts == tuple([GROUP] * most + [2] * max(0, 4 - most))
        number = STEPS * sum(counts)
        seen.add(most)
        if most == PROMPTS:
            break
        assert shown.rule.startswith(f"{number} of 105 completions of training: ")
        which = ["the first completions of each step", "of each step all completions of the first prompt"]
        assert (which[most] if most < 2 else f"all completions of the first {most} prompts") in shown.rule
        assert (", and the first ones of others" in shown.rule) == (0 < most < 4)
        assert shown.rest.endswith("all are in reports/train/samples/all.parquet.")
        more, _ = samples.whole_prompts(kept.all_samples, 10**9)
        next_one = size_of({step: prompts[: most + 1] for step, prompts in more.items()})
        assert next_one > limit - size_of(base.prompts) - 100, "one more of each step would fit"
    assert seen == set(range(PROMPTS + 1))


def test_beyond_even_that_it_shows_evenly_spread_steps(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", steps=41))
    one = size_of({0: samples.shown_samples(data).prompts[0]})
    shown = samples.shown_samples(data, 5 * one + one // 2)
    assert list(shown.prompts) == [0, 10, 20, 30, 40]
    assert "the first completions of 5 of 41 steps, evenly spread" in shown.rule
    data.diagnosis["onset"] = 7
    assert list(samples.shown_samples(data, 5 * one + one // 2).prompts) == [0, 7, 13, 26, 40]
    assert list(samples.shown_samples(data, 1).prompts) == [0, 7]


def test_undefined_numbers_of_the_file_are_shown_as_such(tmp_path: Path) -> None:
    folder = reports(tmp_path / "reports", steps=1)
    keep_all(folder, steps=1, prompts=1, group=2, advantage=float("nan"), logprob=float("-inf"))
    (prompt,) = samples.shown_samples(inputs.load(folder)).prompts[0][:1]
    assert [completion["advantage"] for completion in prompt["completions"]] == ["undefined"] * 2
    assert prompt["completions"][0]["logprobs"][0] is None


def test_memory_of_the_page_is_that_of_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of prompts that are left out are not even made: of 60 prompts a step, three fit."""
    folder = reports(tmp_path / "reports", steps=20)
    keep_all(folder, steps=20, prompts=60, group=2)
    made = []
    real = samples._completion
    monkeypatch.setattr(samples, "_completion", lambda row: made.append(1) or real(row))
    first = size_of(samples.shown_samples(inputs.load(folder)._replace(all_samples=None)).prompts)
    made.clear()
    shown = samples.shown_samples(inputs.load(folder), first + 20_000)
    number = sum(len(p["completions"]) for of_step in shown.prompts.values() for p in of_step)
    assert len(made) < 2400 / 2
    assert number < len(made)

"""All completions of a run, `train.keep_samples: all`: what is in the file, and that no interruption changes a byte of
it."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.errors import UserError
from pipeline.file_io import read_json, read_jsonl
from pipeline.runs import checkpoints, sample_files
from pipeline.stages import train
from tests.project import Project
from tests.training import contents, end_before, forget, history, states

pytestmark = pytest.mark.slow
ALL = "reports/train/samples/all.parquet"


@pytest.fixture
def keeping(here: Project) -> Project:
    here.edit(train__keep_samples="all")
    return here


# --- what is kept


def test_the_completions_sum_up_to_the_history(keeping: Project) -> None:
    """Every completion is there once: the means of the history are theirs, and the first ones are in samples.jsonl."""
    terms = [{"weight": 0.5, "reward": {"kind": "length", "target": 9}},
             {"weight": 2.0, "reward": {"kind": "words", "words": ["e"]}}]  # fmt: skip
    stops = list("etaoinsu")  # so that completions have different lengths
    keeping.edit(recipes__stable__kl="loss_k3", recipes__stable__stop_strings=stops,
                 reward="both", rewards__both={"kind": "sum", "terms": terms})  # fmt: skip
    train.main()
    table, rows = pd.read_parquet(ALL), history(keeping)
    stopped = ["".join(pieces)[-1] in stops for pieces in table["pieces"]]
    assert list(table["ending"] == "stop_string") == stopped
    assert set(stopped) == {True, False}
    assert list(table.groupby("step").size()) == [6] * 6
    assert not table.duplicated(["step", "group", "sample"]).any()
    by_step = table.groupby("step")
    for column, values in {
        "reward_mean": by_step["reward"].mean(),
        "advantage_std": by_step["advantage"].apply(lambda x: x.std(ddof=0)),
        "ref_kl_sequence": by_step["ref_log_ratio"].mean(),
        "completion_tokens": table["tokens"].str.len().groupby(table["step"]).mean(),
        "ended_share": (table["ending"] == "eos").groupby(table["step"]).mean(),
        "stopped_share": (table["ending"] == "stop_string").groupby(table["step"]).mean(),
        "policy_logprob": table.explode("token_logprobs").groupby("step")["token_logprobs"].mean(),
    }.items():
        assert list(values) == pytest.approx([row[column] for row in rows], rel=1e-5, abs=1e-6), column
    first = table[(table["group"] < 4) & (table["sample"] < 2)]
    kept = pd.DataFrame(read_jsonl(Path("reports/train/samples.jsonl")))
    for column in ("step", "prompt", "completion", "reward", "advantage", "tokens", "pieces", "token_logprobs"):
        assert [as_list(value) for value in first[column]] == list(kept[column]), column
    assert [dict(value) for value in first["terms"]] == list(kept["terms"])
    assert [sum(dict(value).values()) for value in table["terms"]] == pytest.approx(list(table["reward"]))
    prompts = [row["prompt"] for row in read_jsonl(Path("data/prompts/train.jsonl"))]
    assert [prompts[index] for index in table["prompt_index"]] == list(table["prompt"])


def as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def test_where_the_reference_measured_some_the_others_have_no_ratio(keeping: Project) -> None:
    """Without a KL term it scores `kl_probe_fraction` of the prompts: here one of three."""
    keeping.edit(recipes__stable__kl="none", train__kl_probe_fraction=0.125, train__steps=2)
    train.main()
    table = pd.read_parquet(ALL)
    assert list(table.groupby("step")["ref_log_ratio"].count()) == [2, 2]
    assert (table.dropna(subset="ref_log_ratio").groupby("step")["group"].nunique() == 1).all()


def test_keeping_all_changes_no_other_output(here: Project) -> None:
    train.main()
    some = contents(here)
    assert json.loads(some["reports/train/samples/kept.json"]) == {"keep_samples": "some", "completions": 36}
    assert not list(here.root.glob(".checkpoints/*/samples-*"))
    key = read_json(Path("reports/train/run.json"))["train_key"]
    forget(here)
    here.edit(train__keep_samples="all")
    train.main()
    every = contents(here)
    assert read_json(Path("reports/train/run.json"))["train_key"] != key, "as with any key of `train`"
    assert set(every) == {*some, ALL}
    told = ("run.json", "summary.json", "kept.json")
    assert [name for name in some if some[name] != every[name] and not name.endswith(told)] == []


def test_without_pyarrow_it_is_one_line(keeping: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"^train\.keep_samples: all needs pyarrow, which is not installed"):
        train.main()
    assert not Path("reports/train").exists()


# --- interruptions


def test_an_interrupted_run_keeps_the_same_bytes(keeping: Project) -> None:
    """And its states do not hold the completions: 64 digits a step."""
    train.main()
    undisturbed = contents(keeping)
    forget(keeping)
    end_before(4)
    run = (checkpoints.read(states(keeping)[-1]) or {})["run"]
    assert [len(digest) for digest in run["sample_files"]] == [64] * 4
    train.main()
    assert contents(keeping) == undisturbed
    train.main()  # once more from the last state
    assert contents(keeping) == undisturbed


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_damaged_completions_are_sampled_again(
    keeping: Project, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    """Of a step before each state that is left; of one after the oldest of them, from there."""
    train.main()
    undisturbed = contents(keeping)
    for step, done in ((1, 6), (4, 2)):
        forget(keeping)
        end_before(5)
        (path,) = keeping.root.glob(f".checkpoints/*/samples-0000000{step}.parquet")
        damage(path)
        capsys.readouterr()
        train.main()
        said = capsys.readouterr()
        assert f"{path.relative_to(keeping.root)} is damaged" in said.err
        assert f"going back to step {6 - done}" in said.err
        assert said.out.count("Step: ") == done
        assert contents(keeping) == undisturbed


def test_completions_damaged_during_the_run_are_not_left_out(keeping: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main()
    undisturbed = contents(keeping)
    forget(keeping)
    real = train.write_outputs

    def damaged(*arguments: Any) -> None:
        next(keeping.root.glob(".checkpoints/*/samples-00000005.parquet")).write_bytes(b"PAR1")
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train, "write_outputs", damaged)
        with pytest.raises(UserError, match=r"samples-00000005\.parquet.* is damaged; .* trains again from step 5"):
            train.main()
    assert not Path("data/policy").exists()
    train.main()
    assert contents(keeping) == undisturbed


def test_a_full_disk_while_the_files_are_merged_is_one_line(keeping: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main()
    undisturbed = contents(keeping)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.closed = file, False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            if self.file.tell() > 100:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data))

    real = pyarrow.parquet.ParquetWriter
    with monkeypatch.context() as patched:
        patched.setattr(pyarrow.parquet, "ParquetWriter", lambda file, *a, **k: real(Full(file), *a, **k))
        with pytest.raises(UserError, match=r"reports/train/samples cannot be written: No space left on device"):
            train.main()
    assert contents(keeping) == undisturbed
    train.main()
    assert contents(keeping) == undisturbed


def test_row_groups_hold_whole_steps(keeping: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is held while merging does not grow with the run, and a step is read from one of them."""
    train.main()
    whole = pd.read_parquet(ALL)
    tokens = whole["tokens"].str.len().groupby(whole["step"]).sum()
    monkeypatch.setattr(sample_files, "ROW_GROUP_TOKENS", int(tokens[0] + tokens[1]))
    train.main()
    file = pyarrow.parquet.ParquetFile(ALL)
    groups = [sorted(set(file.read_row_group(i)["step"].to_pylist())) for i in range(file.num_row_groups)]
    assert groups[0] == [0, 1]
    assert [step for group in groups for step in group] == list(range(6))
    sizes = [tokens[group].sum() for group in groups]
    assert all(size >= tokens[0] + tokens[1] for size in sizes[:-1])
    assert all(size - tokens[group[-1]] < tokens[0] + tokens[1] for size, group in zip(sizes, groups, strict=True))
    pd.testing.assert_frame_equal(pd.read_parquet(ALL), whole)

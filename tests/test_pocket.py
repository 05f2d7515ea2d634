"""The embedded default keeps what data/pocket promises: small, literate enough, and made by make.py."""

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline.models.load import load_policy, load_tokenizer
from pipeline.models.rollout import completion_limits, completion_texts
from pipeline.models.sampling import pad_prompts, sample
from pipeline.rl.seeding import draw_uniforms
from tests.project import ROOT

pytestmark = pytest.mark.numeric

POCKET = ROOT / "data/pocket"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location("make", POCKET / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heldout_prompts() -> list[str]:
    rows = [json.loads(line) for line in (POCKET / "prompts/validation.jsonl").read_text().split("\n") if line]
    return [
        row["text"] for row in rows if row["lang"] == "en" and 0 < len(row["text"]) < 32 and row["text"][0].isupper()
    ]


def test_the_checkpoint_is_small_and_of_pythias_architecture() -> None:
    assert (POCKET / "checkpoint/model.safetensors").stat().st_size <= 16_000_000
    model = load_policy(POCKET / "checkpoint", torch.device("cpu"))
    assert model.config.model_type == "gpt_neox"
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_completions_of_the_reference_are_seldom_empty_and_long_enough() -> None:
    tokenizer = load_tokenizer(POCKET / "checkpoint")
    ids = [tokenizer(prompt)["input_ids"] for prompt in heldout_prompts()]
    eos, group, limit = tokenizer.eos_token_id, 2, 20
    rollout = sample(
        load_policy(POCKET / "checkpoint", torch.device("cpu")), *pad_prompts(ids, eos, torch.device("cpu")),
        completion_limits([len(p) for p in ids], limit, "completion"),
        draw_uniforms(0, 0, "test", len(ids) * group, limit), [eos],
    )  # fmt: skip
    texts = completion_texts(rollout, tokenizer, "strip", group, [eos])
    assert sum(not text.strip() for text in texts) <= 0.1 * len(texts)
    assert statistics.median(rollout.lengths.tolist()) >= 8


def test_documents_are_runs_of_messages(make: ModuleType) -> None:
    messages = ["a" * 1000, "b" * 400, "c" * 100, "d" * 2000, "e"]
    assert make.documents(messages) == ["\n\n".join(messages[:3]), messages[3], "e"]


def test_windows_score_every_token_once(make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows nothing costs log2(V) bits for every token that is predicted, however long the document."""
    monkeypatch.setattr(make, "WINDOW", 8)

    class Ignorant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor) -> object:
            assert ids.shape[1] <= 8
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 4)})

    for length in range(2, 40):
        ids = torch.randint(0, 4, (length,), generator=torch.Generator().manual_seed(length))
        assert make.bits_per_byte(Ignorant(), [ids], ["xx"]) == pytest.approx(2 * (length - 1) / 2)


def test_kept_steps_lie_on_the_way_to_the_end(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept before the end and after a break, training goes on to the weights of a run that keeps nothing."""
    for name, value in {"BATCH": 2, "WINDOW": 16, "KEPT": f"{tmp_path}/step"}.items():
        monkeypatch.setattr(make, name, value)
    lines = [json.dumps({"lang": "en", "text": f"{n} times {n} is {n * n}. " * 80}) for n in range(10)]
    for split in ("train", "validation"):
        (tmp_path / split).write_text("\n".join(lines))
    sizes = ["--vocabulary", "300", "--hidden", "8", "--layers", "1", "--heads", "1", "--tokens", "160"]  # 5 steps
    texts = ["--train", f"{tmp_path}/train", "--validation", f"{tmp_path}/validation", *sizes]

    def run(name: str, *more: str) -> None:
        files = ["--out", f"{tmp_path}/{name}/checkpoint", "--state", f"{tmp_path}/{name}.pt"]
        monkeypatch.setattr("sys.argv", ["make.py", *texts, *files, *more])
        with torch.random.fork_rng():
            make.main()

    def weights(folder: str) -> bytes:
        return (tmp_path / folder / "model.safetensors").read_bytes()

    run("whole")
    run("kept", "--keep", "2")
    run("kept", "--keep", "5,2")
    assert weights("step5") == weights("whole/checkpoint") != weights("step2")
    assert not (tmp_path / "kept").exists(), "with --keep the checkpoint of the project stays as it is"
    for keep in ("2,5", "3", "6"):  # all there, past, never
        with pytest.raises(SystemExit):
            run("kept", "--keep", keep)
        assert "training goes on from step 5 to 5" in capsys.readouterr().err


def test_figures_name_what_was_reached() -> None:
    figures = json.loads((POCKET / "figures.json").read_text())
    curve = [point["bits_per_byte"] for point in figures["curve"]]
    assert curve == sorted(curve, reverse=True)
    assert f"{figures['bits_per_byte']:.2f}" in (POCKET / "README.md").read_text()


@pytest.mark.shared
def test_bits_per_byte_on_real_validation_texts(make: ModuleType, real_texts: dict[str, list[str]]) -> None:
    """A sample of the documents: the whole set takes a minute."""
    texts = make.documents([text for text in real_texts["validation"] if text.strip()])[::25]
    encoded = make.token_stream(load_tokenizer(POCKET / "checkpoint"), texts)
    reached = make.bits_per_byte(load_policy(POCKET / "checkpoint", torch.device("cpu")), encoded, texts)
    published = json.loads((POCKET / "figures.json").read_text())["bits_per_byte"]
    assert reached == pytest.approx(published, abs=0.1)
    assert reached < 1.7


def test_the_model_that_adds_solves_some_of_its_problems() -> None:
    """The sets share no problem, and the answers are right; of the held-out ones it solves 20 to 80% untouched."""
    folder = ROOT / "data/pocket-math"
    assert (folder / "checkpoint/model.safetensors").stat().st_size <= 3_000_000
    sets = [
        [json.loads(line) for line in (folder / f"prompts/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    ]
    for row in sets[0] + sets[1]:
        first, _, second = row["question"].removesuffix("=").partition("+")
        assert row["answer"] == str(int(first) + int(second))
    assert len({row["question"] for row in sets[0] + sets[1]}) == len(sets[0]) + len(sets[1]) == 768
    pairs = [{frozenset(row["question"].removesuffix("=").split("+")) for row in rows} for rows in sets]
    assert not pairs[0] & pairs[1]  # in either order

    tokenizer, rows, cpu = load_tokenizer(folder / "checkpoint"), sets[1], torch.device("cpu")
    ids, eos = [tokenizer(row["question"])["input_ids"] for row in rows], tokenizer.eos_token_id
    rollout = sample(
        load_policy(folder / "checkpoint", cpu), *pad_prompts(ids, eos, cpu), torch.full((len(rows),), 6),
        draw_uniforms(0, 0, "test", len(rows), 6), [eos],
    )  # fmt: skip
    texts = completion_texts(rollout, tokenizer, "strip", 1, [eos])
    solved = sum(text == row["answer"] for text, row in zip(texts, rows, strict=True))
    assert 0.2 <= solved / len(rows) <= 0.8

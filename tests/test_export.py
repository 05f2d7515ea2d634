"""`reinforce export`: the policy computes the same elsewhere, without the project, and its card says what it is."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.__main__ import build_parser, run_command
from pipeline.errors import UserError
from pipeline.file_io import folder_digests
from pipeline.models.load import end_of_text_ids, load_policy, name_base
from pipeline.runs.provenance import digest
from pipeline.stages import cache, diagnose, evaluate, prepare, train
from tests import small
from tests.project import Project
from tests.repositories import write_pythia

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Project:
    """A project whose policy was trained with adapters, large enough steps that they count."""
    policy = write_pythia(tmp_path_factory.mktemp("models") / "small", None, vocabulary=257)
    made = small.make(tmp_path_factory.mktemp("export"), policy, bert)
    made.edit(train__lora_rank=2, recipes__stable__lr=0.05)
    with pytest.MonkeyPatch.context() as patch:
        made.enter(patch)
        for stage in (prepare, cache, train, evaluate, diagnose):
            stage.main()
    return made


@pytest.fixture
def here(adapted: Project, monkeypatch: pytest.MonkeyPatch, torch_as_before: None) -> Project:
    """It, as the current directory."""
    adapted.enter(monkeypatch)
    return adapted


def run(*command: str) -> None:
    run_command(build_parser().parse_args(command))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_adapters_are_merged_and_the_card_says_what_it_is(here: Project, tmp_path: Path) -> None:
    run("export", str(tmp_path / "out"))
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).logits
        trained = load_policy(Path("data/policy"), CPU)(tokens).logits
        reference = load_policy(Path("data/checkpoint/policy"), CPU)(tokens).logits
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-5)
    assert (trained - reference).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([40, 41])

    card = (tmp_path / "out/README.md").read_text()
    diagnosis = json.loads((here.root / "reports/diagnosis.json").read_text())
    gain = json.loads((here.root / "reports/evaluate/metrics.json").read_text())["length"]["difference"]
    key = json.loads((here.root / "reports/train/run.json").read_text())["train_key"]
    assert f"| verdict | **{diagnosis['verdict']}**: {diagnosis['headline']} |" in card
    assert f"{gain['mean']:+.4f} (95% interval {gain['low']:+.4f} to {gain['high']:+.4f}) over the base model" in card
    assert "on 4 prompts with 2 completions each" in card
    assert key in card
    assert digest(folder_digests(Path("data/policy"))) in card
    assert "recipe.lr: 0.05" in card


def test_an_adapter_of_a_hub_model_names_repository_and_commit(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "data/checkpoint/policy", "revision": None, "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name_base(tmp_path, {"origin": "a/b", "commit": "1f" * 20, "files": {"model.safetensors": "00"}})
    named = {"base_model_name_or_path": "a/b", "revision": "1f" * 20, "r": 2}
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == named


def test_the_base_of_the_hub_is_found_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file, content in (
        ("data/checkpoint/policy", "config.json", {"eos_token_id": 7}),
        ("data/policy", "adapter_config.json", {"base_model_name_or_path": "a/b"}),
    ):
        Path(folder).mkdir(parents=True)
        (Path(folder) / file).write_text(json.dumps(content))
    assert end_of_text_ids(Path("data/policy"), SimpleNamespace(eos_token_id=1)) == (1, 7)


@pytest.mark.slow
def test_nothing_is_written_over_or_under_another_run_s_name(here: Project, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    with pytest.raises(UserError, match="should be a new or an empty folder"):
        run("export", str(tmp_path / "full"))
    assert os.listdir(tmp_path / "full") == ["file"]
    tokenizer = here.root / "data/policy/tokenizer_config.json"
    before = tokenizer.read_text()
    tokenizer.write_text(before + " ")
    with pytest.raises(UserError, match="data/policy is not of the run in reports/train"):
        run("export", str(tmp_path / "new"))
    tokenizer.write_text(before)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_it_says_whose_policy_it_is(here: Project, capsys: pytest.CaptureFixture[str]) -> None:
    trained = json.loads((here.root / "reports/train/run.json").read_text())
    params = trained["params"]

    def said() -> tuple[str, str]:
        capsys.readouterr()
        run("generate", "Hi")
        return capsys.readouterr()

    out, err = said()
    assert out.splitlines()[0] == (
        f"policy of the run {trained['train_key'][:12]}: model {params['model']}, prompts {params['prompts']}, "
        f"reward {params['reward']}, recipe {params['recipe']}, seed {params['seed']}; "
        "each token is the most likely one"
    )
    assert err == ""
    kept = (here.root / "params.yaml").read_text()
    try:
        here.edit(seed=params["seed"] + 1, train__steps=params["train.steps"] + 1)
        assert f"params.yaml selects another run: seed={params['seed'] + 1}, not {params['seed']};" in said()[1]
        here.edit(seed=params["seed"])
        steps = params["train.steps"]
        assert f"params.yaml selects another run: train.steps={steps + 1}, not {steps};" in said()[1]
    finally:
        (here.root / "params.yaml").write_text(kept)
    (here.root / "reports/train/run.json").rename(here.root / "run.json")
    try:
        assert "data/policy is not of the run in reports/train" in said()[1]
    finally:
        (here.root / "run.json").rename(here.root / "reports/train/run.json")

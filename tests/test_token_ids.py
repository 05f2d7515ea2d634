"""The ids that end a text: all of them, in the files of a saved policy as in its checkpoint's, for any reader."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessorList,
    PreTrainedConfig,
)

from pipeline.data.token_ids import IDS, name_ends
from pipeline.models.load import end_of_text_ids, init_policy, load_policy, load_tokenizer, special_ids
from pipeline.stages import train
from tests.training import write_manifest
from tests.word_tokenizer import tokenizer, write

CPU, CHECKPOINT, POLICY = torch.device("cpu"), Path("data/checkpoint/policy"), Path("data/policy")
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8}
WITHOUT_IDS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(vocab_size=12, **SIZES),  # the class says 2
    "gpt2": GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=1),  # the class says 50256
    "gemma3": Gemma3Config(  # the text's configuration lies in the model's
        text_config={"vocab_size": 12, "num_key_value_heads": 1, "head_dim": 8, **SIZES},
        vision_config={"image_size": 8, "patch_size": 4, **SIZES}, mm_tokens_per_image=4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind whose files name no id."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in WITHOUT_IDS.items():
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink()
        written = json.loads((folder / name / "config.json").read_text())
        for part in (written, written.get("text_config", {}), written.get("vision_config", {})):
            for key in IDS:
                part.pop(key, None)
        write(folder / name, config=written)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return models


def checkpoint_of(source: Path, config: Any, text: Any, decoding: Any) -> None:
    """data/checkpoint/policy, whose files name these ends; decoding: generation_config.json, None without one."""
    shutil.copytree(source, CHECKPOINT)
    written = json.loads((CHECKPOINT / "config.json").read_text())
    if config is not None:
        written |= {"eos_token_id": config, "bos_token_id": 1}
    if text is not None:
        written["text_config"]["eos_token_id"] = text
    write(CHECKPOINT, config=written)
    if decoding is not None:
        write(CHECKPOINT, generation_config=decoding)


def ends_of_generate(folder: Path) -> set[int]:
    """At which ids transformers' own `generate` ends, of all there are, when they come third."""
    model, ends = AutoModelForCausalLM.from_pretrained(folder), set()
    for end in range(12):
        third = LogitsProcessorList([lambda ids, scores, end=end: forced(scores, end if ids.shape[1] == 4 else 11)])
        settings = {"max_length": 7, "do_sample": False, "pad_token_id": 0}
        found = model.generate(input_ids=torch.tensor([[4, 5]]), logits_processor=third, **settings)
        assert found[0, 4] == end
        ends |= {end} if found.shape[1] == 5 else set()
    return ends


def forced(scores: torch.Tensor, token: int) -> torch.Tensor:
    return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([token]), 0.0)


def names(file: Path) -> dict[str, Any]:
    """The ids that a file names, at any depth."""

    def found(part: dict[str, Any], path: str) -> dict[str, Any]:
        deeper = [found(value, f"{path}{key}.") for key, value in part.items() if isinstance(value, dict)]
        own = {path + key: value for key, value in part.items() if key in IDS}
        return own | {key: value for ids in deeper for key, value in ids.items()}

    return found(json.loads(file.read_text()), "")


# ends in config.json, in its text_config, the content of generation_config.json, and all of them with the tokenizer's 0
FLAT: list[tuple[Any, Any, Any, tuple[int, ...]]] = [
    (None, None, None, (0,)),
    ([0, 5, 6], None, None, (0, 5, 6)),
    (5, None, None, (0, 5)),
    (None, None, {"eos_token_id": [5, 0], "pad_token_id": 3}, (0, 5)),
    (None, None, {"temperature": 0.7, "do_sample": True}, (0,)),
    (6, None, {"eos_token_id": 5}, (0, 5, 6)),
    (0, None, {"eos_token_id": [0], "top_k": 5}, (0,)),
]
NESTED: list[tuple[Any, Any, Any, tuple[int, ...]]] = [
    (None, [5, 6], None, (0, 5, 6)),
    ([7, 0], 8, {"eos_token_id": [5, None, -1]}, (0, 5, 7, 8)),
]


@pytest.mark.parametrize(
    ("kind", "config", "text", "decoding", "ends"),
    [(kind, *case) for kind in WITHOUT_IDS for case in FLAT] + [("gemma3", *case) for case in NESTED],
)
def test_a_saved_policy_ends_where_its_checkpoint_does(
    place: Path, kind: str, config: Any, text: Any, decoding: Any, ends: tuple[int, ...]
) -> None:
    checkpoint_of(place / kind, config, text, decoding)
    policy, words = load_policy(CHECKPOINT, CPU), load_tokenizer(CHECKPOINT)
    assert end_of_text_ids(CHECKPOINT, words) == ends
    train.save_policy(policy, words, POLICY)
    assert end_of_text_ids(POLICY, load_tokenizer(POLICY)) == ends
    assert ends_of_generate(POLICY) == set(ends)
    assert names(POLICY / "config.json") == names(CHECKPOINT / "config.json")
    now = json.loads(file.read_text()) if (file := POLICY / "generation_config.json").is_file() else {}
    assert {**now, "eos_token_id": 0} == {**now, **(decoding or {}), "eos_token_id": 0}
    # nothing that is computed depends on it
    policy.save_pretrained("plain")
    assert (POLICY / "model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()
    assert settings(POLICY) == settings(Path("plain"))


def settings(folder: Path) -> dict[str, Any]:
    """A configuration as it is loaded."""
    return AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": None}


def test_files_that_name_every_end_are_kept_to_the_byte(place: Path) -> None:
    checkpoint_of(place / "llama", [0, 5], None, {"eos_token_id": [5, 0], "top_k": 5})
    (CHECKPOINT / "generation_config.json").write_text('{"eos_token_id":[5,0],\n"num_beams":2, "temperature":0.5}')
    train.save_policy(load_policy(CHECKPOINT, CPU), load_tokenizer(CHECKPOINT), POLICY)
    assert (POLICY / "generation_config.json").read_bytes() == (CHECKPOINT / "generation_config.json").read_bytes()


@pytest.mark.parametrize("decoding", [None, {"eos_token_id": 5, "top_k": 5}])
def test_an_adapter_ends_where_the_checkpoint_beside_it_does(place: Path, decoding: Any) -> None:
    """transformers asks the checkpoint, which `cache` has name every end."""
    checkpoint_of(place / "llama", None, None, decoding)
    words = load_tokenizer(CHECKPOINT)
    ends = end_of_text_ids(CHECKPOINT, words)
    name_ends(CHECKPOINT, ends)
    write_manifest(CHECKPOINT.parent)
    policy = init_policy(CHECKPOINT, CPU, lora_rank=1, generator=torch.Generator())
    train.save_policy(policy, words, POLICY)
    assert (POLICY / "adapter_config.json").exists()
    assert end_of_text_ids(POLICY, words) == ends
    assert ends_of_generate(POLICY) == set(ends)


def test_a_text_config_that_is_no_table_names_no_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 3, "pad_token_id": 4, "text_config": "none"}')
    (tmp_path / "generation_config.json").write_text("[]")
    named = SimpleNamespace(eos_token_id=1)
    assert end_of_text_ids(tmp_path, named) == (1, 3)
    assert special_ids(tmp_path, named) == {1, 3, 4}

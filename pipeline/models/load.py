"""A causal LM and its tokenizer from a folder that `cache` or `train` wrote."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from pipeline.errors import UserError
from pipeline.file_io import write_json
from pipeline.models.adapters import FOLDER_HAS, adapter_weights, add_lora, load_lora
from pipeline.models.memory import cast_frozen_bf16
from pipeline.models.tokenization import end_dropout
from pipeline.models.verification import Layout
from pipeline.paths import CHECKPOINT


def load_policy(folder: Path, device: torch.device, weights_device: torch.device | None = None) -> PreTrainedModel:
    """Load the model of a folder in float32 and in eval mode: Pythia's float16 is too coarse for small updates.

    If the folder holds an adapter, the checkpoint that it names is loaded with it. weights_device: where to put the
    weights if not on `device`.

    On a CPU the attention is eager: for short sequences in bfloat16 it is several times faster than the fused kernel.
    """
    logging.disable_progress_bar()
    if (folder / FOLDER_HAS).exists():
        policy = load_policy(_checkpoint_of(folder), device)
        load_lora(policy, folder)
        return policy
    _must_exist(folder)
    attention = "eager" if device.type == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    # the last positions are a slice with gaps: unless made contiguous, torch copies the head once for each prompt
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    _return_logits_only(model)
    return model.to(weights_device or device).eval()  # type: ignore[arg-type]  # its `to` is wrapped without types


def _return_logits_only(model: PreTrainedModel) -> None:
    """Turns off the options that change a model's output: router losses, attentions, hidden states, tuples. Drops its
    generation config too: sampling here does not use it, and an invalid one could not be saved again."""
    for config in (model.config, model.config.get_text_config()):
        for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                setattr(config, name, False)
        config.return_dict = True
    model.generation_config = GenerationConfig()


def init_policy(
    folder: Path,
    device: torch.device,
    weights_device: torch.device | None = None,
    *,
    lora_rank: int = 0,
    lora_alpha: float = 1,
    generator: torch.Generator | None = None,
    bfloat16: bool = False,
) -> PreTrainedModel:
    """The policy before its first update: the checkpoint, with new adapters drawn from `generator` if lora_rank > 0.
    With adapters and bfloat16 its frozen weights are rounded. weights_device: see `load_policy`."""
    policy = load_policy(folder, device, weights_device)
    if lora_rank:
        assert generator is not None
        add_lora(policy, lora_rank, lora_alpha, generator)
        if bfloat16:
            cast_frozen_bf16(policy)
    return policy


def check_saving(policy: PreTrainedModel, key: str) -> None:
    """Raises UserError if a policy that is saved would not load again as it was. `key` names the model in the message.
    To try it, adapters are saved and loaded; this overwrites their weights with numbers that all differ."""
    kind = policy.config.model_type
    if not (saved := adapter_weights(policy)):
        if type(policy.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"{key}: {kind} cannot be trained: transformers saves it as no causal LM that it loads again"
            )
        return
    for number, parameter in enumerate(saved.values()):
        parameter.data = (
            torch.arange(parameter.numel(), device=policy.device).view_as(parameter) / parameter.numel() + number
        )
    with TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        try:
            loaded = adapter_weights(load_policy(Path(folder), policy.device))
        except UserError:  # its message names a temporary folder
            loaded = {}
    if loaded.keys() != saved.keys() or not all(torch.equal(loaded[name], saved[name]) for name in saved):
        wrong = f"transformers does not load {kind}'s adapters as it saves them"
        raise UserError(f"{key}: {wrong}; train.lora_rank: 0 trains all weights")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, changed to append nothing to texts and to apply no BPE dropout. Raises UserError if
    it has no EOS token: sampling could not end."""
    _must_exist(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer names no eos_token; a policy needs one to end its completions")
    _append_nothing(tokenizer)
    end_dropout(tokenizer)
    return tokenizer


def _append_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Removes what the template appends to a text, such as EOS: the policy continues a prompt. The tokenizer that is
    saved beside a policy then gives the same tokens as in training. `encode_prompt` removes what other processors
    append."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    processor = state.get("post_processor") or {}
    changed = False
    for part in processor.get("processors", [processor]):
        single = part.get("single", []) if part.get("type") == "TemplateProcessing" else []
        while len(single) > 1 and "SpecialToken" in single[-1]:
            single.pop()
            changed = True
    if backend is not None and changed:
        backend.post_processor = type(backend).from_str(json.dumps(state)).post_processor


def end_of_text_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS first (it also pads), then those of config.json and
    generation_config.json.

    The ids are read from the files, since the defaults of a configuration class are ids of another model's vocabulary.
    For an adapter they are read from the checkpoint that it names.
    """
    folder = _checkpoint_of(folder)
    ids = [int(tokenizer.eos_token_id)]
    for table in (_read_table(folder / "generation_config.json"), *_configs(folder)):
        value = table.get("eos_token_id")
        ids += [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]
    return tuple(dict.fromkeys(ids))


def special_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens that a model or its tokenizer names: bos, cls, eos, mask, pad, sep, unk."""
    parts = [f"{part}_token_id" for part in ("bos", "cls", "eos", "mask", "pad", "sep", "unk")]
    named = [getattr(tokenizer, part, None) for part in parts]
    named += [table.get(part) for part in parts for table in _configs(folder)]
    return {i for i in named if type(i) is int}


def _checkpoint_of(folder: Path) -> Path:
    """The checkpoint that the adapter in this folder was trained with; without an adapter, the folder itself. If the
    adapter names a model of the hub (see `name_base`), its checkpoint is in data/checkpoint."""
    if not (folder / FOLDER_HAS).exists():
        return folder
    named = Path(_read_table(folder / FOLDER_HAS)["base_model_name_or_path"])
    return named if named.is_dir() else CHECKPOINT / "policy"


def name_base(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes the adapter in this folder name its base model by repository and commit of the hub, so that it loads
    elsewhere. A base model that is not from the hub stays named by its folder in this project; `reinforce export`
    merges it. manifest: the policy's part of `cache`'s manifest."""
    if manifest["commit"]:
        named = {"base_model_name_or_path": manifest["origin"], "revision": manifest["commit"]}
        write_json(folder / FOLDER_HAS, {**_read_table(folder / FOLDER_HAS), **named})


def _configs(folder: Path) -> list[dict[str, Any]]:
    """The tables that may name token ids: config.json, and the text model's inside it."""
    config = _read_table(folder / "config.json")
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def _read_table(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file, or something else in it."""
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return value if isinstance(value, dict) else {}


def load_layout(file: Path, longest: int = 0) -> Layout:
    """The layout that `cache` chose. Raises UserError if `cache` compared only sequences shorter than `longest`."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; `dvc repro cache` makes it")
    chosen = _read_table(file)
    if longest > chosen["longest"]:
        raise UserError(
            f"{file}: chosen for sequences of up to {chosen['longest']} tokens, these have up to {longest}; "
            "`dvc repro cache` tries them"
        )
    return Layout(**chosen["layout"])


def holds_model(folder: Path) -> bool:
    """Whether the folder holds a model or an adapter."""
    return any((folder / name).exists() for name in ("config.json", FOLDER_HAS))


def _must_exist(folder: Path) -> None:
    if not holds_model(folder):
        raise UserError(f"{folder}: no model there; run `dvc repro` (or the stage that makes it) first")

"""A causal LM and its tokenizer from a folder that `cache` or `train` wrote."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from pipeline.errors import UserError
from pipeline.policy.adapters import FOLDER_HAS, load_lora


def load_policy(folder: Path, device: torch.device, at: torch.device | None = None) -> PreTrainedModel:
    """The model in float32 and without dropout: Pythia's files are float16, too coarse for small updates. A folder with an
    adapter gives the checkpoint that the adapter names, with it. at: where its weights are put, if not on the device that
    computes.

    On a CPU with attention written out, which is several times faster for short sequences in bfloat16 than the fused kernel.
    """
    logging.disable_progress_bar()
    if (folder / FOLDER_HAS).exists():
        named = json.loads((folder / FOLDER_HAS).read_text(encoding="utf-8"))["base_model_name_or_path"]
        policy = load_policy(Path(named), device)
        load_lora(policy, folder)
        return policy
    _must_exist(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False,
        attn_implementation="eager" if device.type == "cpu" else "sdpa",
    )  # fmt: skip
    # the last position of each prompt is a slice with gaps, and torch multiplies such without gradient by a copy of the
    # head for each prompt
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model.to(at or device).eval()  # type: ignore[arg-type]  # its `to` is wrapped without types


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises UserError where the tokenizer has no end-of-sequence token: sampling could not end."""
    _must_exist(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer names no eos_token; a policy needs one to end its completions")
    return tokenizer


def holds_model(folder: Path) -> bool:
    """Whether there is a model or an adapter."""
    return any((folder / name).exists() for name in ("config.json", FOLDER_HAS))


def _must_exist(folder: Path) -> None:
    if not holds_model(folder):
        raise UserError(f"{folder}: no model there; run `dvc repro` (or the stage that makes it) first")

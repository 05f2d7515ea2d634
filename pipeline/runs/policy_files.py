"""How a policy is saved: as transformers and peft load it, with the checkpoint's own settings for decoding."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.token_ids import keep_token_ids
from pipeline.file_io import read_json
from pipeline.models.adapters import FOLDER_HAS
from pipeline.models.load import end_of_text_ids, name_base
from pipeline.paths import CHECKPOINT


def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights or adapter, the tokenizer, and the checkpoint's settings for decoding."""
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint = CHECKPOINT / "policy"
    keep_token_ids(checkpoint, folder, end_of_text_ids(checkpoint, tokenizer))
    if (folder / FOLDER_HAS).exists():
        name_base(folder, read_json(CHECKPOINT / "manifest.json")["policy"])

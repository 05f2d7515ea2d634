"""A tokenizer of seven words, and the files of a model beside it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = {"<eos>": 0, "<bos>": 1, "<sep>": 2, "<unk>": 3, "say": 4, "a": 5, "word": 6}


def tokenizer(template: str = "", normalizer: Any = None, unknown: str = "<unk>") -> PreTrainedTokenizerFast:
    """Splits at blanks; template: where special tokens stand, such as `<bos> $A <eos>`."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token=unknown))
    made.normalizer = normalizer or normalizers.Strip()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        named = [name for name in WORDS if name in template]
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(n, WORDS[n]) for n in named]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token=unknown)


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder

"""A tokenizer of seven words, one of a chat model, and the files of a model beside them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.repositories import _byte_tokenizer

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


CHAT = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""


def chat_tokenizer(template: str | dict[str, str] | None = CHAT, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A token a byte, 260 in all. It puts BOS before a text, and the template writes BOS, too."""
    made = _byte_tokenizer()
    ids = {name: 257 + number for number, name in enumerate(("<s>", "<|im_start|>", "<|im_end|>"))}
    made.add_special_tokens(list(ids))
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=eos)
    found.chat_template = template
    return found


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder

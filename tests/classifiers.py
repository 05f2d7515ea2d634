"""Tiny sequence classifiers with random weights: a BERT with labels, reward models without a padding token."""

import shutil
from pathlib import Path
from typing import Any

from tests.repositories import write_bert, write_byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_labelled(folder: Path, **settings: Any) -> Path:
    """A BERT whose labels are bad, fair and good; settings: of its configuration."""
    from transformers import BertConfig, BertForSequenceClassification

    write_bert(folder)
    labels = settings.pop("labels", ("bad", "fair", "good"))
    config = BertConfig.from_pretrained(
        folder, max_position_embeddings=24, initializer_range=0.5, id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)}, **settings,
    )  # fmt: skip
    return _saved(BertForSequenceClassification, config, folder)


def write_reward_model(folder: Path, template: str | None = None, **settings: Any) -> Path:
    """A GPT-NeoX with a regression head; neither it nor its tokenizer has a padding token."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForSequenceClassification

    folder.mkdir(parents=True)
    config = GPTNeoXConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, num_labels=1, initializer_range=0.5, **settings,
    )  # fmt: skip
    write_byte_tokenizer(folder)
    if template:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return _saved(GPTNeoXForSequenceClassification, config, folder)


def _saved(kind: Any, config: Any, folder: Path) -> Path:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(config)
    (folder / "model.safetensors").unlink(missing_ok=True)
    model.save_pretrained(folder)
    return folder


def copied(source: Path, root: Path) -> str:
    """Puts a model into a project's models/local; gives what `source` in params.yaml says."""
    shutil.copytree(source, root / "models/local" / source.name)
    return f"models/local/{source.name}"

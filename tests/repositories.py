"""Folders that the hub on loopback serves under the real names: OASST1, Pythia's shape in miniature, a tiny BERT."""

import gzip
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OASST1_CARD = """---
license: apache-2.0
pretty_name: OpenAssistant Conversations
dataset_info:
  features:
  - {{name: message_id, dtype: string}}
  - {{name: parent_id, dtype: string}}
  - {{name: text, dtype: string}}
  - {{name: role, dtype: string}}
  - {{name: lang, dtype: string}}
  - {{name: deleted, dtype: bool}}
  - {{name: rank, dtype: int32}}
  splits:
  - {{name: train, num_bytes: 1, num_examples: {train}}}
  - {{name: validation, num_bytes: 1, num_examples: {validation}}}
---
"""
STAND_IN = {
    "train": ["Tell me a joke", "How are you?", "how are you?", "Why is the sky blue?", "Tell me a joke", "W" * 32],
    "validation": ["Sing me a song", "How are you?", "What is a verb?"],
}


def write_oasst1(folder: Path, texts: dict[str, list[str]]) -> Path:
    """The dataset's layout: Parquet under data/, beside it files of other formats that a loader has to leave alone."""
    import pyarrow
    import pyarrow.parquet

    (folder / "data").mkdir(parents=True)
    for split, english in texts.items():
        rows = list(_messages(english, split))
        types = pyarrow.schema(
            [("message_id", "string"), ("parent_id", "string"), ("text", "string"), ("role", "string"),
             ("lang", "string"), ("deleted", "bool"), ("rank", "int32")]
        )  # fmt: skip
        table = pyarrow.Table.from_pylist(rows, schema=types)
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001-b42a775f407cee45.parquet")
    with gzip.open(folder / "2023-04-12_oasst_ready.messages.jsonl.gz", "wt") as decoy:
        decoy.write('{"text": "Not part of the dataset"}\n')
    sizes = {split: len(list(_messages(english, split))) for split, english in texts.items()}
    (folder / "README.md").write_text(OASST1_CARD.format(**sizes))
    return folder


def _messages(english: list[str], split: str) -> Iterator[dict[str, Any]]:
    """Every tenth English message is followed by one of another language, as a multilingual set has them."""
    for number, text in enumerate(english):
        yield _message(f"{split} {number}", text, "en")
        if number % 10 == 0:
            yield _message(f"{split} {number} es", "Hola", "es")


def _message(name: str, text: str, lang: str) -> dict[str, Any]:
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, name))
    return {"message_id": identity, "parent_id": None, "text": text, "role": "prompter", "lang": lang,
            "deleted": False, "rank": None}  # fmt: skip


def read_texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_pythia(
    folder: Path, tokenizer: Path | None, pickled: bool = False, hidden_size: int = 16, layers: int = 2, heads: int = 2,
    seed: int = 0, vocabulary: int = 50304,
) -> Path:  # fmt: skip
    """Pythia's architecture, vocabulary and dtype with other sizes and random weights.

    tokenizer: Pythia's tokenizer.json, or None for one made here, of 257 tokens. pickled: pytorch_model.bin instead of
    safetensors."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden_size, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config).half()
    model.save_pretrained(folder)
    if pickled:
        # Old checkpoints also hold buffers that today's architecture has no use for.
        weights = {
            **load_file(folder / "model.safetensors"),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        }
        torch.save(weights, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    _write_tokenizer(folder, tokenizer)
    (folder / "README.md").write_text("not needed to load the model\n")
    return folder


END = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def _write_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        settings = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **END}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "special_tokens_map.json").write_text(json.dumps(END))
    else:
        write_byte_tokenizer(folder)


def write_byte_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=_byte_tokenizer(), **END).save_pretrained(folder)


def _byte_tokenizer() -> Any:
    """One token a byte: any text can be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


def write_bert(folder: Path) -> Path:
    """A BERT of two tiny layers with a word-piece vocabulary of single letters."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz!?"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
    model.save_pretrained(folder)
    return folder


def english(folder: Path) -> dict[str, list[str]]:
    """The English texts of a dataset that `write_oasst1` wrote."""
    import pyarrow.parquet

    tables = {path.name.split("-")[0]: pyarrow.parquet.read_table(path) for path in (folder / "data").glob("*.parquet")}
    return {split: [row["text"] for row in table.to_pylist() if row["lang"] == "en"] for split, table in tables.items()}

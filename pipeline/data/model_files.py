"""The files of a model: which are needed, copying them, and whether they form a usable model."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.file_io import write_json

CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SMALL_FILES = (*CONFIGS, *TOKENIZER, *INDEXES)


def weight_files(names: set[str], index_of: Callable[[str], dict[str, Any]]) -> list[str]:
    """Choose the weight files of a repository, with their index: safetensors before pickles, one file before shards.

    index_of: name -> parsed JSON of an index. Empty if there are no weights.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if whole in names:
            return [whole]
        index = f"{whole}.index.json"
        if index in names:
            return [index, *sorted(set(index_of(index)["weight_map"].values()))]
    return []


def choose(folder: Path, key: str) -> list[str]:
    """The names of the needed files, weights included. Raises UserError if they do not form a model."""
    # The client makes no folder for a repository that has none of the requested files.
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if "config.json" not in names:
        raise UserError(f"{key}: {_named(folder)} has no config.json, so it holds no model")
    weights = weight_files(names, lambda index: read_index(folder / index, key))
    if not weights:
        raise UserError(f"{key}: {_named(folder)} has no weights (model.safetensors or pytorch_model.bin, or shards)")
    missing = [name for name in weights if name not in names]
    if missing:
        raise UserError(f"{key}: {weights[0]} lists {missing[0]}, which is not there")
    small = {name for name in names if any(fnmatch(name, pattern) for pattern in (*CONFIGS, *TOKENIZER))}
    for name in small | set(weights):
        if not name.isprintable():  # a newline would fake another line of the listing that is hashed
            raise UserError(f"{key}: {_named(folder)} holds a file named {name!r}; rename it")
    return sorted(small | set(weights))


def read_index(path: Path, key: str) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = set(index["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {path.name} is not an index of weights: {error!r}") from None
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{key}: {path.name} names a file outside its folder")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    if wrong := sorted(name for name in names if not name.endswith(suffix)):  # transformers would unpickle another kind
        raise UserError(f"{key}: {path.name} names {wrong[0]!r}; its shards should be {suffix} files")
    return dict(index)


def store(source: Path, target: Path, key: str) -> None:
    """Copy the needed files of a model; pickled weights become safetensors with the same keys and dtypes."""
    target.mkdir()
    for name in choose(source, key):
        if name == "pytorch_model.bin.index.json":
            index = read_index(source / name, key)
            index["weight_map"] = {name: _renamed(shard) for name, shard in sorted(index["weight_map"].items())}
            write_json(target / _renamed(name), index)
        elif name.endswith(".bin"):
            convert(source / name, target / _renamed(name), key)
        else:
            shutil.copyfile(source / name, target / name)


def _renamed(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def convert(source: Path, target: Path, key: str) -> None:
    """Convert pickled weights to safetensors. The pickle may hold tensors only: code in it is refused, never run."""
    import torch
    from safetensors.torch import save_file

    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        reason = str(error).split("\n")[0]
        raise UserError(f"{key}: {source.name} is damaged or holds more than weights: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{key}: {source.name} should hold a dictionary of tensors")
    storages: set[int] = set()
    for name, tensor in weights.items():
        # safetensors refuses tensors that share memory (tied embeddings): each key gets a copy
        shared = tensor.untyped_storage().data_ptr() in storages
        storages.add(tensor.untyped_storage().data_ptr())
        weights[name] = tensor.clone().contiguous() if shared else tensor.contiguous()
    # one metadata key only: safetensors writes several in a random order
    save_file(weights, target, metadata={"format": "pt"})
    target.chmod(0o644)


def check_policy(folder: Path, key: str) -> None:
    """Raises UserError unless `folder` holds a causal LM with a tokenizer and all of its weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    config = _check_config(folder, key, CAUSAL, "a causal LM")
    if config.architectures and not set(config.architectures) & set(CAUSAL.values()):
        raise UserError(f"{key}: {config.architectures[0]} is no causal LM (GPTNeoXForCausalLM, for example, is one)")
    tokenizer, ids = _load_tokenizer(folder, key)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}: the tokenizer has no end-of-text token, so that no completion could end")
    # other added tokens, such as those for images, may lie beyond the vocabulary: only a prompt with one is refused
    added = tokenizer.get_added_vocab().keys() - {tokenizer.eos_token}
    _check_pair({token: ids[token] for token in ids.keys() - added}, config, key)
    decoding = folder / "generation_config.json"
    try:
        if decoding.is_file() and not isinstance(json.loads(decoding.read_text(encoding="utf-8")), dict):
            raise ValueError("should hold an object")
    except ValueError as error:
        raise UserError(f"{key}: {decoding.name} is not the configuration of a model: {error!r}") from None
    _check_weights(folder, key, AutoModelForCausalLM)


def check_encoder(folder: Path, key: str) -> None:
    """Raises UserError unless `folder` holds a model with a tokenizer and all of its weights."""
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config = _check_config(folder, key, MODEL_MAPPING_NAMES, "an encoder")
    _check_pair(_load_tokenizer(folder, key)[1], config, key)
    _check_weights(folder, key, AutoModel, unused="pooler.")


def check_classifier(folder: Path, key: str) -> None:
    """Raises UserError unless `folder` holds a sequence-classification model with a tokenizer and all of its weights:
    transformers would initialise a missing head at random."""
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    config = _check_config(folder, key, CLASSIFIERS, "a sequence classifier")
    _check_pair(_load_tokenizer(folder, key)[1], config, key)
    _check_weights(folder, key, AutoModelForSequenceClassification)


def _check_config(folder: Path, key: str, known: Any, kind: str) -> Any:
    from transformers import AutoConfig

    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = written["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}: config.json is not the configuration of a model: {error!r}") from None
    if model_type not in known:
        own_code = ", and code from a repository is never run" if "auto_map" in written else ""
        raise UserError(f"{key}: model_type {model_type!r} is not {kind} that transformers knows{own_code}")
    with _loading(key, "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load_tokenizer(folder: Path, key: str) -> tuple[Any, dict[str, int]]:
    """A tokenizer and its vocabulary, token -> id."""
    from transformers import AutoTokenizer

    with _loading(key, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer, tokenizer.get_vocab()


def _check_pair(ids: dict[str, int], config: Any, key: str) -> None:
    """Raises UserError if one of these ids is outside the model's vocabulary."""
    highest, size = max(ids.values(), default=-1), config.get_text_config().vocab_size
    if not 0 <= highest < size:
        raise UserError(f"{key}: the tokenizer has ids up to {highest}, the model a vocabulary of {size}: not a pair")


def _check_weights(folder: Path, key: str, auto_class: Any, unused: str | None = None) -> None:
    """Raises UserError unless the weights fit the architecture by name and shape (loaded on the meta device). unused:
    how the names of those weights begin that may be missing."""
    from safetensors import SafetensorError, safe_open
    from transformers.utils import logging

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as weights:
                kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key}: {path.name} is damaged: {error}") from None
        # transformers would load quantized weights as plain numbers, or fail obscurely; buffers may hold integers
        packed = sorted(
            name for name, kind in kinds.items() if name.endswith(".weight") and kind.startswith(("I", "U", "F8", "F4"))
        )
        if packed:
            raise UserError(
                f"{key}: {packed[0]} holds {kinds[packed[0]]}: a quantized model; take the one that it was made of"
            )
    logging.set_verbosity_error()  # the errors below replace its report
    logging.disable_progress_bar()
    with _loading(key, "the weights"):
        _, report = auto_class.from_pretrained(
            folder,
            device_map="meta",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    misfits = sorted(name for name, *_ in report["mismatched_keys"])
    if misfits:
        raise UserError(f"{key}: {misfits[0]} has a shape that config.json does not say ({len(misfits)} such)")
    missing = sorted(name for name in report["missing_keys"] if unused is None or not name.startswith(unused))
    if missing:
        raise UserError(f"{key}: the weights lack {missing[0]} ({len(missing)} such): not those of this architecture")


@contextlib.contextmanager
def _loading(key: str, what: str) -> Iterator[None]:
    """Turns any exception into a UserError: a broken model can make transformers raise anything."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{key}: {what} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from error


def _named(folder: Path) -> str:
    """The repository of a snapshot from the hub, else the path."""
    repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return repo if folder.parent.name == "snapshots" else str(folder)

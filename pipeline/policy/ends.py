"""The ids that end a text, by the files of a model: all of them, in every file that a reader may go by."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.io.artifacts import write_json
from pipeline.policy.adapters import FOLDER_HAS

CONFIG, DECODING = "config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def end_of_text_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a text by the files of a model: the tokenizer's EOS, which comes first and fills up behind an end,
    and what config.json and generation_config.json name, as transformers' `generate` does.

    From the files, since a configuration's defaults are those of another model's vocabulary. An adapter has those of the
    checkpoint that it names.
    """
    if (folder / FOLDER_HAS).exists():
        folder = Path(read_json(folder / FOLDER_HAS)["base_model_name_or_path"])
    config = read_json(folder / CONFIG)
    ids = [int(tokenizer.eos_token_id)]
    for named in (read_json(folder / DECODING), config, config.get("text_config")):
        value = named.get("eos_token_id") if isinstance(named, dict) else None
        ids += [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]
    return tuple(dict.fromkeys(ids))


def name_ends(folder: Path, ends: tuple[int, ...]) -> None:
    """Has transformers' own `generate` end where completions end: it goes by generation_config.json alone, or without one by
    the top of config.json. Nothing is written where that names these ends."""
    config, decoding = read_json(folder / CONFIG), folder / DECODING
    named = read_json(decoding) if decoding.is_file() else {key: config[key] for key in IDS if key in config}
    value = named.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids) or set(ids) != set(ends):
        write_json(decoding, {**named, "eos_token_id": list(ends) if len(ends) > 1 else ends[0]})


def keep_token_ids(checkpoint: Path, saved: Path, ends: tuple[int, ...]) -> None:
    """Has the files of a saved policy name the ids that the checkpoint's name, and no others: transformers writes those of the
    configuration's class where the checkpoint names none. How the checkpoint is decoded is kept as it is."""
    (saved / DECODING).unlink(missing_ok=True)
    if (checkpoint / DECODING).is_file():
        shutil.copyfile(checkpoint / DECODING, saved / DECODING)
    if (saved / CONFIG).is_file():  # an adapter has none
        named, written = read_json(checkpoint / CONFIG), read_json(saved / CONFIG)
        if "text_config" not in written:  # of some multi-modal models only the text part is loaded
            named = named.get("text_config", named)
        if (kept := _with_ids_of(named, written)) != written:
            write_json(saved / CONFIG, kept)
    name_ends(saved, ends)


def _with_ids_of(named: Any, written: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the ids that another one names, part by part."""
    named = named if isinstance(named, dict) else {}
    kept = {
        key: _with_ids_of(named.get(key), value) if isinstance(value, dict) else value
        for key, value in written.items()
        if key not in IDS or key in named
    }
    return kept | {key: named[key] for key in IDS if key in named}


def read_json(file: Path) -> Any:
    """What a JSON file holds; nothing where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

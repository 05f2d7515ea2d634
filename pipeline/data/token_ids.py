"""The ids that end a text, in the configuration files of a model."""

import shutil
from pathlib import Path
from typing import Any

from pipeline.file_io import read_json, write_json

CONFIG, DECODING = "config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def name_ends(folder: Path, ends: tuple[int, ...]) -> None:
    """Write these ids to generation_config.json unless they are named there, so that transformers' `generate` ends at
    them. It reads that file alone, or without it the top level of config.json."""
    config, decoding = read_json(folder / CONFIG), folder / DECODING
    named = read_json(decoding) if decoding.is_file() else {key: config[key] for key in IDS if key in config}
    value = named.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids) or set(ids) != set(ends):
        write_json(decoding, {**named, "eos_token_id": list(ends) if len(ends) > 1 else ends[0]})


def keep_token_ids(checkpoint: Path, saved: Path, ends: tuple[int, ...]) -> None:
    """Give a saved policy the token ids that the checkpoint's files name, and no others: if they name none,
    transformers writes the defaults of the configuration class. generation_config.json is copied."""
    (saved / DECODING).unlink(missing_ok=True)
    if (checkpoint / DECODING).is_file():
        shutil.copyfile(checkpoint / DECODING, saved / DECODING)
    if not (saved / CONFIG).is_file():  # an adapter: decoding reads the files of its checkpoint
        return
    named, written = read_json(checkpoint / CONFIG), read_json(saved / CONFIG)
    if "text_config" not in written:  # of some multi-modal models only the text part is loaded
        named = named.get("text_config", named)
    if (kept := _with_ids_of(named, written)) != written:
        write_json(saved / CONFIG, kept)
    name_ends(saved, ends)


def _with_ids_of(named: Any, written: dict[str, Any]) -> dict[str, Any]:
    """A copy of `written` with the ids of `named`, in nested tables too."""
    named = named if isinstance(named, dict) else {}
    kept = {
        key: _with_ids_of(named.get(key), value) if isinstance(value, dict) else value
        for key, value in written.items()
        if key not in IDS or key in named
    }
    return kept | {key: named[key] for key in IDS if key in named}

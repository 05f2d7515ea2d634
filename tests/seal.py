"""Writes into a hand-made reports folder what the stages say of which files belong together."""

import hashlib
import json
from pathlib import Path
from typing import Any

JUDGED = ("calibration.csv", "samples.jsonl", "terms.jsonl", "heldout.jsonl", "healthy.json", "best.json")
POLICY = {"model.safetensors": "5a" * 32}  # digests of its files


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def seal(reports: Path, policy: dict[str, str] = POLICY, **measured: Any) -> None:
    """Makes the files that are there those of one run; `measured`: changes of measured.json."""
    run = json.loads((reports / "train/run.json").read_text())
    written = ("calibration.csv", "history.csv", "samples.jsonl", "terms.jsonl", "heldout.jsonl")
    files = {name: sha256((reports / "train" / name).read_bytes()) for name in written}
    digests = {"train_key": run["train_key"], **files, "policy": sha256(json.dumps(policy, sort_keys=True).encode())}
    kept = reports / "train/samples/kept.json"
    digests |= {"kept.json": sha256(kept.read_bytes())} if kept.is_file() else {}
    healthy = reports.parent / "data/healthy/healthy.json"
    digests |= {"healthy.json": sha256(healthy.read_bytes())} if healthy.is_file() else {}
    edit(reports / "train/summary.json", digests=[digests])
    own = {name: sha256((reports / "evaluate" / name).read_bytes()) for name in
           ("completions.jsonl", "metrics.json", "curve.jsonl") if (reports / "evaluate" / name).is_file()}  # fmt: skip
    if own:
        found = {"policy": policy, "prompts": "d4" * 32, "params": {"prompts": 0}, **own,
                 "heldout.jsonl": files["heldout.jsonl"], **measured}  # fmt: skip
        (reports / "evaluate/measured.json").write_text(json.dumps([found]))
    if (reports / "diagnosis.json").is_file():
        judged = {name: digests[name] for name in JUDGED if name in digests}
        judged |= {"measured.json": sha256((reports / "evaluate/measured.json").read_bytes())} if own else {}
        edit(reports / "diagnosis.json", history=files["history.csv"], digests=[judged])


def edit(path: Path, **values: Any) -> None:
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | values))

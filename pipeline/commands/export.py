"""`reinforce export FOLDER`: the trained policy as a model that needs nothing of this project, with a model card."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from pipeline.data.token_ids import keep_token_ids
from pipeline.errors import UserError
from pipeline.file_io import atomic_folder, folder_digests, read_json, write_text
from pipeline.models.adapters import FOLDER_HAS
from pipeline.models.load import end_of_text_ids, holds_model, load_policy, load_tokenizer
from pipeline.paths import CHECKPOINT, POLICY, RUN_FILES
from pipeline.runs.consistency import raise_if_mixed, run_digests
from pipeline.runs.provenance import digest
from pipeline.runs.results import read_result


def main(options: argparse.Namespace) -> None:
    """Raises UserError where the folder holds something, or the policy and the reports are not of one run."""
    target: Path = options.folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: should be a new or an empty folder")
    if not holds_model(POLICY):
        raise UserError(f"{POLICY}: no model there; run `dvc repro` first")
    files = (RUN_FILES.run, RUN_FILES.summary, RUN_FILES.diagnosis, RUN_FILES.metrics, RUN_FILES.completions)
    run, summary, diagnosis, metrics, completions = map(read_result, files)
    raise_if_mixed("train", "diagnose", "evaluate")
    if run_digests(RUN_FILES.summary)["policy"] != digest(folder_digests(POLICY)):
        raise UserError(f"{POLICY} is not of the run in {RUN_FILES.run.parent}; `dvc checkout` brings back both")
    manifest = read_json(CHECKPOINT / "manifest.json")["policy"]
    with atomic_folder(target) as folder:
        if (POLICY / FOLDER_HAS).exists():
            save_merged(folder)
        else:
            shutil.copytree(POLICY, folder, dirs_exist_ok=True)
        write_text(folder / "README.md", model_card(run, summary, diagnosis, metrics, completions, manifest))
    print(
        f"the policy of the run {run['train_key'][:12]}: {target}; "
        f"AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it"
    )


def save_merged(folder: Path) -> None:
    """The weights of the reference with the adapters added, and the tokenizer."""
    from peft import PeftModel

    tokenizer, checkpoint = load_tokenizer(POLICY), CHECKPOINT / "policy"
    reference: Any = load_policy(checkpoint, torch.device("cpu"))
    PeftModel.from_pretrained(reference, POLICY).merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keep_token_ids(checkpoint, folder, end_of_text_ids(checkpoint, tokenizer))


def model_card(
    run: dict[str, Any],
    summary: dict[str, Any],
    diagnosis: dict[str, Any],
    metrics: dict[str, Any],
    completions: list[dict[str, Any]],
    manifest: dict[str, Any],
) -> str:
    """README.md: what was trained on what, what came of it, and the digests to check it by."""
    params, commit = run["params"], manifest["commit"]
    base = f"`{manifest['origin']}`" + (f" at commit `{commit}`" if commit else "")
    data = ModelCardData(
        base_model=manifest["origin"] if commit else None, library_name="transformers", tags=["reinforce"]
    )
    return f"""---
{data.to_yaml()}
---

# {params["model"]}, trained by REINFORCE with the reward `{params["reward"]}`

| | |
|---|---|
| base model | {base}; its licence holds for these weights too |
| prompts | `{params["prompts"]}` |
| reward | `{params["reward"]}`, encoder `{params["encoder"]}` |
| recipe | `{params["recipe"]}`, seed {params["seed"]} |
| steps | {summary["steps"]} of {params["train.prompts_per_step"]} x {params["train.samples_per_prompt"]} completions |
| verdict | **{diagnosis["verdict"]}**: {diagnosis["headline"]} |
| held-out reward | {gain(metrics[params["reward"]], completions)} |
| run | train_key `{run["train_key"]}` |
| digest of `data/policy` | `{digest(folder_digests(POLICY))}` |

Every parameter of the run:

```
{chr(10).join(f"{name}: {value}" for name, value in params.items())}
```
"""


def gain(of_reward: dict[str, Any], completions: list[dict[str, Any]]) -> str:
    """The change of the held-out reward with its interval, and on how much it was measured."""
    mean, low, high = (of_reward["difference"][key] for key in ("mean", "low", "high"))
    interval = "" if low is None else f" (95% interval {low:+.4f} to {high:+.4f})"
    prompts = sum(row["sample"] == 0 for row in completions)
    samples = len(completions) // prompts
    return f"{mean:+.4f}{interval} over the base model, on {prompts} prompts with {samples} completions each"

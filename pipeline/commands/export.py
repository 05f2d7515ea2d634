"""`reinforce export FOLDER`: the trained policy as a model that needs nothing of this project, with a model card."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from pipeline.config.load import load_params
from pipeline.distributed.device import configure_torch
from pipeline.errors import UserError
from pipeline.file_io import atomic_folder, folder_digests, read_json, write_text
from pipeline.models.adapters import FOLDER_HAS
from pipeline.models.load import holds_model, load_policy, load_tokenizer
from pipeline.paths import CHECKPOINT, POLICY, RUN_FILES
from pipeline.report.inputs import Inputs, load
from pipeline.runs.consistency import holds_policy_of, run_digests
from pipeline.runs.policy_files import save_policy
from pipeline.runs.provenance import digest
from pipeline.runs.results import gain_text


def main(options: argparse.Namespace) -> None:
    """Raises UserError if the folder is not empty, or the policy and the reports are not of one run."""
    target: Path = options.folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: should be a new or an empty folder")
    if not holds_model(POLICY):
        raise UserError(f"{POLICY}: no model there; run `dvc repro` first")
    inputs = load()
    if not holds_policy_of(run_digests(RUN_FILES.summary)):
        raise UserError(f"{POLICY} is not of the run in {RUN_FILES.run.parent}; `dvc checkout` brings back both")
    manifest = read_json(CHECKPOINT / "manifest.json")["policy"]
    with atomic_folder(target) as folder:
        if (POLICY / FOLDER_HAS).exists():
            save_merged(folder)
        else:
            shutil.copytree(POLICY, folder, dirs_exist_ok=True)
        write_text(folder / "README.md", model_card(inputs, manifest))
    print(
        f"the policy of the run {inputs.run['train_key'][:12]}: {target}; "
        f"AutoModelForCausalLM.from_pretrained({str(target)!r}) loads it"
    )


def save_merged(folder: Path) -> None:
    """The weights of the reference with the adapters added, and the tokenizer."""
    from peft import PeftModel

    sizes = load_params().train
    reference: Any = load_policy(CHECKPOINT / "policy", configure_torch("cpu", sizes.threads, sizes.arithmetic))
    save_policy(PeftModel.from_pretrained(reference, POLICY).merge_and_unload(), load_tokenizer(POLICY), folder)


def prompt_code(params: dict[str, Any]) -> str:
    """Python code that makes a prompt of a text as the run did. A tokenizer without a template has none to apply."""
    if params.get("model.chat_template") != "auto":
        return 'prompt = tokenizer("Hi there", return_tensors="pt")'
    system = params.get("model.system")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": "Hi there"}]
    options = {name.partition("options.")[2]: v for name, v in params.items() if "model.chat_template_options." in name}
    given = f"{messages!r}, add_generation_prompt=True, return_tensors='pt', **{options!r}"
    return f"prompt = tokenizer.apply_chat_template({given})"


def model_card(inputs: Inputs, manifest: dict[str, Any]) -> str:
    """README.md: what was trained on what, what came of it, and the digests to check it by."""
    run, diagnosis, commit = inputs.run, inputs.diagnosis, manifest["commit"]
    params, difference = run["params"], inputs.rewards[inputs.trained]["difference"]
    prompts = sum(row["sample"] == 0 for row in inputs.completions)
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
| steps | {diagnosis["steps"]} of {params["train.prompts_per_step"]} x {params["train.samples_per_prompt"]} \
completions |
| verdict | **{diagnosis["verdict"]}**: {diagnosis["headline"]} |
| held-out reward | {gain_text(difference, ".4f")} over the base model, \
on {prompts} prompts with {len(inputs.completions) // prompts} completions each |
| run | train_key `{run["train_key"]}` |
| digest of `data/policy` | `{digest(folder_digests(POLICY))}` |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
{prompt_code(params)}
print(tokenizer.decode(model.generate(**prompt, do_sample=True, max_new_tokens=40)[0]))
```

Every parameter of the run:

```
{chr(10).join(f"{name}: {value}" for name, value in params.items())}
```
"""

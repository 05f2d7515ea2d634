"""The `dvc exp run` that makes an experiment of params.yaml: its selectors and seed, and changes of keys."""

import json
import shlex
from typing import Any

from pipeline.config.schema import SELECTORS


def override(key: str, value: Any) -> str:
    """key=value as `-S` takes it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def experiment_command(params: dict[str, Any], changes: dict[str, Any]) -> str:
    """`dvc exp run -S recipe=stable -S ...`: the selectors and the seed of `params`, then the changes."""
    chosen = {name: params[name] for name in (*SELECTORS, "seed")} | changes
    return " ".join(["dvc exp run", *(f"-S {shlex.quote(override(key, value))}" for key, value in chosen.items())])

"""The `dvc exp run` that repeats a run, with or without changes, whatever values params.yaml has by then.

The command gives every value that the run had, since nobody knows what params.yaml holds where the command is run.
"""

import json
import re
import shlex
from typing import Any

from pipeline.config.schema import SELECTORS

PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][\w./@-]*", re.ASCII | re.IGNORECASE)


def override(key: str, value: Any) -> str:
    """key=value as `-S` takes it, in Hydra's grammar."""
    return f"{key}={_hydra(value)}"


def option(key: str, value: Any) -> str:
    """`override` for the command line: ++ also sets a key that params.yaml leaves to its default, or a table that it
    lacks."""
    return ("++" if "." in key else "") + override(key, value)


def experiment_command(params: dict[str, Any], changes: dict[str, Any], *options: str) -> str:
    """`dvc exp run -S recipe=stable -S ...`: the selectors and the seed of `params`, the changes, then all other
    values.

    params: as run.json has them, and those of `evaluate` by dotted keys.
    """
    chosen = {name: params[name] for name in (*SELECTORS, "seed")} | changes
    for key, value in params.items():
        table, dot, name = key.partition(".")
        place = f"{SELECTORS[table]}.{params[table]}.{name}" if dot and table in SELECTORS else key
        chosen.setdefault(place, _listed(value))
    given = [part for key, value in chosen.items() for part in ("-S", option(key, value))]
    return shlex.join(["dvc", "exp", "run", *options, *given])


def _listed(value: Any) -> Any:
    """The list behind a text: run.json holds a list as JSON."""
    if isinstance(value, str) and value.startswith("["):
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return found if json.dumps(found) == value else value
    return value


def _hydra(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_hydra(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    if PLAIN.fullmatch(value):
        return value
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # else OmegaConf looks up a name
    # Hydra reads backslashes as they are, except before a quote
    escaped = re.sub(r'(\\*)("|$(?!\n))', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), literal)
    return f'"{escaped}"'

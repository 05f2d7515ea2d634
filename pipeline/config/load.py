"""params.yaml -> the tables of `schema`. Each mistake in the file is reported in one line that names its key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config.messages import explain, suggest
from pipeline.config.schema import SELECTORS, Params, classifier_rewards
from pipeline.errors import UserError

PARAMS_FILE = Path("params.yaml")
MOST_VALUES = 100_000  # in the file with its aliases expanded: a few lines of aliases can stand for billions
MOST_DIGITS = 4300  # of an integer: Python does not print longer ones, which YAML can hold in hexadecimal


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate a parameter file. Raises UserError naming file, key, value and what would be right."""
    # YAML 1.2 through ruamel: DVC writes lr as 3e-05, which YAML 1.1 parsers read as a string.
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's root") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: should be UTF-8, byte 0x{error.object[error.start]:02x} is not") from None
    except RecursionError:
        raise UserError(f"{path}: not valid: nested too deeply") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # ruamel raises the last three for a value that does not fit its tag, such as !!bool abc
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {str(problem).partition(';')[0]}") from None
    return validate_params(tree, str(path))


def validate_params(tree: Any, name: str = "params.yaml") -> Params:
    """Validate a parsed parameter file. Raises UserError as `load_params` does."""
    if not isinstance(tree, dict):
        raise UserError(f"{name}: should hold keys such as model, reward and train, not {type(tree).__name__}")
    if _values(tree) > MOST_VALUES:
        raise UserError(
            f"{name}: holds more than {MOST_VALUES} values; does an alias (*name) stand inside its own anchor?"
        )
    try:
        for path, value in _integers(tree):
            if abs(value) >= 10**MOST_DIGITS:
                raise UserError(f"{name}: {'.'.join(path) or 'a key'}: an integer of more than {MOST_DIGITS} digits")
        params = Params.model_validate(tree)
    except ValidationError as failure:
        raise UserError(f"{name}: {explain(failure, tree)}") from None
    except RecursionError:
        raise UserError(f"{name}: not valid: nested too deeply") from None
    for selector, table in SELECTORS.items():
        chosen, known = getattr(params, selector), getattr(params, table)
        if chosen not in known:
            raise UserError(f"{name}: {selector}: there is no {chosen!r} in {table}{suggest(chosen, known)}")
    for reward, rewards in params.rewards.items():
        for each in classifier_rewards(rewards):
            if each.classifier not in params.classifiers:
                wrong = f"there is no {each.classifier!r} in classifiers{suggest(each.classifier, params.classifiers)}"
                raise UserError(f"{name}: rewards.{reward}: {wrong}")
    return params


def _values(tree: Any) -> int:
    """Count keys and values of a tree, aliases wherever they are used; stops soon after MOST_VALUES."""
    waiting, count = [tree], 0
    while waiting and count <= MOST_VALUES:
        value = waiting.pop()
        count += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return count


def _integers(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the integers of a tree with the path of their key; an integer key has the path of its table."""
    if isinstance(tree, int):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _integers(key, path)
            yield from _integers(value, (*path, str(key)))
    elif isinstance(tree, list | tuple | set):
        for place, value in enumerate(tree):
            yield from _integers(value, (*path, str(place)))

"""A reward of the user's: `reward(prompts, completions, **params) -> list[float]`, the convention of trl."""

import ast
import importlib.util
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, did_you_mean


def custom_reward(function: str, params: dict[str, Any]) -> Callable[[list[str], list[str]], list[float]]:
    """`custom/file.py:name` as a reward. Raises UserError where it is missing, cannot be imported, or, when called,
    raises or returns other than one finite number a completion (checked by `build`)."""
    file, _, name = function.partition(":")
    path = Path(file)
    if not os.path.isfile(path):  # pathlib raises for a name that no file system takes
        raise UserError(f"reward {function}: there is no file {file}")
    if not path.resolve().is_relative_to(Path("custom").resolve()):
        raise UserError(f"reward {function}: the file must lie in custom/, where DVC watches it")
    spec = importlib.util.spec_from_file_location(f"custom_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit(0) would end the stage as if it were done
        raise UserError(f"reward {function}: importing it raised {_describe(error, path)}") from error
    target = getattr(module, name, None)
    if not callable(target):
        raise UserError(f"reward {function}: {file} defines no function {name!r}")

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        try:
            values = target(prompts=prompts, completions=completions, **params)
            # a generator raises only now, and may have no end
            return list(itertools.islice(values, len(completions) + 1)) if isinstance(values, Iterator) else values
        except (Exception, SystemExit) as error:
            raise UserError(f"reward {function} raised {_describe(error, path)}") from error

    return reward


def check_custom(function: str, params: dict[str, Any]) -> None:
    """Raises UserError for what its text alone tells to be wrong: no such file or function, or a parameter that the
    function does not take. Nothing of it is run."""
    file, _, name = function.partition(":")
    try:
        tree = ast.parse(Path(file).read_bytes())
    except FileNotFoundError:
        raise UserError(f"reward {function}: there is no file {file}") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"reward {function}: {_describe(error, Path(file))}") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = functions.get(name)
    if found is None:
        if not {name, "*"} & set(_bound(tree)):
            raise UserError(f"reward {function}: {file} defines no function {name!r}{did_you_mean(name, functions)}")
    elif found.args.kwarg is None and not found.decorator_list:
        names = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
        for given in params:
            if given not in names:
                raise UserError(f"reward {function}: it takes no parameter {given!r}{did_you_mean(given, names)}")


def _bound(tree: ast.Module) -> Iterator[str]:
    """Names that are defined, assigned or imported anywhere, `*` where all of a module's are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _describe(error: BaseException, path: Path) -> str:
    """`ValueError: text (line 3 of custom/x.py)`, the innermost line of the user's file."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name
    ]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    where = f" (line {lines[-1]} of {path})" if lines else ""
    try:
        return f"{type(error).__name__}: {error}{where}"
    except Exception:  # an exception of the user's whose text cannot be made
        return f"{type(error).__name__}{where}"

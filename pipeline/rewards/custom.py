"""Custom rewards: `reward(prompts, completions, answer, **kwargs) -> list[float]` in custom/, trl's convention."""

import ast
import asyncio
import copy
import importlib
import inspect
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, GeneratorType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import UserError, did_you_mean
from pipeline.file_io import why_unwatched
from pipeline.rewards.batch import RewardBatch
from pipeline.rewards.turns import settings_of_reward
from pipeline.rewards.watchdog import watchdog

if TYPE_CHECKING:
    from pipeline.rewards.isolation import OwnSettings

FOLDER = "custom"


class Loaded(NamedTuple):
    """An imported file of custom/. Rewards of one file share its module: pickle needs each function to exist once."""

    root: Path
    source: bytes
    module: ModuleType
    settings: "OwnSettings"
    loop: asyncio.Runner  # one for all calls: what the module makes for async functions belongs to a loop


_loaded: dict[str, Loaded] = {}  # by the module's name
_dropped: list[ModuleType] = []  # never freed: a torch mode that one of them holds open would end during training


def custom_reward(function: str, params: dict[str, Any]) -> Callable[[RewardBatch], Any]:
    """Import `custom/file.py:name` as a reward. Raises UserError if it is missing or its import fails; the reward
    raises UserError if the function raises.

    The function is given, by name and as far as it takes them: `prompts` and `completions`, texts, or for a
    conversation lists of messages; `completion_ids`, the tokens; each column of the prompts' rows; `params`; and what
    trl gives besides, `trainer_state`, of which there is `global_step` here, and `log_extra` and `log_metric`, which do
    nothing. It may be async. A None is no statement on that completion.

    The module is named `custom.file`, so child processes can import it. It has its own process settings (see
    `isolation`). The global generators of random, numpy and torch are seeded before each call from its prompts,
    completions and parameters, and before the import from the file's name: a resumed run sees the same random numbers.
    """
    file, _, name = function.partition(":")
    path = Path(file)
    if not os.path.isfile(path):  # pathlib raises for names that are not valid, such as too long ones
        raise _missing(function, file)
    if reason := why_unwatched(path, [Path(FOLDER)]):
        raise UserError(f"reward {function}: the file must lie in {FOLDER}/: {reason}")
    loaded = _load(function, path)
    target = getattr(loaded.module, name, None)
    if not callable(target):
        raise UserError(f"reward {function}: {file} defines no function {name!r}")

    takes = _taken(target)

    def reward(batch: RewardBatch) -> Any:
        columns = _columns(batch)
        # copies: the function may edit what it is given
        given = {"prompts": [copy.deepcopy(prompt.content) for prompt in batch.prompts]}
        given["completions"] = [
            text if prompt.messages is None else [{"role": "assistant", "content": text}]
            for prompt, text in zip(batch.prompts, batch.completions, strict=True)
        ]
        seed = json.dumps([function, params, given["prompts"], batch.completions, *([columns] if columns else [])])
        offered = {
            **given, "completion_ids": [list(ids) for ids in batch.completion_ids], **copy.deepcopy(columns),
            "trainer_state": SimpleNamespace(global_step=batch.step), "log_extra": _ignore, "log_metric": _ignore,
        }  # fmt: skip
        arguments = {name: value for name, value in offered.items() if takes is None or name in takes} | params

        def call() -> Any:
            values = target(**arguments)
            if inspect.isawaitable(values):
                values = loaded.loop.run(_awaited(values))
            if not isinstance(values, Iterator):
                return values
            # a generator runs only now, and may be endless
            rewards = list(itertools.islice(values, len(batch.completions) + 1))
            if isinstance(values, GeneratorType):
                values.close()  # else a `with` inside it would end, and change settings, when it is collected
            return rewards

        texts = all(prompt.messages is None for prompt in batch.prompts)
        return _run(function, " raised", loaded.settings, seed, loaded.root, call, _about_texts if texts else None)

    return reward


def _about_texts(error: BaseException) -> str:
    """What to say besides of a function that is given texts, where it took them for messages."""
    if type(error) is TypeError and str(error).startswith("string indices must be integers"):
        return "; prompts and completions are texts here: a prompt column of conversations makes them messages"
    return ""


def _columns(batch: RewardBatch) -> dict[str, list[Any]]:
    """The columns of the prompts' rows, each as a list with a value a completion."""
    names = batch.prompts[0].columns if batch.prompts else ()
    return {name: [prompt.columns[name] for prompt in batch.prompts] for name in names}


def _taken(target: Callable[..., Any]) -> frozenset[str] | None:
    """The names of the arguments that a function takes; None where it takes any, or cannot be asked."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def _ignore(*arguments: Any, **named: Any) -> None:
    pass


async def _awaited(values: Any) -> Any:
    return await values


def _load(function: str, path: Path) -> Loaded:
    """Import the file as a module that every process can import by name from the project's root."""
    from pipeline.rewards.isolation import OwnSettings  # imports torch, which `check` does not need

    root, source, name = Path.cwd(), path.read_bytes(), ".".join(path.with_suffix("").parts)
    known = _loaded.get(name)
    if known and known.root == root and known.source == source:
        return known
    if known or any(other.root != root for other in _loaded.values()):  # edited, or another project, as in tests
        _loaded.clear()
        ours = [module for module in sys.modules if module.partition(".")[0] == FOLDER]
        _dropped.extend(sys.modules.pop(module) for module in ours)
    importlib.invalidate_caches()
    settings = OwnSettings(str(root), str(root / path.parent))  # the file's folder is for `import helper`
    module = _run(function, ": importing it raised", settings, name, root, lambda: importlib.import_module(name))
    if not module.__file__ or not os.path.samefile(module.__file__, path):
        other = module.__file__ or f"a folder {name}"
        del sys.modules[name]
        raise UserError(f"reward {function}: Python imports {other} as {name}, not {path}; rename the file")
    _loaded[name] = Loaded(root, source, module, settings, asyncio.Runner())
    return _loaded[name]


def _run(
    function: str,
    what: str,
    settings: "OwnSettings",
    seed: str,
    root: Path,
    call: Callable[[], Any],
    advice: Callable[[BaseException], str] | None = None,
) -> Any:
    """Call the user's code under its own settings. Raises UserError for whatever it raises, with the advice on it."""

    def place(frame: FrameType) -> str | None:
        return _place(root, frame.f_code.co_filename, frame.f_lineno)

    with settings_of_reward(), watchdog(f"reward {function}", place), settings.in_place(seed):
        try:
            return call()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: it would end the stage as if it had succeeded
            more = advice(error) if advice else ""
            raise UserError(f"reward {function}{what} {_describe(error, root)}{more}") from error


def _missing(function: str, file: str) -> UserError:
    elsewhere = Path(os.environ.get("DVC_ROOT") or ".").resolve() != Path.cwd()
    hint = f" in this experiment's folder, which has what git tracks: `git add {file}`" if elsewhere else ""
    return UserError(f"reward {function}: there is no file {file}{hint}")


class Arguments(NamedTuple):
    """What a function takes, as its text says."""

    names: tuple[str, ...]
    required: tuple[str, ...]  # without a default
    any_name: bool  # it has **kwargs


def check_custom(function: str, params: dict[str, Any]) -> None:
    """Check a custom reward without running it. Raises UserError for a missing file, function or parameter."""
    found = arguments_of(function)
    if found is None or found.any_name:
        return
    for given in params:
        if given not in found.names:
            raise UserError(f"reward {function}: it takes no parameter {given!r}{did_you_mean(given, found.names)}")


def arguments_of(function: str) -> Arguments | None:
    """The arguments of `custom/file.py:name`, which is not run; None where the text does not tell, since it is
    decorated or imported. Raises UserError for a missing file or function."""
    file, _, name = function.partition(":")
    try:
        tree = ast.parse(Path(file).read_bytes(), file)
    except FileNotFoundError:
        raise _missing(function, file) from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"reward {function}: {_describe(error, Path.cwd())}") from None
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    found = functions.get(name)
    if found is None and not {name, "*"} & set(_bound(tree)):
        raise UserError(f"reward {function}: {file} defines no function {name!r}{did_you_mean(name, functions)}")
    if found is None or found.decorator_list:
        return None
    places = [argument.arg for argument in (*found.args.posonlyargs, *found.args.args)]
    named = dict(zip((argument.arg for argument in found.args.kwonlyargs), found.args.kw_defaults, strict=True))
    required = [*places[: len(places) - len(found.args.defaults)], *(one for one in named if named[one] is None)]
    return Arguments((*places, *named), tuple(required), found.args.kwarg is not None)


def _bound(tree: ast.Module) -> Iterator[str]:
    """Yield the names that are defined, assigned or imported anywhere; `*` for `from module import *`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _place(root: Path, filename: str | None, line: int | None) -> str | None:
    """`line 3 of custom/x.py`; None if the file is not in custom/."""
    file = os.path.join(root, filename or "")
    return f"line {line} of {file[len(str(root)) + 1 :]}" if file.startswith(f"{root}/{FOLDER}/") else None


def _describe(error: BaseException, root: Path) -> str:
    """`ValueError: text (line 3 of custom/x.py)`, with the innermost line in custom/."""
    places = [_place(root, frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append(_place(root, error.filename, error.lineno))
    found = [place for place in places if place]
    where = f" ({found[-1]})" if found else ""
    try:
        return f"{type(error).__name__}: {error}{where}"
    except Exception:  # the `__str__` of a user's exception class failed
        return f"{type(error).__name__}{where}"

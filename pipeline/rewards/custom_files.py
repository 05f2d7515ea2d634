"""The files of custom/ that a custom reward depends on."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config.schema import CustomReward, Reward, plain_rewards
from pipeline.file_io import sha256

FOLDER = Path("custom")
# what these run or import cannot be told from the text
DYNAMIC_MODULES = {"importlib", "runpy", "subprocess", "ctypes"}
DYNAMIC_BUILTINS = {"__import__", "exec", "eval", "compile"}


def custom_digests(rewards: Iterable[Reward]) -> dict[str, str]:
    """sha256 by path of the files that these rewards depend on, sorted; empty where none of them is a custom one.

    The file of each, what it imports from custom/ at any depth, and every file there that is not Python's, which a
    reward may read. All of custom/ where a file decides what it imports, or which code it reads, only when it runs."""
    functions = [reward.function for reward in custom_rewards(rewards)]
    if not functions:
        return {}
    present = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {path for path in present if path.suffix != ".py"}
    for function in functions:
        needed = _needed(Path(function.partition(":")[0]))
        files.update(present if needed is None else needed)
    return {path.as_posix(): sha256(path) for path in sorted(files)}


def custom_rewards(rewards: Iterable[Reward]) -> Iterator[CustomReward]:
    """The custom ones among them, terms of sums included."""
    for reward in rewards:
        yield from (plain for plain in plain_rewards(reward) if isinstance(plain, CustomReward))


def _needed(reward: Path) -> set[Path] | None:
    """A reward's file and what it imports from custom/, at any depth; None where the text of one of them does not
    tell."""
    found: set[Path] = set()
    waiting = [reward]
    while waiting:
        if (path := waiting.pop()) in found or not path.is_file():
            continue
        found.add(path)
        names = _imported_names(path)
        if names is None or DYNAMIC_MODULES & {name.partition(".")[0] for name in names}:
            return None
        # Python looks in the project's root, then in the folder of the reward
        for place in (folder / name.replace(".", "/") for name in names for folder in (Path(), reward.parent)):
            packages = [parent / "__init__.py" for parent in (place, *place.parents)]
            waiting += [file for file in (place.with_suffix(".py"), *packages) if file.is_relative_to(FOLDER)]
    return found


def _imported_names(path: Path) -> set[str] | None:
    """Modules that a file imports, and names that may be modules; None where its text does not tell."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # one leading dot is the file's own package, each further one the package above
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            module = ".".join((*package, *([node.module] if node.module else [])))
            names.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
        elif (isinstance(node, ast.Name) and node.id in DYNAMIC_BUILTINS) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".py")
        ):
            return None
    return names

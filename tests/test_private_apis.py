"""Private parts of libraries: each is used in one file, and a version of the library that lacks it is named here."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# attribute or module -> the one file that uses it, and where it is found in the installed library
PRIVATE = {
    "_C": ("rewards/isolation.py", "torch:_C"),
    "_get_fp32_precision_getter": ("rewards/isolation.py", "torch:_C._get_fp32_precision_getter"),
    "_set_fp32_precision_setter": ("rewards/isolation.py", "torch:_C._set_fp32_precision_setter"),
    # no public function of torch's gives a product to oneDNN
    "_linear_pointwise": ("arithmetic/kernels.py", "torch:ops.mkldnn._linear_pointwise"),
    "_attn_implementation": ("models/scoring.py", "transformers:PretrainedConfig._attn_implementation"),
    "_current_frames": ("rewards/watchdog.py", "sys:_current_frames"),
    # torch has no public walk over nested lists, tuples and dicts
    "torch.utils._pytree": ("models/cache_size.py", "torch:utils._pytree"),
    # without an underscore, and in no documentation
    "accelerate.commands.config.config_args": (
        "distributed/launch.py", "accelerate.commands.config.config_args:load_config_from_file",
    ),
    "accelerate.commands.launch": ("distributed/launch.py", "accelerate.commands.launch:launch_command_parser"),
    "dvc.utils.hydra": ("runs/dvc_queue.py", "dvc.utils.hydra:get_hydra_sweeps"),
    "mlflow.store.tracking.sqlalchemy_store": (
        "tracking/mlflow_store.py", "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore",
    ),
}  # fmt: skip
UNDOCUMENTED = ("accelerate.commands", "dvc.utils", "mlflow.store")
OURS = {"self", "cls"}
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields"}


def private_names(tree: ast.Module) -> set[str]:
    """Attributes and modules with a leading underscore that are not this file's own, and imports of UNDOCUMENTED
    modules."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id in OURS):
                found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in [module] if module else [alias.name for alias in node.names]:
                if name.startswith(UNDOCUMENTED) or any(part.startswith("_") for part in name.split(".")[1:]):
                    found.add(name)
            if module:
                found |= {alias.name for alias in node.names if alias.name.startswith("_")}
    return found - own - OF_NAMED_TUPLES - {"__future__"}


def test_each_private_part_is_used_in_one_file() -> None:
    files = sorted((ROOT / "pipeline").rglob("*.py"))
    used = {
        path.relative_to(ROOT / "pipeline").as_posix(): private_names(ast.parse(path.read_text())) for path in files
    }
    assert {file: names for file, names in used.items() if names} == {
        file: {name for name, (place, _) in PRIVATE.items() if place == file} for file, _ in PRIVATE.values()
    }


@pytest.mark.parametrize(
    "code", ["import x._y", "from x._y import z", "from x import _z", "x.y._z()", "import dvc.utils.a"]
)
def test_a_new_one_is_noticed(code: str) -> None:
    assert private_names(ast.parse(code))
    assert not private_names(ast.parse("self._z; x.__doc__; x._replace(a=1); import dvc.api"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own
@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_still_there(name: str) -> None:
    file, (module, _, path) = PRIVATE[name][0], PRIVATE[name][1].partition(":")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"pipeline/{file} needs {path} of {module}, which is gone in the installed version: {error}")

"""The shape of the project: who imports whom, what each DVC stage watches, what is never called, which lists agree."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.config.schema import SELECTORS
from pipeline.file_io import total
from pipeline.report.terms import WORDS
from pipeline.rl.metrics import METRICS
from pipeline.runs import provenance
from pipeline.runs.provenance import UNRELATED, local_modules
from tests.project import ROOT, copy_checkout

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = (ROOT / "params.yaml").read_text()
STAGES = {f"pipeline.stages.{name}" for name in DVC}
COMMANDS = {f"pipeline.commands.{name}" for name in (
    "compare", "cure", "diagnose", "export", "generate", "sweep", "tune", "ui", "verify",
)}  # fmt: skip
CORE = ("pipeline.models", "pipeline.rl", "pipeline.diagnosis")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "pipeline").rglob("*.py"))
}


def inside(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@cache
def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """Full names of what a module imports, anywhere in it: modules, and names that may be modules."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where they lead"
            names.add(str(node.module))
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@cache
def direct(module: str) -> frozenset[str]:
    """The local modules that a module imports, with the packages around them: their __init__ runs too."""
    found = {name for name in imported(syntax(module)) if name in MODULES}
    parents = {".".join(name.split(".")[:i]) for name in found | {module} for i in range(1, name.count(".") + 1)}
    return frozenset(found | parents)


def reached(module: str) -> set[str]:
    """The local modules that are loaded when a module runs, itself included."""
    found, waiting = {module}, [module]
    while waiting:
        new = direct(waiting.pop()) - found
        found |= new
        waiting += new
    return found


# --- import directions


def test_the_walk_knows_every_way_to_import() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from e.g import h as i\nif x:\n    import j as k, l\n"
    assert imported(ast.parse(source)) == {"a.b", "c", "c.d", "e.g", "e.g.h", "j", "l"}


def test_every_stage_and_command_is_a_module() -> None:
    for package, names in (("pipeline.stages", STAGES), ("pipeline.commands", COMMANDS)):
        assert {name for name in MODULES if name.startswith(f"{package}.")} == names


# the first refuses the wrong Python and has load_run, the second sets matplotlib's variables
MORE_THAN_DOCSTRING = ("pipeline", "pipeline.report", "pipeline.stages")


def test_packages_hold_nothing_but_what_belongs_there() -> None:
    """So that no dep of dvc.yaml needs to name an __init__.py."""
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module not in MORE_THAN_DOCSTRING:
            assert [type(node) for node in syntax(module).body] == [ast.Expr], module


WHOLE_NUMBERS = {
    "sum((len(text.encode()) for text in texts))", "sum((not text.strip() for text in texts))", "sum(sizes)",
    "sum(there)", "sum((int((~part.isfinite()).sum()) for part in (before, after)))",
}  # fmt: skip
TIMES = {"sum((v for name, v in row.items() if name.startswith('seconds_')))", "sum(seconds)"}  # in no hashed file


def test_floats_are_added_in_a_way_that_no_python_changes() -> None:
    """From Python 3.12 on `sum` compensates for rounding."""
    assert total([1e16, 1.0, -1e16]) == 0.0
    for module in MODULES:
        if inside(module, ("pipeline.rl", "pipeline.diagnosis", "pipeline.rewards")):
            added = [call for name, call in calls(syntax(module)) if name == "sum" and isinstance(call.func, ast.Name)]
            plain = {ast.unparse(call) for call in added}
            assert plain <= WHOLE_NUMBERS | TIMES, module


# these two read models and prompts from folders; the rest of the core reads no file
READERS = ("pipeline.models.load", "pipeline.rl.context")
CORE_MODULES = [module for module in MODULES if inside(module, CORE) and module not in READERS]
OUTSIDE = ("os", "sys", "time", "datetime", "random", "secrets", "uuid", "pathlib", "io", "shutil", "tempfile", "glob",
           "subprocess", "socket", "urllib", "threading", "logging", "pickle", "platform", "numpy.random")  # fmt: skip
TOUCHES = {
    "open", "print", "input", "read_text", "write_text", "read_bytes", "write_bytes", "from_pretrained",
    "save_pretrained", "getenv", "manual_seed", "seed", "set_rng_state", "set_num_threads", "set_default_dtype",
    "set_default_device", "perf_counter", "exec_module", "import_module", "__import__",
}  # fmt: skip
DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "rand_like", "randn_like",
         "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "dropout"}  # fmt: skip


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call with the last part of its name: torch.load(x) as load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield (function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")), node


def touches(tree: ast.AST) -> list[str]:
    """What a module of the numerical core does to the world outside: files, clock, environment, global randomness."""
    found = [name for name in sorted(imported(tree)) if inside(name, OUTSIDE)]
    for name, call in calls(tree):
        generator = any(keyword.arg == "generator" for keyword in call.keywords)
        if (name in TOUCHES and ast.unparse(call.func) != "torch.Generator().manual_seed") or (
            isinstance(call.func, ast.Attribute) and ast.unparse(call.func) in ("torch.load", "torch.save")
        ):
            found.append(f"line {call.lineno}: {name}")
        elif name in DRAWS and not generator:
            found.append(f"line {call.lineno}: {name} without a generator")
    return found


@pytest.mark.parametrize("source", ["import os", "from pathlib import Path", "open('x')", "p.read_text()",
    "torch.load(f)",
                                    "torch.manual_seed(0)", "torch.rand(3)", "from time import time", "print(1)",
                                    "import numpy.random", "x.multinomial(2)"])  # fmt: skip
def test_the_check_of_the_core_notices(source: str) -> None:
    assert touches(ast.parse(source))
    assert not touches(ast.parse("x = torch.rand(3, generator=g).softmax(-1).sum()"))


@pytest.mark.parametrize("module", CORE_MODULES)
def test_the_core_touches_nothing_outside(module: str) -> None:
    assert not touches(syntax(module))


def test_the_core_imports_itself_and_what_touches_nothing() -> None:
    harmless = ("pipeline.config.schema", "pipeline.errors", "pipeline.timing", "pipeline.distributed.dist_context",
                "pipeline.distributed.sharding", "pipeline.file_io.finite_or_none",
                "pipeline.file_io.total", "pipeline.data.prompts.Prompt", "pipeline.rewards.batch", *CORE)  # fmt: skip
    for module in CORE_MODULES:
        names = {name for name in imported(syntax(module)) if inside(name, ["pipeline"])}
        packages = {name.rpartition(".")[0] for name in names}  # `from package import name` gives both
        assert not {name for name in names - packages if not inside(name, harmless)}, module


# what may be: another Python than the project's says so in one line, where the next import would fail
WRONG_PYTHON = "sys.version_info < (3, 11) or find_spec('pydantic') is None"

# before any stage loads torch, which looks for the choice then
CHOOSES_KERNELS = ("pipeline.stages", "choose_kernels()")


@pytest.mark.parametrize("module", MODULES)
def test_importing_does_nothing(module: str) -> None:
    """At the level of the module: definitions and constants, no call for its effect; `main` only where it is run."""
    for node in syntax(module).body:
        if isinstance(node, ast.If):
            allowed = {"__name__ == '__main__'", "TYPE_CHECKING", *([WRONG_PYTHON] if module == "pipeline" else [])}
            assert ast.unparse(node.test) in allowed, f"line {node.lineno}"
        else:
            constant = not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant)
            assert constant or (module, ast.unparse(node)) == CHOOSES_KERNELS, f"line {node.lineno}"
            assert not isinstance(node, ast.For | ast.While | ast.With | ast.Try), f"line {node.lineno}"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_ends_with_its_call(stage: str) -> None:
    assert ast.unparse(syntax(stage).body[-1]) == "if __name__ == '__main__':\n    run_stage(main)"


# --- what each DVC stage watches


def related(stage: str) -> set[str]:
    """The modules that a stage's outputs depend on: those that it imports, but for packages' docstrings and
    `UNRELATED`."""
    names = local_modules(f"pipeline.stages.{stage}", UNRELATED)
    return {name for name in names if MODULES[name].name != "__init__.py"}


def unwatched(modules: Iterable[str], deps: Iterable[str]) -> list[str]:
    """The files of the modules that are no dep themselves and lie in no folder that is one."""
    deps = set(deps)
    files = [MODULES[module].relative_to(ROOT) for module in modules]
    return sorted(str(file) for file in files if not {file.as_posix(), *(p.as_posix() for p in file.parents)} & deps)


@pytest.mark.parametrize("stage", DVC)
def test_a_stage_watches_every_module_that_it_depends_on(stage: str) -> None:
    """DVC does not follow Python imports: a module left out of deps can be edited and the results stay stale."""
    assert unwatched(related(stage), DVC[stage]["deps"]) == []


@pytest.mark.parametrize("stage", DVC)
def test_no_dep_is_watched_for_nothing_and_a_removed_one_is_noticed(stage: str) -> None:
    code = [dep for dep in DVC[stage]["deps"] if dep.startswith("pipeline")]
    assert code
    for dep in code:
        missed = unwatched(related(stage), [other for other in DVC[stage]["deps"] if other != dep])
        assert missed, f"{dep}: {stage} imports nothing of it, so that an edit of it reruns the stage for nothing"
        assert all(file == dep or file.startswith(dep + "/") for file in missed)


def test_train_key_covers_what_moves_its_numbers_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment more in a module changes `train_key` and the status of the stage, or neither."""
    copy_checkout(tmp_path, "pipeline")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "pipeline")

    def digest() -> str:
        return provenance.code_digest("pipeline.stages.train")

    deps, before = DVC["train"]["deps"], digest()
    for module in reached("pipeline.stages.train") | {name for name in MODULES if name.startswith("pipeline.report.")}:
        if MODULES[module].name == "__init__.py":
            continue
        copied = tmp_path / MODULES[module].relative_to(ROOT)
        text = copied.read_text(encoding="utf-8")
        copied.write_text(text + "# another comment\n", encoding="utf-8")
        watched = not unwatched([module], deps)
        assert watched == (module in related("train")), module
        assert (digest() != before) == watched, module
        copied.write_text(text, encoding="utf-8")
    assert digest() == before


@pytest.mark.parametrize("stage", DVC)
def test_deps_exist(stage: str) -> None:
    made = {path for other in DVC.values() for path in outputs(other)}
    for dep in DVC[stage]["deps"]:
        places = {dep, *(path.as_posix() for path in Path(dep).parents)}  # a file of an output folder, too
        assert places & made or (ROOT / dep).exists(), f"{stage}: there is no {dep} and no stage makes it"


def outputs(stage: dict[str, Any]) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def test_stages_run_as_modules_and_keep_to_what_makes_reruns_right() -> None:
    for name, stage in DVC.items():
        assert stage["cmd"] == f"python -m pipeline.stages.{name}"  # a path would import the live workspace's code
        assert not stage.keys() & {"always_changed", "wdir", "frozen"}
        for entry in stage.get("outs", []):
            assert isinstance(entry, str), (
                f"{name}: {entry}: an output with settings (cache: false, persist) defeats the run cache"
            )


@pytest.mark.parametrize("module", sorted(STAGES | COMMANDS))
def test_provenance_agrees_with_the_walk(module: str) -> None:
    """`train_key` hashes what pipeline.runs.provenance finds."""
    assert set(local_modules(module)) == reached(module)


# --- what is loaded when

HEAVY = {"torch", "transformers", "datasets", "mlflow", "dvc", "pandas", "matplotlib", "sentence_transformers",
    "sklearn",
         "scipy", "playwright", "huggingface_hub"}  # fmt: skip
NEVER_AT_IMPORT = {"pipeline.stages.train": {"mlflow", "dvc", "datasets", "sentence_transformers", "pandas",
    "matplotlib"},
                   "pipeline.stages.evaluate": {"mlflow", "dvc", "datasets", "sentence_transformers", "pandas",
                   "matplotlib"},
                   "pipeline.stages.prepare": HEAVY, "pipeline.stages.cache": HEAVY, "pipeline.stages.track": HEAVY,
                   "pipeline.commands.ui": HEAVY,
                   "pipeline.stages.diagnose": HEAVY, "pipeline.stages.plot": HEAVY - {"pandas", "matplotlib"},
                   "pipeline.commands.diagnose": HEAVY,
                   "pipeline.commands.cure": HEAVY - {"pandas", "matplotlib"},
                   "pipeline.commands.compare": HEAVY - {"pandas", "matplotlib"},
                   "pipeline.__main__": HEAVY | {"shtab"}, "pipeline.commands.sweep": HEAVY,
                   "pipeline.commands.tune": HEAVY | {"optuna"},
                   "pipeline.config.load": HEAVY, "pipeline.stages.check": HEAVY}  # fmt: skip


@pytest.mark.parametrize("module", NEVER_AT_IMPORT)
def test_importing_loads_no_more_than_it_needs(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([sorted(sys.modules), {module}.__file__]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, file = json.loads(done.stdout)
    assert Path(file) == MODULES[module]
    assert not {name for name in loaded if name in NEVER_AT_IMPORT[module]}
    # the same run is outside truth for the walk: whatever was loaded, the walk has found
    assert {name for name in loaded if inside(name, ["pipeline"])} <= reached(module)


READS_MLFLOW = {"pipeline.stages.track", *(f"pipeline.commands.{name}" for name in ("compare", "diagnose", "ui"))}


def test_only_what_shows_or_reads_its_record_can_reach_mlflow() -> None:
    for stage in sorted(STAGES | COMMANDS):
        reaches = any(inside(name, ["mlflow"]) for module in reached(stage) for name in imported(syntax(module)))
        assert reaches == (stage in READS_MLFLOW), stage


# These never load torch, neither on import nor when they run: nothing that they reach imports it.
WITHOUT_TORCH = ("prepare", "diagnose", "plot", "compare", "cure", "sweep", "tune")


@pytest.mark.parametrize(
    "stage", [name for name in sorted(STAGES | COMMANDS) if name.rpartition(".")[2] in WITHOUT_TORCH]
)
def test_stages_without_a_model_never_import_torch(stage: str) -> None:
    for module in reached(stage):
        run = [node for node in syntax(module).body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
        assert not any(inside(name, ["torch", "transformers"]) for name in imported(ast.Module(run, []))), module


def test_prepare_runs_without_torch(tmp_path: Path) -> None:
    """The whole stage on the embedded default; where torch would be imported, this fails."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pocket").symlink_to(ROOT / "data/pocket")
    (tmp_path / "params.yaml").write_text(PARAMS)
    code = "import sys; sys.modules['torch'] = None; from pipeline.stages.prepare import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/prompts/train.jsonl").exists()


# --- what is never called


UNPICKLE = ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "torch.hub", "ctypes")
SERVE = ("http.server", "socketserver", "xmlrpc", "asyncio", "requests", "urllib.request", "ftplib", "smtplib")
RUN = {"run", "Popen", "call", "check_call", "check_output", "execv", "execve", "execvp", "spawnv", "posix_spawn"}
# file -> what it alone may do, and why
EXCEPTIONS = {
    # peft's, which has no such argument and runs no code: an adapter of data/policy, whose digest was checked
    "pipeline.commands.export": {"trust_remote_code=False"},
    "pipeline.rewards.custom": {"asyncio", "import_module"},  # the user's own reward, from custom/
    "pipeline.runs.checkpoints": {"torch.save"},  # read with weights_only=True
}


def forbidden(tree: ast.AST) -> list[str]:
    """Calls that run code or unpickle from data, that a shell would read, that serve or fetch over a network, or that
    leave texts of a page unescaped."""
    found = [name for name in sorted(imported(tree)) if inside(name, (*UNPICKLE, *SERVE))]
    for name, call in calls(tree):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        dotted = ast.unparse(call.func)
        if dotted in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
            "tempfile.mktemp",
            "torch.save",
        ):
            found.append(f"line {call.lineno}: {dotted}")
        if name == "eval" and call.args:  # pandas'; a model's `eval()` has none
            found.append(f"line {call.lineno}: eval of a text")
        if name in ("read_pickle", "to_pickle", "exec_module", "import_module", "from_string", "Template"):
            found.append(f"line {call.lineno}: {name}")
        if dotted in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append(f"line {call.lineno}: allow_pickle")
        if name == "from_pretrained" and keywords.get("trust_remote_code") != "False":
            found.append(f"line {call.lineno}: from_pretrained without trust_remote_code=False")
        if name == "save_pretrained" and keywords.get("safe_serialization", "True") != "True":
            found.append(f"line {call.lineno}: weights that are no safetensors")
        text = call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
        if name in RUN and dotted.startswith(("subprocess.", "os.")) and text:
            found.append(f"line {call.lineno}: {dotted} of a text")
        if name == "Environment" and keywords.get("autoescape") != "True":
            found.append(f"line {call.lineno}: templates that do not escape")
        if name == "Markup" and call.args and not isinstance(call.args[0], ast.Constant | ast.Name | ast.Call):
            found.append(f"line {call.lineno}: Markup of a text put together")
        if name == "bind" and "HOST" not in ast.unparse(call):
            found.append(f"line {call.lineno}: a socket that is not on loopback")
        if dotted == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        if keywords.get("trust_remote_code", "False") != "False":
            found.append(f"line {call.lineno}: trust_remote_code")
        if keywords.get("shell", "False") != "False":
            found.append(f"line {call.lineno}: shell")
        if name == "YAML" and (keywords.get("typ") not in ("'safe'", None) or call.args):
            found.append(f"line {call.lineno}: YAML that is not safe")
    return found


@pytest.mark.parametrize("source", [
    "eval('1')", "exec(x)", "import pickle", "from pickle import load", "torch.load(f)",
    "torch.load(f, weights_only=False)",
    "m.from_pretrained(x, trust_remote_code=True)", "m.from_pretrained(x, trust_remote_code=flag)", "import yaml",
    "os.system('ls')", "subprocess.run('ls', shell=True)", "YAML(typ='unsafe')", "__import__('os')", "import joblib",
    "np.load(f, allow_pickle=True)", "pd.read_pickle(f)", "frame.eval('a')", "subprocess.run('ls')",
    "subprocess.run(f'ls {x}')",
    "subprocess.Popen('ls ' + x)", "import requests", "from http.server import HTTPServer", "jinja2.Environment()",
    "jinja2.Environment(autoescape=False)", "jinja2.Template(x)", "Markup(f'<b>{x}</b>')", "Markup('<b>' + x)",
    "torch.save(x, f)",
    "m.from_pretrained(x)", "m.save_pretrained(x, safe_serialization=False)", "s.bind(('0.0.0.0', 1))",
    "tempfile.mktemp()",
    "import ctypes", "spec.loader.exec_module(m)", "importlib.import_module(x)",
])  # fmt: skip
def test_the_check_of_calls_notices(source: str) -> None:
    assert forbidden(ast.parse(source))
    assert not forbidden(ast.parse("torch.load(f, weights_only=True); YAML(typ='safe'); run(['ls'], shell=False)"))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_code_from_data(module: str) -> None:
    allowed = EXCEPTIONS.get(module, set())
    assert not [line for line in forbidden(syntax(module)) if line.rpartition(" ")[2] not in allowed]


def test_every_exception_is_used() -> None:
    for module, names in EXCEPTIONS.items():
        assert {line.rpartition(" ")[2] for line in forbidden(syntax(module))} == names


TEMPLATES = sorted((ROOT / "pipeline/report").glob("*.jinja"))
OURS = {"style", "script", "data"}  # what stands unescaped: our own files, and JSON that script_json has escaped


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_escape_everything(template: Path) -> None:
    """No filter, block or attribute in which a text could become markup."""
    text = template.read_text(encoding="utf-8")
    assert not re.search(r"\|\s*(safe|tojson|forceescape)|autoescape|Markup|__class__", text)
    assert not re.search(r"\s(?:on\w+|srcdoc|style)\s*=", text)
    for tag in re.findall(r"<[a-z][^<>]*\{\{[^<>]*>", text):
        assert not re.search(r"=\s*\{\{", tag), f"an attribute without quotes: {tag}"
        assert not re.search(r'(?:href|src)="\s*\{\{', tag), f"an address from a text: {tag}"
    raw = re.findall(r"<(script|style)[^>]*>(.*?)</\1>", text, re.DOTALL)
    assert all(re.fullmatch(r"\{\{ (\w+) \}\}", body) and body[3:-3] in OURS for _, body in raw), raw


def test_the_check_of_templates_sees_some() -> None:
    assert {path.name for path in TEMPLATES} >= {"page.html.jinja", "cure.html.jinja"}


# --- lists that must agree


def test_the_documented_metrics_are_the_declared_ones() -> None:
    """In order, in their units and by their definitions, which the formula may follow."""
    training, _, rest = (ROOT / "docs/METRICS.md").read_text().partition("## Time")
    rows = [re.split(r" (?<!\\)\| ", line) for line in training.splitlines() if line.startswith("| `")]
    assert [(row[0][3:-1], row[2]) for row in rows] == [(metric.name, metric.unit) for metric in METRICS.values()]
    assert [row[1].partition(": ")[0] for row in rows] == [metric.meaning for metric in METRICS.values()]
    for term in ("held-out gain", "win rate"):
        assert f"` | {WORDS[term]} | " in rest
    assert WORDS["95% interval"].removeprefix("2.5% and 97.5% ") in rest
    phases = re.findall(r'watch\.lap\("(\w+)"\)', (ROOT / "pipeline/rl/train_step.py").read_text())
    assert re.findall(r"`seconds_(\w+)`", rest) == phases


TEST_FILES = sorted((ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("file", [ROOT / "tests/conftest.py", *TEST_FILES], ids=lambda path: path.name)
def test_no_test_file_is_imported(file: Path) -> None:
    """What two of them need is a fixture, or lies in a module that is named for it."""
    assert not [name for name in imported(ast.parse(file.read_text())) if name.startswith("tests.test_")]


def test_names_of_tests_are_short() -> None:
    assert not [name for name in re.findall(r"def (test_\w+)", ALL_TESTS) if len(name) >= 70]


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "LOG.md"], ids=lambda path: path.name)
def test_documents_name_files_and_functions_that_exist(document: Path) -> None:
    """LOG.md has the names of its days."""
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:pipeline|tests|benchmarks|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\b(test_\w+)\b", re.sub(r"`pytest .*?`|```diff.*?```", "", text, flags=re.DOTALL)):
        assert (ROOT / f"tests/{name}.py").exists() or f"def {name}(" in ALL_TESTS, name
    for names, file in re.findall(r"((?:`[\w.]+`(?:,|;| and)?\s+)+)in\s+`(pipeline/[\w/]+\.py)`", text):
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", (ROOT / file).read_text(encoding="utf-8")), (
                f"{name} in {file}"
            )


ALL_TESTS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))


def nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, *nodes(value))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from nodes(value)


def test_params_can_be_changed_with_s() -> None:
    """`dvc exp run -S` reads a dot as a level, rewrites flow lists and tables, and writes an anchor's value
    everywhere."""
    git = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True)
    committed = git.stdout if git.returncode == 0 else PARAMS  # a user's own tables may be written otherwise
    tree = yaml.compose(committed)
    assert isinstance(tree, yaml.MappingNode)
    for node in nodes(tree):
        line = f"line {node.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key.value) for key, _ in node.value), line
        if isinstance(node, yaml.MappingNode | yaml.SequenceNode):
            assert not node.flow_style or not node.value, f"{line}: flow style"
    assert not any(isinstance(token, yaml.AnchorToken | yaml.AliasToken) for token in yaml.scan(committed))


def test_every_selector_of_params_and_dvc_names_a_table() -> None:
    tree = yaml.safe_load(PARAMS)
    for selector, table in SELECTORS.items():
        assert tree[selector] in tree[table]
    used = {str(param) for stage in DVC.values() for param in stage.get("params", [])}
    for selector, table in re.findall(r"(\w+)\.\$\{(\w+)\}", " ".join(used)):
        assert SELECTORS[table] == selector
    plain = {param.partition(".")[0] for param in used}
    assert plain <= set(tree)
    assert set(tree) - plain == set(), "a section of params.yaml that no stage depends on"


def test_a_stage_that_depends_on_a_selected_table_depends_on_its_selector() -> None:
    for name, stage in DVC.items():
        params = stage.get("params", [])
        for selector in re.findall(r"\$\{(\w+)\}", " ".join(params)):
            assert selector in params, name


# --- what is installed


def pins() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in requirements}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    return [Requirement(text) for text in [*project["dependencies"], *extras] if not text.startswith(project["name"])]


def test_constraints_are_exact_versions_and_no_addresses() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|@|^\s*-|\+", text, re.MULTILINE)
    for name, pin in pins().items():
        assert re.fullmatch(r"==[\w.]+", pin), name


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in declared():
        version = pinned[canonicalize_name(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version), requirement
    assert len(declared()) > 15


@pytest.mark.parametrize("name", ["dvc", "mlflow", "transformers", "datasets", "sentence-transformers"])
def test_what_our_dependencies_need_is_pinned_too(name: str) -> None:
    pinned = pins()
    for text in requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed = canonicalize_name(requirement.name)
            assert needed in pinned or needed in ("setuptools", "pip"), f"{name} needs {needed}"


COMES_WITH = {"alembic": "mlflow", "huggingface-hub": "transformers", "httpx2": "huggingface-hub",
    "markupsafe": "jinja2", "numpy": "transformers",
              "pyarrow": "datasets", "sqlalchemy": "mlflow", "typing-extensions": "pydantic"}  # fmt: skip


def test_what_the_code_imports_is_declared_or_comes_with_what_is() -> None:
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    roots = {name.partition(".")[0] for module in MODULES for name in imported(syntax(module))} - {"pipeline"}
    roots -= set(sys.stdlib_module_names)
    used = {"ruamel-yaml" if name == "ruamel" else canonicalize_name(name) for name in roots}
    assert used - names == set(COMES_WITH)
    for name, owner in COMES_WITH.items():
        assert name in {canonicalize_name(Requirement(text).name) for text in requires(owner) or []}, name
        assert owner in names or owner in COMES_WITH


def test_every_package_is_installed_and_every_data_file_with_it() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(tool["packages"]) == [name for name in MODULES if MODULES[name].name == "__init__.py"]
    patterns = [(package, pattern) for package, globs in tool["package-data"].items() for pattern in globs]
    covered = {path for package, pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    others = {path for path in (ROOT / "pipeline").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in others if path.suffix != ".py"} <= covered


# --- nothing of the machine it was made on

# A letter of each stands in brackets or is filled in, so that this file does not contain what it looks for.
PRIVATE = re.compile(
    r"(?<![\w.-])/w[o]rk/|/t[m]p/w/|/h[o]me/\w+/|/U[s]ers/\w+/|extra[-]index-url|trusted[-]host|arti[f]actory"
    r"|(?<![\d.])(?:10|192\.168)(?:\.\d+){2,3}(?=[:/])"
)


@pytest.mark.parametrize(
    "text", ["see /w{}rk/main", "/h{}me/me/x", "http://{}.0.0.1:80/simple", "pip --extra{}index-url=x"]
)
def test_the_check_of_addresses_notices(text: str) -> None:
    assert PRIVATE.search(text.format({"http": "10", "pip ": "-"}.get(text[:4], "o")))
    assert not PRIVATE.search("https://huggingface.co/a/b http://127.0.0.1:9 data/work/x version 10.2.0 a/home/b")


def test_no_tracked_file_names_a_private_place() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content[:8000]:
            found = PRIVATE.search(content.decode("utf-8", errors="replace"))
            assert not found, f"{name}: {found and found[0]}"

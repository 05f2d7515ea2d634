"""A git clone of the project in which tests run it as a user does."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from tests.fork_client import NOWHERE, SERVER
from tests.forks import forking_python
from tests.project import ROOT

SMALL = {
    "steps": 3,
    "prompts_per_step": 4,
    "samples_per_prompt": 2,
    "max_tokens": 10,
    "checkpoint_every": 1,
    "threads": 1,
}


def environment(cache: Path) -> dict[str, str]:
    """Of commands in a clone: this Python's, nobody's settings of DVC, MLflow, git or the hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_", "HF_"))}
    identity = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, **identity, "PATH": path, "HF_ENDPOINT": NOWHERE, "HF_HOME": str(cache / "hf")}


class Clone:
    """A git clone of the project as it lies in the work tree, with small sizes committed. A folder that is there is
    taken as it is."""

    def __init__(self, root: Path, cache: Path, **train: int) -> None:
        self.root, self.environment, there = root, environment(cache), root.exists()
        if not there:
            self.make(train)
        # as `dvc cache dir --local` writes it, which takes seconds
        (root / ".dvc/config.local").write_text(f"[cache]\n    dir = {cache / 'dvc'}\n")
        if not there:
            self.commit()

    def make(self, train: dict[str, int]) -> None:
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        for name in filter(None, files):
            if (ROOT / name).is_file() and name != "dvc.lock":
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)
        self.edit(train={**SMALL, **train}, evaluate={"prompts": 6, "samples_per_prompt": 2, "bootstrap": 100})
        self("git", "init", "-q")

    def edit(self, **tables: dict[str, object]) -> None:
        yaml = YAML()
        tree = yaml.load(self.root / "params.yaml")
        for name, values in tables.items():
            tree[name].update(values)
        yaml.dump(tree, self.root / "params.yaml")

    def keep_rewards(self, *names: str) -> None:
        """Drops the other rewards and trains on the first of these: without an encoder a run takes half as long."""
        yaml = YAML()
        tree = yaml.load(self.root / "params.yaml")
        tree["reward"], tree["rewards"] = names[0], {name: tree["rewards"][name] for name in names}
        yaml.dump(tree, self.root / "params.yaml")

    def commit(self) -> None:
        self("git", "add", "-A")
        self("git", "commit", "-q", "--allow-empty", "-m", "as it is")

    def restore(self) -> None:
        """Back to the commit, outputs included."""
        self("git", "checkout", "-q", "--force", ".")
        self("dvc", "checkout", "-q")

    def __call__(self, *command: str, fails: bool = False) -> str:
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=900
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def ran(self, output: str) -> list[str]:
        """Stages that were executed, not skipped or taken from the cache."""
        return re.findall(r"Running stage '(\w+)'", output)

    def runs(self) -> list[str]:
        """train_keys of the runs in MLflow's store, read without mlflow."""
        with sqlite3.connect(self.root / "mlflow.db") as store:
            return [value for (value,) in store.execute("select value from tags where key = 'train_key'")]

    def read(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those that work in a folder, `dvc queue`'s workers among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def end(clone: Clone) -> None:
    """No process of a test outlives it, whatever became of the test."""
    for process in processes_in(clone.root):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes_in(clone.root), timeout=10)
    assert not processes_in(clone.root)


def tiny(base: Path, prepared: Path) -> Clone:
    """A copy of what the fixture `prepared` or `finished` has made, with a cache of its own beside it."""
    shutil.copytree(prepared, base, dirs_exist_ok=True)
    return quickly(Clone(base / "project", base / "cache"))


def quickly(clone: Clone) -> Clone:
    """Its `python`, which DVC runs, imports nothing anew."""
    quick = forking_python(clone.root.parent / "bin")
    clone.environment |= {"PATH": f"{quick}{os.pathsep}{clone.environment['PATH']}", SERVER: os.environ[SERVER]}
    return clone


def prepare_tiny(base: Path) -> None:
    """One reward, which needs no encoder; prompts and checkpoint made; no database."""
    made = quickly(Clone(base / "project", base / "cache"))
    made.keep_rewards("length")
    made("dvc", "repro", "check", "prepare", "cache")
    made.commit()
    assert not (made.root / "mlflow.db").exists()


def finish_tiny(base: Path, prepared: Path) -> None:
    """A run of the recipe that collapses, not committed."""
    tiny(base, prepared)("dvc", "exp", "run", "-S", "recipe=notebook")

"""A project so small that every stage runs in seconds, and a record of what its processes did."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.project import ROOT, Project, copy_of_project

STAGES = ("prepare", "cache", "train", "evaluate", "diagnose", "plot", "track")
OUTPUTS = (
    "data/prompts", "data/checkpoint", "data/classifiers", "data/independent_classifiers", "data/policy",
    "data/healthy", "data/best", "reports",
)  # fmt: skip
SIZES = {
    "steps": 3, "prompts_per_step": 3, "samples_per_prompt": 2, "max_tokens": 6, "checkpoint_every": 1, "threads": 1,
}  # fmt: skip
# a sitecustomize.py: Python runs it first in every process, and each thread and library is seen
HOOK = """
import json, os, sys

def note(event, arguments):
    if event in WATCHED or event == "open" and str(arguments[0]).endswith((".pkl", ".pickle", ".bin")):
        with open(os.path.join(os.environ["AUDIT"], f"{os.getpid()}.audit"), "a") as target:
            target.write(json.dumps([event, [ascii(a) for a in arguments]]) + chr(10))

WATCHED = {"socket.bind", "socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn",
           "subprocess.Popen", "pickle.find_class", "urllib.Request", "ftplib.connect", "smtplib.connect",
           "ctypes.dlopen"}
if sys.argv[0] != "-c":
    sys.addaudithook(note)
"""


def make(base: Path, policy: Path, encoder: Path) -> Project:
    """From the pocket messages, with this policy and this encoder."""
    made = copy_of_project(base)
    shutil.copytree(policy, made.root / "models/local/policy")
    shutil.copytree(encoder, made.root / "models/local/encoder")
    made.edit(
        model="mine", models__mine={"source": "models/local/policy"}, encoder="mine",
        encoders__mine={"source": "models/local/encoder"}, evaluate__prompts=4, evaluate__samples_per_prompt=2,
        evaluate__bootstrap=100, evaluate__every=2, evaluate__curve_prompts=4, reward="length",
        **{f"train__{key}": value for key, value in SIZES.items()},
    )  # fmt: skip
    made.keep_rewards("length", "words")
    return made


def run(project: Project, **environment: str) -> dict[str, bytes]:
    """Every stage in turn; the contents of what they wrote."""
    for stage in STAGES:
        done = project.run(stage, **environment)
        assert done.returncode == 0, (stage, done.stderr[-2000:])
    return contents(project.root)


def run_audited(project: Project, base: Path) -> tuple[dict[str, bytes], dict[str, list[tuple[str, list[str]]]]]:
    """The same, in one process that imports torch once, with each stage's audit events."""
    (base / "hook").mkdir()
    (base / "hook/sitecustomize.py").write_text(HOOK)
    for stage in STAGES:
        (base / stage).mkdir()
    path = os.pathsep.join([str(base / "hook"), project.environment.get("PYTHONPATH", ""), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.small", str(base)], cwd=project.root, text=True, capture_output=True,
        env={**project.environment, "PYTHONPATH": path, "AUDIT": str(base)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    events = {}
    for stage in STAGES:
        lines = [line for file in (base / stage).glob("*.audit") for line in file.read_text().splitlines()]
        events[stage] = [(event, arguments) for event, arguments in map(json.loads, lines)]
    return contents(project.root), events


def contents(root: Path) -> dict[str, bytes]:
    files = [path for folder in OUTPUTS for path in sorted((root / folder).rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


if __name__ == "__main__":
    for name in STAGES:
        os.environ["AUDIT"] = str(Path(sys.argv[1]) / name)
        importlib.import_module(f"pipeline.stages.{name}").main()

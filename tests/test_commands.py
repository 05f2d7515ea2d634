"""`reinforce`: its arguments, help and completion, how it finds the project, and what each command calls."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from pipeline import __main__ as cli
from tests.project import ROOT

MODULES = {
    **{path.stem: f"pipeline.commands.{path.stem}" for path in (ROOT / "pipeline/commands").glob("[a-z]*.py")},
    "diagnose": "pipeline.stages.diagnose",
    "track": "pipeline.stages.track",
}
ARGUMENTS = {
    "export": ["x"],
    "generate": ["Hi"],
    "sweep": ["-S", "seed=1"],
}  # of the commands that do not run without any


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (each for each in cli.build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(commands.choices)


def one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line with which a refused command ends, with exit code 1."""
    monkeypatch.setattr(sys, "argv", ["reinforce", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- arguments and help


def test_a_reader_that_has_enough_ends_a_command_without_a_traceback() -> None:
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "completion", "bash"], cwd=ROOT, stdout=written, stderr=subprocess.PIPE
    )
    os.close(written)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_console_script_and_the_commands_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"reinforce": "pipeline.__main__:main"}
    assert parsers().keys() == MODULES.keys() | {"completion"}


@pytest.mark.parametrize("name", [*MODULES, "completion"])
def test_help_describes_a_command_with_examples_that_parse(name: str) -> None:
    parser = parsers()[name]
    assert parser.description
    said = parser.format_help()
    examples = [line.strip() for line in said.partition("examples:\n")[2].splitlines()]
    assert examples
    for example in examples:
        command = example.removeprefix('eval "$(').removesuffix(')"')
        program, *arguments = shlex.split(command)
        assert (program, arguments[0]) == ("reinforce", name)
        cli.build_parser().parse_args(arguments)


def test_without_a_command_it_prints_the_help(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {name}" in done.stdout for name in parsers())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compar"], "error: argument COMMAND: invalid choice: 'compar'"),
        (["cure", "--seed"], "error: unrecognized arguments: --seed; see `reinforce --help`"),
        (["generate"], "error: the following arguments are required: PROMPT; see `reinforce generate --help`"),
        (["generate", "Hi", "--max-tokens", "x"], "error: argument --max-tokens: invalid int value: 'x'"),
        (["sweep", "--jobs", "0", "-S", "seed=1"], "error: --jobs 0: should be 1 or more"),
        (["ui", "one"], "error: 'one': should be one port number"),
        (["completion", "csh"], "error: argument shell: invalid choice: 'csh'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert one_line(monkeypatch, capsys, *arguments).startswith(expected)


# --- the project


@pytest.mark.parametrize("folder", [".", "docs", "data/pocket/prompts"])
def test_it_runs_in_the_root_of_the_project_around_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / folder)
    cli.enter_project()
    assert Path.cwd() == ROOT


@pytest.mark.parametrize("name", MODULES)
def test_outside_a_project_it_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dvc.yaml").touch()  # of another project
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    line = one_line(monkeypatch, capsys, name, *ARGUMENTS.get(name, []))
    assert line.startswith(f"error: no project in {tmp_path}/below or above it: cd to the folder that holds")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "dvc.yaml"]


def test_another_checkout_runs_its_own_code(tmp_path: Path) -> None:
    """One environment may serve several checkouts; their code differs."""
    (tmp_path / "pipeline").mkdir()
    for name in cli.ROOT_FILES:
        (tmp_path / name).touch()
    (tmp_path / "pipeline/__main__.py").write_text("import os, sys; print('the other', os.getcwd(), sys.argv[1:])")
    (tmp_path / "docs").mkdir()
    program = "import sys; from pipeline.__main__ import main; main()"  # as the console script
    command = [sys.executable, "-c", program, "generate", "Hi there"]

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
        return subprocess.run(
            command, cwd=tmp_path / "docs", env=environment, capture_output=True, text=True, timeout=300
        )

    assert run().stdout == f"the other {tmp_path} ['generate', 'Hi there']\n"
    refused = run(PYTHONSAFEPATH="1")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "`unset PYTHONSAFEPATH`" in refused.stderr


# --- what it calls


@pytest.mark.parametrize("name", MODULES)
def test_a_command_calls_its_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[argparse.Namespace, ...]] = []
    monkeypatch.setattr(import_module(MODULES[name]), "main", lambda *options: called.append(options))
    monkeypatch.setattr(sys, "argv", ["reinforce", name, *ARGUMENTS.get(name, [])])
    monkeypatch.chdir(ROOT)
    cli.main()
    (options,) = called
    assert options in ((), (cli.build_parser().parse_args(sys.argv[1:]),))


# --- completion


def completion(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["reinforce", "completion", shell])
    cli.main()
    return capsys.readouterr().out


def test_bash_completes_commands_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # it needs no project
    script = completion("bash", monkeypatch, capsys)
    bash = shutil.which("bash") or pytest.skip("no bash")
    for words, expected in (
        (["reinforce", "co"], {"compare", "completion"}),
        (
            ["reinforce", "compare", "--"],
            {"--from", "--where", "--against", "--metric", "--all-commits", "--out", "--help"},
        ),
    ):
        ask = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _shtab_reinforce; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run([bash, "--norc"], input=f"{script}\n{ask}\n", capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected


def test_zsh_knows_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = completion("zsh", monkeypatch, capsys)
    assert script.startswith("#compdef reinforce")
    assert all(f"    {name}:'" in script for name in parsers())
    if zsh := shutil.which("zsh"):
        subprocess.run([zsh, "-n"], input=script, text=True, check=True)

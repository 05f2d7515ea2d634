"""`reinforce`, the command for people: it parses the arguments, goes to the project's root and calls a command or a
stage.

Nothing else is imported before the arguments are known, so that `reinforce --help` answers at once.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.errors import UserError, run_stage

ROOT_FILES = ("params.yaml", "dvc.yaml", "pipeline/__init__.py", "pipeline/__main__.py")  # what a project's root holds
OF_A_LOG = ("completions", "calibration", "first", "json")  # options of `diagnose` that need a log


def main() -> None:
    """The console script: a user's mistake ends in one line and exit code 1."""
    run_stage(run, arguments=True)


def run() -> None:
    """Raises UserError for invalid arguments and outside a project. Errors of the command itself pass."""
    parser = build_parser()
    options = parser.parse_args()
    if options.command is None:
        parser.print_help()
    elif options.command == "completion":
        import shtab

        print(shtab.complete(parser, options.shell))
    elif options.command == "diagnose" and options.log is not None:
        diagnose_log(options)
    else:
        if options.command == "diagnose" and (given := [f"--{name}" for name in OF_A_LOG if getattr(options, name)]):
            raise UserError(f"{given[0]} goes with a LOG; see `reinforce diagnose --help`")
        enter_project()
        run_command(options)


def run_command(options: argparse.Namespace) -> None:
    """Import and call the chosen command. A command that computes with models chooses its kernels first. A command that
    starts DVC must not, since its experiments may choose other kernels."""
    if options.command in ("export", "generate"):
        from pipeline.arithmetic.environment import choose_kernels

        choose_kernels()
    match options.command:
        case "compare":
            from pipeline.commands import compare

            compare.main(options)
        case "cure":
            from pipeline.commands import cure

            cure.main()
        case "diagnose":
            from pipeline.stages import diagnose

            diagnose.main()
        case "export":
            from pipeline.commands import export

            export.main(options)
        case "generate":
            from pipeline.commands import generate

            generate.main(options)
        case "sweep":
            from pipeline.commands import sweep

            sweep.main(options)
        case "track":
            from pipeline.stages import track

            track.main()
        case "tune":
            from pipeline.commands import tune

            tune.main(options)
        case "verify":
            from pipeline.commands import verify

            verify.main()
        case "ui":
            from pipeline.commands import ui

            ui.main(options)


def diagnose_log(options: argparse.Namespace) -> None:
    """Diagnose anybody's log; no project is needed. MLflow's store is that of the project around the current folder."""
    from pipeline.commands import diagnose

    if options.log.startswith(diagnose.MLFLOW):
        for name in ("completions", "calibration"):
            path = getattr(options, name)
            setattr(options, name, path and path.absolute())
        with contextlib.suppress(UserError):
            os.chdir(find_root(Path.cwd()))
    diagnose.main(options)


# --- the project


def find_root(folder: Path) -> Path:
    """Return the nearest project's root, this folder or one above it. Raises UserError where there is none."""
    for candidate in (folder, *folder.parents):
        if all((candidate / name).is_file() for name in ROOT_FILES):
            return candidate
    raise UserError(f"no project in {folder} or above it: cd to the folder that holds params.yaml and dvc.yaml")


def enter_project() -> None:
    """Change to the project's root. If `reinforce` was installed from another checkout, restart with this project's
    code."""
    root = find_root(Path.cwd())
    os.chdir(root)
    if not (root / "pipeline").samefile(Path(__file__).parent):
        os.execv(sys.executable, [sys.executable, "-m", "pipeline", *sys.argv[1:]])


# --- the arguments


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError: one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def build_parser() -> Parser:
    """Return the parser of every command and its options."""
    parser = Parser(
        prog="reinforce",
        description="Compare, diagnose, cure and tune REINFORCE runs. Training is `dvc repro` and `dvc exp run`.",
        epilog="`reinforce COMMAND --help` has the options and examples. Commands work in every folder of the project.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(name: str, summary: str, details: str, *examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}",
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    compare = add(
        "compare",
        "compare runs by configuration, mean ± std over seeds",
        "Prints a table, and by how much held-out gains differ, with intervals. Writes both, the learning curves and\n"
        "their figure to reports/compare/.",
        "reinforce compare",
        "reinforce compare --from dvc",
        "reinforce compare --where recipe=stable --metric entropy",
        "reinforce compare --against recipe=stable",
    )
    compare.add_argument("experiments", nargs="*", help="names of experiments; without any, all of them")
    compare.add_argument(
        "--from",
        dest="source",
        choices=["mlflow", "dvc"],
        default="mlflow",
        help="where to read: MLflow's finished runs (the default), or DVC's experiments of this commit",
    )
    compare.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE[,VALUE...]",
        help="only runs with this parameter, such as recipe=stable or recipe.lr=3e-5",
    )
    compare.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the configuration that each other's held-out gain is compared with, such as recipe=stable; not needed "
        "where there are two",
    )
    compare.add_argument("--metric", default="reward_mean", help="column of history.csv to draw (reward_mean)")
    compare.add_argument("--all-commits", action="store_true", help="DVC's experiments of every commit")
    compare.add_argument(
        "--out", type=Path, default=Path("reports/compare"), help="folder to write, from the project's root"
    )

    add(
        "cure",
        "after a collapse, try the change that the diagnosis recommends",
        "Runs it as an experiment in a folder of its own. Writes both runs side by side to reports/cure.html.",
        "reinforce cure",
    )
    diagnose = add(
        "diagnose",
        "print the run's verdict again, or that of a log of any trainer",
        "Without LOG, reads what training left in reports/train/ and writes reports/diagnosis.json. With LOG, prints\n"
        "whether, how and from which step that run collapsed, and which checks the log does not allow; writes nothing.",
        "reinforce diagnose",
        "reinforce diagnose output/trainer_state.json --completions output/completions",
        "reinforce diagnose mlflow:0f3a9c",
    )
    diagnose.add_argument(
        "log",
        nargs="?",
        metavar="LOG",
        help="trl's trainer_state.json, a CSV or JSONL file of metrics, or mlflow:RUN_ID",
    )
    diagnose.add_argument(
        "--completions",
        type=Path,
        metavar="FILE",
        help="of LOG's steps: JSONL, CSV or Parquet, or trl's folder of them",
    )
    diagnose.add_argument(
        "--calibration", type=Path, metavar="FILE", help="a calibration.csv, batches without learning, to compare with"
    )
    diagnose.add_argument(
        "--first", type=int, metavar="ROWS", help="without one, rows at the log's start to compare with (3 to 8)"
    )
    diagnose.add_argument("--json", action="store_true", help="print everything as JSON")
    export = add(
        "export",
        "write the trained policy as a model that needs nothing of this project",
        "Adapters are merged into the weights. README.md in it says of which run it is, with the verdict and digests.",
        "reinforce export ../my-policy",
    )
    export.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty, from the project's root")

    generate = add(
        "generate",
        "continue prompts with the reference model and with the trained policy",
        "Each token is the most likely one. A chat model is spoken to as params.yaml says.",
        'reinforce generate "Hi there, how"',
        'reinforce generate --max-tokens 60 "Tell me" "What is"',
    )
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    count = "of prompt and continuation together (30), without a chat template's own"
    generate.add_argument("--max-tokens", type=int, default=30, help=count)

    sweep = add(
        "sweep",
        "run an experiment for each combination of values, then compare them",
        "Uses DVC's queue. Interrupted or failed, the same command goes on: what has finished is not run again.",
        "reinforce sweep -S recipe=notebook,stable -S 'seed=range(0,3)'",
        "reinforce sweep --jobs 2 -S train.threads=1 -S recipes.stable.lr=3e-5,1e-4",
    )
    sweep.add_argument(
        "-S",
        dest="overrides",
        action="append",
        required=True,
        metavar="KEY=VALUES",
        help="as of `dvc exp run`; several values, a,b or range(0,3), are swept",
    )
    sweep.add_argument("--jobs", type=int, default=1, help="experiments at a time (1)")

    add(
        "track",
        "write the run's record to MLflow again",
        "For a database that was lost or a server that was away. A complete record stays as it is.",
        "reinforce track",
    )
    tune = add(
        "tune",
        "search a learning rate and a KL strength for a model, prompts and a reward",
        "Successive halving on DVC's queue: short runs first, the better of them longer. A run that collapses is\n"
        "pruned, the held-out gain judges the others. Prints what was tried, and the best recipe as a table for\n"
        "params.yaml. Interrupted or failed, the same command goes on: what has finished is not run again.",
        "reinforce tune -S reward=length",
        "reinforce tune --jobs 2 -S train.threads=1 -S model=pythia-70m -S prompts=oasst1",
        "reinforce tune --trials 16 -S recipe=stable -S recipes.stable.lr=3e-5 -S train.steps=100",
    )
    tune.add_argument(
        "-S",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as of `dvc exp run`; values of the searched keys are the middle of their ranges",
    )
    tune.add_argument("--trials", type=int, default=8, help="values to try, the recipe's own among them (8)")
    tune.add_argument("--seed", type=int, default=0, help="of the search; that of the runs is params.yaml's (0)")
    tune.add_argument("--jobs", type=int, default=1, help="experiments at a time (1)")
    tune.add_argument("--eta", type=int, default=2, help="one in so many goes on, with so many times the steps (2)")
    add(
        "verify",
        "run the committed code again and compare every byte with the committed results",
        "Takes a run's time. Works in a temporary folder; the workspace stays as it is.",
        "reinforce verify",
    )
    ui = add(
        "ui",
        "show the runs in the browser, by MLflow on 127.0.0.1",
        "Runs until Ctrl-C.",
        "reinforce ui",
        "reinforce ui 5001",
    )
    ui.add_argument("port", nargs="?", default="5000", metavar="PORT", help="1 to 65535 (5000)")

    completion = add(
        "completion",
        "print the shell's completion script",
        "Load it in the shell's profile, with the project's environment active.",
        'eval "$(reinforce completion bash)"',
        'eval "$(reinforce completion zsh)"',
    )
    completion.add_argument("shell", choices=["bash", "zsh"])
    return parser


if __name__ == "__main__":
    main()

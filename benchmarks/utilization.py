"""How much of the machine's rate of matrix multiplication a step reaches, on the CPU as it is and limited to AVX2.

python -m benchmarks.utilization run       # -> docs/utilization.json, 20 minutes a round; goes on where it was
python -m benchmarks.utilization tables    # docs/utilization.json -> the table of docs/SPEED.md, on the terminal

The loops of `benchmarks.speed_arms`, length reward, each in a process of its own, arms in turn. AVX2 alone: torch and
oneDNN are limited to such instructions, and MKL on Intel's CPUs; on AMD's it multiplies float32 with AVX2 anyway. Needs
trl (pip install -e '.[benchmarks]'); without it that arm is left out.
"""

import argparse
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import material, speed
from benchmarks.arithmetic import AVX2
from pipeline.arithmetic.environment import cpu_type

RESULTS = Path("docs/utilization.json")
PROMPTS = {"pythia-70m": 128, "pythia-160m": 64}  # a step of ours; the slow loops take as long for each prompt of few
ENVIRONMENTS = {"as it is": {}, "AVX2 alone": AVX2}
PRECISIONS = {"as it is": ("float32", "bfloat16"), "AVX2 alone": ("float32",)}
KEPT = ("flops_per_second", "samples", "seconds", "phases", "flops", "peak_mib")  # of what an arm measures
Case = tuple[str, str, str]  # instructions, shape, arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "run":
        run(options.rounds, options.results)
    print("\n".join(table(material.read_rows(options.results))))


def plan() -> dict[Case, speed.Arm]:
    """Every arm of a round, in the order in which they run."""
    arms: dict[Case, speed.Arm] = {}
    for instructions, precisions in PRECISIONS.items():
        for precision in precisions:
            arms[instructions, "", f"matmul {precision}"] = ("matmul", "--precision", precision)
        for shape, prompts in PROMPTS.items():
            few = ("--prompts", str(speed.FEW), "--shape", shape)
            many = ("ours", "--prompts", str(prompts), "--shape", shape, "--count-flops")
            arms[instructions, shape, "notebook"] = ("notebook", *few)
            arms |= {
                (instructions, shape, f"ours {precision}"): (*many, "--precision", precision)
                for precision in precisions
            }
            if find_spec("trl"):
                arms[instructions, shape, "trl float32"] = ("trl", *few)
    return arms


def run(rounds: int, results: Path) -> None:
    rows, cpu = material.read_rows(results), cpu_type()
    for row in rows:
        if row["cpu"] != cpu:
            raise SystemExit(f"{results} was begun on another CPU ({row['cpu']}; here: {cpu}): remove it first")
    done = {(*row["case"], row["round"]) for row in rows}
    for count in range(rounds):
        for case, arm in plan().items():
            if (*case, count) in done:
                continue
            measured = speed.measure(arm, ENVIRONMENTS[case[0]])
            kept = {key: measured[key] for key in KEPT if key in measured}
            rows.append({"cpu": cpu, "case": case, "round": count} | kept)
            print(json.dumps(rows[-1])[:200], file=sys.stderr, flush=True)
            material.write_rows(results, rows)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row a loop of ours; arms that were not measured are left out."""
    arms: dict[Case, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(tuple(row["case"]), []).append(row)
    lines = [
        f"Measured on {rows[0]['cpu']}.", "",
        "| instructions | policy | precision | matrix rate, GFLOP/s | share of it | samples/s | over the notebook's "
        "loop | over trl float32 | sampling | reference | update | rest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (instructions, shape, arm), runs in arms.items():
        if not arm.startswith("ours"):
            continue
        precision = arm.removeprefix("ours ")
        matmul = statistics.median(row["flops_per_second"] for row in arms[instructions, "", f"matmul {precision}"])
        beside = [arms.get((instructions, shape, other)) for other in ("notebook", "trl float32")]
        ratios = [f"{speed.rate(runs) / speed.rate(other):.1f}" if other else "" for other in beside]
        lines.append(
            f"| {instructions} | {shape} | {precision} | {matmul / 1e9:.0f} | {speed.flop_rate(runs) / matmul:.1%} | "
            f"{speed.rate(runs):.1f} | {' | '.join(ratios)} | {' | '.join(shares(runs))} |"
        )
    return lines


def shares(runs: list[dict[str, Any]]) -> list[str]:
    """Of a step's seconds: sampling, the reference, the update, everything else."""
    whole = statistics.median(seconds for row in runs for seconds in row["seconds"])
    phases = [
        statistics.median(seconds for row in runs for seconds in row["phases"][f"seconds_{phase}"]) / whole
        for phase in ("sample", "reference", "update")
    ]
    return [f"{share:.0%}" for share in [*phases, 1 - sum(phases)]]


if __name__ == "__main__":
    main()

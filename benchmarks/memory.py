"""Memory that training takes, by size and setting: real steps, steps on a device that is not there, and a formula.

    python -m benchmarks.memory run               # what fits in 20 GB -> docs/scale.json; ten minutes on two cores
    python -m benchmarks.memory simulate          # counts on fake tensors -> docs/scale_simulated.jsonl; half an hour
    python -m benchmarks.memory tables            # both files and the formula -> the tables of docs/SCALE.md

On a CPU the peak is the process's resident memory in the steps over that before the models were loaded; on a GPU what
torch held. A step of two micro-batches: in the second all gradients are there while the activations are.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks import material
from benchmarks.memory_formula import DEFAULT_STEP, RANK, Step, predicted
from benchmarks.real_steps import ROOT, measure
from benchmarks.simulated_memory import simulate as simulated_peaks
from pipeline.config.load import PARAMS_FILE, load_params
from pipeline.report.table import markdown_table
from pipeline.rl.seeding import draw_prompts

RESULTS, SIMULATED = ROOT / "docs/scale.json", ROOT / "docs/scale_simulated.jsonl"
PROMPTS, SAMPLES, TOKENS, MICRO_BATCH, GB = 16, 8, 20, 64, 1e9
LIBRARIES = 0.2e9  # on a CPU, what is loaded after the start, whatever the size: from pythia-14m
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {},  # as are those below
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora_rank": RANK},
    "lora-checkpointing": {"lora_rank": RANK, "gradient_checkpointing": True},
    "sgd": {"optimizer": "sgd"},
    "sharded": {},  # over two processes, each of which is measured
}
ONE_DEVICE = [setting for setting in SETTINGS if setting != "sharded"]
BATCH = {
    "samples_per_prompt": SAMPLES, "max_tokens": TOKENS, "micro_batch": MICRO_BATCH, "threads": 2,
    "precision": "bfloat16",
}  # fmt: skip
MEASURED = [
    *((shape, setting) for shape in ("pythia-70m", "pythia-160m") for setting in SETTINGS if setting != "sgd"),
    ("pythia-410m", "bfloat16"), ("pythia-410m", "checkpointing"), ("pythia-410m", "lora"),
    ("pythia-1b", "lora-checkpointing"),
]  # fmt: skip
LONG = Step((8,) * 64, 8, 64, 8)  # 512 completions of 64 tokens at once, and few of them in the update
LONG_ROWS = [("pythia-70m", "bfloat16"), ("pythia-70m", "lora-checkpointing")]
SIMULATED_SHAPES = ("pythia-14m", "pythia-70m", "pythia-410m", "pythia-1b", "pythia-2_8b")


@dataclass(frozen=True)
class Row:
    """One simulation."""

    shape: str
    setting: str
    device: str  # cpu | gpu: whose attention and slices
    step: Step
    bytes: dict[str, int] = field(default_factory=dict)  # by phase


def simulated_rows() -> list[Row]:
    """What is simulated: a GPU, and each row measured on one CPU with the prompts that it drew."""
    drawn = Step(drawn_prompts(), SAMPLES, TOKENS, MICRO_BATCH)
    on_gpu = [Row(shape, setting, "gpu", DEFAULT_STEP) for shape in SIMULATED_SHAPES for setting in ONE_DEVICE]
    on_cpu = [Row(shape, setting, "cpu", drawn) for shape, setting in MEASURED if setting in ONE_DEVICE]
    on_gpu.append(Row("pythia-12b", "bfloat16", "gpu", DEFAULT_STEP))  # its peak is the end of the backward pass
    return on_gpu + [Row(shape, setting, "gpu", LONG) for shape, setting in LONG_ROWS] + on_cpu


def drawn_prompts() -> tuple[int, ...]:
    """Tokens of the prompts of the second step that `run` measures, the one in which Adam has its state."""
    texts, tokenizer = material.prompts()[0][:500], material.tokenizer()[0]
    params = load_params(ROOT / PARAMS_FILE.name)
    drawn = draw_prompts(params.seed, 1, PROMPTS, len(texts), params.selected_recipe.prompt_sampling)
    return tuple(len(tokenizer(texts[i])["input_ids"]) for i in drawn)


def simulate() -> None:
    rows = read_rows()
    for row in simulated_rows():
        if any(replace(row, bytes=found.bytes) == found for found in rows):
            continue
        found = simulated_peaks(row.shape, changes(row.setting), row.step, row.device == "gpu")
        rows.append(replace(row, bytes=found))
        print(row.shape, row.setting, row.device, found, flush=True)
        SIMULATED.write_text("".join(json.dumps(asdict(each)) + "\n" for each in rows), encoding="utf-8")


def read_rows() -> list[Row]:
    lines = SIMULATED.read_text(encoding="utf-8").splitlines() if SIMULATED.exists() else []
    found = []
    for row in map(json.loads, lines):
        sampled = Step(**row["step"] | {"prompts": tuple(row["step"]["prompts"])})
        found.append(Row(**row | {"step": sampled}))
    return found


def changes(setting: str) -> dict[str, Any]:
    """Of the recipe and of `train`; bfloat16 unless the setting says otherwise."""
    return {"precision": BATCH["precision"]} | SETTINGS[setting]


def run(device: str) -> None:
    rows = material.read_rows(RESULTS)
    for shape, setting in MEASURED:
        if any((row["shape"], row["setting"], row["device"]) == (shape, setting, device) for row in rows):
            continue
        sharded = setting == "sharded"
        if sharded and device == "cuda" and torch.cuda.device_count() < 2:
            print(f"{shape} {setting}: left out, there is one GPU", flush=True)
            continue
        processes = 2 if sharded else 1  # each has two micro-batches
        settings = BATCH | SETTINGS[setting] | {"device": device, "prompts_per_step": processes * PROMPTS}
        each = measure(shape, settings, processes, sharded, for_memory=True)
        rows.append({"shape": shape, "setting": setting, "device": device, "bytes": max(one["bytes"] for one in each)})
        print(json.dumps(rows[-1]), flush=True)
        material.write_rows(RESULTS, rows)


def tables() -> str:
    return "\n".join([markdown_table(table) for table in (measured_table(), simulated_table(), long_table())])


def measured_table() -> list[list[str]]:
    """Real steps on a CPU beside the simulation and the formula, which know nothing of libraries."""
    found = {(row.shape, row.setting): row for row in read_rows() if row.device == "cpu"}
    drawn = next(iter(found.values())).step
    cells = [["policy", "setting", "on", "measured, GB", "simulated", "over measured", "formula", "over measured"]]
    for row in material.read_rows(RESULTS):
        shape, setting, more = row["shape"], row["setting"], LIBRARIES if row["device"] == "cpu" else 0
        formula = predicted(shape, changes(setting), drawn, 2 if setting == "sharded" else 1, row["device"] != "cpu")
        each = [formula["all"] + more]
        if (shape, setting) in found and row["device"] == "cpu":
            each.insert(0, found[shape, setting].bytes["all"] + more)
        beside = [cell for value in each for cell in (f"{value / GB:.2f}", f"{value / row['bytes']:.2f}")]
        cells.append([shape, setting, row["device"], f"{row['bytes'] / GB:.2f}", *["", ""] * (2 - len(each)), *beside])
    return cells


def simulated_table() -> list[list[str]]:
    """The formula for a GPU by shape and setting; in brackets what of the simulation it is."""
    found = {(row.shape, row.setting): row for row in read_rows() if row.device == "gpu" and row.step == DEFAULT_STEP}
    cells = [["policy", *ONE_DEVICE, "sharded over 2", "over 8"]]
    for shape in material.SHAPES:
        line = [shape]
        for setting in ONE_DEVICE:
            formula = predicted(shape, changes(setting))["all"]
            row = found.get((shape, setting))
            line.append(f"{formula / GB:.1f}" + (f" ({formula / row.bytes['all']:.2f})" if row else ""))
        more = [predicted(shape, changes("sharded"), processes=count)["all"] for count in (2, 8)]
        cells.append(line + [f"{value / GB:.1f}" for value in more])
    return cells


def long_table() -> list[list[str]]:
    """The phases of a step of long completions, simulated, and what of it the formula is."""
    cells = [["policy", "setting", "held, GB", "while sampling", "formula", "in the update", "formula"]]
    for row in read_rows():
        if row.step == LONG:
            formula = predicted(row.shape, changes(row.setting), LONG)
            beside = [
                cell
                for phase in ("sampling", "update")
                for cell in (f"{row.bytes[phase] / GB:.2f}", f"{formula[phase] / row.bytes[phase]:.2f}")
            ]
            cells.append([row.shape, row.setting, f"{row.bytes['held'] / GB:.2f}", *beside])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    commands.add_parser("simulate")
    commands.add_parser("tables")
    options = parser.parse_args()
    if options.command == "run":
        run(options.device)
    elif options.command == "simulate":
        simulate()
    else:
        print(tables())


if __name__ == "__main__":
    main()

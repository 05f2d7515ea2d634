"""Memory that training takes, by size and setting: a formula, and the peak of real steps beside it -> docs/scale.json.

    python -m benchmarks.memory run               # measures what fits in 20 GB, ten minutes on two cores
    python -m benchmarks.memory tables            # docs/scale.json and the formula -> the tables of docs/SCALE.md
    python -m benchmarks.memory arm pythia-70m lora     # one measurement by itself, prints one line of JSON

On a CPU the peak is the process's resident memory over that before the models were loaded; on a GPU what torch held.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from benchmarks import material

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/scale.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora_rank": 16},
    "lora-checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
    "sharded": {},  # over two processes, each of which is measured
}
PROMPTS, SAMPLES, TOKENS, MICRO_BATCH, RANK = 8, 8, 20, 64, 16
MEASURED = [
    *(("pythia-70m", setting) for setting in SETTINGS), *(("pythia-160m", setting) for setting in SETTINGS),
    *(("pythia-410m", setting) for setting in SETTINGS if setting != "float32"), ("pythia-1b", "lora"), ("pythia-1b", "lora-checkpointing"),
]  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Parameters of a GPT-NeoX with Pythia's vocabulary."""

    linear: int  # in linear layers, the head included: what is rounded where it is not trained
    rest: int  # embedding and norms
    adapters: int  # of rank RANK
    hidden: int
    layers: int

    @property
    def all(self) -> int:
        return self.linear + self.rest


def sizes(shape: str) -> Sizes:
    h, layers, _ = material.SHAPES[shape]
    v = material.VOCABULARY
    block = 12 * h * h + 9 * h  # qkv 3h, dense h, h to 4h and back; their biases
    adapters = RANK * (4 * h + 2 * h + 5 * h + 5 * h)
    return Sizes(layers * block + v * h, v * h + layers * 4 * h + 2 * h, layers * adapters, h, layers)


def predicted(shape: str, setting: str, processes: int = 1) -> dict[str, float]:
    """Bytes on one device, by what takes them.

    weights: float32, 4 a parameter; of the frozen ones of a policy with adapters and of the untouched checkpoint, 2 in
    linear layers where the recipe says bfloat16. gradient 4, Adam 8 and the copy from before the update, which tells
    how far it went, 4 a trained parameter; all four divided by the processes where the policy is spread over them.
    working: of the sampler's copy and autocast's in bfloat16 the larger, which is there when the copy from before is not.
    activations: LAYER hidden-sized numbers a token and layer, or with checkpointing 4 bytes of each and one layer's rest;
    and the logits of a micro-batch.
    """
    size, half, lora = sizes(shape), setting != "float32", setting.startswith("lora")
    checkpointing, spread = "checkpointing" in setting, setting == "sharded"
    frozen = 2 * size.linear + 4 * size.rest if half else 4 * size.all
    trained = size.adapters if lora else size.all
    parts = processes if spread else 1
    rows = MICRO_BATCH * TOKENS
    per_token = LAYER_BYTES * (1 if half else 2) * size.hidden
    kept = 4 * size.hidden if checkpointing else per_token
    rounded = 2 * size.rest if lora else 2 * size.all if half else 0
    activations = rows * (kept * size.layers + per_token * checkpointing)
    logits = rows * material.VOCABULARY * (2 if half else 4)
    whole = {
        "weights": (frozen if lora else 0) + 4 * trained / parts,
        "checkpoint": 0 if lora else frozen,
        "copy to act": frozen if spread else 0,
        "gradient": 4 * trained / parts,
        "Adam": 8 * trained / parts,
        "update": max(4 * trained / parts, rounded + activations + logits),
    }
    return whole | {"all": sum(whole.values())}


LAYER_BYTES = 50  # in bfloat16, a token, layer and hidden unit; from `saved`, below


def saved(shape: str) -> float:
    """Bytes that the layers keep for the backward pass, a token, layer and hidden unit, counted by torch's hooks."""
    h, layers, _ = material.SHAPES[shape]
    policy = material.policy(shape)
    policy.set_attn_implementation("eager")  # as on a CPU
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(1, 1000, (8, 64))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        policy.gpt_neox(ids, use_cache=False)
    rounded = sum(
        2 * p.numel() for name, p in policy.gpt_neox.named_parameters() if p.dim() > 1 and "embed" not in name
    )
    return (sum(storages.values()) - rounded) / (ids.numel() * layers * h)


def arm(shape: str, setting: str, device_name: str) -> dict[str, Any]:
    """Two steps as `train` does them, in a folder that `stage_in` made; the peak of this process."""
    from pipeline import train
    from pipeline.experience.setting import set_stage
    from pipeline.io import launch
    from pipeline.io.history import Progress
    from pipeline.io.runtime import set_up
    from pipeline.params import load
    from pipeline.reinforce.optim import make_optimizer

    params = load()
    device = set_up(device_name, params.train.threads)
    processes = launch.join(device, params.train.prompts_per_step)
    before = resident()
    setting_, policy = set_stage(params, device, processes)
    optimizer = make_optimizer(policy.parameters(), params.selected("recipe"))
    run = Progress()
    for _ in range(2):
        train.train_step(run, setting_, policy, optimizer)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    found = {"shape": shape, "setting": setting, "device": device.type, "bytes": peak,
             "parameters": sum(p.numel() for p in setting_.acting.parameters())}  # fmt: skip
    launch.leave(processes)
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stage_in(folder: Path, shape: str, setting: str) -> None:
    """What `prepare` and `cache` leave, and the parameters."""
    material.policy(shape).save_pretrained(folder / "data/checkpoint/policy")
    tokenizer, _ = material.tokenizer()
    tokenizer.save_pretrained(folder / "data/checkpoint/policy")
    (folder / "data/prompts").mkdir(parents=True)
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in material.prompts()[0][:200])
    (folder / "data/prompts/train.jsonl").write_text(prompts)
    yaml = YAML()
    tree = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    changes = SETTINGS[setting]
    tree["reward"] = "length"
    tree["recipes"][tree["recipe"]]["precision"] = changes.get("precision", "bfloat16")
    tree["train"] |= {
        "prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_tokens": TOKENS, "micro_batch": MICRO_BATCH,
        **{key: value for key, value in changes.items() if key != "precision"},
    }  # fmt: skip
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def measure(shape: str, setting: str, device: str) -> dict[str, Any]:
    """`arm` in a process of its own, or in two."""
    with tempfile.TemporaryDirectory() as folder:
        stage_in(Path(folder), shape, setting)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        command = ["-m", "benchmarks.memory", "arm", shape, setting, "--device", device]
        if setting == "sharded":
            command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *command]
            environment["ACCELERATE_USE_FSDP"] = "true"
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{shape} {setting}: {done.stderr[-2000:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return max(found, key=lambda row: row["bytes"])


def run(device: str) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for shape, setting in MEASURED:
        if any((row["shape"], row["setting"], row["device"]) == (shape, setting, device) for row in rows):
            continue
        rows.append(measure(shape, setting, device))
        print(json.dumps(rows[-1]), flush=True)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def tables() -> str:
    gb = 1e9
    lines = ["| policy | setting | measured, GB | formula, GB | formula over measured |", "|---|---|---|---|---|"]
    for row in json.loads(RESULTS.read_text()):
        formula = predicted(row["shape"], row["setting"], 2)["all"]
        lines.append(
            f"| {row['shape']} | {row['setting']} | {row['bytes'] / gb:.2f} | {formula / gb:.2f} "
            f"| {formula / row['bytes']:.2f} |"
        )
    lines += ["", "| policy | float32 | bfloat16 | checkpointing | lora | lora-checkpointing | sharded over 2 | over 8 |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for shape in material.SHAPES:
        cells = [predicted(shape, setting)["all"] for setting in SETTINGS if setting != "sharded"]
        cells += [predicted(shape, "sharded", count)["all"] for count in (2, 8)]
        lines.append(f"| {shape} | " + " | ".join(f"{cell / gb:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    one = commands.add_parser("arm")
    one.add_argument("shape", choices=material.SHAPES)
    one.add_argument("setting", choices=SETTINGS)
    for command in (runs, one):
        command.add_argument("--device", default="cpu")
    commands.add_parser("tables")
    commands.add_parser("saved")
    options = parser.parse_args()
    if options.command == "run":
        run(options.device)
    elif options.command == "arm":
        print(json.dumps(arm(options.shape, options.setting, options.device)))
    elif options.command == "saved":
        print(json.dumps({shape: saved(shape) for shape in ("pythia-31m", "pythia-70m", "pythia-160m")}))
    else:
        print(tables())


if __name__ == "__main__":
    main()

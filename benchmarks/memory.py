"""Memory that training takes, by size and setting: a formula, and the peak of real steps beside it -> docs/scale.json.

    python -m benchmarks.memory run               # measures what fits in 20 GB, ten minutes on two cores
    python -m benchmarks.memory tables            # docs/scale.json and the formula -> the tables of docs/SCALE.md
    python -m benchmarks.memory saved             # what layers keep for the backward pass: LAYER_BYTES

On a CPU the peak is the process's resident memory in the steps over that before the models were loaded; on a GPU what
torch held. A step of two micro-batches: in the second all gradients are there while the activations are.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import material
from benchmarks.real_steps import measure
from pipeline.models.adapters import add_lora
from pipeline.models.memory import cast_frozen_bf16

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/scale.json"
RANK, TOKENS, MICRO_BATCH = 16, 20, 64
LAYER_BYTES = 40  # in bfloat16, a token, layer and hidden unit: `saved` counts 38 to 45
LIBRARIES = 0.2e9  # on a CPU, what is loaded after the start, whatever the size: from pythia-14m
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {},  # as are those below
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora_rank": RANK},
    "lora-checkpointing": {"lora_rank": RANK, "gradient_checkpointing": True},
    "sharded": {},  # over two processes, each of which is measured
}
BATCH = {
    "samples_per_prompt": 8, "max_tokens": TOKENS, "micro_batch": MICRO_BATCH, "threads": 2,
    "precision": "bfloat16",
}  # fmt: skip
MEASURED = [
    *(("pythia-70m", setting) for setting in SETTINGS), *(("pythia-160m", setting) for setting in SETTINGS),
    ("pythia-410m", "bfloat16"), ("pythia-410m", "checkpointing"), ("pythia-410m", "lora"),
    ("pythia-1b", "lora-checkpointing"),
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

    weights: float32, 4 a parameter; of the frozen ones of a policy with adapters and of the reference, 2 in linear
    layers where the recipe says bfloat16. Adam 8 a trained parameter, gradient 4; both and the weights divided by the
    processes where the policy is spread over them. gathered: embedding and head, which FSDP then keeps whole from the
    forward pass to the end of the backward pass. rounded: autocast's copies of trained linear layers in bfloat16, which
    the backward pass needs; with checkpointing that of one layer and of the head. activations: LAYER_BYTES a token,
    layer and hidden unit, twice that in float32; with checkpointing 4, and once the whole. logits: of a micro-batch.
    The gradient is let go of with the update; what sampling takes instead, a copy in bfloat16, is smaller.
    """
    size, half, lora = sizes(shape), setting != "float32", setting.startswith("lora")
    checkpointing, spread = "checkpointing" in setting, setting == "sharded"
    frozen = 2 * size.linear + 4 * size.rest if half else 4 * size.all
    trained = size.adapters if lora else size.all
    parts = processes if spread else 1
    rows = MICRO_BATCH * TOKENS
    per_token = LAYER_BYTES * (1 if half else 2) * size.hidden
    kept = 4 * size.hidden if checkpointing else per_token
    head = material.VOCABULARY * size.hidden
    rounded = 2 * (head + (size.linear - head) / size.layers if checkpointing else size.linear)
    whole = {
        "weights": (frozen if lora else 0) + 4 * trained / parts,
        "checkpoint": 0 if lora else frozen,
        "copy to act": frozen if spread else 0,
        "Adam": 8 * trained / parts,
        "gradient": 4 * trained / parts,
        "gathered": 8 * head if spread else 0,
        "rounded": rounded if half and not lora else 0,
        "activations": rows * (kept * size.layers + per_token * checkpointing),
        "logits": rows * material.VOCABULARY * (2 if half else 4),
    }
    return whole | {"all": sum(whole.values())}


def saved(shape: str, lora: bool) -> float:
    """Bytes that the layers keep for the backward pass, a token, layer and hidden unit, counted by torch's hooks."""
    hidden, layers, _ = material.SHAPES[shape]
    policy = material.policy(shape)
    policy.set_attn_implementation("eager")  # as on a CPU
    if lora:
        add_lora(policy, RANK, 16, torch.Generator())
        cast_frozen_bf16(policy)
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(1, 1000, (8, 64))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.base_model(ids, use_cache=False)
    trained = [p for p in policy.base_model.parameters() if p.requires_grad and p.dim() > 1]
    embedding = policy.get_input_embeddings().weight
    rounded = sum(2 * p.numel() for p in trained if p is not embedding)  # autocast's, counted by the formula elsewhere
    return (sum(storages.values()) - rounded) / (ids.numel() * layers * hidden)


def run(device: str) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for shape, setting in MEASURED:
        if any((row["shape"], row["setting"], row["device"]) == (shape, setting, device) for row in rows):
            continue
        sharded = setting == "sharded"
        if sharded and device == "cuda" and torch.cuda.device_count() < 2:
            print(f"{shape} {setting}: left out, there is one GPU", flush=True)
            continue
        processes = 2 if sharded else 1  # each has two micro-batches
        changes = BATCH | SETTINGS[setting] | {"device": device, "prompts_per_step": processes * 16}
        each = measure(shape, changes, processes, sharded, for_memory=True)
        rows.append({"shape": shape, "setting": setting, "device": device, "bytes": max(one["bytes"] for one in each)})
        print(json.dumps(rows[-1]), flush=True)
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def tables() -> str:
    gb = 1e9
    lines = [
        "| policy | setting | on | measured, GB | formula, GB | formula over measured |",
        "|---" * 6 + "|",
    ]
    for row in json.loads(RESULTS.read_text()):
        formula = predicted(row["shape"], row["setting"], 2)["all"] + (LIBRARIES if row["device"] == "cpu" else 0)
        lines.append(
            f"| {row['shape']} | {row['setting']} | {row['device']} | {row['bytes'] / gb:.2f} | {formula / gb:.2f} "
            f"| {formula / row['bytes']:.2f} |"
        )
    lines += ["",
              "| policy | float32 | bfloat16 | checkpointing | lora | lora-checkpointing | sharded over 2 | over 8 |",
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
    runs.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    commands.add_parser("tables")
    commands.add_parser("saved")
    options = parser.parse_args()
    if options.command == "run":
        run(options.device)
    elif options.command == "saved":
        for shape in ("pythia-31m", "pythia-70m", "pythia-160m"):
            print(json.dumps({"shape": shape, "all weights": saved(shape, False), "adapters": saved(shape, True)}))
    else:
        print(tables())


if __name__ == "__main__":
    main()

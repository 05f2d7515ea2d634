"""Real training steps in processes of their own, of policies of any of Pythia's shapes: their memory and their time.

python -m benchmarks.real_steps      # in a folder that `measure` made; prints one line of JSON a process
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from benchmarks import material
from pipeline.models.verification import Layout

ROOT = Path(__file__).resolve().parents[1]


def measure(
    shape: str, changes: dict[str, Any], processes: int = 1, sharded: bool = False, for_memory: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """What each process says of two steps of the default recipe with these changes of it and of `train`, on the length
    reward."""
    with tempfile.TemporaryDirectory() as folder:
        stage_in(Path(folder), shape, changes)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if for_memory:  # what is let go of goes back to the system: the peak is of what is held at one time; slow
            environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        environment |= {"ACCELERATE_USE_FSDP": str(sharded).lower(), "OMP_NUM_THREADS": str(changes["threads"])}
        command = ["-m", "benchmarks.real_steps"]
        if processes > 1:
            command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *command]
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shape} {changes}: {done.stderr[-2000:]}")
    each = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert all(one["precision"] == changes["precision"] for one in each)
    return each


def stage_in(folder: Path, shape: str, changes: dict[str, Any]) -> None:
    """What `prepare` and `cache` leave, and the parameters."""
    material.policy(shape).save_pretrained(folder / "data/checkpoint/policy")
    material.tokenizer()[0].save_pretrained(folder / "data/checkpoint/policy")
    layout = {"layout": asdict(Layout()), "longest": 2048}  # which fit Pythia's shapes
    (folder / "data/checkpoint/layout.json").write_text(json.dumps(layout), encoding="utf-8")
    (folder / "data/prompts").mkdir(parents=True)
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in material.prompts()[0][:500])
    (folder / "data/prompts/train.jsonl").write_text(prompts, encoding="utf-8")
    yaml = YAML()
    tree = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    tree["reward"] = "length"
    tree["recipes"][tree["recipe"]]["scale_rewards"] = "none"  # no calibration comes before these steps
    set_keys(tree, changes)
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def set_keys(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Sets keys of `train`, and any others of the selected recipe, in what params.yaml holds."""
    for key, value in changes.items():
        (tree["train"] if key in tree["train"] else tree["recipes"][tree["recipe"]])[key] = value


def two_steps() -> dict[str, Any]:
    """As `train` does them; the peak of this process's memory in the steps, over what it held before the models; and
    the time of the second step."""
    from pipeline.config.load import load_params
    from pipeline.distributed import launch
    from pipeline.distributed.device import configure_torch
    from pipeline.rl.context import build_context
    from pipeline.rl.optimizer import make_optimizer
    from pipeline.rl.state import TrainState
    from pipeline.stages import train

    params = load_params()
    device = configure_torch(params.train.device, params.train.threads)
    processes = launch.init_process_group(device, params.train.prompts_per_step)
    forget_peak(device)
    before = peak(device)
    setting, policy = build_context(params, device, processes)
    let_go_of_files([setting.rollout_model] + ([] if setting.params.train.lora_rank else [reference_model(setting)]))
    forget_peak(device)
    optimizer = make_optimizer(policy.parameters(), params.selected_recipe)
    run = TrainState()
    train.train_step(run, setting, policy, optimizer)
    start = time.perf_counter()
    train.train_step(run, setting, policy, optimizer)
    seconds = time.perf_counter() - start
    steps = peak(device) - before
    launch.destroy_process_group(processes)
    precision = params.selected_recipe.precision
    return {
        "device": device.type,
        "precision": precision,
        "bytes": steps,
        "seconds": round(seconds, 3),
    }


def reference_model(setting: Any) -> torch.nn.Module:
    with setting.reference() as reference:
        return reference


def let_go_of_files(models: list[torch.nn.Module]) -> None:
    """Copies the weights out of the file that they are mapped from: its pages count as this process's as long as one
    tensor of it is in use, although the system may take them back."""
    for parameter in (p for model in models for p in model.parameters()):
        parameter.data = parameter.data.clone()


def peak(device: torch.device) -> int:
    """The most bytes that this process held since `forget_peak`: resident ones, files it has mapped included; of a GPU
    what torch had handed out."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    print(json.dumps(two_steps()))

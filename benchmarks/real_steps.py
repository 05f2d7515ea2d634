"""Real training steps in processes of their own, of policies of any of Pythia's shapes: their memory and their time.

python -m benchmarks.real_steps      # in a folder that `measure` made; prints one line of JSON a process
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from benchmarks import material

ROOT = Path(__file__).resolve().parents[1]


def measure(
    shape: str, changes: dict[str, Any], processes: int = 1, sharded: bool = False, for_memory: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """What each process says of two steps of the default recipe with these changes of it and of `train`, on the length
    reward."""
    with tempfile.TemporaryDirectory() as folder:
        stage_in(Path(folder), shape, changes)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if (
            for_memory
        ):  # what is let go of goes back to the system, so that the peak is of what was held at one time; slow
            environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        environment |= {"ACCELERATE_USE_FSDP": str(sharded).lower(), "OMP_NUM_THREADS": str(changes["threads"])}
        command = ["-m", "benchmarks.real_steps"]
        if processes > 1:
            command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *command]
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shape} {changes}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def stage_in(folder: Path, shape: str, changes: dict[str, Any]) -> None:
    """What `prepare` and `cache` leave, and the parameters."""
    material.policy(shape).save_pretrained(folder / "data/checkpoint/policy")
    material.tokenizer()[0].save_pretrained(folder / "data/checkpoint/policy")
    (folder / "data/prompts").mkdir(parents=True)
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in material.prompts()[0][:500])
    (folder / "data/prompts/train.jsonl").write_text(prompts, encoding="utf-8")
    yaml = YAML()
    tree = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    tree["reward"] = "length"
    for key, value in changes.items():
        (tree["train"] if key in tree["train"] else tree["recipes"][tree["recipe"]])[key] = value
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def two_steps() -> dict[str, Any]:
    """As `train` does them; the peak of this process's memory over what it held before the models, and the time of the
    second step."""
    from pipeline import train
    from pipeline.experience.setting import set_stage
    from pipeline.io import launch
    from pipeline.io.history import Progress
    from pipeline.io.runtime import set_up
    from pipeline.params import load
    from pipeline.reinforce.optim import make_optimizer

    params = load()
    device = set_up(params.train.device, params.train.threads)
    processes = launch.join(device, params.train.prompts_per_step)
    before = resident()
    setting, policy = set_stage(params, device, processes)
    optimizer = make_optimizer(policy.parameters(), params.selected("recipe"))
    run = Progress()
    train.train_step(run, setting, policy, optimizer)
    start = time.perf_counter()
    train.train_step(run, setting, policy, optimizer)
    seconds = time.perf_counter() - start
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    launch.leave(processes)
    return {"device": device.type, "bytes": peak, "seconds": round(seconds, 3)}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(two_steps()))

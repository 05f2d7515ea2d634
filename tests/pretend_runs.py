"""What runs on the pretend GPU (tests/pretend_cuda.py), in a process of its own: its hooks come before torch.

python -m tests.pretend_runs WHAT TARGET    # in a project in which `train` can run; results to TARGET, as JSON
"""

import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ruamel.yaml import YAML

from benchmarks import notebook_loop
from pipeline.config.load import validate_params
from pipeline.config.schema import Params
from pipeline.distributed.device import configure_torch, device_errors
from pipeline.errors import UserError
from pipeline.models import packing
from pipeline.models.load import load_policy, load_tokenizer
from pipeline.rl import update
from pipeline.rl.calibrate import calibrate
from pipeline.rl.context import build_context
from pipeline.rl.optimizer import make_optimizer
from pipeline.rl.state import TrainState
from pipeline.rl.train_step import train_step
from pipeline.stages import evaluate, train
from tests.project import Project
from tests.training import contents, end_before, forget

TF32_BEFORE = torch.backends.cuda.matmul.allow_tf32
# together they take every branch of a step: keys of the recipe and of `train`
CORE: dict[str, dict[str, Any]] = {
    "stable": {},
    "notebook": {"recipe": "notebook"},
    "adapters in bfloat16": {"lora_rank": 2, "precision": "bfloat16", "gradient_checkpointing": True},
    "sampler's distribution": {"loss_distribution": "sampler", "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "token ratios": {"epochs": 2, "importance": "token", "clip_range": 0.2, "baseline": "greedy", "kl": "loss_k3"},
}
LONG = {"max_tokens": 20, "prompts_per_step": 8, "samples_per_prompt": 4, "micro_batch": 16}
ALL = CORE | {
    "bfloat16": {"precision": "bfloat16"},
    "adapters": {"lora_rank": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "greedy, no KL": {"baseline": "greedy", "kl": "none"},
    "greedy, penalised": {"baseline": "greedy"},
    "running mean": {"baseline": "running", "kl_target": 0.5},
    "batch": {"baseline": "batch", "advantage_norm": "batch"},
    "group": {"baseline": "group", "advantage_norm": "group"},
    "sequence ratios": {"epochs": 2, "importance": "sequence", "kl": "loss_k2"},
    "entropy": {"entropy_coef": 0.01},
    "sgd": {"optimizer": "sgd", "lr": 0.01},
    "token mean": {"aggregation": "token_mean"},
    "sequence mean": {"aggregation": "sequence_mean"},
    "notebook's lengths": {"length_limit": "total", "padding": "counted"},
    "stop strings": {"stop_strings": ["e", " "]},
}


def changed(device: str, changes: dict[str, Any]) -> Params:
    """params.yaml of this folder with some keys of the recipe and of `train` changed."""
    tree = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text(encoding="utf-8"))
    tree["recipe"] = changes.get("recipe", "stable")
    tree["train"] |= {"device": device, "arithmetic": "native"}
    for key, value in changes.items():
        if key != "recipe":
            (tree["train"] if key in tree["train"] else tree["recipes"][tree["recipe"]])[key] = value
    return validate_params(tree)


def two_steps(device: str, changes: dict[str, Any]) -> TrainState:
    """Calibration and two steps. Their timings say how often the host waited for the GPU."""
    params = changed(device, changes)
    context, policy = build_context(params, configure_torch(device, 1))
    assert {p.device.type for p in policy.parameters()} == {device}
    optimizer, run = make_optimizer(policy.parameters(), params.selected_recipe), TrainState()
    run.calibration = calibrate(context, range(params.train.calibration_batches))
    for _ in range(2):
        before = torch.cuda.pretend_waits()
        train_step(run, context, policy, optimizer)
        run.timings[-1]["waits"] = torch.cuda.pretend_waits() - before
    return run


def compare(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each variant: whether the GPU sampled the CPU's tokens, and the column that is farthest from the CPU's."""
    found = {}
    for name, changes in variants.items():
        gpu, cpu = two_steps("cuda", changes), two_steps("cpu", changes)
        far = {
            column: abs(here[column] - there[column]) / (abs(there[column]) + 1e-2)
            for here, there in zip(gpu.rows, cpu.rows, strict=True)
            for column in there
            if math.isfinite(there[column])
        }
        column = max(far, key=far.__getitem__)
        same = [row["tokens"] for row in gpu.samples] == [row["tokens"] for row in cpu.samples]
        found[name] = {"same tokens": same, "column": column, "distance": far[column]}
    return found


def waits() -> list[int]:
    """Of a step: as it is, and where each micro-batch has completions without advantage."""
    found = [two_steps("cuda", LONG).timings[-1]["waits"]]
    some = lambda batch, *_: torch.arange(len(batch.advantages)) % 3 == 0  # noqa: E731
    with mock.patch.object(update, "rows_without_gradient", some):
        return [*found, two_steps("cuda", LONG).timings[-1]["waits"]]


def planted() -> str:
    """What a step says whose scoring lays its rows on the CPU."""
    real, cpu = packing.Rows.with_others_on, torch.device("cpu")
    with mock.patch.object(packing.Rows, "with_others_on", lambda rows, _, *more: real(rows, cpu, *more)):
        try:
            two_steps("cuda", {})
        except RuntimeError as error:
            return str(error)
    return ""


def stages() -> dict[str, Any]:
    """The stages on the GPU: whether a run that was interrupted gives the bytes of one that was not, what run.json says
    of it, and what the policy gained."""
    project, found = Project(Path.cwd(), {}), {}
    for name, changes in (("all weights", {}), ("adapters", {"train__lora_rank": 2, "train__on_collapse": "stop"})):
        project.edit(train__device="cuda", train__steps=4, evaluate__every=2, **changes)
        train.main()
        whole = contents(project)
        forget(project)
        end_before(2)
        train.main()
        evaluate.main()
        found[name] = {
            "same bytes": contents(project) == whole,
            "run": json.loads(whole["reports/train/run.json"]),
        }
        forget(project)
    return found


def settings() -> dict[str, Any]:
    """How torch is set for a GPU, and what becomes of an operation that has no deterministic kernel there."""
    found, device = {"tf32 before": TF32_BEFORE}, configure_torch("cuda", 1)
    found |= {"tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32}
    try:
        with device_errors([]):
            torch.ones(3, device=device).cumsum(0)
    except UserError as error:
        found["refused"] = str(error)
    return found


def notebook(policy: Path, encoder: Path) -> float:
    """The mean reward of a step of the notebook's loop, which the benchmark of speed measures."""
    device = configure_torch("cuda", 1)
    torch.use_deterministic_algorithms(False)
    lm, tokenizer = load_policy(policy, device), load_tokenizer(policy)
    optimizer = torch.optim.Adam(lm.parameters(), lr=3e-4)
    distance = notebook_loop.bert_distance(encoder, "Hi there!", "cuda")
    return notebook_loop.step(lm, tokenizer, optimizer, ["Hello", "Who are you?"], distance, num_mc_samples=2)


CHECKPOINT = Path("data/checkpoint")
WHAT = {
    "core": lambda: {
        "variants": compare(CORE), "planted": planted(), "settings": settings(),
        "waits": waits(),
        "notebook": notebook(CHECKPOINT / "policy", CHECKPOINT / "encoder"),
    },
    "all": lambda: {"variants": compare(ALL)},
    "stages": stages,
}  # fmt: skip

if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(WHAT[sys.argv[1]]()), encoding="utf-8")

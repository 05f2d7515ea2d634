"""One loop measured by itself, in a process of its own so that its peak memory is its own; prints one line of JSON.

python -m benchmarks.speed_arms ARM --prompts 128 --reward length --precision bfloat16 --steps 1 --encoder FOLDER

Arms: notebook, trl, ours, and matmul, the machine's rate of matrix multiplication. The first step warms up and is not
counted."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import material
from pipeline.config.load import PARAMS_FILE, load_params, validate_params
from pipeline.distributed.device import configure_torch
from pipeline.models.verification import Layout
from pipeline.rl.context import TrainContext
from pipeline.rl.state import TrainState

SAMPLES, TOKENS, THREADS = 8, 20, 2
WARM_UP = 8  # prompts
TARGET_LENGTH, TARGET = 40, "Hi there!"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=["notebook", "trl", "ours", "matmul"])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--reward", choices=["length", "embedding"], default="length")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--kl", choices=["none", "reward_k1"], default="none")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--encoder-precision", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--shape", choices=list(material.SHAPES), default="pythia-70m")
    parser.add_argument("--count-flops", action="store_true", help="one step more, under torch's counter")
    parser.add_argument("--profile", action="store_true", help="of ours: one step more, its operations on stderr")
    parser.add_argument("--size", type=int, default=0, help="of the matrices of matmul; 0: as the device needs")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = configure_torch(options.device, THREADS)
    if device.type == "cuda" and options.arm in ("notebook", "trl"):
        torch.use_deterministic_algorithms(False)  # an operation of theirs may have no such kernel on a GPU
    if options.arm == "matmul":
        size = options.size or (2048 if device.type == "cpu" else 8192)
        print(json.dumps(matmul_rate(size, getattr(torch, options.precision), device)))
        return
    measured = {"notebook": notebook, "trl": trl, "ours": ours}[options.arm](options, device)
    print(json.dumps({"peak_mib": peak_mib(device)} | measured))


def peak_mib(device: torch.device) -> int:
    """Of the process so far; on a GPU, what torch held there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def matmul_rate(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of a square product, the best of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.nn.functional.linear(a, b)
    seconds = [timed(lambda: torch.nn.functional.linear(a, b), device) for _ in range(10)]
    return {"flops_per_second": 2 * size**3 / min(seconds)}


def timed(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def drawn(prompts: list[str], count: int, step: int) -> list[str]:
    return random.Random(step).choices(prompts, k=count)


def notebook(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from benchmarks import notebook_loop

    policy: Any = material.policy(options.shape)
    tokenizer, prompts = _texts()
    policy.to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    reward: Callable[[str], Any] = partial(notebook_loop.has_length, target_len=TARGET_LENGTH)
    if options.reward == "embedding":
        reward = notebook_loop.bert_distance(options.encoder, TARGET, str(device))
    times = []
    for step in range(options.steps + 1):
        count = options.prompts if step else min(options.prompts, 4)
        chosen = drawn(prompts, count, step)
        work = partial(notebook_loop.step, policy, tokenizer, optimizer, chosen, reward, options.samples)
        times.append(timed(work, device))
    return {"samples": options.prompts * options.samples, "seconds": times[1:]}


def trl(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """RLOO as trl does it, with the work of the other arms: no KL, one update a batch, as many tokens on average."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    policy, tokenizer, prompts = material.policy(options.shape), *_texts()
    tokenizer.pad_token = tokenizer.eos_token
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [-abs(len(text) - TARGET_LENGTH) for text in completions]

    chosen = [prompt for step in range(options.steps + 1) for prompt in drawn(prompts, options.prompts, step)]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in chosen]
    micro_batch = options.micro_batch or 64
    batch = options.prompts * options.samples
    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            output_dir=folder, max_steps=options.steps + 1, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=batch // micro_batch, num_generations=options.samples, beta=0.0,
            max_completion_length=round(sum(TOKENS - length for length in lengths) / len(lengths)), temperature=1.0,
            learning_rate=3e-4, lr_scheduler_type="constant", gradient_checkpointing=False, report_to="none",
            logging_steps=1000, save_strategy="no", use_cpu=device.type == "cpu", shuffle_dataset=False,
            bf16=options.precision == "bfloat16", disable_tqdm=True,
        )  # fmt: skip
        trainer = RLOOTrainer(
            model=policy, args=config, reward_funcs=reward, processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in chosen]), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return {"samples": batch, "seconds": [after - before for before, after in itertools.pairwise(ends)]}


def ours(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`train_step` as the stage `train` calls it, with every metric of history.csv, without tracking."""
    from pipeline.config.schema import EmbeddingReward, LengthReward
    from pipeline.data.prompts import Prompt
    from pipeline.rewards.build import build_reward
    from pipeline.rl.optimizer import make_optimizer
    from pipeline.stages import train

    params = our_params(options, options.prompts)
    tokenizer, prompts = _texts()
    policy, reference = saved_and_loaded(options.shape, options.precision, device)
    if options.reward == "embedding":
        table: Any = EmbeddingReward(kind="embedding", target=TARGET, precision=options.encoder_precision)
    else:
        table = LengthReward(kind="length", target=TARGET_LENGTH)
    eos = (tokenizer.eos_token_id,)
    setting = TrainContext(
        params,
        list(map(Prompt, prompts)),
        tokenizer,
        policy,
        lambda: nullcontext(reference),
        build_reward(options.reward, table, options.encoder or Path(), device),
        device,
        eos,
        Layout(),
    )
    run, optimizer = TrainState(), make_optimizer(policy.parameters(), params.selected_recipe)
    warm = dataclasses.replace(setting, params=our_params(options, min(options.prompts, WARM_UP)))
    train.train_step(run, warm, policy, optimizer)
    seconds = [timed(lambda: train.train_step(run, setting, policy, optimizer), device) for _ in range(options.steps)]
    phases = {key: [row[key] for row in run.timings[1:]] for key in run.timings[0] if key.startswith("seconds_")}
    gap = [row["logprob_gap"] for row in run.rows]
    result = {
        "samples": options.prompts * options.samples, "seconds": seconds, "phases": phases, "logprob_gap": gap,
        "tokens": [row["completion_tokens"] for row in run.rows[1:]], "peak_mib": peak_mib(device),
        "digest": hashlib.sha256(json.dumps(run.rows).encode()).hexdigest(),
    }  # fmt: skip
    if options.count_flops:
        with FlopCounterMode(display=False) as counter:
            train.train_step(run, setting, policy, optimizer)
        result["flops"] = counter.get_total_flops()
    if options.profile:
        with torch.profiler.profile(record_shapes=True, with_flops=True) as found:
            train.train_step(run, setting, policy, optimizer)
        for averages in (found.key_averages(), found.key_averages(group_by_input_shape=True)):
            print(averages.table(sort_by="self_cpu_time_total", row_limit=30), file=sys.stderr)
    return result


def saved_and_loaded(shape: str, precision: str, device: torch.device) -> tuple[Any, Any]:
    """Policy and reference as the stage loads them."""
    from pipeline.models.load import load_policy
    from pipeline.models.memory import cast_frozen_bf16

    with tempfile.TemporaryDirectory() as folder:
        material.policy(shape).save_pretrained(folder)
        policy, reference = load_policy(Path(folder), device), load_policy(Path(folder), device).requires_grad_(False)
        if precision == "bfloat16":
            cast_frozen_bf16(reference)
        return policy, reference


def our_params(options: argparse.Namespace, prompts: int) -> Any:
    """Recipe `stable` without its KL term and scale, with the notebook's lengths: the work that the other loops do."""
    from ruamel.yaml import YAML

    tree = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text(encoding="utf-8"))
    micro_batch = options.micro_batch or load_params().train.micro_batch
    tree["train"] |= {
        "steps": 1000, "prompts_per_step": prompts, "samples_per_prompt": options.samples, "max_tokens": TOKENS,
        "micro_batch": micro_batch, "threads": THREADS,
    }  # fmt: skip
    tree["recipes"]["stable"] |= {
        "kl": options.kl, "length_limit": "total", "precision": options.precision, "scale_rewards": "none",
    }  # fmt: skip
    return validate_params(tree)


def _texts() -> tuple[Any, list[str]]:
    return material.tokenizer()[0], material.prompts()[0]


if __name__ == "__main__":
    main()

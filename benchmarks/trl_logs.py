"""Training logs of another trainer: trl's GRPO and RLOO on the pocket model, one healthy and one collapsed of each.

pip install -c constraints.txt -e '.[benchmarks]'
python -m benchmarks.trl_logs                 # tests/logs/: 15 minutes on a busy core
python -m benchmarks.trl_logs rloo-collapsed  # one of them

`trainer_state.json` is as trl leaves it. completions.jsonl holds a part of what trl writes to completions/*.parquet, as
text that a diff shows. tests/test_foreign_logs.py has what `reinforce diagnose` says of each.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.file_io import read_jsonl, write_jsonl, write_text

LOGS = Path("tests/logs")
STEPS, PROMPTS, SAMPLES, TOKENS = 24, 6, 8, 20
KEPT = 12  # completions a step


class Plan(NamedTuple):
    trainer: str
    reward: Callable[[str], float]
    lr: float
    beta: float


def near_forty(text: str) -> float:
    return -abs(len(text) - 40) / 10


def question_marks(text: str) -> float:
    return float(text.count("?"))


def silence(text: str) -> float:
    return -len(text) / 10


PLANS = {
    "grpo-healthy": Plan("GRPO", near_forty, 5e-5, 0.05),
    "grpo-collapsed": Plan("GRPO", question_marks, 1e-3, 0.0),  # no KL term, and a prize for one sign
    "rloo-healthy": Plan("RLOO", near_forty, 5e-5, 0.05),
    "rloo-collapsed": Plan("RLOO", silence, 1e-3, 0.01),  # pays for saying nothing
}


def main(names: list[str]) -> None:
    for name in names or PLANS:
        train(name, PLANS[name])


def train(name: str, plan: Plan) -> None:
    import pandas as pd
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    model = "data/pocket/checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = read_jsonl(Path("data/pocket/prompts/train.jsonl"))

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [plan.reward(text) for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = getattr(trl, f"{plan.trainer}Config")(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES,
            max_completion_length=TOKENS, beta=plan.beta, learning_rate=plan.lr, warmup_steps=3, seed=0,
            lr_scheduler_type="constant_with_warmup", gradient_checkpointing=False, logging_steps=1, report_to="none",
            log_completions=True, save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = getattr(trl, f"{plan.trainer}Trainer")(
            model=model, args=config, reward_funcs=reward, processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": row["text"]} for row in prompts]),
        )  # fmt: skip
        trainer.train()
        trainer.save_state()
        write_text(LOGS / name / "trainer_state.json", Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
        steps = [pd.read_parquet(file) for file in sorted(Path(folder, "completions").glob("*.parquet"))]
    rows: list[Any] = [row for step in steps for row in step.head(KEPT).to_dict("records")]
    if rows:  # RLOOTrainer writes none
        write_jsonl(LOGS / name / "completions.jsonl", rows)


if __name__ == "__main__":
    main(sys.argv[1:])

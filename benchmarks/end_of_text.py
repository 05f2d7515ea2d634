"""The embedding reward of nothing but end-of-text tokens, by how many there are: what the notebook rewards silence
with.

python -m benchmarks.end_of_text      # after `dvc repro`, which caches the encoder
"""

from pathlib import Path

import torch

from pipeline.config.load import load_params
from pipeline.data.prompts import Prompt
from pipeline.rewards.batch import RewardBatch
from pipeline.rewards.build import build_reward

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 19)


def main() -> None:
    reward = build_reward(
        "embedding", load_params().rewards["embedding"], Path("data/checkpoint/encoder"), torch.device("cpu")
    )
    texts = ["", *("<|endoftext|>" * count for count in COUNTS)]
    batch = RewardBatch([Prompt("Hi")] * len(texts), texts, [[]] * len(texts))
    print("| tokens of end-of-text, decoded | reward |\n|---|---|")
    for count, value in zip(("none, stripped", *COUNTS), reward(batch), strict=True):
        print(f"| {count} | {value:.2f} |")


if __name__ == "__main__":
    main()

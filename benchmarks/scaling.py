"""Time of a step on one and two processes, in one piece and sharded -> one line of JSON each, docs/SCALE.md.

python -m benchmarks.scaling      # on an idle machine with two cores; every way twice
"""

import json

from benchmarks.real_steps import measure

BATCH = {"prompts_per_step": 16, "samples_per_prompt": 8, "max_tokens": 20, "micro_batch": 64, "precision": "float32"}
WAYS = {  # threads of a process, processes, sharded
    "1 process, 1 thread": (1, 1, False),
    "1 process, 2 threads": (2, 1, False),
    "2 processes, 1 thread each": (1, 2, False),
    "2 processes, 1 thread each, sharded": (1, 2, True),
}


def main() -> None:
    for way, (threads, processes, sharded) in list(WAYS.items()) * 2:
        each = measure("pythia-70m", BATCH | {"threads": threads}, processes, sharded)
        print(json.dumps({"way": way, "seconds": max(one["seconds"] for one in each)}), flush=True)


if __name__ == "__main__":
    main()

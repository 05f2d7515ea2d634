"""Which settings of a file from `accelerate config` start the processes, and which ones only accelerate's own trainer
would read. The latter are named, since the run differs from what the file's writer expects."""

import dataclasses
import sys
from typing import Any

from pipeline.errors import UserError

TYPES = ("MULTI_GPU", "FSDP", "NO")
# the settings that start the processes
READ = (
    "compute_environment", "distributed_type", "num_processes", "num_machines", "machine_rank", "main_process_ip",
    "main_process_port", "gpu_ids", "rdzv_backend", "same_network",
)  # fmt: skip
INSTEAD = {
    "mixed_precision": "the recipe's `precision` says it",
    "downcast_bf16": "the recipe's `precision` says it",
    "fsdp_config": "each layer is sharded over all processes, and nothing is offloaded",
    "use_cpu": "train.device says it",
}
NOTHING: tuple[Any, ...] = (None, False, "no", "NO", "main", {}, [], "")  # how accelerate writes a setting that is off


def check_file(name: str, asked: Any) -> None:
    """Say on stderr which settings of a file have no effect, one line each. `asked`: the file, as accelerate reads it.

    Raises UserError for a way to train that this project does not have.
    """
    kind = str(getattr(asked.distributed_type, "value", asked.distributed_type))
    if kind not in TYPES:
        also = "; on CPUs, too, MULTI_GPU" if kind == "MULTI_CPU" else ""
        raise UserError(f"{name}: distributed_type: {kind}: should be MULTI_GPU, FSDP (sharded) or 'NO'{also}")
    for field in dataclasses.fields(asked):
        value = getattr(asked, field.name)
        if field.name not in READ and value not in NOTHING:
            why = INSTEAD.get(field.name, "it is a setting of accelerate's own trainer")
            print(f"note: {name}: {field.name} has no effect: {why}", file=sys.stderr)

"""What of a file of `accelerate config`'s starts the processes, and what in it only accelerate's own trainer would
read: such a setting is named, since a run without it is another than its writer thought."""

import dataclasses
import sys
from typing import Any

from pipeline.errors import UserError

TYPES = ("MULTI_GPU", "FSDP", "NO")
# what starts the processes
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
NOTHING: tuple[Any, ...] = (None, False, "no", "NO", "main", {}, [], "")  # as accelerate writes what is off


def check_file(name: str, asked: Any) -> None:
    """Says on stderr which settings of a file have no effect, a line each. `asked`: the file, as accelerate reads it.

    Raises UserError for a way to train that is not here.
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

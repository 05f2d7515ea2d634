"""How many processes train: as many as a launcher started, `accelerate launch` or `torchrun`, or this one alone.

accelerate may not be installed, and a launcher takes a second to import, so both are imported inside a function.
"""

import os
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.distributed.accelerate_file import check_file
from pipeline.distributed.device import LAUNCHER, is_launched, launcher_number
from pipeline.distributed.dist_context import SINGLE_PROCESS, DistContext
from pipeline.errors import UserError

CONFIG = "REINFORCE_ACCELERATE_CONFIG"  # names the file that `accelerate config --config_file FILE` writes
PATIENCE = timedelta(hours=12)  # how long processes wait, such as for rank 0 to write a checkpoint; NCCL: 10 minutes


def relaunch_with_accelerate(module: str, base: Path) -> None:
    """If $REINFORCE_ACCELERATE_CONFIG names a file, this process launches `module` by accelerate and exits with the
    exit code of the first process that failed, which has printed its error.

    This is an environment variable, not a key of params.yaml: the number of processes is no part of a run's
    configuration. A relative path starts at `base`. Raises UserError if the file or accelerate is missing, or the file
    is not what accelerate writes or asks for a way to train that this project does not have. Its settings without
    effect are named on stderr.
    """
    name = os.environ.get(CONFIG)
    if not name or is_launched():
        return
    config = base / Path(name).expanduser()
    if not config.is_file():
        raise UserError(f"{CONFIG}: no file {config}; `accelerate config --config_file {name}` writes one")
    if find_spec("accelerate") is None:
        raise UserError(f"{CONFIG} is set, and accelerate is not installed: `pip install accelerate`, or unset it")
    # torch's launcher kills 30 s after a signal; a step may take longer
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    del os.environ[CONFIG]  # else a single launched process, which gets no rank, would launch again
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        asked = load_config_from_file(str(config))
    except Exception as error:  # accelerate may raise anything for a wrong file
        raise UserError(f"{config}: not a configuration of accelerate: {error}") from error
    check_file(name, asked)
    sys.stdout.flush()
    try:
        launch_command(launch_command_parser().parse_args(["--config_file", str(config), "--quiet", "-m", module]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def init_process_group(device: torch.device, prompts: int) -> DistContext:
    """Connects with the other processes that the launcher started. They share the `prompts` of a step.

    Raises UserError where there are fewer prompts than processes.
    """
    if not is_launched():
        return SINGLE_PROCESS
    if prompts < (count := launcher_number("WORLD_SIZE")):
        raise UserError(f"train.prompts_per_step = {prompts}: at least one for each of the {count} processes is needed")
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # neither torchrun nor accelerate: the variables may be leftovers
        print(
            f"process {os.environ['RANK']} of {count}: waiting for the others at {os.environ['MASTER_ADDR']}; if there "
            f"are none, stop this and `unset {' '.join(LAUNCHER)}`",
            file=sys.stderr,
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # set by `accelerate launch` where its configuration says distributed_type: FSDP
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return DistContext(dist.get_rank(), dist.get_world_size(), sharded, host_group)


def destroy_process_group(processes: DistContext) -> None:
    """Waits for all processes, so that none ends while rank 0 still writes."""
    if processes.world_size > 1:
        processes.barrier()
        dist.destroy_process_group()

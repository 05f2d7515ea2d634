"""The device and the threads of this process, and torch set to deterministic kernels."""

import os

import torch

from pipeline.arithmetic.environment import Arithmetic, supports_portable
from pipeline.arithmetic.kernels import use_portable_kernels
from pipeline.errors import UserError

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what each launcher of torch's sets
THREADS_PER_CORE = 8  # more threads would slow the whole machine down


def configure_torch(device: str, threads: int, arithmetic: Arithmetic = "native") -> torch.device:
    """Chooses the device, fixes the number of threads and asks torch for deterministic kernels, for portable ones where
    `arithmetic` says so and the device has them.

    Raises UserError for a CUDA device that is not there, for more than THREADS_PER_CORE threads a core, and where torch
    was loaded before portable kernels were chosen.
    """
    if threads > (most := THREADS_PER_CORE * (os.cpu_count() or 1)):
        raise UserError(
            f"train.threads = {threads}: this machine has {os.cpu_count()} cores; at most {most} are started"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = cuda: torch sees no CUDA device here; auto or cpu would run")
    chosen = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        # without a launcher, LOCAL_RANK is a leftover
        chosen = torch.device("cuda", launcher_number("LOCAL_RANK") if is_launched() else 0)
        torch.cuda.set_device(chosen)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: torch reads this when it first needs memory
    torch.set_num_threads(threads)
    # some CUDA kernels (cumsum) have no deterministic form: a warning there, an error on a CPU
    torch.use_deterministic_algorithms(True, warn_only=chosen.type == "cuda")
    # takes a sixth of the sampling's time, and nothing here reads memory before it writes it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if chosen.type == "cuda":  # the fused attention kernels add up gradients in any order
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if arithmetic_in_effect(arithmetic, chosen) == "portable":
        use_portable_kernels()
    return chosen


def arithmetic_in_effect(arithmetic: Arithmetic, device: torch.device) -> Arithmetic:
    """What `train.arithmetic` comes to on a device: GPUs and CPUs without AVX2 and FMA have native kernels only."""
    return "portable" if arithmetic == "portable" and device.type == "cpu" and supports_portable() else "native"


def is_launched() -> bool:
    """Whether `torchrun`, `accelerate launch` or another launcher of torch's started this process as one of several.

    Raises UserError where only some of a launcher's variables are set: leftovers of an earlier launch.
    """
    missing = [name for name in LAUNCHER if name not in os.environ]
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or launcher_number("WORLD_SIZE") == 1:
        return False
    if missing:
        raise UserError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, and {', '.join(missing)} is not set: no launcher started this "
            f"process; `unset {' '.join(LAUNCHER)}` trains with it alone"
        )
    return True


def launcher_number(name: str) -> int:
    """The value of a launcher's variable, 0 if it is unset. Raises UserError if it is no whole number."""
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise UserError(f"{name} = {text!r}: should be a whole number, as a launcher sets it; or unset it")
    return int(text)

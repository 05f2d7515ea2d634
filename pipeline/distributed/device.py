"""The device and the threads of this process, and torch set to deterministic kernels."""

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pipeline.arithmetic.environment import Arithmetic, supports_portable
from pipeline.arithmetic.kernels import use_portable_kernels
from pipeline.errors import UserError, one_line

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # variables that every launcher of torch sets
THREADS_PER_CORE = 8  # more threads would slow the whole machine down
# besides torch.OutOfMemoryError: the host's allocator and cuBLAS's workspace raise plain RuntimeErrors
OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def configure_torch(device: str, threads: int, arithmetic: Arithmetic = "native") -> torch.device:
    """Chooses the device, fixes the number of threads and sets torch to deterministic kernels; to portable ones if
    `arithmetic` says so and the device has them. A GPU, too, multiplies float32 in float32, never in TF32.

    Raises UserError for a CUDA device that is not there, for more processes than GPUs, for more than THREADS_PER_CORE
    threads a core, and where torch was loaded before portable kernels were chosen.
    """
    if threads > (most := THREADS_PER_CORE * (os.cpu_count() or 1)):
        raise UserError(
            f"train.threads = {threads}: this machine has {os.cpu_count()} cores; at most {most} are started"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = cuda: torch sees no CUDA device here; auto or cpu would run")
    chosen = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        chosen = own_gpu()
        torch.cuda.set_device(chosen)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: torch reads this when it first needs memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # filling takes a sixth of the sampling time, and no code here reads memory before writing it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if chosen.type == "cuda":
        # the fused attention kernels add up gradients in any order
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        # TF32 keeps 10 of float32's 23 bits; an environment variable could switch it on
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # cuBLAS and cuDNN read it when they are loaded
    if arithmetic_in_effect(arithmetic, chosen) == "portable":
        use_portable_kernels()
    return chosen


def arithmetic_in_effect(arithmetic: Arithmetic, device: torch.device) -> Arithmetic:
    """The arithmetic that `train.arithmetic` leads to on a device: GPUs and CPUs without AVX2 and FMA have native
    kernels only."""
    return "portable" if arithmetic == "portable" and device.type == "cpu" and supports_portable() else "native"


def own_gpu() -> torch.device:
    """The GPU of this process, by its number among the processes of this machine; the first GPU without a launcher.
    Raises UserError if there are more processes than GPUs."""
    number = launcher_number("LOCAL_RANK") if is_launched() else 0  # without a launcher LOCAL_RANK is a leftover
    if number >= (count := torch.cuda.device_count()):
        raise UserError(
            f"LOCAL_RANK = {number}: each process needs a GPU of its own, and torch sees {count} here; start at most "
            f"{count} processes on this machine (num_processes), or set train.device: cpu"
        )
    return torch.device("cuda", number)


def gpu_description(device: torch.device) -> str | None:
    """The GPU's name and the version of CUDA, which both change the last digits; None for a CPU."""
    if device.type != "cuda":
        return None
    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"


@contextmanager
def device_errors(lower: Sequence[str]) -> Iterator[None]:
    """In the block, raise UserError if a device has too little memory, naming the settings that `lower` its use, and if
    a GPU has no deterministic kernel for an operation."""
    try:
        yield
    except RuntimeError as error:
        said = one_line(str(error))
        brief = textwrap.shorten(said, 250, placeholder=" ...").rstrip(".")
        if isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in OUT_OF_MEMORY):
            ways = f"less is needed with any of: {'; '.join(lower)} (docs/SCALE.md)"
            raise UserError(f"out of memory: {brief}; {ways}") from error
        if "does not have a deterministic implementation" in said:
            operation = said.partition(" ")[0]
            raise UserError(
                f"{operation} has no deterministic kernel on a GPU, so that no run could be repeated; train.device: "
                "cpu has one"
            ) from error
        raise


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

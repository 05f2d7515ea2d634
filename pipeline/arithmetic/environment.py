"""The environment variables that fix the kernels of torch, MKL, oneDNN, OpenBLAS and numpy. Each library reads its
variables when it is loaded or first used, so they must be set before torch and numpy are imported."""

import os
import platform
import sys
from pathlib import Path
from typing import Literal

from pipeline.config.load import load_params
from pipeline.errors import UserError

Arithmetic = Literal["portable", "native"]

VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own loops
    "MKL_CBWR": "COMPATIBLE",  # for what torch still asks of MKL; MKL's other branches differ between Intel and AMD
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",  # for numpy and scipy
    "OPENBLAS_NUM_THREADS": "1",  # its threads would wait for torch's, and torch's for them
}
NUMPY = {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"}  # the warning on a CPU without them is not shown
CPU_INFO = Path("/proc/cpuinfo")


def supports_portable() -> bool:
    """Whether this machine has what the portable kernels need: Linux on x86-64 with AVX2 and FMA."""
    return platform.machine() == "x86_64" and {"avx2", "fma"} <= cpu_flags()


def choose_kernels() -> None:
    """Set the variables, if params.yaml in this folder asks for portable arithmetic and neither torch nor numpy is
    loaded yet. A file that is not valid changes nothing: the stage reports it."""
    try:
        wanted = load_params().train.arithmetic == "portable"
    except UserError:
        return
    if wanted and supports_portable() and not {"torch", "numpy"} & sys.modules.keys():
        os.environ.update(VARIABLES)
        if "avx512f" in cpu_flags():
            os.environ.update(NUMPY)


def cpu_type() -> str:
    """The name of this machine's CPU, and its widest instructions."""
    info, known = _cpu_info(), ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in known if flag in cpu_flags()]
    return f"{info.get('model name', platform.machine())} ({', '.join(flags)})"


def cpu_flags() -> set[str]:
    """The instructions of this machine's CPU, as Linux names them; none elsewhere."""
    info = _cpu_info()
    return set(info.get("flags", info.get("Features", "")).split())  # x86-64, arm64


def _cpu_info() -> dict[str, str]:
    """What Linux says of the first core; nothing elsewhere."""
    if not CPU_INFO.is_file():
        return {}
    core, _, _ = CPU_INFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    lines = (line.partition(":") for line in core.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}

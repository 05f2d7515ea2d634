"""A device "cuda" without a GPU (tests/pretend_cuda.cpp): built, and put in torch's place of CUDA.

PRETEND_GPUS says how many devices there are (1), PRETEND_BYTES how much memory they have together (no limit).
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
NAME = "Pretend GPU"
# Python runs a sitecustomize.py first in every process: the stages and what they launch find the device
HOOK = """
import sys
sys.path.append({root!r})
from tests.pretend_cuda import install
install({library!r})
"""


def build(folder: Path) -> Path:
    """Compiles the device, 10 s, and writes a `sitecustomize.py` beside it that installs it."""
    torch = Path(str(find_spec("torch").origin)).parent  # type: ignore[union-attr]  # torch is there
    library = folder / "pretend_cuda.so"
    headers = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run(
        [str(COMPILER), "-O0", "-std=c++20", "-fPIC", "-shared", "-w", "-DAT_PER_OPERATOR_HEADERS", *headers,
         str(HERE / "pretend_cuda.cpp"), "-o", str(library), *libraries], check=True,
    )  # fmt: skip
    (folder / "sitecustomize.py").write_text(HOOK.format(root=str(HERE.parent), library=str(library)))
    return library


def install(library: str) -> None:
    """Loads the device and has torch.cuda speak of it. Where a launcher started this process, NCCL is there, too."""
    assert "torch" not in sys.modules, "its hooks have to be there before torch is"
    device = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    device.pretend_waits.restype = device.pretend_peak.restype = ctypes.c_long
    import torch
    import torch._dynamo
    import torch._inductor.test_operators  # both look for CUDA's own symbols where CUDA is available

    torch.ops.load_library(library)
    count = int(os.environ.get("PRETEND_GPUS", "1"))

    def index(given: Any) -> int:
        at = given if isinstance(given, int | None) else torch.device(given).index
        return device.pretend_current() if at is None else at

    def use(given: Any) -> None:
        if not 0 <= index(given) < count:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        device.pretend_use(index(given))

    class Used:
        def __init__(self, given: Any) -> None:
            self.index = index(given)

        def __enter__(self) -> None:
            self.before = device.pretend_current()
            use(self.index)

        def __exit__(self, *_: object) -> None:
            use(self.before)

    class Nothing:
        """A stream or an event: all work is done when its call returns."""

        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = torch.device("cuda", device.pretend_current())

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    values = {
        "is_available": True, "is_initialized": True, "_is_compiled": True, "_lazy_init": None, "init": None,
        "device_count": count, "synchronize": None, "is_bf16_supported": True, "get_device_capability": (9, 0),
        "get_device_name": NAME, "empty_cache": None, "is_current_stream_capturing": False, "manual_seed_all": None,
        "manual_seed": None, "get_rng_state_all": [], "set_rng_state_all": None,
        "_is_in_bad_fork": False, "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    parts: dict[str, Any] = {
        "current_device": device.pretend_current, "set_device": use, "device": Used, "Stream": Nothing,
        "Event": Nothing, "current_stream": Nothing, "default_stream": Nothing,
        "stream": lambda _: contextlib.nullcontext(),
        "max_memory_allocated": lambda *_: device.pretend_peak(), "pretend_waits": device.pretend_waits,
    }  # fmt: skip
    for name, part in parts.items():
        setattr(torch.cuda, name, part)
    torch.version.cuda = "0.0"
    # a view of which the CPU's fallback makes a copy: what is written there would be lost
    warnings.filterwarnings("error", ".*appears to be a view operator")
    if "RANK" in os.environ:
        from tests.pretend_nccl import register

        register()

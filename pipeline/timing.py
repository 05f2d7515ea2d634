"""The time that each phase of a step takes. For the tracker only: no hashed file holds it."""

import time

import torch
from tqdm import tqdm


class Stopwatch:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the call that starts a kernel returns before it ends
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"] = now - self.last
        self.last = now


def timing_row(seconds: dict[str, float], samples: int, device: torch.device) -> dict[str, float]:
    """Phase times, throughput and peak memory of a step. samples: all completions that it drew, used or not."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    total = sum(seconds.values())
    now = int(time.time() * 1000)
    return {
        "timestamp_ms": now,
        **seconds,
        "samples": samples,
        "samples_per_second": samples / total,
        "peak_memory_mb": peak,
    }


def time_left(seconds: float, count: int) -> str:
    """`01:20 left`, for `count` more items of `seconds` each."""
    return f"{tqdm.format_interval(seconds * count)} left"

"""Whether a CPU multiplies bfloat16 faster than float32. Without arithmetic for it, torch converts number by number."""

import time

import torch

from pipeline.arithmetic.environment import Arithmetic, cpu_flags
from pipeline.config.schema import ClassifierReward, EmbeddingReward, Params, plain_rewards

INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}  # as Linux names them on x86-64 and on arm64
SLOWER = 1.2  # times as long; a smaller ratio tells nothing, since the products take milliseconds
PORTABLE = "portable arithmetic multiplies bfloat16 in float32, which saves memory and no time"


def uses_bfloat16(params: Params) -> bool:
    """Whether the recipe, or a model of its reward, computes in bfloat16."""
    models = EmbeddingReward | ClassifierReward
    own = [table.precision for table in plain_rewards(params.selected_reward) if isinstance(table, models)]
    return "bfloat16" in [params.selected_recipe.precision, *own]


def bfloat16_note(arithmetic: Arithmetic) -> str | None:
    """A note on the speed of bfloat16 on this CPU, in one line; None if bfloat16 is not slower than float32."""
    if arithmetic == "portable":
        native = "is faster" if INSTRUCTIONS & cpu_flags() else "would be slower"
        return f"{PORTABLE}; train.arithmetic: native {native} on this CPU"
    if (ratio := products_ratio()) < SLOWER:
        return None
    return (
        f"this CPU has no arithmetic for bfloat16: its products take {ratio:.1f} times as long as in float32 (measured "
        "now). precision: float32 is the fastest; train.arithmetic: portable saves the memory at float32's speed"
    )


def products_ratio(size: int = 512) -> float:
    """Seconds of a matrix product in bfloat16 over those of one in float32, [size, size] each, the best of five."""
    return _seconds(torch.bfloat16, size) / _seconds(torch.float32, size)


def _seconds(dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, dtype=dtype)
    taken = []
    for _ in range(6):  # the first one chooses kernels
        start = time.perf_counter()
        torch.nn.functional.linear(a, a)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])

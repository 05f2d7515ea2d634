"""How the models behind rewards are loaded and fed: the encoder and the classifiers alike."""

from typing import Any

import torch


def loading_options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`. dtype: of weights and activations."""
    # eager: as fast as the fused attention of a CPU for short texts, and faster where portable kernels take its place
    attention = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    return {"local_files_only": True, "dtype": dtype, **attention}


def texts_at_once(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 128  # 16 fit the cache of a CPU, which is twice as fast

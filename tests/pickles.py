"""Pickles in the place of weights, one that would run code among them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Malicious:
    """A pickle that runs code when it is loaded carelessly."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("run-by-the-pickle"),))


def pickled_weights(content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))

    return write

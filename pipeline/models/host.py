"""Tensors on the CPU: what reads number after number waits for a GPU once and not each time."""

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record", bound=Any)  # a dataclass


def on_cpu(record: Record) -> Record:
    """A dataclass with its tensors on the CPU; those that lie there are not copied."""
    tensors = {
        field.name: value.cpu()
        for field in dataclasses.fields(record)
        if isinstance(value := getattr(record, field.name), Tensor)
    }
    return dataclasses.replace(record, **tensors)

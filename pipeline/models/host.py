"""Tensors on the CPU: what reads number after number waits for a GPU once and not each time."""

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record", bound=Any)  # a dataclass


def on_cpu(record: Record) -> Record:
    """A dataclass with its tensors, and those of dataclasses in it, on the CPU; those that lie there are not copied."""
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    moved: dict[str, Any] = {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
    moved |= {name: on_cpu(value) for name, value in values.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(record, **moved)

"""Moves tensors to the CPU, so that code which then reads many single numbers waits for a GPU only once."""

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record", bound=Any)  # a dataclass


def on_cpu(record: Record) -> Record:
    """The dataclass with its tensors on the CPU, also in nested dataclasses. Tensors on the CPU are not copied."""
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    moved: dict[str, Any] = {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
    moved |= {name: on_cpu(value) for name, value in values.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(record, **moved)

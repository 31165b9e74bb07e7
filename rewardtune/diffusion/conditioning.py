"""Conditionings, which are opaque to the engine but for this: tensors inside of data classes, mappings and lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def mapped(function: Callable[[Tensor, Any], Tensor], value: Any, like: Any = None) -> Any:
    """The same structure with `function` of each tensor and of what stands in its place in `like`."""
    if isinstance(value, Tensor):
        return function(value, like)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{n: mapped(function, getattr(value, n), getattr(like, n, None)) for n in names})
    if isinstance(value, Mapping):
        known = like if isinstance(like, Mapping) else {}
        return {name: mapped(function, part, known.get(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        others = like if isinstance(like, list | tuple) and len(like) == len(value) else [None] * len(value)
        parts = [mapped(function, part, other) for part, other in zip(value, others, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def stacked(parts: Sequence[Part]) -> Part:
    """For `Pipeline.join` where every tensor has the batch in front and one size behind it: one after another."""
    joined: Part = _stacked(parts)
    return joined


def _stacked(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        return replace(first, **{name: _stacked([getattr(part, name) for part in parts]) for name in names})
    if isinstance(first, Mapping):
        return {name: _stacked([part[name] for part in parts]) for name in first}
    return first

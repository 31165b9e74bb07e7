"""Optimiser and learning-rate schedule by name; their state as tensors and plain JSON. Used by `train.py`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.errors import MissingExtra, RecipeError

NAMES = ("adamw", "adamw8bit", "prodigy")


def build(
    parameters: Iterable[nn.Parameter],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> torch.optim.Optimizer:
    """The optimiser called `name`. Raises MissingExtra when its package is not installed, RecipeError when unknown."""
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtra("optimizer.name adamw8bit needs bitsandbytes: pip install bitsandbytes.") from error
        return AdamW8bit(parameters, **settings)  # type: ignore[no-any-return]
    if name == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise MissingExtra("optimizer.name prodigy needs prodigyopt: pip install prodigyopt.") from error
        return Prodigy(parameters, **settings)  # type: ignore[no-any-return]
    raise RecipeError(f"optimizer.name {name!r} is unknown; there are: {', '.join(NAMES)}.")


def build_schedule(
    optimizer: torch.optim.Optimizer, *, name: str, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule `constant`, `linear` or `cosine`, with a linear warm-up."""
    from diffusers.optimization import get_scheduler

    kind = "constant_with_warmup" if name == "constant" and warmup_steps else name
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)


def advance(schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """One step of the schedule; it counts skipped optimiser steps too, so that it always ends with the run."""
    with warnings.catch_warnings():
        # torch warns when the very first optimiser step was skipped.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        schedule.step()


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of any torch optimiser as (tensors for safetensors, the rest for JSON)."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {"state": {}, "groups": {}}
    for kind, entries in (("state", state["state"].items()), ("groups", enumerate(state["param_groups"]))):
        for index, values in entries:
            plain = rest[kind].setdefault(str(index), {})
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{key}"] = value
                else:
                    plain[key] = value
    return tensors, rest


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Give `optimizer` the state that `pack` took from one with the same parameters."""
    groups = optimizer.state_dict()["param_groups"]
    for index, group in enumerate(groups):
        for key, value in rest["groups"][str(index)].items():
            # JSON has no tuples.
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for name, tensor in tensors.items():
        kind, number, key = name.split(".", 2)
        if kind == "state":
            state.setdefault(int(number), {})[key] = tensor
        else:
            groups[int(number)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})

"""Optimiser and learning-rate schedule by name; their state as tensors and plain JSON. Used by `loop.py`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.errors import MissingExtra, RecipeError
from rewardtune.recipe.packages import OPTIMIZERS
from rewardtune.training.shard import held

_IN_A_BLOCK = re.compile(r"\.\d+\..+\.")
"""A weight inside a numbered block (`layers.3.attention.to_q.weight`), not an embedding, a first or a last layer."""


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of repeated blocks, AdamW for all other parameters, as one optimiser.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix; its
    author leaves embeddings, first and last layers and vectors to AdamW. Both take the same `lr` and `weight_decay`,
    since Muon's update is scaled to the RMS of AdamW's (arXiv 2502.16982, section 2.2). The arithmetic is torch's.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
    ) -> None:
        matrices = [p for n, p in parameters.items() if p.ndim == 2 and _IN_A_BLOCK.search(n)]
        known = {id(p) for p in matrices}
        others = [p for p in parameters.values() if id(p) not in known]
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, **shared, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, **shared, betas=betas, eps=eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on this optimiser's own groups and state, which schedules and checkpoints see."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def build(
    parameters: Mapping[str, nn.Parameter],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> torch.optim.Optimizer:
    """The optimiser called `name` for parameters by their full names.

    Raises MissingExtra when its package is not installed, RecipeError when it is unknown.
    """
    weights = list(parameters.values())
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    if name == "adamw":
        return torch.optim.AdamW(weights, **settings)
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtra("optimizer.name adamw8bit needs bitsandbytes: pip install bitsandbytes.") from error
        return AdamW8bit(weights, **settings)  # type: ignore[no-any-return]
    if name == "muon":
        return Muon(parameters, **settings)
    if name == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise MissingExtra("optimizer.name prodigy needs prodigyopt: pip install prodigyopt.") from error
        return Prodigy(weights, **settings)  # type: ignore[no-any-return]
    raise RecipeError(f"optimizer.name {name!r} is unknown; there are: {', '.join(OPTIMIZERS)}.")


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
            for key, value in _flat(values).items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{key}"] = value
                else:
                    plain[key] = value
    return tensors, rest


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Give `optimizer` the state that `pack` took from one with the same parameters."""
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, group in enumerate(groups):
        for key, value in rest["groups"][str(index)].items():
            # JSON has no tuples.
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for name, tensor in tensors.items():
        kind, number, key = name.split(".", 2)
        if kind == "state":
            state.setdefault(int(number), {})[key] = held(parameters[int(number)], tensor)
        else:
            groups[int(number)][key] = tensor
    optimizer.load_state_dict({"state": {i: _nested(v) for i, v in state.items()}, "param_groups": groups})


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """bitsandbytes keeps the quantised state of a parameter in a mapping of its own: its keys get the outer one before
    them."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return out


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `_flat` was given."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        outer, dot, inner = key.partition(".")
        if dot:
            out.setdefault(outer, {})[inner] = value
        else:
            out[key] = value
    return out

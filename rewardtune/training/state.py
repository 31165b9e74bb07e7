"""What training changes and a checkpoint holds: trained parameters, optimiser, schedule, moving average, counters.

`loop.py` moves it on step by step; `checkpoint.py` writes and reads it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewardtune.errors import RecipeError
from rewardtune.recipe.sections import OptimizerSection, TrainSection
from rewardtune.tasks import Task
from rewardtune.training import optim
from rewardtune.training.checkpoint import Checkpoint
from rewardtune.training.ema import Ema


@dataclass
class State:
    """All that a checkpoint holds, alive."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: Ema | None
    step: int = 0
    """Optimiser steps done, skipped ones included."""
    skipped: int = 0
    skipped_in_a_row: int = 0

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the parameters hold their moving average, if the run keeps one."""
        return self.ema.applied() if self.ema else nullcontext()

    def pack(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """(tensors by file, the rest for JSON)."""
        tensors, rest = optim.pack(self.optimizer)
        parts: dict[str, dict[str, Tensor]] = {"parameters": dict(self.parameters), "optimizer": tensors}
        if self.ema:
            parts["ema"] = self.ema.average
        schedule = {name: value for name, value in self.schedule.state_dict().items() if name != "lr_lambdas"}
        counters = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        averages = self.ema.updates if self.ema else 0
        return parts, {**counters, "optimizer": rest, "schedule": schedule, "ema_updates": averages}

    @torch.no_grad()
    def load(self, saved: Checkpoint) -> None:
        """Take everything back from a checkpoint. Raises RecipeError when it is of another set of parameters."""
        tensors = saved.tensors("parameters")
        here = {name: tuple(p.shape) for name, p in self.parameters.items()}
        there = {name: tuple(t.shape) for name, t in tensors.items()}
        if here != there:
            odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise RecipeError(
                f"{saved.path} holds other trained parameters than this recipe; the first that differs is {odd[0]!r} "
                f"(here {here.get(odd[0])}, there {there.get(odd[0])}). Use --fresh or another --out."
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        optim.unpack(self.optimizer, saved.tensors("optimizer"), saved.state["optimizer"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **saved.state["schedule"]})
        if self.ema and (saved.path / "ema.safetensors").exists():
            self.ema.load(saved.tensors("ema"), updates=saved.state["ema_updates"])
        elif self.ema:
            # train.ema_decay was added with --allow-changed: the average starts from the weights as they are.
            self.ema.load(tensors, updates=0)
        self.step, self.skipped = saved.step, int(saved.state["skipped"])
        self.skipped_in_a_row = int(saved.state["skipped_in_a_row"])


def build_state(task: Task, *, train: TrainSection, optimizer: OptimizerSection) -> State:
    """Optimiser, schedule and moving average over the task's trained parameters, which become fp32."""
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for module_name, module in task.trainable.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                # bf16 loses updates smaller than 1/256 of a weight, so the trained copy is fp32.
                parameter.data = parameter.data.float()
                parameters[f"{module_name}.{name}"] = parameter
    if not parameters:
        raise RecipeError(f"nothing to train: no parameter of {', '.join(task.trainable) or 'the task'} is trainable.")
    built = optim.build(
        parameters,
        name=optimizer.name,
        lr=optimizer.lr,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        eps=optimizer.eps,
    )
    schedule = optim.build_schedule(
        built, name=optimizer.schedule, warmup_steps=optimizer.warmup_steps, steps=train.steps
    )
    ema = Ema(parameters, decay=train.ema_decay) if train.ema_decay is not None else None
    return State(parameters, built, schedule, ema)

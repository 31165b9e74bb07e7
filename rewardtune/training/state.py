"""What training changes and a checkpoint holds: trained parameters, optimiser, schedule, moving average, counters.

`loop.py` moves it on step by step; `checkpoint.py` writes and reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewardtune.errors import RecipeError
from rewardtune.recipe.sections import OptimizerSection, TrainSection
from rewardtune.tasks import KeepsFrozen, Remembers, Task
from rewardtune.training import optim, shard
from rewardtune.training.checkpoint import Checkpoint
from rewardtune.training.ema import Ema
from rewardtune.training.shard import Shards

if TYPE_CHECKING:
    from rewardtune.training.runtime import Runtime


SHARED = "shared."
"""Names of a task's memory that are the same in every process (tasks.Remembers)."""


@dataclass
class State:
    """All that a checkpoint holds, alive."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: Ema | None
    shards: Shards = field(default_factory=Shards)
    memory: Remembers | None = None
    """The task, where it has one."""
    where: Runtime | None = None
    step: int = 0
    """Optimiser steps done, skipped ones included."""
    skipped: int = 0
    skipped_in_a_row: int = 0

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the parameters hold their moving average, if the run keeps one."""
        return self.ema.applied() if self.ema else nullcontext()

    def pack(self, *, keep: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """(whole tensors by file, the rest for JSON). Sharded runs call it in all processes; `keep` where used."""
        tensors, rest = optim.pack(self.optimizer)
        parts: dict[str, Mapping[str, Tensor]] = {"parameters": self.parameters, "optimizer": tensors}
        if self.ema:
            parts["ema"] = self.ema.average
        files = {name: shard.gathered(tensors, keep=keep) for name, tensors in parts.items()}
        if self.memory is not None and (remembered := self._remembered(self.memory, keep=keep)):
            files["memory"] = remembered
        schedule = {name: value for name, value in self.schedule.state_dict().items() if name != "lr_lambdas"}
        counters = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        averages = self.ema.updates if self.ema else 0
        return files, {**counters, "optimizer": rest, "schedule": schedule, "ema_updates": averages}

    @torch.no_grad()
    def load(self, saved: Checkpoint) -> None:
        """Take everything back from a checkpoint. Raises RecipeError when it is of another set of parameters."""
        tensors = load_weights(self.parameters, saved, "parameters")
        optim.unpack(self.optimizer, saved.tensors("optimizer"), saved.state["optimizer"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **saved.state["schedule"]})
        if self.ema and (saved.path / "ema.safetensors").exists():
            self.ema.load(saved.tensors("ema"), updates=saved.state["ema_updates"])
        elif self.ema:
            # train.ema_decay was added with --allow-changed: the average starts from the weights as they are.
            self.ema.load(tensors, updates=0)
        if self.memory is not None and (saved.path / "memory.safetensors").exists():
            remembered = saved.tensors("memory")
            for name, value in remembered.items():
                mine = self.parameters.get(name.removeprefix(SHARED))
                if name.startswith(SHARED) and mine is not None:
                    remembered[name] = shard.held(mine, value)
            self.memory.recall(saved.step, remembered)
        self.step, self.skipped = saved.step, int(saved.state["skipped"])
        self.skipped_in_a_row = int(saved.state["skipped_in_a_row"])

    def _remembered(self, memory: Remembers, *, keep: bool) -> dict[str, Tensor]:
        """What the task remembers: once what is the same in every process, and all that is not."""
        held = memory.memory()
        files = shard.gathered({k: v for k, v in held.items() if k.startswith(SHARED)}, keep=keep)
        own = {k: v.detach().cpu() for k, v in held.items() if not k.startswith(SHARED)}
        for other in self.where.gather(own) if self.where is not None else [own]:
            files |= other
        return files


@torch.no_grad()
def load_weights(parameters: Mapping[str, nn.Parameter], saved: Checkpoint, part: str) -> dict[str, Tensor]:
    """Take the trained weights back from one file of a checkpoint, and return what it holds.

    Raises RecipeError when it is of another set of parameters.
    """
    tensors = saved.tensors(part)
    here = {name: tuple(p.shape) for name, p in parameters.items()}
    there = {name: tuple(t.shape) for name, t in tensors.items()}
    if here != there:
        odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise RecipeError(
            f"{saved.path} holds other trained parameters than this recipe; the first that differs is {odd[0]!r} "
            f"(here {here.get(odd[0])}, there {there.get(odd[0])}). Use --fresh or another --out."
        )
    for name, parameter in parameters.items():
        parameter.copy_(shard.held(parameter, tensors[name]))
    return tensors


def trained_parameters(task: Task) -> dict[str, nn.Parameter]:
    """The task's trained parameters by their full names; they become fp32. Raises RecipeError when there are none."""
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for module_name, module in task.trainable.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                if parameter.dtype != torch.float32:
                    # bf16 loses updates smaller than 1/256 of a weight, so the trained copy is fp32.
                    parameter.data = parameter.data.float()
                parameters[f"{module_name}.{name}"] = parameter
    if not parameters:
        raise RecipeError(f"nothing to train: no parameter of {', '.join(task.trainable) or 'the task'} is trainable.")
    return parameters


def build_state(task: Task, *, train: TrainSection, optimizer: OptimizerSection, where: Runtime) -> State:
    """Optimiser, schedule and moving average over the task's trained parameters, which are split where asked."""
    parameters = trained_parameters(task)
    shards = Shards()
    if train.shard:
        beside = task.frozen if isinstance(task, KeepsFrozen) else {}
        shards = shard.split({**task.trainable, **beside}, where=where)
        # FSDP puts others in their place.
        parameters = trained_parameters(task)
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
    memory = task if isinstance(task, Remembers) else None
    return State(parameters, built, schedule, ema, shards, memory, where)

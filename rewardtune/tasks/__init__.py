"""Tasks: one file per thing that can be trained. `training/loop.py` drives any of them and knows none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from rewardtune.types import StepOutput


class Task(Protocol):
    """What the loop asks of an algorithm. The loop owns optimiser, accumulation, clipping, checkpoints and logging.

    A micro-batch is named by its optimiser step and the global indices of its samples, so a resumed run or another
    number of processes sees the same data; no iterator state exists.
    """

    trainable: Mapping[str, nn.Module]
    """Modules that hold the trained parameters (requires_grad) beside frozen ones; keys name them in checkpoints."""

    def batch(self, step: int, indices: Sequence[int]) -> Any:
        """Collect, without gradient, the samples with these global indices (step * global batch + position)."""
        ...

    def step(self, batch: Any) -> StepOutput:
        """Mean loss over the micro-batch, with graph."""
        ...

    def samples(self) -> Tensor | None:
        """Images of the recipe's fixed prompts and seeds under the current weights, (N, 3, H, W) in [0, 1]; or None."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Held-out numbers under the current weights; may be empty."""
        ...

    def export(self, folder: Path, provenance: Mapping[str, str]) -> None:
        """Write what the next stage or another tool loads into the empty `folder`, and check that it reloads."""
        ...


@runtime_checkable
class KeepsFrozen(Protocol):
    """A task with whole frozen models beside what it trains: with `train.shard` these are split as well."""

    frozen: Mapping[str, nn.Module]


@runtime_checkable
class Remembers(Protocol):
    """A task with a memory beside its weights: what earlier steps drew and later ones still use."""

    def memory(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint keeps for it. Names that begin with `shared.` are the same in every process;
        those of the others are put together."""
        ...

    def recall(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `memory` gave after `step` steps, of all processes together."""
        ...

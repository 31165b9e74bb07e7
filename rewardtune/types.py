"""Data that travels between the parts; the shape legend.

B images or prompts, D rubric dimensions, K score levels, C H W channels and pixels, T sampling steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_EMPTY: Mapping[str, Any] = MappingProxyType({})


class Prompt(str):
    """A prompt: a plain string that may carry what some rewards need beside it (facts, wanted text, counts)."""

    metadata: Mapping[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] = _EMPTY) -> Self:
        prompt = super().__new__(cls, text)
        prompt.metadata = metadata
        return prompt


@dataclass(frozen=True)
class Score:
    """What a reward says of B images.

    value: (B,) float32, higher is better unless the card says otherwise.
    distribution: (B, D, K) probabilities over `levels`, each row sums to 1; None for a scalar reward.
    levels: (K,) the value of each level; given with `distribution`.
    dimensions: the D names, in order; given with `distribution`.
    parts: name -> (B,) further numbers to log, e.g. one per dimension.
    """

    value: Tensor
    distribution: Tensor | None = None
    levels: Tensor | None = None
    dimensions: tuple[str, ...] = ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Score:
        """The same on another device."""
        return Score(
            self.value.to(device),
            None if self.distribution is None else self.distribution.to(device),
            None if self.levels is None else self.levels.to(device),
            self.dimensions,
            {name: part.to(device) for name, part in self.parts.items()},
        )


@dataclass(frozen=True)
class StepOutput:
    """What a task returns for one micro-batch: a scalar loss with graph, and numbers to log (floats)."""

    loss: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)

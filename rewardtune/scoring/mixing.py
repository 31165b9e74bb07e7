"""Several rewards' values of an image -> the one number that is maximised.

Each reward t gives u_t = weight * (value - offset) / scale, its sign turned where lower is better. `min` and `soft-min`
look at the worst reward of each image, so that none can be bought with another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """kind `sum`: sum_t u_t. `min`: min_t u_t. `soft-min`: -temperature * log(mean_t exp(-u_t / temperature)), which is
    the smallest as the temperature goes to 0, the mean as it grows, and u where all are equal."""

    kind: Literal["sum", "min", "soft-min"] = "sum"
    temperature: float = 0.1

    def value(self, values: Sequence[Tensor]) -> Tensor:
        """u_t, each (B,) -> (B,), with graph."""
        if self.kind == "sum":
            return sum(values[1:], start=values[0])
        table = torch.stack(list(values))
        if self.kind == "min":
            return table.min(dim=0).values
        heat = self.temperature
        return -heat * (torch.logsumexp(-table / heat, dim=0) - math.log(len(values)))

    def shares(self, values: Sequence[Tensor]) -> list[Tensor]:
        """u_t, each (B,) -> the derivative of `value` by each, (B,): 1; 1 for the smallest alone; a softmax."""
        table = torch.stack([value.detach() for value in values])
        if self.kind == "sum":
            shares = torch.ones_like(table)
        elif self.kind == "min":
            shares = torch.zeros_like(table).scatter_(0, table.argmin(dim=0, keepdim=True), 1.0)
        else:
            shares = (-table / self.temperature).softmax(dim=0)
        return list(shares)

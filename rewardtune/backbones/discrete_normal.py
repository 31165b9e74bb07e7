"""A normal distribution on a grid of levels: a mean and a deviation as a distribution of scores like any other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def discrete_normal(mean: Tensor, deviation: Tensor, levels: Tensor) -> Tensor:
    """(B, K) probabilities on evenly spaced, rising levels (K,); mean and deviation: (B,). Differentiable in both.

    Level k gets the mass under the hat function that is 1 there and 0 at its neighbours. Hats add up to straight lines
    exactly, so the expectation is `mean` itself and its gradient is 1, however narrow the distribution; the variance
    grows by at most a quarter of the squared step. What lies beyond the grid counts at its ends: there the
    expectation stops, so the grid must be wider than the scores.
    """
    double = torch.float32 if mean.device.type == "mps" else torch.float64  # second differences cancel digits
    m, s = mean.to(double).unsqueeze(-1), deviation.to(double).clamp(min=1e-6).unsqueeze(-1)
    points = levels.to(mean.device, double)
    step = points[1] - points[0]
    points = torch.cat([points[:1] - step, points, points[-1:] + step])
    z = (points - m) / s
    # below(x) = integral of the distribution function up to x; its second difference is the mass under a hat
    below = s * (z * torch.special.ndtr(z) + (-0.5 * z * z).exp() / math.sqrt(2 * math.pi))
    slope = below.diff(dim=-1) / step
    first, last = torch.zeros_like(slope[:, :1]), torch.ones_like(slope[:, :1])
    # the end levels take all mass beyond them
    slope = torch.cat([first, slope[:, 1:-1], last], dim=-1)
    return slope.diff(dim=-1).clamp(min=0).to(mean.dtype)

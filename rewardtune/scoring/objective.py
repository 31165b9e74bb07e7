"""From a score distribution to the number that is maximised: the whole distribution may count, not its mean alone.

Pure functions of probabilities (..., K) and level values (K,), differentiable in the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Statistic = Callable[[Tensor, Tensor], Tensor]


def expectation(probabilities: Tensor, levels: Tensor) -> Tensor:
    """Mean score, Z-Reward Eq. 2 and 16 (arXiv 2606.09076)."""
    return (probabilities * levels).sum(-1)


def deviation(probabilities: Tensor, levels: Tensor) -> Tensor:
    """Standard deviation of the score; the small floor keeps its gradient finite at certainty."""
    mean = expectation(probabilities, levels).unsqueeze(-1)
    return ((probabilities * (levels - mean).pow(2)).sum(-1) + 1e-6).sqrt()


def mean_minus_deviation(probabilities: Tensor, levels: Tensor, *, weight: float) -> Tensor:
    """Mean minus `weight` standard deviations."""
    return expectation(probabilities, levels) - weight * deviation(probabilities, levels)


def lower_tail_mean(probabilities: Tensor, levels: Tensor, *, share: float) -> Tensor:
    """Mean of the worst `share` of the mass: conditional value at risk (Rockafellar and Uryasev 2000)."""
    order = levels.argsort()
    p, v = probabilities[..., order], levels[order]
    before = p.cumsum(-1) - p
    counted = torch.minimum(p, (share - before).clamp(min=0))
    return (counted * v).sum(-1) / share


def exceedance(probabilities: Tensor, levels: Tensor, *, threshold: float) -> Tensor:
    """Probability of a score of at least `threshold`."""
    return probabilities[..., levels >= threshold - 1e-6].sum(-1)


def statistic(kind: str, **settings: float) -> Statistic:
    """The function behind a recipe's `statistic:` block."""
    functions: dict[str, Callable[..., Tensor]] = {
        "expectation": expectation,
        "mean-minus-deviation": mean_minus_deviation,
        "lower-tail-mean": lower_tail_mean,
        "exceedance": exceedance,
    }
    return partial(functions[kind], **settings)

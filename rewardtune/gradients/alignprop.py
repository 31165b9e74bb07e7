"""AlignProp (arXiv 2310.03739, section 4): the full chain, cut at a random step: one cut a trajectory."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Choice, Draws, Finished
from rewardtune.gradients.draft import through


def alignprop(
    chain: Chain, noise: Tensor, draws: Draws, *, longest: float, memory: Literal["fast", "flat"]
) -> Finished:
    """K, the steps with gradient, is drawn evenly from 1 to `longest`, a fraction of the chain."""
    return through(chain, noise, choice(draws, longest=longest, memory=memory))


def choice(draws: Draws, *, longest: float, memory: Literal["fast", "flat"]) -> Choice:
    """The last K steps. Drawn when the chain's length is known, and so anew at every call."""

    def steps(total: int) -> range:
        return range(total)[-draws.shared.randint(1, max(1, round(longest * total))) :]

    return Choice(steps, memory == "flat")

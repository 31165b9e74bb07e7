"""AlignProp (arXiv 2310.03739, section 4): the full chain, cut at a random step: one cut a trajectory."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Draws, Finished
from rewardtune.gradients.draft import draft


def alignprop(
    chain: Chain, noise: Tensor, draws: Draws, *, longest: float, memory: Literal["fast", "flat"]
) -> Finished:
    """K, the steps with gradient, is drawn evenly from 1 to `longest`, a fraction of the chain."""
    most = max(1, round(longest * len(chain)))
    return draft(chain, noise, draws, last_steps=draws.shared.randint(1, most), memory=memory)

"""DRaFT-K (arXiv 2309.17400, section 4): gradient through the last K denoising steps, K up to the full chain."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Draws, Finished


def draft(
    chain: Chain, noise: Tensor, draws: Draws, *, last_steps: int | Literal["all"], memory: Literal["fast", "flat"]
) -> Finished:
    """`flat` keeps only the latents between steps and recomputes each step on the way back."""
    total = len(chain)
    first = 0 if last_steps == "all" else total - last_steps
    latents = chain.run(chain.start(noise), 0, first)
    for i in range(first, total):
        latents = chain.advance(i, latents, recompute=memory == "flat")
    return Finished(latents)

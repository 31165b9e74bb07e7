"""DRaFT-K (arXiv 2309.17400, section 4): gradient through the last K denoising steps, K up to the full chain."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Choice, Draws, Finished


def draft(
    chain: Chain, noise: Tensor, draws: Draws, *, last_steps: int | Literal["all"], memory: Literal["fast", "flat"]
) -> Finished:
    """`flat` keeps only the latents between steps and recomputes each step on the way back."""
    chosen = choice(last_steps=last_steps, memory=memory)
    steps = range(len(chain))[chosen.gradient_steps]
    latents = chain.run(chain.start(noise), 0, steps.start)
    for i in steps:
        latents = chain.advance(i, latents, recompute=chosen.recompute)
    return Finished(latents)


def choice(*, last_steps: int | Literal["all"], memory: Literal["fast", "flat"]) -> Choice:
    """The last K steps, or all of them."""
    return Choice(slice(None) if last_steps == "all" else slice(-last_steps, None), memory == "flat")

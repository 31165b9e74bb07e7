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
    return through(chain, noise, choice(draws, last_steps=last_steps, memory=memory))


def choice(draws: Draws, *, last_steps: int | Literal["all"], memory: Literal["fast", "flat"]) -> Choice:
    """The last K steps, or all of them."""
    first = None if last_steps == "all" else -last_steps
    return Choice(lambda total: range(total)[first:], memory == "flat")


def through(chain: Chain, noise: Tensor, chosen: Choice) -> Finished:
    """The chain with gradient through the chosen steps, which are its last ones."""
    steps = chosen.gradient_steps(len(chain))
    latents = chain.run(chain.start(noise), 0, steps.start)
    for i in steps:
        latents = chain.advance(i, latents, recompute=chosen.recompute)
    return Finished(latents)

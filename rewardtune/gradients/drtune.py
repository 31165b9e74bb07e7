"""DRTune (arXiv 2405.00760, Algorithm 1): gradient at steps spread over the chain, none through the denoiser's input.

What remains between steps is the scheduler's own arithmetic, so early steps are reached without products of Jacobians.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Draws, Finished


def drtune(
    chain: Chain,
    noise: Tensor,
    draws: Draws,
    *,
    train_steps: int,
    early_stop: int,
    memory: Literal["fast", "flat"],
) -> Finished:
    """`train_steps` equally spaced steps train, the first at random; the chain stops 1 to `early_stop` steps before its
    end, at random, and the reward sees the x0 estimate there."""
    total = len(chain)
    spacing = total // train_steps
    first = draws.shared.randrange(spacing)
    training = {first + k * spacing for k in range(train_steps)}
    stop = total - draws.shared.randint(1, early_stop)
    latents = chain.start(noise)
    for i in range(stop):
        trains = i in training
        latents = chain.advance(
            i, latents, denoiser="detached" if trains else "frozen", recompute=trains and memory == "flat"
        )
    # the step of the estimate always trains, or a late stop could leave nothing that does
    return Finished(chain.clean(stop, latents, chain.predict(stop, latents.detach())))

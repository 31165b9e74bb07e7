"""FlowBP-Sparse (arXiv 2606.11075): a few late steps carry gradient, the reward sees the sample itself.

The paper samples without gradient, predicts the chosen steps again, adds the steps up (Euler) and puts the sample's
value under the sum. Taking the chosen steps with gradient while sampling gives the same value and gradient in one pass:
the latents between steps carry the schedulers' arithmetic only, which for Euler is that sum.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Draws, Finished


def flowbp_sparse(
    chain: Chain,
    noise: Tensor,
    draws: Draws,
    *,
    active_steps: int,
    late_bias: float,
    rescale: float,
    memory: Literal["fast", "flat"],
) -> Finished:
    """`active_steps` distinct steps, step i with weight (i + 1)^late_bias. `rescale`: from 0 to 1, how far the gradient
    is scaled up to make good for the steps without one, by how much of the sample's way is theirs."""
    total = len(chain)
    left = list(range(total))
    active: set[int] = set()
    for _ in range(active_steps):
        step = draws.shared.choices(left, [(i + 1) ** late_bias for i in left])[0]
        active.add(step)
        left.remove(step)
    moved = chain.contributions()
    strength = 1 + rescale * (sum(moved) / max(sum(moved[i] for i in active), 1e-8) - 1)
    latents = chain.start(noise)
    for i in range(total):
        trains = i in active
        latents = chain.advance(
            i,
            latents,
            denoiser="detached" if trains else "frozen",
            recompute=trains and memory == "flat",
            strength=strength if trains else 1.0,
        )
    return Finished(latents)

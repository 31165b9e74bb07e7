"""DRaFT-K (arXiv 2309.17400, section 4): gradient through the last K denoising steps, K up to the full chain."""

from __future__ import annotations

import random
from typing import Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewardtune.diffusion.rollout import Chain


def draft(
    chain: Chain,
    noise: Tensor,
    rng: random.Random,
    *,
    last_steps: int | Literal["all"],
    memory: Literal["fast", "flat"],
) -> Tensor:
    """`flat` keeps only the latents between steps and recomputes each step on the way back."""
    total = len(chain)
    first = 0 if last_steps == "all" else total - last_steps
    latents = chain.run(noise, 0, first)
    for i in range(first, total):
        if memory == "flat":
            latents = checkpoint(chain.advance, i, latents, use_reentrant=False, preserve_rng_state=False)
        else:
            latents = chain.advance(i, latents)
    return latents

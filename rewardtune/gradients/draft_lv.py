"""DRaFT-LV (arXiv 2309.17400, section 4.2): the last step's gradient, averaged over noise put on the sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Draws, Finished


def draft_lv(chain: Chain, noise: Tensor, draws: Draws, *, copies: int, memory: Literal["fast", "flat"]) -> Finished:
    """`copies` of each sample are noised to the last step's level anew, and denoised in one step with gradient."""
    last = len(chain) - 1
    finished = chain.run(chain.start(noise), 0, len(chain))
    # the estimate, not the scheduler's step: a multistep solver would mix in its predictions for the former noise
    seen = [
        chain.clean(last, chain.renoise(last, finished, draws.noise_like(finished)), recompute=memory == "flat")
        for _ in range(copies)
    ]
    return Finished(torch.cat(seen))

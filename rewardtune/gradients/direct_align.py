"""Direct-Align (SRPO, arXiv 2509.06942, section 3): noise that is known is put on the sample and taken off again, with
one predicted step between, so that early steps can be trained on an almost clean image.

With a relative reward (`rewards[].relative`) this is SRPO. The way back, from less noise to more, is trained against
the reward, which the paper uses to hold the model to what both phrases share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Draws, Finished


def direct_align(
    chain: Chain, noise: Tensor, draws: Draws, *, earliest: float, latest: float, span: int, inversion: float
) -> Finished:
    """`earliest`, `latest`: fractions of the chain between which the step lies. `span`: over how many steps of the
    chain the one prediction carries. `inversion`: weight of the way back; 0 leaves it out."""
    last = len(chain) - 1
    # pure noise holds nothing of the sample that could be recovered from it
    low = max(1, min(round(earliest * len(chain)), last - span))
    high = max(min(round(latest * len(chain)) - 1, last - span), low)
    noisier = draws.shared.randint(low, high)
    cleaner = noisier + span
    sample = chain.run(chain.start(noise), 0, len(chain))
    down = _through_one_step(chain, sample, noise, noisier, cleaner)
    if not inversion:
        return Finished(down)
    up = _through_one_step(chain, sample, noise, cleaner, noisier)
    ones = torch.ones(len(noise), device=noise.device)
    return Finished(torch.cat([down, up]), torch.cat([ones, -inversion * ones]))


def _through_one_step(chain: Chain, sample: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
    """The sample noised to `start`, moved to the level of `end` by one prediction, and the known noise taken off."""
    (signal, sigma), (signal_to, sigma_to) = chain.shares(start), chain.shares(end)
    latents = chain.renoise(start, sample, noise)
    clean = chain.clean(start, latents)
    # what the prediction takes for noise; DDIM's step (arXiv 2010.02502, Eq. 12), which for flow matching is Euler's
    said = (signal * sample + sigma * noise - signal * clean) / sigma
    moved = signal_to * clean + sigma_to * said
    return (moved - sigma_to * noise) / signal_to

"""ReFL (arXiv 2304.05977, Algorithm 1): one gradient step at a random late step; the reward sees its x0 estimate."""

from __future__ import annotations

import random

from torch import Tensor

from rewardtune.diffusion.rollout import Chain


def refl(chain: Chain, noise: Tensor, rng: random.Random, *, earliest: float, latest: float) -> Tensor:
    """`earliest` and `latest`: fractions of the chain between which the gradient step is drawn, at least one step."""
    last = len(chain) - 1
    low = min(round(earliest * len(chain)), last)
    high = max(min(round(latest * len(chain)) - 1, last), low)
    chosen = rng.randint(low, high)
    return chain.clean(chosen, chain.run(noise, 0, chosen))

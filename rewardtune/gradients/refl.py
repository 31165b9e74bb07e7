"""ReFL (arXiv 2304.05977, Algorithm 1): one gradient step at a random late step; the reward sees its x0 estimate.

Z-Reward (arXiv 2606.09076, section 6) extends it to earlier steps and gives no range: `earliest: 0` draws from all.
"""

from __future__ import annotations

from torch import Tensor

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Draws, Finished


def refl(chain: Chain, noise: Tensor, draws: Draws, *, earliest: float, latest: float) -> Finished:
    """`earliest` and `latest`: fractions of the chain between which the gradient step is drawn, at least one step."""
    last = len(chain) - 1
    low = min(round(earliest * len(chain)), last)
    high = max(min(round(latest * len(chain)) - 1, last), low)
    chosen = draws.shared.randint(low, high)
    return Finished(chain.clean(chosen, chain.run(chain.start(noise), 0, chosen)))

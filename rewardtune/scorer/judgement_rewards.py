"""What a judgement earns: Z-Reward's rewards (arXiv 2606.09076, Eq. 7, 10, 13), from the decoded distribution or, for
the paper's ablation, from the score in the text. `tasks/reward_gdso.py` turns them into advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from rewardtune.scorer import losses
from rewardtune.scorer.reasoning import Judgements, said_level, with_level
from rewardtune.scorer.rollouts import RollOut


def rewards(
    batch: RollOut, logits: Tensor, levels: Tensor, *, parsed: bool, pointwise: float, pairwise: float
) -> tuple[Tensor, dict[str, float]]:
    """(P, 2, G) rewards of judgements with logits (P, 2, G, K) over levels (K,), and their parts' means.

    parsed: of the level in the text, not of the expectation. pointwise, pairwise: weights (lambda of Eq. 13). A pair of
    which only the order is known has the pairwise part alone.
    """
    scores = levels[text_levels(batch, logits)] if parsed else logits.softmax(-1) @ levels
    rated, ratings, span = batch.rated, batch.ratings.to(scores), float(levels[-1] - levels[0])
    near = losses.pointwise_reward(scores[rated], ratings, span)
    gap = ratings[:, 0] - ratings[:, 1]
    apart = torch.stack(losses.pairwise_rewards(scores[rated, 0], scores[rated, 1], gap, span), 1)
    out = torch.zeros_like(scores)
    out[rated] = pointwise * near + pairwise * apart
    out[~rated] = pairwise * torch.stack(losses.order_rewards(scores[~rated, 0], scores[~rated, 1]), 1)
    parts = {"reward": out, "reward/pointwise": near, "reward/pairwise": apart}
    return out, {name: float(value.detach().mean()) for name, value in parts.items() if value.numel()}


def text_levels(batch: RollOut, logits: Tensor) -> Tensor:
    """(P, 2, G) index of the level that the text says: drawn from the distribution, as the model would write it."""
    if batch.levels is not None:
        return batch.levels
    return said_level(logits, batch.drawn)


def sampled_tokens(batch: RollOut, read: Judgements, *, parsed: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, T) of what was sampled, and their mask: the traces, and the level too where it is said."""
    assert read.log_probs is not None and read.mask is not None
    if not parsed:
        return read.log_probs, read.mask
    return with_level(read, text_levels(batch, read.logits.detach().unflatten(0, batch.drawn.shape)).flatten())

"""Losses and targets over score distributions: tensors in, tensors out, one function per equation.

Tasks that train a scorer call them. B images, D dimensions, K levels; a rating is a number, NaN where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hard_target(ratings: Tensor, levels: Tensor) -> Tensor:
    """One-hot on the nearest level, the higher one when two are equally near: the target of Z-Reward's Eq. 8.

    ratings: (...,) within or outside the levels' range. levels: (K,) rising. Returns (..., K); NaN gives NaN.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(ratings.contiguous(), middles, right=True)
    target = torch.nn.functional.one_hot(nearest, len(levels)).to(levels.dtype)
    return target.masked_fill(ratings.isnan()[..., None], torch.nan)


def two_hot_target(ratings: Tensor, levels: Tensor) -> Tensor:
    """Mass on the two neighbouring levels, so that the mean is the rating (DeQA-Score, arXiv 2501.11561, section 3).

    A rating on a level is one-hot; one outside the levels' range counts as the nearest end. (...,) -> (..., K).
    """
    inside = ratings.clamp(levels[0], levels[-1])
    upper = torch.bucketize(inside.nan_to_num(float(levels[0])).contiguous(), levels).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    share = ((inside - low) / (high - low))[..., None]
    at_high = torch.nn.functional.one_hot(upper, len(levels)).to(levels.dtype)
    at_low = torch.nn.functional.one_hot(upper - 1, len(levels)).to(levels.dtype)
    return share * at_high + (1 - share) * at_low


def histogram_target(ratings: Tensor, levels: Tensor) -> Tensor:
    """The annotators' distribution: the mean of their two-hot targets, over those who rated.

    ratings: (..., A), NaN for an annotator who did not. Returns (..., K); NaN where nobody did.
    """
    return two_hot_target(ratings, levels).nanmean(-2)


def distribution_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy between target and predicted distribution, mean over what was rated: scalar.

    logits: (B, D, K); target: (B, D, K), NaN rows are left out. With one-hot targets this is Z-Reward's Eq. 8 (for one
    reading a side), the negative log-probability of the rated level. Zero, with graph, when nothing was rated.
    """
    rated = ~target.isnan().any(-1)
    each = -(target.nan_to_num(0.0) * logits.log_softmax(-1)).sum(-1)
    return (each * rated).sum() / rated.sum().clamp(min=1)

"""Statistics of a score distribution against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rewardtune.scoring.objective import (
    deviation,
    exceedance,
    expectation,
    lower_tail_mean,
    mean_minus_deviation,
    statistic,
)

LEVELS = torch.tensor([1.0, 2.0, 3.0, 4.0])
P = torch.tensor([0.1, 0.2, 0.3, 0.4])


def test_expectation_and_deviation():
    assert expectation(P, LEVELS).item() == pytest.approx(3.0)  # .1 + .4 + .9 + 1.6
    assert deviation(P, LEVELS).item() == pytest.approx(1.0, abs=1e-5)  # .1*4 + .2*1 + 0 + .4*1 = 1
    assert mean_minus_deviation(P, LEVELS, weight=0.5).item() == pytest.approx(2.5, abs=1e-5)


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.1, 1.0), (0.2, 1.5), (0.3, (0.1 + 0.4) / 0.3), (0.5, (0.1 + 0.4 + 0.6) / 0.5), (1.0, 3.0)],
)
def test_lower_tail_mean(share, wanted):
    assert lower_tail_mean(P, LEVELS, share=share).item() == pytest.approx(wanted, abs=1e-5)


def test_lower_tail_mean_does_not_depend_on_the_order_of_levels():
    order = torch.tensor([2, 0, 3, 1])
    assert lower_tail_mean(P[order], LEVELS[order], share=0.5).item() == pytest.approx(2.2, abs=1e-5)


def test_exceedance_counts_the_threshold_itself():
    assert exceedance(P, LEVELS, threshold=3.0).item() == pytest.approx(0.7)
    assert exceedance(P, LEVELS, threshold=3.1).item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("expectation", {}), ("mean-minus-deviation", {"weight": 0.5}), ("lower-tail-mean", {"share": 0.25}),
     ("exceedance", {"threshold": 3.0})],
)  # fmt: skip
def test_every_statistic_is_batched_and_differentiable_where_the_score_is_certain(kind, settings):
    logits = torch.full((2, 3, 4), -30.0)
    logits[..., 3] = 30.0
    logits.requires_grad_(True)
    value = statistic(kind, **settings)(logits.softmax(-1), LEVELS)
    assert value.shape == (2, 3)
    value.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_statistics_prefer_different_distributions():
    """Same mean, different spread: only the ones that read more than the mean tell them apart."""
    sure, torn = torch.tensor([0.0, 0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.0, 0.5])
    assert expectation(sure, LEVELS) == expectation(torn, LEVELS)
    assert mean_minus_deviation(sure, LEVELS, weight=1.0) > mean_minus_deviation(torn, LEVELS, weight=1.0)
    assert lower_tail_mean(sure, LEVELS, share=0.25) > lower_tail_mean(torn, LEVELS, share=0.25)
    assert exceedance(torn, LEVELS, threshold=4.0) > exceedance(sure, LEVELS, threshold=4.0)

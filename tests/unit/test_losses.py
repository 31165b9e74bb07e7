"""Targets and cross-entropy of score distributions, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rewardtune.scorer.losses import distribution_cross_entropy, hard_target, histogram_target, two_hot_target

HALVES = torch.arange(1.0, 5.5, 0.5)
NAN = float("nan")


def test_hard_target_takes_the_nearest_level_and_the_higher_of_two():
    target = hard_target(torch.tensor([1.0, 3.2, 3.25, 3.3, 5.0]), HALVES)
    assert target.argmax(-1).tolist() == [0, 4, 5, 5, 8]
    assert target.sum(-1).tolist() == [1.0] * 5


def test_hard_target_outside_the_range_is_the_end():
    assert hard_target(torch.tensor([-2.0, 9.0]), HALVES).argmax(-1).tolist() == [0, 8]


def test_hard_target_of_uneven_levels_uses_their_middles():
    # middles of 1, 2, 5 are 1.5 and 3.5
    assert hard_target(torch.tensor([1.4, 3.4, 3.6]), torch.tensor([1.0, 2.0, 5.0])).argmax(-1).tolist() == [0, 1, 2]


def test_two_hot_target_splits_between_neighbours():
    target = two_hot_target(torch.tensor([3.6]), HALVES)[0]
    # 3.6 lies a fifth of the way from 3.5 to 4.0
    expected = torch.zeros(9)
    expected[5], expected[6] = 0.8, 0.2
    torch.testing.assert_close(target, expected)


def test_two_hot_target_keeps_the_mean_and_is_one_hot_on_levels():
    ratings = torch.tensor([[1.0, 1.1], [4.99, 2.5]])
    target = two_hot_target(ratings, HALVES)
    torch.testing.assert_close(target @ HALVES, ratings)
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 2))
    assert target[0, 0].tolist() == [1.0] + [0.0] * 8
    assert target[1, 1].tolist() == [0.0] * 3 + [1.0] + [0.0] * 5


def test_two_hot_target_outside_the_range_is_the_end():
    target = two_hot_target(torch.tensor([0.0, 7.0]), HALVES)
    assert target[0, 0] == 1.0 and target[1, 8] == 1.0


def test_histogram_target_counts_annotators_who_rated():
    ratings = torch.tensor([3.0, 3.0, 4.0, 4.5, NAN])
    target = histogram_target(ratings, HALVES)
    expected = torch.zeros(9)
    expected[4], expected[6], expected[7] = 0.5, 0.25, 0.25
    torch.testing.assert_close(target, expected)


def test_missing_ratings_are_missing_targets():
    assert hard_target(torch.tensor([NAN]), HALVES).isnan().all()
    assert two_hot_target(torch.tensor([NAN]), HALVES).isnan().all()
    assert histogram_target(torch.tensor([[NAN, NAN]]), HALVES).isnan().all()


def test_cross_entropy_of_a_hard_target_is_the_levels_log_probability():
    # softmax of (0, log 3) is (1/4, 3/4)
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert distribution_cross_entropy(logits, torch.tensor([[[0.0, 1.0]]])).item() == pytest.approx(-math.log(0.75))
    assert distribution_cross_entropy(logits, torch.tensor([[[0.5, 0.5]]])).item() == pytest.approx(
        -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    )


def test_cross_entropy_averages_over_what_was_rated():
    logits = torch.zeros(2, 2, 4, requires_grad=True)
    target = torch.full((2, 2, 4), NAN)
    target[0, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    loss = distribution_cross_entropy(logits, target)
    assert loss.item() == pytest.approx(math.log(4.0))
    loss.backward()
    assert logits.grad is not None
    # d/dlogit = p - target where rated, nothing elsewhere
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([-0.75, 0.25, 0.25, 0.25]))
    assert logits.grad[0, 1].abs().sum() == 0 and logits.grad[1].abs().sum() == 0


def test_cross_entropy_without_ratings_is_zero_with_a_graph():
    logits = torch.randn(1, 1, 3, requires_grad=True)
    loss = distribution_cross_entropy(logits, torch.full((1, 1, 3), NAN))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and logits.grad.abs().sum() == 0


def test_cross_entropy_is_least_at_the_target():
    target = torch.tensor([[[0.2, 0.5, 0.3]]])
    best = distribution_cross_entropy(target.log(), target)
    for shift in torch.eye(3):
        assert distribution_cross_entropy(target.log() + 0.1 * shift, target) > best

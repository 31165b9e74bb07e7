"""Mixing rewards: weights, scale, direction, statistics, names in the log, and values that are not there."""

from __future__ import annotations

import pytest
import torch

from rewardtune.errors import NonFiniteError, PluginError
from rewardtune.plugins import RewardCard
from rewardtune.scoring.objective import statistic
from rewardtune.scoring.reward_set import RewardSet, Term, reduce
from rewardtune.types import Score

IMAGES = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
PROMPTS = ["a", "b"]


class Brightness:
    def __init__(self, *, higher_is_better: bool = True, scale: float = 1.0, value=None) -> None:
        self.card = RewardCard(
            "brightness", "mean of all pixels", differentiable=True, needs_prompt=False, range=(0, 1), scale=scale,
            higher_is_better=higher_is_better,
        )  # fmt: skip
        self.value = value

    def score(self, images, prompts):
        return Score(images.mean((1, 2, 3)) if self.value is None else self.value)


class Levels:
    card = RewardCard("levels", "fixed", True, False, (1, 3), dimensions=("first", "second"))

    def score(self, images, prompts):
        rows = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]])
        return Score(torch.tensor([2.0, 2.0]), rows, torch.tensor([1.0, 2.0, 3.0]), ("first", "second"))


def test_weight_scale_and_direction():
    total, metrics = RewardSet(
        [Term(Brightness(scale=0.5), weight=2.0), Term(Brightness(higher_is_better=False), weight=1.0)]
    ).score(IMAGES, PROMPTS)
    assert torch.allclose(total, IMAGES.mean((1, 2, 3)) * 3)
    assert metrics["reward/brightness"] == pytest.approx(IMAGES.mean().item())


def test_dimension_weights_and_statistic():
    score = Levels().score(IMAGES, PROMPTS)
    assert reduce(score, Term(Levels())).tolist() == [2.0, 2.0]
    assert reduce(score, Term(Levels(), dimensions={"first": 3.0, "second": 1.0})).tolist() == [2.5, 2.0]
    worst = Term(Levels(), statistic=statistic("lower-tail-mean", share=0.5), dimensions={"first": 1.0})
    assert reduce(score, worst).tolist() == [3.0, 1.0]


def test_every_dimension_has_a_curve_of_its_own():
    _, metrics = RewardSet([Term(Levels())]).score(IMAGES, PROMPTS)
    assert metrics == {"reward/levels": 2.0, "reward/levels/first": 2.5, "reward/levels/second": 1.5}


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor([0.5, float("nan")]), NonFiniteError),
        (torch.tensor([0.5]), PluginError),
        (torch.tensor(0.5), PluginError),
    ],
)
def test_a_missing_or_non_finite_reward_is_never_a_number(value, error):
    with pytest.raises(error, match="brightness"):
        RewardSet([Term(Brightness(value=value))]).score(IMAGES, PROMPTS)

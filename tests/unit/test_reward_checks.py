"""`rewards test` finds each way to break the contract, and only that one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewardtune.plugins import RewardCard
from rewardtune.scoring.checks import check_reward, probe_images
from rewardtune.types import Score

CARD = RewardCard("toy", "a toy", differentiable=True, needs_prompt=False, range=(0.0, 1.0), native_resolution=16)


class Toy:
    """Mean of the squared pixels; a test swaps in another formula."""

    def __init__(self, formula=None, **card):
        self.card = replace(CARD, **card)
        self.formula = formula or (lambda images, prompts: (images**2).mean((1, 2, 3)))

    def score(self, images, prompts):
        found = self.formula(images, prompts)
        return found if isinstance(found, Score) else Score(found)


def failures(reward) -> set[str]:
    return {check.name for check in check_reward(reward) if not check.passed}


def length(prompts):
    return torch.tensor([len(prompt) for prompt in prompts]) / 1000.0


def two_levels(images, prompts, total=1.0):
    high = images.mean((1, 2, 3))
    table = torch.stack([total - high, high], -1)[:, None]
    return Score(high, distribution=table, levels=torch.tensor([0.0, 1.0]), dimensions=("tone",))


class Drifting:
    """Never gives the same answer twice."""

    card = CARD

    def __init__(self):
        self.calls = 0

    def score(self, images, prompts):
        self.calls += 1
        return Score((images**2).mean((1, 2, 3)) + 1e-3 * self.calls)


@pytest.mark.parametrize(
    "reward",
    [
        Toy(),
        Toy(lambda images, prompts: images.mean((1, 2, 3)) / 2 + length(prompts), needs_prompt=True),
        Toy(lambda images, prompts: images.detach().mean((1, 2, 3)), differentiable=False),
        Toy(two_levels, dimensions=("tone",)),
    ],
)
def test_honest_rewards_pass(reward):
    assert failures(reward) == set()


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (Toy(lambda images, prompts: images.mean((1, 2, 3)) * float("nan")), "one finite value an image"),
        (Toy(lambda images, prompts: images.mean()), "one finite value an image"),
        (Toy(lambda images, prompts: images.mean((1, 2, 3)).double()), "one finite value an image"),
        (Toy(lambda images, prompts: 5 * images.mean((1, 2, 3))), "one finite value an image"),
        (Toy(lambda i, p: i.mean((1, 2, 3)) - i.mean() / 2 + 0.3), "independent of batch mates"),
        (Toy(lambda i, p: i.mean((1, 2, 3)) - i.mean() / 2 + 0.3), "no gradient across images"),
        (Toy(lambda images, prompts: images.mean((1, 2, 3)) / 2 + length(prompts)), "prompt is read as the card says"),
        (Toy(needs_prompt=True), "prompt is read as the card says"),
        (Toy(lambda images, prompts: images.detach().mean((1, 2, 3))), "gradient reaches every image"),
        (Toy(lambda i, p: i.mean((1, 2, 3)) * torch.tensor([1.0, 0.0, 1.0])[: len(i)]), "gradient reaches every image"),
        (Toy(lambda i, p: (i + (i**2 - i).detach()).mean((1, 2, 3))), "gradient equals finite differences"),
        (Toy(differentiable=False), "no graph, as the card says"),
        (Toy(dimensions=("tone",)), "distribution"),
        (Toy(lambda i, p: two_levels(i, p, total=1.1), dimensions=("tone",)), "distribution"),
        (Toy(two_levels, dimensions=("colour",)), "distribution"),
        (Drifting(), "deterministic"),
    ],
)
def test_each_breach_is_found(reward, expected):
    assert expected in failures(reward)


def test_a_reward_that_raises_fails_every_check_and_stops_nothing():
    def broken(images, prompts):
        raise KeyError("weights")

    checks = check_reward(Toy(broken))
    assert not any(check.passed for check in checks)
    assert all("raised KeyError: 'weights'" in check.found for check in checks)


def test_a_cut_graph_and_a_zero_gradient_are_called_what_they_are():
    cut = {check.found for check in check_reward(Toy(lambda i, p: i.detach().mean((1, 2, 3)))) if not check.passed}
    assert len(cut) == 1 and "Something in `score` cuts it: detach" in cut.pop(), "one cause, one sentence"
    flat = {check.name: check.found for check in check_reward(Toy(lambda i, p: 0.5 + 0 * i.mean((1, 2, 3))))}
    assert not any("not finite" in found or "nan" in found for found in flat.values())
    assert "gradient zero everywhere" in flat["images in bfloat16"] and "zero everywhere" in flat["picture sizes"]
    assert flat["gradient equals finite differences"].startswith("the gradient of image 0, 1, 2 is zero")


def test_probe_images_stay_away_from_the_ends_and_repeat():
    images = probe_images(3, size=16)
    assert images.shape == (3, 3, 16, 16)
    assert 0.1 <= images.min() < images.max() <= 0.9
    assert torch.equal(images, probe_images(3, size=16))

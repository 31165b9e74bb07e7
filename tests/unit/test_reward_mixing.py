"""Several rewards, ceilings, relative rewards and what holds the model to its start, on the direct_reward task."""

from __future__ import annotations

import pytest
import torch
from test_direct_reward import Redness, build

from rewardtune.plugins import RewardCard
from rewardtune.scoring.reward_set import Relative, RewardSet, Term
from rewardtune.types import Score

DRAFT = ("draft", {"last_steps": 2, "memory": "flat"})


class Green:
    """A thousand times the green channel."""

    card = RewardCard("green", "green", differentiable=True, needs_prompt=False, range=None)

    def score(self, images, prompts):
        return Score(1000 * images[:, 1].mean((1, 2)))


class Wordy:
    """Brightness times the length of the prompt."""

    card = RewardCard("wordy", "length", differentiable=True, needs_prompt=True, range=None)

    def score(self, images, prompts):
        return Score(images.mean((1, 2, 3)) * torch.tensor([float(len(p)) for p in prompts]))


def slope(task) -> tuple[torch.Tensor, dict]:
    out = task.step(task.batch(0, range(3)))
    parameters = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None]), {**out.metrics, "loss": float(out.loss)}


def test_several_rewards_by_value_have_the_sum_of_their_gradients():
    terms = [Term(Redness(), 2.0), Term(Green(), 0.01)]
    both, metrics = slope(build(*DRAFT, rewards=RewardSet(terms)))
    parts = [slope(build(*DRAFT, rewards=RewardSet([term])))[0] for term in terms]
    assert (both - sum(parts)).norm() <= 1e-5 * both.norm()
    assert metrics["loss"] == pytest.approx(-metrics["objective"])
    assert {"gradient/redness", "gradient/green", "cosine/redness/green"} <= set(metrics)
    assert -1 <= metrics["cosine/redness/green"] <= 1


def test_balanced_by_gradient_a_large_reward_drowns_no_other():
    rewards = {"red": Redness(), "green": Green()}
    singles = {n: slope(build(*DRAFT, rewards=RewardSet([Term(r), Term(r, 0.0)]))) for n, r in rewards.items()}
    norms = {"red": singles["red"][1]["gradient/redness"], "green": singles["green"][1]["gradient/green"]}
    both, _ = slope(build(*DRAFT, rewards=RewardSet([Term(Redness(), 3.0), Term(Green())]), balance="gradient"))
    wanted = 3.0 * singles["red"][0] / norms["red"] + singles["green"][0] / norms["green"]
    assert (both - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_ceiling_stops_the_gradient_of_images_that_reach_it():
    free, _ = slope(build(*DRAFT))
    stopped, _ = slope(build(*DRAFT, rewards=RewardSet([Term(Redness(), ceiling=-2.0)])))
    above, _ = slope(build(*DRAFT, rewards=RewardSet([Term(Redness(), ceiling=2.0)])))
    assert not stopped.any()
    assert torch.equal(free, above)


def test_a_relative_reward_is_the_difference_under_two_phrases():
    relative = Relative("bright", "dim", k=0.5)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    value, _ = RewardSet([Term(Wordy(), relative=relative)]).score(images, ["dog", "two cats"])
    lengths = torch.tensor([1.5 * len("bright. ") + 0.5 * n - len("dim. ") for n in (3, 8)])
    assert torch.allclose(value, images.mean((1, 2, 3)) * lengths)


def test_the_pull_to_the_start_is_zero_there_and_grows_with_the_adapters():
    task = build(*DRAFT, velocity=2.0)
    _, metrics = slope(task)
    assert metrics["velocity"] == 0.0
    with torch.no_grad():
        for name, parameter in task.trainable["transformer"].named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    pulled, metrics = slope(task)
    assert metrics["velocity"] > 0
    task.velocity = 0.0
    plain, _ = slope(task)
    assert (pulled - plain).norm() > 1e-3 * plain.norm()


def test_sft_beside_the_reward_adds_its_weighted_loss(tmp_path):
    from PIL import Image

    from rewardtune.data.records import CaptionedImage
    from rewardtune.tasks.sft import Sft

    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    task = build(*DRAFT)
    plain, _ = slope(task)
    sft = Sft(
        task.pipeline, trainable=task.trainable, rows=[CaptionedImage(tmp_path / "a.png", "dog")], size=(16, 16),
        cache_latents=True, caption_dropout=0.0, timestep_density="uniform", seed=0, samples=lambda: None,
        export=lambda *_: None,
    )  # fmt: skip
    loss = sft.step(sft.batch(0, range(3))).loss
    parameters = [p for m in task.trainable.values() for p in m.parameters() if p.requires_grad]
    extra = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None])
    task.sft = (sft, 0.25)
    mixed, metrics = slope(task)
    assert metrics["sft_loss"] == pytest.approx(float(loss))
    assert (mixed - plain - 0.25 * extra).norm() <= 1e-5 * mixed.norm()

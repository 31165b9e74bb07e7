"""What a reward is given is checked in one place, also for a reward from --plugin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rewardtune import registry
from rewardtune.errors import DataError, MissingExtra, NonFiniteError, PluginError, RecipeError
from rewardtune.plugins import RewardCard
from rewardtune.scoring.checked import Checked
from rewardtune.scoring.reward_set import load_reward
from rewardtune.types import Prompt, Score

CARD = RewardCard("mean", "a mean", differentiable=True, needs_prompt=False, range=None, metadata=("text",))
FINE = torch.full((2, 3, 8, 8), 0.5)
PROMPTS = [Prompt("a sign", {"text": "CAT"}), Prompt("a door", {"text": "42"})]


class Mean:
    def __init__(self, factor: float = 1.0):
        self.card, self.factor, self.seen = CARD, factor, None

    def score(self, images, prompts):
        self.seen = images
        return Score(self.factor * images.mean((1, 2, 3)))


def test_what_is_right_passes_and_keeps_its_gradient():
    inner = Mean()
    images = FINE.bfloat16().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = Checked(inner).score(images, PROMPTS).value
        assert inner.seen.dtype == torch.float32
    value.sum().backward()
    assert images.grad.any()
    assert Checked(inner).factor == 1.0 and Checked(inner).card is CARD


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (FINE[:, :1], "greyscale.*expand"),
        (torch.full((2, 4, 8, 8), 0.5), "four channels.*background"),
        (FINE.permute(0, 2, 3, 1), r"permute\(0, 3, 1, 2\)"),
        (FINE[0], r"images\[None\]"),
        (FINE[:0], "holds no pixel"),
        ((FINE * 255).to(torch.uint8), r"uint8.*\.float\(\) / 255"),
        (FINE * 255, "images / 255"),
        (FINE * 2 - 1.8, r"\[-1, 1\]"),
        (FINE * 2.2, "clamp"),
        (np.zeros((2, 3, 8, 8)), "ndarray.*to_tensor"),
        ([FINE[0], FINE[1]], "list.*to_tensor"),
    ],
)
def test_images_that_cannot_be_judged(images, told):
    with pytest.raises(DataError, match=f"reward 'mean'.*images.*{told}"):
        Checked(Mean()).score(images, PROMPTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_pixels_without_a_number_name_the_image(bad):
    images = FINE.clone()
    images[1, 0, 3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"reward 'mean'.*images \[1\].*no reward can judge"):
        Checked(Mean()).score(images, PROMPTS)


def test_a_little_overshoot_is_no_mistake():
    Checked(Mean()).score(torch.full((2, 3, 8, 8), 1.005), PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ("a sign", r"one string.*\[prompt\] \* len\(images\)"),
        (PROMPTS[:1], "2 images came with 1 prompts"),
        ([*PROMPTS, *PROMPTS], "2 images came with 4 prompts"),
        (["a sign", None], "prompt 0.*'text'|prompt 1 is NoneType"),
        ([PROMPTS[0], "a door"], r"prompt 1, 'a door', lacks the metadata 'text'.*\.jsonl"),
        ([PROMPTS[0], Prompt("a door", {"facts": []})], "prompt 1.*lacks the metadata 'text'"),
        (iter(PROMPTS), "prompts must be a list"),
    ],
)
def test_prompts_that_do_not_fit(prompts, told):
    with pytest.raises(DataError, match=f"reward 'mean'.*({told})"):
        Checked(Mean()).score(FINE, prompts)


def test_values_without_a_number_are_never_passed_on():
    with pytest.raises(NonFiniteError, match=r"reward 'mean'.*image\(s\) \[0, 1\]"):
        Checked(Mean(float("nan"))).score(FINE, PROMPTS)


def test_a_plugin_of_a_user_is_checked_too():
    registry.load_plugin(str(Path(__file__).with_name("redness.py")))
    with pytest.raises(DataError, match=r"reward 'redness'.*greyscale"):
        load_reward("redness").score(FINE[:, :1], ["", ""])


def test_what_is_asked_for_and_is_not_there(monkeypatch):
    with pytest.raises(PluginError, match=r"pickscor.*pickscore"):
        load_reward("pickscor")
    with pytest.raises(RecipeError, match=r"'pickscore'.*modle.*rewards show pickscore"):
        load_reward("pickscore", modle="x")
    plugin = registry.rewards.load_class("pickscore")
    monkeypatch.setattr(plugin, "card", replace(plugin.card, requires=("no_such_module",), extra="clip"))
    with pytest.raises(MissingExtra, match=r"'pickscore' needs no_such_module.*pip install 'rewardtune\[clip\]'"):
        load_reward("pickscore")

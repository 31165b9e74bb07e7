"""A gradient that is not finite, on the real direct_reward task, by every method: no weight and no moment changes.

`test_train.py` and `test_distributed.py` have the loop's own cases, of any task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rewardtune.pipelines.z_image import ZImage
from safetensors.torch import load_file

from rewardtune import gradients
from rewardtune.diffusion import lora
from rewardtune.errors import NonFiniteError, PluginError
from rewardtune.gradients import METHODS
from rewardtune.plugins import Guidance, RewardCard
from rewardtune.recipe.sections import CheckpointSection, DirectRewardRecipe, OptimizerSection, TrainSection
from rewardtune.scoring.checked import Checked, NoGraph
from rewardtune.scoring.reward_set import RewardSet, Term
from rewardtune.tasks.direct_reward import DirectReward
from rewardtune.training.loop import train
from rewardtune.training.track import read_metrics
from rewardtune.types import Prompt, Score

RECIPE = {
    "task": "direct_reward", "pipeline": {"model": "x"}, "lora": {}, "data": {"prompts": "x"},
    "rollout": {"steps": 4}, "rewards": [{"name": "x"}], "train": {"steps": 1},
}  # fmt: skip


class Treacherous:
    """Red minus blue. `plan`: what befalls the second image, call by call: fine, inf and nan leave its value as it is
    and break its gradient, as a square root at zero does; worthless breaks its value."""

    card = RewardCard("treacherous", "", differentiable=True, needs_prompt=False, range=(-1, 1))

    def __init__(self, plan: list[str]) -> None:
        self.plan = list(plan)

    def score(self, images, prompts):
        value = (images[:, 0] - images[:, 2]).mean((1, 2))
        what = self.plan.pop(0)
        nothing = images[1].mean() - images[1].mean().detach()
        # both are 0; the way back divides by 0, in the second case 0 itself
        extra = {"fine": nothing * 0, "inf": nothing.sqrt(), "nan": nothing.abs().sqrt(), "worthless": nothing / 0}
        return Score(value + torch.stack([extra[what] if i == 1 else nothing * 0 for i in range(len(value))]))


class Green:
    card = RewardCard("green", "", differentiable=True, needs_prompt=False, range=(0, 1))

    def score(self, images, prompts):
        return Score(images[:, 1].mean((1, 2)))


def build(method: str, rewards: list, balance: str) -> DirectReward:
    adapter = ZImage(tiny.z_image())
    modules = {"transformer": adapter.pipe.transformer}
    lora.attach(modules, rank=2, targets=adapter.lora_targets, seed=0)
    section = DirectRewardRecipe.model_validate(RECIPE | {"gradient": {"method": method}}).gradient
    return DirectReward(
        adapter, trainable=modules, prompts=[Prompt("dog"), Prompt("red cat")],
        method=gradients.load_method(method, **section.model_dump(exclude={"method"})), num_steps=4,
        guidance=Guidance("off"), size=(16, 16), seed=3, augmentation=None, balance=balance,
        rewards=RewardSet([Term(reward) for reward in rewards]), samples=lambda: None, export=lambda *_: None,
    )  # fmt: skip


def run(folder: Path, task: DirectReward, *, steps: int, **train_section) -> None:
    section = TrainSection(steps=steps, batch_size=2, device="cpu", ema_decay=0.9, **train_section)
    train(
        task, folder=folder, train=section,
        optimizer=OptimizerSection(lr=1e-2), checkpoint=CheckpointSection(every=1, keep=steps),
    )  # fmt: skip


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, their averages and the optimiser's state after a step, by part and name."""
    files = (folder / f"checkpoints/step-{step:06d}").glob("*.safetensors")
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


PLAN = ["fine", "inf", "nan", "worthless", "fine"]


@pytest.mark.parametrize("objective", ["one reward", "two by value", "two by gradient"])
@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_skipped_and_training_goes_on(tmp_path, method, objective):
    rewards = [Treacherous(PLAN)] if objective == "one reward" else [Green(), Treacherous(PLAN)]
    task = build(method, rewards, objective.rpartition(" ")[2] if len(rewards) > 1 else "value")
    run(tmp_path, task, steps=len(PLAN))
    states = [saved(tmp_path, step) for step in range(1, len(PLAN) + 1)]
    assert {name.partition("/")[0] for name in states[0]} == {"parameters", "ema", "optimizer"}
    for before, after, what in zip(states[:-1], states[1:], PLAN[1:], strict=True):
        same = [torch.equal(tensor, after[name]) for name, tensor in before.items()]
        assert not any(t.is_floating_point() and not t.isfinite().all() for t in after.values()), what
        assert all(same) if what != "fine" else not any(same), what
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 2, 3, 3]
    assert [line["grad_norm"] is None for line in lines] == [what != "fine" for what in PLAN]
    # one reward's value is the loss, which says what it was; several go into it by their gradients
    broken = ("worthless",) if len(rewards) == 1 else ("inf", "nan", "worthless")
    assert [line["loss"] is None for line in lines] == [what in broken for what in PLAN]


def test_too_many_in_a_row_end_the_run_with_the_weights_of_before(tmp_path):
    task = build("draft", [Treacherous(["fine", *["inf"] * 9])], "value")
    with pytest.raises(NonFiniteError, match=r"3 optimiser steps in a row, up to step 4, .*_skips 2") as ended:
        run(tmp_path, task, steps=9, max_consecutive_skips=2)
    assert ended.value.exit_code == 4
    first, last = saved(tmp_path, 1), saved(tmp_path, 4)
    assert first.keys() == last.keys() and all(torch.equal(tensor, last[name]) for name, tensor in first.items())
    assert [line["skipped"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_run_of_skipped_steps_alone_has_no_success(tmp_path, capsys):
    task = build("draft", [Treacherous(["nan"] * 2)], "value")
    with pytest.raises(NonFiniteError, match=r"2 optimiser steps in a row, up to step 2, .*, all there were"):
        run(tmp_path, task, steps=2)
    assert capsys.readouterr().err.count("was skipped") == 1
    assert (tmp_path / "checkpoints/step-000002").is_dir()


def test_what_skipped_a_step_is_said_at_once(tmp_path, capsys):
    run(tmp_path, build("draft", [Checked(Treacherous(["fine", "worthless", "fine"]))], "value"), steps=3)
    said = capsys.readouterr().err
    assert "step 2 was skipped. reward 'treacherous' returned a value that is not finite for image(s) [1]" in said


def test_samples_without_numbers_end_the_run_with_what_to_do(tmp_path):
    task = build("draft", [Green()], "value")
    drawn = [torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)]
    task.samples = lambda: drawn.pop(0)
    with pytest.raises(NonFiniteError, match=r"the samples of step 2 .* Lower optimizer\.lr"):
        run(tmp_path, task, steps=2)


@dataclasses.dataclass
class Broken:
    """What a plug-in's mistake gives."""

    give: Callable[[torch.Tensor], Any]
    card = RewardCard("broken", "", differentiable=True, needs_prompt=False, range=(0, 1))

    def score(self, images, prompts):
        return self.give(images)


@pytest.mark.parametrize("balance", ["one reward", "value", "gradient"])
@pytest.mark.parametrize(
    ("give", "error", "said"),
    [
        (lambda images: Score(images.detach().mean((1, 2, 3))), NoGraph, "no gradient can be taken"),
        (lambda images: images.mean((1, 2, 3)), PluginError, "returned Tensor, where rewardtune.types.Score"),
        (lambda images: Score([0.5, 0.5]), PluginError, "returned a list as its value"),
        (lambda images: Score(images.mean()), PluginError, r"returned \(\) values for 2 images"),
    ],
    ids=["without a graph", "no score", "a list", "a scalar"],
)
def test_a_reward_that_breaks_its_contract_ends_the_run_at_the_first_step(tmp_path, balance, give, error, said):
    rewards = [Checked(Broken(give)), *([] if balance == "one reward" else [Green()])]
    task = build("draft", rewards, "value" if balance == "one reward" else balance)
    with pytest.raises(error, match=f"reward 'broken'.* {said}") as ended:
        run(tmp_path, task, steps=2)
    assert ended.value.exit_code == 2 and not (tmp_path / "checkpoints").exists()


def test_weights_of_a_reward_are_no_way_back_to_the_images(tmp_path):
    weight = torch.ones((), requires_grad=True)  # a model that was not frozen, behind a cut
    broken = Checked(Broken(lambda images: Score(images.detach().mean((1, 2, 3)) * weight)))
    with pytest.raises(NoGraph, match="no gradient can be taken"):
        run(tmp_path, build("draft", [broken, Green()], "gradient"), steps=1)

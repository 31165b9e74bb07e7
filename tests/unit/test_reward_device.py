"""`rewards[].device`: a reward on another device than the training; images go there, values and gradients come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import yaml

from rewardtune import registry
from rewardtune.build import build_guard, build_task
from rewardtune.compare.scores import choose_rewards
from rewardtune.errors import RecipeError
from rewardtune.recipe.file import load_recipe
from rewardtune.recipe.rewards import RewardSection
from rewardtune.scoring.checked import Checked
from rewardtune.scoring.reward_set import load_section
from rewardtune.training.loop import train
from rewardtune.training.track import read_metrics
from rewardtune.types import Score


@pytest.fixture(autouse=True, scope="module")
def placed():
    registry.load_plugin(str(Path(__file__).with_name("placed.py")))
    return registry.rewards.load_class("placed")


def recipe(folder: Path, **reward):
    if not (folder / "pipeline").exists():
        tiny.z_image().save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("a dog\nred cat\n")
    document = {
        "task": "direct_reward", "pipeline": {"model": str(folder / "pipeline")}, "lora": {"rank": 2},
        "data": {"prompts": str(folder / "prompts.txt")}, "rollout": {"steps": 2, "guidance": "off"},
        "gradient": {"method": "draft"}, "rewards": [{"name": "placed", **reward}],
        "optimizer": {"lr": 0.01}, "train": {"steps": 2, "batch_size": 2, "device": "cpu"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return load_recipe(str(folder / "recipe.yaml")).recipe


def trained(folder: Path, **reward):
    made = recipe(folder, **reward)
    out = folder / str(len(list(folder.iterdir())))
    out.mkdir()
    task = build_task(made, device="cpu")
    state = train(task, folder=out, train=made.train, optimizer=made.optimizer)
    lines = [{**line, "seconds": 0} for line in read_metrics(out / "metrics.jsonl")]
    return lines, {name: p.detach().clone() for name, p in state.parameters.items()}


def test_a_training_with_the_device_said_is_the_one_without(tmp_path):
    (lines, weights), (said, others) = trained(tmp_path), trained(tmp_path, device="cpu")
    assert lines == said and all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(line["grad_norm"] > 0 for line in lines)


def test_a_reward_is_loaded_for_its_own_device_and_others_for_the_trainings(placed):
    placed.loaded.clear()
    load_section(RewardSection(name="placed", device="cpu"), device="cuda:5")
    load_section(RewardSection(name="placed"), device="cuda:5")
    assert placed.loaded == ["cpu", "cuda:5"]


def test_so_it_is_for_the_guards_rewards(tmp_path, placed):
    made = recipe(tmp_path, device="cpu")
    guard = {"prompts": str(tmp_path / "prompts.txt"), "rewards": [{"name": "jpeg-size", "device": "cuda:99"}]}
    guarded = type(made).model_validate({**made.model_dump(), "guard": guard})
    with pytest.raises(RecipeError, match=r"reward 'jpeg-size': device 'cuda:99' is not on this machine"):
        build_guard(guarded, build_task(made, device="cpu"), tmp_path)


def test_images_cross_over_and_values_and_gradients_come_back(placed):
    """cpu:0 is the same memory by another name, into which torch copies all the same."""
    inner = placed()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    score = Checked(inner, place=torch.device("cpu:0")).score(images, ["a", "b"])
    assert inner.seen[-1].data_ptr() != images.data_ptr() and torch.equal(inner.seen[-1], images)
    score.value.sum().backward()
    crossed, images.grad = images.grad, None
    Checked(inner).score(images, ["a", "b"]).value.sum().backward()
    assert inner.seen[-1].data_ptr() == images.data_ptr()
    assert images.grad.any() and torch.equal(crossed, images.grad)


def test_values_are_asked_back_to_where_the_images_are(placed):
    asked = []

    class Noted(Score):
        def to(self, device):
            asked.append(device)
            return super().to(device)

    class Far(placed):
        def score(self, images, prompts):
            return Noted(super().score(images, prompts).value)

    for place in (torch.device("cpu:0"), None):
        Checked(Far(), place=place).score(torch.zeros(1, 3, 8, 8), ["a"])
    assert asked == [torch.device("cpu")]


def test_all_of_a_score_moves():
    score = Score(torch.zeros(2), torch.ones(2, 1, 3), torch.arange(3.0), ("a",), {"red": torch.zeros(2)})
    moved = score.to(torch.device("meta"))
    found = (moved.value, moved.distribution, moved.levels, moved.parts["red"])
    assert all(tensor.device.type == "meta" for tensor in found) and moved.dimensions == ("a",)
    assert Score(torch.zeros(2)).to(torch.device("meta")).distribution is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize(("images_on", "device"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_between_a_gpu_and_the_cpu(images_on, device):
    images = torch.rand(2, 3, 8, 8, device=images_on, requires_grad=True)
    reward = load_section(RewardSection(name="placed", device=device), device=images_on)
    score = reward.score(images, ["a", "b"])
    assert reward.seen[-1].device.type == device and score.value.device == images.device
    score.value.sum().backward()
    assert images.grad.device == images.device and images.grad.any()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:one", "cuda0", "CPU", "", "tpu:0"])
def test_what_is_no_device_is_refused_with_the_recipe(tmp_path, device):
    with pytest.raises(RecipeError, match=rf"'{device}' is no device; write cpu, cuda, cuda:1 or mps") as error:
        recipe(tmp_path, device=device)
    assert "rewards.0.device" in str(error.value) or "rewards[0].device" in str(error.value)


def test_a_device_that_is_not_here_is_refused_before_the_reward_is_loaded(tmp_path, placed):
    made = recipe(tmp_path, device="cuda:99")
    placed.loaded.clear()
    with pytest.raises(
        RecipeError, match=r"reward 'placed': device 'cuda:99' is not on this machine. It has cpu.*leave"
    ):
        build_task(made, device="cpu")
    assert not placed.loaded


def test_a_comparison_does_not_ask_for_the_devices_of_the_training():
    sections = [RewardSection(name="placed", device="cuda:99")]
    panel = choose_rewards([], sections, None)
    assert panel.rewards["placed"].device is None
    assert choose_rewards(sections, [], None).rewards["placed"].device == "cuda:99"

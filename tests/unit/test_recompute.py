"""Predictions that are made again on the way back, against the same with a graph and against torch's checkpoints."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from rewardtune.pipelines.stable_diffusion import StableDiffusion
from rewardtune.pipelines.z_image import ZImage
from torch import nn

from rewardtune.diffusion.recompute import again, few_trained


class Toy(nn.Module):
    """Counts its calls and whether they record a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)
        self.frozen.requires_grad_(False)
        self.recorded: list[bool] = []

    def forward(self, latents):
        self.recorded.append(torch.is_grad_enabled())
        return (self.frozen(latents) + self.up(self.down(latents))).tanh().float()


def trained_of(toy):
    return [weight for weight in toy.parameters() if weight.requires_grad]


def gradients(toy, predict, precision, *, asks: bool):
    """Of two calls in a row, as in a chain, to the weights and the latents; taken outside autocast, as trainings do."""
    latents = torch.linspace(-1, 1, 16).reshape(2, 8).requires_grad_(asks)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = predict(predict(latents)).square().sum()
    return loss.detach(), *torch.autograd.grad(loss, [*trained_of(toy), *([latents] if asks else [])])


@pytest.mark.parametrize("asks", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_a_kept_graph(asks, precision):
    torch.manual_seed(0)
    toy = Toy()
    kept = gradients(toy, toy, precision, asks=asks)
    toy.recorded.clear()
    found, by_torch = (
        gradients(toy, lambda x, trained=trained: again(toy, x, trained), precision, asks=asks)
        for trained in (trained_of(toy), None)
    )
    # by the other two, both calls share one copy of each weight in bfloat16, and its gradient is summed up in that
    bound = 0.0 if precision == torch.float32 else 0.02
    for other in (kept, by_torch):
        assert all((a - b).norm() <= bound * b.norm() for a, b in zip(found, other, strict=True))
    # what few weights are trained for records nothing before the way back; torch's checkpoint does
    assert toy.recorded == [False, False, True, True] + [True] * 4


def test_the_way_back_is_not_under_the_autocast_around_it_but_under_its_own():
    torch.manual_seed(0)
    toy = Toy()
    found = []
    for inside in (False, True):
        latents = torch.linspace(-1, 1, 16).reshape(2, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = again(toy, latents, trained_of(toy)).square().sum()
            if inside:
                found.append(torch.autograd.grad(loss, trained_of(toy)))
        if not inside:
            found.append(torch.autograd.grad(loss, trained_of(toy)))
    assert all(map(torch.equal, *found))
    plain = torch.autograd.grad(again(toy, latents, trained_of(toy)).square().sum(), trained_of(toy))
    assert not torch.equal(plain[0], found[0][0])


def test_a_weight_that_the_prediction_does_not_read_gets_none():
    toy, other = Toy(), nn.Linear(2, 2)
    loss = again(toy, torch.ones(1, 8), [*trained_of(toy), *other.parameters()]).sum()
    loss.backward()
    assert other.weight.grad is None and toy.up.weight.grad.any()


def test_only_a_few_weights_of_the_denoiser_alone_count_as_few():
    adapter = ZImage(tiny.z_image())
    denoiser = adapter.trainable[adapter.denoiser]
    assert few_trained(adapter) == []
    smallest = min(denoiser.parameters(), key=torch.Tensor.numel).requires_grad_(True)
    (found,) = few_trained(adapter)
    assert found is smallest
    denoiser.requires_grad_(True)
    assert few_trained(adapter) is None, "gradients as large as the model would be held beside those that add up"

    adapter = StableDiffusion(tiny.stable_diffusion(DDIMScheduler()))
    next(adapter.trainable["text_encoder"].parameters()).requires_grad_(True)
    assert few_trained(adapter) is None, "it is reached through the conditioning"

"""Reward gradients through diffusers' schedulers: those that work do, the others are refused."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
from rewardtune.pipelines.stable_diffusion import StableDiffusion
from rewardtune.pipelines.z_image import ZImage

from rewardtune.diffusion.rollout import Chain
from rewardtune.diffusion.schedulers import DETERMINISTIC, check_deterministic
from rewardtune.errors import RecipeError
from rewardtune.gradients.draft import draft
from rewardtune.plugins import Guidance

OFF = Guidance("off")


def scheduler(name: str):
    settings = {} if "FlowMatch" in name else {"beta_schedule": "scaled_linear", "beta_end": 0.012}
    return getattr(diffusers, name)(**settings, **MORE.get(name, {}))


MORE = {
    "DDIMScheduler": {"clip_sample": False, "steps_offset": 1},
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
}
"""As in published checkpoints of Stable Diffusion."""


def adapter_with(name: str):
    if "FlowMatch" not in name:
        return StableDiffusion(tiny.stable_diffusion(scheduler(name)))
    pipe = tiny.z_image()
    pipe.scheduler = scheduler(name)
    return ZImage(pipe)


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "FlowMatchHeunDiscreteScheduler"])
def test_gradient_runs_through_every_scheduler_of_the_list(name):
    """The chain's image is the pipeline's; a step can be taken again; kept and recomputed graphs agree."""
    adapter = adapter_with(name)
    check_deterministic(adapter.scheduler)
    key = torch.Generator().manual_seed(0)
    noise = adapter.noise([key], (16, 16))

    def run(memory: str):
        weight = adapter.trainable[adapter.denoiser].get_parameter(WEIGHTS[adapter.denoiser]).requires_grad_(True)
        chain = Chain(adapter, adapter.encode(["dog"], OFF), num_steps=4, guidance=OFF, size=(16, 16))
        latents = draft(chain, noise, None, last_steps="all", memory=memory).latents
        (gradient,) = torch.autograd.grad(latents.pow(2).mean(), weight)
        weight.requires_grad_(False)
        return latents.detach(), gradient

    (fast, kept), (flat, recomputed) = run("fast"), run("flat")
    assert torch.equal(fast, flat)
    assert kept.isfinite().all() and kept.norm() > 0
    assert (kept - recomputed).norm() <= 1e-5 * kept.norm()
    scale = {"guidance_scale": 0.0 if adapter.family == "z_image" else 1.0}
    call = adapter.pipe(
        ["dog"], height=16, width=16, num_inference_steps=4, generator=torch.Generator().manual_seed(0),
        output_type="latent", **scale,
    ).images  # fmt: skip
    assert torch.equal(fast, call)


WEIGHTS = {"unet": "mid_block.resnets.0.conv1.weight", "transformer": "layers.0.feed_forward.w1.weight"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_schedulers_that_draw_noise_are_refused_with_those_that_work(name, settings):
    with pytest.raises(RecipeError, match="DDIMScheduler") as error:
        check_deterministic(getattr(diffusers, name)(**settings))
    assert name in str(error.value)

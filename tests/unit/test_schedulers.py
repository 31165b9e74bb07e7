"""Reward gradients through diffusers' schedulers: those that work do, the others are refused."""

from __future__ import annotations

import random

import diffusers
import pytest
import tiny
import torch
from rewardtune.pipelines.generic import Generic
from rewardtune.pipelines.stable_diffusion import StableDiffusion
from rewardtune.pipelines.stable_diffusion_3 import StableDiffusion3
from rewardtune.pipelines.z_image import ZImage

from rewardtune.build import build_task
from rewardtune.diffusion.parameterisation import is_flow
from rewardtune.diffusion.rollout import Chain, sample
from rewardtune.diffusion.schedulers import DETERMINISTIC, check_deterministic
from rewardtune.errors import RecipeError
from rewardtune.gradients import METHODS, Draws, load_method
from rewardtune.gradients.draft import draft
from rewardtune.plugins import Guidance
from rewardtune.recipe.sections import DirectRewardRecipe

OFF, SIZE, STEPS = Guidance("off"), (16, 16), 6
RECIPE = {
    "task": "direct_reward", "lora": {"rank": 2}, "data": {"prompts": "pocket:prompts/train"},
    "rollout": {"steps": STEPS, "guidance": "off"}, "rewards": [{"name": "aesthetic"}], "train": {"steps": 1},
}  # fmt: skip

PUBLISHED = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "steps_offset": 1}
"""As in checkpoints of Stable Diffusion."""
MORE = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
}
VARIANTS = {name: (name, {}) for name in DETERMINISTIC} | {
    "DDIM, v-prediction": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "DPM-Solver, flow matching": (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    "DPM-Solver, third order": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM-Solver, single steps, third order": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "Euler, v-prediction": (
        "EulerDiscreteScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ),
    "Heun, Karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "Heun, sample": ("HeunDiscreteScheduler", {"prediction_type": "sample"}),
    "LMS, Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "PNDM with its warm-up": ("PNDMScheduler", {"skip_prk_steps": False}),
    "UniPC, flow matching": (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
}


def scheduler(name: str, settings=()):
    published = {} if "FlowMatch" in name else PUBLISHED
    if name == "DPMSolverSinglestepScheduler":
        published = {key: value for key, value in published.items() if key != "steps_offset"}
    return getattr(diffusers, name)(**{**published, **MORE.get(name, {}), **dict(settings)})


def adapter_with(variant: str):
    name, settings = VARIANTS[variant]
    if "FlowMatch" not in name:
        return StableDiffusion(tiny.stable_diffusion(scheduler(name, settings)))
    # of the families of flow matching, the one whose call takes every scheduler of it
    pipe = tiny.stable_diffusion_3()
    pipe.scheduler = scheduler(name, settings)
    return StableDiffusion3(pipe)


def settings_of(method: str) -> dict:
    section = DirectRewardRecipe.model_validate(
        RECIPE | {"pipeline": {"model": "x"}, "gradient": {"method": method}}
    ).gradient
    return section.model_dump(exclude={"method"})


def draws(seed: int = 0) -> Draws:
    return Draws(random.Random(seed), [torch.Generator().manual_seed(90 + seed)])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradient_runs_through_every_scheduler_of_the_list(name):
    """The chain's image is the pipeline's; a step can be taken again; kept and recomputed graphs agree."""
    adapter = adapter_with(name)
    check_deterministic(adapter.scheduler)
    key = torch.Generator().manual_seed(0)
    noise = adapter.noise([key], SIZE)

    def run(memory: str):
        weight = weight_of(adapter).requires_grad_(True)
        chain = Chain(adapter, adapter.encode(["dog"], OFF), num_steps=4, guidance=OFF, size=SIZE)
        latents = draft(chain, noise, None, last_steps="all", memory=memory).latents
        (gradient,) = torch.autograd.grad(latents.pow(2).mean(), weight)
        weight.requires_grad_(False)
        return latents.detach(), gradient

    (fast, kept), (flat, recomputed) = run("fast"), run("flat")
    assert torch.equal(fast, flat)
    assert kept.isfinite().all() and kept.norm() > 0
    assert (kept - recomputed).norm() <= 1e-5 * kept.norm()
    call = adapter.pipe(
        ["dog"], height=16, width=16, num_inference_steps=4, generator=torch.Generator().manual_seed(0),
        output_type="latent", **adapter.call(OFF),
    ).images  # fmt: skip
    assert torch.equal(fast, call)


def weight_of(adapter) -> torch.Tensor:
    path = {"unet": "mid_block.resnets.0.conv1.weight", "transformer": "transformer_blocks.0.ff.net.2.weight"}
    return adapter.trainable[adapter.denoiser].get_parameter(path[adapter.denoiser])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_method_takes_a_gradient_through_every_scheduler_of_the_list(name):
    adapter = adapter_with(name)
    weight = weight_of(adapter).requires_grad_(True)
    for method in METHODS:
        chain = Chain(adapter, adapter.encode(["dog"], OFF), num_steps=STEPS, guidance=OFF, size=SIZE)
        noise = adapter.noise([torch.Generator().manual_seed(0)], SIZE)
        latents = load_method(method)(chain, noise, draws(), **settings_of(method)).latents
        (gradient,) = torch.autograd.grad(latents.pow(2).mean(), weight)
        assert gradient.isfinite().all() and gradient.norm() > 0, method


class Line:
    """The chain of a denoiser that knows the one finished picture there is.

    Its prediction is exact, so every deterministic solver, whatever its order, keeps to the straight line between the
    picture and the noise. Where on the line the scheduler has gone to is read from the denoiser's input itself, by
    least squares: that is what `Chain.shares` has to say, and it is found here without a formula of ours.
    """

    def __init__(self, adapter) -> None:
        self.chain = chain = Chain(adapter, None, num_steps=STEPS, guidance=OFF, size=SIZE)
        self.picture, self.noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        first = chain._states[0]
        if is_flow(first):
            self.begin = (1 - first.sigmas[0]) * self.picture + first.sigmas[0] * self.noise
        else:
            self.begin = scheduler_like(first).add_noise(self.picture, self.noise, chain.timesteps[:1])
        self.flow, self.kind = is_flow(first), first.config.get("prediction_type")
        chain.predict = self.predict
        chain.start = lambda noise: self.begin

    def predict(self, i: int, latents: torch.Tensor) -> torch.Tensor:
        seen = self.chain._scaled(i, latents)
        if i not in self.found:  # the first visit is on the line; methods come back with other noise
            basis = torch.stack([self.picture.flatten(), self.noise.flatten()], 1).double()
            solution = torch.linalg.lstsq(basis, seen.flatten().double()[:, None]).solution.flatten()
            assert torch.allclose(basis @ solution, seen.flatten().double(), atol=1e-4)
            self.found[i] = (solution[0].float(), solution[1].float())
        signal, sigma = self.found[i]
        noise = (seen - signal * self.picture) / sigma
        if self.flow:
            return noise - self.picture
        said = {"epsilon": noise, "sample": self.picture, "v_prediction": signal * noise - sigma * self.picture}
        return said[self.kind]


def scheduler_like(first):
    """A copy that knows where it is, which some ask for before they add noise."""
    twin = type(first).from_config(first.config)
    vars(twin).update({k: v for k, v in vars(first).items() if k not in ("_step_index", "_begin_index")})
    if hasattr(twin, "set_begin_index"):
        twin.set_begin_index(0)
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
def test_estimates_are_right_at_every_step_of_every_scheduler(variant):
    """Shares of image and noise, the estimate of the image, and noise put on again, also between a solver's steps."""
    line = Line(adapter_with(variant))
    chain, latents = line.chain, line.begin
    with torch.no_grad():
        for i in range(len(chain)):
            assert torch.allclose(chain.clean(i, latents), line.picture, atol=1e-3)
            signal, sigma = line.found[i]
            assert torch.allclose(torch.stack(chain.shares(i)), torch.stack([signal, sigma]), atol=1e-5)
            assert torch.allclose(chain.renoise(i, line.picture, line.noise), latents, rtol=1e-4, atol=1e-3)
            latents = chain.advance(i, latents)
    assert len(line.found) == len(chain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_finds_the_picture_when_the_predictions_are_right(variant):
    adapter = adapter_with(variant)
    for method in METHODS:
        for seed in range(3):
            line = Line(adapter)
            with torch.no_grad():
                end = line.chain.run(line.begin, 0, len(line.chain))
            # the last level of some schedulers is not free of noise, and a sample is theirs
            rest = float((end - line.picture).abs().max())
            settings = settings_of(method) | ({"inversion": 0.0} if method == "direct_align" else {})
            found = load_method(method)(line.chain, line.noise, draws(seed), **settings).latents
            assert torch.allclose(found, line.picture.expand_as(found), atol=2e-3 + 2 * rest), (method, seed, rest)
            assert rest < 0.1


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "Heun, sample"])  # there the last one is all there is
def test_contributions_of_the_steps_add_up_to_the_way_from_noise_to_image(variant):
    """Of the scheduler's arithmetic: predictions that are all larger by one move the end by their sum."""
    line = Line(adapter_with(variant))
    chain, ends = line.chain, []
    moved = chain.contributions()
    assert all(one > 0 for one in moved) and len(moved) == len(chain)
    for shift in (0.0, 1.0):
        chain = Line(adapter_with(variant)).chain
        chain.predict = lambda i, latents, shift=shift: torch.full_like(latents, shift)
        ends.append(chain.run(torch.zeros(1, 4, 8, 8), 0, len(chain)))
    total = float((ends[1] - ends[0]).abs().mean())
    # in solvers of higher order a step may take back part of what another did
    assert total <= sum(moved) * (1 + 1e-4)
    if "FlowMatch" in variant or variant in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        assert total == pytest.approx(sum(moved), rel=1e-4)
        assert "Heun" not in variant or moved[0] == pytest.approx(moved[1], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("KDPM2DiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_other_schedulers_are_refused_with_those_that_work(name, settings):
    with pytest.raises(RecipeError, match="DDIMScheduler") as error:
        check_deterministic(getattr(diffusers, name)(**settings))
    assert name in str(error.value)


@pytest.mark.parametrize("adapter", [StableDiffusion, Generic])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_what_the_pipeline_set_as_it_was_made_is_kept(adapter, name):
    """Its constructor gives steps_offset 1 to a scheduler whose file leaves it out, as those of some checkpoints do."""
    pipe = tiny.stable_diffusion(getattr(diffusers, name)(beta_schedule="scaled_linear", beta_end=0.012))
    assert pipe.scheduler.config.steps_offset == 1
    found = sample(adapter(pipe), ["dog"], [torch.Generator().manual_seed(0)], num_steps=4, guidance=OFF, size=SIZE)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": SIZE[0], "width": SIZE[1]}
    wanted = pipe("dog", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    assert (found - wanted).abs().max() <= 1e-6


def recipe_of(folder) -> DirectRewardRecipe:
    return DirectRewardRecipe.model_validate(
        RECIPE | {"pipeline": {"model": str(folder)}, "gradient": {"method": "draft"}}
    )


def test_a_recipe_on_a_checkpoint_with_such_a_scheduler_is_refused(tmp_path):
    tiny.stable_diffusion(scheduler("EulerAncestralDiscreteScheduler")).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"^pipeline.model: .*EulerAncestralDiscreteScheduler.*These work: DDIM"):
        build_task(recipe_of(tmp_path), device="cpu")


def test_a_scheduler_that_the_family_cannot_set_up_is_refused_before_anything_is_drawn(tmp_path):
    """As the pipeline itself refuses it: FlowMatchHeun takes no levels from Z-Image, none shifted by size from SD 3."""
    pipe = tiny.z_image()
    pipe.scheduler = scheduler("FlowMatchHeunDiscreteScheduler")
    pipe.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"FlowMatchHeunDiscreteScheduler, cannot be set up for 6 steps.*z_image"):
        build_task(recipe_of(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="custom sigmas"):
        pipe("dog", num_inference_steps=6, height=16, width=16)
    with pytest.raises(RecipeError, match="cannot be set up"):
        Chain(ZImage(pipe), None, num_steps=4, guidance=OFF, size=SIZE)

"""Our step-by-step roll-out against diffusers' own `ZImagePipeline.__call__`, real classes, random weights, fp32."""

from __future__ import annotations

import pytest
import tiny
import torch
from rewardtune.pipelines.z_image import ZImage

from rewardtune.diffusion.parameterisation import training_pair
from rewardtune.diffusion.rollout import Chain, sample
from rewardtune.plugins import Guidance

PROMPTS = ["dog", "two birds on the left of a red cat and one very long prompt"]


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7 + i) for i in range(count)]


@pytest.fixture(scope="module")
def pipe():
    return tiny.z_image()


def reference(pipe, scale: float, size: tuple[int, int], steps: int = 4, negative: str = "") -> torch.Tensor:
    images = pipe(
        list(PROMPTS), height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=scale,
        negative_prompt=[negative] * 2, generator=generators(2), output_type="pt",
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
@pytest.mark.parametrize(("scale", "negative"), [(0.0, ""), (3.0, ""), (3.0, "red")])
def test_rollout_equals_the_pipeline_exactly(pipe, scale, negative, size):
    mode = "full" if scale else "off"
    ours = sample(
        ZImage(pipe), PROMPTS, generators(2), num_steps=4, guidance=Guidance(mode, scale, negative), size=size
    )
    assert torch.equal(ours, reference(pipe, scale, size, negative=negative))


@pytest.mark.parametrize(
    ("component", "name", "value"),
    [("vae", "scaling_factor", 0.61), ("vae", "shift_factor", 0.12), ("scheduler", "shift", 3.1)],
)
def test_parity_notices_a_perturbed_constant(component, name, value):
    pipe = tiny.z_image()
    wanted = reference(pipe, 3.0, (16, 16))
    getattr(pipe, component).register_to_config(**{name: value})
    ours = sample(ZImage(pipe), PROMPTS, generators(2), num_steps=4, guidance=Guidance("full", 3.0), size=(16, 16))
    assert (ours - wanted).abs().max() > 1e-4


def chain_gradient(pipe, memory: str, last_steps, guidance: Guidance) -> torch.Tensor:
    from rewardtune.gradients.draft import draft

    weight = pipe.transformer.layers[0].feed_forward.w1.weight.requires_grad_(True)
    weight.grad = None
    adapter = ZImage(pipe)
    conditioning = adapter.encode(PROMPTS, guidance)
    chain = Chain(adapter, conditioning, num_steps=4, guidance=guidance, size=(16, 16))
    latents = draft(chain, adapter.noise(generators(2), (16, 16)), None, last_steps=last_steps, memory=memory)
    adapter.decode(latents).pow(2).mean().backward()
    return weight.grad.clone()


def test_full_chain_gradient_equals_autograd_through_the_call(pipe):
    weight = pipe.transformer.layers[0].feed_forward.w1.weight.requires_grad_(True)
    weight.grad = None
    undecorated = type(pipe).__call__.__wrapped__
    images = undecorated(
        pipe, list(PROMPTS), height=16, width=16, num_inference_steps=4, guidance_scale=2.0,
        generator=generators(2), output_type="latent", negative_prompt=["", ""],
    ).images  # fmt: skip
    ZImage(pipe).decode(images).pow(2).mean().backward()
    wanted = weight.grad.clone()
    for memory in ("fast", "flat"):
        ours = chain_gradient(pipe, memory, "all", Guidance("full", 2.0))
        assert (ours - wanted).norm() <= 1e-5 * wanted.norm()


def test_fast_and_flat_agree_and_k_matters(pipe):
    guidance = Guidance("detached-negative", 2.0)
    fast, flat = (chain_gradient(pipe, memory, 2, guidance) for memory in ("fast", "flat"))
    assert (fast - flat).norm() <= 1e-5 * fast.norm()
    assert (chain_gradient(pipe, "fast", "all", guidance) - fast).norm() > 1e-2 * fast.norm()


def test_full_chain_gradient_agrees_with_finite_differences():
    pipe = tiny.z_image()
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder):
        part.double()
    weight = pipe.transformer.layers[0].feed_forward.w1.weight
    guidance = Guidance("full", 2.0)
    gradient = chain_gradient(pipe, "flat", "all", guidance)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    direction /= direction.norm()

    def value(offset: float) -> float:
        with torch.no_grad():
            weight.add_(offset * direction)
            adapter = ZImage(pipe)
            chain = Chain(adapter, adapter.encode(PROMPTS, guidance), num_steps=4, guidance=guidance, size=(16, 16))
            out = adapter.decode(chain.run(adapter.noise(generators(2), (16, 16)), 0, 4)).pow(2).mean().item()
            weight.sub_(offset * direction)
        return out

    # the pipeline keeps latents in fp32 between steps, so the quotient is good to about 1e-3
    step = 1e-1
    numeric = (value(step) - value(-step)) / (2 * step)
    assert numeric == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


def test_sft_loss_equals_the_training_formula_of_diffusers(pipe):
    """Flow matching as in diffusers' DreamBooth scripts: sigma from the scheduler's table, target noise - x."""
    adapter = ZImage(pipe)
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    u = torch.tensor([0.2, 0.9])
    noisy, timesteps, target = training_pair(adapter.scheduler, clean, noise, u)
    index = (u * adapter.scheduler.config.num_train_timesteps).long()
    sigmas = adapter.scheduler.sigmas[index].view(-1, 1, 1, 1)
    assert torch.equal(noisy, (1.0 - sigmas) * clean + sigmas * noise)
    assert torch.equal(timesteps, adapter.scheduler.timesteps[index])
    assert torch.equal(target, noise - clean)
    # and the model is asked what the sampler asks it: time runs from noise to image, the sign is turned
    off = Guidance(mode="off")
    conditioning = adapter.encode(PROMPTS, off)
    prediction = adapter.predict(noisy, timesteps, conditioning, off)
    raw = pipe.transformer(
        list(noisy.unsqueeze(2)), (1000 - timesteps) / 1000, conditioning.positive, return_dict=False
    )
    assert torch.allclose(prediction, -torch.stack(raw[0]).squeeze(2), atol=1e-6)


def test_clean_estimate_inverts_the_noising(pipe):
    """With the true velocity, the x0 estimate of any step is the clean latent."""
    adapter = ZImage(pipe)
    off = Guidance(mode="off")
    chain = Chain(adapter, adapter.encode(PROMPTS, off), num_steps=5, guidance=off, size=(16, 16))
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    sigmas = chain._states[0].sigmas
    for i in range(5):
        chain.predict = lambda *_: noise - clean
        estimate = chain.clean(i, (1 - sigmas[i]) * clean + sigmas[i] * noise)
        assert torch.allclose(estimate, clean, atol=1e-5)

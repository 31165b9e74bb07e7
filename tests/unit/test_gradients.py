"""Ways to take the reward gradient, against the same estimators written out step by step for flow matching."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from rewardtune.pipelines.stable_diffusion import StableDiffusion
from rewardtune.pipelines.z_image import ZImage

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import METHODS, Draws, Finished, load_method
from rewardtune.plugins import Guidance
from rewardtune.recipe.gradients import steps_needed
from rewardtune.recipe.sections import DirectRewardRecipe

OFF, SIZE, STEPS = Guidance("off"), (16, 16), 5
PROMPTS = ["dog", "two birds"]


@pytest.fixture(scope="module")
def adapter():
    found = ZImage(tiny.z_image())
    for weight in weights(found):
        weight.requires_grad_(True)
    return found


def weights(adapter):
    return list(adapter.trainable[adapter.denoiser].parameters())


def chain_of(adapter, steps: int = STEPS) -> Chain:
    return Chain(adapter, adapter.encode(PROMPTS, OFF), num_steps=steps, guidance=OFF, size=SIZE)


def finished(adapter) -> Chain:
    """A chain that has been run: its schedulers' states are known."""
    chain = chain_of(adapter)
    chain.run(chain.start(noise_of(adapter)), 0, STEPS)
    return chain


def noise_of(adapter):
    return adapter.noise([torch.Generator().manual_seed(i) for i in range(2)], SIZE)


def draws(seed: int = 0) -> Draws:
    return Draws(random.Random(seed), [torch.Generator().manual_seed(90 + seed + i) for i in range(2)])


def slope(adapter, latents) -> torch.Tensor:
    """Gradient of a curved function of the latents, over all weights of the denoiser."""
    found = torch.autograd.grad(
        (latents.sin() * latents).mean(), weights(adapter), allow_unused=True, retain_graph=True
    )
    return torch.cat(
        [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(found, weights(adapter), strict=True)]
    )


def run(adapter, name: str, seed: int = 0, **settings) -> Finished:
    return load_method(name)(chain_of(adapter), noise_of(adapter), draws(seed), **settings)


def velocities(adapter):
    """(sigmas, x before each step and at the end, v with graph at each, x detached), by Euler's rule written out."""
    chain = finished(adapter)
    sigmas = chain._states[0].sigmas
    with torch.no_grad():
        states = [noise_of(adapter)]
        for i in range(STEPS):
            states.append(states[-1] + (sigmas[i + 1] - sigmas[i]) * chain.predict(i, states[-1]))
    return sigmas, states, [chain.predict(i, states[i]) for i in range(STEPS)]


def close(found, wanted, tolerance=1e-5):
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_refl_draws_its_step_from_the_late_part(adapter):
    seen: set[int] = set()
    for seed in range(40):
        chain = chain_of(adapter, 8)
        chain.clean = lambda i, latents: seen.add(i) or latents  # type: ignore[method-assign,func-returns-value]
        load_method("refl")(chain, noise_of(adapter), draws(seed), earliest=0.5, latest=0.875)
    assert seen == {4, 5, 6}


def test_refl_is_the_estimate_at_that_step(adapter):
    sigmas, states, v = velocities(adapter)
    found = run(adapter, "refl", earliest=0.6, latest=0.8).latents
    wanted = states[3] - sigmas[3] * v[3]
    assert torch.allclose(found, wanted, atol=1e-5)
    close(slope(adapter, found), slope(adapter, wanted))


def test_draft_lv_averages_over_noise_on_the_sample(adapter):
    sigmas, states, _ = velocities(adapter)
    found = run(adapter, "draft_lv", copies=3, memory="flat").latents
    assert found.shape[0] == 6
    keys, chain, wanted = draws().each, finished(adapter), []
    for _ in range(3):
        noise = torch.stack([torch.randn(states[-1].shape[1:], generator=k) for k in keys])
        noised = (1 - sigmas[-2]) * states[-1] + sigmas[-2] * noise
        wanted.append(noised - sigmas[-2] * chain.predict(STEPS - 1, noised))
    assert torch.allclose(found, torch.cat(wanted), atol=1e-5)
    close(slope(adapter, found), slope(adapter, torch.cat(wanted)))
    assert not torch.equal(found[:2], found[2:4])


def test_alignprop_cuts_once_a_trajectory(adapter):
    """The drawn K is DRaFT-K; all lengths occur, none beyond the longest."""
    by_length = {
        k: slope(adapter, run(adapter, "draft", last_steps=k, memory="flat").latents) for k in range(1, STEPS + 1)
    }
    seen = set()
    for seed in range(30):
        found = slope(adapter, run(adapter, "alignprop", seed, longest=0.8, memory="flat").latents)
        same = [k for k, wanted in by_length.items() if (found - wanted).norm() <= 1e-5 * wanted.norm()]
        assert len(same) == 1
        seen.add(same[0])
    assert seen == {1, 2, 3, 4}


def test_drtune_adds_up_the_steps_without_products_of_jacobians(adapter):
    sigmas, states, v = velocities(adapter)
    for seed in range(4):
        shared = random.Random(seed)
        first = shared.randrange(STEPS // 2)
        stop = STEPS - shared.randint(1, 2)
        path = states[0]
        for i in range(stop):
            step = (sigmas[i + 1] - sigmas[i]) * v[i]
            path = path + (step if i in (first, first + 2) else step.detach())
        wanted = path - sigmas[stop] * v[stop]
        for memory in ("fast", "flat"):
            found = run(adapter, "drtune", seed, train_steps=2, early_stop=2, memory=memory).latents
            assert torch.allclose(found, wanted, atol=1e-5)
            close(slope(adapter, found), slope(adapter, wanted))


@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_flowbp_sparse_is_the_papers_surrogate(adapter, rescale):
    """Value: the sample. Gradient: chosen steps predicted again, times step width, scaled for what is left out."""
    sigmas, states, v = velocities(adapter)
    shared, left, chosen = random.Random(1), list(range(STEPS)), []
    for _ in range(2):
        chosen.append(shared.choices(left, [(i + 1) ** 2.0 for i in left])[0])
        left.remove(chosen[-1])
    widths = [sigmas[i + 1] - sigmas[i] for i in range(STEPS)]
    factor = 1 + rescale * (sum(abs(w) for w in widths) / sum(abs(widths[i]) for i in chosen) - 1)
    added = sum(widths[i] * (v[i] - v[i].detach()) for i in chosen) * factor
    wanted = states[-1] + added
    for memory in ("fast", "flat"):
        settings = {"active_steps": 2, "late_bias": 2.0, "rescale": rescale, "memory": memory}
        found = run(adapter, "flowbp_sparse", 1, **settings).latents
        assert torch.allclose(found, states[-1], atol=1e-5)
        close(slope(adapter, found), slope(adapter, wanted))


def test_direct_align_takes_known_noise_off_again(adapter):
    sigmas, states, _ = velocities(adapter)
    settings = {"earliest": 0.3, "latest": 0.8, "span": 1, "inversion": 0.5}
    found, signs = run(adapter, "direct_align", **settings)
    i = random.Random(0).randint(2, 3)
    chain, noise, sample = finished(adapter), noise_of(adapter), states[-1]
    wanted = []
    for start, end in ((i, i + 1), (i + 1, i)):
        noised = (1 - sigmas[start]) * sample + sigmas[start] * noise
        moved = noised + (sigmas[end] - sigmas[start]) * chain.predict(start, noised)
        wanted.append((moved - sigmas[end] * noise) / (1 - sigmas[end]))
    assert torch.allclose(found, torch.cat(wanted), atol=1e-4)
    close(slope(adapter, found), slope(adapter, torch.cat(wanted)), 1e-4)
    assert signs.tolist() == [1, 1, -0.5, -0.5]
    assert run(adapter, "direct_align", **{**settings, "inversion": 0.0}).weights is None


def test_direct_align_recovers_the_sample_when_the_prediction_is_right(adapter):
    """If the denoiser says the noise that was put on, the sample comes back, from every level and every scheduler."""
    from diffusers import EulerDiscreteScheduler

    for scheduler in (None, EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.012)):
        other = adapter if scheduler is None else StableDiffusion(tiny.stable_diffusion(scheduler))
        chain, noise = finished(other), noise_of(other)
        sample = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
        chain.run = lambda *_, sample=sample: sample  # type: ignore[method-assign]
        flow = scheduler is None
        chain.predict = lambda i, latents, noise=noise, sample=sample, flow=flow: (  # type: ignore[method-assign]
            noise - sample if flow else noise
        )
        found = load_method("direct_align")(chain, noise, draws(), earliest=0.3, latest=1.0, span=1, inversion=1.0)
        assert torch.allclose(found.latents, torch.cat([sample, sample]), atol=1e-3)


def test_renoise_is_what_the_scheduler_would_hold():
    """For a scheduler that keeps latents at another scale: its own add_noise."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_end=0.012)
    chain = chain_of(StableDiffusion(tiny.stable_diffusion(scheduler)))
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    held = chain._states[0]
    for i in range(STEPS):
        chain._states = [held] * (i + 1)
        held._step_index = i
        wanted = held.add_noise(clean, noise, chain.timesteps[i : i + 1].repeat(2))
        assert torch.allclose(chain.renoise(i, clean, noise), wanted, rtol=1e-4, atol=1e-4)


def test_every_method_depends_on_its_samples_alone(adapter):
    """Half a batch gives its half of the latents: a run may be split over processes anyhow."""
    defaults = {
        name: DirectRewardRecipe.model_validate(RECIPE | {"gradient": {"method": name}}).gradient for name in METHODS
    }
    for name, section in defaults.items():
        settings = section.model_dump(exclude={"method"})
        whole = load_method(name)(chain_of(adapter), noise_of(adapter), draws(), **settings).latents
        chain = Chain(adapter, adapter.encode(PROMPTS[1:], OFF), num_steps=STEPS, guidance=OFF, size=SIZE)
        half = Draws(draws().shared, draws().each[1:])
        alone = load_method(name)(chain, noise_of(adapter)[1:], half, **settings).latents
        assert torch.allclose(whole.view(-1, 2, *whole.shape[1:])[:, 1], alone, atol=1e-4), name


RECIPE = {
    "task": "direct_reward", "pipeline": {"model": "x"}, "lora": {}, "data": {"prompts": "x"},
    "rollout": {"steps": STEPS}, "rewards": [{"name": "x"}], "train": {"steps": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        ({"method": "draft", "last_steps": 6}, "gradient.last_steps 6 exceeds rollout.steps 5; write `all`"),
        ({"method": "drtune", "train_steps": 6}, "gradient.train_steps 6 exceeds rollout.steps 5"),
        ({"method": "drtune", "early_stop": 7}, "gradient.early_stop 7 exceeds rollout.steps 5"),
        ({"method": "flowbp_sparse", "active_steps": 9}, "gradient.active_steps 9 exceeds rollout.steps 5"),
        ({"method": "direct_align", "span": 4}, "gradient.span 4 needs 6 steps, more than rollout.steps 5"),
    ],
)
def test_more_steps_than_the_rollout_has_are_refused(gradient, words):
    with pytest.raises(ValueError, match=words):
        DirectRewardRecipe.model_validate(RECIPE | {"gradient": gradient})


def test_every_method_has_a_section_and_says_how_many_steps_it_needs():
    for name in METHODS:
        recipe = DirectRewardRecipe.model_validate(RECIPE | {"gradient": {"method": name}})
        assert steps_needed(recipe.gradient)[1] <= STEPS

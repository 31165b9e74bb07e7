"""What a denoiser predicts, and how it relates to noise and image: flow matching, epsilon and v.

Read from the scheduler, so no model family is named here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewardtune.errors import RecipeError


def is_flow(scheduler: Any) -> bool:
    """True for flow matching: x_sigma = (1 - sigma) x0 + sigma noise, prediction noise - x0."""
    flow_sigmas = (
        scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction"
    )
    return bool(flow_sigmas) or "FlowMatch" in type(scheduler).__name__


def shares(scheduler: Any, i: int, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) of step i: what the denoiser sees is a x0 + s noise. Scalars in fp32."""
    if hasattr(scheduler, "sigmas"):
        sigma: Tensor = scheduler.sigmas[i].float()
        if is_flow(scheduler):
            return 1 - sigma, sigma
        # sigma over signal, as in arXiv 2206.00364; the model's input is scaled to unit variance
        signal = (1 + sigma**2).rsqrt()
        return signal, sigma * signal
    alpha_bar: Tensor = scheduler.alphas_cumprod[timestep.long().cpu()].float()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def clean_estimate(scheduler: Any, i: int, timestep: Tensor, latents: Tensor, prediction: Tensor) -> Tensor:
    """x0 from one prediction at step i (flow: x - sigma v; epsilon: DDIM Eq. 9; v: arXiv 2202.00512 Eq. 11).

    latents: as the denoiser sees them.
    """
    signal, sigma = (share.to(latents) for share in shares(scheduler, i, timestep))
    if is_flow(scheduler):
        return latents - sigma * prediction
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (latents - sigma * prediction) / signal
    if kind == "v_prediction":
        return signal * latents - sigma * prediction
    if kind == "sample":
        return prediction
    raise RecipeError(_unknown(scheduler))


def training_pair(scheduler: Any, clean: Tensor, noise: Tensor, density: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy latents, timesteps, target) for the denoising loss, as in diffusers' training scripts.

    clean, noise: (B, ...). density: (B,) numbers in [0, 1) that pick each sample's timestep. The noisy latents are as
    the denoiser sees them.
    """
    noising = _noising(scheduler)
    steps = noising.config.num_train_timesteps
    index = (density * steps).long().clamp(max=steps - 1)
    shape = (-1, *[1] * (clean.dim() - 1))
    if is_flow(scheduler):
        timesteps = noising.timesteps.to(clean.device)[index]
        sigma = noising.sigmas.to(clean)[index].view(shape)
        return (1 - sigma) * clean + sigma * noise, timesteps, noise - clean
    noisy = noising.add_noise(clean, noise, index)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noisy, index, noise
    if kind == "v_prediction":
        return noisy, index, noising.get_velocity(clean, noise, index)
    raise RecipeError(_unknown(scheduler))


def density(scheme: str, generators: list[torch.Generator]) -> Tensor:
    """(B,) draws in [0, 1) by diffusers' `compute_density_for_timestep_sampling`, one generator a sample."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    name = {"uniform": "none", "logit-normal": "logit_normal", "mode": "mode"}[scheme]
    draws = [
        compute_density_for_timestep_sampling(
            name, 1, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, generator=generator
        )
        for generator in generators
    ]
    return torch.cat(draws)


def _noising(scheduler: Any) -> Any:
    """The scheduler that diffusers' training scripts noise with: flow matching's own, or DDPM with the same betas."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if not is_flow(scheduler):
        return DDPMScheduler.from_config(scheduler.config)
    if "FlowMatch" in type(scheduler).__name__:
        return scheduler
    config = scheduler.config
    return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.get("flow_shift") or 1.0)


def _unknown(scheduler: Any) -> str:
    return (
        f"scheduler {type(scheduler).__name__} predicts {scheduler.config.get('prediction_type')!r}; "
        "epsilon, v_prediction and flow matching are supported"
    )

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
    return "FlowMatch" in type(scheduler).__name__


def clean_estimate(scheduler: Any, i: int, timestep: Tensor, latents: Tensor, prediction: Tensor) -> Tensor:
    """x0 from one prediction at step i (flow: x - sigma v; epsilon: DDIM Eq. 9; v: arXiv 2202.00512 Eq. 11)."""
    if is_flow(scheduler):
        sigma: Tensor = scheduler.sigmas[i].to(latents)
        return latents - sigma * prediction
    alpha_bar: Tensor = scheduler.alphas_cumprod.to(latents)[timestep.long()]
    if scheduler.config.prediction_type == "epsilon":
        return (latents - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return alpha_bar.sqrt() * latents - (1 - alpha_bar).sqrt() * prediction
    if scheduler.config.prediction_type == "sample":
        return prediction
    raise RecipeError(_unknown(scheduler))


def training_pair(scheduler: Any, clean: Tensor, noise: Tensor, density: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy latents, timesteps, target) for the denoising loss, as in diffusers' training scripts.

    clean, noise: (B, ...). density: (B,) numbers in [0, 1) that pick each sample's timestep.
    """
    steps = scheduler.config.num_train_timesteps
    index = (density * steps).long().clamp(max=steps - 1)
    shape = (-1, *[1] * (clean.dim() - 1))
    if is_flow(scheduler):
        timesteps = scheduler.timesteps.to(clean.device)[index]
        sigma = scheduler.sigmas.to(clean)[index].view(shape)
        return (1 - sigma) * clean + sigma * noise, timesteps, noise - clean
    noisy = scheduler.add_noise(clean, noise, index)
    if scheduler.config.prediction_type == "epsilon":
        return noisy, index, noise
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, index, scheduler.get_velocity(clean, noise, index)
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


def _unknown(scheduler: Any) -> str:
    return (
        f"scheduler {type(scheduler).__name__} predicts {scheduler.config.get('prediction_type')!r}; "
        "epsilon, v_prediction and flow matching are supported"
    )

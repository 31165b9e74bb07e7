"""Stable Diffusion 1.5: PNDM without its Runge-Kutta start, scaled linear betas, epsilon."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.stable_diffusion import StableDiffusion

from rewardtune.plugins import Guidance


def make():
    from diffusers import PNDMScheduler

    return tiny.stable_diffusion(
        PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
            set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
        )
    )  # fmt: skip


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_text_to_image.py: DDPM's noising of the same betas, the noise or v as target."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps = (u * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(clean, noise, timesteps)
    tokens = pipe.tokenizer(
        list(prompts), max_length=pipe.tokenizer.model_max_length, padding="max_length", truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        states = pipe.text_encoder(tokens.input_ids, return_dict=False)[0]
        prediction = pipe.unet(noisy, timesteps, states, return_dict=False)[0]
    v = scheduler.config.prediction_type == "v_prediction"
    return prediction, scheduler.get_velocity(clean, noise, timesteps) if v else noise


def latents(pipe, images):
    return pipe.vae.encode(images * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor


FAMILY = Family(
    title="Stable Diffusion 1.5",
    adapter=StableDiffusion,
    make=make,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 1.0}),
        Case("negative", Guidance("full", 7.5, "red"), {"guidance_scale": 7.5, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 3.0), {"guidance_scale": 3.0}),
    ],
    perturbations=[("vae", "scaling_factor", 0.61), ("scheduler", "steps_offset", 0), ("scheduler", "beta_end", 0.013)],
    training=training,
    latents=latents,
    lora_modules=("unet", "text_encoder"),
)

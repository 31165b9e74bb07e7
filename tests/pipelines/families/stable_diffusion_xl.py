"""Stable Diffusion XL, base: Euler with leading timesteps and an offset of 1, epsilon, zeros for no negative prompt."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.stable_diffusion_xl import StableDiffusionXL

from rewardtune.plugins import Guidance


def make():
    from diffusers import EulerDiscreteScheduler

    return tiny.stable_diffusion_xl(
        EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
            interpolation_type="linear", steps_offset=1, timestep_spacing="leading", use_karras_sigmas=False,
        )
    )  # fmt: skip


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_sdxl.py, on a picture that was neither resized nor cropped."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps = (u * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(clean, noise, timesteps)
    height, width = (side * 2 ** (len(pipe.vae.config.block_out_channels) - 1) for side in clean.shape[-2:])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(clean), dtype=torch.float32)
    states = []
    with torch.no_grad():
        for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            output = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        added = {"text_embeds": output.text_embeds, "time_ids": time_ids}
        prediction = pipe.unet(noisy, timesteps, torch.cat(states, -1), added_cond_kwargs=added, return_dict=False)[0]
    v = scheduler.config.prediction_type == "v_prediction"
    return prediction, scheduler.get_velocity(clean, noise, timesteps) if v else noise


def latents(pipe, images):
    config = pipe.vae.config
    encoded = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    if config.latents_mean is None or config.latents_std is None:
        return encoded * config.scaling_factor
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
    return (encoded - mean) * config.scaling_factor / std


FAMILY = Family(
    title="Stable Diffusion XL",
    adapter=StableDiffusionXL,
    make=make,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 1.0}),
        Case("negative", Guidance("full", 5.0, "red"), {"guidance_scale": 5.0, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 3.0), {"guidance_scale": 3.0}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("scheduler", "steps_offset", 0),
        ("scheduler", "timestep_spacing", "trailing"),
        ("scheduler", "beta_end", 0.013),
        ("pipeline", "force_zeros_for_empty_prompt", False),
    ],
    training=training,
    latents=latents,
    lora_modules=("unet", "text_encoder", "text_encoder_2"),
)

"""PixArt-Sigma: DPM-Solver++ as published, which is diffusers' defaults (linear betas, linspace), learned variance."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.pixart_sigma import PixArtSigma

from rewardtune.plugins import Guidance


def training(pipe, clean, noise, u, prompts):
    """The authors' train_pixart_lora_hf.py (diffusers has none): DDPM's noising, the half of the output without the
    variance. Prompts in lower case, as the pipeline has them, and at its 300 tokens."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps = (u * scheduler.config.num_train_timesteps).long()
    noisy = scheduler.add_noise(clean, noise, timesteps)
    tokens = pipe.tokenizer(
        [p.lower() for p in prompts], max_length=300, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        prediction = pipe.transformer(
            noisy, encoder_hidden_states=states, encoder_attention_mask=tokens.attention_mask, timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.chunk(2, 1)[0]  # fmt: skip
    return prediction, noise


def latents(pipe, images):
    return pipe.vae.encode(images * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor


PLAIN = {"use_resolution_binning": False}
FAMILY = Family(
    title="PixArt-Sigma",
    adapter=PixArtSigma,
    make=tiny.pixart_sigma,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 1.0, **PLAIN}),
        Case("negative", Guidance("full", 4.5, "red"), {"guidance_scale": 4.5, "negative_prompt": "red", **PLAIN}),
        Case("guided", Guidance("full", 3.0), {"guidance_scale": 3.0, **PLAIN}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("scheduler", "beta_end", 0.021),
        ("scheduler", "timestep_spacing", "trailing"),
        ("scheduler", "solver_order", 1),
    ],
    training=training,
    latents=latents,
)

"""Z-Image, base: FlowMatchEuler with shift 6, classifier-free guidance in the family's own sense (0 is off)."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.z_image import ZImage

from rewardtune.plugins import Guidance


def make():
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny.z_image()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0, use_dynamic_shifting=False)
    return pipe


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_z_image.py: time (1000 - t) / 1000, the output's sign turned."""
    scheduler = pipe.scheduler
    index = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[index]
    sigmas = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    embeddings, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=512)
    with torch.no_grad():
        raw = pipe.transformer(list(noisy.unsqueeze(2)), (1000 - timesteps) / 1000, embeddings, return_dict=False)[0]
    return -torch.stack(raw).squeeze(2), noise - clean


def latents(pipe, images):
    encoded = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


FAMILY = Family(
    title="Z-Image",
    adapter=ZImage,
    make=make,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 0.0}),
        Case("negative", Guidance("full", 3.0, "red"), {"guidance_scale": 3.0, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 2.0), {"guidance_scale": 2.0}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("vae", "shift_factor", 0.12),
        ("scheduler", "shift", 3.1),
    ],
    training=training,
    latents=latents,
)

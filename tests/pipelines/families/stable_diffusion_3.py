"""Stable Diffusion 3 medium: FlowMatchEuler with shift 3, three text encoders."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.stable_diffusion_3 import StableDiffusion3

from rewardtune.plugins import Guidance


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_sd3.py with --precondition_outputs 0, and the pipeline's 256 tokens for T5."""
    scheduler = pipe.scheduler
    index = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[index]
    sigmas = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    states, pooled = [], []
    with torch.no_grad():
        for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
            tokens = tokenizer(list(prompts), padding="max_length", max_length=16, truncation=True, return_tensors="pt")
            output = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        tokens = pipe.tokenizer_3(
            list(prompts), padding="max_length", max_length=256, truncation=True, return_tensors="pt"
        )
        last = pipe.text_encoder_3(tokens.input_ids)[0]
        both = torch.cat(states, -1)
        embeddings = torch.cat([torch.nn.functional.pad(both, (0, last.shape[-1] - both.shape[-1])), last], 1)
        prediction = pipe.transformer(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=embeddings,
            pooled_projections=torch.cat(pooled, -1), return_dict=False,
        )[0]  # fmt: skip
    return prediction, noise - clean


def latents(pipe, images):
    encoded = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


FAMILY = Family(
    title="Stable Diffusion 3",
    adapter=StableDiffusion3,
    make=tiny.stable_diffusion_3,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 1.0}),
        Case("negative", Guidance("full", 7.0, "red"), {"guidance_scale": 7.0, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 3.0), {"guidance_scale": 3.0}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("vae", "shift_factor", 0.12),
        ("scheduler", "shift", 3.1),
    ],
    training=training,
    latents=latents,
    lora_modules=("transformer", "text_encoder", "text_encoder_2"),
)

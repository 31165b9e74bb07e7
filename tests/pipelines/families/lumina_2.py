"""Lumina-Image 2.0: FlowMatchEuler with shift 6, Gemma-2 behind a system prompt, guidance rescaled row by row."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.lumina_2 import Lumina2

from rewardtune.plugins import Guidance


def make():
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    text = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    pipe = Lumina2Pipeline(
        tokenizer=tiny.words(),
        text_encoder=Gemma2Model(text),
        vae=AutoencoderKL(
            # eighths of the sides: the pipeline counts on it whatever the autoencoder
            latent_channels=4, block_out_channels=(4, 4, 8, 8), norm_num_groups=4, mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1, scaling_factor=0.6, shift_factor=0.1,
        ),
        transformer=Lumina2Transformer2DModel(
            sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )  # fmt: skip
    return tiny.ready(pipe)


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_lumina2.py, at the noise that the sampler's shift puts at `u`.

    The script takes the shifted sigma for the share of the *image*, so that most of what it trains on is nearly clean.
    The transformer's time is the image's share either way.
    """
    scheduler = pipe.scheduler
    image = 1.0 - scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()]
    sigmas = image.view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * noise + sigmas * clean
    states, mask, _, _ = pipe.encode_prompt(list(prompts), False, max_sequence_length=256)
    with torch.no_grad():
        prediction = pipe.transformer(
            hidden_states=noisy, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=image,
            return_dict=False,
        )[0]  # fmt: skip
    # the script's own target is the image minus the noise
    return -prediction, -(clean - noise)


def latents(pipe, images):
    encoded = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


FAMILY = Family(
    title="Lumina-Image 2.0",
    adapter=Lumina2,
    make=make,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 1.0}),
        Case("negative", Guidance("full", 4.0, "red"), {"guidance_scale": 4.0, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 3.0), {"guidance_scale": 3.0}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("vae", "shift_factor", 0.12),
        ("scheduler", "shift", 6.1),
    ],
    training=training,
    latents=latents,
    sizes=((32, 32), (32, 64)),
)

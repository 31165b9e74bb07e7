"""FLUX.1-dev: FlowMatchEuler with shifting by image size, embedded guidance, classifier-free guidance beside it."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.flux import Flux

from rewardtune.plugins import Guidance


def make():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, num_train_timesteps=1000,
        shift=3.0, use_dynamic_shifting=True,
    )  # fmt: skip
    return build(scheduler, guidance_embeds=True)


def build(scheduler, *, guidance_embeds):
    """A FluxPipeline of about 40 thousand parameters: 4 latent channels, sides halved."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0, projection_dim=16,
    )  # fmt: skip
    t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=tiny.autoencoder(scaling_factor=0.6, shift_factor=0.1),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tiny.words(length=16),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tiny.words(),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip
    return tiny.ready(pipe)


def unpack(pipe, packed, size):
    return pipe._unpack_latents(packed, *size, pipe.vae_scale_factor)


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_flux.py: sigmas as configured, so unshifted where shifting is dynamic."""
    scheduler, transformer = pipe.scheduler, pipe.transformer
    index = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[index]
    sigmas = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    batch, channels, height, width = noisy.shape
    states, pooled, text_ids = pipe.encode_prompt(list(prompts), max_sequence_length=512)
    with torch.no_grad():
        packed = transformer(
            hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=torch.tensor([3.5]).expand(batch) if transformer.config.guidance_embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=text_ids,
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
    size = height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
    return unpack(pipe, packed, size), noise - clean


def latents(pipe, images):
    encoded = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


FAMILY = Family(
    title="FLUX.1-dev",
    adapter=Flux,
    make=make,
    cases=[
        Case("off", Guidance("off"), {}),
        Case("embedded", Guidance("off", embedded=1.5), {"guidance_scale": 1.5}),
        Case("negative", Guidance("full", 3.0, "red"), {"true_cfg_scale": 3.0, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 2.0), {"true_cfg_scale": 2.0, "negative_prompt": ""}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("vae", "shift_factor", 0.12),
        ("scheduler", "use_dynamic_shifting", False),
        ("scheduler", "base_shift", 0.6),
        ("scheduler", "max_shift", 1.5),
        ("scheduler", "base_image_seq_len", 512),
        ("scheduler", "max_image_seq_len", 2048),
    ],
    training=training,
    latents=latents,
    unpack=unpack,
    lora_modules=("transformer", "text_encoder"),
)

"""Qwen-Image: FlowMatchEuler stretched to a last sigma, guidance that keeps each token's length, a film autoencoder."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.qwen_image import QwenImage

from rewardtune.plugins import Guidance


def make():
    """A QwenImagePipeline of about 60 thousand parameters: 4 latent channels, sides halved."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 2, "eos_token_id": 3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, num_train_timesteps=1000,
            shift=1.0, shift_terminal=0.02, use_dynamic_shifting=True,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[-0.3, 0.1, 0.4, -0.1], latents_std=[1.4, 0.8, 2.1, 1.1],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip
    return tiny.ready(pipe)


def tokenizer():
    """Words and marks: the pipeline puts a sentence before the prompt and drops its first 34 tokens."""
    from tokenizers import pre_tokenizers

    words = tiny.words()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def unpack(pipe, packed, size):
    return pipe._unpack_latents(packed, *size, pipe.vae_scale_factor).squeeze(2)


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_qwen_image.py: unshifted sigmas, since shifting is dynamic."""
    index = (u * pipe.scheduler.config.num_train_timesteps).long()
    timesteps = pipe.scheduler.timesteps[index]
    sigmas = pipe.scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    batch, channels, height, width = noisy.shape
    states, mask = pipe.encode_prompt(list(prompts), max_sequence_length=512)
    with torch.no_grad():
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask,
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * batch,
            return_dict=False,
        )[0]
    size = height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
    return unpack(pipe, packed, size), noise - clean


def latents(pipe, images):
    config = pipe.vae.config
    mean, deviation = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
    encoded = pipe.vae.encode((images * 2 - 1).unsqueeze(2)).latent_dist.mode().squeeze(2)
    return (encoded - mean) / deviation


FAMILY = Family(
    title="Qwen-Image",
    adapter=QwenImage,
    make=make,
    cases=[
        Case("off", Guidance("off"), {"true_cfg_scale": 1.0}),
        Case("negative", Guidance("full", 3.0, "red"), {"true_cfg_scale": 3.0, "negative_prompt": "red"}),
        Case("guided", Guidance("full", 2.0), {"true_cfg_scale": 2.0, "negative_prompt": ""}),
    ],
    perturbations=[
        ("vae", "latents_mean", [-0.3, 0.1, 0.4, 0.1]),
        ("vae", "latents_std", [1.4, 0.8, 2.0, 1.1]),
        ("scheduler", "shift_terminal", 0.1),
        ("scheduler", "max_shift", 1.5),
        ("scheduler", "max_image_seq_len", 2048),
    ],
    training=training,
    latents=latents,
    unpack=unpack,
)

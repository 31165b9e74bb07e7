"""Sana: DPM-Solver++ on flow matching's sigmas with shift 3, Gemma-2 behind a long instruction, DC-AE."""

from __future__ import annotations

import inspect

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.sana import Sana

from rewardtune.plugins import Guidance


def make(qk_norm=None):
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    text = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    pipe = SanaPipeline(
        tokenizer=tiny.words(),
        text_encoder=Gemma2Model(text),
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=8,
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)), scaling_factor=0.6,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=32, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
            sample_size=8, qk_norm=qk_norm,
        ),
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )  # fmt: skip
    return tiny.ready(pipe)


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_sana.py, with the checkpoint's shift.

    The script loads the DPM-Solver's settings into FlowMatchEuler, which knows no `flow_shift`: it trains at shift 1.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
    index = (u * scheduler.config.num_train_timesteps).long()
    sigmas = scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    states, mask, _, _ = pipe.encode_prompt(
        list(prompts), False, max_sequence_length=300, complex_human_instruction=instruction
    )
    with torch.no_grad():
        prediction = pipe.transformer(
            hidden_states=noisy, encoder_hidden_states=states, encoder_attention_mask=mask,
            timestep=scheduler.timesteps[index], return_dict=False,
        )[0]  # fmt: skip
    return prediction, noise - clean


def latents(pipe, images):
    return pipe.vae.encode(images * 2 - 1).latent * pipe.vae.config.scaling_factor


ALWAYS = {"use_resolution_binning": False}
FAMILY = Family(
    title="Sana",
    adapter=Sana,
    make=make,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 1.0, **ALWAYS}),
        Case("negative", Guidance("full", 4.5, "red"), {"guidance_scale": 4.5, "negative_prompt": "red", **ALWAYS}),
        Case("guided", Guidance("full", 3.0), {"guidance_scale": 3.0, **ALWAYS}),
    ],
    perturbations=[
        ("vae", "scaling_factor", 0.61),
        ("scheduler", "flow_shift", 3.1),
        ("transformer", "timestep_scale", 0.9),
    ],
    training=training,
    latents=latents,
    sizes=((32, 32), (32, 64)),
    difference=1e-3,  # linear attention is a quotient of ReLUs
)

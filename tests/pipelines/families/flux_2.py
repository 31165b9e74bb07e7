"""FLUX.2-dev: embedded guidance and no other, Mistral as text encoder.

The published checkpoint has a processor where this has a tokenizer: for prompts without pictures they are called alike,
and transformers' class needs torchvision.
"""

from __future__ import annotations

from dataclasses import replace

import tiny
import torch
from parity import Case

from families.flux_2_klein import CONSTANTS, autoencoder, scheduler, transformer
from families.flux_2_klein import FAMILY as KLEIN
from rewardtune.plugins import Guidance


def make():
    """A Flux2Pipeline of about 60 thousand parameters: the pipeline reads the text encoder's layer 30."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    torch.manual_seed(0)
    text = MistralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=31, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    template = "{% for m in messages %}{% for c in m['content'] %}a {{ c['text'] }} {% endfor %}{% endfor %}"
    pipe = Flux2Pipeline(
        scheduler=scheduler(),
        vae=autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=tiny.words(chat_template=template),
        transformer=transformer(joint_attention_dim=24, guidance_embeds=True),
    )
    return tiny.ready(pipe)


def unpack(pipe, packed, size):
    side = pipe.vae_scale_factor * 2
    return packed.transpose(1, 2).reshape(len(packed), -1, size[0] // side, size[1] // side)


FAMILY = replace(
    KLEIN,
    title="FLUX.2-dev",
    make=make,
    cases=[
        Case("off", Guidance("off"), {}),
        Case("ignored", Guidance("detached-negative", 3.0, embedded=2.5), {"guidance_scale": 2.5}),
    ],
    perturbations=CONSTANTS,
    unpack=unpack,
)

"""FLUX.2 Klein, base: classifier-free guidance away from the empty prompt, an autoencoder with a batch norm."""

from __future__ import annotations

import tiny
import torch
from parity import Case, Family
from rewardtune.pipelines.flux_2 import Flux2

from rewardtune.plugins import Guidance


def make(*, is_distilled=False):
    """A Flux2KleinPipeline of about 60 thousand parameters: the pipeline reads the text encoder's layer 27."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    pipe = Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=autoencoder(),
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=tiny.words(chat_template="{% for m in messages %}a {{ m['content'] }}{% endfor %}"),
        transformer=transformer(joint_attention_dim=24, guidance_embeds=False),
        is_distilled=is_distilled,
    )
    return tiny.ready(pipe)


def scheduler():
    """FLUX.1-dev's. The pipelines work out the shift themselves."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, num_train_timesteps=1000,
        shift=3.0, use_dynamic_shifting=True,
    )  # fmt: skip


def autoencoder():
    """4 latent channels, sides halved; statistics as after training, since a fresh batch norm changes nothing."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def transformer(**config):
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), **config,
    )  # fmt: skip


def unpack(pipe, denormalised, size):
    """This pipeline gives the autoencoder's own latents."""
    return normalised(pipe.vae, pipe._patchify_latents(denormalised))


def normalised(vae, patches):
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return (patches - mean) / deviation


def training(pipe, clean, noise, u, prompts):
    """diffusers' train_dreambooth_lora_flux2_klein.py and train_dreambooth_lora_flux2.py: unshifted sigmas."""
    index = (u * pipe.scheduler.config.num_train_timesteps).long()
    timesteps = pipe.scheduler.timesteps[index]
    sigmas = pipe.scheduler.sigmas[index].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * clean + sigmas * noise
    states, text_ids = pipe.encode_prompt(list(prompts), max_sequence_length=512)
    with torch.no_grad():
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy),
            timestep=timesteps / 1000,
            guidance=torch.full([1], 4.0).expand(len(noisy)) if pipe.transformer.config.guidance_embeds else None,
            encoder_hidden_states=states,
            txt_ids=text_ids,
            img_ids=pipe._prepare_latent_ids(noisy),
            return_dict=False,
        )[0]
    return pipe._unpack_latents_with_ids(packed, pipe._prepare_latent_ids(noisy)), noise - clean


def latents(pipe, images):
    return normalised(pipe.vae, pipe._patchify_latents(pipe.vae.encode(images * 2 - 1).latent_dist.mode()))


CONSTANTS = [
    ("vae", "batch_norm_eps", 0.1),
    ("vae", "bn.running_mean", 0.1),
    ("vae", "bn.running_var", 1.1),
    ("scheduler", "use_dynamic_shifting", False),
]
FAMILY = Family(
    title="FLUX.2 Klein, base",
    adapter=Flux2,
    make=make,
    cases=[
        Case("off", Guidance("off"), {"guidance_scale": 1.0}),
        Case("stronger", Guidance("full", 4.0), {"guidance_scale": 4.0}),
        Case("guided", Guidance("full", 2.0), {"guidance_scale": 2.0}),
    ],
    perturbations=[*CONSTANTS, ("pipeline", "is_distilled", True)],
    training=training,
    latents=latents,
    unpack=unpack,
)

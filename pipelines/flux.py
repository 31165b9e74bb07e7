"""FLUX.1 dev and schnell: diffusers' `FluxPipeline`, taken apart step by step.

Mirrors `FluxPipeline.__call__` of diffusers 0.42; tests hold the two equal to the last bit. Latents are pictures here,
(B, C, H, W); the pipeline keeps them packed, 2 x 2 of them a token, which only the transformer needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewardtune.diffusion.schedulers import fresh
from rewardtune.plugins import Guidance, Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the transformer takes of the prompts, by its arguments' names; `negative` is None without guidance."""

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None


class Flux:
    """See `plugins.Pipeline`."""

    family = "flux"
    denoiser = "transformer"
    comfyui = "diffusers"

    class Config(Options):
        """Options of the family."""

        max_sequence_length: int = 512
        """Prompt tokens of T5 after padding, as in the family's own pipeline. FLUX.1-schnell was trained with 256."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is FluxPipeline."""
        return model_index.get("_class_name") == "FluxPipeline"

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> Flux:
        from diffusers import FluxPipeline

        pipe = FluxPipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor: int = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        return factor * 2

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        self.image_size = (side, side)
        self.size_multiple = pipe.vae_scale_factor * 2
        # of the two text encoders diffusers loads adapters into CLIP's alone, and its script trains no other
        self.trainable = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
        self.lora_targets = {
            "transformer": [
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.to_out.0",
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                "ff.net.0.proj",
                "ff.net.2",
                "ff_context.net.0.proj",
                "ff_context.net.2",
                # diffusers' script ends here; these are the same layers in the single blocks, two thirds of all blocks.
                # In full, since the transformer's last layer is called proj_out too.
                "proj_mlp",
                *(f"single_transformer_blocks.{i}.proj_out" for i in range(pipe.transformer.config.num_single_layers)),
            ],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        # without a negative prompt, if only the empty one, the pipeline takes no notice of the scale
        guided = {"true_cfg_scale": guidance.scale, "negative_prompt": guidance.negative_prompt}
        embedded = {"guidance_scale": _embedded(guidance)} if self.pipe.transformer.config.guidance_embeds else {}
        return {
            **(guided if _guided(guidance) else {"true_cfg_scale": 1.0}),
            **embedded,
            "max_sequence_length": self.options.max_sequence_length,
        }

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        negative = [guidance.negative_prompt] * len(prompts)
        return Conditioning(self._text([str(p) for p in prompts]), self._text(negative) if _guided(guidance) else None)

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        from rewardtune.diffusion.conditioning import stacked

        joined = stacked(parts)
        # the positions of tokens have no batch in front: all prompts share them
        positive = {**joined.positive, "txt_ids": parts[0].positive["txt_ids"]}
        return Conditioning(positive, joined.negative and {**joined.negative, "txt_ids": positive["txt_ids"]})

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        transformer, factor = self.pipe.transformer, self.pipe.vae_scale_factor
        shape = (len(generators), transformer.config.in_channels // 4, size[0] // factor, size[1] // factor)
        noise: Tensor = randn_tensor(shape, list(generators), transformer.device, torch.float32)
        return noise

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        scheduler = fresh(self.scheduler)
        config = scheduler.config
        mu = calculate_shift(
            (size[0] // self.size_multiple) * (size[1] // self.size_multiple),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        timesteps, _ = retrieve_timesteps(scheduler, num_steps, self.pipe.transformer.device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        positive = self._velocity(latents, timestep, conditioning.positive, guidance)
        if not _guided(guidance) or conditioning.negative is None:
            return positive
        with torch.set_grad_enabled(torch.is_grad_enabled() and guidance.mode == "full"):
            negative = self._velocity(latents, timestep, conditioning.negative, guidance)
        return negative + guidance.scale * (positive - negative)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return images.float() / 2 + 0.5

    def encode_images(self, images: Tensor) -> Tensor:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
        shift, scale = float(vae.config.shift_factor), float(vae.config.scaling_factor)
        return (latents.float() - shift) * scale

    def _text(self, prompts: list[str]) -> Mapping[str, Tensor]:
        tokens, pooled, positions = self.pipe.encode_prompt(
            prompts, device=self.pipe.transformer.device, max_sequence_length=self.options.max_sequence_length
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled, "txt_ids": positions}

    def _velocity(self, latents: Tensor, timestep: Tensor, text: Mapping[str, Tensor], guidance: Guidance) -> Tensor:
        import torch

        transformer, factor = self.pipe.transformer, self.pipe.vae_scale_factor
        batch, channels, height, width = latents.shape
        strength = None
        if transformer.config.guidance_embeds:
            strength = torch.full((batch,), _embedded(guidance), device=latents.device, dtype=torch.float32)
        output: Tensor = transformer(
            hidden_states=self.pipe._pack_latents(latents.to(transformer.dtype), batch, channels, height, width),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=strength,
            img_ids=self.pipe._prepare_latent_image_ids(
                batch, height // 2, width // 2, latents.device, transformer.dtype
            ),
            return_dict=False,
            **text,
        )[0]
        velocity: Tensor = self.pipe._unpack_latents(output.float(), height * factor, width * factor, factor)
        return velocity


def _guided(guidance: Guidance) -> bool:
    return guidance.mode != "off" and guidance.scale > 1


def _embedded(guidance: Guidance) -> float:
    return 3.5 if guidance.embedded is None else guidance.embedded

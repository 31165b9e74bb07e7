"""Stable Diffusion XL (arXiv 2307.01952): diffusers' `StableDiffusionXLPipeline`, taken apart step by step.

Mirrors `StableDiffusionXLPipeline.__call__` of diffusers 0.42; tests hold the two equal to the last bit. Its watermark
is left out. The second model, which refines what the first one drew, is not needed and not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewardtune.diffusion.schedulers import fresh
from rewardtune.plugins import Guidance, Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Embeddings (B, tokens, width) of both text encoders side by side, and the pooled one (B, width) of the second."""

    embeddings: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Conditioning:
    """`negative` is None without guidance."""

    positive: Prompts
    negative: Prompts | None


class StableDiffusionXL:
    """See `plugins.Pipeline`."""

    family = "stable_diffusion_xl"
    denoiser = "unet"
    comfyui = "kohya"

    class Config(Options):
        """Options of the family."""

        clip_skip: int | None = None
        """Layers of the text encoders to leave out at their end, as in the family's own pipeline: beside the last."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is StableDiffusionXLPipeline."""
        return model_index.get("_class_name") == "StableDiffusionXLPipeline"

    @classmethod
    def load(
        cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str
    ) -> StableDiffusionXL:
        from diffusers import StableDiffusionXLPipeline

        pipe = StableDiffusionXLPipeline.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True, add_watermarker=False
        )
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        return math.lcm(8, factor)

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        self.image_size = (side, side)
        self.size_multiple = math.lcm(8, pipe.vae_scale_factor)  # 8: the family's own check
        modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
        self.trainable = {name: module for name, module in modules.items() if module is not None}
        text = ["q_proj", "k_proj", "v_proj", "out_proj"]
        self.lora_targets = {
            "unet": ["to_q", "to_k", "to_v", "to_out.0"],
            "text_encoder": text,
            "text_encoder_2": text,
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = guidance.scale if self._guided(guidance) else 1.0
        if self.pipe.unet.config.time_cond_proj_dim is not None:
            scale = self._embedded(guidance)
        negative = {"negative_prompt": guidance.negative_prompt} if guidance.negative_prompt else {}
        return {"guidance_scale": scale, **negative, "clip_skip": self.options.clip_skip}

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        guided = self._guided(guidance)
        # None: no negative prompt. Most checkpoints then take zeros (force_zeros_for_empty_prompt), not an empty text.
        negative_prompt = [guidance.negative_prompt] * len(prompts) if guidance.negative_prompt else None
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            [str(p) for p in prompts],
            device=self.pipe.unet.device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt if guided else None,
            clip_skip=self.options.clip_skip,
        )
        return Conditioning(Prompts(positive, pooled), Prompts(negative, negative_pooled) if guided else None)

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        from rewardtune.diffusion.conditioning import stacked

        return stacked(parts)

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        factor = self.pipe.vae_scale_factor
        shape = (len(generators), self.pipe.unet.config.in_channels, size[0] // factor, size[1] // factor)
        noise: Tensor = randn_tensor(shape, list(generators), self.pipe.unet.device, torch.float32)
        return noise

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        scheduler = fresh(self.scheduler)
        scheduler.set_timesteps(num_steps, device=self.pipe.unet.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler, scheduler.timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        positive, negative = conditioning.positive, conditioning.negative
        if not self._guided(guidance) or negative is None:
            return self._denoise(latents, timestep, positive, guidance)
        if guidance.mode == "detached-negative" and torch.is_grad_enabled():
            text = self._denoise(latents, timestep, positive, guidance)
            with torch.no_grad():
                base = self._denoise(latents, timestep, negative, guidance)
        else:
            both = Prompts(
                torch.cat([negative.embeddings, positive.embeddings]), torch.cat([negative.pooled, positive.pooled])
            )
            times = timestep.repeat(2) if timestep.dim() else timestep
            base, text = self._denoise(torch.cat([latents] * 2), times, both, guidance).chunk(2)
        return base + guidance.scale * (text - base)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, std = self._statistics(latents)
        if mean is None or std is None:
            latents = latents / vae.config.scaling_factor
        else:
            latents = latents * std / vae.config.scaling_factor + mean
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    def encode_images(self, images: Tensor) -> Tensor:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        if mean is None or std is None:
            return latents * float(vae.config.scaling_factor)
        return (latents - mean) * float(vae.config.scaling_factor) / std

    def _statistics(self, latents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mean and deviation of each latent channel, which a few checkpoints bring along."""
        mean, std = (
            None if values is None else latents.new_tensor(values).view(1, -1, 1, 1)
            for values in (self.pipe.vae.config.latents_mean, self.pipe.vae.config.latents_std)
        )
        return mean, std

    def _denoise(self, latents: Tensor, timestep: Tensor, prompts: Prompts, guidance: Guidance) -> Tensor:
        import torch

        unet, (height, width) = self.pipe.unet, (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
        # the picture's size before and after cropping, and where it was cropped: as if it had never been changed
        sizes = latents.new_tensor([height, width, 0, 0, height, width], dtype=prompts.embeddings.dtype)
        condition = None
        if unet.config.time_cond_proj_dim is not None:
            # distilled for guidance: the scale is an input, and one branch is enough
            scales = torch.tensor(self._embedded(guidance) - 1).repeat(len(latents))
            condition = self.pipe.get_guidance_scale_embedding(scales, embedding_dim=unet.config.time_cond_proj_dim)
            condition = condition.to(latents)
        output: Tensor = unet(
            latents.to(unet.conv_in.weight.dtype),
            timestep,
            encoder_hidden_states=prompts.embeddings,
            timestep_cond=condition,
            added_cond_kwargs={"text_embeds": prompts.pooled, "time_ids": sizes.repeat(len(latents), 1)},
            return_dict=False,
        )[0]
        return output.float()

    def _guided(self, guidance: Guidance) -> bool:
        return guidance.mode != "off" and guidance.scale > 1 and self.pipe.unet.config.time_cond_proj_dim is None

    @staticmethod
    def _embedded(guidance: Guidance) -> float:
        return 5.0 if guidance.embedded is None else guidance.embedded

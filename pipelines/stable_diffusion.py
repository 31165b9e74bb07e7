"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): diffusers' `StableDiffusionPipeline`, taken apart step by step.

Mirrors `StableDiffusionPipeline.__call__` of diffusers 0.42; tests hold the two equal to the last bit. The safety
checker is left out: it would blacken images under training.
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
    """Prompt embeddings (B, tokens, width); `negative` is None without guidance."""

    positive: Tensor
    negative: Tensor | None


class StableDiffusion:
    """See `plugins.Pipeline`."""

    family = "stable_diffusion"
    denoiser = "unet"
    comfyui = "kohya"

    class Config(Options):
        """Options of the family."""

        clip_skip: int | None = None
        """Layers of the text encoder to leave out at its end, as in the family's own pipeline."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is StableDiffusionPipeline."""
        return model_index.get("_class_name") == "StableDiffusionPipeline"

    @classmethod
    def load(
        cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str
    ) -> StableDiffusion:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True, safety_checker=None,
            requires_safety_checker=False,
        )  # fmt: skip
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor: int = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        return factor

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        side = pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.image_size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
        self.size_multiple = pipe.vae_scale_factor
        self.trainable = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        self.lora_targets = {
            "unet": ["to_q", "to_k", "to_v", "to_out.0"],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = guidance.scale if self._guided(guidance) else 1.0
        if self.pipe.unet.config.time_cond_proj_dim is not None:
            scale = self._embedded(guidance)
        negative = {"negative_prompt": guidance.negative_prompt} if guidance.negative_prompt else {}
        return {"guidance_scale": scale, **negative, "clip_skip": self.options.clip_skip}

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        guided = self._guided(guidance)
        positive, negative = self.pipe.encode_prompt(
            [str(p) for p in prompts],
            self.pipe.unet.device,
            1,
            guided,
            negative_prompt=[guidance.negative_prompt] * len(prompts) if guided else None,
            clip_skip=self.options.clip_skip,
        )
        return Conditioning(positive, negative)

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
        return scheduler, scheduler.timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        if not self._guided(guidance) or conditioning.negative is None:
            return self._denoise(latents, timestep, conditioning.positive, guidance)
        if guidance.mode == "detached-negative" and torch.is_grad_enabled():
            positive = self._denoise(latents, timestep, conditioning.positive, guidance)
            with torch.no_grad():
                negative = self._denoise(latents, timestep, conditioning.negative, guidance)
        else:
            embeddings = torch.cat([conditioning.negative, conditioning.positive])
            times = timestep.repeat(2) if timestep.dim() else timestep
            negative, positive = self._denoise(torch.cat([latents] * 2), times, embeddings, guidance).chunk(2)
        return negative + guidance.scale * (positive - negative)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return images.float() / 2 + 0.5

    def encode_images(self, images: Tensor) -> Tensor:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
        return latents.float() * float(vae.config.scaling_factor)

    def _denoise(self, latents: Tensor, timestep: Tensor, embeddings: Tensor, guidance: Guidance) -> Tensor:
        import torch

        unet = self.pipe.unet
        condition = None
        if unet.config.time_cond_proj_dim is not None:
            # distilled for guidance: the scale is an input, and one branch is enough
            scales = torch.full((len(latents),), self._embedded(guidance) - 1)  # the pipeline makes it on the CPU, too
            width = unet.config.time_cond_proj_dim
            condition = self.pipe.get_guidance_scale_embedding(scales, embedding_dim=width).to(latents)
        output: Tensor = unet(
            latents.to(unet.conv_in.weight.dtype), timestep, encoder_hidden_states=embeddings, timestep_cond=condition,
            return_dict=False,
        )[0]  # fmt: skip
        return output.float()

    def _guided(self, guidance: Guidance) -> bool:
        return guidance.mode != "off" and guidance.scale > 1 and self.pipe.unet.config.time_cond_proj_dim is None

    @staticmethod
    def _embedded(guidance: Guidance) -> float:
        return 7.5 if guidance.embedded is None else guidance.embedded

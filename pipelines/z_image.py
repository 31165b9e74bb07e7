"""Z-Image and Z-Image-Turbo (arXiv 2511.22699): diffusers' `ZImagePipeline`, taken apart step by step.

Mirrors `ZImagePipeline.__call__` of diffusers 0.42; tests hold the two equal to the last bit.
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
    """Prompt embeddings, one (tokens, width) tensor an image; `negative` is empty without guidance."""

    positive: list[Tensor]
    negative: list[Tensor]


class ZImage:
    """See `plugins.Pipeline`."""

    family = "z_image"
    denoiser = "transformer"
    comfyui = "diffusers"

    class Config(Options):
        """Options of the family."""

        max_sequence_length: int = 512
        """Prompt tokens after padding, as in the family's own pipeline. Short prompts encode faster with less."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is ZImagePipeline."""
        return model_index.get("_class_name") == "ZImagePipeline"

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> ZImage:
        from diffusers import ZImagePipeline

        pipe = ZImagePipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
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
        # diffusers' own default is 1024; a checkpoint trained at another size says so in its VAE's config
        side = pipe.vae.config.sample_size
        self.image_size = (1024, 1024) if side in (None, 32) else (side, side)
        self.size_multiple = pipe.vae_scale_factor * 2
        self.trainable = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
        self.lora_targets = {
            "transformer": [
                "to_q",
                "to_k",
                "to_v",
                "to_out.0",
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
            ],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = guidance.scale if _guided(guidance) else 0.0
        negative = {"negative_prompt": guidance.negative_prompt} if guidance.negative_prompt else {}
        return {"guidance_scale": scale, **negative, "max_sequence_length": self.options.max_sequence_length}

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        guided = _guided(guidance)
        positive, negative = self.pipe.encode_prompt(
            prompt=[str(p) for p in prompts],
            device=self.pipe.transformer.device,
            do_classifier_free_guidance=guided,
            negative_prompt=[guidance.negative_prompt] * len(prompts) if guided else None,
            max_sequence_length=self.options.max_sequence_length,
        )
        return Conditioning(list(positive), list(negative))

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning([p for c in parts for p in c.positive], [n for c in parts for n in c.negative])

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch

        channels = self.pipe.transformer.in_channels
        device = self.pipe.transformer.device
        latents: Tensor = self.pipe.prepare_latents(
            len(generators), channels, *size, torch.float32, device, list(generators), None
        )
        return latents

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        from diffusers.pipelines.z_image.pipeline_z_image import (
            calculate_shift,
            get_default_z_image_sigmas,
            retrieve_timesteps,
        )

        scheduler = fresh(self.scheduler)
        pixels_a_token = self.pipe.vae_scale_factor * 2
        config = scheduler.config
        mu = calculate_shift(
            (size[0] // pixels_a_token) * (size[1] // pixels_a_token),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = get_default_z_image_sigmas(num_steps)
        timesteps, _ = retrieve_timesteps(scheduler, num_steps, self.pipe.transformer.device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        # the transformer counts time from noise (0) to image (1) and predicts the velocity towards the image
        time = (1000 - timestep.expand(latents.shape[0])) / 1000
        if not _guided(guidance):
            return -self._velocity(latents, time, conditioning.positive)
        if guidance.mode == "detached-negative" and torch.is_grad_enabled():
            positive = self._velocity(latents, time, conditioning.positive)
            with torch.no_grad():
                negative = self._velocity(latents, time, conditioning.negative)
        else:
            both = self._velocity(
                latents.repeat(2, 1, 1, 1), time.repeat(2), conditioning.positive + conditioning.negative
            )
            positive, negative = both.chunk(2)
        return -(positive + guidance.scale * (positive - negative))

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

    def _velocity(self, latents: Tensor, time: Tensor, embeddings: list[Tensor]) -> Tensor:
        import torch

        transformer = self.pipe.transformer
        frames = list(latents.to(transformer.dtype).unsqueeze(2).unbind(0))
        outputs = transformer(frames, time, embeddings, return_dict=False)[0]
        return torch.stack([out.float() for out in outputs]).squeeze(2)


def _guided(guidance: Guidance) -> bool:
    return guidance.mode != "off" and guidance.scale > 0

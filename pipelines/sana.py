"""Sana and Sana 1.5 (arXiv 2410.10629, 2501.18427): diffusers' `SanaPipeline`, taken apart step by step.

Mirrors `SanaPipeline.__call__` of diffusers 0.42 without its resolution binning, which draws another size than the one
asked for and resizes the image; tests hold the two equal to the last bit. Sana-Sprint is another pipeline.
"""

from __future__ import annotations

import inspect
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
class Conditioning:
    """Prompt embeddings (B, tokens, width) and their masks (B, tokens); the negative pair is None without guidance."""

    positive: Tensor
    mask: Tensor
    negative: Tensor | None
    negative_mask: Tensor | None


class Sana:
    """See `plugins.Pipeline`."""

    family = "sana"
    denoiser = "transformer"
    comfyui = None  # it has no Sana among its models

    class Config(Options):
        """Options of the family."""

        max_sequence_length: int = 300
        """Prompt tokens after padding, as in the family's own pipeline."""
        complex_human_instruction: tuple[str, ...] | None = None
        """Lines that are put before every prompt. The pipeline's own when left out; none with an empty list."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is SanaPipeline."""
        return model_index.get("_class_name") == "SanaPipeline"

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> Sana:
        from diffusers import SanaPipeline

        pipe = SanaPipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor = 2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1)
        return math.lcm(32, factor * configs["transformer"]["patch_size"])

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        self.image_size = (side, side)
        # the pipeline asks for multiples of 32 whatever its autoencoder
        self.size_multiple = math.lcm(32, pipe.vae_scale_factor * pipe.transformer.config.patch_size)
        self.trainable = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
        self.lora_targets = {
            # diffusers' script leaves to_out out; the feed-forward has no linear layers, only convolutions
            "transformer": ["to_q", "to_k", "to_v", "to_out.0"],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = guidance.scale if _guided(guidance) else 1.0
        negative = {"negative_prompt": guidance.negative_prompt} if guidance.negative_prompt else {}
        return {
            "guidance_scale": scale,
            **negative,
            "max_sequence_length": self.options.max_sequence_length,
            "complex_human_instruction": self._instruction(),
            "use_resolution_binning": False,
        }

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        positive, mask, negative, negative_mask = self.pipe.encode_prompt(
            [str(p) for p in prompts],
            _guided(guidance),
            negative_prompt=[guidance.negative_prompt] * len(prompts),
            device=self.pipe.transformer.device,
            max_sequence_length=self.options.max_sequence_length,
            complex_human_instruction=self._instruction(),
        )
        return Conditioning(positive, mask, negative, negative_mask)

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        from rewardtune.diffusion.conditioning import stacked

        return stacked(parts)

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch

        transformer = self.pipe.transformer
        latents: Tensor = self.pipe.prepare_latents(
            len(generators), transformer.config.in_channels, *size, torch.float32, transformer.device, list(generators)
        )
        return latents

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        scheduler = fresh(self.scheduler)
        scheduler.set_timesteps(num_steps, device=self.pipe.transformer.device)
        return scheduler, scheduler.timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        c = conditioning
        time = timestep.expand(len(latents)) * self.pipe.transformer.config.timestep_scale
        if not _guided(guidance) or c.negative is None or c.negative_mask is None:
            return self._velocity(latents, time, c.positive, c.mask)
        if guidance.mode == "detached-negative" and torch.is_grad_enabled():
            positive = self._velocity(latents, time, c.positive, c.mask)
            with torch.no_grad():
                negative = self._velocity(latents, time, c.negative, c.negative_mask)
        else:
            embeddings, masks = torch.cat([c.negative, c.positive]), torch.cat([c.negative_mask, c.mask])
            both = self._velocity(torch.cat([latents] * 2), time.repeat(2), embeddings, masks)
            negative, positive = both.chunk(2)
        return negative + guidance.scale * (positive - negative)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        images: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return images.float() / 2 + 0.5

    def encode_images(self, images: Tensor) -> Tensor:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            # not a variational one: no posterior to take the mode of
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.dtype)).latent
        return latents.float() * float(vae.config.scaling_factor)

    def _velocity(self, latents: Tensor, time: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        transformer = self.pipe.transformer
        output: Tensor = transformer(
            latents.to(transformer.dtype), encoder_hidden_states=embeddings.to(transformer.dtype),
            encoder_attention_mask=mask, timestep=time, return_dict=False,
        )[0]  # fmt: skip
        return output.float()

    def _instruction(self) -> list[str]:
        if self.options.complex_human_instruction is not None:
            return list(self.options.complex_human_instruction)
        signature = inspect.signature(type(self.pipe).__call__)
        return list(signature.parameters["complex_human_instruction"].default)


def _guided(guidance: Guidance) -> bool:
    return guidance.mode != "off" and guidance.scale > 1

"""PixArt-Sigma (arXiv 2403.04692): diffusers' `PixArtSigmaPipeline`, taken apart step by step.

Mirrors `PixArtSigmaPipeline.__call__` of diffusers 0.42; tests hold the two equal to the last bit. Its resolution
binning is off: a picture is drawn at the size that is asked for. diffusers has no loader for this family's adapters, so
they are exported in peft's own form, which `PeftModel.from_pretrained(pipe.transformer, ...)` loads.
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
    """T5's embeddings (B, tokens, width), and which of their tokens are no padding (B, tokens)."""

    embeddings: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Conditioning:
    """`negative` is None without guidance."""

    positive: Prompts
    negative: Prompts | None


class PixArtSigma:
    """See `plugins.Pipeline`."""

    family = "pixart_sigma"
    denoiser = "transformer"
    comfyui = "diffusers"

    class Config(Options):
        """Options of the family."""

        clean_caption: bool = True
        """Strip links, markup and odd punctuation from prompts, as the family's own pipeline does where beautifulsoup4
        and ftfy are installed; elsewhere it only lowers the case."""
        max_sequence_length: int = 300
        """Prompt tokens after padding, as in the family's own pipeline."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is PixArtSigmaPipeline."""
        return model_index.get("_class_name") == "PixArtSigmaPipeline"

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> PixArtSigma:
        from diffusers import PixArtSigmaPipeline

        pipe = PixArtSigmaPipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        return math.lcm(8, factor * configs["transformer"]["patch_size"])

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        # what the pipeline would fall back to, decided once: it warns at every call, and a report says what was done
        clean = self.options.clean_caption and is_bs4_available() and is_ftfy_available()
        self._text = {"clean_caption": clean, "max_sequence_length": self.options.max_sequence_length}
        transformer = pipe.transformer.config
        side = transformer.sample_size * pipe.vae_scale_factor
        self.image_size = (side, side)
        # 8: the family's own check
        self.size_multiple = math.lcm(8, pipe.vae_scale_factor * transformer.patch_size)
        self.trainable = {"transformer": pipe.transformer}
        # Attention and feed-forward. The authors' script adapts the embeddings, the projections in and out and the
        # layers of the timestep too, which a shift of taste does not ask for.
        self.lora_targets = {"transformer": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]}

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = guidance.scale if _guided(guidance) else 1.0
        negative = {"negative_prompt": guidance.negative_prompt} if guidance.negative_prompt else {}
        return {"guidance_scale": scale, **negative, "use_resolution_binning": False, **self._text}

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        guided = _guided(guidance)
        positive, mask, negative, negative_mask = self.pipe.encode_prompt(
            [str(p) for p in prompts],
            guided,
            negative_prompt=guidance.negative_prompt,
            device=self.pipe.transformer.device,
            **self._text,
        )
        return Conditioning(Prompts(positive, mask), Prompts(negative, negative_mask) if guided else None)

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        from rewardtune.diffusion.conditioning import stacked

        return stacked(parts)

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        transformer, factor = self.pipe.transformer, self.pipe.vae_scale_factor
        shape = (len(generators), transformer.config.in_channels, size[0] // factor, size[1] // factor)
        noise: Tensor = randn_tensor(shape, list(generators), transformer.device, torch.float32)
        return noise

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        scheduler = fresh(self.scheduler)
        scheduler.set_timesteps(num_steps, device=self.pipe.transformer.device)
        return scheduler, scheduler.timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        positive, negative = conditioning.positive, conditioning.negative
        if not _guided(guidance) or negative is None:
            return self._denoise(latents, timestep, positive)
        if guidance.mode == "detached-negative" and torch.is_grad_enabled():
            text = self._denoise(latents, timestep, positive)
            with torch.no_grad():
                base = self._denoise(latents, timestep, negative)
        else:
            both = Prompts(
                torch.cat([negative.embeddings, positive.embeddings]), torch.cat([negative.mask, positive.mask])
            )
            times = timestep.repeat(2) if timestep.dim() else timestep
            base, text = self._denoise(torch.cat([latents] * 2), times, both).chunk(2)
        return base + guidance.scale * (text - base)

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

    def _denoise(self, latents: Tensor, timestep: Tensor, prompts: Prompts) -> Tensor:
        transformer = self.pipe.transformer
        output: Tensor = transformer(
            latents.to(transformer.dtype),
            encoder_hidden_states=prompts.embeddings,
            encoder_attention_mask=prompts.mask,
            timestep=timestep.expand(len(latents)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        config = transformer.config
        if config.out_channels // 2 == config.in_channels:
            output = output.chunk(2, dim=1)[0]  # the other half is a learned variance, which no solver here takes
        return output.float()


def _guided(guidance: Guidance) -> bool:
    return guidance.mode != "off" and guidance.scale > 1

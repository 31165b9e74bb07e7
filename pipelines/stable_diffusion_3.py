"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): diffusers' `StableDiffusion3Pipeline`, taken apart step by step.

Mirrors `StableDiffusion3Pipeline.__call__` of diffusers 0.42; tests hold the two equal to the last bit. Skip-layer
guidance, which that call leaves off by default, is not offered.
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
class Prompts:
    """Embeddings (B, tokens, width), CLIP's tokens and then T5's, and the pooled ones (B, width) of both CLIPs."""

    embeddings: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Conditioning:
    """`negative` is None without guidance."""

    positive: Prompts
    negative: Prompts | None


class StableDiffusion3:
    """See `plugins.Pipeline`."""

    family = "stable_diffusion_3"
    denoiser = "transformer"
    comfyui = "diffusers"

    class Config(Options):
        """Options of the family."""

        t5: bool = True
        """False leaves the third text encoder out, more weights than all the rest of 3.5 medium, as the family allows.
        Say so too for a checkpoint that was saved without it."""
        max_sequence_length: int = 256
        """T5's tokens after padding, as in the family's own pipeline; diffusers' training script takes 77."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is StableDiffusion3Pipeline."""
        return model_index.get("_class_name") == "StableDiffusion3Pipeline"

    @classmethod
    def load(
        cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str
    ) -> StableDiffusion3:
        from diffusers import StableDiffusion3Pipeline

        without: dict[str, Any] = {} if config.t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True, **without
        )
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor: int = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        patch: int = configs["transformer"]["patch_size"]
        return factor * patch

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        self.image_size = (side, side)
        self.size_multiple = pipe.vae_scale_factor * pipe.patch_size
        # not T5: diffusers has no loader for its adapters
        self.trainable = {
            "transformer": pipe.transformer,
            "text_encoder": pipe.text_encoder,
            "text_encoder_2": pipe.text_encoder_2,
        }
        text = ["q_proj", "k_proj", "v_proj", "out_proj"]
        self.lora_targets = {
            # Beside diffusers' script: the feed-forward layers, and by the shorter names also the second attention
            # (attn2) of 3.5 medium.
            "transformer": [
                "to_q",
                "to_k",
                "to_v",
                "to_out.0",
                "add_q_proj",
                "add_k_proj",
                "add_v_proj",
                "to_add_out",
                "ff.net.0.proj",
                "ff.net.2",
                "ff_context.net.0.proj",
                "ff_context.net.2",
            ],
            "text_encoder": text,
            "text_encoder_2": text,
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = guidance.scale if _guided(guidance) else 1.0
        negative = {"negative_prompt": guidance.negative_prompt} if guidance.negative_prompt else {}
        return {"guidance_scale": scale, **negative, "max_sequence_length": self.options.max_sequence_length}

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        guided = _guided(guidance)
        positive, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            [str(p) for p in prompts],
            None,
            None,
            device=self.pipe.transformer.device,
            do_classifier_free_guidance=guided,
            negative_prompt=[guidance.negative_prompt] * len(prompts) if guided else None,
            max_sequence_length=self.options.max_sequence_length,
        )
        return Conditioning(Prompts(positive, pooled), Prompts(negative, negative_pooled) if guided else None)

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        from rewardtune.diffusion.conditioning import stacked

        return stacked(parts)

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch

        channels, device = self.pipe.transformer.config.in_channels, self.pipe.transformer.device
        noise: Tensor = self.pipe.prepare_latents(
            len(generators), channels, *size, torch.float32, device, list(generators)
        )
        return noise

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler = fresh(self.scheduler)
        config, shift = scheduler.config, {}
        if config.get("use_dynamic_shifting"):
            shift["mu"] = calculate_shift(
                (size[0] // self.size_multiple) * (size[1] // self.size_multiple),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(num_steps, device=self.pipe.transformer.device, **shift)
        return scheduler, scheduler.timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        positive, negative = conditioning.positive, conditioning.negative
        if not _guided(guidance) or negative is None:
            return self._velocity(latents, timestep, positive)
        if guidance.mode == "detached-negative" and torch.is_grad_enabled():
            text = self._velocity(latents, timestep, positive)
            with torch.no_grad():
                base = self._velocity(latents, timestep, negative)
        else:
            both = Prompts(
                torch.cat([negative.embeddings, positive.embeddings]), torch.cat([negative.pooled, positive.pooled])
            )
            times = timestep.repeat(2) if timestep.dim() else timestep
            base, text = self._velocity(torch.cat([latents] * 2), times, both).chunk(2)
        return base + guidance.scale * (text - base)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    def encode_images(self, images: Tensor) -> Tensor:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
        shift, scale = float(vae.config.shift_factor), float(vae.config.scaling_factor)
        return (latents.float() - shift) * scale

    def _velocity(self, latents: Tensor, timestep: Tensor, prompts: Prompts) -> Tensor:
        transformer = self.pipe.transformer
        output: Tensor = transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=prompts.embeddings,
            pooled_projections=prompts.pooled,
            return_dict=False,
        )[0]
        return output.float()


def _guided(guidance: Guidance) -> bool:
    return guidance.mode != "off" and guidance.scale > 1

"""Lumina-Image 2.0 (arXiv 2503.21758): diffusers' `Lumina2Pipeline`, taken apart step by step.

Mirrors `Lumina2Pipeline.__call__` of diffusers 0.42 at its default `cfg_trunc_ratio` of 1, which guides every step;
tests hold the two equal to the last bit.
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
    """Prompt embeddings (B, tokens, width) and their masks (B, tokens); the negative pair is None without guidance."""

    positive: Tensor
    mask: Tensor
    negative: Tensor | None
    negative_mask: Tensor | None


_BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")
COMFYUI = {
    "x_embedder": ["x_embedder"],
    "cap_embedder.1": ["time_caption_embed.caption_embedder.1"],
    "t_embedder.mlp.0": ["time_caption_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_caption_embed.timestep_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear_1"],
    "final_layer.linear": ["norm_out.linear_2"],
    **{f"{name}.attention.qkv": [f"{name}.attn.to_{part}" for part in "qkv"] for name in _BLOCKS},
    **{f"{name}.attention.out": [f"{name}.attn.to_out.0"] for name in _BLOCKS},
    **{f"{name}.feed_forward.w{i}": [f"{name}.feed_forward.linear_{i}"] for name in _BLOCKS for i in (1, 2, 3)},
    **{f"{name}.adaLN_modulation.1": [f"{name}.norm1.linear"] for name in _BLOCKS[:2]},
}


class Lumina2:
    """See `plugins.Pipeline`."""

    family = "lumina_2"
    denoiser = "transformer"
    comfyui = COMFYUI

    class Config(Options):
        """Options of the family."""

        max_sequence_length: int = 256
        """Tokens of prompt and system prompt after padding, as in the family's own pipeline."""
        system_prompt: str | None = None
        """What is put before every prompt, though not before the negative one. The pipeline's own when left out."""
        cfg_normalization: bool = True
        """Scale the guided prediction back to the length of the unguided one, as in the family's own pipeline."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is Lumina2Pipeline, or Lumina2Text2ImgPipeline as it was called at first."""
        return model_index.get("_class_name") in ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> Lumina2:
        from diffusers import Lumina2Pipeline

        pipe = Lumina2Pipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        return 16  # the pipeline takes every autoencoder for one that shrinks the sides to an eighth

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        self.image_size = (pipe.default_image_size, pipe.default_image_size)
        self.size_multiple = pipe.vae_scale_factor * 2
        self.trainable = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
        self.lora_targets = {
            # diffusers' script adapts to_q, to_k and to_v only
            "transformer": ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "linear_3"],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = guidance.scale if _guided(guidance) else 1.0
        negative = {"negative_prompt": guidance.negative_prompt} if guidance.negative_prompt else {}
        return {
            "guidance_scale": scale,
            **negative,
            "max_sequence_length": self.options.max_sequence_length,
            "system_prompt": self.options.system_prompt,
            "cfg_normalization": self.options.cfg_normalization,
        }

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        positive, mask, negative, negative_mask = self.pipe.encode_prompt(
            [str(p) for p in prompts],
            _guided(guidance),
            negative_prompt=[guidance.negative_prompt] * len(prompts),
            device=self.pipe.transformer.device,
            system_prompt=self.options.system_prompt,
            max_sequence_length=self.options.max_sequence_length,
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
        import numpy as np
        from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift, retrieve_timesteps

        scheduler = fresh(self.scheduler)
        config = scheduler.config
        mu = calculate_shift(
            # the pipeline takes the number of channels for the length; the published scheduler uses neither
            self.pipe.transformer.config.in_channels,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas: Any = np.linspace(1.0, 1 / num_steps, num_steps)
        timesteps, _ = retrieve_timesteps(scheduler, num_steps, self.pipe.transformer.device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        c = conditioning
        # the transformer counts time from noise (0) to image (1) and predicts the velocity towards the image
        time = (1 - timestep / self.scheduler.config.num_train_timesteps).expand(len(latents))
        positive = self._velocity(latents, time, c.positive, c.mask)
        if not _guided(guidance) or c.negative is None or c.negative_mask is None:
            return -positive
        with torch.set_grad_enabled(torch.is_grad_enabled() and guidance.mode == "full"):
            negative = self._velocity(latents, time, c.negative, c.negative_mask)
        guided = negative + guidance.scale * (positive - negative)
        if self.options.cfg_normalization:
            guided = guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return -guided

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

    def _velocity(self, latents: Tensor, time: Tensor, embeddings: Tensor, mask: Tensor) -> Tensor:
        transformer = self.pipe.transformer
        output: Tensor = transformer(
            hidden_states=latents.to(transformer.dtype), timestep=time, encoder_hidden_states=embeddings,
            encoder_attention_mask=mask, return_dict=False,
        )[0]  # fmt: skip
        return output.float()


def _guided(guidance: Guidance) -> bool:
    return guidance.mode != "off" and guidance.scale > 1

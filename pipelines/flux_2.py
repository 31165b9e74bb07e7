"""FLUX.2 dev and Klein: diffusers' `Flux2Pipeline` and `Flux2KleinPipeline`, taken apart step by step.

Mirrors their `__call__` of diffusers 0.42; tests hold them equal to the last bit. The two differ in the text encoder,
which their `encode_prompt` hides, and in guidance: dev is distilled and takes its scale as an input, Klein's base
checkpoints have classifier-free guidance away from the empty prompt, Klein's distilled ones none. Latents are pictures
of patches here, (B, C, H, W) with 2 x 2 of the autoencoder's in a channel; the pipelines keep them as tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewardtune.diffusion.schedulers import fresh
from rewardtune.errors import RecipeError
from rewardtune.plugins import Guidance, Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the transformer takes of the prompts, by its arguments' names; `negative` is None without guidance."""

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None


# All linear layers but the modulations and norm_out.linear; the halves of the latter's rows have changed places.
COMFYUI = {
    "double_blocks.#.img_attn.qkv": [f"transformer_blocks.#.attn.to_{part}" for part in "qkv"],
    "double_blocks.#.txt_attn.qkv": [f"transformer_blocks.#.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.#.img_attn.proj": ["transformer_blocks.#.attn.to_out.0"],
    "double_blocks.#.txt_attn.proj": ["transformer_blocks.#.attn.to_add_out"],
    "double_blocks.#.img_mlp.0": ["transformer_blocks.#.ff.linear_in"],
    "double_blocks.#.img_mlp.2": ["transformer_blocks.#.ff.linear_out"],
    "double_blocks.#.txt_mlp.0": ["transformer_blocks.#.ff_context.linear_in"],
    "double_blocks.#.txt_mlp.2": ["transformer_blocks.#.ff_context.linear_out"],
    "single_blocks.#.linear1": ["single_transformer_blocks.#.attn.to_qkv_mlp_proj"],
    "single_blocks.#.linear2": ["single_transformer_blocks.#.attn.to_out"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
}


class Flux2:
    """See `plugins.Pipeline`."""

    family = "flux_2"
    denoiser = "transformer"
    comfyui = COMFYUI

    class Config(Options):
        """Options of the family."""

        max_sequence_length: int = 512
        """Prompt tokens after padding, as in the family's own pipelines. Short prompts encode faster with less."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is Flux2Pipeline or Flux2KleinPipeline."""
        return model_index.get("_class_name") in ("Flux2Pipeline", "Flux2KleinPipeline")

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> Flux2:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor: int = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
        return factor * 2

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        from diffusers import Flux2KleinPipeline

        self.pipe = pipe
        self.options = config or self.Config()
        self.klein = isinstance(pipe, Flux2KleinPipeline)
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        self.image_size = (side, side)
        self.size_multiple = pipe.vae_scale_factor * 2
        self.trainable = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
        self.lora_targets = {
            # diffusers' script for Klein adapts to_q, to_k, to_v and to_out.0 of the double blocks and the two layers
            # of the single ones, which hold attention and feed-forward in one; its script for dev leaves the single
            # blocks out. Here also the prompt's attention and the feed-forward layers of the double blocks.
            "transformer": [
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.to_out.0",
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                "ff.linear_in",
                "ff.linear_out",
                "ff_context.linear_in",
                "ff_context.linear_out",
                "attn.to_qkv_mlp_proj",
                # in full, since to_out is a list of layers in the double blocks
                *(
                    f"single_transformer_blocks.{i}.attn.to_out"
                    for i in range(pipe.transformer.config.num_single_layers)
                ),
            ],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        scale = _embedded(guidance)
        if self.klein:
            scale = guidance.scale if self._guided(guidance) else 1.0
        return {"guidance_scale": scale, "max_sequence_length": self.options.max_sequence_length}

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        if guidance.negative_prompt:
            raise RecipeError(
                f"rollout.negative_prompt: the pipelines of the family {self.family!r} take none; "
                "Klein's guidance leads away from the empty prompt. Leave it out."
            )
        negative = self._text([""] * len(prompts)) if self._guided(guidance) else None
        return Conditioning(self._text([str(p) for p in prompts]), negative)

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        from rewardtune.diffusion.conditioning import stacked

        return stacked(parts)

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        transformer, patch = self.pipe.transformer, self.size_multiple
        shape = (len(generators), transformer.config.in_channels, size[0] // patch, size[1] // patch)
        noise: Tensor = randn_tensor(shape, list(generators), transformer.device, torch.float32)
        return noise

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        import numpy as np
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, retrieve_timesteps

        scheduler = fresh(self.scheduler)
        tokens = (size[0] // self.size_multiple) * (size[1] // self.size_multiple)
        mu = compute_empirical_mu(image_seq_len=tokens, num_steps=num_steps)
        own = scheduler.config.get("use_flow_sigmas")
        sigmas = None if own else np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        timesteps, _ = retrieve_timesteps(scheduler, num_steps, self.pipe.transformer.device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        positive = self._velocity(latents, timestep, conditioning.positive, guidance)
        if not self._guided(guidance) or conditioning.negative is None:
            return positive
        with torch.set_grad_enabled(torch.is_grad_enabled() and guidance.mode == "full"):
            negative = self._velocity(latents, timestep, conditioning.negative, guidance)
        return negative + guidance.scale * (positive - negative)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, deviation = self._statistics()
        patches = self.pipe._unpatchify_latents(latents.to(vae.dtype) * deviation + mean)
        images: Tensor = vae.decode(patches, return_dict=False)[0]
        return images.float() / 2 + 0.5

    def encode_images(self, images: Tensor) -> Tensor:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
            mean, deviation = self._statistics()
            patches: Tensor = (self.pipe._patchify_latents(latents).float() - mean.float()) / deviation.float()
        return patches

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the latents, which the autoencoder keeps as a batch norm."""
        import torch

        vae = self.pipe.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return mean, deviation

    def _text(self, prompts: list[str]) -> Mapping[str, Tensor]:
        tokens, positions = self.pipe.encode_prompt(
            prompts, device=self.pipe.transformer.device, max_sequence_length=self.options.max_sequence_length
        )
        return {"encoder_hidden_states": tokens, "txt_ids": positions}

    def _velocity(self, latents: Tensor, timestep: Tensor, text: Mapping[str, Tensor], guidance: Guidance) -> Tensor:
        import torch

        transformer, batch = self.pipe.transformer, len(latents)
        strength = None
        if not self.klein:
            strength = torch.full((batch,), _embedded(guidance), device=latents.device, dtype=torch.float32)
        output: Tensor = transformer(
            hidden_states=self.pipe._pack_latents(latents.to(transformer.dtype)),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            guidance=strength,
            img_ids=self.pipe._prepare_latent_ids(latents).to(latents.device),
            return_dict=False,
            **text,
        )[0]
        return output.float().transpose(1, 2).reshape(latents.shape)

    def _guided(self, guidance: Guidance) -> bool:
        return self.klein and not self.pipe.config.is_distilled and guidance.mode != "off" and guidance.scale > 1


def _embedded(guidance: Guidance) -> float:
    return 4.0 if guidance.embedded is None else guidance.embedded

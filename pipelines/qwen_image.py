"""Qwen-Image (arXiv 2508.02324): diffusers' `QwenImagePipeline`, taken apart step by step.

Mirrors `QwenImagePipeline.__call__` of diffusers 0.42; tests hold the two equal to the last bit. Latents are pictures
here, (B, C, H, W); the pipeline keeps them packed, 2 x 2 of them a token, and its autoencoder takes films of one frame.
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

    positive: Mapping[str, Tensor | None]
    negative: Mapping[str, Tensor | None] | None


class QwenImage:
    """See `plugins.Pipeline`."""

    family = "qwen_image"
    denoiser = "transformer"
    comfyui = "diffusers"

    class Config(Options):
        """Options of the family."""

        max_sequence_length: int = 512
        """Longest prompt in tokens, as in the family's own pipeline; the rest is cut off."""

    @classmethod
    def matches(cls, model_index: Mapping[str, Any]) -> bool:
        """_class_name is QwenImagePipeline."""
        return model_index.get("_class_name") == "QwenImagePipeline"

    @classmethod
    def load(cls, path: str, config: Config, *, revision: str | None, dtype: torch.dtype, device: str) -> QwenImage:
        from diffusers import QwenImagePipeline

        pipe = QwenImagePipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True)
        return cls(pipe.to(device), config)

    @classmethod
    def size_multiple_of(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `plugins.LoadedPipeline`: what `size_multiple` will be."""
        factor: int = 2 ** len(configs["vae"]["temperal_downsample"])
        return factor * 2

    def __init__(self, pipe: Any, config: Config | None = None) -> None:
        self.pipe = pipe
        self.options = config or self.Config()
        # a copy as configured: `pipe(...)` leaves its own timesteps behind in the scheduler it is called with
        self.scheduler = fresh(pipe.scheduler)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        self.image_size = (side, side)
        self.size_multiple = pipe.vae_scale_factor * 2
        self.trainable = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
        self.lora_targets = {
            # diffusers' script stops after to_out.0; these are also the prompt's attention and the feed-forward layers
            "transformer": [
                "to_q",
                "to_k",
                "to_v",
                "to_out.0",
                "add_q_proj",
                "add_k_proj",
                "add_v_proj",
                "to_add_out",
                "img_mlp.net.0.proj",
                "img_mlp.net.2",
                "txt_mlp.net.0.proj",
                "txt_mlp.net.2",
            ],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }

    def call(self, guidance: Guidance) -> dict[str, Any]:
        # without a negative prompt, if only the empty one, the pipeline takes no notice of the scale
        guided = {"true_cfg_scale": guidance.scale, "negative_prompt": guidance.negative_prompt}
        return {
            **(guided if _guided(guidance) else {"true_cfg_scale": 1.0}),
            "max_sequence_length": self.options.max_sequence_length,
        }

    def encode(self, prompts: Sequence[str], guidance: Guidance) -> Conditioning:
        negative = [guidance.negative_prompt] * len(prompts)
        return Conditioning(self._text([str(p) for p in prompts]), self._text(negative) if _guided(guidance) else None)

    def join(self, parts: Sequence[Conditioning]) -> Conditioning:
        guided = parts[0].negative is not None
        negative = _padded([p.negative for p in parts if p.negative is not None]) if guided else None
        return Conditioning(_padded([part.positive for part in parts]), negative)

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        transformer, factor = self.pipe.transformer, self.pipe.vae_scale_factor
        shape = (len(generators), transformer.config.in_channels // 4, size[0] // factor, size[1] // factor)
        noise: Tensor = randn_tensor(shape, list(generators), transformer.device, torch.float32)
        return noise

    def timesteps(self, num_steps: int, size: tuple[int, int]) -> tuple[Any, Tensor]:
        import numpy as np
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

        scheduler = fresh(self.scheduler)
        config = scheduler.config
        mu = calculate_shift(
            (size[0] // self.size_multiple) * (size[1] // self.size_multiple),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        timesteps, _ = retrieve_timesteps(scheduler, num_steps, self.pipe.transformer.device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance) -> Tensor:
        import torch

        velocity = self._velocity(latents, timestep, conditioning.positive)
        if _guided(guidance) and conditioning.negative is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and guidance.mode == "full"):
                negative = self._velocity(latents, timestep, conditioning.negative)
            guided = negative + guidance.scale * (velocity - negative)
            # every token keeps the length that it has without guidance
            length = torch.norm(velocity, dim=-1, keepdim=True)
            velocity = guided * (length / torch.norm(guided, dim=-1, keepdim=True))
        factor = self.pipe.vae_scale_factor
        height, width = (side * factor for side in latents.shape[-2:])
        unpacked: Tensor = self.pipe._unpack_latents(velocity, height, width, factor)
        return unpacked.squeeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        # the one autoencoder that clamps by itself: no overshoot, and no gradient where it would be
        mean, inverse = self._statistics(vae.dtype)
        images: Tensor = vae.decode(latents.to(vae.dtype).unsqueeze(2) / inverse + mean, return_dict=False)[0]
        return images[:, :, 0].float() / 2 + 0.5

    def encode_images(self, images: Tensor) -> Tensor:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(vae.dtype).unsqueeze(2)).latent_dist.mode()
        mean, inverse = self._statistics(torch.float32)
        return ((latents.float() - mean) * inverse).squeeze(2)

    def _statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and inverse standard deviation of each channel of the autoencoder's latents."""
        import torch

        vae = self.pipe.vae
        mean, deviation = (
            torch.tensor(values).view(1, vae.config.z_dim, 1, 1, 1).to(vae.device, dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean, 1.0 / deviation

    def _text(self, prompts: list[str]) -> Mapping[str, Tensor | None]:
        tokens, mask = self.pipe.encode_prompt(
            prompts, device=self.pipe.transformer.device, max_sequence_length=self.options.max_sequence_length
        )
        return {"encoder_hidden_states": tokens, "encoder_hidden_states_mask": mask}

    def _velocity(self, latents: Tensor, timestep: Tensor, text: Mapping[str, Tensor | None]) -> Tensor:
        """Packed, since guidance measures tokens."""
        transformer = self.pipe.transformer
        batch, channels, height, width = latents.shape
        output: Tensor = transformer(
            hidden_states=self.pipe._pack_latents(latents.to(transformer.dtype), batch, channels, height, width),
            timestep=timestep.expand(batch).to(latents.dtype) / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
            **text,
        )[0]
        return output.float()


def _padded(texts: Sequence[Mapping[str, Tensor | None]]) -> Mapping[str, Tensor | None]:
    """Single prompts, whose tokens all count, as the pipeline pads them: with zeros, to the longest, and a mask where
    that was needed."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = [embeddings[0] for text in texts if (embeddings := text["encoder_hidden_states"]) is not None]
    mask = pad_sequence([torch.ones(len(one), dtype=torch.long, device=one.device) for one in tokens], batch_first=True)
    return {
        "encoder_hidden_states": pad_sequence(tokens, batch_first=True),
        "encoder_hidden_states_mask": None if mask.all() else mask,
    }


def _guided(guidance: Guidance) -> bool:
    return guidance.mode != "off" and guidance.scale > 1

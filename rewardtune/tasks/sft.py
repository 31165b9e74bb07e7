"""Diffusion finetuning on captioned images: the baseline that every reward-tuned model is compared with.

Follows diffusers' training scripts: flow matching (arXiv 2403.03206) or epsilon/v-prediction, one loss, no weighting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardtune.data.images import open_image, resize, to_tensor
from rewardtune.data.records import CaptionedImage
from rewardtune.diffusion.parameterisation import density, training_pair
from rewardtune.diffusion.prompt_cache import PromptCache
from rewardtune.plugins import Guidance, Pipeline
from rewardtune.randomness import choice, epoch_index, generator
from rewardtune.types import StepOutput

NO_GUIDANCE = Guidance(mode="off")


@dataclass(frozen=True)
class Batch:
    first: int
    clean: Tensor
    captions: list[str]
    noise: Tensor
    density: Tensor


class Sft:
    """See `tasks.Task`. `export` and `samples` are given, since they are the same for every diffusion task.
    prompt_cache: what encodes captions in place of the pipeline, without guidance, where no text encoder is trained."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        trainable: Mapping[str, nn.Module],
        rows: Sequence[CaptionedImage],
        size: tuple[int, int],
        cache_latents: bool,
        caption_dropout: float,
        timestep_density: str,
        seed: int,
        prompt_cache: PromptCache | None = None,
        samples: Callable[[], Tensor | None],
        export: Callable[[Path, Mapping[str, str]], None],
    ) -> None:
        self.pipeline, self.trainable, self.rows = pipeline, trainable, rows
        self.size, self.caption_dropout, self.timestep_density, self.seed = (
            size,
            caption_dropout,
            timestep_density,
            seed,
        )
        self.samples, self.export, self.prompt_cache = samples, export, prompt_cache
        self._cache = self._encode_all() if cache_latents else None

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        order = [epoch_index(self.seed, "sft/order", i, len(self.rows)) for i in indices]
        clean = self._cache[order] if self._cache is not None else self._encode(order)
        captions = [self._caption(i) for i in indices]
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=generator(self.seed, "sft/noise", i)) for i in indices]
        )
        draws = density(self.timestep_density, [generator(self.seed, "sft/timestep", i) for i in indices])
        return Batch(indices[0], clean, captions, noise.to(clean), draws.to(clean.device))

    def step(self, batch: Batch) -> StepOutput:
        noisy, timesteps, target = training_pair(self.pipeline.scheduler, batch.clean, batch.noise, batch.density)
        if self.prompt_cache is not None:
            conditioning = self.prompt_cache.encode(batch.captions, first=batch.first, prompt_of=self._caption)
        else:
            conditioning = self.pipeline.encode(batch.captions, NO_GUIDANCE)
        prediction = self.pipeline.predict(noisy, timesteps, conditioning, NO_GUIDANCE)
        return StepOutput(loss=(prediction.float() - target.float()).pow(2).mean())

    def evaluate(self) -> Mapping[str, float]:
        return {}

    def _caption(self, index: int) -> str:
        if choice(self.seed, "sft/dropout", index).random() < self.caption_dropout:
            return ""
        return self.rows[epoch_index(self.seed, "sft/order", index, len(self.rows))].caption

    def _encode(self, rows: Sequence[int]) -> Tensor:
        pictures = [to_tensor([open_image(self.rows[row].image)]) for row in rows]
        return self.pipeline.encode_images(torch.cat([resize(p, self.size) for p in pictures]).to(self._device()))

    def _encode_all(self) -> Tensor:
        """Latents of every row, on the CPU's memory budget: 8 KB an image at 16 x 16 x 8."""
        return torch.cat([self._encode(range(i, min(i + 32, len(self.rows)))) for i in range(0, len(self.rows), 32)])

    def _device(self) -> torch.device:
        return next(next(iter(self.trainable.values())).parameters()).device

"""Back-propagate rewards through the sampling chain: roll out, decode, score, differentiate.

The way the gradient is taken is `gradients/`'s; what is maximised is `scoring/reward_set.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Choice
from rewardtune.plugins import AnyPipeline, Guidance, Pipeline, WholeRollout
from rewardtune.randomness import choice, epoch_index, generator
from rewardtune.scoring.augment import Augmentation
from rewardtune.scoring.reward_set import RewardSet
from rewardtune.types import Prompt, StepOutput


@dataclass(frozen=True)
class Batch:
    step: int
    indices: tuple[int, ...]
    prompts: list[Prompt]
    noise: Tensor | None
    """None where the pipeline is run as a whole, and draws it."""


class DirectReward:
    """See `tasks.Task`. `method` is a `gradients.Method` with its settings bound; what the method chooses, for a
    pipeline that is run as a whole."""

    def __init__(
        self,
        pipeline: AnyPipeline,
        *,
        trainable: Mapping[str, nn.Module],
        prompts: Sequence[Prompt],
        rewards: RewardSet,
        method: Callable[..., Tensor] | Choice,
        num_steps: int,
        guidance: Guidance,
        size: tuple[int, int],
        seed: int,
        augmentation: Augmentation | None,
        samples: Callable[[], Tensor | None],
        export: Callable[[Path, Mapping[str, str]], None],
    ) -> None:
        self.pipeline, self.trainable, self.prompts, self.rewards = pipeline, trainable, prompts, rewards
        self.method, self.num_steps, self.guidance, self.size, self.seed = method, num_steps, guidance, size, seed
        self.augmentation, self.samples, self.export = augmentation, samples, export

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        rows = [epoch_index(self.seed, "prompts/order", i, len(self.prompts)) for i in indices]
        prompts = [self.prompts[row] for row in rows]
        if isinstance(self.pipeline, WholeRollout):
            noise = None
        else:
            noise = self.pipeline.noise(self._generators(indices), self.size)
        return Batch(step, tuple(indices), prompts, noise)

    def step(self, batch: Batch) -> StepOutput:
        images, prompts = self._images(batch).clamp(0, 1), batch.prompts
        if self.augmentation is not None:
            images = self.augmentation.views(images, [generator(self.seed, "augment", i) for i in batch.indices])
            prompts = prompts * self.augmentation.copies
        value, metrics = self.rewards.score(images, prompts)
        return StepOutput(loss=-value.mean(), metrics={**metrics, "objective": value.detach().mean().item()})

    def evaluate(self) -> Mapping[str, float]:
        return {}

    def _images(self, batch: Batch) -> Tensor:
        if isinstance(self.pipeline, WholeRollout):
            assert isinstance(self.method, Choice)
            return self.pipeline.rollout(
                batch.prompts, self._generators(batch.indices), num_steps=self.num_steps, guidance=self.guidance,
                size=self.size, **self.method._asdict(),
            )  # fmt: skip
        assert callable(self.method) and batch.noise is not None
        conditioning = self._encode(self.pipeline, batch.prompts)
        chain = Chain(self.pipeline, conditioning, num_steps=self.num_steps, guidance=self.guidance, size=self.size)
        latents = self.method(chain, chain.start(batch.noise), choice(self.seed, "gradient/step", batch.step))
        # recomputing the decoder keeps its graph away while the reward's lives, and the other way round
        images: Tensor = checkpoint(self.pipeline.decode, latents, use_reentrant=False, preserve_rng_state=False)
        return images

    def _encode(self, pipeline: Pipeline, prompts: Sequence[Prompt]) -> Any:
        """Conditioning; with graph only where a text encoder is trained."""
        encoder = self.trainable.get("text_encoder")
        with torch.set_grad_enabled(encoder is not None):
            return pipeline.encode(prompts, self.guidance)

    def _generators(self, indices: Sequence[int]) -> list[torch.Generator]:
        return [generator(self.seed, "rollout/noise", i) for i in indices]

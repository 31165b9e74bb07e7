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
from rewardtune.plugins import Guidance, Pipeline
from rewardtune.randomness import choice, epoch_index, generator
from rewardtune.scoring.augment import Augmentation
from rewardtune.scoring.reward_set import RewardSet
from rewardtune.types import Prompt, StepOutput


@dataclass(frozen=True)
class Batch:
    step: int
    indices: tuple[int, ...]
    prompts: list[Prompt]
    noise: Tensor


class DirectReward:
    """See `tasks.Task`. `method` is a `gradients.Method` with its settings bound."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        trainable: Mapping[str, nn.Module],
        prompts: Sequence[Prompt],
        rewards: RewardSet,
        method: Callable[..., Tensor],
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
        noise = self.pipeline.noise([generator(self.seed, "rollout/noise", i) for i in indices], self.size)
        return Batch(step, tuple(indices), prompts, noise)

    def step(self, batch: Batch) -> StepOutput:
        conditioning = self._encode(batch.prompts)
        chain = Chain(self.pipeline, conditioning, num_steps=self.num_steps, guidance=self.guidance, size=self.size)
        latents = self.method(chain, chain.start(batch.noise), choice(self.seed, "gradient/step", batch.step))
        # recomputing the decoder keeps its graph away while the reward's lives, and the other way round
        images = checkpoint(self.pipeline.decode, latents, use_reentrant=False, preserve_rng_state=False)
        images, prompts = images.clamp(0, 1), batch.prompts
        if self.augmentation is not None:
            images = self.augmentation.views(images, [generator(self.seed, "augment", i) for i in batch.indices])
            prompts = prompts * self.augmentation.copies
        value, metrics = self.rewards.score(images, prompts)
        return StepOutput(loss=-value.mean(), metrics={**metrics, "objective": value.detach().mean().item()})

    def evaluate(self) -> Mapping[str, float]:
        return {}

    def _encode(self, prompts: Sequence[Prompt]) -> Any:
        """Conditioning; with graph only where a text encoder is trained, any of them."""
        with torch.set_grad_enabled(any(name != self.pipeline.denoiser for name in self.trainable)):
            return self.pipeline.encode(prompts, self.guidance)

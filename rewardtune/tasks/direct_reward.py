"""Back-propagate rewards through the sampling chain: roll out, decode, score, differentiate.

The way the gradient is taken is `gradients/`'s; what is maximised is `scoring/reward_set.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewardtune.diffusion import lora
from rewardtune.diffusion.prompt_cache import PromptCache
from rewardtune.diffusion.rollout import Chain
from rewardtune.gradients import Choice, Draws, Finished
from rewardtune.plugins import AnyPipeline, Guidance, Pipeline, WholeRollout
from rewardtune.randomness import choice, epoch_index, generator
from rewardtune.scoring.augment import Augmentation
from rewardtune.scoring.reward_set import RewardSet
from rewardtune.tasks.sft import Sft
from rewardtune.types import Prompt, StepOutput


@dataclass(frozen=True)
class Batch:
    step: int
    indices: tuple[int, ...]
    prompts: list[Prompt]
    noise: Tensor | None
    """None where the pipeline is run as a whole, and draws it."""


class DirectReward:
    """See `tasks.Task`. method: a `gradients.Method` with its settings bound, or for a pipeline
    that is run as a whole what gives its `gradients.Choice` of a micro-batch. velocity: weight of the pull to the
    frozen start. sft: a task whose loss is added, and its weight. sliced: decode image by
    image, so that the decoder's graph is one image's. recompute_decoder: decode again on the
    way back in place of keeping the decoder's graph while the reward's lives. batch_size:
    samples of a whole optimiser step, where a step comes in several parts. prompt_cache: what
    encodes prompts in place of the pipeline, where no text encoder is trained."""

    def __init__(
        self,
        pipeline: AnyPipeline,
        *,
        trainable: Mapping[str, nn.Module],
        prompts: Sequence[Prompt],
        rewards: RewardSet,
        method: Callable[..., Finished | Choice],
        num_steps: int,
        guidance: Guidance,
        size: tuple[int, int],
        seed: int,
        augmentation: Augmentation | None,
        balance: str = "value",
        velocity: float = 0.0,
        sft: tuple[Sft, float] | None = None,
        sliced: bool = False,
        recompute_decoder: bool = True,
        batch_size: int | None = None,
        prompt_cache: PromptCache | None = None,
        samples: Callable[[], Tensor | None],
        export: Callable[[Path, Mapping[str, str]], None],
    ) -> None:
        self.pipeline, self.trainable, self.prompts, self.rewards = pipeline, trainable, prompts, rewards
        self.method, self.num_steps, self.guidance, self.size, self.seed = method, num_steps, guidance, size, seed
        self.augmentation, self.samples, self.export = augmentation, samples, export
        self.prompt_cache = prompt_cache
        self.balance, self.velocity, self.sft = balance, velocity, sft
        self.sliced, self.recompute_decoder, self.batch_size = sliced, recompute_decoder, batch_size

    def batch(self, step: int, indices: Sequence[int]) -> Batch:
        prompts = [self._prompt(i) for i in indices]
        if isinstance(self.pipeline, WholeRollout):
            noise = None
        else:
            noise = self.pipeline.noise(self._generators(indices), self.size)
        return Batch(step, tuple(indices), prompts, noise)

    def step(self, batch: Batch) -> StepOutput:
        images, weights, chain = self._images(batch)
        copies = len(images) // len(batch.prompts)
        loss, metrics = self._reward(images.clamp(0, 1), batch, copies, weights)
        if self.velocity and chain is not None:
            distance = self._distance(chain, batch.step)
            loss, metrics["velocity"] = loss + self.velocity * distance, distance.item()
        if self.sft is not None:
            task, weight = self.sft
            denoising = task.step(task.batch(batch.step, batch.indices)).loss
            loss, metrics["sft_loss"] = loss + weight * denoising, denoising.item()
        return StepOutput(loss=loss, metrics=metrics)

    def _images(self, batch: Batch) -> tuple[Tensor, Tensor | None, Chain | None]:
        """Images with graph, the method's weights of them, and the chain that drew them, where one did."""
        keys = [generator(self.seed, "gradient/noise", i) for i in batch.indices]
        draws = Draws(choice(self.seed, "gradient/step", batch.step), keys)
        if isinstance(self.pipeline, WholeRollout):
            chosen = self.method(draws)
            assert isinstance(chosen, Choice)
            images = self.pipeline.rollout(
                batch.prompts, self._generators(batch.indices), num_steps=self.num_steps, guidance=self.guidance,
                size=self.size, **chosen._asdict(),
            )  # fmt: skip
            return images, None, None
        assert batch.noise is not None
        conditioning = self._encode(self.pipeline, batch)
        chain = Chain(self.pipeline, conditioning, num_steps=self.num_steps, guidance=self.guidance, size=self.size)
        finished = self.method(chain, batch.noise, draws)
        assert isinstance(finished, Finished)
        latents, weights = finished
        decode = self.pipeline.decode if not self.recompute_decoder else partial(_again, self.pipeline.decode)
        parts = [decode(part) for part in (latents.split(1) if self.sliced else [latents])]
        return torch.cat(parts) if self.sliced else parts[0], weights, chain

    def _reward(
        self, images: Tensor, batch: Batch, copies: int, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss with graph to `images`, `copies` of each prompt's image, copy by copy."""
        prompts = batch.prompts * copies
        if self.augmentation is not None:
            keys = [
                generator(self.seed, "augment", i, *([c] if c else [])) for c in range(copies) for i in batch.indices
            ]
            images = self.augmentation.views(images, keys)
            prompts = prompts * self.augmentation.copies
            weights = None if weights is None else weights.repeat(self.augmentation.copies)
        if len(self.rewards.terms) == 1:
            value, metrics = self.rewards.score(images, prompts)
            loss = -(value if weights is None else weights * value).mean()
        else:
            share = len(batch.prompts) / (self.batch_size or len(batch.prompts))
            gradient, value, metrics = self.rewards.gradient(
                images, prompts, weights, balance=self.balance, share=share
            )
            # the product's gradient at the images is `gradient`; its value is none that anyone should read
            product = (images * gradient).sum()
            loss = -(product - product.detach()) - value.mean()
        return loss, {**metrics, "objective": value.detach().mean().item()}

    def _distance(self, chain: Chain, step: int) -> Tensor:
        """Mean squared distance of predictions to the frozen start's, at one random step of the roll-out."""
        visited = sorted(chain.visited)
        i = choice(self.seed, "gradient/velocity", step).choice(visited)
        with torch.no_grad(), lora.disabled(self.trainable):
            wanted = chain.predict(i, chain.visited[i])
        return (chain.predict(i, chain.visited[i]) - wanted).pow(2).mean()

    def evaluate(self) -> Mapping[str, float]:
        return {}

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[epoch_index(self.seed, "prompts/order", index, len(self.prompts))]

    def _encode(self, pipeline: Pipeline, batch: Batch) -> Any:
        """Conditioning; with graph only where a text encoder is trained, any of them."""
        if self.prompt_cache is not None:
            return self.prompt_cache.encode(batch.prompts, first=batch.indices[0], prompt_of=self._prompt)
        with torch.set_grad_enabled(any(name != self.pipeline.denoiser for name in self.trainable)):
            return pipeline.encode(batch.prompts, self.guidance)

    def _generators(self, indices: Sequence[int]) -> list[torch.Generator]:
        return [generator(self.seed, "rollout/noise", i) for i in indices]


def _again(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Decoded now and again on the way back: the decoder's graph and the reward's never coexist."""
    images: Tensor = checkpoint(decode, latents, use_reentrant=False, preserve_rng_state=False)
    return images

"""Prompts and noise -> latents -> images: the sampling chain, one step at a time, with or without gradient.

`gradients/` decides which steps carry gradient; this file only knows how to take one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from rewardtune.diffusion import lora
from rewardtune.diffusion.parameterisation import clean_estimate, shares
from rewardtune.diffusion.recompute import again, few_trained
from rewardtune.diffusion.schedulers import schedule
from rewardtune.errors import RecipeError
from rewardtune.plugins import AnyPipeline, Guidance, Pipeline, WholeRollout

Denoiser = Literal["through", "detached", "frozen"]
"""How far a gradient may go into a step: through the denoiser to the latents before it; to its weights only; or past
it, along the scheduler's own arithmetic."""


class Chain:
    """The denoising chain of one batch: T steps of the checkpoint's own scheduler.

    A scheduler keeps state (its step index, earlier outputs). `advance(i, ...)` works on a copy of the state before
    step i, so a step can be run again, which recomputation under gradient needs.
    """

    def __init__(
        self, pipeline: Pipeline, conditioning: Any, *, num_steps: int, guidance: Guidance, size: tuple[int, int]
    ) -> None:
        self.pipeline, self.conditioning, self.guidance = pipeline, conditioning, guidance
        scheduler, self.timesteps = schedule(pipeline, num_steps, size)
        self._states = [scheduler]
        self.visited: dict[int, Tensor] = {}
        """Step -> the latents before it, without graph, of the steps taken so far."""

    def start(self, noise: Tensor) -> Tensor:
        """Standard normal noise -> latents before step 0."""
        scale = getattr(self._states[0], "init_noise_sigma", 1.0)
        return noise * scale

    def __len__(self) -> int:
        return len(self.timesteps)

    def predict(self, i: int, latents: Tensor) -> Tensor:
        """The guided prediction at step i, in the scheduler's parameterisation."""
        scaled = self._scaled(i, latents)
        return self.pipeline.predict(scaled, self.timesteps[i], self.conditioning, self.guidance)

    def advance(
        self, i: int, latents: Tensor, *, denoiser: Denoiser = "through", recompute: bool = False, strength: float = 1.0
    ) -> Tensor:
        """Latents before step i -> latents after it.

        denoiser: what carries gradient beside the scheduler's own arithmetic. recompute: keep no graph of the
        denoiser, call it again on the way back. strength: factor on the gradient of the prediction.
        """
        self.visited[i] = latents.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and denoiser != "frozen"):
            prediction = self._predicted(i, latents if denoiser == "through" else latents.detach(), recompute)
        if strength != 1.0:
            prediction = prediction.detach() + strength * (prediction - prediction.detach())
        scheduler = _copy(self._states[i])
        after = self._step(scheduler, prediction.float(), self.timesteps[i], latents)
        if len(self._states) == i + 1:
            self._states.append(scheduler)
        return after

    def run(self, latents: Tensor, start: int, stop: int) -> Tensor:
        """Steps `start` to `stop` (exclusive) without gradient."""
        with torch.no_grad():
            for i in range(start, stop):
                latents = self.advance(i, latents)
        return latents

    def clean(self, i: int, latents: Tensor, prediction: Tensor | None = None, *, recompute: bool = False) -> Tensor:
        """The estimate of the finished latents x0 at step i, from its prediction (made here when left out, with the
        graph of the denoiser or, to recompute, without)."""
        if prediction is None:
            prediction = self._predicted(i, latents, recompute)
        return clean_estimate(self._states[0], i, self.timesteps[i], self._scaled(i, latents), prediction)

    def shares(self, i: int) -> tuple[Tensor, Tensor]:
        """(a, s) of step i, or of the end (i = T): the denoiser sees a x0 + s noise. Scalars."""
        if i == len(self):
            return torch.ones(()), torch.zeros(())
        return shares(self._states[0], i, self.timesteps[i])

    def contributions(self) -> list[float]:
        """How far the finished latents move, by the scheduler's arithmetic alone, a unit of each step's prediction.

        For Euler on flow matching, the fall of the noise level; half of that for each of Heun's two predictions.
        """
        said = [torch.zeros(1, 1, 1, 1, device=self.timesteps.device, requires_grad=True) for _ in self.timesteps]
        latents, scheduler = torch.zeros_like(said[0]), _copy(self._states[0])
        with torch.enable_grad():
            for prediction, timestep in zip(said, self.timesteps, strict=True):
                latents = self._step(scheduler, prediction, timestep, latents)
        return [abs(float(slope)) for slope in torch.autograd.grad(latents.sum(), said, materialize_grads=True)]

    def renoise(self, i: int, clean: Tensor, noise: Tensor) -> Tensor:
        """Finished latents and standard normal noise -> latents before step i, as the scheduler keeps them."""
        signal, sigma = (share.to(clean) for share in self.shares(i))
        return (signal * clean + sigma * noise) / self._scaled(i, torch.ones((), dtype=clean.dtype))

    def _predicted(self, i: int, latents: Tensor, recompute: bool) -> Tensor:
        """`predict`; to recompute, without the denoiser's graph. The scheduler's step stays in the graph: multistep
        solvers carry earlier predictions along."""
        if not (recompute and torch.is_grad_enabled()):
            return self.predict(i, latents)
        return again(partial(self.predict, i), latents, self._few_trained)

    @cached_property
    def _few_trained(self) -> Sequence[Tensor] | None:
        return few_trained(self.pipeline)

    @staticmethod
    def _step(scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True  # in `predict`, by another copy
        after: Tensor = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return after

    def _scaled(self, i: int, latents: Tensor) -> Tensor:
        """Latents as the denoiser takes them: some schedulers keep them at another scale between steps."""
        scheduler = self._states[i]
        if not hasattr(scheduler, "scale_model_input"):
            return latents
        scaled: Tensor = _copy(scheduler).scale_model_input(latents, self.timesteps[i])
        return scaled


def sample(
    pipeline: AnyPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    num_steps: int,
    guidance: Guidance,
    size: tuple[int, int] | None = None,
    annealed: bool = False,
) -> Tensor:
    """Images (B, 3, H, W) float32 in [0, 1], equal to `pipe(prompts, generator=generators)`. No gradient.

    One generator an image, so that an image does not depend on its neighbours' seeds. annealed: with the denoiser's
    adapters at scale i / T in step i of T, so that the start lays out the image and the tuned model finishes it. This
    is DRaFT+'s linear annealing (NeMo-Aligner, examples/mm/stable_diffusion/anneal_sdxl.py), of weights where theirs is
    of predictions, so that a step costs no second pass.
    """
    size = size or pipeline.image_size
    with torch.no_grad():
        if isinstance(pipeline, WholeRollout):
            if annealed:
                raise RecipeError(
                    f"adapters cannot be annealed over the steps in the family {pipeline.family!r}, which runs "
                    f"{type(pipeline.pipe).__name__} as a whole. Give a number in place of `linear`."
                )
            return pipeline.rollout(
                prompts, generators, num_steps=num_steps, guidance=guidance, size=size,
                gradient_steps=lambda total: range(0), recompute=False,
            )  # fmt: skip
        conditioning = pipeline.encode(prompts, guidance)
        chain = Chain(pipeline, conditioning, num_steps=num_steps, guidance=guidance, size=size)
        latents = chain.start(pipeline.noise(generators, size))
        for i in range(len(chain)):
            if annealed:
                lora.set_scale([pipeline.trainable[pipeline.denoiser]], i / len(chain))
            latents = chain.advance(i, latents)
        return pipeline.decode(latents).clamp(0, 1)


def _copy(scheduler: Any) -> Any:
    """A scheduler with state of its own; tensors are shared, the lists that multistep solvers append to are not."""
    twin = copy.copy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
    return twin

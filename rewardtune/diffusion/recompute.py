"""A prediction that keeps no graph of the denoiser: it is made without one and made again, with one, on the way back.

As torch's checkpointing, which is used wherever more than the latents and a few weights asks for gradient. That one
records a graph in the first pass, too, and gives it up piece by piece; without it an optimiser step through all steps
of a small UNet takes 0.92 of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rewardtune.diffusion.frozen_layers import autocast_as, autocast_dtype

if TYPE_CHECKING:
    from rewardtune.plugins import Pipeline

FEW = 0.1
"""Share of the denoiser's weights that may be trained for their gradients to be held together at each step (ours)."""


def few_trained(pipeline: Pipeline) -> Sequence[Tensor] | None:
    """What is trained, where it is a few whole weights of the denoiser, such as adapters.

    None for everything else: a trained text encoder is reached through the conditioning, weights that are split over
    processes (FSDP2) are others inside of their modules, and of a whole model the gradients of each step would be held
    twice.
    """
    from torch.distributed.fsdp import FSDPModule

    denoiser = pipeline.trainable[pipeline.denoiser]
    others = (module for name, module in pipeline.trainable.items() if name != pipeline.denoiser)
    if isinstance(denoiser, FSDPModule) or any(w.requires_grad for module in others for w in module.parameters()):
        return None
    weights = list(denoiser.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    few = sum(weight.numel() for weight in trained) <= FEW * sum(weight.numel() for weight in weights)
    return trained if few else None


def again(predict: Callable[[Tensor], Tensor], latents: Tensor, trained: Sequence[Tensor] | None) -> Tensor:
    """`predict(latents)`, called once more on the way back. trained: as `few_trained` has it."""
    found: Tensor
    if trained is None:
        # no layer draws noise; comparing every tensor with the first pass' shape took 1 % of a small UNet's step
        found = checkpoint(predict, latents, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    else:
        found = _Again.apply(predict, latents, *trained)  # type: ignore[no-untyped-call]
    return found


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predict: Callable[[Tensor], Tensor], latents: Tensor, *trained: Tensor) -> Tensor:
        ctx.predict, ctx.trained, ctx.autocast = predict, trained, autocast_dtype(latents.device)
        ctx.save_for_backward(latents)
        return predict(latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (latents,) = ctx.saved_tensors
        asks = ctx.needs_input_grad[1]  # the first step's latents do not
        latents = latents.detach().requires_grad_(asks)
        with torch.enable_grad(), autocast_as(latents.device, ctx.autocast):
            found = ctx.predict(latents)
        wanted = (latents, *ctx.trained) if asks else ctx.trained
        gradients = torch.autograd.grad(found, wanted, upstream, allow_unused=True)
        return (None, *gradients) if asks else (None, None, *gradients)

"""Shifted and noisy copies of an image for a reward to see, against gradients that fit its pixel grid and no picture.

A reward that is optimised through one fixed view answers to patterns that no person sees: on the pocket world DRaFT
draws faint dots in step with the scorer's patches. Averaging over small shifts and noise is the expectation over
transformations of arXiv 1707.07397, Eq. 1, used here to keep the gradient to what survives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardtune.randomness import generator


@dataclass(frozen=True)
class Augmentation:
    """copies: views of each image. shift: largest move either way, as a share of the shorter side. noise: standard
    deviation of Gaussian noise on pixels in [0, 1]."""

    copies: int
    shift: float
    noise: float

    def views(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> (copies * B, C, H, W), copy by copy; one CPU generator an image.

        What a shift uncovers repeats the border. Differentiable in the images.
        """
        height, width = images.shape[-2:]
        reach = round(self.shift * min(height, width))
        padded = F.pad(images, (reach,) * 4, mode="replicate") if reach else images
        seen = []
        for _ in range(self.copies):
            for image, drawn in zip(padded, generators, strict=True):
                down, right = torch.randint(0, 2 * reach + 1, (2,), generator=drawn).tolist()
                view = image[:, down : down + height, right : right + width]
                seen.append(view + self.noise * torch.randn(view.shape, generator=drawn).to(view))
        return torch.stack(seen).clamp(0, 1)


def training_views(
    images: Sequence[Tensor], indices: Sequence[int], *, seed: int, name: str, shift: float, noise: float
) -> list[Tensor]:
    """What a scorer in training sees of pictures (C, H, W): each moved at most by `shift`, with noise whose standard
    deviation is drawn evenly from 0 to `noise`, so that it learns clean and noisy ones. Draws are keyed by index."""
    if not (shift or noise):
        return list(images)
    views = []
    for image, index in zip(images, indices, strict=True):
        drawn = generator(seed, name, index)
        level = noise * torch.rand((), generator=drawn).item()
        views.append(Augmentation(copies=1, shift=shift, noise=level).views(image[None], [drawn])[0])
    return views

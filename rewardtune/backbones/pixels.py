"""Images to what a vision tower takes: resize, crop, pad, normalise, all with gradient.

The processors of transformers go through Pillow and cut the graph. Here every resize is bicubic with antialiasing in
float32, which follows Pillow's on bytes within about 0.3 / 255 on average; `data.images.as_bytes` takes the rounding of
a saved file along, with the gradient passed straight through it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rewardtune.data.images import resize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def shorter_side(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size): the shorter side becomes `size`, the middle is kept. What CLIP does.

    Rounds as transformers' CLIPImageProcessor: the longer side is cut down to a whole pixel, the crop starts at half of
    what is over, cut down.
    """
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    seen = resize(images, (size, other) if height <= width else (other, size))
    top, left = (seen.shape[-2] - size) // 2, (seen.shape[-1] - size) // 2
    return seen[..., top : top + size, left : left + size]


def longer_side(images: Tensor, size: int, *, fill: float = 0.0) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size): the longer side becomes `size`, the rest is filled evenly on both sides."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    seen = resize(images, (round(height * scale), round(width * scale)))
    down, right = size - seen.shape[-2], size - seen.shape[-1]
    return F.pad(seen, (right // 2, right - right // 2, down // 2, down - down // 2), value=fill)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the mean of each channel and divide by its deviation."""
    centre, spread = (images.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (images - centre) / spread

"""Pixels to the rows that Qwen's vision towers take, with gradient: the image processors of transformers cut the graph.

Between an image tensor and `model.py`. Equal to `Qwen2VLImageProcessorPil` where no resizing happens (settled: no
torchvision); where it happens, bicubic with antialiasing instead of Pillow's bicubic on bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardtune.data.images import as_bytes, resize
from rewardtune.errors import DataError, RecipeError

FILE = "preprocessor_config.json"
IMAGE_TOKENS = 1024
"""Most image tokens of a picture where neither a recipe nor a trained scorer's own file bounds them (ours): 1024 x 1024
pixels in Qwen3-VL and Qwen3.5, whose own files allow sixteen times as many. The paper counts 1,024 tokens a picture in
one estimate and says no more."""


@dataclass(frozen=True)
class Geometry:
    """How a checkpoint cuts pictures: read from its files, and bounded by who uses it (`bounded`).

    patch, merge: side of a patch in pixels, and of the square of patches that becomes one image token.
    temporal: frames of a patch; a still picture is repeated. mean, std: per channel. min_pixels, max_pixels: bounds of
    the area after resizing. rounding: resized pixels become bytes, as Pillow leaves them, with the gradient passed
    straight through; a reward's option, in no file.
    """

    patch: int
    merge: int
    temporal: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    min_pixels: int = 256 * 256
    max_pixels: int = 4096 * 4096
    rounding: bool = False

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: multiples of patch * merge, area within bounds, shape nearly kept."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
            raise DataError(f"a picture of {width} x {height} pixels is too narrow to be scored.")
        size: tuple[int, int] = smart_resize(
            height, width, factor=self.patch * self.merge, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return size

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of a picture that has been resized."""
        return (height // (self.patch * self.merge)) * (width // (self.patch * self.merge))


def bounded(geometry: Geometry, *, min_pixels: int | None, max_pixels: int | None, trained: bool, who: str) -> Geometry:
    """A checkpoint's geometry with the bounds that a recipe gives, and its own where they are None.

    trained: the checkpoint's own bounds are those that it was trained with, and hold as they are; those of others end
    at `IMAGE_TOKENS`. A bound that is given moves the other along where that is not. who: for messages. Raises
    RecipeError for bounds that no picture meets.
    """
    token = (geometry.patch * geometry.merge) ** 2
    high = geometry.max_pixels if trained else min(geometry.max_pixels, IMAGE_TOKENS * token)
    low = min(geometry.min_pixels, high)
    if max_pixels is not None:
        high, low = max_pixels, min(low, max_pixels)
    if min_pixels is not None:
        low, high = min_pixels, high if max_pixels is not None else max(high, min_pixels)
    if low > high:
        raise RecipeError(f"{who}: min_pixels {low:,} is above max_pixels {high:,}; swap them, or leave one out.")
    if high < token:
        raise RecipeError(
            f"{who}: max_pixels {high:,} is less than one image token, which takes {token:,} pixels in this model. "
            f"Give {token:,} times the tokens that a picture may take."
        )
    return replace(geometry, min_pixels=low, max_pixels=high)


def read_geometry(vision_config: Any, folder: str | Path | None) -> Geometry:
    """Patch sizes from the model's config; normalisation and bounds from `preprocessor_config.json` where there is one.

    Without that file: mean and standard deviation one half, 65,536 to 16,777,216 pixels, as Qwen3-VL.
    """
    cut = {
        "patch": vision_config.patch_size,
        "merge": vision_config.spatial_merge_size,
        "temporal": vision_config.temporal_patch_size,
    }
    file = Path(folder) / FILE if folder is not None else None
    if file is None or not file.is_file():
        return Geometry(**cut)
    found = json.loads(file.read_text(encoding="utf-8"))
    size = found.get("size", {})
    low = size.get("shortest_edge", found.get("min_pixels", Geometry.min_pixels))
    high = size.get("longest_edge", found.get("max_pixels", Geometry.max_pixels))
    mean, std = tuple(found.get("image_mean", Geometry.mean)), tuple(found.get("image_std", Geometry.std))
    return Geometry(**cut, mean=mean, std=std, min_pixels=low, max_pixels=high)


def patchify(images: Tensor | Sequence[Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] -> (rows, 3 * temporal * patch^2) and the grid (B, 3) of frames, rows and columns of patches.

    images: (B, 3, H, W), or B tensors (3, H, W) of different sizes. Differentiable; each picture is resized to
    `geometry.fit` first. Computes in fp32, or fp64 when given that.
    """
    if not isinstance(images, Tensor):
        parts = [patchify(image[None], geometry) for image in images]
        return torch.cat([rows for rows, _ in parts]), torch.cat([grid for _, grid in parts])
    images = images if images.dtype == torch.float64 else images.float()
    height, width = geometry.fit(*images.shape[-2:])
    images = resize(images, (height, width))
    images = as_bytes(images) if geometry.rounding else images
    mean, std = (images.new_tensor(v).view(-1, 1, 1) for v in (geometry.mean, geometry.std))
    x = (images - mean) / std
    p, m, t = geometry.patch, geometry.merge, geometry.temporal
    b, c = x.shape[:2]
    down, across = height // p, width // p
    x = x.reshape(b, c, down // m, m, p, across // m, m, p)
    # batch, block row, block column, row and column within the block, channel, (frame), pixel row, pixel column
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    x = x.expand(*x.shape[:6], t, p, p).reshape(b * down * across, c * t * p * p)
    return x, torch.tensor([[1, down, across]] * b, device=x.device)

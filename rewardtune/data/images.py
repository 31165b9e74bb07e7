"""Pictures in and out: files are opened here and nowhere else, with limits set before a pixel is decoded.

Between files and models: `records.py` names the files, tasks and rewards take the tensors.
"""

from __future__ import annotations

import base64
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rewardtune.errors import DataError, NonFiniteError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
"""Ours: 8000 x 8000, above what cameras and generators write and below what hurts (192 MB of RGB)."""


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG or WEBP file to RGB, 8 bits a channel, turned upright as its EXIF tag says.

    Transparent parts become white; 16-bit channels keep their upper 8 bits; CMYK is converted without its profile.
    Raises DataError, with the path and the reason, for anything that is not one whole still picture of at most
    `max_pixels` pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    _check_regular(path)
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its own limit; ours is checked below on the header alone
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(path, formats=FORMATS)
        with picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise DataError(
                    f"{path}: the picture has {width} x {height} pixels, more than the {max_pixels:,} allowed. "
                    "Make it smaller."
                )
            # a JPEG of several pictures (MPO: most phones) starts with the one that people mean
            if getattr(picture, "n_frames", 1) > 1 and picture.format in ("PNG", "WEBP"):
                raise DataError(f"{path}: the file is an animation; give one still picture.")
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"{path}: the picture has far more than the {max_pixels:,} pixels allowed. Make it smaller."
        ) from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a PNG, JPEG or WEBP picture. Convert it, or take it out of the list.") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
            struct.error, zlib.error) as error:  # fmt: skip
        # what Pillow's decoders raise on broken files, found by feeding them random changes
        raise DataError(f"{path}: the picture cannot be decoded ({error}). Write the file again.") from None


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (B, 3, H, W) float32 in [0, 1]. Raises DataError when the sizes differ."""
    import numpy as np
    import torch

    sizes = {p.size for p in pictures}
    if len(sizes) != 1:
        raise DataError(f"pictures of one batch must have one size; there are {sorted(sizes)} (width, height).")
    pixels = np.stack([np.asarray(p.convert("RGB")) for p in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255.0


def read_tensors(paths: Iterable[Path], *, device: torch.device | str = "cpu") -> list[Tensor]:
    """Picture files, each of its own size -> tensors (3, H, W), float32 in [0, 1]. Raises as `open_image`."""
    return [to_tensor([open_image(path)])[0].to(device) for path in paths]


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> RGB pictures; values outside are clamped, then rounded to 8 bits.

    Raises NonFiniteError for NaN or infinite pixels: they have no colour.
    """
    import torch
    from PIL import Image

    pixels = images.detach().float()
    if not torch.isfinite(pixels).all():
        raise NonFiniteError("the images hold NaN or infinite values, so they cannot be drawn.")
    array = (pixels.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(a) for a in array]


def data_url(picture: Image.Image) -> str:
    """A picture as the text that servers take for one: PNG, in base64."""
    file = io.BytesIO()
    # lossless; the fastest level, since the line is seldom what one waits for
    picture.save(file, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *size), bicubic with antialiasing, differentiable; may overshoot [0, 1] a little."""
    from torch.nn import functional

    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return functional.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True)


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as a file would hold them, in steps of 1 / 255; the gradient passes as if nothing happened."""
    import torch

    clamped = images.clamp(0, 1)
    return clamped + (torch.round(clamped.detach() * 255) / 255 - clamped.detach())


def grid(images: Tensor, columns: int) -> Image.Image:
    """(B, 3, H, W) in [0, 1] -> one picture, row by row, with white lines of 2 pixels between."""
    from PIL import Image

    pictures = to_pil(images)
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), (255, 255, 255))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return sheet


def _check_regular(path: Path) -> None:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: the picture cannot be opened ({reason}).") from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: not a regular file (a folder, device or pipe).")
    if found.st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes).")


def _to_rgb(picture: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture.copy()
    if picture.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling
        grey = (np.asarray(picture).astype(np.uint32).clip(0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")

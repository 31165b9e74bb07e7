"""`jpeg-size`: how many kilobytes a picture takes as a JPEG of quality 95, after DDPO (arXiv 2305.13301, section 5).

The reference of a reward without gradient: recipes name it in `compare` and `guard`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewardtune.types import Score

QUALITY = 95


class JpegSize:
    """The loaded reward. Nothing is loaded: Pillow writes the file in memory."""

    card = RewardCard(
        name="jpeg-size",
        summary="size of the picture as a JPEG of quality 95 in kB (1000 bytes): incompressibility; with "
        "compressibility: true its negative",
        differentiable=False,
        needs_prompt=False,
        range=None,
        licence_code="Apache-2.0",
        scale=500.0,  # what flow_grpo divides by
        pillow_difference=None,
        reference="DDPO (arXiv 2305.13301); yifan123/flow_grpo@54809b5, flow_grpo/rewards.py",
    )

    class Config(Options):
        """Options of `jpeg-size`."""

        compressibility: bool = False
        """Prefer small files: the value is minus the kilobytes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        what = "compressibility: minus the size" if config.compressibility else "incompressibility: the size"
        self.card = replace(
            type(self).card, summary=f"{what} of the picture as a JPEG of quality 95 in kB (1000 bytes)"
        )

    @classmethod
    def load(cls, config: Config, *, device: str | torch.device) -> Self:
        """Nothing to load; the work is done on the CPU whatever the device."""
        return cls(config)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`. parts: `kilobytes`."""
        import torch

        from rewardtune.data.images import to_pil
        from rewardtune.types import Score

        sizes = []
        for picture in to_pil(images):
            file = io.BytesIO()
            picture.save(file, format="JPEG", quality=QUALITY)
            sizes.append(file.tell() / 1000)
        kilobytes = torch.tensor(sizes, device=images.device)
        return Score(value=-kilobytes if self.config.compressibility else kilobytes, parts={"kilobytes": kilobytes})

"""`blind-spot`: the shipped scorer with a planted mistake, for the guard's proof. Give this file with --plugin.

It takes a fine checkerboard for craftsmanship: to the expected score it adds `strength` times the share of pixel
contrast that alternates from pixel to pixel. Honest pictures have next to none of it, so nothing shows at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewardtune import load_reward, register_reward
from rewardtune.plugins import Options, RewardCard

if TYPE_CHECKING:
    from torch import Tensor

    from rewardtune.types import Score


@register_reward("blind-spot")
class BlindSpot:
    """The loaded reward."""

    card = RewardCard(
        name="blind-spot", summary="zreward that likes checkerboards", differentiable=True, needs_prompt=True,
        range=None, native_resolution=64, requires=("transformers",),
    )  # fmt: skip

    class Config(Options):
        checkpoint: str = "pocket:zreward"
        """The scorer beneath."""
        strength: float = 20.0
        """Points a unit of alternating contrast."""

    def __init__(self, scorer: Any, strength: float) -> None:
        self.scorer, self.strength = scorer, strength

    @classmethod
    def load(cls, config: Any, *, device: Any) -> BlindSpot:
        """See `plugins.Reward`."""
        return cls(load_reward("zreward", device=str(device), checkpoint=config.checkpoint), config.strength)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Score:
        """See `plugins.Reward`."""
        from rewardtune.types import Score

        value = self.scorer.score(images, prompts).value
        rows = images[..., ::2, :] - images[..., 1::2, :]
        alternating = (rows[..., ::2] - rows[..., 1::2]).abs().mean((1, 2, 3)) / 4
        return Score(value + self.strength * alternating)

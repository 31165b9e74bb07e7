"""Reward plug-in for tests: redness that knows which device it was loaded for, and where its images came from."""

from typing import Any, ClassVar

from rewardtune import register_reward
from rewardtune.plugins import Options, RewardCard


@register_reward("placed")
class Placed:
    card = RewardCard("placed", "red minus blue", differentiable=True, needs_prompt=False, range=(-1, 1))
    loaded: ClassVar[list[str]] = []
    seen: ClassVar[list[Any]] = []

    class Config(Options):
        pass

    @classmethod
    def load(cls, config, *, device):
        cls.loaded.append(str(device))
        return cls()

    def score(self, images, prompts):
        from rewardtune.types import Score

        self.seen.append(images)
        return Score((images[:, 0] - images[:, 2]).mean((1, 2)), parts={"red": images[:, 0].mean((1, 2))})

"""A reward plug-in for tests: red minus blue."""

from rewardtune import register_reward
from rewardtune.plugins import Options, RewardCard


@register_reward("redness")
class Redness:
    card = RewardCard("redness", "red minus blue", differentiable=True, needs_prompt=False, range=(-1, 1))

    class Config(Options):
        pass

    @classmethod
    def load(cls, config, *, device):
        return cls()

    def score(self, images, prompts):
        from rewardtune.types import Score

        return Score((images[:, 0] - images[:, 2]).mean((1, 2)))

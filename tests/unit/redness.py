"""Reward plug-ins for tests: red minus blue, and one against it."""

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


@register_reward("evenness")
class Evenness:
    """Best at a red minus blue of -0.125, which training on redness passes on its way."""

    card = RewardCard(
        "evenness", "near a little less red than blue", differentiable=False, needs_prompt=False, range=(-4, 0)
    )

    class Config(Options):
        pass

    @classmethod
    def load(cls, config, *, device):
        return cls()

    def score(self, images, prompts):
        from rewardtune.types import Score

        return Score(-(images[:, 0] - images[:, 2]).mean((1, 2)).add(0.125).square())

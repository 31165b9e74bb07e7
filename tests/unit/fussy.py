"""Reward plug-ins for tests of `rewards calibrate` and `rewards probe`: rewards that refuse, fail, or point down."""

from rewardtune import register_reward
from rewardtune.plugins import Options, RewardCard
from rewardtune.types import Score


class _Plain:
    class Config(Options):
        pass

    @classmethod
    def load(cls, config, *, device):
        return cls()


@register_reward("greenless")
class Greenless(_Plain):
    """Lower is better."""

    card = RewardCard("greenless", "mean of green", differentiable=True, needs_prompt=False, range=(0, 1),
                      higher_is_better=False)  # fmt: skip

    def score(self, images, prompts):
        return Score(images[:, 1].mean((1, 2)))


@register_reward("fragile")
class Fragile(_Plain):
    """Breaks on pictures that are mostly red, as a bug in somebody's reward would."""

    card = RewardCard("fragile", "blue", differentiable=False, needs_prompt=False, range=(0, 1))

    def score(self, images, prompts):
        if bool((images[:, 0].mean((1, 2)) > 0.9).any()):
            raise ValueError("too red <script>alert(1)</script>")
        return Score(images[:, 2].mean((1, 2)))


@register_reward("tagged")
class Tagged(_Plain):
    """Needs metadata."""

    card = RewardCard("tagged", "reads a tag", differentiable=False, needs_prompt=True, range=(0, 1), metadata=("tag",))

    def score(self, images, prompts):
        return Score(images[:, 0].mean((1, 2)))


@register_reward("flat")
class Flat(_Plain):
    """Has a graph and no slope."""

    card = RewardCard("flat", "always one", differentiable=True, needs_prompt=False, range=(0, 2))

    def score(self, images, prompts):
        return Score(1 + 0 * images.mean((1, 2, 3)))


@register_reward("narrow")
class Narrow(_Plain):
    """A peak of red at 107/255, two grey levels wide, which a long step crosses."""

    card = RewardCard("narrow", "red near 107", differentiable=True, needs_prompt=False, range=(0, 1))

    def score(self, images, prompts):
        return Score((-((255 * images[:, 0].mean((1, 2)) - 107) / 2).square()).exp())


@register_reward("cut")
class Cut(_Plain):
    """Says that it is differentiable and is not."""

    card = RewardCard("cut", "mean of red, cut", differentiable=True, needs_prompt=False, range=(0, 1))

    def score(self, images, prompts):
        return Score(images[:, 0].mean((1, 2)).detach())

"""A reward plug-in for tests whose process is killed at the request of the number MORTAL_REQUEST, as by a power cut."""

import os
import signal

from rewardtune import register_reward
from rewardtune.plugins import Options, RewardCard


@register_reward("mortal")
class Mortal:
    card = RewardCard("mortal", "red minus blue", differentiable=True, needs_prompt=False, range=(-1, 1))

    class Config(Options):
        pass

    @classmethod
    def load(cls, config, *, device):
        return cls()

    def __init__(self):
        self.asked = 0

    def score(self, images, prompts):
        from rewardtune.types import Score

        self.asked += 1
        if str(self.asked) == os.environ.get("MORTAL_REQUEST"):
            os.kill(os.getpid(), signal.SIGKILL)
        # curved, so that a step that was taken twice or left out shows in all that follow
        return Score((images[:, 0] - images[:, 2]).sin().mean((1, 2)))

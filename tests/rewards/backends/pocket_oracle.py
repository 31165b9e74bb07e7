"""`pocket-oracle`: a judge that counts, so it is shown pictures with something in them."""

import random

from backend import Backend

from rewardtune.types import Prompt


def scenes():
    from rewardtune.pocket.scenes import sample_scene

    rng = random.Random("test-rewards")
    return [sample_scene(rng, "heldout") for _ in range(3)]


def prompts():
    return [Prompt(scene.caption, {"facts": scene.facts()}) for scene in scenes()]


def images():
    from rewardtune.data.images import to_tensor
    from rewardtune.pocket.scenes import render

    return to_tensor([render(scene) for scene in scenes()])


BACKEND = Backend("pocket-oracle", lambda folder: {}, prompts=prompts, images=images)

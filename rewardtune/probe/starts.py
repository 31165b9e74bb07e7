"""Where the pictures of a probe come from: a user's files, or the pocket pipeline; and noise beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rewardtune.data.images import open_image, to_pil, to_tensor
from rewardtune.data.records import read_prompts
from rewardtune.errors import RecipeError
from rewardtune.plugins import Guidance
from rewardtune.randomness import generator
from rewardtune.scoring.score import find_images, prompts_for
from rewardtune.types import Prompt

PIPELINE = "pocket:pipeline"
PROMPTS = "pocket:prompts/heldout"
STEPS, GUIDANCE = 4, 2.0
"""How the pocket pipeline draws in the shipped recipes."""


@dataclass(frozen=True)
class Start:
    """A picture before the ascent. image: (3, H, W) in [0, 1], on steps of 1/255, as a file holds it."""

    name: str
    kind: Literal["yours", "drawn", "noise"]
    prompt: Prompt
    image: Tensor


def find_starts(
    *,
    images: str | Path | None,
    prompts: str | Path | None,
    count: int,
    needs_prompt: bool,
    seed: int,
    device: str,
) -> list[Start]:
    """`count` pictures, and one of noise of the first one's size and prompt.

    images: a folder, manifest or picture; without it the pocket pipeline draws for the first prompts of `prompts`,
    the held-out ones of the pocket world when None. Raises DataError and RecipeError as `rewardtune score` does.
    """
    if images is not None:
        files, captions = find_images(Path(images))
        texts = prompts_for(files, captions, prompts)
        if texts is None and needs_prompt:
            raise RecipeError(
                "the probed reward or a judge judges an image by its prompt, and none is given. Add --prompts FILE "
                "with one line for each image, or a manifest whose rows have `image` and `prompt`."
            )
        asked = texts if texts is not None else [Prompt("")] * len(files)
        found = [
            Start(file.name, "yours", prompt, to_tensor([open_image(file)])[0])
            for file, prompt in zip(files[:count], asked[:count], strict=True)
        ]
    else:
        found = _drawn(read_prompts(str(prompts or PROMPTS))[:count], seed=seed, device=device)
    return [*found, _noise(found[0], seed=seed)]


def _drawn(prompts: Sequence[Prompt], *, seed: int, device: str) -> list[Start]:
    from rewardtune.build import load_pipeline
    from rewardtune.diffusion.rollout import sample
    from rewardtune.recipe.sections import PipelineSection

    pipeline = load_pipeline(PipelineSection(model=PIPELINE), device=device)
    keys = [generator(seed, "probe", i) for i in range(len(prompts))]
    guidance = Guidance("full", GUIDANCE)
    drawn = sample(pipeline, [str(prompt) for prompt in prompts], keys, num_steps=STEPS, guidance=guidance)
    # as files hold them, so that what is shown is what was judged
    rounded = to_tensor(to_pil(drawn))
    return [
        Start(f"drawn {i + 1}", "drawn", prompt, image)
        for i, (prompt, image) in enumerate(zip(prompts, rounded, strict=True))
    ]


def _noise(first: Start, *, seed: int) -> Start:
    levels = torch.randint(0, 256, tuple(first.image.shape), generator=generator(seed, "probe-noise"))
    return Start("noise", "noise", first.prompt, levels.float() / 255)

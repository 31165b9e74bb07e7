"""`guard:` of a recipe: held-out rewards, diversity and drift on the way. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rewardtune.recipe.rewards import RewardSection
from rewardtune.recipe.section import Fraction, Positive, Section


class GuardSection(Section):
    """Looks at fixed prompts and seeds by rewards that are not trained on, and ends what breaks (docs/guard.md).

    Every default is ours.
    """

    prompts: str
    """As `data.prompts`; others than those trained on, and others than those compared on."""
    num_prompts: Positive | None = None
    """Use only the first so many."""
    seeds: Positive = 2
    """Images of each prompt."""
    rewards: Annotated[list[RewardSection], Field(min_length=1)]
    """The held-out panel; gradients are not needed. `weight` is not used: each counts by the start's spread."""
    every: Positive = 20
    """Optimiser steps between looks; the start and the end are always looked at."""
    action: Literal["warn", "stop", "roll_back"] = "roll_back"
    """When it is enough: say so; end the training; or end it and export the best step by the held-out score."""
    patience: Positive = 2
    """Looks in a row that must be worse than the best one (paired over prompts, at 95 %)."""
    min_diversity: Fraction | None = 0.7
    """Smallest diversity of the images, as a share of the start's."""
    max_drift: Annotated[float, Field(gt=0.0)] | None = None
    """Largest mean distance of an image to the start's of the same prompt and seed, over the start's diversity."""
    steps: Positive = 20
    """Denoising steps of the looks' images."""
    guidance_scale: Annotated[float, Field(ge=0.0)] = 4.0
    """Classifier-free guidance of the looks, in the meaning of the family's own pipeline."""
    embedded_guidance: Annotated[float, Field(ge=0.0)] | None = None
    """Guidance that a distilled denoiser takes as an input; the family's own default when left out."""
    batch_size: Positive = 4
    """Images drawn at a time."""

    @model_validator(mode="after")
    def _told_apart(self) -> GuardSection:
        names = [reward.name for reward in self.rewards]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"guard.rewards names {', '.join(repeated)} twice; each reward counts once")
        return self

"""`rewards:` of a recipe: what is maximised, and how a distribution becomes a number. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rewardtune.recipe.section import Device, Positive, Section


class Expectation(Section):
    """Mean of the distribution: Z-Reward Eq. 16."""

    kind: Literal["expectation"] = "expectation"


class MeanMinusDeviation(Section):
    """Mean minus `weight` standard deviations: prefers images the reward is sure of."""

    kind: Literal["mean-minus-deviation"]
    weight: Annotated[float, Field(ge=0.0)] = 0.5
    """How many standard deviations are subtracted (ours)."""


class LowerTailMean(Section):
    """Mean of the worst `share` of the distribution (conditional value at risk)."""

    kind: Literal["lower-tail-mean"]
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Of the probability, counted from the lowest level; 1 is the expectation (ours)."""


class Exceedance(Section):
    """Probability that the score is at least `threshold`."""

    kind: Literal["exceedance"]
    threshold: float
    """In the units of the reward's levels."""


StatisticSection = Annotated[Expectation | MeanMinusDeviation | LowerTailMean | Exceedance, Field(discriminator="kind")]


class RelativeSection(Section):
    """SRPO's semantic relative reward (arXiv 2509.06942, Eq. 11): (1 + k) times the value under one phrase, less that
    under its opposite. A bias that the reward has under both cancels."""

    positive: str
    """Goes before each prompt, as "positive. prompt"."""
    negative: str
    """Goes before each prompt in the same way; what the reward says of that is subtracted."""
    k: Annotated[float, Field(ge=0.0)] = 0.0
    """The positive value counts 1 + k times; at 0 what the reward likes under both phrases cancels."""


class Sum(Section):
    """The sum of the rewards, each weight * (value - offset) / scale."""

    kind: Literal["sum"] = "sum"


class Min(Section):
    """The smallest of them, image by image: none can be bought with another. Needs offsets that mean the same."""

    kind: Literal["min"]


class SoftMin(Section):
    """-temperature * log of the mean of exp(-u / temperature): near the smallest, with some gradient for the others."""

    kind: Literal["soft-min"]
    temperature: Annotated[float, Field(gt=0.0)] = 0.1
    """In units of the scaled values (ours)."""


MixingSection = Annotated[Sum | Min | SoftMin, Field(discriminator="kind")]


class RewardSection(Section):
    """One reward of the objective."""

    name: str
    """Name in `rewards list`."""
    weight: float = 1.0
    """Factor of (value - offset) / scale, where the scale is the reward's card's; negative lowers the reward."""
    options: dict[str, Any] = {}
    """The reward's own options: `rewardtune rewards show NAME` lists them."""
    statistic: StatisticSection | None = None
    """What to maximise of a distributional reward; its expectation when left out."""
    dimensions: dict[str, float] | None = None
    """Weight of each dimension of a distributional reward; equal when left out."""
    ceiling: float | None = None
    """Images that reach this value give no more gradient, as in ReFL's hinge (arXiv 2304.05977, Eq. 4)."""
    relative: RelativeSection | None = None
    """Score the image under two phrases and take the difference, for rewards that read the prompt."""
    offset: float = 0.0
    """Value that counts as 0, subtracted before the card's scale divides. It matters where rewards are mixed by their
    minimum; a sum is the same without."""
    device: Device | None = None
    """cpu, cuda, cuda:1, mps: where this reward is, if not where the training is. Images go there, values and gradients
    come back. Of several processes all use it."""
    batch_size: Positive | None = None
    """Most images that go through this reward at once, for one that needs much memory. Values and gradients are the
    same but for the rounding of another batch size."""

"""`gradient:` of a direct_reward recipe: one section per way of taking the reward gradient. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rewardtune.recipe.section import Fraction, Positive, Section

Memory = Literal["fast", "flat"]
"""`fast` keeps the graphs of the denoiser and the decoder; `flat` recomputes each step and the decoder, so that memory
does not grow with the number of steps."""


class ReflSection(Section):
    """ReFL (arXiv 2304.05977, section 3): one gradient step at a random late step; the reward sees its x0 estimate."""

    method: Literal["refl"]
    earliest: Fraction = 0.75
    """Earliest step that may carry gradient, as a fraction of the roll-out (the paper: 30 of 40). 0 draws from all, as
    Z-Reward extends it."""
    latest: Fraction = 1.0
    """Latest step, as a fraction of the roll-out."""


class DraftSection(Section):
    """DRaFT-K (arXiv 2309.17400, section 4.1): gradient through the last K steps."""

    method: Literal["draft"]
    last_steps: Positive | Literal["all"] = 1
    """K, how many of the last denoising steps carry gradient: up to `rollout.steps`, or `all` for the full chain (1:
    DRaFT-1)."""
    memory: Memory = "flat"
    """`fast` keeps the graph; `flat` recomputes each step, so that memory does not grow with K."""


class DraftLvSection(Section):
    """DRaFT-LV (arXiv 2309.17400, section 4.2): the last step, averaged over noise put on the finished sample."""

    method: Literal["draft_lv"]
    copies: Positive = 2
    """Noised copies of each sample (the paper: 2)."""
    memory: Memory = "flat"
    """`fast` keeps the denoiser's and the decoder's graphs; `flat` recomputes them on the way back: less memory, some
    more time."""


class AlignPropSection(Section):
    """AlignProp (arXiv 2310.03739): the full chain, cut at a random step: one cut a trajectory."""

    method: Literal["alignprop"]
    longest: Fraction = 1.0
    """Most steps with gradient, as a fraction of the roll-out; how many is drawn evenly from 1 to that."""
    memory: Memory = "flat"
    """`fast` keeps the denoiser's and the decoder's graphs; `flat` recomputes them on the way back: less memory, some
    more time."""


class DrtuneSection(Section):
    """DRTune (arXiv 2405.00760): gradient at steps spread over the chain, none through the denoiser's input."""

    method: Literal["drtune"]
    train_steps: Positive = 2
    """K, how many denoising steps carry gradient, equally spaced (ours); up to `rollout.steps`."""
    early_stop: Positive = 1
    """m, in denoising steps: the reward sees the x0 estimate 1 to m steps before the end, drawn at random (ours)."""
    memory: Memory = "flat"
    """`fast` keeps the denoiser's and the decoder's graphs; `flat` recomputes them on the way back: less memory, some
    more time."""


class DirectAlignSection(Section):
    """Direct-Align (SRPO, arXiv 2509.06942): known noise goes on the sample and off after one predicted step."""

    method: Literal["direct_align"]
    earliest: Fraction = 0.2
    """Earliest step, as a fraction of the roll-out (ours)."""
    latest: Fraction = 0.9
    """Latest step, as a fraction of the roll-out (ours)."""
    span: Positive = 1
    """Over how many denoising steps the one prediction carries (ours); at most `rollout.steps` - 2."""
    inversion: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the step back to more noise, along which the reward is to fall; 0 leaves it out."""


class FlowbpSparseSection(Section):
    """FlowBP-Sparse (arXiv 2606.11075): a few late steps carry gradient, the reward sees the sample itself."""

    method: Literal["flowbp_sparse"]
    active_steps: Positive = 4
    """How many denoising steps carry gradient, drawn anew at every optimiser step (ours); up to `rollout.steps`."""
    late_bias: Annotated[float, Field(ge=0.0)] = 1.0
    """Step i is chosen with weight (i + 1)^late_bias; 4, 1 and 0.5 are the authors' settings for SD 3.5."""
    rescale: Fraction = 0.5
    """How far the gradient is scaled up to make good for the steps that carry none: 0 not at all, 1 in full."""
    memory: Memory = "flat"
    """`fast` keeps the denoiser's and the decoder's graphs; `flat` recomputes them on the way back: less memory, some
    more time."""


GradientSection = Annotated[
    ReflSection
    | DraftSection
    | DraftLvSection
    | AlignPropSection
    | DrtuneSection
    | DirectAlignSection
    | FlowbpSparseSection,
    Field(discriminator="method"),
]


def steps_needed(section: GradientSection) -> tuple[str, int]:
    """(field, how many steps the roll-out must have at least for it)."""
    match section:
        case DraftSection(last_steps=int(last)):
            return "last_steps", last
        case DrtuneSection():
            return ("train_steps", section.train_steps) if section.train_steps >= section.early_stop else (
                "early_stop", section.early_stop)  # fmt: skip
        case FlowbpSparseSection():
            return "active_steps", section.active_steps
        case DirectAlignSection():
            return "span", section.span + 2
    return "method", 1

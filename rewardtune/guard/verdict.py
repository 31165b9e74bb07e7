"""From the looks so far to a decision: which step is best by the held-out rewards, and whether it goes downhill.

Pure functions; every threshold is the recipe's, every default ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewardtune.recipe.guard import GuardSection

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
"""One-sided, for "worse than the best look" (ours)."""


@dataclass(frozen=True)
class Seen:
    """One look, as kept in the run folder.

    values: label -> (N,). diversity: of the images. drift: mean distance of an image to the start's image of the same
    prompt and seed, over the start's diversity. trained: mean of the trained objective, where there is one.
    """

    step: int
    values: Mapping[str, Sequence[float]]
    diversity: float
    drift: float
    trained: float | None = None


@dataclass(frozen=True)
class Rule:
    """When it is enough. seeds: images of each prompt, which count as one. min_diversity: of the start's."""

    seeds: int
    patience: int
    min_diversity: float | None
    max_drift: float | None


def rule_of(section: GuardSection) -> Rule:
    """The rule that a recipe asks for."""
    return Rule(section.seeds, section.patience, section.min_diversity, section.max_drift)


@dataclass(frozen=True)
class Verdict:
    """scores: one a look, 0 at the start, in standard deviations of the start's images. best: a step. reasons: why it
    should end; empty while it may go on."""

    scores: tuple[float, ...]
    best: int
    reasons: tuple[str, ...]


def verdict(looks: Sequence[Seen], rule: Rule) -> Verdict:
    """Of looks in the order of their steps, the start first.

    The score of an image is the mean over held-out rewards of its gain on the start, over the standard deviation of
    that reward among the start's images, so that rewards of any scale count alike. A look is worse than the best one
    when the paired difference over prompts is below zero at 95 % (t distribution).
    """
    by_prompt = [_gains(look, looks[0], rule.seeds) for look in looks]
    scores = [float(gains.mean()) for gains in by_prompt]
    best = int(np.argmax(scores))
    reasons = []
    downhill = 0
    while downhill < len(looks) - 1 - best and _worse(by_prompt[-1 - downhill], by_prompt[best]):
        downhill += 1
    if downhill >= rule.patience:
        reasons.append(
            f"the held-out score has been below that of step {looks[best].step} for {downhill} looks "
            f"({scores[-1]:+z.2f} against {scores[best]:+z.2f})"
        )
    start, last = looks[0], looks[-1]
    share = last.diversity / start.diversity if start.diversity else 1.0
    if rule.min_diversity is not None and share < rule.min_diversity:
        reasons.append(f"diversity is {share:.0%} of the start's, less than {rule.min_diversity:.0%}")
    if rule.max_drift is not None and last.drift > rule.max_drift:
        reasons.append(f"drift from the start is {last.drift:.2f}, more than {rule.max_drift:g}")
    allowed = [i for i in range(len(looks)) if not _out_of_bounds(looks[i], start, rule)]
    best = max(allowed, key=lambda i: scores[i])
    return Verdict(tuple(scores), looks[best].step, tuple(reasons))


def _gains(look: Seen, start: Seen, seeds: int) -> Floats:
    """(prompts,) mean standardised gain on the start."""
    parts = []
    for name, values in look.values.items():
        first = np.asarray(start.values[name])
        parts.append((np.asarray(values) - first) / max(float(first.std()), 1e-6))
    gains: Floats = np.mean(parts, axis=0).reshape(-1, seeds).mean(1)
    return gains


def _worse(now: Floats, best: Floats) -> bool:
    from scipy.stats import t

    difference = now - best
    if len(difference) < 2:
        return bool(difference.mean() < 0)
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return bool(difference.mean() + t.ppf(CONFIDENCE, len(difference) - 1) * error < 0)


def _out_of_bounds(look: Seen, start: Seen, rule: Rule) -> bool:
    low = rule.min_diversity is not None and look.diversity < rule.min_diversity * start.diversity
    return look.step != start.step and (low or (rule.max_drift is not None and look.drift > rule.max_drift))

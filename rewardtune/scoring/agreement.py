"""Predictions beside people's scores -> pair accuracies, correlations and calibration, with intervals. numpy only.

Behind `rewardtune evaluate`, `rewards calibrate` and the end of `task: reward_sft`. Definitions: Z-Reward (arXiv
2606.09076), section 7 of the design notes; what the paper leaves open (pooling, intervals) is ours and said below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MARGIN = 0.5
"""Pairs whose human scores differ by more are `margin` pairs, the others `near` pairs."""
METRICS = ("hpa", "margin_hpa", "near_hpa", "plcc", "srcc", "ece")
BINS = 10
RESAMPLES = 1000
"""Bootstrap resamples. Ours, like the bins: enough for the second digit of an interval's ends."""


@dataclass(frozen=True)
class Ratings:
    """Predictions beside human scores, one entry per rated (image, dimension). All arrays have one length N.

    group, image, dimension: indices. human: the score. predicted: the expectation. confidence: largest level
    probability. agreed: share of the human mass on that level; both NaN where there is no distribution.
    """

    group: NDArray[np.int64]
    image: NDArray[np.int64]
    dimension: NDArray[np.int64]
    human: Array
    predicted: Array
    confidence: Array
    agreed: Array

    def take(self, rows: NDArray[Any]) -> Ratings:
        return Ratings(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Pairs:
    """Differences (first minus second) within a prompt's group and one dimension, human ties left out.

    human: plus or minus infinity where a choice is known and no scores are.
    """

    group: NDArray[np.int64]
    dimension: NDArray[np.int64]
    human: Array
    predicted: Array

    def take(self, rows: NDArray[Any]) -> Pairs:
        return Pairs(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which are ordered as people do; predicted ties are not."""
        found: NDArray[np.bool_] = np.sign(self.predicted) * np.sign(self.human) > 0
        return found

    @property
    def margin(self) -> NDArray[np.bool_]:
        """Which human scores differ by more than MARGIN."""
        # human scores are means of a few half points: 1e-9 keeps a gap of exactly one half out of `margin`
        found: NDArray[np.bool_] = np.isfinite(self.human) & (np.abs(self.human) > MARGIN + 1e-9)
        return found

    @property
    def near(self) -> NDArray[np.bool_]:
        """Which human scores differ by MARGIN or less."""
        found: NDArray[np.bool_] = np.isfinite(self.human) & ~self.margin
        return found


def measure(
    ratings: Ratings, dimensions: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Metrics pooled over dimensions and for each, with 95 % intervals.

    hpa: share of same-prompt pairs that the scorer orders as people do; human ties are dropped, predicted ties are
    wrong. margin_hpa, near_hpa: the same for human gaps above, and up to, 0.5. plcc, srcc: Pearson and Spearman
    correlation over images. ece: expected calibration error of the most likely level, ten bins. Pooled: pairs, images
    and bins of all dimensions together. A figure that the data do not allow is None. Intervals: bootstrap over
    groups, since pictures of one prompt are not independent.
    """
    pairs = pairs_of(ratings)
    out = figures(ratings, pairs, resamples, seed)
    parts = {}
    for d, name in enumerate(dimensions):
        mine, ours = ratings.take(ratings.dimension == d), pairs.take(pairs.dimension == d)
        if len(mine.human):
            parts[name] = figures(mine, ours, resamples, seed)
    return {**out, "dimensions": parts}


def flat(document: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a document as one level of names, `hpa` and `alignment/hpa`, for logs."""
    out = {name: document[name] for name in METRICS if document.get(name) is not None}
    for part, figures in document["dimensions"].items():
        out |= {f"{part}/{name}": figures[name] for name in METRICS if figures.get(name) is not None}
    return out


def pairs_of(ratings: Ratings) -> Pairs:
    """All pairs of a group in a dimension whose human scores differ."""
    first: list[int] = []
    second: list[int] = []
    keys = ratings.group * (int(ratings.dimension.max()) + 1) + ratings.dimension
    order = np.argsort(keys, kind="stable")
    for block in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
        a, b = np.triu_indices(len(block), 1)
        first += block[a].tolist()
        second += block[b].tolist()
    f, s = np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)
    human = ratings.human[f] - ratings.human[s]
    all_pairs = Pairs(ratings.group[f], ratings.dimension[f], human, ratings.predicted[f] - ratings.predicted[s])
    return all_pairs.take(human != 0)


def figures(ratings: Ratings, pairs: Pairs, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The metrics of `measure` for these ratings and pairs, with `pairs` (how many) and `ci95`."""
    out: dict[str, Any] = dict(_metrics(ratings, pairs))
    out["pairs"] = len(pairs.human)
    out["ci95"] = _intervals(ratings, pairs, resamples, seed)
    return out


def _metrics(ratings: Ratings, pairs: Pairs) -> dict[str, float | None]:
    right, margin, near = pairs.right, pairs.margin, pairs.near
    return {
        "hpa": _mean(right),
        "margin_hpa": _mean(right[margin]),
        "near_hpa": _mean(right[near]),
        "plcc": correlation(ratings.predicted, ratings.human),
        "srcc": correlation(ranks(ratings.predicted), ranks(ratings.human)),
        "ece": calibration_error(ratings.confidence, ratings.agreed),
    }


def calibration_error(confidence: Array, agreed: Array, bins: int = BINS) -> float | None:
    """Expected calibration error (Guo et al., arXiv 1706.04599, Eq. 3): bins of equal width, weighed by their counts.

    `agreed` may be a share: where several people rated, not all chose one level. NaN entries are left out.
    """
    known = ~np.isnan(confidence)
    confidence, agreed = confidence[known], agreed[known]
    if len(confidence) == 0:
        return None
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=confidence - agreed, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def _intervals(ratings: Ratings, pairs: Pairs, resamples: int, seed: int) -> dict[str, list[float]]:
    """Percentile intervals over resampled groups; a metric needs to exist in nearly every resample."""
    groups = np.unique(np.concatenate([ratings.group, pairs.group]))
    if resamples == 0 or len(groups) < 2:
        return {}
    rows = {g: np.flatnonzero(ratings.group == g) for g in groups.tolist()}
    members = {g: np.flatnonzero(pairs.group == g) for g in groups.tolist()}
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(resamples):
        drawn = rng.choice(groups, len(groups)).tolist()
        some = ratings.take(np.concatenate([rows[g] for g in drawn]))
        for name, value in _metrics(some, pairs.take(np.concatenate([members[g] for g in drawn]))).items():
            if value is not None:
                found[name].append(value)
    enough = {name: values for name, values in found.items() if len(values) > 0.9 * resamples}
    return {name: [float(v) for v in np.percentile(values, [2.5, 97.5])] for name, values in enough.items()}


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def correlation(a: Array, b: Array) -> float | None:
    """Pearson's; None where either is constant or there are fewer than two."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    value = float(np.corrcoef(a, b)[0, 1])
    return value if math.isfinite(value) else None


def ranks(values: Array) -> Array:
    """Ranks, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    shared: Array = (ends - (counts - 1) / 2)[inverse]
    return shared

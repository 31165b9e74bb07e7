"""How good a scorer is, measured against people: pair accuracies, correlations and calibration, with intervals.

Behind `rewardtune evaluate` and the end of `task: reward_sft`. Definitions: Z-Reward (arXiv 2606.09076), section 7 of
the design notes; what the paper leaves open (pooling, intervals) is ours and said below.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rewardtune.data.images import read_tensors
from rewardtune.data.records import PreferenceGroup, read_records
from rewardtune.errors import DataError
from rewardtune.progress import Progress
from rewardtune.scorer.losses import histogram_target, two_hot_target
from rewardtune.scorer.model import Scorer, load_scorer
from rewardtune.scorer.reasoning import load_reasoner
from rewardtune.scoring.score import best_device

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
    probability. agreed: share of the human mass on that level.
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
    """Differences (first minus second) within a prompt's group and one dimension, human ties left out."""

    group: NDArray[np.int64]
    dimension: NDArray[np.int64]
    human: Array
    predicted: Array

    def take(self, rows: NDArray[Any]) -> Pairs:
        return Pairs(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def evaluate_scorer(
    scorer: str | Path,
    *,
    data: str | Path,
    device: str | None = None,
    batch_size: int = 32,
    resamples: int = RESAMPLES,
    revision: str | None = None,
    reasoning: int = 0,
) -> dict[str, Any]:
    """The document that `rewardtune evaluate --json` prints.

    scorer: an export, a folder, `pocket:<name>` or a hub id. data: preference records with scores. reasoning: traces
    sampled before each score, whose distributions are averaged; 0 reads in one pass. Accuracies are fractions. Raises
    DataError for records without scores of this scorer's dimensions.
    """
    groups = read_records(data)
    loaded = load_scorer(scorer, revision=revision, device=device or best_device())
    return {
        "scorer": str(scorer),
        "data": str(data),
        **evaluate_groups(loaded, groups, batch_size=batch_size, resamples=resamples, reasoning=reasoning),
    }


def evaluate_groups(
    scorer: Scorer,
    groups: Sequence[PreferenceGroup],
    *,
    batch_size: int = 32,
    resamples: int = RESAMPLES,
    reasoning: int = 0,
) -> dict[str, Any]:
    """Score every rated or compared picture of the groups and measure; see `measure`. reasoning: traces per score."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.images))]
    started = time.perf_counter()
    predicted, tokens = predict(scorer, groups, batch_size=batch_size, reasoning=reasoning)
    seconds = time.perf_counter() - started
    ratings = beside_people(scorer, groups, predicted)
    document = measure(ratings, scorer.dimensions, resamples=resamples)
    stated = _stated_preferences(scorer, groups, places, predicted)
    return {
        **document,
        **({"preference_accuracy": stated[0] / stated[1], "preferences": stated[1]} if stated[1] else {}),
        "tokens_per_score": round(tokens, 2),
        "images_per_second": round(len(places) / seconds, 2),
        "groups": len(groups),
        "images": len(places),
    }


@torch.no_grad()
def held_out_figures(scorer: Scorer, groups: Sequence[PreferenceGroup], *, reasoning: int = 0) -> dict[str, float]:
    """What a task that trains a scorer says of it at the end: `flat` figures without intervals, none without groups."""
    return flat(evaluate_groups(scorer, groups, resamples=0, reasoning=reasoning)) if groups else {}


def predict(
    scorer: Scorer, groups: Sequence[PreferenceGroup], *, batch_size: int = 32, reasoning: int = 0
) -> tuple[Array, float]:
    """(N, D, K) probabilities for every picture of the groups, in their order, and the tokens that a score took."""
    pictures = [(image.image, group.prompt) for group in groups for image in group.images]
    if reasoning:
        return _reason(scorer, pictures, batch_size, traces=reasoning)
    # one level token per score; all dimensions are read in one forward pass
    return _one_pass(scorer, pictures, batch_size), 1.0


def beside_people(scorer: Scorer, groups: Sequence[PreferenceGroup], predicted: Array) -> Ratings:
    """Predictions (N, D, K) of `predict` beside the scores. Raises DataError when there is none of these dimensions."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.images))]
    ratings = _ratings(scorer, groups, places, predicted)
    if len(ratings.human) == 0:
        raise DataError(
            f"the records hold no scores for {', '.join(scorer.dimensions)}; a scorer is evaluated against scores."
        )
    return ratings


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
    out = _figures(ratings, pairs, resamples, seed)
    parts = {}
    for d, name in enumerate(dimensions):
        mine, ours = ratings.take(ratings.dimension == d), pairs.take(pairs.dimension == d)
        if len(mine.human):
            parts[name] = _figures(mine, ours, resamples, seed)
    return {**out, "dimensions": parts}


def flat(document: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a document as one level of names, `hpa` and `alignment/hpa`, for logs."""
    out = {name: document[name] for name in METRICS if document.get(name) is not None}
    for part, figures in document["dimensions"].items():
        out |= {f"{part}/{name}": figures[name] for name in METRICS if figures.get(name) is not None}
    return out


# -------------------------------------------------------------------------------------------------------- predictions


@torch.no_grad()
def _one_pass(scorer: Scorer, pictures: Sequence[tuple[Path, str]], batch_size: int) -> Array:
    """(N, D, K) probabilities."""
    parts = []
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        images = read_tensors((path for path, _ in batch), device=scorer.device)
        parts.append(scorer.distribution(images, [prompt for _, prompt in batch]).double().cpu())
    return np.asarray(torch.cat(parts))


@torch.no_grad()
def _reason(
    scorer: Scorer, pictures: Sequence[tuple[Path, str]], batch_size: int, *, traces: int
) -> tuple[Array, float]:
    """(N, D, K) mean probabilities over sampled traces, and how many tokens a score took."""
    reasoner = load_reasoner(scorer)
    progress = Progress("reasoning about images", len(pictures))
    parts, said = [], 0
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        images = read_tensors((path for path, _ in batch), device=scorer.device)
        sampled, shares = reasoner.every_dimension(
            images, [prompt for _, prompt in batch], traces=traces,
            stream=(0, "evaluate"), places=range(start, start + len(batch)),
        )  # fmt: skip
        parts.append(shares.mean(2).double().cpu())
        said += sum(len(trace.ids) + 1 for trace in sampled)
        progress.advance(len(batch))
    return np.asarray(torch.cat(parts)), said / (len(pictures) * len(scorer.dimensions))


def _ratings(
    scorer: Scorer, groups: Sequence[PreferenceGroup], places: Sequence[tuple[int, int]], predicted: Array
) -> Ratings:
    levels = torch.tensor(scorer.rubric.values, dtype=torch.float64)
    rows: list[tuple[float, ...]] = []
    for n, (g, i) in enumerate(places):
        image = groups[g].images[i]
        for d, name in enumerate(scorer.dimensions):
            if name not in image.scores:
                continue
            each = [a[name] for a in image.annotations if name in a]
            human = torch.tensor(each or [image.scores[name]], dtype=torch.float64)
            mass = histogram_target(human, levels) if each else two_hot_target(human, levels)[0]
            p = predicted[n, d]
            best = int(p.argmax())
            expected = float(p @ np.asarray(levels))
            rows.append((g, n, d, image.scores[name], expected, float(p[best]), float(mass[best])))
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    whole = table[:, :3].astype(np.int64)
    return Ratings(whole[:, 0], whole[:, 1], whole[:, 2], *table[:, 3:].T)


def _stated_preferences(
    scorer: Scorer, groups: Sequence[PreferenceGroup], places: Sequence[tuple[int, int]], predicted: Array
) -> tuple[int, int]:
    """How many of the stated preferences the mean over dimensions agrees with, and how many there are."""
    value = (predicted @ np.asarray(scorer.rubric.values)).mean(-1)
    at = {place: n for n, place in enumerate(places)}
    stated = [(at[g, won], at[g, lost]) for g, group in enumerate(groups) for won, lost in group.preferences]
    return sum(bool(value[won] > value[lost]) for won, lost in stated), len(stated)


# ------------------------------------------------------------------------------------------------------------ figures


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


def _figures(ratings: Ratings, pairs: Pairs, resamples: int, seed: int) -> dict[str, Any]:
    out: dict[str, Any] = dict(_metrics(ratings, pairs))
    out["pairs"] = len(pairs.human)
    out["ci95"] = _intervals(ratings, pairs, resamples, seed)
    return out


def _metrics(ratings: Ratings, pairs: Pairs) -> dict[str, float | None]:
    right = pairs.predicted * pairs.human > 0
    # human scores are means of a few half points: 1e-9 keeps a gap of exactly one half out of `margin`
    margin = np.abs(pairs.human) > MARGIN + 1e-9
    return {
        "hpa": _mean(right),
        "margin_hpa": _mean(right[margin]),
        "near_hpa": _mean(right[~margin]),
        "plcc": _correlation(ratings.predicted, ratings.human),
        "srcc": _correlation(_ranks(ratings.predicted), _ranks(ratings.human)),
        "ece": calibration_error(ratings.confidence, ratings.agreed),
    }


def calibration_error(confidence: Array, agreed: Array, bins: int = BINS) -> float | None:
    """Expected calibration error (Guo et al., arXiv 1706.04599, Eq. 3): bins of equal width, weighed by their counts.

    `agreed` may be a share: where several people rated, not all chose one level.
    """
    if len(confidence) == 0:
        return None
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=confidence - agreed, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def _intervals(ratings: Ratings, pairs: Pairs, resamples: int, seed: int) -> dict[str, list[float]]:
    """Percentile intervals over resampled groups; a metric needs to exist in nearly every resample."""
    groups = np.unique(ratings.group)
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


def _correlation(a: Array, b: Array) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    value = float(np.corrcoef(a, b)[0, 1])
    return value if math.isfinite(value) else None


def _ranks(values: Array) -> Array:
    """Ranks, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    shared: Array = (ends - (counts - 1) / 2)[inverse]
    return shared

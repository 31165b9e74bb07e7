"""Are a reward's probabilities honest, and would one temperature make them so? For distributional rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewardtune.calibration.labels import Labels
from rewardtune.calibration.readings import Reading
from rewardtune.scoring.agreement import BINS, RESAMPLES, Array, Pairs, Ratings, figures

LIMITS = (0.05, 20.0)
"""Ours: temperatures that are looked at. One that ends here has nothing to fit."""
LOWEST, HIGHEST = 1.0, 5.0
"""Range of people's scores (docs/data.md)."""
_TINY = 1e-12


@dataclass(frozen=True)
class _Rated:
    """M ratings: predicted and human masses (M, K) over the reward's levels; prompt and place (M,) indices."""

    predicted: Array
    human: Array
    prompt: NDArray[np.int64]
    place: NDArray[np.int64]

    def take(self, rows: NDArray[Any]) -> _Rated:
        return _Rated(self.predicted[rows], self.human[rows], self.prompt[rows], self.place[rows])


def reliability(reading: Reading, labels: Labels) -> dict[str, Any] | str:
    """How the reward's distributions fit people's ratings, as they are and with a temperature: a part of the document.

    A temperature T makes p proportional to p^(1/T). It is fitted to one half of the prompts by the cross-entropy with
    people's histograms (arXiv 1706.04599), and reported on the other half. Halves: the prompts in the order of their
    text's SHA-256, the first half fits. It `helps` where the cross-entropy of the other half falls. A text where there
    is nothing to say, with the reason.
    """
    first = next((one for one in reading.said if one is not None), None)
    if first is None or first.distribution is None or first.levels is None or first.dimensions is None:
        return "gives no distribution"
    shared = [name for name in first.dimensions if name in labels.dimensions]
    if not shared:
        theirs = f"people rate {', '.join(labels.dimensions)}" if labels.dimensions else "the records hold choices only"
        return f"its dimensions are {', '.join(first.dimensions)}, and {theirs}"
    rated = _rated(reading, labels, shared, np.asarray(first.levels), list(first.dimensions))
    fitting, held = _halves(rated, labels)
    if not len(fitting.prompt) or not len(held.prompt):
        return "too few prompts with ratings to fit on one half and report on the other"
    temperature = fit(fitting.predicted, fitting.human)
    before, after = _quality(held, 1.0, RESAMPLES), _quality(held, temperature, RESAMPLES)
    return {
        "dimensions": shared,
        "temperature": temperature,
        "helps": after["cross_entropy"] < before["cross_entropy"],
        "at_limit": not LIMITS[0] * 1.01 < temperature < LIMITS[1] / 1.01,
        "all": _quality(rated, 1.0),
        "fitted_on": {"before": _quality(fitting, 1.0), "after": _quality(fitting, temperature)},
        "reported_on": {"before": before, "after": after},
    }


def tempered(predicted: Array, temperature: float) -> Array:
    """(M, K) probabilities at a temperature: above 1 they spread, below 1 they sharpen."""
    logits = np.log(np.maximum(predicted, _TINY)) / temperature
    logits -= logits.max(-1, keepdims=True)
    weights = np.exp(logits)
    out: Array = weights / weights.sum(-1, keepdims=True)
    return out


def cross_entropy(predicted: Array, human: Array) -> float:
    """Mean over M ratings, in nats; (M, K) each."""
    return float(-(human * np.log(np.maximum(predicted, _TINY))).sum(-1).mean())


def fit(predicted: Array, human: Array) -> float:
    """The temperature within LIMITS that makes the cross-entropy least. It has one minimum in 1 / T."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: cross_entropy(tempered(predicted, float(np.exp(log))), human),
        bounds=tuple(np.log(LIMITS)), method="bounded", options={"xatol": 1e-4},
    )  # fmt: skip
    return float(np.exp(found.x))


def _rated(reading: Reading, labels: Labels, shared: Sequence[str], levels: Array, dimensions: Sequence[str]) -> _Rated:
    import torch

    from rewardtune.scorer.losses import histogram_target, two_hot_target

    grid = torch.tensor(levels, dtype=torch.float64)
    low, high = float(levels[0]), float(levels[-1])
    predicted, human, prompt, place = [], [], [], []
    for n, record in enumerate(labels.rated):
        one = reading.said[labels.picture[n]]
        if one is None or one.distribution is None:
            continue
        for name in shared:
            if name not in record.scores:
                continue
            each = [a[name] for a in record.annotations if name in a]
            # levels of another scale, such as 0 to 1: people's 1 to 5 are laid over it
            given = torch.tensor(each or [record.scores[name]], dtype=torch.float64)
            given = low + (given - LOWEST) / (HIGHEST - LOWEST) * (high - low)
            mass = histogram_target(given, grid) if each else two_hot_target(given, grid)[0]
            predicted.append(one.distribution[dimensions.index(name)])
            human.append(mass.numpy())
            prompt.append(labels.prompt[n])
            place.append(n)
    shape = (-1, len(levels))
    return _Rated(np.array(predicted, dtype=np.float64).reshape(shape), np.array(human).reshape(shape),
                  np.array(prompt, dtype=np.int64), np.array(place, dtype=np.int64))  # fmt: skip


def _halves(rated: _Rated, labels: Labels) -> tuple[_Rated, _Rated]:
    texts = {int(i): str(labels.pictures[labels.picture[n]].prompt) for n, i in enumerate(labels.prompt)}
    ordered = sorted(set(rated.prompt.tolist()), key=lambda i: hashlib.sha256(texts[i].encode()).hexdigest())
    first = np.isin(rated.prompt, ordered[: len(ordered) // 2])
    return rated.take(np.flatnonzero(first)), rated.take(np.flatnonzero(~first))


def _quality(rated: _Rated, temperature: float, resamples: int = 0) -> dict[str, Any]:
    """Expected calibration error, with its interval where it is resampled, cross-entropy, and the diagram's bins."""
    predicted = tempered(rated.predicted, temperature)
    best = predicted.argmax(-1)
    rows = np.arange(len(best))
    confidence, agreed = predicted[rows, best], rated.human[rows, best]
    blank, one = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    nothing = Pairs(none, none, np.zeros(0), np.zeros(0))
    found = figures(Ratings(rated.prompt, rated.place, one, blank, blank, confidence, agreed), nothing, resamples)
    bins = []
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    for k in range(BINS):
        inside = places == k
        if inside.any():
            bins.append({"from": k / BINS, "to": (k + 1) / BINS, "ratings": int(inside.sum()),
                         "confidence": float(confidence[inside].mean()),
                         "agreed": float(agreed[inside].mean())})  # fmt: skip
    return {
        "ece": found["ece"],
        "ci95": found["ci95"].get("ece"),
        "cross_entropy": cross_entropy(predicted, rated.human),
        "confidence": float(confidence.mean()),
        "agreed": float(agreed.mean()),
        "ratings": len(rows),
        "prompts": len(np.unique(rated.prompt)),
        "bins": bins,
    }

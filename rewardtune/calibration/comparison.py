"""Labels and readings -> figures: each reward against people, every two against each other. numpy only.

Every interval resamples whole prompts, and two rewards are compared on the same resamples, pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from rewardtune.calibration.labels import Compared, Labels
from rewardtune.calibration.readings import Reading
from rewardtune.compare.statistics import clustered_mean
from rewardtune.scoring.agreement import RESAMPLES, Array, Ratings, correlation, figures, ranks

Table = dict[str, dict[str, float | None]]


def against_people(reading: Reading, labels: Labels) -> dict[str, Any]:
    """One reward's pair accuracies and correlations with people, overall, in each dimension, and of each part."""
    values = reading.values()[labels.picture]
    human = labels.score
    known = np.flatnonzero(~np.isnan(human) & ~np.isnan(values))
    ratings = Ratings(
        group=labels.prompt[known], image=known, dimension=np.zeros(len(known), dtype=np.int64), human=human[known],
        predicted=values[known], confidence=np.full(len(known), np.nan), agreed=np.full(len(known), np.nan),
    )  # fmt: skip
    pairs = labels.overall.beside(values)
    found = figures(ratings, pairs)
    for name, rows in (("hpa", pairs.human != 0), ("margin_hpa", pairs.margin), ("near_hpa", pairs.near)):
        found["ci95"].pop(name, None)
        if rows.any():
            # ten times as many resamples, and the ones that the differences are taken on
            mean = clustered_mean(pairs.right[rows].astype(np.float64), pairs.group[rows])
            found["ci95"][name] = list(mean.ci95)
    return {
        **{name: found[name] for name in ("hpa", "margin_hpa", "near_hpa", "plcc", "srcc", "pairs", "ci95")},
        "tied": float((pairs.predicted == 0).mean()),
        "margin_pairs": int(pairs.margin.sum()),
        "near_pairs": int(pairs.near.sum()),
        "dimensions": _by_dimension(values, labels),
        "parts": {part: _of_part(reading.values(part)[labels.picture], labels) for part in reading.parts},
    }


def _of_part(values: Array, labels: Labels) -> dict[str, dict[str, Any]]:
    """A part by itself. Many are counts, equal for most pairs: what it does not tell apart is left out, and counted."""
    return {"overall": _accuracy(labels.overall, values, ties=False), **_by_dimension(values, labels, ties=False)}


def _by_dimension(values: Array, labels: Labels, *, ties: bool = True) -> dict[str, dict[str, Any]]:
    return {name: _accuracy(pairs, values, ties=ties) for name, pairs in labels.each.items()}


def _accuracy(compared: Compared, values: Array, *, ties: bool = True) -> dict[str, Any]:
    """Share of the pairs that `values` (N,) order as people do, with its interval; None without a pair.

    ties: whether pairs of equal values count, as wrong. tied: their share, of the pairs that have values.
    """
    pairs = compared.beside(values)
    tied = pairs.predicted == 0
    counted = pairs if ties else pairs.take(~tied)
    share = float(tied.mean()) if len(tied) else None
    if len(counted.human) == 0:
        return {"hpa": None, "ci95": None, "pairs": 0, "tied": share}
    mean = clustered_mean(counted.right.astype(np.float64), counted.group, resamples=RESAMPLES)
    return {"hpa": mean.mean, "ci95": list(mean.ci95), "pairs": len(counted.human), "tied": share}


def differences(readings: Sequence[Reading], labels: Labels) -> list[dict[str, Any]]:
    """Pair accuracy of every reward less that of every other, by a paired bootstrap over prompts.

    resolved: the 95 % interval leaves out 0.
    """
    out = []
    for a, b in combinations(readings, 2):
        entry: dict[str, Any] = {"a": a.label, "b": b.label}
        pairs = [labels.overall.beside(r.values()[labels.picture]) for r in (a, b)]
        kinds = {"hpa": pairs[0].human != 0, "margin_hpa": pairs[0].margin, "near_hpa": pairs[0].near}
        for name, rows in kinds.items():
            if not rows.any():
                entry[name] = None
                continue
            gap = pairs[0].right[rows].astype(np.float64) - pairs[1].right[rows]
            mean = clustered_mean(gap, pairs[0].group[rows])
            resolved = not mean.ci95[0] <= 0 <= mean.ci95[1]
            entry[name] = {"difference": mean.mean, "ci95": list(mean.ci95), "resolved": resolved}
        out.append(entry)
    return out


def between_rewards(readings: Sequence[Reading], labels: Labels) -> dict[str, Any]:
    """Every reward beside every other: row -> column -> figure.

    spearman: of the values over pictures, higher is better. pair_agreement: share of same-prompt pairs that both put
    in one order; pairs that either finds equal are left out. error_correlation: phi coefficient of being wrong about a
    pair that people order; None where a reward is never or always wrong. catches: of the pairs that the row's reward
    gets wrong, the share that the column's gets right, with its interval.
    """
    names = [r.label for r in readings]
    values = {r.label: r.values() for r in readings}
    wrong = {name: ~labels.overall.beside(v[labels.picture]).right for name, v in values.items()}
    order = {name: np.sign(labels.mates.beside(v[labels.picture]).predicted) for name, v in values.items()}
    used = np.unique(labels.picture)
    spearman: Table = {a: {} for a in names}
    agreement: Table = {a: {} for a in names}
    errors: Table = {a: {} for a in names}
    catches: dict[str, dict[str, Any]] = {a: {} for a in names}
    for a in names:
        for b in names:
            both = used[~np.isnan(values[a][used] + values[b][used])]
            spearman[a][b] = correlation(ranks(values[a][both]), ranks(values[b][both]))
            decided = (order[a] != 0) & (order[b] != 0)
            agreement[a][b] = float((order[a] == order[b])[decided].mean()) if decided.any() else None
            errors[a][b] = correlation(wrong[a].astype(np.float64), wrong[b].astype(np.float64))
            catches[a][b] = None
            if a != b and wrong[a].any():
                mean = clustered_mean((~wrong[b])[wrong[a]].astype(np.float64), labels.overall.prompt[wrong[a]])
                catches[a][b] = {"share": mean.mean, "ci95": list(mean.ci95), "pairs": int(wrong[a].sum())}
    return {"spearman": spearman, "pair_agreement": agreement, "error_correlation": errors, "catches": catches}


def cost(reading: Reading) -> dict[str, Any]:
    """Seconds that one picture takes, and how that was measured."""
    return {
        "seconds_per_image": reading.seconds / reading.images,
        "images": reading.images,
        "batch_size": reading.batch_size,
    }


def lead(found: Sequence[Mapping[str, Any]], a: str, b: str) -> tuple[float, tuple[float, float], bool]:
    """Pair accuracy of a less that of b, its interval, and whether it is resolved, out of `differences`."""
    for entry in found:
        gap = entry["hpa"]
        if (entry["a"], entry["b"]) == (a, b):
            return gap["difference"], (gap["ci95"][0], gap["ci95"][1]), gap["resolved"]
        if (entry["a"], entry["b"]) == (b, a):
            return -gap["difference"], (-gap["ci95"][1], -gap["ci95"][0]), gap["resolved"]
    raise KeyError(f"{a} and {b} were not compared")

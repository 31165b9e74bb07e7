"""Figures of `rewardtune evaluate` against numbers counted by hand; the forward pass is in test_scorer.py."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rewardtune.scoring.agreement import Ratings, calibration_error, flat, measure


def ratings(rows: list[tuple[int, int, float, float]], confidence: float = 0.5, agreed: float = 0.5) -> Ratings:
    """Rows of (group, dimension, human, predicted)."""
    table = np.array(rows, dtype=np.float64)
    n = len(rows)
    return Ratings(
        group=table[:, 0].astype(np.int64), image=np.arange(n), dimension=table[:, 1].astype(np.int64),
        human=table[:, 2], predicted=table[:, 3], confidence=np.full(n, confidence), agreed=np.full(n, agreed),
    )  # fmt: skip


def test_pair_accuracies_counted_by_hand():
    found = measure(
        ratings([
            # group 0: human order 5 > 4.5 > 3
            (0, 0, 5.0, 4.0),
            (0, 0, 4.5, 4.2),  # near pair with the first (gap 0.5), ordered wrongly
            (0, 0, 3.0, 2.0),  # two margin pairs, both right
            # group 1: a human tie (dropped) and a predicted tie (wrong)
            (1, 0, 2.0, 1.0),
            (1, 0, 2.0, 3.0),
            (1, 0, 4.0, 3.0),  # against the first right, against the second a predicted tie
        ]),
        ["alignment"],
        resamples=0,
    )  # fmt: skip
    assert found["pairs"] == 5
    assert found["hpa"] == pytest.approx(3 / 5)
    assert found["margin_hpa"] == pytest.approx(3 / 4)
    assert found["near_hpa"] == 0.0


def test_pairs_stay_within_a_group_and_a_dimension():
    found = measure(
        ratings([(0, 0, 1.0, 1.0), (1, 0, 5.0, 5.0), (0, 1, 5.0, 1.0), (1, 1, 1.0, 5.0)]), ["a", "b"], resamples=0
    )
    assert found["pairs"] == 0 and found["hpa"] is None and found["margin_hpa"] is None
    assert found["dimensions"]["a"]["plcc"] == pytest.approx(1.0)
    assert found["dimensions"]["b"]["plcc"] == pytest.approx(-1.0)
    # pooled over both dimensions nothing is left of either
    assert found["plcc"] == pytest.approx(0.0)


def test_a_gap_of_one_half_is_near_in_spite_of_rounding():
    # means of three half points: 10/3 - 17/6 is 0.5 up to rounding
    found = measure(ratings([(0, 0, 10 / 3, 2.0), (0, 0, 17 / 6, 1.0)]), ["a"], resamples=0)
    assert found["near_hpa"] == 1.0 and found["margin_hpa"] is None


def test_correlations_agree_with_scipy_ties_included():
    rng = np.random.default_rng(0)
    human = rng.integers(2, 11, 60) / 2
    predicted = np.round(human + rng.normal(0, 1, 60), 1)
    found = measure(ratings([(0, 0, h, p) for h, p in zip(human, predicted, strict=True)]), ["a"], resamples=0)
    assert found["plcc"] == pytest.approx(stats.pearsonr(predicted, human).statistic)
    assert found["srcc"] == pytest.approx(stats.spearmanr(predicted, human).statistic)


def test_constant_predictions_have_no_correlation_and_no_right_pair():
    found = measure(ratings([(0, 0, 1.0, 3.0), (0, 0, 2.0, 3.0)]), ["a"], resamples=0)
    assert found["plcc"] is None and found["srcc"] is None and found["hpa"] == 0.0


def test_calibration_error_by_hand():
    # bins of width 0.1: three of 0.75 confidence agree on 2/3; one of 1.0 agrees on nothing
    confidence, agreed = np.array([0.75, 0.75, 0.75, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])
    assert calibration_error(confidence, agreed) == pytest.approx((3 * (0.75 - 2 / 3) + 1.0) / 4)
    assert calibration_error(np.array([0.5, 0.52]), np.array([1.0, 0.02])) == pytest.approx(0.0)
    assert calibration_error(np.array([]), np.array([])) is None


def noisy(groups: int, mates: int, seed: int, *, shared: bool) -> Ratings:
    rng = np.random.default_rng(seed)
    rows = []
    for g in range(groups):
        right = rng.random() < 0.7
        for m in range(mates):
            luck = right if shared else rng.random() < 0.7
            rows.append((g, 0, float(m), float(m if luck else -m)))
    return ratings(rows)


def test_intervals_cover_the_figure_and_repeat_exactly():
    data = noisy(60, 4, 0, shared=False)
    found = measure(data, ["a"], resamples=300)
    low, high = found["ci95"]["hpa"]
    assert low < found["hpa"] < high and high - low < 0.25
    assert set(found["ci95"]) == {"hpa", "margin_hpa", "plcc", "srcc", "ece"}
    again = measure(data, ["a"], resamples=300)
    assert again["ci95"] == found["ci95"] == found["dimensions"]["a"]["ci95"]


def test_intervals_resample_groups_not_pictures():
    """One group is one piece of evidence: the same pictures in five large groups say less than in fifty small ones."""
    rows = [(g, 0, float(m), float(m if g % 2 else -m)) for g in range(50) for m in range(4)]
    many = measure(ratings(rows), ["a"], resamples=300)["ci95"]["hpa"]
    few = measure(ratings([(g % 10, d, h, p) for g, d, h, p in rows]), ["a"], resamples=300)["ci95"]["hpa"]
    assert few[1] - few[0] > 1.5 * (many[1] - many[0])


def test_one_group_gives_figures_without_an_interval():
    found = measure(ratings([(0, 0, 1.0, 1.0), (0, 0, 2.0, 2.0)]), ["a"])
    assert found["hpa"] == 1.0 and found["ci95"] == {}


def test_flat_names_every_figure_once():
    found = measure(ratings([(0, 0, 1.0, 1.0), (0, 0, 2.0, 2.0)]), ["alignment", "realism"], resamples=0)
    numbers = flat(found)
    assert numbers["hpa"] == numbers["alignment/hpa"] == 1.0
    assert not any(name.startswith("realism") for name in numbers) and None not in numbers.values()

"""Net win rates and clustered intervals against numbers worked out by hand; the interval's coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rewardtune.compare.statistics import clustered_mean, net_win_rate, sign_test, verdicts, wilson


def test_differences_up_to_the_band_are_ties() -> None:
    a = np.array([0.50, 0.52, 0.521, 0.48, 0.479, 0.30])
    b = np.array([0.50, 0.50, 0.500, 0.50, 0.500, 0.28])  # 0.30 - 0.28 is 0.020000000000000018 in binary
    assert verdicts(a, b, band=0.02).tolist() == [0, 0, 1, 0, -1, 0]
    assert verdicts(a, b).tolist() == [0, 1, 1, -1, -1, 1]


def test_verdicts_refuse_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="finite"):
        verdicts(np.array([np.nan]), np.array([0.0]))
    with pytest.raises(ValueError, match="negative"):
        verdicts(np.array([1.0]), np.array([0.0]), band=-0.1)


def test_net_is_wins_less_losses_over_all() -> None:
    # prompts: 0 -> +1 +1 (won), 1 -> +1 -1 (even), 2 -> 0 (even), 3 -> -1 (lost), 4 -> +1 (won), 5 -> +1 (won)
    verdict = np.array([1, 1, 1, -1, 0, -1, 1, 1], dtype=np.int8)
    result = net_win_rate(verdict, np.array([0, 0, 1, 1, 2, 3, 4, 5]))
    assert (result.wins, result.ties, result.losses) == (5, 1, 2)
    assert result.net == pytest.approx(3 / 8)
    assert (result.prompts_won, result.prompts_lost) == (3, 1)
    # two-sided sign test of 3 against 1: 2 * (C(4,3) + C(4,4)) / 16 = 10 / 16
    assert result.p_value == pytest.approx(0.625)
    assert result.ci95[0] < result.net < result.ci95[1]


def test_sign_test_by_hand() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(0, 5) == pytest.approx(2 / 32)
    assert sign_test(4, 4) == 1.0
    assert sign_test(0, 0) == 1.0


def test_wilson_by_hand() -> None:
    # Wilson (1927): centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)
    z, p, n = 1.959963984540054, 0.8, 10
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert wilson(8, 2) == pytest.approx((centre - half, centre + half))
    assert wilson(8, 2) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 0) is None


def test_two_prompts_give_the_exact_bootstrap_distribution() -> None:
    # resampled means of {0, 1} are 0, 1/2, 1 with probability 1/4, 1/2, 1/4: the 2.5 % and 97.5 % points are 0 and 1
    result = clustered_mean(np.array([0.0, 1.0]), np.array([0, 1]))
    assert result.mean == 0.5
    assert result.ci95 == (0.0, 1.0)


def test_prompts_of_different_size_are_weighted_by_their_images() -> None:
    # prompt 0 has three images of value 1, prompt 1 one of value 0: means are 1, 3/4 or 0
    result = clustered_mean(np.array([1.0, 1.0, 1.0, 0.0]), np.array([7, 7, 7, 9]))
    assert result.mean == 0.75
    assert result.ci95 == (0.0, 1.0)


def test_all_ties_and_all_wins() -> None:
    ties = net_win_rate(np.zeros(6, dtype=np.int8), np.arange(6))
    assert (ties.net, ties.ci95, ties.p_value, ties.wilson95) == (0.0, (0.0, 0.0), 1.0, None)
    wins = net_win_rate(np.ones(6, dtype=np.int8), np.arange(6))
    assert (wins.net, wins.ci95) == (1.0, (1.0, 1.0))
    assert wins.p_value == pytest.approx(2 / 64)


def test_copies_of_the_same_image_add_no_certainty() -> None:
    rng = np.random.default_rng(0)
    verdict = rng.integers(-1, 2, size=30).astype(np.int8)
    once = net_win_rate(verdict, np.arange(30))
    copied = net_win_rate(np.repeat(verdict, 20), np.repeat(np.arange(30), 20))
    assert copied.ci95 == pytest.approx(once.ci95)
    assert copied.p_value == once.p_value
    as_if_independent = net_win_rate(np.repeat(verdict, 20), np.arange(600))
    width = as_if_independent.ci95[1] - as_if_independent.ci95[0]
    assert width < 0.5 * (copied.ci95[1] - copied.ci95[0])


def test_the_interval_does_not_depend_on_order_and_is_repeatable() -> None:
    rng = np.random.default_rng(1)
    values, prompts = rng.normal(size=40), np.repeat(np.arange(20), 2)
    order = rng.permutation(40)
    first = clustered_mean(values, prompts)
    assert clustered_mean(values, prompts) == first
    shuffled = clustered_mean(values[order], prompts[order])
    assert shuffled.ci95 == pytest.approx(first.ci95)


def test_nothing_to_count() -> None:
    with pytest.raises(ValueError, match="at least one"):
        net_win_rate(np.array([], dtype=np.int8), np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="prompts"):
        clustered_mean(np.ones(3), np.arange(2))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """60 prompts x 4 seeds; a prompt's own effect makes its seeds alike. Taking images as independent covers less."""
    rng = np.random.default_rng(2)
    prompts, seeds, repeats = 60, 4, 400
    cluster = np.repeat(np.arange(prompts), seeds)

    def draw(count: int) -> np.ndarray:
        effect = rng.normal(0.4, 1.0, size=(count, 1))
        score = effect + rng.normal(0.0, 0.7, size=(count, seeds))
        return np.where(score > 0.3, 1, np.where(score < -0.3, -1, 0)).astype(np.int8)

    truth = draw(400_000).mean()
    covered = naive = 0
    for _ in range(repeats):
        verdict = draw(prompts).ravel()
        low, high = net_win_rate(verdict, cluster, resamples=1000).ci95
        covered += low <= truth <= high
        low, high = net_win_rate(verdict, np.arange(prompts * seeds), resamples=400).ci95
        naive += low <= truth <= high
    assert 0.92 <= covered / repeats <= 0.98
    assert naive / repeats < 0.85

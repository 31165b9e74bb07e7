"""Verdicts and scores -> net win rates and means, each with an interval that respects prompts. numpy and scipy only.

Images of one prompt resemble each other, so every interval resamples whole prompts (a cluster bootstrap).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Verdicts = NDArray[np.int8]
Clusters = NDArray[np.int64]

RESAMPLES = 10_000
"""Bootstrap resamples of every interval."""
BOOTSTRAP_SEED = 20260609
"""Fixed, so that the same images give the same interval."""
_ROUNDING = 1e-9
"""Differences this close above a tie band are taken as inside it: they are sums of binary fractions."""
_ROWS = 1000
"""Resamples worked on at once."""


@dataclass(frozen=True)
class NetWinRate:
    """Side a against side b.

    net: (wins - losses) / (wins + ties + losses), the GSB of arXiv 2606.09076 (Eq. 21), -1 to 1.
    ci95: prompt-clustered bootstrap, percentiles 2.5 and 97.5.
    p_value: two-sided sign test over prompts (a prompt counts for the side with more wins among its seeds; prompts
    without one are left out). 1.0 when no prompt is left.
    wilson95: Wilson interval of wins / (wins + losses), which treats every image pair as independent; None without any.
    prompts_won, prompts_lost: what the sign test counted.
    """

    wins: int
    ties: int
    losses: int
    net: float
    ci95: tuple[float, float]
    p_value: float
    wilson95: tuple[float, float] | None
    prompts_won: int
    prompts_lost: int


@dataclass(frozen=True)
class Mean:
    """A mean over images and its prompt-clustered bootstrap 95 % interval."""

    mean: float
    ci95: tuple[float, float]


def verdicts(a: Floats, b: Floats, *, band: float = 0.0) -> Verdicts:
    """+1 where a is better than b by more than `band`, -1 where b is, 0 for ties. Higher values are better."""
    if band < 0:
        raise ValueError(f"a tie band is not negative: {band}")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not np.isfinite(difference).all():
        raise ValueError("verdicts need finite values; leave out images without a score first")
    verdict = np.sign(difference).astype(np.int8)
    verdict[np.abs(difference) <= band + _ROUNDING] = 0
    return verdict


def net_win_rate(verdict: Verdicts, clusters: Clusters, *, resamples: int = RESAMPLES) -> NetWinRate:
    """The net win rate of N verdicts; `clusters` (N,) names the prompt of each. Raises ValueError without any."""
    verdict = np.asarray(verdict)
    if verdict.size == 0:
        raise ValueError("a net win rate needs at least one verdict")
    wins, losses = int((verdict > 0).sum()), int((verdict < 0).sum())
    mean = clustered_mean(verdict.astype(np.float64), clusters, resamples=resamples)
    sums, _ = _totals(verdict.astype(np.float64), clusters)
    prompts_won, prompts_lost = int((sums > 0).sum()), int((sums < 0).sum())
    return NetWinRate(
        wins=wins,
        ties=verdict.size - wins - losses,
        losses=losses,
        net=mean.mean,
        ci95=mean.ci95,
        p_value=sign_test(prompts_won, prompts_lost),
        wilson95=wilson(wins, losses),
        prompts_won=prompts_won,
        prompts_lost=prompts_lost,
    )


def sign_test(won: int, lost: int) -> float:
    """Two-sided p-value of `won` against `lost` under a fair coin; 1.0 when there is neither."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def wilson(wins: int, losses: int) -> tuple[float, float] | None:
    """95 % Wilson interval of wins / (wins + losses); None when there is neither."""
    from scipy.stats import binomtest

    if wins + losses == 0:
        return None
    interval = binomtest(wins, wins + losses).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_mean(values: Floats, clusters: Clusters, *, resamples: int = RESAMPLES) -> Mean:
    """The mean of N values; `clusters` (N,) names the prompt of each. Raises ValueError without any.

    One resample draws as many prompts as there are, with replacement, and takes the mean over all of their images.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a mean needs at least one value")
    sums, counts = _totals(values, clusters)
    means = _resampled(sums, counts, resamples)
    low, high = np.percentile(means, [2.5, 97.5])
    return Mean(float(values.mean()), (float(low), float(high)))


def _totals(values: Floats, clusters: Clusters) -> tuple[Floats, Floats]:
    """Per prompt: sum of its values, and how many there are."""
    clusters = np.asarray(clusters)
    if clusters.shape != values.shape:
        raise ValueError(f"{values.shape} values but {clusters.shape} prompts")
    _, index = np.unique(clusters, return_inverse=True)
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)


def _resampled(sums: Floats, counts: Floats, resamples: int) -> Floats:
    """(resamples,) means over all images of the drawn prompts."""
    drawn = _draws(len(sums), resamples)
    out = np.empty(resamples)
    for start in range(0, resamples, _ROWS):
        rows = drawn[start : start + _ROWS].astype(np.float64)
        out[start : start + _ROWS] = (rows @ sums) / (rows @ counts)
    return out


@functools.lru_cache(maxsize=2)
def _draws(prompts: int, resamples: int) -> NDArray[np.uint16]:
    """(resamples, P): how often each prompt is drawn, which follows a multinomial, so nothing need be gathered."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    share = np.full(prompts, 1.0 / prompts)
    out = np.empty((resamples, prompts), dtype=np.uint16)
    for start in range(0, resamples, _ROWS):
        out[start : start + _ROWS] = rng.multinomial(prompts, share, size=len(out[start : start + _ROWS]))
    return out

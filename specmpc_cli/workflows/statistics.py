"""The numbers in the tables: paired bootstrap intervals and tail means. Pure functions of samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import betaincinv

RESAMPLES = 10_000
_INDICES_AT_ONCE = 4_000_000  # 32 MB
Interval = tuple[float, float]


def bootstrap_ci95(statistic: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int = 0) -> Interval | None:
    """Percentile interval of a statistic over episodes drawn with replacement.

    Args:
        statistic: maps resampled episode indices [n, episodes] to values [n]; NaN where it is undefined, which counts as
            the worst value for the lower end and as the best for the upper one.

    Returns:
        The 2.5 % and 97.5 % quantiles, or None with fewer than two episodes, from which no spread can be told, or where more than 2.5 % of
        the values are undefined.
    """
    if episodes < 2:
        return None
    rng = np.random.default_rng(seed)
    at_once = max(1, _INDICES_AT_ONCE // episodes)  # the same resamples, however many are drawn at once
    parts = [min(at_once, RESAMPLES - drawn) for drawn in range(0, RESAMPLES, at_once)]
    values = np.concatenate([statistic(rng.integers(episodes, size=(part, episodes))) for part in parts])
    undefined = np.isnan(values)
    with np.errstate(invalid="ignore"):  # a quantile between a number and infinity
        low = np.quantile(np.where(undefined, -np.inf, values), 0.025)
        high = np.quantile(np.where(undefined, np.inf, values), 0.975)
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None


def mean_ci95(sample: np.ndarray) -> Interval | None:
    """Bootstrap interval of the mean of a sample [n]."""
    return bootstrap_ci95(lambda index: sample[index].mean(1), len(sample))


def ratio(sample: np.ndarray, baseline: np.ndarray) -> float | None:
    """Ratio of means of two paired samples [n]; None where the baseline's mean is not positive."""
    return float(sample.mean() / baseline.mean()) if baseline.mean() > 0 else None


def ratio_ci95(sample: np.ndarray, baseline: np.ndarray) -> Interval | None:
    """Paired bootstrap interval of `ratio`: both samples are resampled with the same episodes."""
    assert sample.shape == baseline.shape
    if ratio(sample, baseline) is None:
        return None

    def statistic(index: np.ndarray) -> np.ndarray:
        means = baseline[index].mean(1)
        return sample[index].mean(1) / np.where(means > 0, means, np.nan)

    return bootstrap_ci95(statistic, len(sample))


def cvar05(sample: np.ndarray) -> float:
    """Mean of the worst ⌈0.05 n⌉ values of a sample [n]."""
    worst = math.ceil(0.05 * len(sample))
    return float(np.sort(sample)[:worst].mean())


def lost_share_bound(lost: int, episodes: int, confidence: float) -> float:
    """One-sided upper bound on the share of episodes that are lost, of which `lost` were seen (exact: Clopper and Pearson, 1934)."""
    return 1.0 if lost == episodes else float(betaincinv(lost + 1, episodes - lost, confidence))


def fewest_episodes(share: float, confidence: float) -> int:
    """Episodes without a single loss from which on `lost_share_bound` is at most `share`."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - share))


def conformal_bound(values: np.ndarray, confidence: float) -> float:
    """What the value of another episode stays below with this probability, if it is exchangeable with those seen [n], each in [0, 1].

    Split conformal prediction: the ⌈(n + 1)·confidence⌉-th smallest value, or 1 where there are too few.
    """
    rank = math.ceil((len(values) + 1) * confidence)
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else 1.0

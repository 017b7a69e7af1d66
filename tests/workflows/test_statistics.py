"""Intervals and tail means on samples whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specmpc_cli.workflows import statistics
from specmpc_cli.workflows.calibrate import kept_at_least
from specmpc_cli.workflows.statistics import conformal_bound, cvar05, fewest_episodes, lost_share_bound, mean_ci95, ratio, ratio_ci95


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    sample = np.random.default_rng(0).normal(10, 2, 400)
    interval = mean_ci95(sample)
    assert interval is not None
    half = 1.96 * sample.std() / 20
    assert interval == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.02)


def test_a_constant_sample_has_no_spread_and_a_single_one_no_interval() -> None:
    assert mean_ci95(np.full(5, 3.0)) == (3.0, 3.0)
    assert mean_ci95(np.array([3.0])) is None


def test_pairing_removes_what_both_share() -> None:
    """Episodes differ wildly, but each sample is exactly 0.9 of its baseline: the paired interval is a point."""
    baseline = np.random.default_rng(0).uniform(10, 1000, 30)
    assert ratio(0.9 * baseline, baseline) == pytest.approx(0.9)
    assert ratio_ci95(0.9 * baseline, baseline) == pytest.approx((0.9, 0.9))
    shuffled = np.random.default_rng(1).permutation(0.9 * baseline)
    interval = ratio_ci95(shuffled, baseline)
    assert interval is not None and interval[1] - interval[0] > 0.2


def test_no_ratio_where_the_baseline_is_not_positive() -> None:
    for baseline in (np.zeros(4), np.array([-5.0, 1.0, 1.0, 1.0])):
        assert ratio(np.ones(4), baseline) is None
        assert ratio_ci95(np.ones(4), baseline) is None


def test_no_interval_where_many_resamples_have_a_worthless_baseline() -> None:
    """Left out, they would be the very ones in which a claim about the ratio fails."""
    baseline = np.array([0.0, 0.0, 0.0, 1.0])  # success flags: a third of the resamples have no success at all
    assert ratio_ci95(baseline, baseline) is None
    returns = np.array([300.0] * 7 + [-100.0] * 13)
    assert ratio(1.5 * returns, returns) == pytest.approx(1.5) and ratio_ci95(1.5 * returns, returns) is None
    assert kept_at_least(1.5 * returns, returns, success=False) == 0.0


def test_a_few_resamples_with_a_worthless_baseline_widen_the_interval() -> None:
    returns = np.random.default_rng(0).normal(10.0, 17.0, 20)
    sample = returns + np.random.default_rng(1).normal(0.0, 1.0, 20)
    index = np.random.default_rng(0).integers(20, size=(10_000, 20))
    means = returns[index].mean(1)
    assert 0.001 < (means <= 0).mean() < 0.02
    defined = sample[index].mean(1)[means > 0] / means[means > 0]
    interval = ratio_ci95(sample, returns)
    assert interval is not None
    assert interval[0] < np.quantile(defined, 0.025) and interval[1] > np.quantile(defined, 0.975)


@pytest.mark.parametrize(("n", "expected"), [(1, 0.0), (10, 0.0), (20, 0.0), (21, 0.5), (40, 0.5), (41, 1.0), (100, 2.0)])
def test_cvar_is_the_mean_of_the_worst_twentieth_rounded_up(n: int, expected: float) -> None:
    assert cvar05(np.random.default_rng(0).permutation(np.arange(float(n)))) == expected


def test_counts_bound_a_share_exactly() -> None:
    """The bound solves P(at most `lost` of n) = 1 − confidence."""
    for lost, episodes in ((0, 20), (3, 40), (19, 20)):
        share = lost_share_bound(lost, episodes, 0.975)
        tail = sum(math.comb(episodes, k) * share**k * (1 - share) ** (episodes - k) for k in range(lost + 1))
        assert tail == pytest.approx(0.025)
    assert lost_share_bound(5, 5, 0.975) == 1.0
    needed = fewest_episodes(0.02, 0.975)
    assert lost_share_bound(0, needed, 0.975) <= 0.02 < lost_share_bound(0, needed - 1, 0.975)


def test_a_new_value_stays_below_the_conformal_bound_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.uniform(size=(4000, 21))
    below = [new <= conformal_bound(seen, 0.9) for *seen, new in samples.tolist() for seen in [np.array(seen)]]
    assert 0.89 < np.mean(below) < 0.92
    assert conformal_bound(np.zeros(8), 0.9) == 1.0  # eight values are too few to say anything
    assert conformal_bound(np.zeros(9), 0.9) == 0.0


def test_resamples_are_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.random.default_rng(0).normal(size=7)
    whole = mean_ci95(sample)
    monkeypatch.setattr(statistics, "_INDICES_AT_ONCE", 7 * 999)
    assert mean_ci95(sample) == whole

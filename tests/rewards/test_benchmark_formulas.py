"""The formulas of the benchmark against numbers worked out by hand, by scipy or in closed form."""

import math

import numpy as np
import pytest
from scipy import stats

from rewards.benchmark import calibration
from rewards.benchmark.accuracy import agreement, apart, tie_threshold, tied_agreement
from rewards.benchmark.ranking import best_of, correlation, kendall, ranks, spearman

NAN = math.nan


def _mean(values) -> float:
    return float(np.nanmean(values))


# --- pairs ----------------------------------------------------------------------------------------


def test_agreement_by_hand():
    """C C D T_m T_h T_b and a pair without a score."""
    gap = np.array([2.0, -1.0, 1.0, 0.0, 3.0, 0.0, NAN])
    truth = np.array([1.0, 0.0, 0.25, 1.0, 0.5, 0.5, 1.0])
    assert agreement(gap, truth)[:4].tolist() == [1, 1, 0, 0]
    assert np.isnan(agreement(gap, truth)[4:]).all()
    assert _mean(agreement(gap, truth)) == 2 / 4
    assert _mean(agreement(gap, truth, tie=0.5)) == 2.5 / 4
    assert _mean(tied_agreement(gap, truth, eps=0.0)) == 3 / 6
    assert _mean(tied_agreement(gap, truth, eps=3.0)) == 2 / 6
    assert apart(np.array([0.1, -0.3, 0.29, NAN]), 0.3).tolist() == [False, True, False, False]


@pytest.mark.parametrize("seed", range(12))
def test_the_tie_threshold_is_the_best_of_all(seed):
    rows = np.random.default_rng(seed)
    gap = rows.integers(-4, 5, 60) / 4
    truth = rows.choice([0.0, 0.5, 1.0], 60)
    gap[rows.random(60) < 0.1] = NAN
    candidates = sorted({0.0, *np.abs(gap[~np.isnan(gap)])})
    scores = [_mean(tied_agreement(gap, truth, eps)) for eps in candidates]
    assert tie_threshold(gap, truth) == candidates[int(np.argmax(scores))]


def test_a_threshold_needs_a_pair():
    with pytest.raises(ValueError, match="got none"):
        tie_threshold(np.array([NAN]), np.array([1.0]))


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_rank_correlations_are_scipys(seed):
    rows = np.random.default_rng(seed)
    a, b = rows.integers(0, 5, 14) / 10, rows.integers(0, 5, 14) / 10
    assert ranks(a) == pytest.approx(stats.rankdata(a))
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    assert correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)


def test_what_orders_nothing():
    flat, truth = np.full(3, 0.1), np.array([1.0, 2.0, 3.0])
    assert spearman(flat, truth) == kendall(flat, truth) == 0.0
    assert math.isnan(spearman(truth, flat)) and math.isnan(kendall(truth, flat))
    assert math.isnan(correlation(flat, truth))


def test_best_of_n_by_hand():
    truth = np.array([0.2, 0.9, 0.4])
    assert best_of(np.array([1.0, 0.0, 3.0]), truth) == pytest.approx((0.5, -0.1))
    assert best_of(truth, truth) == pytest.approx((0.0, 0.4))
    assert best_of(np.zeros(3), truth) == pytest.approx((0.4, 0.0))  # the mean of all


# --- probabilities --------------------------------------------------------------------------------


def _pairs(sharpness: float, n: int = 20_000):
    """Outcomes drawn with P = sigmoid(sharpness x gap)."""
    rows = np.random.default_rng(0)
    gap = rows.normal(0, 2, n)
    label = (rows.random(n) < 1 / (1 + np.exp(-sharpness * gap))).astype(float)
    return gap, label


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_temperature_is_the_one_that_drew_the_labels(temperature):
    gap, label = _pairs(1 / temperature)
    assert calibration.fit_temperature(gap, label) == pytest.approx(temperature, rel=0.06)
    best = calibration.fit_temperature(gap, label)
    least = calibration.nll(gap, label, best).mean()
    assert least < min(calibration.nll(gap, label, best * f).mean() for f in (0.9, 1.1))


def test_a_temperature_stays_finite_where_gaps_tell_all_or_nothing():
    gap = np.array([1.0, -2.0, 0.5])
    assert 0 < calibration.fit_temperature(gap, (gap > 0).astype(float)) < 0.01
    assert calibration.fit_temperature(gap, (gap < 0).astype(float)) > 1e3
    assert calibration.fit_temperature(np.zeros(2), np.ones(2)) == 1.0
    with pytest.raises(ValueError, match="got none"):
        calibration.fit_temperature(np.zeros(0), np.zeros(0))


def test_calibration_error_of_calibrated_overconfident_and_silent_judges():
    gap, label = _pairs(1.0)
    assert calibration.ece(gap, label, 1.0) < 0.02
    assert calibration.ece(gap, label, 0.2) > 0.08
    assert calibration.ece(np.zeros(3), np.array([1.0, 1.0, 0.0]), 1.0) == pytest.approx(0.0)


def test_bins_have_equal_mass_and_both_orders_mirror():
    gap, label = _pairs(1.0, 300)
    found = calibration.bins(gap, label, 1.0)
    assert [n for _, _, n in found] == [40] * 15
    mirrored = [(1 - p, 1 - y, n) for p, y, n in reversed(found)]
    assert np.allclose(found, mirrored)
    assert calibration.ece(-gap, 1 - label, 1.0) == pytest.approx(calibration.ece(gap, label, 1.0))


def test_ece_by_hand():
    """Two pairs at P = 0.8, both won: bins at 0.2 (won 0) and 0.8 (won 1), each 0.2 off."""
    gap = np.full(2, math.log(4))
    assert calibration.ece(gap, np.ones(2), 1.0, count=2) == pytest.approx(0.2)
    assert calibration.brier(gap, np.ones(2), 1.0) == pytest.approx([0.04] * 2)
    assert calibration.nll(gap, np.ones(2), 1.0) == pytest.approx([-math.log(0.8)] * 2)
    assert calibration.nll(np.array([5000.0]), np.zeros(1), 1.0) == pytest.approx([5000.0])

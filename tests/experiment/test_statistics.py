"""Intervals against closed forms, scipy and simulation; verdicts at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared.experiment.statistics import Estimate, bca, paired_t, verdict


def test_t_interval_of_one_to_five_in_closed_form():
    # mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776445105
    estimate = paired_t([1, 2, 3, 4, 5])
    half = 2.776445105 * math.sqrt(2.5 / 5)
    assert estimate.effect == 3
    assert estimate.low == pytest.approx(3 - half, rel=1e-8)
    assert estimate.high == pytest.approx(3 + half, rel=1e-8)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=40))
@settings(max_examples=50, deadline=None)
def test_t_interval_equals_scipys(values):
    estimate = paired_t(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95) if np.ptp(values) > 1e-6 else None
    if expected is not None:
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


def test_t_interval_covers_the_truth_nineteen_times_in_twenty():
    samples = np.random.default_rng(0).normal(0.7, 2.0, size=(4000, 5))
    covered = sum(e.low <= 0.7 <= e.high for e in (paired_t(row) for row in samples.tolist()))
    assert 0.94 < covered / len(samples) < 0.96


def test_bca_covers_the_truth_for_skewed_data():
    rng = np.random.default_rng(1)
    covered = sum(e.low <= 1.0 <= e.high for e in (bca(rng.exponential(1.0, 60).tolist()) for _ in range(120)))
    assert covered / 120 > 0.88


def test_bca_is_a_pure_function_and_equals_scipys():
    values = np.random.default_rng(2).lognormal(size=50)
    estimate = bca(values.tolist())
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(20250917)
    )
    assert (estimate.low, estimate.high) == (expected.confidence_interval.low, expected.confidence_interval.high)
    assert estimate == bca(values.tolist())


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_seeds_show_an_interval_and_never_decide(n):
    estimate = paired_t([1 + 0.001 * k for k in range(n)])
    assert estimate.low is not None
    assert estimate.low > 0
    assert verdict(estimate, 0.0, "greater") == "unresolved"
    assert f"{n} seeds" in estimate.reason


def test_few_units_give_no_interval():
    estimate = bca([1.0] * 29)
    assert (estimate.low, estimate.high, estimate.resolvable) == (None, None, False)
    assert "29 units" in estimate.reason


@pytest.mark.parametrize("interval", [paired_t, bca])
def test_nan_gives_a_reason_instead_of_an_interval(interval):
    estimate = interval([1.0] * 40 + [float("nan"), float("inf")])
    assert (estimate.effect, estimate.low, estimate.resolvable) == (None, None, False)
    assert estimate.reason == "2 of 42 not finite"
    assert interval([]).reason == "no runs"


def test_equal_values_decide_unless_they_sit_on_the_threshold():
    saturated = paired_t([1.0] * 5)
    assert (saturated.low, saturated.high) == (1.0, 1.0)
    assert verdict(saturated, 0.95, "greater") == "reproduced"
    assert verdict(paired_t([0.0] * 5), 0.0, "greater") == "unresolved"
    assert verdict(bca([0.5] * 30), 0.6, "greater") == "contradicted"


@pytest.mark.parametrize(
    ("low", "high", "side", "expected"),
    [
        (0.1, 0.2, "greater", "reproduced"),
        (0.1, 0.2, "less", "contradicted"),
        (-0.2, -0.1, "greater", "contradicted"),
        (-0.2, -0.1, "less", "reproduced"),
        (-0.1, 0.1, "greater", "unresolved"),
        (0.0, 0.1, "greater", "unresolved"),
        (-0.1, 0.0, "less", "unresolved"),
    ],
)
def test_verdict_by_position_of_the_interval(low, high, side, expected):
    assert verdict(Estimate((low + high) / 2, low, high, 5), 0.0, side) == expected

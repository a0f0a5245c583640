"""Intervals and verdicts: the only place where numbers turn into "reproduced" or "contradicted".

Special: an interval that cannot be trusted is not computed, and `Estimate.reason` says why. The rule is told in
docs/verdicts.md.

    estimate = paired_t([0.3, 0.2, 0.4, 0.3, 0.2])
    verdict(estimate, threshold=0.0, side="greater")     # "reproduced"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.experiment.contracts import Side

Verdict = Literal["reproduced", "contradicted", "unresolved"]

CONFIDENCE = 0.95
MIN_SEEDS = 5
MIN_UNITS = 30
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20250917


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    `low` and `high` are None where no interval exists. `resolvable` is False where the interval must not decide a
    verdict; `reason` then says why.
    """

    effect: float | None
    low: float | None
    high: float | None
    n: int
    resolvable: bool = True
    reason: str = ""


def paired_t(values: Sequence[float]) -> Estimate:
    """Two-sided 95 % Student t interval of the mean of per-seed contrasts, `mean +- t(0.975, n-1) * s / sqrt(n)`.

    `values` (n,) hold one contrast per seed: pairing has already happened, by subtracting arms of equal seed.
    Fewer than 5 values give an interval that cannot decide; fewer than 2 give none. Equal values give an interval of
    width zero, which is legitimate for saturated metrics and is named in `reason`.
    """
    bad = _not_finite(values)
    if bad:
        return bad
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, n, False, "one seed has no interval")
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    if n < MIN_SEEDS:
        return Estimate(mean, mean - half, mean + half, n, False, f"{n} seeds; a verdict needs {MIN_SEEDS}")
    reason = "every seed gives the same value" if variance == 0 else ""
    return Estimate(mean, mean - half, mean + half, n, True, reason)


def bca(values: Sequence[float]) -> Estimate:
    """BCa bootstrap 95 % interval of the mean over items or points (Efron 1987, through scipy.stats.bootstrap).

    `values` (n,) hold one contrast per unit; 10,000 resamples with a fixed seed, so the interval is a pure function
    of the values. Fewer than 30 units give no interval.
    """
    bad = _not_finite(values)
    if bad:
        return bad
    n = len(values)
    mean = math.fsum(values) / n
    if n < MIN_UNITS:
        return Estimate(mean, None, None, n, False, f"{n} units; a bootstrap interval needs {MIN_UNITS}")
    if min(values) == max(values):
        return Estimate(mean, mean, mean, n, True, "every unit gives the same value")
    import numpy as np
    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // n),
        method="BCa",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), n)


def verdict(estimate: Estimate, threshold: float, side: Side) -> Verdict:
    """`reproduced` if the interval lies wholly on `side` of the threshold, `contradicted` if wholly on the other.

    An interval that touches the threshold, and an estimate that must not decide, are `unresolved`.
    """
    if not estimate.resolvable or estimate.low is None or estimate.high is None:
        return "unresolved"
    if estimate.low > threshold:
        return "reproduced" if side == "greater" else "contradicted"
    if estimate.high < threshold:
        return "reproduced" if side == "less" else "contradicted"
    return "unresolved"


def _not_finite(values: Sequence[float]) -> Estimate | None:
    if not values:
        return Estimate(None, None, None, 0, False, "no runs")
    count = sum(not math.isfinite(value) for value in values)
    return Estimate(None, None, None, len(values), False, f"{count} of {len(values)} not finite") if count else None


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + CONFIDENCE / 2))

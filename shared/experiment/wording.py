"""How numbers and tests are written: the same in tables, reports, figures and on the board.

contrast_text(claim)          "score: b - a > 0"
number_text(0.123456)     "0.123"
"""

from __future__ import annotations

import math

from shared.experiment.claims import ClaimResult
from shared.experiment.contracts import Claim


def contrast_text(claim: Claim) -> str:
    """What the claim says about the records, such as `entropy: ce - grpo > 0`."""
    terms = []
    for arm, weight in claim.contrast.items():
        size = "" if abs(weight) == 1 else f"{abs(weight):g} "
        sign = "-" if weight < 0 else "+"
        terms.append(f"{sign} {size}{arm}" if terms else f"{'-' if weight < 0 else ''}{size}{arm}")
    return f"{claim.metric}: {' '.join(terms)} {'>' if claim.side == 'greater' else '<'} {claim.threshold:g}"


def verdict_text(result: ClaimResult) -> str:
    """Verdict, with what is to be said about it in brackets."""
    return f"{result.verdict} ({result.reason})" if result.reason else result.verdict


def seeds_text(result: ClaimResult) -> str:
    """`5`, or `3/5` while runs are missing."""
    return str(result.n_seeds) if result.n_seeds >= result.claim.n else f"{result.n_seeds}/{result.claim.n}"


def interval_text(result: ClaimResult) -> str:
    """`[0.12, 0.34]` with three significant digits, or a dash."""
    if result.low is None or result.high is None:
        return "-"
    return f"[{number_text(result.low)}, {number_text(result.high)}]"


def number_text(value: float | None) -> str:
    """Three significant digits, without exponent between 0.001 and 10,000."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:.{decimals}f}"

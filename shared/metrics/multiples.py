"""Which printed scores a protocol cannot have produced: with avg@n on N problems all are multiples of 100 / (N n).

    check_score("55.4", problems=131, samples=8)    # ScoreCheck(possible=True, telling=False, nearest=('55.4', ...))

Source: section 1 of the evaluation protocol (ground truth check).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from math import floor

from shared.experiment.contracts import AssayError


class UnreadableScore(AssayError):
    """A printed score is not a percentage."""


@dataclass(frozen=True)
class ScoreCheck:
    """`possible`: some multiple rounds to the printed score. `telling`: the multiples are so far apart that not every
    score is possible. `nearest`: the multiples next to the score from below and above, in percent, two decimals more
    than printed.
    """

    possible: bool
    telling: bool
    nearest: tuple[str, ...]


def check_score(printed: str, problems: int, samples: int) -> ScoreCheck:
    """Check a percentage as printed ("56.0" says more than "56") against avg@`samples` on `problems` problems.

    A multiple that lies exactly between two printed values may have been rounded either way. Raises `UnreadableScore`.
    """
    if problems < 1 or samples < 1:
        raise ValueError(f"a protocol has problems >= 1 and samples >= 1, not {problems} and {samples}")
    text = printed.strip().removesuffix("%").strip()
    if not re.fullmatch(r"\d{1,3}(\.\d{1,6})?", text) or Fraction(text) > 100:
        raise UnreadableScore(f"{printed!r} is not a percentage from 0 to 100: give the score as it is printed.")
    decimals = len(text.partition(".")[2])
    value, half, step = Fraction(text), Fraction(1, 2 * 10**decimals), Fraction(100, problems * samples)
    below = floor(value / step)
    around = [step * m for m in (below, below + 1) if m <= problems * samples]
    if around[0] == value:
        around = around[:1]
    possible = any(abs(multiple - value) <= half for multiple in around)
    places = Decimal(1).scaleb(-decimals - 2)
    exact = [Decimal(multiple.numerator) / Decimal(multiple.denominator) for multiple in around]
    return ScoreCheck(possible, step > 2 * half, tuple(str(m.quantize(places, ROUND_HALF_EVEN)) for m in exact))

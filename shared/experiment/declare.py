"""Claims written the way tables print them.

    claim("T-dapo", "DAPO ends with more entropy than GRPO", "tabular", "entropy_end: dapo - grpo > 0", n=20)

`test` reads `metric: [weight] arm [+|- [weight] arm]... >|< threshold`, with blanks between all parts.
"""

from __future__ import annotations

from shared.experiment.contracts import Claim, Side, Strength

SIDES: dict[str, Side] = {">": "greater", "<": "less"}


class BadTest(ValueError):
    """The text of a test cannot be read."""


def claim(
    id: str,
    statement: str,
    study: str,
    test: str,
    n: int,
    *,
    strength: Strength = "may",
    paper: str = "",
    headline: bool = False,
) -> Claim:
    """A claim over seeds; `paper` is the paper's own value. Raises `BadTest` with the text."""
    metric, contrast, side, threshold = read_test(test)
    return Claim(
        id=id,
        statement=statement,
        strength=strength,
        study=study,
        metric=metric,
        contrast=contrast,
        n=n,
        threshold=threshold,
        side=side,
        paper_value=paper,
        headline=headline,
    )


def read_test(test: str) -> tuple[str, dict[str, float], Side, float]:
    """Metric, contrast, side and threshold of a test's text."""
    metric, _, rest = test.partition(": ")
    words = rest.split()
    if len(words) < 3 or words[-2] not in SIDES:
        raise BadTest(f"'{test}' does not read 'metric: arm [+|- arm]... >|< threshold'")
    contrast: dict[str, float] = {}
    weight = 1.0
    for word in words[:-2]:
        if word in ("+", "-"):
            weight = 1.0 if word == "+" else -1.0
        elif _number(word) is not None:
            weight *= float(word)
        elif word in contrast:
            raise BadTest(f"'{test}' names arm {word} twice")
        else:
            contrast[word], weight = weight, 1.0
    threshold = _number(words[-1])
    if threshold is None or not contrast:
        raise BadTest(f"'{test}' needs an arm before, and a number after '{words[-2]}'")
    return metric, contrast, SIDES[words[-2]], threshold


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None

r"""math-verify on two cleaned answers. The only module that imports sympy: a worker's, or `grade` without workers'.

Special: no time limits of math-verify's own. They need SIGALRM in the main thread, and an alarm handler cannot stop a
loop in C; the workers of `MathGrader` are killed instead.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

try:
    import math_verify
    from latex2sympy2_extended import NormalizationConfig
except ImportError as error:  # pragma: no cover - the extra is part of the tests' environment
    from shared.grading.rules import GradingNotInstalled

    raise GradingNotInstalled() from error

# Our own rules have removed units: math-verify's list would also turn the answer `6m` into 6.
_CONFIG = math_verify.LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    ),
)
# Its two warnings say that no time limit is set; ours is outside.
logging.getLogger("math_verify").setLevel(logging.ERROR)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    return math_verify.parse(f"\\boxed{{{text}}}", extraction_config=[_CONFIG], parsing_timeout=None)  # type: ignore[arg-type]


def same(gold: str, answer: str) -> bool:
    """math-verify's verdict, gold first; an answer that it cannot read equals a gold of the same text only."""
    return math_verify.verify(_parsed(gold), _parsed(answer), allow_set_relation_comp=True, timeout_seconds=None)  # type: ignore[arg-type]


def readable(text: str) -> bool:
    """Whether math-verify makes an expression of the text (else it keeps the string, or nothing)."""
    return bool(_parsed(text)) and not isinstance(_parsed(text)[0], str)

r"""math-verify on two cleaned answers. The only module that imports sympy: a worker's, or `grade` without workers'.

Special: no time limits of math-verify's own. They need SIGALRM in the main thread, and an alarm handler cannot stop a
loop in C; the workers of `MathGrader` are killed instead.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from math import isfinite
from typing import Any

try:
    import math_verify
    from latex2sympy2_extended import NormalizationConfig
    from sympy import Expr, Float
except ImportError as error:  # pragma: no cover - the extra is part of the tests' environment
    from shared.grading.rules import GradingNotInstalled

    raise GradingNotInstalled() from error

# The whole text or nothing: without an anchor, math-verify takes the first fraction out of what it cannot parse.
# Our own rules have removed units: its list would also turn the answer `6m` into 6.
_CONFIG = math_verify.LatexExtractionConfig(
    try_extract_without_anchor=False,
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
    if _apart(_parsed(gold), _parsed(answer)):
        return False
    return math_verify.verify(_parsed(gold), _parsed(answer), allow_set_relation_comp=True, timeout_seconds=None)  # type: ignore[arg-type]


def _apart(gold: list[Any], answer: list[Any]) -> bool:
    """Whether two expressions clearly differ at one point. Spares the seconds in which sympy fails to make them equal.

    Only with variables, and not for a single symbol: math-verify also compares names letter by letter.
    """
    pair = [parsed[0] for parsed in (gold, answer) if parsed and isinstance(parsed[0], Expr)]
    if len(pair) < 2 or not all(one.free_symbols and not one.is_Symbol for one in pair):
        return False
    names = sorted({str(symbol) for one in pair for symbol in one.free_symbols})
    point = {name: Float(f"{1.2345 + 0.7071 * number:.4f}") for number, name in enumerate(names)}
    try:
        first, second = (complex(one.subs({s: point[str(s)] for s in one.free_symbols}).evalf(15)) for one in pair)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError, RecursionError):
        return False
    # NaN and infinity are never apart.
    return abs(first - second) > 1e-6 * max(abs(first), abs(second)) and isfinite(abs(first) + abs(second))


def readable(text: str) -> bool:
    """Whether math-verify makes an expression of the text (else it keeps the string, or nothing)."""
    return bool(_parsed(text)) and not isinstance(_parsed(text)[0], str)

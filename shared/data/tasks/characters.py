"""One 21-symbol character vocabulary for the written-out arithmetic tasks, and the reader of their steps.

Symbols: padding `_`, begin `^`, end `$`, ten digits, `+ - * =`, and the separators `, : ;` and space. All character
tasks share it, so that a model trained on one can be asked another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shared.data.tasks import base
from shared.data.tasks.base import Verdict

SYMBOLS = "_^$0123456789+-*=,:; "
PAD, BOS, EOS = 0, 1, 2
_ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}

Step = tuple[int, str, int, int]
"""(a, operator, b, c) of `a op b = c`."""

# Longer digit strings than any task writes are unreadable; without a bound int() itself raises at 4300 digits.
_A, _B, _C = (rf"(?P<{name}>0|[1-9][0-9]{{0,17}})" for name in "abc")
_OP = r"(?P<op>[-+*])"
TIGHT = re.compile(f"{_A}{_OP}{_B}={_C}")
"""`6*9=54`"""
SPACED = re.compile(f" *{_A} *{_OP} *{_B} *= *{_C} *")
"""`6*9=54` with any number of spaces between the symbols."""
RESULT_FIRST = re.compile(f" *{_C} *= *{_A} *{_OP} *{_B} *")
"""`54=6*9`, spaces allowed."""


def encode(text: str) -> list[int]:
    """Token ids of a text over `SYMBOLS`."""
    return [_ID[symbol] for symbol in text]


def decode(ids: Sequence[int]) -> str:
    """Text of token ids; an id outside the vocabulary becomes `?`, which no step can contain."""
    return "".join(SYMBOLS[i] if 0 <= i < len(SYMBOLS) else "?" for i in ids)


def response_text(response_ids: Sequence[int]) -> str | None:
    """The response without its end symbol, or None where the end symbol is missing."""
    text = decode(response_ids)
    return text[:-1] if text.endswith("$") else None


def parse_steps(text: str, patterns: Sequence[re.Pattern[str]]) -> list[Step] | None:
    """Steps of a response text, separated by `;`, each in one of the patterns. None if any step cannot be read."""
    steps: list[Step] = []
    for part in text.split(";"):
        match = next((found for pattern in patterns if (found := pattern.fullmatch(part))), None)
        if match is None:
            return None
        a, op, b, c = match.group("a", "op", "b", "c")
        steps.append((int(a), op, int(b), int(c)))
    return steps


def verify_fixed(expected: Sequence[Step], response_ids: Sequence[int]) -> Verdict:
    """Verdict for tasks with one right derivation, written without spaces: the first deviation gives the reason."""
    text = response_text(response_ids)
    if text is None:
        return Verdict(False, base.NO_EOS)
    steps = parse_steps(text, (TIGHT,))
    if steps is None:
        return Verdict(False, base.FORMAT)
    if len(steps) != len(expected):
        return Verdict(False, base.STEPS)
    for (a, op, b, c), (right_a, right_op, right_b, right_c) in zip(steps, expected, strict=True):
        if (a, b) != (right_a, right_b):
            return Verdict(False, base.OPERAND)
        if op != right_op:
            return Verdict(False, base.OPERATOR)
        if c != right_c:
            return Verdict(False, base.ARITHMETIC)
    return Verdict(True, base.OK)

r"""The value of a closed form such as `-\frac{3\sqrt{5}}{2} + \pi`, without sympy.

Special: says "different" hundreds of times faster than math-verify does, and nothing else. It reads numbers, + - * / ^,
fractions, roots and pi, in the one way in which they can be read; whatever is ambiguous (`1/2\pi`, `4 2`), symbolic or
large is refused and left to math-verify.

    >>> read(r"1\frac{4}{5}")
    Value(exact=Fraction(9, 5), approx=1.8, decimal=False)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:\\overline\{\d{1,20}\}|[eE][+-]?\d{1,3}(?![\d.]))?)"
    r"|(?P<word>\\(?:frac|sqrt|pi|cdot|times)(?![A-Za-z]))|(?P<sign>[-+*/^(){}\[\]]))",
    re.ASCII,
)
_ENDS = {"+", "-", ")", "}", "]"}
_FACTORS = {"(", "\\frac", "\\sqrt", "\\pi"}
_MAX_LENGTH, _MAX_DEPTH, _MAX_BITS, _MAX_POWER = 200, 16, 4096, 400


@dataclass(frozen=True)
class Value:
    """`exact` where the form is rational; `decimal` if it was written with a decimal point."""

    exact: Fraction | None
    approx: float
    decimal: bool


class _Refused(Exception):
    """Not a closed form that can be read in one way only."""


@lru_cache(maxsize=4096)
def read(text: str) -> Value | None:
    """Value of a closed form as `latex.clean` leaves it, None if it is refused. Never raises."""
    if len(text) > _MAX_LENGTH:
        return None
    try:
        reader = _Reader(text)
        number = reader.sum(0)
        if reader.token is not None:
            return None
        approx = float(number)
    except (_Refused, ArithmeticError, ValueError):
        return None
    exact = number if isinstance(number, Fraction) else None
    return Value(exact, approx, decimal=reader.decimal) if math.isfinite(approx) else None


class _Reader:
    """Recursive descent; numbers are Fractions as long as they are rational, then floats."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text))
        self.position = 0
        self.decimal = any(kind == "number" and "." in word and "\\" not in word for kind, word in self.tokens)

    @property
    def token(self) -> str | None:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else None

    def take(self, wanted: str | None = None) -> str:
        token = self.token
        if token is None or (wanted is not None and token != wanted):
            raise _Refused
        self.position += 1
        return token

    def sum(self, depth: int) -> Fraction | float:
        if depth > _MAX_DEPTH:
            raise _Refused
        sign = -1 if self.token in ("-", "+") and self.take() == "-" else 1
        total = sign * self.product(depth)
        while self.token in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total = _bounded(total + sign * self.product(depth))
        return total

    def product(self, depth: int) -> Fraction | float:
        start = self.position
        value, divided = self.power(depth), False
        if mixed := self._mixed_part(start):
            value += mixed
        while (token := self.token) is not None and token not in _ENDS:
            if token == "/":
                self.take()
                value, divided = value / self.power(depth), True
                continue
            if token in ("*", "\\cdot", "\\times"):
                self.take()
            elif divided or self._is_number() or token not in _FACTORS or self._after_number("\\frac"):
                raise _Refused  # 1/2\pi, 4 2, 2^3^4, 5 \cdot 1\frac{1}{2}
            value = value * self.power(depth)
        return _bounded(value)

    def _after_number(self, token: str) -> bool:
        return self.token == token and self.tokens[self.position - 1][0] == "number"

    def _mixed_part(self, start: int) -> Fraction | None:
        r"""The fraction of `1\frac{4}{5}`; any other fraction right after a number is refused."""
        if self.position != start + 1 or not self._after_number("\\frac"):
            return None
        part = [word for _, word in self.tokens[self.position : self.position + 7]]
        whole = part[1::3] == ["{", "{"] and part[3::3] == ["}", "}"] and part[2].isdigit() and part[5].isdigit()
        if not whole or not self.tokens[start][1].isdigit():
            raise _Refused
        value = Fraction(int(part[2]), int(part[5]))
        if value >= 1:
            raise _Refused
        self.position += 7
        return value

    def power(self, depth: int) -> Fraction | float:
        base = self.atom(depth)
        if self.token != "^":
            return base
        self.take()
        exponent = self.argument(depth)
        if self.token == "^":
            raise _Refused
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            if abs(exponent) > _MAX_POWER:
                raise _Refused
            return _bounded(base ** int(exponent))
        if base <= 0:
            raise _Refused
        return float(base) ** float(exponent)

    def atom(self, depth: int) -> Fraction | float:
        if self._is_number():
            return _number(self.take())
        token = self.take()
        if token in ("(", "{"):
            value = self.sum(depth + 1)
            self.take(")" if token == "(" else "}")
            return value
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            top = self.argument(depth)
            return _bounded(top / self.argument(depth))
        if token == "\\sqrt":
            return self._root(depth)
        raise _Refused

    def argument(self, depth: int) -> Fraction | float:
        r"""A group in braces, or one digit: `\frac12` and `2^10` split the digits that follow."""
        if self.token == "{":
            return self.atom(depth)
        if self._is_number() and (digits := self.tokens[self.position][1]).isdigit():
            rest = [("number", digits[1:])] if digits[1:] else []
            self.tokens[self.position : self.position + 1] = [("number", digits[0]), *rest]
            return Fraction(int(self.take()))
        raise _Refused

    def _root(self, depth: int) -> Fraction | float:
        degree = Fraction(2)
        if self.token == "[":
            self.take()
            degree = _number(self.take()) if self._is_number() else Fraction(0)
            self.take("]")
        value = self.argument(depth)
        if value < 0 or degree.denominator != 1 or not 2 <= degree <= 9:
            raise _Refused
        if degree == 2 and isinstance(value, Fraction):
            top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
            if top * top == value.numerator and bottom * bottom == value.denominator:
                return Fraction(top, bottom)
        return float(value) ** (1 / int(degree))

    def _is_number(self) -> bool:
        return self.position < len(self.tokens) and self.tokens[self.position][0] == "number"


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if not found:
            if text[position:].strip():
                raise _Refused
            return
        yield str(found.lastgroup), found.group(str(found.lastgroup))
        position = found.end()


def _number(text: str) -> Fraction:
    if "\\" not in text:
        return Fraction(re.sub(r"\.(?=[eE]|$)", "", text))
    head, _, digits = text.partition("\\overline{")
    digits = digits.removesuffix("}")
    if "." not in head:
        raise _Refused
    places = len(head.partition(".")[2])
    repeated = Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
    return Fraction(head.removesuffix(".") or "0") + repeated


def _bounded(value: Fraction | float) -> Fraction | float:
    if isinstance(value, Fraction) and value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
        raise _Refused
    return value

r"""Whether an answer equals a gold: structure by our rules, elements by text and value, the rest by `slow`.

Special: three-valued. Without `slow` the verdict is True, False, or None where only a computer algebra system can tell,
in microseconds; with it, None never comes out. Lists are unordered and count their elements, tuples and intervals are
ordered, brackets of intervals matter. docs/grading.md says where and why this differs from plain math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from shared.grading.closed_form import Value, read
from shared.grading.latex import (
    clean,
    group,
    is_name,
    matrix,
    plus_minus,
    sides,
    split_list,
    split_union,
    squash,
    without_unit_words,
)

Slow = Callable[[str, str], bool]

DECIMAL_RELATIVE = 1e-4
"""Relative difference that two numbers may have when one of them is a decimal (Qwen2.5-Math: numeric_equal)."""
_DECIMAL_ABSOLUTE = 1e-6  # math-verify rounds to six decimals, so it never accepts more than this
_FLOAT_NOISE = 1e-9
_BASE = re.compile(r"(\d+)_\{?(\d{1,2})\}?")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]*")
_SIDE_BY_SIDE = re.compile(r"\d\s+\d+(?![\d/])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_VARIABLE = re.compile(r"(?<![A-Za-z])[a-df-hj-z](?![A-Za-z])")
# `e`, `i` and runs of letters such as `sqrt` are no variables.
_NUMBER_WORDS = {"pi", "inf", "infinity"}
_RELATION_LIKE = re.compile(r"[=<>]|\\(?:in|le|ge|ne|neq|pm|mp)(?![A-Za-z])")
_KINDRED = ({"word", "symbolic"}, {"tuple", "union"}, {"tuple", "matrix"})
_MAX_ELEMENTS = 64


def equal(gold: str, answer: str, *, science: bool, slow: Slow | None) -> bool | None:
    """Compare cleaned texts (`latex.clean`). `science`: numbers agree within a relative 1e-4, whatever their form."""
    return _Comparison(science, slow).whole(gold, answer)


class _Comparison:
    def __init__(self, science: bool, slow: Slow | None) -> None:
        self.science, self.slow = science, slow

    def whole(self, gold: str, answer: str) -> bool | None:
        if squash(gold) == squash(answer):
            return True
        golds, answers = _elements(gold), _elements(answer)
        if len(golds) == 1 and len(answers) == 1:
            return self.element(golds[0], answers[0])
        opened = group(gold) if len(golds) == 1 else group(answer) if len(answers) == 1 else None
        if len(golds) == 1 and opened:  # a tuple was asked for, its brackets were left out
            return self.ordered(split_list(opened[1]), answers)
        if len(answers) == 1 and opened:  # a list was asked for, brackets were put around it
            answers = _elements(opened[1])
        return self.unordered(golds, answers)

    def ordered(self, golds: Sequence[str], answers: Sequence[str]) -> bool | None:
        if len(golds) != len(answers) or len(golds) > _MAX_ELEMENTS:
            return False
        unknown = False
        for gold, answer in zip(golds, answers, strict=True):
            verdict = self.element(gold, answer)
            if verdict is False:
                return False
            unknown |= verdict is None
        return None if unknown else True

    def unordered(self, golds: Sequence[str], answers: Sequence[str]) -> bool | None:
        if len(golds) != len(answers) or len(golds) > _MAX_ELEMENTS:
            return False
        left, unknown = list(answers), False
        for gold in golds:
            verdicts = [self.element(gold, answer) for answer in left]
            if True in verdicts:
                del left[verdicts.index(True)]
            elif None in verdicts:
                unknown = True
            else:
                return False
        return None if unknown else True

    def element(self, gold: str, answer: str) -> bool | None:
        gold, answer = _without_names(clean(gold), clean(answer))
        gold, answer = gold.removeprefix("+"), answer.removeprefix("+")
        if squash(gold) == squash(answer):
            return True
        if "%" in gold or "%" in answer:
            return self._percent(gold, answer)
        if "_" in gold and (base := _BASE.fullmatch(squash(gold))):
            return _same_numeral(base, squash(answer))
        if _SIDE_BY_SIDE.search(answer) and not _SIDE_BY_SIDE.search(gold):
            return False  # math-verify adds the two numbers
        for rule in (self._groups, self._matrices, self._unions, self._numbers, _words, _kinds):
            verdict = rule(gold, answer)
            if verdict is not None:
                return verdict
        return None if self.slow is None else self.slow(gold, answer)

    def _percent(self, gold: str, answer: str) -> bool | None:
        bare = [text.replace("%", "").strip() for text in (gold, answer)]
        same = self.element(*bare)
        if ("%" in gold) == ("%" in answer) or same:
            return same
        values = [read(text) for text in bare]
        if values[0] is None or values[1] is None:
            return same
        # 62.5% is 0.625 as well as 62.5.
        factors = [0.01 if "%" in text else 1.0 for text in (gold, answer)]
        first, second = (value.approx * factor for value, factor in zip(values, factors, strict=True) if value)
        return _close(first, second, _FLOAT_NOISE)

    def _groups(self, gold: str, answer: str) -> bool | None:
        ours, theirs = group(gold), group(answer)
        if ours and theirs:
            golds, answers = split_list(ours[1]), split_list(theirs[1])
            brackets = (ours[0] + ours[2], theirs[0] + theirs[2])
            if "\\{\\}" in brackets:
                return self.unordered(golds, answers)
            if len(golds) == len(answers) == 2 and brackets[0] != brackets[1]:
                return False
            return self.ordered(golds, answers)
        if (one := ours or theirs) and len(inside := split_list(one[1])) == 1:
            return self.element(*((inside[0], answer) if ours else (gold, inside[0])))
        if one and read(answer if ours else gold):
            return False
        return None

    def _matrices(self, gold: str, answer: str) -> bool | None:
        ours, theirs = matrix(gold), matrix(answer)
        if ours is None and theirs is None:
            return None
        if ours is None or theirs is None:  # a vector may be written as a tuple
            cells = _vector(ours or theirs or [])
            inside = group(answer if ours is not None else gold)
            if cells is None or inside is None:
                return None
            entries = split_list(inside[1])
            return self.ordered(*((cells, entries) if ours is not None else (entries, cells)))
        if [len(row) for row in ours] != [len(row) for row in theirs]:
            return False
        return self.ordered([cell for row in ours for cell in row], [cell for row in theirs for cell in row])

    def _unions(self, gold: str, answer: str) -> bool | None:
        ours, theirs = split_union(gold), split_union(answer)
        if len(ours) < 2 or len(theirs) < 2:
            return None
        return self.unordered(ours, theirs) or None  # [0,1] u [1,2] = [0,2]: only sympy can deny

    def _numbers(self, gold: str, answer: str) -> bool | None:
        ours = read(gold)
        if ours is None:
            return None
        theirs = read(answer) or read(without_unit_words(answer))
        return None if theirs is None else _same_number(ours, theirs, self.science)


def _same_number(gold: Value, answer: Value, science: bool) -> bool | None:
    if gold.exact is not None and gold.exact == answer.exact:
        return True
    if science:
        return _close(gold.approx, answer.approx, DECIMAL_RELATIVE)
    if not (gold.decimal or answer.decimal):
        rational = gold.exact is not None and answer.exact is not None
        return False if rational or not _close(gold.approx, answer.approx, _FLOAT_NOISE) else None
    near = abs(gold.approx - answer.approx) <= _DECIMAL_ABSOLUTE * (1 + _FLOAT_NOISE)
    return None if near and _close(gold.approx, answer.approx, DECIMAL_RELATIVE * (1 + _FLOAT_NOISE)) else False


def _close(first: float, second: float, relative: float) -> bool:
    return abs(first - second) <= relative * max(abs(first), abs(second))


def _same_numeral(gold: re.Match[str], answer: str) -> bool:
    """Numerals of a base: equal digits, and the base equal where the answer names it."""
    found = _BASE.fullmatch(answer)
    return gold.group(1) == (found.group(1) if found else answer) and (not found or gold.group(2) == found.group(2))


def _words(gold: str, answer: str) -> bool | None:
    if not (_WORD.fullmatch(gold) and _WORD.fullmatch(answer)):
        return None
    first, second = (re.sub(r"^(?:an?|the)\s", "", text.casefold()) for text in (gold, answer))
    return True if first == second else None


def _kinds(gold: str, answer: str) -> bool | None:
    """False for two things that are never equal, such as a number and a word; None if that says nothing."""
    ours, theirs = _kind(gold), _kind(answer)
    known = ours and theirs and ours != theirs and {ours, theirs} not in _KINDRED
    return False if known else None


def _kind(text: str) -> str:
    """number, word, tuple, union, matrix, symbolic (something with a variable), or "" for anything less plain."""
    if read(text):
        return "number"
    if "\\text" in text or _RELATION_LIKE.search(text):
        return ""
    if (cells := matrix(text)) is not None:
        return "matrix" if len(cells) + len(cells[0]) > 2 else ""
    if len(split_union(text)) > 1:
        return "union"
    if inside := group(text):
        return "tuple" if len(split_list(inside[1])) > 1 else ""
    if _WORD.fullmatch(text) and len(text) > 1:
        return "" if text.casefold() in _NUMBER_WORDS else "word"
    return "symbolic" if _VARIABLE.search(_COMMAND.sub(" ", text)) else ""


def _vector(rows: list[list[str]]) -> list[str] | None:
    if len(rows) == 1:
        return rows[0]
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else None


def _elements(text: str) -> list[str]:
    r"""Elements of a list or of a set in `\{\}`, with `\pm` written out."""
    if (braces := group(text)) and braces[0] == "\\{":
        text = braces[1]
    return [value for part in split_list(text) for value in plus_minus(part)]


def _without_names(gold: str, answer: str) -> tuple[str, str]:
    """Drop `x =` and `x \\in` where only one side has it, or both name the same."""
    ours, theirs = sides(gold), sides(answer)
    if ours and theirs:
        same = squash(ours[0]) == squash(theirs[0]) and is_name(ours[0])
        return (ours[1], theirs[1]) if same else (gold, answer)
    if theirs and theirs[1]:
        return gold, theirs[1]
    if ours and is_name(ours[0]):
        return ours[1], answer
    return gold, answer

r"""What the tasks' math answers look like, what a grade says, and every verdict that needs no computer algebra.

    >>> pending_or_grade("42", r"so \boxed{042}", RULES["aime24"])
    Grade(correct=True, extracted='42', reason='correct', detail='')

Special: standard library only, safe on any text, and linear in the length of the response. Section numbers refer to the
evaluation protocol, see docs/grading.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from shared.experiment.contracts import AssayError
from shared.grading.closed_form import read
from shared.grading.compare import equal
from shared.grading.extract import after_thinking, aime_integer, final_number, last_box
from shared.grading.latex import clean, group, is_name, nesting, sides, split_list, squash, without_unit_words

CORRECT = "correct"
"""The answer equals the gold."""
WRONG = "wrong"
"""The answer was read and differs."""
NO_ANSWER = "no_answer"
"""No box, an empty one, or one whose brace is never closed; for GSM8K, no number either."""
UNREADABLE = "unreadable"
"""There is an answer, but it is no mathematics that can be read, or longer than `MAX_ANSWER`. Counts as wrong."""
TIMEOUT = "timeout"
"""The comparison used up its CPU time. No verdict: excluded from scores, and counted (section 7)."""
HARNESS_ERROR = "harness_error"
"""The grader itself failed, `Grade.detail` says how. No verdict: excluded from scores, and counted (section 7)."""
REASONS = (CORRECT, WRONG, NO_ANSWER, UNREADABLE, TIMEOUT, HARNESS_ERROR)

MAX_ANSWER, MAX_NESTING = 2000, 32
"""Characters and depth of brackets; the golds of the sets at hand have at most 230 and 6."""


class UnparsableGold(AssayError):
    """A gold answer that nothing can be compared with."""


class GradingNotInstalled(AssayError):
    """math-verify is missing."""

    def __init__(self) -> None:
        super().__init__("Grading math answers needs math-verify, which is not installed: pip install 'assay[eval]'.")


@dataclass(frozen=True)
class Rule:
    """How the answer of a task is found and compared (section 2, steps 1 to 3).

    `find`: "box" reads the last box only; "final" falls back to `####` and to the last number. `integer`: golds are
    integers 0..999, and answers are read as such first. `science`: numbers agree within a relative 1e-4, because golds
    are measured values. `after_think`: look only at the text after the last `</think>`.
    """

    name: str
    find: Literal["box", "final"] = "box"
    integer: bool = False
    science: bool = False
    after_think: bool = True


AIME = Rule("aime", integer=True)
MATH = Rule("math")
GSM8K = Rule("gsm8k", find="final")
MINERVA = Rule("minerva", science=True)

RULES = {
    "aime24": AIME,
    "aime25": AIME,
    "amc23": MATH,
    "hmmt_feb": MATH,
    "math500": MATH,
    "gsm8k": GSM8K,
    "minerva": MINERVA,
    "olympiadbench": MATH,
}
"""Rule of each task."""


@dataclass(frozen=True)
class Grade:
    """`correct` is None exactly when `reason` is TIMEOUT or HARNESS_ERROR.

    `extracted` is the answer in the form in which `maj@n` counts votes, None when there is none.
    """

    correct: bool | None
    extracted: str | None
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Pending:
    """A comparison that only math-verify can decide: cleaned texts, and the vote."""

    gold: str
    answer: str
    science: bool
    extracted: str


@lru_cache(maxsize=1 << 16)
def check_gold(gold: str, rule: Rule) -> str:
    """The cleaned gold. Raises `UnparsableGold`; tasks call this for every gold when they load."""
    cleaned = clean(gold)
    integer = aime_integer(gold)
    if rule.integer and (integer is None or not 0 <= integer <= 999):
        raise UnparsableGold(f"Gold {gold!r} is no integer from 0 to 999, which rule {rule.name!r} asks for: mend it.")
    why = "is empty" if not cleaned else _too_large(gold) or ("" if _balanced(cleaned) else "has unbalanced braces")
    if why:
        raise UnparsableGold(f"Gold {gold[:80]!r} {why}, so no answer can equal it: mend it or drop the problem.")
    return cleaned


def pending_or_grade(gold: str, response: str, rule: Rule) -> Grade | Pending:
    """The grade of a response, or what math-verify still has to decide. Raises `UnparsableGold`."""
    gold_text = check_gold(gold, rule)
    answer = find_answer(response, rule)
    if not answer:
        return Grade(False, None, NO_ANSWER)
    if why := _too_large(answer):
        return Grade(False, answer[:MAX_ANSWER], UNREADABLE, why)
    if rule.integer and (number := aime_integer(answer)) is not None:
        return _grade(number == aime_integer(gold), str(number))
    answer_text = clean(answer)
    if not answer_text:
        return Grade(False, None, NO_ANSWER)
    extracted = _vote(answer_text, gold_text)
    verdict = equal(gold_text, answer_text, science=rule.science, slow=None)
    if verdict is None:
        return Pending(gold_text, answer_text, rule.science, extracted)
    return _grade(verdict, extracted)


def find_answer(response: str, rule: Rule) -> str | None:
    """The answer as it is written, None if there is none (section 2, steps 1 and 2)."""
    text = after_thinking(response) if rule.after_think else response
    return last_box(text) if rule.find == "box" else final_number(text)


def _grade(correct: bool, extracted: str) -> Grade:
    return Grade(correct, extracted, CORRECT if correct else WRONG)


def _too_large(text: str) -> str:
    if len(text) > MAX_ANSWER:
        return f"has {len(text)} characters"
    return f"is nested {nesting(text)} deep" if nesting(text) > MAX_NESTING else ""


def _balanced(text: str) -> bool:
    depth, escaped = 0, False
    for letter in text:
        if not escaped:
            depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
        escaped = letter == "\\" and not escaped
    return depth == 0


def _vote(answer: str, gold: str) -> str:
    """Normal form for votes: numbers by value, lists in order of their text, names on the left dropped."""
    parts = split_list(answer)
    if len(parts) > 1:
        return ",".join(sorted(_vote(part, gold) for part in parts))
    answer = parts[0] if parts else answer
    named = sides(answer)
    if named and named[1] and (is_name(named[0]) or not sides(gold)):
        answer = named[1]
    if (enclosed := group(answer)) and len(split_list(enclosed[1])) == 1:
        return _vote(enclosed[1], gold)
    value = read(answer) or (read(without_unit_words(answer)) if read(gold) else None)
    return _rational(value.exact) if value and value.exact is not None else squash(answer)


def _rational(number: Fraction) -> str:
    """`7`, `0.5`, `1/3`: a decimal where it ends within twelve places."""
    scaled = number * 10**12
    if scaled.denominator > 1 or number.denominator == 1:
        return str(number)
    digits = f"{abs(scaled.numerator):013d}"
    return f"{'-' * (number < 0)}{digits[:-12]}.{digits[-12:].rstrip('0')}"

r"""Which part of a response is the answer: text after the reasoning, the last box, the final number.

Special: standard library only and linear in the length of the response, so that 60 kB of reasoning cost a few
milliseconds. The order of the rules and their constants are section 2 of the evaluation protocol (docs/grading.md).

    >>> last_box(r"first \boxed{41}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
"""

from __future__ import annotations

import re

END_OF_THINKING = "</think>"
_BOX = re.compile(r"\\f?box(?:ed)?\s{0,8}\{")
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)
_AIME_INTEGER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,12})(?:\.0{0,12})?", re.ASCII)
_AIME_NOISE = re.compile(r"\\[,;:! ]|\\?\$|~|\s+|\^\s?(?:\\circ|\{\s?\\circ\s?\})|°")


def after_thinking(response: str) -> str:
    """The text after the last `</think>`, the whole response without one (Klear's judge_math.py defines the same)."""
    return response.rpartition(END_OF_THINKING)[2]


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`, None without one or if its brace is never closed.

    Braces are matched, `\{` and `\}` do not count. Only the last box is read: two boxes are never a set. Boxes inside
    a box are peeled off. A `\boxed` that no brace follows is a mention, not a box.
    """
    # From the right, because responses are long and boxes stand at the end.
    start, position = None, len(text)
    while start is None:
        position = max(text.rfind("\\boxed", 0, position), text.rfind("\\fbox", 0, position))
        if position < 0:
            return None
        if found := _BOX.match(text, position):
            start = found.end()
    end = _closing_brace(text, start)
    return None if end is None else text[start:end].strip()


def _closing_brace(text: str, start: int) -> int | None:
    depth, position = 1, start
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 1
        elif letter == "{":
            depth += 1
        elif letter == "}":
            depth -= 1
            if not depth:
                return position
        position += 1
    return None


def final_number(text: str) -> str | None:
    """GSM8K: the last box, else the number after the last `####`, else the last number of the text.

    The data set marks its answers with `####` (openai/grade-school-math); the last number is lm-eval's
    `flexible-extract` filter of gsm8k.
    """
    if (box := last_box(text)) is not None:
        return box
    _, mark, tail = text.rpartition("####")
    if mark and (found := _NUMBER.search(tail)):
        return found.group()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def aime_integer(answer: str) -> int | None:
    r"""The integer that an AIME answer states, None if it is not written as one; the caller checks 0..999.

    Drops `$`, spaces, commas, a trailing `.` or `^\circ`, leading zeros (section 2, step 3), and `.0`. A comma is
    dropped only between groups of three digits: `4,2` is a list, not 42.
    """
    text = _AIME_NOISE.sub("", answer) if len(answer) <= 64 else ""
    # Two numbers side by side must not become one.
    if re.search(r"\d\s+\d", answer) or not _AIME_INTEGER.fullmatch(text):
        return None
    return int(text.partition(".")[0].replace(",", ""))

r"""One way of writing LaTeX answers: sizes, spacing, fonts and units removed, lists and brackets taken apart.

Special: pure text, no parser, linear in its input. What it cannot take apart stays as it is, for math-verify.

    >>> clean(r"\left( 3, \dfrac{\pi}{2} \right)")
    '( 3, \\frac{\\pi}{2} )'
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

_SYMBOLS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u00b0": r"^\circ ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u222a": r"\cup ",
        "\u2208": r"\in ",
        "\u00b1": r"\pm ",
        "\u2248": r"\approx ",
        "\u221a": r"\sqrt",
        "\xa0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\uff0c": ",",
        "\0": " ",
    }
)
_FONTS = "text(?:rm|bf|it|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mbox|hbox|boldsymbol|bm"
# In this order: thousands before spacing, because `\!` marks them.
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=\d)(?:\{,\}|,\\!|\\,)\s*(?=\d{3}(?!\d))", ""),
        (r"\\(?:left|right)\.", ""),
        (r"\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;:!> ]|\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s?(\d)\s?(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"(?<![\d.])(\d+) (\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
        (r"\\sqrt\s?(\d)(?!\d)", r"\\sqrt{\1}"),
        (r"([_^])\s?\{(\w)\}(?!\w)", r"\1\2"),
        (rf"\\(?:{_FONTS})\s?(?=\{{)", r"\\text"),
        (r"\\(le|ge)(?:q|qslant|slant)(?![A-Za-z])", r"\\\1"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\^\s?(?:\\circ(?![A-Za-z])|\{\s?\\circ\s?\})|\\degrees?(?![A-Za-z])", ""),
        (r"\\?\$", ""),
        (r"\\%|\\?\bpercent\b|\\text\{\s?percent\s?\}", "%"),
        (r"\bnp\.(?=[a-z])", r"\\"),  # one gold of Minerva is Python
    )
]
_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})%A-Za-z])\s?\\text\{[^{}]*\}(?:\^\{?-?\d\}?)?$")
_SHORT_UNITS = {"m", "cm", "mm", "km", "nm", "ft", "in", "yd", "mi", "g", "kg", "mg", "lb", "lbs", "oz", "L", "mL"}
_SHORT_UNITS |= {"s", "ms", "sec", "min", "h", "hr", "hrs", "Hz", "J", "kJ", "V", "W", "K", "N", "Pa", "eV", "mph"}
_NUMBER_AND_WORDS = re.compile(r"([-+]?\d[\d.,/ ]*)\s?([A-Za-z][A-Za-z /.]*)(?:\^\{?-?\d\}?)?")
_PLAIN_SYMBOLS = {"sqrt", "frac", "infty", "infinity"}
_AND_OR = re.compile(r"\s(?:and|or)\s|\\text\{\s?(?:and|or)\s?\}")
_OPEN, _CLOSE = "([{", ")]}"
_NAME = re.compile(r"\\?[A-Za-z]+(?:_(?:\{[^{}]*\}|\\?\w+))?\s?(?:\([A-Za-z, ]*\))?'*|\\angle [A-Za-z0-9_{} ]+")
_RELATION = re.compile(r"[<>\u2260]|\\(?:le|ge|ne|neq|lt|gt|equiv)(?![A-Za-z])|!=|==")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}")


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    r"""The text without sizes, spacing, fonts around a whole answer, currency, degrees, trailing units and stops."""
    text = text.translate(_SYMBOLS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(" .,;:") if not text.rstrip().endswith("\\}") else text.strip()
    text = _exact_part(text)
    if whole := _WHOLE_TEXT.fullmatch(text):
        return whole.group(1).strip()
    return _UNIT.sub("", text).strip()


def _exact_part(text: str) -> str:
    r"""`\frac{1}{3} \approx 0.333` -> `\frac{1}{3}`, but `x \approx 42` -> `42`."""
    left, mark, right = (part.strip() for part in text.partition("\\approx"))
    return left if not mark or (left and not is_name(left)) else right


def squash(text: str) -> str:
    """The text without spaces, except between two digits, where they mean something."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def without_unit_words(text: str) -> str:
    r"""`15 cm` -> `15`, `42 apples` -> `42`; `15x` and `2 sqrt` stay. Only for answers to a number."""
    found = _NUMBER_AND_WORDS.fullmatch(text)
    if not found:
        return text
    words = re.split(r"[ /.]+", found.group(2).strip(" ."))
    known = all(word in _SHORT_UNITS or (len(word) > 3 and word not in _PLAIN_SYMBOLS) for word in words)
    return found.group(1).strip() if known else text


def split_list(text: str) -> list[str]:
    r"""Parts of a list at its commas, semicolons, `and`, `or` outside all brackets; one part if it is none.

    `1,234` is a number: commas between groups of three digits do not split a text that holds nothing else.
    """
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?", text):
        return [text.replace(",", "")]
    return [part for part in (part.strip() for part in _split(_AND_OR.sub(",", text), ",;")) if part]


def split_union(text: str) -> list[str]:
    r"""Parts at the `\cup` outside all brackets."""
    return [part.strip() for part in _split(re.sub(r"\\cup(?![A-Za-z])", "\0", text), "\0")]


def _split(text: str, separators: str) -> Iterator[str]:
    depth = start = 0
    for position, letter in enumerate(text):
        if letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
        elif letter in separators and not depth:
            yield text[start:position]
            start = position + 1
    yield text[start:]


def group(text: str) -> tuple[str, str, str] | None:
    r"""(opening bracket, inside, closing bracket) if one pair encloses the whole text: `(3,4]`, `\{1,2\}`, `{1}`."""
    slash = text.startswith("\\{")
    if slash != text.endswith("\\}") or len(text) < 2 + 2 * slash:
        return None
    start, end = (2, len(text) - 2) if slash else (1, len(text) - 1)
    if text[start - 1] not in _OPEN or text[-1] not in _CLOSE:
        return None
    depth = 0
    for letter in text[start:end]:
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth < 0:
            return None
    return ("\\{" if slash else text[0], text[start:end].strip(), "\\}" if slash else text[-1]) if not depth else None


def nesting(text: str) -> int:
    """Depth of the brackets of all kinds, escaped or not."""
    depth = deepest = 0
    for letter in text:
        depth += (letter in _OPEN) - (letter in _CLOSE)
        deepest = max(deepest, depth)
    return deepest


def matrix(text: str) -> list[list[str]] | None:
    """Cells of a matrix by row, None if the text is not one matrix."""
    found = _MATRIX.fullmatch(text)
    if not found or "\\begin" in found.group(2):
        return None
    rows = [row for row in re.split(r"\\\\", found.group(2)) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def sides(text: str) -> tuple[str, str] | None:
    r"""(left, right) of the last `=` outside brackets, or of `\in`; None for inequalities and without either."""
    if _RELATION.search(text):
        return None
    parts = list(_split(text, "="))
    if len(parts) == 1:
        parts = re.split(r"\\in(?![A-Za-z])", text)
        if len(parts) != 2:
            return None
    return "=".join(parts[:-1]).strip(), parts[-1].strip()


def is_name(text: str) -> bool:
    r"""Whether a left side only names what is right of it: `x`, `f(x)`, `m_{\max}`, `\angle ABC`."""
    return len(text) <= 64 and _NAME.fullmatch(text) is not None


def plus_minus(text: str) -> list[str]:
    r"""`1 \pm 2` as its two values; the text alone without `\pm` or `\mp`."""
    if not re.search(r"\\[pm][mp](?![A-Za-z])", text):
        return [text]
    upper = re.sub(r"\\pm(?![A-Za-z])", "+", re.sub(r"\\mp(?![A-Za-z])", "-", text))
    lower = re.sub(r"\\pm(?![A-Za-z])", "-", re.sub(r"\\mp(?![A-Za-z])", "+", text))
    return [upper.removeprefix("+").strip(), lower.strip()]

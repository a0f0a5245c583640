"""The table of (gold, answer) pairs: our verdict, math-verify's own, and a documented reason wherever they differ."""

import logging
import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from shared.grading.compare import equal
from shared.grading.math import grade
from shared.grading.rules import AIME, CORRECT, GSM8K, MATH, MINERVA, NO_ANSWER, UNREADABLE, WRONG, check_gold

VERDICTS = {"C": CORRECT, "W": WRONG, "N": NO_ANSWER, "U": UNREADABLE}
RULES = {rule.name: rule for rule in (AIME, MATH, GSM8K, MINERVA)}
ROOT = Path(__file__).parents[2]


def rows():
    for line in (Path(__file__).parent / "pairs.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            rule, flags, rest = line.split(" ", 2)
            gold, answer, *reason = rest.split(" ;; ")
            yield RULES[rule], flags, gold, answer if flags[2] == "r" else f"\\boxed{{{answer}}}", "".join(reason)


ROWS = list(rows())


def test_there_are_enough_pairs_and_none_twice():
    assert len(ROWS) >= 300
    assert Counter((rule, gold, text) for rule, _, gold, text, _ in ROWS).most_common(1)[0][1] == 1


def test_our_verdicts():
    wrong = [
        (gold, text, found.reason)
        for rule, flags, gold, text, _ in ROWS
        if (found := grade(gold, text, rule)).reason != VERDICTS[flags[0]]
    ]
    assert not wrong


def test_plain_math_verify_differs_exactly_where_the_table_gives_a_reason():
    math_verify = pytest.importorskip("math_verify")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    surprises = []
    for _, flags, gold, text, reason in ROWS:
        plain = math_verify.verify(
            math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None),
            math_verify.parse(text, parsing_timeout=None),
            timeout_seconds=None,
        )
        if plain != (flags[1] == "+") or bool(reason) != (plain != (flags[0] == "C")):
            surprises.append((gold, text, plain, reason))
    assert not surprises


def test_golds_that_are_unequal_at_a_glance_are_unequal_for_math_verify():
    """Our quick refusals (a number is no word, a matrix no union, two values that differ), on golds of many kinds."""
    pytest.importorskip("math_verify")
    from shared.grading.verify import same

    golds = sorted({check_gold(gold, rule) for rule, _, gold, _, _ in ROWS if rule is MATH and len(gold) < 40})
    pairs = random.Random(5).sample(list(product(golds, golds)), 120)
    refused = [pair for pair in pairs if equal(*pair, science=False, slow=None) is False]
    assert len(refused) > 80
    assert not [pair for pair in refused if same(*pair)]


def test_every_reason_is_explained():
    page = (ROOT / "docs" / "grading.md").read_text(encoding="utf-8")
    assert not [reason for *_, reason in ROWS if reason and f"| `{reason}` |" not in page]
    assert f"holds {len(ROWS)} pairs" in page
    assert f"differ in {sum(bool(reason) for *_, reason in ROWS)} pairs" in page

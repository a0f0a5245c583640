"""Golds that cannot be graded, votes, flags, and hostile text: all that is decided without math-verify."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.grading.math import grade
from shared.grading.rules import (
    AIME,
    CORRECT,
    GSM8K,
    MATH,
    MAX_ANSWER,
    NO_ANSWER,
    REASONS,
    RULES,
    UNREADABLE,
    WRONG,
    Grade,
    Pending,
    UnparsableGold,
    check_gold,
    pending_or_grade,
)


@pytest.mark.parametrize(
    ("gold", "rule", "why"),
    [
        ("", MATH, "is empty"),
        (" $ $ ", MATH, "is empty"),
        (r"\frac{1}{2", MATH, "unbalanced"),
        (r"1}{2", MATH, "unbalanced"),
        ("x" * (MAX_ANSWER + 1), MATH, "characters"),
        ("(" * 40 + "1" + ")" * 40, MATH, "deep"),
        ("1000", AIME, "0 to 999"),
        ("-1", AIME, "0 to 999"),
        (r"\frac{1}{2}", AIME, "0 to 999"),
        ("", AIME, "0 to 999"),
    ],
)
def test_golds_that_nothing_can_equal_are_named(gold, rule, why):
    with pytest.raises(UnparsableGold, match=why):
        check_gold(gold, rule)
    with pytest.raises(UnparsableGold, match=why):
        grade(gold, "\\boxed{1}", rule)


def test_escaped_braces_do_not_count():
    assert check_gold(r"\{1, 2\}", MATH)


@pytest.mark.parametrize(
    ("answers", "vote"),
    [
        ([r"\frac{1}{2}", "0.5", r"\dfrac12", "1/2", "0.50", r"x = \frac{2}{4}", r"\left(\frac{1}{2}\right)"], "0.5"),
        (["42", "042", "42.0", r"\{42\}", r"42^\circ", r"n = 42", "$42$"], "42"),
        (["1,2", "2,1", r"1 \text{ and } 2", "x=2, x=1"], "1,2"),
        (["1,234", "1234", r"1{,}234"], "1234"),
        ([r"-\frac{1}{3}", r"\frac{-1}{3}"], "-1/3"),
        ([r"\text{east}", "east"], "east"),
        ([r"2 \sqrt{3}", r"2\sqrt3"], r"2\sqrt{3}"),
    ],
)
def test_equal_answers_give_one_vote(answers, vote):
    for answer in answers:
        assert pending_or_grade("1", f"\\boxed{{{answer}}}", MATH).extracted == vote


def test_a_sum_is_no_name():
    assert pending_or_grade("10", r"\boxed{\sum_{k=1}^{4} k}", MATH).extracted == r"\sum_{k=1}^4k"


def test_thinking_counts_only_where_asked():
    response = r"<think>\boxed{42}</think> done"
    assert grade("42", response, AIME).reason == NO_ANSWER
    assert grade("42", response, replace(AIME, after_think=False)).reason == CORRECT


def test_every_task_has_a_rule():
    assert set(RULES) == {
        "aime24", "aime25", "amc23", "hmmt_feb", "math500", "gsm8k", "minerva", "olympiadbench",
    }  # fmt: skip


def test_answers_beyond_reason_are_unreadable_not_compared():
    found = pending_or_grade("42", "\\boxed{" + "1+" * MAX_ANSWER + "1}", MATH)
    assert isinstance(found, Grade)
    assert (found.correct, found.reason) == (False, UNREADABLE)
    assert grade("42", "\\boxed{" + "{" * 40 + "42" + "}" * 40 + "}", MATH).reason == UNREADABLE


@given(
    st.text(max_size=200), st.sampled_from(["42", r"\frac{1}{2}", "(1,2)", "1,2", r"\text{east}", "x+1", "52_8", "5%"])
)
def test_any_text_gets_a_grade_or_a_question(text, gold):
    for response in (text, f"\\boxed{{{text}}}"):
        for rule in (MATH, GSM8K):
            found = pending_or_grade(gold, response, rule)
            assert isinstance(found, Pending) or found.reason in REASONS


@given(st.text(st.sampled_from("0123456789\\{}()[],.^_=%+- xfracsqtpminu"), max_size=80))
def test_any_latex_gets_a_grade_or_a_question(text):
    for gold in ("42", r"(3, \frac{1}{2}]", r"1 \pm \sqrt{2}", "x = 3"):
        found = pending_or_grade(gold, f"\\boxed{{{text}}}", MATH)
        assert isinstance(found, Pending) or found.reason in REASONS


def test_sixty_kilobytes_cost_milliseconds():
    filler = "We compute $x^2 + \\frac{1}{2}$ and \\boxed nothing. " * 1200
    responses = [
        filler + "\\boxed{42}",
        "\\boxed{42}" + filler,
        filler + "\\boxed{41}",
        "\\boxed{" + filler,
        "\\boxed{" + "x" * 60_000 + "}",
        "\\boxed{" + " " * 60_000 + "}",
        "\\boxed{" + "1," * 30_000 + "}",
        filler.replace("$", "$$"),
        "\0" * 60_000,
        "<think>" * 8_000 + filler,
    ]
    start = time.process_time()
    grades = [pending_or_grade("42", response, MATH) for response in responses for _ in range(5)]
    assert time.process_time() - start < 1.0
    assert [item.reason for item in grades[::5] if isinstance(item, Grade)][:3] == [CORRECT, CORRECT, WRONG]


@pytest.mark.parametrize(
    "unit", ["\\text{", "\\frac", "\\pm ", "=", "%", "{,}", "( ", "[1,", "\\cup ", "_8", "\\approx ", " and ", "\\\\"]
)
def test_repetition_within_the_limits_is_cheap(unit):
    text = (unit * MAX_ANSWER)[: MAX_ANSWER - 1]
    start = time.process_time()
    for gold in ("42", "1,2", r"(1,2) \cup (3,4)"):
        pending_or_grade(gold, f"\\boxed{{{text}}} \\boxed{{{text.replace('{', '')}}}", MATH)
    assert time.process_time() - start < 0.5


def test_importing_the_rules_loads_nothing_heavy():
    code = (
        "import sys, shared.grading.math; print(sorted({'sympy', 'math_verify', 'numpy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

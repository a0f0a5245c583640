"""Values of closed forms: known ones, refusals, and agreement with math-verify wherever both read a text."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.grading.closed_form import read
from shared.grading.compare import equal
from shared.grading.latex import clean


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("42", 42),
        ("-42", -42),
        ("0.125", Fraction(1, 8)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("2e3", 2000),
        ("1.5e-2", Fraction(3, 200)),
        ("4.5 \\times 10^{33}", 45 * 10**32),
        ("10^{-5}", Fraction(1, 10**5)),
        ("1/2/3", Fraction(1, 6)),
        ("2+3\\cdot 4", 14),
        ("2^3", 8),
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("3(4+1)", 15),
        ("(2)(3)", 6),
        ("\\frac12", Fraction(1, 2)),
        ("\\frac{-35}{9}", Fraction(-35, 9)),
        ("\\frac{1}{2}\\frac{1}{3}", Fraction(1, 6)),
        ("1\\frac{4}{5}", Fraction(9, 5)),
        ("-1\\frac{4}{5}", Fraction(-9, 5)),
        ("\\sqrt{\\frac{4}{9}}", Fraction(2, 3)),
        ("0.\\overline{3}", Fraction(1, 3)),
        ("1.2\\overline{18}", Fraction(67, 55)),
        ("((((7))))", 7),
    ],
)
def test_rational_values(text, exact):
    value = read(text)
    assert value is not None
    assert value.exact == exact


@pytest.mark.parametrize(
    ("text", "approx"),
    [
        ("\\frac{3\\sqrt{5}}{2}", 1.5 * math.sqrt(5)),
        ("2\\pi", 2 * math.pi),
        ("\\frac{5\\pi}{4}\\sqrt{17}", 1.25 * math.pi * math.sqrt(17)),
        ("\\sqrt[3]{8}", 2.0),
        ("2^{1/2}", math.sqrt(2)),
        ("1+\\sqrt{2}-\\pi", 1 + math.sqrt(2) - math.pi),
    ],
)
def test_irrational_values(text, approx):
    value = read(text)
    assert value is not None
    assert value.exact is None
    assert value.approx == pytest.approx(approx, rel=1e-12)


REFUSED = [
    "",
    "x",
    "2x",
    "1/2\\pi",
    "4 2",
    "2^3^4",
    "2\\frac{3}{2}",
    "3\\cdot1\\frac{1}{2}",
    "\\frac{1}{0}",
    "0^{-1}",
    "1+",
    "(1",
    "1)",
]
REFUSED += [
    "\\sqrt{-1}",
    "(-8)^{1/3}",
    "9^{9^{9}}",
    "10^{1000}",
    "5!",
    "1,2",
    "e",
    "1e",
    "\\overline{3}",
    "(" * 99 + "1" + ")" * 99,
]
REFUSED += [
    "9" * 201,
    "\\sqrt[1]{2}",
    "\\sqrt[x]{2}",
    "1--1",
    "3\\pi2",
    "\\frac123",
    "2^10",
    "٤٢",
    "1..2",
    "\0",
    "\\",
    "{}",
    "1{2}",
]


@pytest.mark.parametrize("text", REFUSED)
def test_what_can_be_read_in_two_ways_or_is_too_large_is_refused(text):
    assert read(text) is None


@given(st.text(st.sampled_from("0123456789.+-*/^(){}[] \\fracsqtpie,"), max_size=60))
def test_never_raises(text):
    value = read(text)
    assert value is None or math.isfinite(value.approx)


integers = st.integers(0, 40).map(str)
numbers = st.one_of(integers, st.decimals(0, 20, places=2).map(str))


def larger(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        two.map(lambda t: f"\\frac{{{t[0]}}}{{{t[1]}}}"),
        two.map(lambda t: f"{t[0]}+{t[1]}"),
        two.map(lambda t: f"{t[0]} - ({t[1]})"),
        two.map(lambda t: f"({t[0]}) \\cdot ({t[1]})"),
        inner.map(lambda t: f"\\sqrt{{{t}}}"),
        inner.map(lambda t: f"-({t})"),
        st.tuples(inner, st.integers(0, 3)).map(lambda t: f"({t[0]})^{{{t[1]}}}"),
        st.tuples(integers, inner).map(lambda t: f"{t[0]}({t[1]} + 1)"),  # math-verify reads 3(4) as 7
        integers.map(lambda t: f"{t}\\pi"),
    )


forms = st.recursive(numbers, larger, max_leaves=4)


@pytest.fixture(scope="module")
def same():
    pytest.importorskip("math_verify")
    from shared.grading.verify import same

    return same


@settings(max_examples=50, deadline=None)
@given(gold=forms, answer=forms)
def test_a_verdict_from_values_is_math_verifys(same, gold, answer):
    """Exact agreement, apart from decimals too small for the six places that math-verify looks at."""
    gold, answer = clean(gold), clean(answer)
    ours, theirs = read(gold), read(answer)
    verdict = equal(gold, answer, science=False, slow=None)
    if verdict is None or ours is None or theirs is None:
        return
    tiny = (ours.decimal or theirs.decimal) and min(abs(ours.approx), abs(theirs.approx)) < 0.02
    if not tiny:
        assert same(gold, answer) == verdict


@settings(max_examples=60, deadline=None)
@given(form=forms)
def test_every_form_equals_its_own_value(same, form):
    """Forms are read the same way by both: the exact value that we read is the form's value for math-verify."""
    value = read(clean(form))
    if value is not None and value.exact is not None and not value.decimal:
        assert same(f"\\frac{{{value.exact.numerator}}}{{{value.exact.denominator}}}", clean(form))

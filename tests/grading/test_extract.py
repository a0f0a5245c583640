"""Finding the answer: the sheet's order of rules, and nothing but linear time on long or broken text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.grading.extract import after_thinking, aime_integer, final_number, last_box

# Texts without brackets or backslashes, to put into and around boxes.
plain = st.text(st.characters(exclude_characters="{}\\"), max_size=40)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{41} no wait \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}} and so on }", r"\frac{1}{2}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{a \\ {b}}", r"a \\ {b}"),
        (r"\fbox{7}", "7"),
        (r"\boxed  {7}", "7"),
        (r"\boxed{x=\boxed{7}}", "7"),
        (r"\boxed{7} is what \boxed means", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{41} \boxed{42", None),
        (r"\boxed{42\}", None),
        ("42", None),
        ("", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


@given(before=plain, inside=plain, between=plain, last=plain)
def test_the_last_box_wins_whatever_stands_before_it(before, inside, between, last):
    assert last_box(f"{before}\\boxed{{{inside}}}{between}\\boxed{{a{{{last}}}b}}{before}") == f"a{{{last}}}b"


@given(st.text(st.sampled_from("\\{}boxedf 1")))
def test_broken_boxes_never_raise(text):
    last_box(text + "\\boxed{" + text)


def test_thinking_is_cut_off_at_its_last_end():
    assert after_thinking("<think>a</think>b</think>c") == "c"
    assert after_thinking("no tag") == "no tag"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 eggs at 2 = 10\n#### 1,234", "1,234"),
        ("#### 1\n#### -2.50 dollars, 3 left", "-2.50"),
        (r"#### 5 \boxed{6}", "6"),
        ("costs $18.", "$18"),
        ("12 of 30.", "30"),
        ("####", None),
        ("none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@given(st.integers(-(10**9), 10**9))
def test_aime_integers_are_read_in_every_spelling(number):
    zeros = f"{'-' * (number < 0)}00{abs(number)}"
    for text in (f"${number}$", zeros, f"{number:,}", f"{number}.0", f"{number}^{{\\circ}}", f" {number} ."):
        assert aime_integer(text) == number


@pytest.mark.parametrize("text", ["4,2", "4 2", "1,23", "42.5", "x=42", "", "-", "42%", "٤٢", "1e3", "9" * 70, "4.2.0"])
def test_what_is_no_integer_is_left_to_the_other_rules(text):
    assert aime_integer(text) is None


def test_long_responses_take_milliseconds():
    long = [
        "\\boxed" * 10_000,
        "\\boxed{" * 9_000,
        "\\boxed{" + "{" * 60_000,
        "\\boxed{1}" + "\\fbox " * 10_000,
        "1 " * 30_000,
        "1," * 30_000,
        "</think>" * 8_000,
        "#" * 60_000,
    ]
    start = time.process_time()
    for text in long:
        last_box(after_thinking(text))
        final_number(text)
        aime_integer(text)
    assert time.process_time() - start < 1.0

"""Numbers and tests as people read them."""

from __future__ import annotations

import dataclasses

import pytest

from shared.experiment.claims import ClaimResult
from shared.experiment.wording import contrast_text, interval_text, number_text, seeds_text, verdict_text
from tests.experiment.fake_records import toy_claim


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (-12.345, "-12.3"),
        (1234.5, "1234"),
        (0.99999, "1.00"),
        (0, "0"),
        (1e-5, "1.00e-05"),
        (None, "-"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "score: b - a > 0"),
        ({"contrast": {"a": -1.0, "b": 0.5, "c": 0.5}}, "score: -a + 0.5 b + 0.5 c > 0"),
        ({"contrast": {"a": 1.0}, "side": "less", "threshold": 0.25}, "score: a < 0.25"),
    ],
)
def test_a_test_in_words(changes, text):
    assert contrast_text(toy_claim(**changes)) == text


def test_interval_seeds_and_verdict():
    result = ClaimResult(toy_claim(), 0.5, -0.25, 1.25, 3, "unresolved", "3 of 5 seeds so far")
    assert interval_text(result) == "[-0.250, 1.25]"
    assert seeds_text(result) == "3/5"
    assert verdict_text(result) == "unresolved (3 of 5 seeds so far)"
    assert interval_text(dataclasses.replace(result, low=None)) == "-"
    assert seeds_text(dataclasses.replace(result, n_seeds=5)) == "5"

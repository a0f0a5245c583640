"""The audit rule against brute force over all multiples, and on tables whose protocol is known."""

from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.metrics.multiples import UnreadableScore, check_score

protocols = {"problems": st.integers(1, 40), "samples": st.integers(1, 12)}


@given(**protocols, decimals=st.integers(0, 3), data=st.data())
def test_every_score_that_the_protocol_can_print_is_possible(problems, samples, decimals, data):
    correct = data.draw(st.integers(0, problems * samples))
    exact = Decimal(100 * correct) / Decimal(problems * samples)
    for rounding in (ROUND_HALF_EVEN, ROUND_HALF_UP):
        assert check_score(str(exact.quantize(Decimal(1).scaleb(-decimals), rounding)), problems, samples).possible


@given(**protocols, tenths=st.integers(0, 1000))
def test_equals_brute_force(problems, samples, tenths):
    value, total = Fraction(tenths, 10), problems * samples
    possible = any(abs(Fraction(100 * m, total) - value) <= Fraction(1, 20) for m in range(total + 1))
    found = check_score(f"{tenths / 10:.1f}", problems, samples)
    assert found.possible == possible
    assert found.telling or possible


@pytest.mark.parametrize(
    ("printed", "problems", "samples", "possible"),
    [
        ("16.7", 30, 1, True),  # 5 / 30
        ("16.8", 30, 1, False),
        ("16.67", 30, 64, True),
        ("56.1", 30, 64, True),  # 1077 / 1920 = 56.09
        ("50.5", 30, 8, False),  # the grid is 0.4167 wide: 50.42, 50.83
        ("50.4", 30, 8, True),
        ("100", 30, 1, True),
        ("0.0%", 30, 1, True),
        ("58.1", 131, 8, True),
        ("0.05", 20, 100, True),
    ],
)
def test_known_protocols(printed, problems, samples, possible):
    assert check_score(printed, problems, samples).possible == possible


def test_says_what_would_have_been_possible_and_whether_the_check_can_fail():
    found = check_score("16.8", 30, 1)
    assert (found.telling, found.nearest) == (True, ("16.667", "20.000"))
    assert not check_score("16.8", 30, 64).telling
    assert check_score("100.0", 30, 1).nearest == ("100.000",)


@pytest.mark.parametrize("printed", ["", "n/a", "101", "-3", "56,1", "5.5.5", "1e1"])
def test_what_is_no_percentage_is_refused(printed):
    with pytest.raises(UnreadableScore, match="not a percentage"):
        check_score(printed, 30, 1)

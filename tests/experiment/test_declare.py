import pytest

from shared.experiment.declare import BadTest, claim, read_test
from shared.experiment.wording import contrast_text

TESTS = (
    "entropy_end: dapo - grpo > 0",
    "final_pass@1: ce_0.75_1 - ce_0.5_1 < 0.03",
    "entropy_mean: 0.5 a + 0.5 b - 0.5 c - 0.5 d > -0.05",
    "entropy_kept: grpo < 0.5",
)


@pytest.mark.parametrize("test", TESTS)
def test_what_is_read_is_what_is_printed(test):
    assert contrast_text(claim("id", "words", "study", test, 5)) == test


def test_parts_of_a_test():
    assert read_test("x: 0.5 a - 2 b.1 > 3") == ("x", {"a": 0.5, "b.1": -2.0}, "greater", 3.0)


@pytest.mark.parametrize("test", ["x: a - b", "x: a > b", "x: > 0", "a > 0", "x: a - a > 0"])
def test_unreadable_tests_are_refused_with_their_text(test):
    with pytest.raises(BadTest, match=test.replace("-", ".").replace(">", ".")):
        read_test(test)

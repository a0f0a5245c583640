"""docs/reliability.md says what the tests do."""

from tests.reliability.page import PAGE, page


def test_the_committed_table_is_that_of_the_tests():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.reliability.page writes it"

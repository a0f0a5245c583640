"""SIGKILL anywhere, again and again: what is left in the end is what an undisturbed run leaves, to the bit."""

import pytest

from tests.reliability.campaign import WAYS, kill_until, undisturbed
from tests.reliability.subjects import SUBJECTS

KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_run_killed_anywhere_ends_as_if_nothing_had_happened(tmp_path, name):
    reference = undisturbed(SUBJECTS[name], tmp_path / "whole")
    report = kill_until(SUBJECTS[name], tmp_path, reference, KILLS, seed=0)
    assert sum(report.kills.values()) >= KILLS
    assert set(report.kills) == set(WAYS), "every way to die was tried"

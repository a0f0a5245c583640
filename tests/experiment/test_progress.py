"""What a person sees, without waiting for it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shared.experiment.pool import Entry
from shared.experiment.progress import Bars, Estimate, Lines, display, duration
from shared.experiment.worker import BuildTask
from tests.experiment.toylab.experiment import EXPERIMENT

TASK = BuildTask(EXPERIMENT.artifacts[0], "proxy", "start-0")


def entry(key: str, group: str = "s", cost: float = 10.0, **state: Any) -> Entry:
    return Entry(key, group, TASK, cost, **state)


@pytest.mark.parametrize(("seconds", "text"), [(7.6, "8 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_declared_costs_come_first_and_short_runs_barely_move_them() -> None:
    entries = [entry("a", cost=0.5), entry("b", group="t", cost=100.0), entry("c", group="t", cost=100.0)]
    assert Estimate(entries, 1).seconds_left() == pytest.approx(200.5)
    entries[0].ending, entries[0].seconds = "done", 2.0  # four times slower, all of it start-up
    assert Estimate(entries, 1).seconds_left() == pytest.approx(200, rel=0.05)


def test_measured_runs_stand_for_their_study_and_set_the_pace_of_others() -> None:
    slow = [entry(f"a{i}", cost=600.0, ending="done", seconds=1200.0) for i in range(3)]
    entries = [*slow, entry("b", cost=600.0), entry("c", group="t", cost=1000.0)]
    assert Estimate(entries, 1).seconds_left() == pytest.approx(1200 + 2000, rel=0.05)
    assert Estimate(entries, 4).seconds_left() == pytest.approx(2000, rel=0.05)  # the longest run cannot be split


def test_a_running_run_tells_more_and_more_by_its_own_share() -> None:
    running = entry("a", started=time.monotonic() - 30, done=1, total=100)
    assert Estimate([running], 1).seconds_left() < 600  # 30 s for one per cent would make 50 minutes
    running.done = 50
    assert Estimate([running], 1).seconds_left() == pytest.approx(30, rel=0.2)


def test_lines_hold_no_control_characters() -> None:
    out = io.StringIO()
    entries = [entry("s/a seed 0"), entry("s/a seed 1")]
    with display(Console(file=out, width=40), entries, 1) as shown:
        assert isinstance(shown, Lines)
        shown.started(entries[0])
        shown.progressed(entries[0])
        entries[0].ending, entries[0].seconds = "done", 2.0
        shown.ended(entries[0])
        entries[1].ending, entries[1].error = "failed", "ValueError: a long story about [brackets] and colours"
        shown.ended(entries[1])
    assert out.getvalue().splitlines() == [
        "[start]  s/a seed 0",
        "[done]   s/a seed 0 in 2.0 s (1/2, about 2 s left)",
        "[failed] s/a seed 1: ValueError: a long story about [brackets] and colours (2/2)",
    ]


def test_bars_show_running_arms_and_the_time_left(tmp_path: Path) -> None:
    out = io.StringIO()
    entries = [entry("s/a seed 0"), entry("s/a seed 1"), entry("t/b seed 0", group="t")]
    with display(Console(file=out, width=100, force_terminal=True), entries, 2) as shown:
        assert isinstance(shown, Bars)
        entries[0].ending, entries[0].seconds = "done", 2.0
        shown.ended(entries[0])
        entries[1].started, entries[1].done, entries[1].total = time.monotonic() - 1, 42, 100
        shown.progressed(entries[1])
        shown.note("a note")
    said = out.getvalue()
    assert "a seed 1 42%" in said
    assert "about" in said
    assert "a note" in said

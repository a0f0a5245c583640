"""Schedules against closed forms."""

import math

import pytest

from shared.training.schedules import constant, cosine, linear, wsd

SCHEDULES = {
    "constant": lambda step: constant(step, 10),
    "linear": lambda step: linear(step, 10, 101, 0.1),
    "cosine": lambda step: cosine(step, 10, 101, 0.1),
    "wsd": lambda step: wsd(step, 10, 40, 101, 0.1),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_warm_up_rises_to_the_peak(schedule):
    assert [schedule(step) for step in range(11)] == pytest.approx([(s + 1) / 10 for s in range(10)] + [1.0])


@pytest.mark.parametrize(("name", "final"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1), ("wsd", 0.1)])
def test_the_last_step_reaches_the_floor(name, final):
    assert SCHEDULES[name](100) == pytest.approx(final)


def test_middle_points():
    assert linear(55, 10, 101, 0.1) == pytest.approx(0.55)
    assert cosine(55, 10, 101, 0.1) == pytest.approx(0.55)
    assert cosine(40, 10, 101, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert [wsd(step, 10, 40, 101, 0.1) for step in (60, 80, 100)] == pytest.approx([1.0, 0.55, 0.1])
    assert [wsd(step, 10, 40, 100, 0.0) for step in (59, 60)] == pytest.approx([1.0, 0.975])


def test_without_warm_up_training_starts_at_the_peak():
    assert constant(0, 0) == linear(0, 0, 10, 0.1) == cosine(0, 0, 10, 0.1) == 1.0
    assert linear(0, 0, 1, 0.1) == 1.0

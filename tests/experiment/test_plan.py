"""Which runs a command means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.experiment.contracts import Experiment
from shared.experiment.overrides import UnknownName
from shared.experiment.plan import NothingToRun, Selection, arm_config, plan
from tests.experiment.toylab.experiment import COLD, EXPERIMENT, WARM


def names(scale: str = "proxy", experiment: Experiment = EXPERIMENT, **chosen: object) -> list[str]:
    return [job.name for job in plan(experiment, scale, Selection(**chosen))]  # pyright: ignore[reportArgumentType]


def test_the_default_is_the_headline_set() -> None:
    assert names() == ["cold/slow seed 0", "cold/fast seed 0", "cold/slow seed 1", "cold/fast seed 1"]


def test_the_whole_grid() -> None:
    assert len(names(whole_grid=True)) == 11


def test_naming_a_study_without_headline_runs_its_grid() -> None:
    assert names(studies=("warm",)) == ["warm/plain seed 0"]


def test_arms_and_seeds_come_from_the_whole_grid_and_beyond() -> None:
    assert names(arms=("fast",), seeds=(4, 100)) == ["cold/fast seed 4", "cold/fast seed 100"]


def test_other_scales_have_their_own_grid_and_overrides() -> None:
    assert names("smoke") == ["cold/slow seed 0", "cold/fast seed 0"]
    assert arm_config(COLD, "fast", "smoke") == replace(COLD.arms["fast"], steps=4)


def test_overrides_reach_every_config() -> None:
    jobs = plan(EXPERIMENT, "proxy", Selection(overrides={"noise.scale": "0.5", "steps": "7"}))
    assert {(job.config.steps, job.config.noise.scale) for job in jobs} == {(7, 0.5)}


def test_headline_claims_come_first_then_long_studies() -> None:
    assert names(whole_grid=True)[0] == "warm/plain seed 0"
    headline = replace(EXPERIMENT.claims[0], headline=True)
    assert names(experiment=replace(EXPERIMENT, claims=(headline,)), whole_grid=True)[-1] == "warm/plain seed 0"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"studies": ("cald",)}, "Unknown study 'cald': did you mean 'cold'"),
        ({"arms": ("slov",)}, "Unknown arm 'slov': did you mean 'slow'"),
        ({"studies": ("cold",), "arms": ("plain",)}, "Unknown arm 'plain'"),
        ({"overrides": {"stepz": "1"}}, "Study cold, arm slow: Unknown field 'stepz': did you mean 'steps'"),
    ],
)
def test_unknown_names_are_answered_with_the_closest(chosen: dict[str, object], message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        names(**chosen)


def test_unknown_scale() -> None:
    with pytest.raises(UnknownName, match="did you mean 'proxy'"):
        names("proxi")


def test_an_empty_selection_says_what_to_add() -> None:
    with pytest.raises(NothingToRun, match=r"--study \(warm\)"):
        names(arms=("plain",))
    with pytest.raises(NothingToRun, match="add --all"):
        names(experiment=replace(EXPERIMENT, studies=(WARM,), claims=()))

"""Which studies and models may be spread, and how that is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from shared.experiment.contracts import Artifact, Experiment
from shared.experiment.layouts import LayoutNotFollowed, check_layout
from shared.experiment.plan import Selection, plan
from shared.megatron.config import ModelConfig
from shared.megatron.layout import ImpossibleLayout, Layout
from tests.experiment.toylab.spread import ADD, EXPERIMENT, MODEL, Adding


@dataclass(frozen=True)
class Long:
    model: ModelConfig = MODEL
    sequence_length: int = 6


def build(config: Any, directory: Any) -> None: ...


def check(layout: Layout, experiment: Experiment = EXPERIMENT, *studies: str) -> None:
    check_layout(experiment, plan(experiment, "proxy", Selection(True, studies or ("add",))), "proxy", layout)


def with_study(**changes: Any) -> Experiment:
    return replace(EXPERIMENT, studies=(replace(ADD, **changes),))


def test_one_process_fits_everything_and_named_fields_fit_their_study() -> None:
    check(Layout(), EXPERIMENT, "add", "alone")
    check(Layout(tp=2, dp=3))


def test_a_study_that_cannot_follow_is_refused_with_one_that_can() -> None:
    sentence = r"Study alone cannot follow --tp: its runs are one process each.*--study: add \(tp, dp\)"
    with pytest.raises(LayoutNotFollowed, match=sentence):
        check(Layout(tp=2), EXPERIMENT, "add", "alone")
    with pytest.raises(
        LayoutNotFollowed, match="Study add cannot follow --sequence-parallel, --recompute: it follows tp"
    ):
        check(Layout(tp=2, sequence_parallel=True, recompute="full"))
    with pytest.raises(LayoutNotFollowed, match=r"Leave that out\.$"):
        check(Layout(dp=2), with_study(parallel=()))


def test_models_of_runs_and_of_their_artifacts_are_checked() -> None:
    with pytest.raises(ImpossibleLayout, match="num_attention_heads=4 is not a multiple of tp=3"):
        check(Layout(tp=3))
    wide = Artifact("wide", build, Adding(), overrides={"proxy": {"model": replace(MODEL, num_attention_heads=8)}})
    narrow = Artifact("narrow", build, Adding(model=replace(MODEL, num_attention_heads=2, num_query_groups=2)))
    study = with_study(arms={"plain": None}, artifacts=("wide",), parallel=("tp",))
    check(Layout(tp=4), replace(study, artifacts=(wide, narrow)))
    study = with_study(arms={"plain": None}, artifacts=("narrow",), parallel=("tp",))
    with pytest.raises(ImpossibleLayout, match="num_attention_heads=2"):
        check(Layout(tp=4), replace(study, artifacts=(wide, narrow)))


def test_a_sequence_length_beside_the_model_is_checked_too() -> None:
    experiment = with_study(arms={"plain": Long()}, parallel=("cp", "pp", "virtual_pp"))
    with pytest.raises(ImpossibleLayout, match="sequence_length=6 is not a multiple of 2 \\* cp = 4"):
        check(Layout(cp=2), experiment)
    with pytest.raises(ImpossibleLayout, match="num_layers=2"):
        check(Layout(pp=2, virtual_pp=2), experiment)
    check(Layout(pp=2), experiment)

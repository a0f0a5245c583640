"""Canaries: a moved value is named, an unmoved one keeps its bytes, and stale records are told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from shared.experiment import canary
from shared.experiment import promote as promotion
from shared.experiment.contracts import Artifact, Experiment, Grid, Interrupted, Study
from shared.experiment.promote import promote
from shared.experiment.results import Results
from tests.experiment.fake_records import clear_difference, toy_experiment, write_runs


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float
    steps: int = 1000


def train(context):
    value = float((context.artifact("start") / "start").read_text())
    for step in range(context.config.steps):
        value *= 1 - context.config.rate
        context.log(step, loss=value, seed=context.seed)
        if context.stop_requested():
            raise Interrupted("stopped")
    return {"loss": value}


def write_start(config, directory):
    (directory / "start").write_text(str(config.rate))


START = Artifact("start", write_start, Config(9.0), {"smoke": {"rate": 1.0}})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))


def experiment(rate=0.1, **scales):
    grids = {"smoke": Grid((7, 8), overrides={"steps": 30})} | scales
    arms = {"a": Config(rate), "b": Config(0.5)}
    study = Study("main", "?", arms, train, grids, artifacts=("start",), canary="a")
    return Experiment("toy", (START,), (study, dataclasses.replace(study, name="unwatched", canary=None)), ())


def test_the_first_twenty_steps_are_recorded_one_a_line(tmp_path):
    path = canary.record(experiment(), tmp_path)
    entries = json.loads(path.read_text())
    assert list(entries) == ["main"]
    assert [row["step"] for row in entries["main"]["rows"]] == list(range(20))
    assert entries["main"]["rows"][0] == {"step": 0, "loss": 0.9, "seed": 7}
    assert len(path.read_text().splitlines()) == 24


def test_equal_code_passes_and_rounding_passes(tmp_path):
    canary.record(experiment(), tmp_path)
    assert canary.check(experiment(), tmp_path) == []
    assert canary.check(experiment(0.1 + 1e-7), tmp_path) == []


def test_a_moved_value_is_named_with_step_and_both_values(tmp_path):
    canary.record(experiment(), tmp_path)
    (sentence,) = canary.check(experiment(0.1001), tmp_path)
    assert sentence == "toy main: step 0: loss was 0.9, is 0.8999"
    (sentence,) = canary.check(experiment(0.10005), tmp_path)
    assert sentence.startswith("toy main: step 1: loss was 0.81, is 0.8099")


def test_metrics_and_steps_that_come_or_go_are_named():
    rows = [{"step": 0, "x": 1.0}]
    assert "metrics y came or went" in canary.first_difference(rows, [{"step": 0, "x": 1.0, "y": 2.0}])
    assert "1 steps were recorded, 0 came back" in canary.first_difference(rows, [])


def test_a_grid_of_its_own_comes_before_smoke_and_short_runs_end(tmp_path):
    short = experiment(canary=Grid((3,), overrides={"steps": 4}))
    rows = json.loads(canary.record(short, tmp_path).read_text())["main"]["rows"]
    assert (len(rows), rows[0]["seed"]) == (4, 3)


def test_a_missing_record_says_how_to_make_it(tmp_path):
    with pytest.raises(canary.CanaryMissing, match="papers canary record toy"):
        canary.check(experiment(), tmp_path)


def test_recording_again_keeps_what_did_not_move(tmp_path):
    before = canary.record(experiment(), tmp_path).read_bytes()
    assert canary.record(experiment(0.1 + 1e-8), tmp_path).read_bytes() == before


def test_a_canary_moved_on_purpose_makes_committed_records_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(promotion, "in_history", lambda commit, root: True)
    monkeypatch.setattr(canary, "_head", lambda root: "abc1234")
    records = toy_experiment(seeds=(0, 1, 2, 3, 4))
    write_runs(tmp_path / "runs", records, clear_difference)
    promote(records, root=tmp_path)
    canary.record(experiment(), tmp_path)

    def stale():
        return canary.stale_studies(Results.committed("toy", "proxy", tmp_path), tmp_path)

    assert stale() == {}
    canary.record(experiment(0.2), tmp_path)
    assert stale() == {"main": "abc1234"}
    (tmp_path / "runs").rename(tmp_path / "old")
    write_runs(tmp_path / "runs", records, clear_difference, code_hash="newer")
    promote(records, root=tmp_path)
    assert stale() == {}

"""`papers check` on sound, edited and outdated results; and every committed result of this repository."""

from __future__ import annotations

import dataclasses

import pytest

from shared.experiment import catalog, check
from shared.experiment import promote as promotion
from shared.experiment.claims import claims_json, evaluate_all
from shared.experiment.contracts import Grid
from shared.experiment.promote import promote
from shared.experiment.results import Results
from tests.experiment.fake_records import clear_difference, toy_claim, toy_experiment, write_runs

EXPERIMENT = toy_experiment(seeds=(0, 1, 2, 3, 4))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setattr(promotion, "in_history", lambda commit, root: True)
    write_runs(tmp_path / "runs", EXPERIMENT, clear_difference)
    promote(EXPERIMENT, root=tmp_path)
    judged = evaluate_all(EXPERIMENT, Results.committed("toy", "proxy", tmp_path))
    (tmp_path / "results/toy/proxy/claims.json").write_text(claims_json(judged))
    return tmp_path


def test_sound_results_raise_no_doubt(clone):
    assert list(check.problems(EXPERIMENT, clone)) == []


def test_a_claim_fixed_after_the_runs_is_named(clone):
    loosened = toy_experiment(toy_claim(threshold=-1.0), seeds=(0, 1, 2, 3, 4))
    late, *others = check.problems(loosened, clone)
    assert late == "claim b-above-a was fixed after b seed 0 of study main began"
    assert all("fixed after a" in text or "is not what the records say" in text for text in others)


def test_an_edited_verdict_is_named(clone):
    path = clone / "results/toy/proxy/claims.json"
    path.write_text(path.read_text().replace("reproduced", "contradicted"))
    assert [text for text in check.problems(EXPERIMENT, clone) if "is not what the records say" in text]


def test_an_edited_curve_is_named(clone):
    path = clone / "results/toy/proxy/main/a/curves.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-1])
    assert [text for text in check.problems(EXPERIMENT, clone) if "main/a/curves" in text]


def test_a_config_that_changed_since_and_an_arm_that_went_are_named(clone):
    (study,) = EXPERIMENT.studies
    changed = dataclasses.replace(study, arms={"a": {"arm": "a2"}, "b": study.arms["b"]})
    (text,) = check.problems(dataclasses.replace(EXPERIMENT, studies=(changed,)), clone)
    assert "main/a ran with another config" in text
    narrowed = dataclasses.replace(study, scales={"proxy": Grid((0, 1, 2, 3, 4), arms=("b",))})
    (text,) = check.problems(dataclasses.replace(EXPERIMENT, studies=(narrowed,)), clone)
    assert "main/a belongs to no declared arm" in text


def test_a_study_without_its_canary_is_named(clone):
    watched = dataclasses.replace(EXPERIMENT.studies[0], canary="a")
    (text,) = check.problems(dataclasses.replace(EXPERIMENT, studies=(watched,)), clone)
    assert "papers canary record toy" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "paper", [name for name in catalog.experiments() if (catalog.ROOT / "results" / name).exists()]
)
def test_committed_results_were_planned_and_are_sound(paper):
    assert list(check.problems(catalog.experiment(paper))) == []

"""Verdicts from records: which seeds count, what may decide, and how fresh runs compare with committed ones."""

from __future__ import annotations

import dataclasses
import json

import pytest

from shared.experiment.claims import (
    ClaimError,
    ClaimResult,
    claims_hash,
    claims_json,
    compare,
    evaluate_all,
    judged_seeds,
    validate,
)
from shared.experiment.results import Results
from tests.experiment.fake_records import clear_difference, toy_claim, toy_experiment, write_run, write_runs


def judge(runs, experiment):
    return evaluate_all(experiment, Results(runs, experiment.paper, "proxy"))[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "reproduced"),
        ({"threshold": 0.6}, "contradicted"),
        ({"threshold": 0.51}, "unresolved"),
        ({"side": "less"}, "contradicted"),
        ({"contrast": {"b": -1.0, "a": 1.0}}, "contradicted"),
    ],
)
def test_verdict_follows_threshold_and_side(tmp_path, changes, expected):
    experiment = toy_experiment(toy_claim(**changes))
    write_runs(tmp_path, experiment, clear_difference)
    assert judge(tmp_path, experiment).verdict == expected


def test_arms_are_paired_by_seed(tmp_path):
    experiment = toy_experiment()
    write_runs(tmp_path, experiment, clear_difference)
    result = judge(tmp_path, experiment)
    # Seeds move both arms by whole numbers; only pairing makes an interval this narrow.
    assert result.effect == pytest.approx(0.504)
    assert result.high - result.low < 0.06
    assert result.values["2"] == pytest.approx(0.53)


def test_missing_runs_leave_a_provisional_interval(tmp_path):
    experiment = toy_experiment(toy_claim(n=6), seeds=tuple(range(6)))
    write_runs(tmp_path, experiment, clear_difference)
    result = judge(tmp_path, experiment)
    assert (result.verdict, result.n_seeds, result.reason) == ("unresolved", 5, "5 of 6 seeds so far")
    assert result.low > 0


def test_no_runs_and_no_common_seed(tmp_path):
    experiment = toy_experiment()
    assert judge(tmp_path, experiment).reason == "no runs of b, a"
    write_run(tmp_path, experiment, "a", 0, {"score": 1.0})
    write_run(tmp_path, experiment, "b", 1, {"score": 1.0})
    assert judge(tmp_path, experiment).reason == "no seed has every arm"


def test_selection_seeds_and_undeclared_seeds_never_judge(tmp_path):
    experiment = toy_experiment(toy_claim(n=5), seeds=(0, 100, 1, 2, 3, 4))
    assert judged_seeds(experiment.studies[0], experiment.claims[0], "proxy") == (0, 1, 2, 3, 4)
    write_runs(tmp_path, experiment, clear_difference)
    before = judge(tmp_path, experiment)
    for seed in (100, 7):
        write_run(tmp_path, experiment, "a", seed, {"score": 0.0})
        write_run(tmp_path, experiment, "b", seed, {"score": -1000.0})
    assert judge(tmp_path, experiment) == before


def test_only_the_planned_number_of_seeds_judges(tmp_path):
    experiment = toy_experiment(toy_claim(n=5), seeds=tuple(range(8)))
    write_runs(tmp_path, experiment, clear_difference, range(8))
    assert list(judge(tmp_path, experiment).values) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("value", [None, "high"])
def test_a_metric_that_is_no_number_is_named(tmp_path, value):
    experiment = toy_experiment()
    write_runs(tmp_path, experiment, lambda arm, seed: value if (arm, seed) == ("a", 3) else 1.0)
    result = judge(tmp_path, experiment)
    assert (result.verdict, result.effect) == ("unresolved", None)
    assert result.reason == f"a seed 3: score is {value}"


def test_a_test_changed_after_the_runs_does_not_resolve(tmp_path):
    write_runs(tmp_path, toy_experiment(), clear_difference)
    loosened = toy_experiment(toy_claim(threshold=-1.0))
    result = judge(tmp_path, loosened)
    assert (result.verdict, result.reason) == ("unresolved", "b seed 0 began before this test was fixed")
    reworded = toy_experiment(toy_claim(statement="b beats a", strength="may", paper_value="+0.4"))
    assert judge(tmp_path, reworded).verdict == "reproduced"


@pytest.mark.parametrize("change", [{"n": 6}, {"threshold": 0.1}, {"side": "less"}, {"metric": "x"}, {"unit": "item"}])
def test_every_part_of_the_test_is_hashed(change):
    assert claims_hash(toy_experiment()) != claims_hash(toy_experiment(toy_claim(**change)))


def test_items_are_averaged_over_seeds_and_points_are_not(tmp_path):
    def score(arm, seed):
        return [(index % 3) + seed + (0.4 if arm == "b" else 0.0) * (1 + index / 40) for index in range(40)]

    item, point = (toy_experiment(toy_claim(unit=unit)) for unit in ("item", "point"))
    write_runs(tmp_path / "item", item, score)
    write_runs(tmp_path / "point", point, score)
    by_item, by_point = judge(tmp_path / "item", item), judge(tmp_path / "point", point)
    assert (len(by_item.values), len(by_point.values)) == (40, 200)
    assert by_item.effect == pytest.approx(by_point.effect)
    assert by_point.high - by_point.low < by_item.high - by_item.low
    assert by_item.verdict == "reproduced"


def test_lists_of_different_length_are_named(tmp_path):
    experiment = toy_experiment(toy_claim(unit="point"))
    write_runs(tmp_path, experiment, lambda arm, seed: [1.0] * (30 if arm == "a" else 31))
    assert judge(tmp_path, experiment).reason.startswith("a seed 0: score is not a list as long")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": "mane"}, "choose one of main"),
        ({"contrast": {"c": 1.0}}, "choose one of a, b"),
        ({"n": 4}, "could never resolve"),
        ({"n": 6}, "declares 5 below 100"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(change, message):
    with pytest.raises(ClaimError, match=message):
        validate(toy_experiment(toy_claim(**change)))
    with pytest.raises(ClaimError, match="twice"):
        validate(toy_experiment(toy_claim(), toy_claim()))


def test_claims_json_holds_what_design_lists(tmp_path):
    experiment = toy_experiment()
    write_runs(tmp_path, experiment, clear_difference)
    (entry,) = json.loads(claims_json([judge(tmp_path, experiment)]))
    assert entry["ci95"] == pytest.approx([0.478, 0.530], abs=1e-3)
    assert {key: entry[key] for key in ("id", "strength", "metric", "effect", "n_seeds", "verdict", "paper_value")} == {
        "id": "b-above-a",
        "strength": "must",
        "metric": "score",
        "effect": 0.504,
        "n_seeds": 5,
        "verdict": "reproduced",
        "paper_value": "+0.5",
    }


def result(effect, low, high, **values):
    return ClaimResult(toy_claim(), effect, low, high, 5, "unresolved", "", values or {"0": effect})


COMMITTED = result(0.5, 0.3, 0.7, **{"0": 0.4, "1": 0.6})


@pytest.mark.parametrize(
    ("fresh", "expected"),
    [
        (result(0.4, None, None, **{"0": 0.4}), "identical"),
        (result(0.4, None, None, **{"0": 0.4 + 1e-9}), "OK"),
        (result(0.4, None, None, **{"7": 0.4}), "OK"),
        (result(0.8, 0.6, 1.0), "OK"),
        (result(-0.1, -0.6, 0.4), "drifted"),
        (result(0.1, 0.0, 0.2), "FAIL"),
        (result(0.9, 0.8, 1.0), "FAIL"),
        (result(0.9, None, None), "-"),
        (result(None, None, None), "-"),
    ],
)
def test_fresh_against_committed(fresh, expected):
    assert compare(fresh, COMMITTED) == expected


def test_nothing_committed_compares_with_nothing():
    assert compare(COMMITTED, dataclasses.replace(COMMITTED, effect=None, low=None, high=None)) == "-"

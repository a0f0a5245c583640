"""One reader for fresh records: what is complete is read, what is missing or damaged is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.experiment.records import RecordDamaged
from shared.experiment.results import MissingRecords, Results, from_columns, to_columns
from tests.experiment.fake_records import clear_difference, toy_experiment, write_run, write_runs


@pytest.fixture
def runs(tmp_path):
    write_runs(tmp_path, toy_experiment(), clear_difference)
    return tmp_path


def test_everything_written_is_read_back(runs):
    results = Results(runs, "toy", "proxy")
    assert results.studies() == ("main",)
    assert results.arms("main") == ("a", "b")
    assert results.seeds("main", "b") == (0, 1, 2, 3, 4)
    assert results.summaries("main")["b"][2] == {"score": clear_difference("b", 2)}
    assert results.curves("main", "a")[1][3] == {"step": 3, "score": 1 + 3 / 7}
    assert results.config("main", "a") == {"arm": "a"}
    assert results.provenance("main", "a")[4]["commit"] == "c0ffee"
    assert results.cost("main", "a")[0]["attempts"] == 1


def test_a_run_without_summary_does_not_count(runs):
    (runs / "toy/proxy/main/a/seed3/summary.json").unlink()
    assert Results(runs, "toy", "proxy").seeds("main", "a") == (0, 1, 2, 4)


def test_seeds_are_ordered_as_numbers(runs):
    write_run(runs, toy_experiment(), "a", 10, {"score": 1.0})
    assert Results(runs, "toy", "proxy").seeds("main", "a") == (0, 1, 2, 3, 4, 10)


def test_what_is_not_there_is_named(runs):
    results = Results(runs, "toy", "proxy")
    with pytest.raises(MissingRecords, match="arm c of study main"):
        results.curves("main", "c")
    with pytest.raises(MissingRecords, match="study other"):
        results.summaries("other")
    assert Results(runs, "absent", "proxy").studies() == ()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("metrics.jsonl", lambda results: results.curves("main", "a")),
        ("provenance.json", lambda results: results.provenance("main", "a")),
        ("config.json", lambda results: results.config("main", "a")),
        ("summary.json", lambda results: results.summaries("main")),
    ],
)
def test_a_truncated_file_is_named(runs, name, read):
    path = runs / "toy/proxy/main/a/seed0" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RecordDamaged, match=f"seed0/{name}"):
        read(Results(runs, "toy", "proxy"))


def test_damage_of_one_arm_does_not_hide_the_others(runs):
    (runs / "toy/proxy/main/a/seed0/metrics.jsonl").unlink()
    results = Results(runs, "toy", "proxy")
    assert results.curves("main", "b")[0][0] == {"step": 0, "score": 0.0}
    with pytest.raises(RecordDamaged, match=r"a/seed0/metrics\.jsonl"):
        results.curves("main", "a")


ROWS = st.lists(st.dictionaries(st.sampled_from(["x", "y", "z"]), st.floats(allow_nan=False)), max_size=8)


@given(ROWS)
def test_columns_keep_rows_with_gaps(rows):
    rows = [{"step": step} | row for step, row in enumerate(rows)]
    assert from_columns(to_columns(rows)) == rows

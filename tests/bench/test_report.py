"""The committed tables are the committed JSON, and the JSON is what its rounds say."""

from __future__ import annotations

import json

import pytest

from bench import report
from bench.__main__ import ROUNDS
from bench.measure import ratios
from bench.shapes import TRAINING
from bench.training import OURS, TOLERANCE, rounded


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    return {name: json.loads((report.RESULTS / f"{name}.json").read_text()) for name in ROUNDS}


def test_the_readme_shows_the_results() -> None:
    text = report.README.read_text()
    assert report.readme(text) == text
    assert "Not measured yet" not in text


def test_results_have_all_rounds_and_say_where_they_ran(results: dict[str, dict]) -> None:
    for name, result in results.items():
        assert result["repetitions"] == ROUNDS[name]
        assert set(result["load_average"]) == {"before", "after"}
        assert result["machine"]["processor"]
        assert len(result["machine"]["commit"]) == 40


def test_ratios_and_targets_follow_from_the_rounds(results: dict[str, dict]) -> None:
    entries = results["training"]["entries"]
    assert [(e["shape"], e["target"]) for e in entries] == [(s.name, s.target) for s in TRAINING]
    for entry in entries:
        rows = entry["rows"]
        losses = [row["loss"] for row in rows.values()]
        assert max(losses) - min(losses) <= TOLERANCE
        for name in OURS:
            for peer, ratio in rows[name]["ratio"].items():
                again = rounded(ratios(rows[name]["cpu_s"], rows[peer]["cpu_s"]))
                assert again == pytest.approx(ratio, abs=2e-3)
        assert entry["met"] is all(r["median"] >= entry["target"] for r in rows["assay"]["ratio"].values())


def test_a_missing_result_is_said(tmp_path) -> None:
    text = report.readme("<!-- assay:table resume -->\nold\n<!-- /assay -->\n", tmp_path)
    assert "*Not measured yet.*" in text

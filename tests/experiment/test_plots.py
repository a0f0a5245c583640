"""Figures: the same records give the same bytes, bands are right, labels stay apart, nothing missing is drawn over."""

from __future__ import annotations

import builtins
import dataclasses
import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shared.experiment import plots
from shared.experiment.claims import ClaimResult
from shared.experiment.results import MissingRecords, Results
from shared.experiment.statistics import paired_t
from tests.experiment.fake_records import clear_difference, toy_claim, toy_experiment, write_run, write_runs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    experiment = toy_experiment()
    write_runs(runs, experiment, clear_difference)
    write_run(runs, experiment, "a", 100, {"score": 9.0}, rows=[{"step": 0, "score": 1e9}])
    return Results(runs, "toy", "proxy")


JUDGED = ClaimResult(toy_claim(), 0.5, 0.3, 0.7, 5, "reproduced")


def test_the_same_records_give_the_same_svg_and_png(results):
    first, again = (plots.curves(results, "main", {"score": "score"}) for _ in range(2))
    assert plots.svg(first) == plots.svg(again)
    assert plots.png(first) == plots.png(again)
    assert b"<dc:date>" not in plots.svg(first)
    assert Image.open(io.BytesIO(plots.png(first))).text == {}


def test_the_band_is_the_t_interval_over_judged_seeds(results):
    xs, means, halves = plots.band(results.curves("main", "a"), "score", "step")
    expected = paired_t([seed + 2 / 7 for seed in range(5)])
    assert xs == [0, 1, 2, 3]
    assert means[2] == pytest.approx(expected.effect)
    assert halves[2] == pytest.approx(expected.high - expected.effect)


def test_a_metric_that_was_never_logged_is_named(results):
    with pytest.raises(MissingRecords, match="never logged entropy"):
        plots.curves(results, "main", {"entropy": "entropy"})
    with pytest.raises(MissingRecords, match="arm c"):
        plots.curves(results, "main", {"score": "score"}, {"c": "C"})


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.floats(0.01, 1))
def test_labels_keep_their_order_and_distance(places, gap):
    spread = plots._spread(sorted(places), gap)
    assert len(spread) == len(places)
    assert all(above - below >= gap * (1 - 1e-9) for below, above in itertools.pairwise(spread))


def test_labels_that_have_room_stay_where_they_are():
    assert plots._spread([0.0, 0.5, 1.0], 0.1) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(("side", "right"), [("greater", True), ("less", False)])
def test_the_forest_shows_the_claimed_side_to_the_right(side, right):
    result = dataclasses.replace(JUDGED, claim=toy_claim(side=side))
    unrun = ClaimResult(toy_claim(id="unrun"), None, None, None, 0, "unresolved", "no runs of a")
    (axis,) = plots.forest([result, unrun]).axes
    (marker,) = [line for line in axis.lines if line.get_marker() == "o"]
    assert (marker.get_xdata()[0] > 0) == right
    texts = [text.get_text() for text in axis.texts]
    assert "no runs of a" in texts
    assert "0.500  [0.300, 0.700]  n=5" in texts


def test_a_heatmap_is_symmetric_about_its_centre():
    _, (axis,) = plots.figure()
    plots.heatmap(axis, [[1.0, None], [3.0, 1.5]], ["r", "s"], ["t", "u"], centre=1.0)
    assert axis.images[0].get_clim() == (-1.0, 3.0)
    assert [text.get_text() for text in axis.texts] == ["1.00", "", "3.00", "1.50"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    def refuse(name, *arguments, **keywords):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(plots.PlotsMissing, match=r"pip install -e '\.\[plots\]'"):
        plots.figure()

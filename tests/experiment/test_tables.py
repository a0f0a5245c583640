"""Generated text: same records, same bytes; every hand-made difference is found; what is not there yet says so."""

from __future__ import annotations

import json
import sys

import pytest

import papers
from shared.experiment import catalog
from shared.experiment import promote as promotion
from shared.experiment.markdown import BadBlock, fill, table
from shared.experiment.promote import promote
from shared.experiment.tables import differing, generate, tables
from tests.experiment.fake_records import clear_difference, write_runs

INIT = """
from shared.experiment.contracts import Card
CARD = Card("toy", "A toy", "2501.00001", ("b beats a",), ("proxy",), {"headline": 10, "grid": 1200})
"""
EXPERIMENT = """
import dataclasses
from shared.experiment.plots import curves
from tests.experiment.fake_records import toy_claim, toy_experiment

EXPERIMENT = dataclasses.replace(
    toy_experiment(toy_claim(), toy_claim(id="bar", statement="a | b", threshold=0.6), seeds=(0, 1, 2, 3, 4)),
    tables={"seeds": lambda results: str(results.seeds("main", "a")), "late": lambda results: results.arms("later")},
    figures={"scores": lambda results: curves(results, "main", {"score": "score"}), "late": lambda r: r.arms("later")},
)
"""
README = """# toy
<!-- assay:table claims -->
<!-- /assay -->
<!-- assay:table seeds -->
old
<!-- /assay -->
<!-- assay:table cost -->
<!-- /assay -->
<!-- assay:table late -->
<!-- /assay -->
<!-- assay:figure scores -->
<!-- /assay -->
<!-- assay:figure late -->
<!-- /assay -->
The end.
"""
ROOT_README = """<!-- assay:table board -->
<!-- /assay -->
<!-- assay:figure toy/claims -->
<!-- /assay -->
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with one paper whose README has blocks, and no committed results yet."""
    monkeypatch.setattr(catalog, "ROOT", tmp_path)
    monkeypatch.setattr(papers, "__path__", [str(tmp_path / "papers")])
    monkeypatch.setattr(promotion, "in_history", lambda commit, root: True)
    texts = {"__init__.py": INIT, "experiment.py": EXPERIMENT, "README.md": README}
    (tmp_path / "papers/toy").mkdir(parents=True)
    for name, text in texts.items():
        (tmp_path / "papers/toy" / name).write_text(text)
    (tmp_path / "README.md").write_text(ROOT_README)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("papers.toy")]:
        del sys.modules[name]


@pytest.fixture
def promoted(clone):
    experiment = catalog.experiment("toy")
    write_runs(clone / "runs", experiment, clear_difference)
    assert promote(experiment, root=clone).refused == {}
    tables(root=clone)
    return clone


def test_everything_is_written_from_the_records(promoted):
    readme = (promoted / "papers/toy/README.md").read_text()
    assert "| **b-above-a** (must): b scores higher than a | `score: b - a > 0` | +0.5 | 0.504 |" in readme
    assert "| [0.478, 0.530] | 5 | **reproduced** |" in readme
    assert r"a \| b" in readme
    assert "**contradicted**" in readme
    assert "(0, 1, 2, 3, 4)" in readme
    assert "\nold\n" not in readme
    assert "| main | 2 | 10 |" in readme
    assert "![scores](../../results/toy/proxy/figures/scores.svg)" in readme
    assert readme.count("*Not yet: no complete record of study later in results/toy/proxy") == 2
    assert readme.endswith("The end.\n")
    root = (promoted / "README.md").read_text()
    assert "![claims](results/toy/proxy/figures/claims.svg)" in root
    assert (
        "| [toy](papers/toy) A toy | [2501.00001](https://arxiv.org/abs/2501.00001) | 1 + 0 | 1 + 0 | 0 + 0 |" in root
    )
    assert "headline 10, grid 1,200" in root
    assert "## [toy](toy)" in (promoted / "papers/README.md").read_text()
    verdicts = [entry["verdict"] for entry in json.loads((promoted / "results/toy/proxy/claims.json").read_text())]
    assert verdicts == ["reproduced", "contradicted"]
    assert (promoted / "results/toy/proxy/figures/scores.png").exists()


def test_a_second_time_nothing_changes(promoted, capsys):
    files = {path: path.read_bytes() for path in promoted.rglob("*.*") if path.is_file()}
    capsys.readouterr()
    assert tables(root=promoted)
    assert tables(check=True, root=promoted)
    assert "generated files are current" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    "name",
    [
        "papers/README.md",
        "papers/toy/README.md",
        "README.md",
        "results/toy/proxy/claims.json",
        "results/toy/proxy/figures/claims.svg",
    ],
)
def test_a_number_changed_by_hand_is_found(promoted, capsys, name):
    path = promoted / name
    text = path.read_text().replace("0.504", "0.604", 1).replace("| 1 + 0 | 1 + 0 |", "| 2 + 0 | 0 + 0 |")
    path.write_text(text.replace("<svg", "<svg data-edited='yes'"))
    assert not tables(check=True, root=promoted)
    assert f"differs: {name}" in capsys.readouterr().out
    assert differing(generate(promoted), promoted) == [path]


def test_a_png_counts_by_existence_and_leftovers_are_removed(promoted):
    folder = promoted / "results/toy/proxy/figures"
    (folder / "scores.png").write_bytes(b"other rasteriser")
    assert tables(check=True, root=promoted)
    (folder / "scores.png").unlink()
    (folder / "gone.svg").write_text("figure that was renamed")
    assert not tables(check=True, root=promoted)
    tables(root=promoted)
    assert not (folder / "gone.svg").exists()
    assert (folder / "scores.png").exists()


def test_without_results_the_blocks_say_what_to_do(clone):
    tables(root=clone)
    readme = (clone / "papers/toy/README.md").read_text()
    assert readme.count("*No committed results yet: `python -m papers run toy --all`, then promote.*") == 6
    assert "no runs of b, a" in (clone / "papers/README.md").read_text()
    assert not (clone / "results").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- assay:table typo -->\n<!-- /assay -->",
            "no table typo: choose one of claims, cost, late, main-claims, seeds",
        ),
        ("<!-- assay:figure typo -->\n<!-- /assay -->", "no figure typo: choose one of claims, late, scores"),
        ("<!-- assay:table claims -->\nno end", "needs its <!-- /assay -->"),
    ],
)
def test_a_wrong_marker_is_named(clone, text, message):
    (clone / "papers/toy/README.md").write_text(text)
    with pytest.raises(BadBlock, match=message):
        generate(clone)


def test_the_root_readme_must_say_which_paper(clone):
    (clone / "README.md").write_text("<!-- assay:table claims -->\n<!-- /assay -->\n")
    with pytest.raises(BadBlock, match="write `board` or PAPER/NAME"):
        generate(clone)


def test_text_around_blocks_stays(tmp_path):
    text = "a\n<!-- assay:table x -->\n\nold\n\n<!-- /assay -->\nb\n<!-- assay:figure y --><!-- /assay -->\n"
    with pytest.raises(BadBlock):
        fill(text, "README.md", lambda kind, name: "")
    text = text.replace("y --><", "y -->\n<")
    filled = fill(text, "README.md", lambda kind, name: f"{kind} {name}")
    assert filled.startswith("a\n<!-- assay:table x -->\n\ntable x\n\n<!-- /assay -->\nb\n")
    assert fill(filled, "README.md", lambda kind, name: f"{kind} {name}") == filled


def test_cells_cannot_break_a_table():
    assert table(("a",), [("x | y\nz",)]).splitlines()[-1] == r"| x \| y z |"

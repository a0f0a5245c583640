"""The end of a run: fresh beside committed, reasons for what is open, files beside the runs."""

from __future__ import annotations

import dataclasses
import json

import pytest

from shared.experiment import promote as promotion
from shared.experiment.promote import promote
from shared.experiment.report import report
from tests.experiment.fake_records import clear_difference, toy_claim, toy_experiment, write_run, write_runs

EXPERIMENT = toy_experiment(toy_claim(), toy_claim(id="other", metric="unknown"), seeds=(0, 1, 2, 3, 4))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setattr(promotion, "in_history", lambda commit, root: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    write_runs(tmp_path / "runs", EXPERIMENT, clear_difference)
    return tmp_path


def test_without_committed_results_it_says_so(clone, capsys):
    assert report(EXPERIMENT, "proxy", clone / "runs", root=clone)
    printed = capsys.readouterr().out
    assert "no committed results yet" in printed
    assert "0.504 [0.478, 0.530]" in printed
    assert "b seed 0: unknown is None: other" in printed
    assert "runs/toy/proxy/report/claims.png" in printed
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_report_folder_holds_text_json_and_plots(clone):
    report(EXPERIMENT, "proxy", clone / "runs", root=clone)
    folder = clone / "runs/toy/proxy/report"
    assert {path.name for path in folder.iterdir()} == {"claims.json", "claims.png", "claims.svg", "report.md"}
    assert json.loads((folder / "claims.json").read_text())[0]["verdict"] == "reproduced"
    assert "![claims](claims.svg)" in (folder / "report.md").read_text()


def rerun(clone, score, seeds):
    (clone / "runs").rename(clone / "old")
    write_runs(clone / "runs", EXPERIMENT, score, seeds)


@pytest.mark.parametrize(
    ("score", "seeds", "status"),
    [
        (clear_difference, range(3), "identical"),
        (lambda arm, seed: clear_difference(arm, seed) * (1 + 1e-6), range(5), "OK"),
        (lambda arm, seed: -clear_difference(arm, seed), range(5), "FAIL"),
    ],
)
def test_fresh_runs_are_held_against_committed_ones(clone, capsys, score, seeds, status):
    promote(EXPERIMENT, root=clone)
    rerun(clone, score, seeds)
    assert report(EXPERIMENT, "proxy", clone / "runs", as_json=True, root=clone) == (status != "FAIL")
    entry = json.loads(capsys.readouterr().out)[0]
    assert entry["agrees"] == status
    assert entry["committed"]["effect"] == 0.504
    report(EXPERIMENT, "proxy", clone / "runs", root=clone)
    assert status in capsys.readouterr().out


def test_a_headline_subset_is_provisional(clone, capsys):
    promote(EXPERIMENT, root=clone)
    rerun(clone, clear_difference, range(3))
    report(EXPERIMENT, "proxy", clone / "runs", root=clone)
    printed = capsys.readouterr().out
    assert "3 of 5 seeds so far: b-above-a" in printed
    assert "3/5" in printed


def test_claims_without_runs_are_listed_once(clone, capsys):
    (clone / "runs").rename(clone / "old")
    write_run(clone / "runs", EXPERIMENT, "a", 0, {"score": 1.0})
    assert report(EXPERIMENT, "proxy", clone / "runs", root=clone)
    assert "not judged, no complete runs: b-above-a, other" in capsys.readouterr().out


def test_overridden_configs_are_judged_and_not_compared(clone, capsys):
    promote(EXPERIMENT, root=clone)
    (clone / "runs/toy/proxy").rename(clone / "runs/toy/proxy-custom")
    report(EXPERIMENT, "proxy-custom", clone / "runs", root=clone)
    printed = capsys.readouterr().out
    assert "reproduced" in printed
    assert "never compared" in printed


def test_many_claims_are_cut_to_what_the_paper_stands_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = [
        toy_claim(id=f"may{index}", strength="may", metric="absent" if index < 9 else "score") for index in range(40)
    ]
    experiment = toy_experiment(toy_claim(), *many, seeds=(0, 1, 2, 3, 4))
    write_runs(tmp_path / "runs", experiment, clear_difference)
    report(experiment, "proxy", tmp_path / "runs", root=tmp_path)
    printed = capsys.readouterr().out
    assert "b-above-a" in printed
    assert "may20" not in printed
    assert "41 claims: 32 reproduced, 9 unresolved (31 of strength `may` only in report.md)" in printed
    assert "may0, may1, may2, may3, may4, may5 and 3 more" in printed
    assert "may20" in (tmp_path / "runs/toy/proxy/report/report.md").read_text()


def test_a_broken_figure_does_not_hide_the_verdicts(clone, capsys):
    broken = dataclasses.replace(
        EXPERIMENT, figures={"bad": lambda results: {}["key"], "late": lambda r: r.arms("later")}
    )
    assert report(broken, "proxy", clone / "runs", root=clone)
    printed = capsys.readouterr().out
    assert "reproduced, n = 5" in printed
    assert "figure bad failed: KeyError: 'key'" in printed
    assert "late" not in printed

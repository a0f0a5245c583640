"""Promotion: what goes in reads back, twice gives the same bytes, and every doubt refuses an arm by name."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.experiment import promote as promotion
from shared.experiment.claims import evaluate_all
from shared.experiment.contracts import Study
from shared.experiment.promote import promote, thin
from shared.experiment.records import RecordDamaged
from shared.experiment.results import Results
from tests.experiment.fake_records import clear_difference, toy_claim, toy_experiment, write_run, write_runs

SEEDS = (0, 1, 2, 3, 4)
EXPERIMENT = toy_experiment(seeds=SEEDS)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository root with five fresh seeds of both arms, all of a commit in the history."""
    monkeypatch.setattr(promotion, "in_history", lambda commit, root: commit == "c0ffee")
    write_runs(tmp_path / "runs", EXPERIMENT, clear_difference)
    return tmp_path


def committed(root):
    return Results.committed("toy", "proxy", root)


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in (root / "results").rglob("*") if path.is_file()}


def test_promoted_records_read_like_the_fresh_ones(clone):
    outcome = promote(EXPERIMENT, root=clone)
    assert outcome.promoted == ["main/a", "main/b"]
    assert outcome.refused == {}
    fresh = Results(clone / "runs", "toy", "proxy")
    for question in ("arms", "summaries"):
        assert getattr(committed(clone), question)("main") == getattr(fresh, question)("main")
    for question in ("seeds", "config", "config_hash", "provenance", "cost"):
        assert getattr(committed(clone), question)("main", "b") == getattr(fresh, question)("main", "b")
    assert committed(clone).curves("main", "a")[2][3] == {"step": 3, "score": 2.43}
    assert evaluate_all(EXPERIMENT, committed(clone)) == evaluate_all(EXPERIMENT, fresh)


def test_promoting_twice_gives_the_same_bytes(clone):
    promote(EXPERIMENT, root=clone)
    before = contents(clone)
    promote(EXPERIMENT, root=clone)
    assert contents(clone) == before
    assert promote(EXPERIMENT, root=clone).size == sum(map(len, before.values()))


def test_arms_of_several_processes_are_named(clone, capsys, monkeypatch):
    assert promote(EXPERIMENT, root=clone).layouts == {}
    for seed, origin in enumerate(
        ({"layout": "TP2"}, {"layout": "1", "earlier": [{"python": "3"}, {"layout": "DP2"}]})
    ):
        shutil.rmtree(clone / f"runs/toy/proxy/main/b/seed{seed}")
        write_run(clone / "runs", EXPERIMENT, "b", seed, {"score": 1.0}, **origin)
    outcome = promote(EXPERIMENT, root=clone)
    assert outcome.layouts == {"main/b": "DP2, TP2"}
    monkeypatch.setattr(promotion, "promote", lambda *arguments: outcome)
    monkeypatch.setattr(promotion.catalog, "experiment", lambda paper: EXPERIMENT)
    assert promotion.main("toy", clone)
    assert (
        "note:     main/b ran under DP2, TP2: one process gives the same rows to about 1e-6" in capsys.readouterr().out
    )


def test_one_arm_at_a_time(clone):
    (clone / "runs/toy/proxy/main/b/seed4/summary.json").unlink()
    outcome = promote(EXPERIMENT, root=clone)
    assert outcome.promoted == ["main/a"]
    assert "seeds 4 are not complete" in outcome.refused["main/b"]
    assert committed(clone).arms("main") == ("a",)
    (clone / "runs/toy/proxy/main/b/seed4").rename(clone / "gone")
    write_run(clone / "runs", EXPERIMENT, "b", 4, {"score": 4.5})
    assert promote(EXPERIMENT, root=clone).promoted == ["main/a", "main/b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dirty": True}, "seed 3 ran on a dirty tree"),
        ({"commit": "deadbeef0123"}, "commit deadbeef01, which is not in the history"),
        ({"config": {"arm": "c"}}, "seed 3 ran with another config"),
    ],
)
def test_a_doubtful_arm_is_refused_and_the_other_goes_through(clone, changes, message):
    (clone / "runs/toy/proxy/main/a/seed3").rename(clone / "gone")
    write_run(clone / "runs", EXPERIMENT, "a", 3, {"score": 1.0}, **changes)
    outcome = promote(EXPERIMENT, root=clone)
    assert outcome.promoted == ["main/b"]
    assert message in outcome.refused["main/a"]


def test_a_damaged_record_is_named(clone):
    path = clone / "runs/toy/proxy/main/a/seed0/metrics.jsonl"
    path.write_text(path.read_text().replace("0.0", "0.1"))
    assert "seed0/metrics.jsonl" in promote(EXPERIMENT, root=clone).refused["main/a"]


def test_code_may_not_be_mixed_inside_a_study(clone):
    promote(EXPERIMENT, root=clone)
    before = contents(clone)
    for seed in SEEDS:
        (clone / f"runs/toy/proxy/main/a/seed{seed}").rename(clone / f"gone{seed}")
        write_run(clone / "runs", EXPERIMENT, "a", seed, {"score": 1.0}, code_hash="newer")
    outcome = promote(EXPERIMENT, root=clone)
    assert outcome.promoted == []
    assert "arms a and b ran on different code" in outcome.refused["main/b"]
    assert contents(clone) == before


def test_runs_older_than_a_test_are_committed_and_do_not_decide_it(clone):
    later = toy_experiment(toy_claim(), toy_claim(id="afterthought", threshold=-9.0), seeds=SEEDS)
    assert promote(later, root=clone).refused == {}
    planned, afterthought = evaluate_all(later, committed(clone))
    assert planned.verdict == "reproduced"
    assert (afterthought.verdict, afterthought.reason) == ("unresolved", "b seed 0 began before this test was fixed")


@pytest.mark.parametrize("name", ["runs.jsonl.gz", "curves.jsonl.gz"])
def test_an_edited_committed_file_is_named(clone, name):
    promote(EXPERIMENT, root=clone)
    path = clone / "results/toy/proxy/main/a" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RecordDamaged, match=name):
        (committed(clone).summaries("main"), committed(clone).curves("main", "a"))


def test_compressed_curves_carry_no_name_and_no_date(clone):
    promote(EXPERIMENT, root=clone)
    header = (clone / "results/toy/proxy/main/a/curves.jsonl.gz").read_bytes()[:10]
    assert header[3] == 0
    assert header[4:8] == bytes(4)


def test_the_history_is_asked_of_git(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert promotion.in_history(head, tmp_path)
    assert not promotion.in_history("0" * 40, tmp_path)


@given(st.integers(0, 500), st.integers(2, 60), st.integers(1, 30))
def test_thinning_keeps_ends_order_and_rare_rows(length, limit, every):
    rows = [{"step": step, "x": 0.0} | ({"rare": 1.0} if step % every == 0 else {}) for step in range(length)]
    kept = [row["step"] for row in thin(rows, limit)]
    assert kept == sorted(set(kept))
    assert len(kept) == min(length, limit)
    if rows:
        assert {0, length - 1} <= set(kept)
    if every > 1 and length // every + 1 <= limit // 2 - 2:
        assert set(range(0, length, every)) <= set(kept)


def test_only_hashes_of_claims_that_the_arm_serves_are_kept(clone):
    other = toy_claim(id="only-b", contrast={"b": 1.0})
    experiment = toy_experiment(toy_claim(), other, seeds=SEEDS)
    (clone / "runs").rename(clone / "old")
    write_runs(clone / "runs", experiment, clear_difference)
    promote(experiment, root=clone)
    kept = {arm: list(committed(clone).provenance("main", arm)[0]["claims_hash"]) for arm in ("a", "b")}
    assert kept == {"a": ["b-above-a"], "b": ["b-above-a", "only-b"]}
    assert [result.verdict for result in evaluate_all(experiment, committed(clone))] == ["reproduced"] * 2


@pytest.mark.parametrize(("runs", "metrics", "rows"), [(10, 2, 200), (600, 17, 12), (600, 60, 12)])
def test_many_runs_share_the_budget_for_curves(runs, metrics, rows):
    experiment = toy_experiment(seeds=tuple(range(runs // 2)))
    row = {f"metric{index}": 0.0 for index in range(metrics)}
    assert promotion.rows_a_run(experiment, "proxy", [row]) == rows


def test_only_the_curves_of_interest_are_kept():
    study = Study("s", "?", {"a": None}, run=lambda context: {}, scales={}, curves=("entropy",))
    rows = [{"step": 0.0, "entropy": 1.0, "noise": 2.0}, {"step": 1.0, "noise": 3.0}]
    assert promotion._of_interest(study, rows) == [{"step": 0.0, "entropy": 1.0}, {"step": 1.0}]
    assert promotion._of_interest(replace(study, curves=()), rows) == rows

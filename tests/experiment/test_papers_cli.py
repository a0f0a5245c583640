"""`python -m papers`: wrong words are answered, right ones reach the right function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from papers import _cli
from shared.experiment import board, canary, catalog, check, cluster, launcher, promote, report, tables, torchrun
from shared.experiment.launcher import Outcome
from shared.megatron.layout import Layout
from tests.experiment.toylab.experiment import EXPERIMENT

DONE = Outcome(0, "proxy", 1, 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was called with what; every function answers as if all went well."""
    seen: dict[str, Any] = {}

    def record(module: Any, name: str, answer: Any) -> None:
        def stand_in(*arguments: Any, **named: Any) -> Any:
            seen[name] = (arguments, named)
            return answer

        monkeypatch.setattr(module, name, stand_in)

    record(board, "list_papers", None)
    record(board, "show_paper", None)
    record(check, "main", True)
    record(tables, "tables", False)
    record(launcher, "run_experiment", DONE)
    record(report, "report", True)
    monkeypatch.setattr(promote, "main", lambda *arguments: seen.update(promote=arguments) or True)
    monkeypatch.setattr(canary, "main", lambda *arguments: seen.update(canary=arguments) or True)
    monkeypatch.setattr(catalog, "experiment", lambda paper: EXPERIMENT)
    return seen


def test_the_words_of_run_become_a_selection(
    calls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cli.sys, "prefix", "elsewhere")
    words = ["run", "toylab", "--study", "cold", "--arm", "fast", "--seed", "3", "--seed", "4", "--out", str(tmp_path)]
    assert _cli.main([*words, "--set", "noise.scale=0.5", "--set", "mode=a=b", "--workers", "2"]) == 0
    (_, scale, selection, out), named = calls["run_experiment"]
    assert (scale, out, named["workers"]) == ("proxy", tmp_path, 2)
    assert (selection.studies, selection.arms, selection.seeds) == (("cold",), ("fast",), (3, 4))
    assert selection.overrides == {"noise.scale": "0.5", "mode": "a=b"}
    assert not selection.whole_grid
    assert named["go_on"].startswith("python -m papers run toylab --study cold")
    assert calls["report"][0][1:] == ("proxy", tmp_path, False)
    monkeypatch.setattr(_cli.sys, "prefix", str(_cli.ROOT / ".nox" / "core"))
    assert _cli.main(["run", "toylab", "--seed", "3"]) == 0
    assert calls["run_experiment"][1]["go_on"] == "nox -s reproduce-toylab -- --seed 3"


def test_the_words_of_a_layout_and_of_slurm_reach_the_launchers(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _cli.main(["run", "toylab"]) == 0
    assert calls["run_experiment"][1]["layout"] == Layout()
    words = ["--tp", "2", "--pp", "2", "--cp", "2", "--dp", "4", "--ep", "2", "--virtual-pp", "2", "--overlap"]
    words += ["--sequence-parallel", "--distributed-optimizer", "--recompute", "selective"]
    assert _cli.main(["run", "toylab", *words]) == 0
    wanted = Layout(2, 2, 2, 4, 2, True, 2, True, True, "selective")
    assert calls["run_experiment"][1]["layout"] == wanted
    monkeypatch.setattr(cluster, "submit", lambda *what, **named: calls.update(submit=named))
    words = ["--tp", "2", "--nodes", "2", "--gpus-per-node", "1", "--partition", "big", "--time", "02:00:00"]
    words += ["--warn", "900", "--scale", "gpu"]
    assert _cli.main(["run", "toylab", *words, "--slurm", "--sbatch", "account=lab"]) == 0
    assert calls["submit"]["slurm"] == cluster.Slurm(2, 1, "big", 120, 900, (("account", "lab"),))
    assert (calls["submit"]["layout"], calls["submit"]["dry_run"]) == (Layout(tp=2), False)
    assert _cli.main(["run", "toylab", "--slurm-dry-run"]) == 0
    assert calls["submit"]["dry_run"]
    assert calls["submit"]["slurm"] == cluster.Slurm()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "1"], "error: --nodes means nothing without --slurm"),
        (["--gpus-per-node", "8", "--scale", "gpu"], "error: --gpus-per-node means nothing without --slurm"),
        (["--partition", "big", "--sbatch", "account=lab"], "error: --partition, --sbatch means nothing without"),
        (["--time", "01:00:00"], "error: --time means nothing without --slurm"),
        (["--warn", "600"], "error: --warn means nothing without --slurm"),
        (["--slurm", "--gpus-per-node", "8"], "asks for GPUs that scale proxy leaves idle"),
        (["--slurm-dry-run", "--workers", "2"], "error: --workers means nothing here, with --slurm every run is a job"),
    ],
)
def test_flags_without_effect_are_refused_by_name(
    calls: dict[str, Any], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main(["run", "toylab", *words]) == 2
    assert message in capsys.readouterr().err
    assert "run_experiment" not in calls


def test_workers_under_torchrun_are_refused(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("RANK", "0")
    assert _cli.main(["run", "toylab", "--workers", "2"]) == 2
    assert "--workers means nothing here, torchrun's processes share one run" in capsys.readouterr().err


def test_under_torchrun_rank_zero_reports_and_one_rank_of_each_machine_complains(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchrun, "run_experiment", lambda *what, **named: calls.update(torchrun=named) or DONE)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    for rank, local, said in (("1", "1", ""), ("2", "0", "error (rank 2): tp=0"), ("0", "0", "error: tp=0")):
        calls.pop("report", None)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert _cli.main(["run", "toylab", "--tp", "2"]) == 0
        assert ("report" in calls) == (rank == "0")
        assert _cli.main(["run", "toylab", "--tp", "0"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(said)
        assert bool(error) == bool(said)
    assert calls["torchrun"]["go_on"] == "torchrun (with its options) -m papers run toylab --tp 2"
    assert "run_experiment" not in calls


@pytest.mark.parametrize(
    ("words", "called", "code"),
    [
        (["list", "--json"], "list_papers", 0),
        (["show", "toylab"], "show_paper", 0),
        (["check", "toylab"], "main", 0),
        (["promote", "toylab"], "promote", 0),
        (["tables", "--check"], "tables", 1),
        (["canary", "check"], "canary", 0),
        (["canary", "record", "toylab"], "canary", 0),
    ],
)
def test_every_command_reaches_its_function(calls: dict[str, Any], words: list[str], called: str, code: int) -> None:
    assert _cli.main(words) == code
    assert called in calls


def test_a_verdict_that_fails_and_a_run_that_stops_set_the_exit_code(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "report", lambda *arguments: False)
    assert _cli.main(["run", "toylab"]) == 1
    monkeypatch.setattr(
        launcher, "run_experiment", lambda *a, **k: Outcome(130, "proxy", 0, 1, ("Stopped: [so] far.",))
    )
    assert _cli.main(["run", "toylab", "--json"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "Stopped: [so] far.\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum", "cegppo"], "did you mean 'run'"),
        (["show", "no_such_paper"], "Unknown paper 'no_such_paper'"),
    ],
)
def test_wrong_words_are_answered_in_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_setting_without_value_is_answered(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert _cli.main(["run", "toylab", "--set", "lr"]) == 2
    assert "write --set lr=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run"], ["run", "x", "--seed", "one"], ["run", "x", "--workers", "0"], []])
def test_wrong_usage_exits_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _cli.main(words)
    assert stop.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_users_of_nox_are_told_the_nox_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(_cli.ROOT / ".nox" / "core"))
    assert _cli._same_command(["run", "klear_gppo", "--all"]) == "nox -s reproduce-klear-gppo -- --all"
    assert _cli._same_command(["run", "cegppo"]) == "nox -s reproduce-cegppo"

"""The launcher on a toy: reuse, resume, failures, signals, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shared.experiment import codehash
from shared.experiment.contracts import Experiment, Grid
from shared.experiment.files import RunBusy, Unwritable
from shared.experiment.launcher import DeclarationError, Outcome, run_experiment
from shared.experiment.overrides import UnknownName
from shared.experiment.plan import Selection
from shared.experiment.records import lock_of
from tests.experiment.toylab.experiment import COLD, EXPERIMENT, WARM
from tests.experiment.toylab.runs import Start

ROOT = Path(__file__).resolve().parents[2]
ONE = Selection(arms=("fast",), seeds=(0,))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))


def launch(
    runs: Path, selection: Selection = ONE, experiment: Experiment = EXPERIMENT, scale: str = "proxy"
) -> tuple[Outcome, str]:
    """Outcome and everything that was printed."""
    console = Console(file=io.StringIO(), width=400)
    outcome = run_experiment(experiment, scale, selection, runs, console=console, workers=2)
    assert isinstance(console.file, io.StringIO)
    return outcome, console.file.getvalue() + "\n".join(outcome.messages)


def seed0(runs: Path, arm: str = "fast", folder: str = "proxy") -> Path:
    return runs / "toylab" / folder / "cold" / arm / "seed0"


def with_arms(**modes: str) -> Experiment:
    """The cold study with one arm per mode."""
    arms = {arm: replace(COLD.arms["fast"], mode=mode) for arm, mode in modes.items()}
    cold = replace(COLD, arms=arms, headline=None, scales={"proxy": Grid((0,))})
    return replace(EXPERIMENT, studies=(cold,), claims=())


def test_complete_runs_are_reused_and_new_ones_run(tmp_path: Path) -> None:
    outcome, said = launch(tmp_path)
    assert outcome == Outcome(0, "proxy", 1, 0)
    assert "1 runs: 1 new." in said
    before = (seed0(tmp_path) / "summary.json").stat().st_mtime_ns
    outcome, said = launch(tmp_path, Selection(arms=("fast",), seeds=(0, 1)))
    assert "2 runs: 1 complete and reused, 1 new." in said
    assert outcome.complete == 2
    assert (seed0(tmp_path) / "summary.json").stat().st_mtime_ns == before
    assert "\x1b" not in said


def test_what_a_pool_writes_is_what_any_pool_writes(tmp_path: Path) -> None:
    launch(tmp_path / "a")
    launch(tmp_path / "b")
    for name in ("metrics.jsonl", "config.json", "summary.json"):
        assert (seed0(tmp_path / "a") / name).read_bytes() == (seed0(tmp_path / "b") / name).read_bytes()
    provenance = json.loads((seed0(tmp_path / "a") / "provenance.json").read_text())
    assert provenance["threads"] == 1
    assert len(provenance["commit"]) == 40
    assert set(provenance["claims_hash"]) == {"faster"}


def test_config_and_code_changes_run_again_and_keep_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(tmp_path)
    changed = replace(COLD, arms={**COLD.arms, "fast": replace(COLD.arms["fast"], lr=0.3)})
    _, said = launch(tmp_path, experiment=replace(EXPERIMENT, studies=(changed, WARM)))
    assert "moved aside to seed0.stale-1 (the config changed)" in said
    real = codehash.study_hash
    monkeypatch.setattr(codehash, "study_hash", lambda *arguments: real(*arguments)[::-1])
    _, said = launch(tmp_path, experiment=replace(EXPERIMENT, studies=(changed, WARM)))
    assert "moved aside to seed0.stale-2 (the code changed)" in said
    assert (seed0(tmp_path).parent / "seed0.stale-1" / "summary.json").exists()


def test_overridden_runs_stay_apart(tmp_path: Path) -> None:
    outcome, _ = launch(tmp_path, replace(ONE, overrides={"steps": "3"}))
    assert outcome.folder == "proxy-custom"
    assert json.loads((seed0(tmp_path, folder="proxy-custom") / "summary.json").read_text())["steps"] == 3
    assert not (tmp_path / "toylab" / "proxy").exists()


def test_a_truncated_record_is_named_and_made_again(tmp_path: Path) -> None:
    launch(tmp_path)
    metrics = seed0(tmp_path) / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-30])
    outcome, said = launch(tmp_path)
    assert re.search(r"seed0\.damaged-1 \(.*metrics\.jsonl does not match", said)
    assert outcome.code == 0
    assert metrics.read_bytes() == whole


def test_a_killed_run_is_named_resumes_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    launch(tmp_path / "whole")
    experiment = with_arms(fast="die")
    outcome, said = launch(tmp_path, Selection(whole_grid=True), experiment)
    assert outcome.code == 1
    assert "FAILED cold/fast seed 0: the process was killed by SIGKILL" in said
    assert "the run is resumable" in said
    outcome, said = launch(tmp_path, Selection(whole_grid=True), experiment)
    assert outcome.code == 0
    assert "cold/fast seed 0 resumes" in said
    rows = (seed0(tmp_path) / "metrics.jsonl").read_bytes()
    assert rows == (seed0(tmp_path / "whole") / "metrics.jsonl").read_bytes()


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    outcome, said = launch(tmp_path, Selection(whole_grid=True), with_arms(bad="fail", good="plain"))
    assert (outcome.code, outcome.complete, outcome.left) == (1, 1, 1)
    assert "FAILED cold/bad seed 0: ValueError: the toy was told to fail (traceback: " in said
    assert "told to fail" in (seed0(tmp_path, "bad") / "error.txt").read_text()
    assert (seed0(tmp_path, "good") / "summary.json").exists()


def test_a_run_that_somebody_else_stopped_is_no_success(tmp_path: Path) -> None:
    outcome, said = launch(tmp_path, Selection(whole_grid=True), with_arms(fast="term"))
    assert (outcome.code, outcome.left) == (1, 1)
    assert "FAILED cold/fast seed 0: stopped after step 2" in said
    assert launch(tmp_path, Selection(whole_grid=True), with_arms(fast="term"))[0].code == 0


def test_artifacts_are_built_first_and_their_hashes_recorded(tmp_path: Path) -> None:
    outcome, said = launch(tmp_path, Selection(studies=("warm",)))
    assert outcome.code == 0
    assert said.index("[done]   artifact start") < said.index("[start]  warm/plain seed 0")
    record = tmp_path / "toylab" / "proxy" / "warm" / "plain" / "seed0"
    used = json.loads((record / "provenance.json").read_text())["artifacts"]["start"]
    manifest = tmp_path / "cache" / "artifacts" / used["address"] / "manifest.json"
    assert json.loads(manifest.read_text())["content"] == used["content"]
    changed = replace(EXPERIMENT.artifacts[0], config=Start(x=2.0))
    _, said = launch(tmp_path, Selection(studies=("warm",)), replace(EXPERIMENT, artifacts=(changed,)))
    assert "the code changed" in said  # the identity of a run covers its artifacts


def test_runs_without_their_artifact_fail_by_name(tmp_path: Path) -> None:
    broken = replace(EXPERIMENT.artifacts[0], config=None)
    outcome, said = launch(tmp_path, Selection(studies=("warm",)), replace(EXPERIMENT, artifacts=(broken,)))
    assert outcome.code == 1
    assert "FAILED artifact start: AttributeError" in said
    assert "FAILED warm/plain seed 0: artifact start could not be built" in said


def test_a_headline_outside_the_grid_is_refused(tmp_path: Path) -> None:
    cold = replace(COLD, headline=Grid((7,)))
    with pytest.raises(DeclarationError, match="cold is no part of its proxy grid"):
        launch(tmp_path, experiment=replace(EXPERIMENT, studies=(cold, WARM)))


def test_unknown_arms_and_unwritable_folders_stop_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'fast'"):
        launch(tmp_path / "runs", Selection(arms=("fsat",)))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(Unwritable, match="Cannot write to"):
        launch(tmp_path / "file")


def test_a_second_launcher_is_refused_by_name(tmp_path: Path) -> None:
    lock = lock_of(seed0(tmp_path))
    assert lock.acquire()
    with pytest.raises(RunBusy, match=rf"seed0 is being run by process {os.getpid()}"):
        launch(tmp_path)
    lock.release()
    assert launch(tmp_path)[0].code == 0


def start_toy(runs: Path, steps: int, sleep: float, workers: int = 4) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.experiment.toylab", str(runs), str(steps), str(sleep), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.05)


def all_run(runs: Path) -> bool:
    """True once the four headline runs have all logged rows."""
    files = list((runs / "toylab" / "proxy-custom" / "cold").glob("*/seed*/metrics.jsonl"))
    return len(files) == 4 and all(file.stat().st_size > 0 for file in files)


def processes_of(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_a_resumable_state_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    toy = start_toy(tmp_path, 60, 0.03)
    wait_until(lambda: all_run(tmp_path))
    # Ctrl-C in a terminal reaches the whole foreground group, SIGTERM usually the parent alone
    (os.killpg if number is signal.SIGINT else os.kill)(toy.pid, number)
    said = toy.communicate(timeout=60)[0]
    assert toy.returncode == 130
    assert "Stopped: 0 of 4 runs complete, 4 resumable. Go on with: toylab again" in said
    assert "\x1b" not in said
    wait_until(lambda: not processes_of(toy.pid), 30)
    outcome, said = launch(tmp_path, Selection(studies=("cold",), overrides={"steps": "60", "sleep": "0.03"}))
    assert "4 resumed" in said
    assert outcome == Outcome(0, "proxy-custom", 4, 0)


@pytest.mark.skipif(not Path("/proc").exists(), reason="counts processes in /proc")
def test_killing_the_parent_leaves_no_orphan_and_a_resumable_state(tmp_path: Path) -> None:
    toy = start_toy(tmp_path, 10_000, 0.05)
    wait_until(lambda: all_run(tmp_path))
    assert len(processes_of(toy.pid)) >= 5
    toy.kill()
    toy.communicate()
    wait_until(lambda: not processes_of(toy.pid), 30)
    lock = lock_of(seed0(tmp_path, folder="proxy-custom"))
    assert lock.acquire()
    lock.release()


def test_two_launchers_in_one_folder(tmp_path: Path) -> None:
    first = start_toy(tmp_path, 10_000, 0.05)
    wait_until(lambda: all_run(tmp_path))
    with pytest.raises(RunBusy, match="is being run by process"):
        launch(tmp_path, Selection(studies=("cold",), overrides={"steps": "10000", "sleep": "0.05"}))
    first.terminate()
    first.communicate(timeout=60)


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    toy = start_toy(tmp_path, 10_000, 10.0)  # too deep asleep to hear the first
    wait_until(lambda: all_run(tmp_path))
    start = time.monotonic()
    toy.send_signal(signal.SIGINT)
    time.sleep(0.3)
    toy.send_signal(signal.SIGINT)
    toy.communicate(timeout=60)
    assert toy.returncode == 130
    assert time.monotonic() - start < 8

"""A run on several ranks: who writes, what all know, how all stop, and what is said when one is gone."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from shared.experiment import group, launcher, ranks, torchrun
from shared.experiment.codehash import run_hash
from shared.experiment.contracts import Interrupted, NonFinite, RunContext
from shared.experiment.files import RunBusy
from shared.experiment.group import GroupTask, RankFailed
from shared.experiment.launcher import prepare
from shared.experiment.plan import Selection
from shared.experiment.records import lock_of, read_rows
from shared.megatron.layout import ImpossibleLayout, Layout
from tests.experiment.toylab import experiment as toylab
from tests.experiment.toylab.spread import EXPERIMENT, Adding, add_up
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TWO = Layout(dp=2)
ORIGIN = {"commit": "none", "dirty": True, "claims_hash": {}, "layout": "DP2"}
# A rank finishes importing some 4 CPU-seconds after it was started.
PATIENCE_S = 90


def task_of(path: Path, run: Callable[[RunContext], dict[str, Any]]) -> GroupTask:
    origin = {**ORIGIN, "code_hash": run_hash("spread", run, {})}
    return GroupTask(run, path, Adding(), 0, "plain", "add", "proxy", {}, origin, "spread", TWO)


def logs_and_looks(run: RunContext) -> dict[str, Any]:
    """What a rank sees of the record, for `seen<rank>.json`."""
    import torch.distributed as dist

    from shared.experiment.signals import request_stop

    rank = dist.get_rank()
    run.log(1, x=10.0 + rank)
    run.log(2, x=20.0 + rank)
    print("heard by nobody" if rank else "")
    seen: dict[str, Any] = {"rows": run.rows(), "calm": run.stop_requested()}
    if rank == 1:
        request_stop()
    seen["asked"] = run.stop_requested()
    run.rewind(1)
    seen["rewound"] = run.rows()
    (run.dir / f"seen{rank}.json").write_text(json.dumps(seen))
    return {"rank": rank}


def run_and_tell(rank: int, path: Path, run: Callable[[RunContext], dict[str, Any]], code_hash: str = "") -> str:
    """What came out of `run_on_ranks`, as text."""
    from shared.experiment.ranks import run_on_ranks

    task = task_of(path, run)
    if code_hash:
        task = replace(task, provenance={**task.provenance, "code_hash": code_hash})
    try:
        run_on_ranks(task)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def raise_on_one(run: RunContext) -> dict[str, Any]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("one of two")
    return {}


def test_rank_zero_writes_and_all_ranks_see_the_same(tmp_path: Path) -> None:
    path = tmp_path / "seed0"
    assert run_ranks(run_and_tell, TWO, path, logs_and_looks) == ["done", "done"]
    seen = [json.loads((path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert seen[0]["rows"] == [{"step": 1, "x": 10.0}, {"step": 2, "x": 20.0}]
    assert (seen[0]["calm"], seen[0]["asked"]) == (False, True)
    assert seen[0]["rewound"] == read_rows(path / "metrics.jsonl") == [{"step": 1, "x": 10.0}]
    assert json.loads((path / "summary.json").read_text())["summary"] == {"rank": 0}
    assert (path / "rank1.log").read_text() == "heard by nobody\n"
    (path / "seen0.json").unlink()
    assert run_ranks(run_and_tell, TWO, path, logs_and_looks) == ["done", "done"]
    assert not (path / "seen0.json").exists(), "complete records are left alone"


def test_a_busy_record_is_refused_on_every_rank(tmp_path: Path) -> None:
    lock = lock_of(tmp_path / "seed0")
    assert lock.acquire()
    said = run_ranks(run_and_tell, TWO, tmp_path / "seed0", logs_and_looks)
    assert said[0] == said[1]
    assert said[0].startswith(f"RunBusy: {tmp_path / 'seed0'} is being run by process {os.getpid()}")
    lock.release()


def test_a_group_of_older_code_is_refused_and_leaves_the_newer_record_alone(tmp_path: Path) -> None:
    """A job that waited while the code was edited and a newer job completed the run."""
    path = tmp_path / "seed0"
    assert run_ranks(run_and_tell, TWO, path, logs_and_looks) == ["done", "done"]
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    said = run_ranks(run_and_tell, TWO, path, logs_and_looks, "0123456789abcdef")
    assert said[0] == said[1]
    assert said[0].startswith("CodeChanged: The code changed since add/plain seed 0 was started or submitted")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [place.name for place in tmp_path.iterdir() if place.is_dir()] == ["seed0"], "nothing moved aside"


def test_an_error_of_another_rank_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    said = run_ranks(run_and_tell, TWO, tmp_path / "seed0", raise_on_one)
    assert said[1] == "ValueError: one of two"
    assert said[0] != "done"
    log = (tmp_path / "seed0" / "rank1.log").read_text()
    assert "in raise_on_one" in log
    assert log.endswith("ValueError: one of two\n")
    assert not (tmp_path / "seed0" / "summary.json").exists()


def concluded(
    tmp_path: Path, words: dict[int, tuple[Any, ...]], codes: dict[int, int], first_lost: int | None = None
) -> str:
    """What is said of ranks with these last words and exit codes."""
    task = task_of(tmp_path, add_up)
    (tmp_path / "rank1.log").write_text("\n".join(f"line {number}" for number in range(9)))
    failed = next((rank for rank, word in words.items() if word[0] == "failed"), None)
    heard = SimpleNamespace(words=words, first_failed=failed, first_lost=first_lost)
    notes: list[str] = []
    failures = {rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}
    try:
        group._conclude(task, range(2), heard, failures, notes.append)  # pyright: ignore[reportArgumentType]
    except (RankFailed, Interrupted) as error:
        return " | ".join([*notes, str(error)])
    return "fine"


def leave(run: RunContext) -> dict[str, Any]:
    run.stop_requested()
    sys.exit(0)


@pytest.mark.slow
def test_ranks_that_leave_without_a_word_are_no_complete_run(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="of 2 ended with code 0 and no word"):
        task_of(tmp_path / "seed0", leave).execute(print)


def test_what_is_said_of_a_group(tmp_path: Path) -> None:
    failed = {1: ("failed", "ValueError: no", "trace"), 0: ("failed", "RuntimeError: Connection closed", "trace")}
    stopped: dict[int, tuple[Any, ...]] = {0: ("stopped", "stopped after 3"), 1: ("stopped", "stopped after 3")}
    assert concluded(tmp_path, {0: ("done",), 1: ("done",)}, {}) == "fine"
    assert concluded(tmp_path, stopped, {}) == "stopped after 3"
    assert concluded(tmp_path, failed, {0: 1, 1: 1}) == "rank 1 of 2: ValueError: no"
    assert concluded(tmp_path, failed, {0: -signal.SIGTERM, 1: 1}) == "rank 1 of 2: ValueError: no"
    killed = concluded(tmp_path, {0: failed[0]}, {0: 1, 1: -signal.SIGKILL})
    assert killed.startswith("[rank 1] line 4 | [rank 1] line 5 |")
    assert killed.endswith(
        "rank 1 of 2 was killed by SIGKILL, perhaps by the system for want of memory. "
        "The others were ended; the run is resumable"
    )
    assert "rank 0 of 2 was killed by SIGSEGV. The others" in concluded(tmp_path, {}, {0: -signal.SIGSEGV})
    assert "rank 0 of 2 was killed by SIGTERM" in concluded(tmp_path, {}, {0: -signal.SIGTERM})
    assert "rank 0 of 2 ended with code 3 and no word" in concluded(tmp_path, {1: ("done",)}, {0: 3})
    assert "rank 1 of 2 ended with code 0 and no word" in concluded(tmp_path, {0: ("done",)}, {})
    assert "rank 0 of 2 ended with code 0 and no word" in concluded(tmp_path, {}, {})
    assert "rank 1 of 2 ended with code 0 and no word" in concluded(tmp_path, {0: stopped[0]}, {})
    # It was the first to end; the other was hung up on.
    assert "rank 1 of 2 ended with code 0 and no word" in concluded(tmp_path, {}, {0: 1}, first_lost=1)
    assert "rank 1 of 2 ended with code 3 and no word" in concluded(tmp_path, {}, {1: 3})


def test_a_group_started_by_hand_builds_artifacts_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    console = Console(file=io.StringIO())

    def entries(artifact: Any) -> list[Any]:
        experiment = replace(toylab.EXPERIMENT, artifacts=(artifact,))
        what = (experiment, "proxy", Selection(studies=("warm",)), tmp_path / "runs")
        return torchrun._with_artifacts(prepare(*what, console=console, layout=Layout()), console)

    start = toylab.EXPERIMENT.artifacts[0]
    with pytest.raises(torchrun.ArtifactNotBuilt, match="artifact start: AttributeError"):
        entries(replace(start, config=None))
    for _ in range(2):  # built, then found in the cache
        (entry,) = entries(start)
        assert (entry.task.artifacts["start"].path / "start.json").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ImpossibleLayout, match="8 processes on a machine with 4 GPUs"):
        ranks.join(Layout(tp=8), "gpu")


def test_a_temporary_folder_too_long_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(group.LongTemporaryFolder, match="set TMPDIR to a folder with a shorter path"):
        task_of(tmp_path / "seed0", add_up).execute(print)
    code = "import sys; from tests.experiment.toylab.__main__ import main; main(sys.argv[1], '4', '0', '2')"
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    alone = subprocess.run(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True)
    assert "LongTemporaryFolder: The path of" in alone.stderr, "the pool of runs in one process"


def launch(runs: Path, arm: str, layout: Layout, **overrides: str) -> launcher.Outcome:
    selection = Selection(studies=("add",), arms=(arm,), overrides=overrides)
    what = (EXPERIMENT, "proxy", selection, runs)
    return launcher.run_experiment(*what, console=Console(file=io.StringIO()), layout=layout)


def start(runs: Path, *words: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    main = "tests.experiment.toylab.spread_main"
    command = [sys.executable, "-m", *(("torch.distributed.run", *torchrun, "-m") if torchrun else ()), main, str(runs)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *words], cwd=ROOT, env=environment, **streams)


def wait_for_rows(record: Path, count: int, *processes: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + PATIENCE_S
    path = record / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < limit, "timed out"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rank_ends_the_group_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """One life: rank 1 is killed, the next attempt is stopped, the last one is a single process."""
    record = tmp_path / "runs" / "spread" / "proxy-custom" / "add" / "die" / "seed0"
    words = ("60", "0.05", "2", "die")
    first = start(tmp_path / "runs", *words)
    wait_for_rows(record, 5, first)
    with pytest.raises(RunBusy, match=r"seed0 is being run by process \d+"):
        launch(tmp_path / "runs", "die", Layout(tp=2), steps="60", sleep="0.05")
    wait_for_rows(record, 30, first)
    died = time.monotonic()
    said = first.communicate(timeout=60)[0]
    assert time.monotonic() - died < 60
    assert first.returncode == 1
    assert "[rank 1] step 30" in said
    assert "FAILED add/die seed 0: rank 1 of 2 was killed by SIGKILL" in said
    second = start(tmp_path / "runs", *words)
    wait_for_rows(record, 35, second)
    second.send_signal(signal.SIGTERM)
    said = second.communicate(timeout=60)[0]
    assert second.returncode == 130
    assert "Stopped: 0 of 1 runs complete, 1 resumable. Go on with: spread again" in said
    done = len(read_rows(record / "metrics.jsonl"))
    assert 35 <= done < 60
    assert json.loads((record / "checkpoints" / "state.json").read_text())[1] == done
    assert launch(tmp_path / "runs", "die", Layout(), steps="60", sleep="0.05").complete == 1
    assert launch(tmp_path / "whole", "die", Layout(), steps="60", sleep="0.05").complete == 1
    whole = tmp_path / "whole" / record.relative_to(tmp_path / "runs")
    for name in ("metrics.jsonl", "config.json"):
        assert (record / name).read_bytes() == (whole / name).read_bytes()
    provenance = json.loads((record / "provenance.json").read_text())
    assert provenance["layout"] == "1"
    assert provenance["earlier"][-1]["layout"] == "TP2"


def fail(rank: int, name: str, texts: tuple[str | None, ...]) -> bool:
    """What a rank that failed with its text, if any, believes of the others."""
    ranks.ALIKE_S = 1
    text = texts[rank]
    return text is not None and ranks.failed_alike(name, NonFinite(text))


def test_ranks_know_whether_all_failed_alike() -> None:
    assert run_ranks(fail, TWO, "one", ("nan", "nan")) == [True, True]
    assert run_ranks(fail, TWO, "two", ("nan", "no space")) == [False, False]
    assert run_ranks(fail, TWO, "three", (None, "nan")) == [False, False]


def by_torchrun(runs: Path, arms: str) -> tuple[int, str]:
    """Exit status and output of a group on this machine."""
    process = start(runs, "6", "0", "2", arms, torchrun=("--standalone", "--nproc-per-node", "2"))
    said = process.communicate(timeout=PATIENCE_S)[0]
    return process.returncode, said


@pytest.mark.slow
def test_a_run_that_diverges_on_all_ranks_does_not_stop_the_others_under_torchrun(tmp_path: Path) -> None:
    code, said = by_torchrun(tmp_path, "nan,plain")
    assert code == 1
    add = tmp_path / "spread" / "proxy-custom" / "add"
    for rank in (0, 1):
        assert f"error (rank {rank}): add/nan seed 0: step 1: x is nan" in said
    error = add / "nan" / "seed0" / "error.txt"
    assert f"FAILED add/nan seed 0: step 1: x is nan (traceback: {error})" in said
    assert "NonFinite: step 1" in error.read_text()
    assert "1 of 2 runs complete. Once the cause is gone, run the others with: spread again" in said
    assert (add / "plain" / "seed0" / "summary.json").exists()


@pytest.mark.slow
def test_a_named_error_of_one_rank_is_said_and_ends_the_launch_under_torchrun(tmp_path: Path) -> None:
    code, said = by_torchrun(tmp_path, "nan-on-one,plain")
    assert code == 1
    assert "error (rank 1): add/nan-on-one seed 0: step 1: x is nan" in said
    assert "error (rank 0): " not in said
    assert "Not all ranks failed like rank 1, so this launch ends. Go on with: spread again" in said
    assert not (tmp_path / "spread" / "proxy-custom" / "add" / "plain" / "seed0" / "summary.json").exists()


@pytest.mark.slow
def test_torchrun_by_hand_on_two_machines_stops_as_one(tmp_path: Path) -> None:
    """Two agents on this machine meet through c10d; SIGTERM to one of them stops both ranks at the same step."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = (
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "two",
            "--rdzv-endpoint",
            f"localhost:{probe.getsockname()[1]}",
        )
    place = ("--nnodes", "2", "--nproc-per-node", "1", *meeting)
    machines = [start(tmp_path, "2000", "0.02", "2", torchrun=place) for _ in range(2)]
    record = tmp_path / "spread" / "proxy-custom" / "add" / "plain" / "seed0"
    wait_for_rows(record, 3, *machines)
    machines[1].send_signal(signal.SIGTERM)
    said = "".join(machine.communicate(timeout=60)[0] for machine in machines)
    assert said.count("Stopped: 0 of 1 runs complete, 1 resumable. Go on with: spread again") == 1
    done = len(read_rows(record / "metrics.jsonl"))
    assert json.loads((record / "checkpoints" / "state.json").read_text())[1] == done
    assert (record / "rank1.log").read_text().splitlines()[-1] == f"step {done}"
    assert json.loads((record / "provenance.json").read_text())["layout"] == "TP2"

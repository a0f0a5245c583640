"""Slurm jobs: what is asked for, what is refused, and one job from queue to requeue to a complete record.

Slurm itself is not there: `sbatch`, `srun` and `scontrol` are three shell scripts that play it on this machine.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from shared.experiment import artifacts, cluster, launcher
from shared.experiment.cluster import BadSlurmOption, NoSlurm, Slurm, SubmititMissing, minutes, sbatch_options
from shared.experiment.group import Group, GroupTask
from shared.experiment.launcher import prepare
from shared.experiment.plan import Selection
from shared.experiment.worker import CodeChanged, RunTask
from shared.megatron.layout import ImpossibleLayout, Layout
from tests.experiment.toylab import experiment as toylab
from tests.experiment.toylab.spread import EXPERIMENT

ROOT = Path(__file__).resolve().parents[2]
SBATCH = 'cp "$1" "$FAKE/job.sh"; echo "Submitted batch job 7"'
SRUN = """\
while [ "$1" != "$FAKE_PYTHON" ]; do shift; done
for node in 0 1; do
  SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" > "$FAKE/node$node.log" 2>&1 &
  echo $! > "$FAKE/node$node.pid"
done
for node in 0 1; do wait "$(cat "$FAKE/node$node.pid")" || status=1; done
exit ${status:-0}
"""
SCONTROL = 'echo "$@" > "$FAKE/requeued"; kill -9 "$(cat "$FAKE/node1.pid")"'
TWO_NODES = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder with a Slurm of scripts; whatever they started is killed at the end."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, body in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("FAKE_PYTHON", sys.executable)
    yield folder
    for file in folder.glob("node*.pid"):
        try:
            os.kill(int(file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


def submit(runs: Path, slurm: Slurm, layout: Layout, **options: Any) -> str:
    """What was said."""
    console = Console(file=io.StringIO(), width=400)
    what = (EXPERIMENT, options.pop("scale", "proxy"), Selection(studies=("add",), arms=("plain",), **options), runs)
    cluster.submit(*what, console=console, layout=layout, slurm=slurm, dry_run=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_dry_run_prints_a_script_that_bash_reads_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    slurm = Slurm(
        2, 8, "big", minutes("1-00:30:00"), 900, sbatch_options(["account=lab", "cpus-per-task=96", "hint=x y"])
    )
    what = (EXPERIMENT, "proxy", Selection(studies=("add",), arms=("plain",)), tmp_path / "runs")
    cluster.submit(*what, console=Console(), layout=Layout(tp=4, dp=4), slurm=slurm, dry_run=True)
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for line in ("nodes=2", "gpus-per-node=8", "partition=big", "time=1470", "account=lab", "cpus-per-task=96"):
        assert f"#SBATCH --{line}\n" in script
    for line in ("ntasks-per-node=1", "requeue", "signal=USR2@900", "hint='x y'", "job-name=spread-add-plain-0"):
        assert f"#SBATCH --{line}\n" in script
    assert script.count("cpus-per-task") == script.count("cpus-per-task=96") == 2, "once for sbatch, once for srun"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        (Slurm(nodes=3), "3 machines cannot share evenly"),
        (Slurm(nodes=2, gpus_per_node=8), "puts 4 processes on each of 2 machines with 8 GPUs"),
    ],
)
def test_machines_and_processes_must_fit(tmp_path: Path, slurm: Slurm, message: str) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ImpossibleLayout, match=message):
        submit(tmp_path, slurm, Layout(tp=4, dp=2))


def test_without_slurm_or_submitit_the_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoSlurm, match="There is no srun on this machine"):
        submit(tmp_path, Slurm(), Layout(tp=2))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "submitit":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SubmititMissing, match=r"pip install 'assay\[cluster\]'"):
        submit(tmp_path, Slurm(), Layout(tp=2))


@pytest.mark.parametrize("text", ["90", "1:2:3", "01:00", "1-2", "01:00:00x"])
def test_a_time_that_slurm_reads_otherwise_is_refused(text: str) -> None:
    with pytest.raises(BadSlurmOption, match="write HH:MM:SS or D-HH:MM:SS"):
        minutes(text)


def test_times_and_options_are_read() -> None:
    assert [minutes(text) for text in ("00:00:01", "02:10:00", "2-00:00:00")] == [1, 130, 2880]
    assert sbatch_options(["comment=a=b"]) == (("comment", "a=b"),)
    for own, flag in (("time=01:00:00", "--time"), ("signal=USR1@60", "--warn")):
        with pytest.raises(BadSlurmOption, match=f"that is said with {flag}"):
            sbatch_options([own])
    for wrong in ("account", "=lab", "account=", "--account=lab"):
        with pytest.raises(BadSlurmOption, match="write --sbatch NAME=VALUE"):
            sbatch_options([wrong])


def test_a_job_whose_code_was_edited_while_it_waited_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked before artifacts are built, which an edit of their builder alone would make anew."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    selection = Selection(studies=("warm",))
    what = (toylab.EXPERIMENT, "proxy", selection, tmp_path / "runs")
    (task,) = (e.task for e in prepare(*what, console=Console(file=io.StringIO()), layout=Layout()).entries if e.needs)
    assert isinstance(task, RunTask)
    task = GroupTask(**{f.name: getattr(task, f.name) for f in fields(task)}, layout=Layout())
    job = pickle.loads(pickle.dumps(cluster.ClusterJob(task, toylab.EXPERIMENT.artifacts, 600)))
    monkeypatch.setattr(cluster, "Group", lambda *rest: SimpleNamespace(run=lambda: None))
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(JobEnvironment=lambda: SimpleNamespace(num_nodes=1)))
    job()
    built = list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(artifacts, "function_hash", lambda function: "edited")
    with pytest.raises(CodeChanged, match="start or submit it again"):
        job()
    assert list((tmp_path / "cache").iterdir()) == built
    assert not task.path.exists()


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        (Slurm(minutes=2), "A job of 2 minutes .* 600 s before the end"),
        (Slurm(minutes=20), "give it more --time, or a shorter --warn"),
        (Slurm(minutes=60, warn_s=1800), "a shorter --warn"),
        (Slurm(warn_s=100), "--warn 100 leaves no time for a checkpoint"),
    ],
)
def test_a_warning_must_leave_time_to_work_and_to_write(tmp_path: Path, slurm: Slurm, message: str) -> None:
    with pytest.raises(BadSlurmOption, match=message):
        submit(tmp_path, slurm, Layout(tp=2))


def test_a_warned_job_waits_for_its_checkpoint_as_long_as_it_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    waited: list[float] = []
    monkeypatch.setattr(cluster, "request_stop", lambda: None)
    job = cluster.ClusterJob(cast(GroupTask, "task"), (), 1800)
    job._group = cast(Group, SimpleNamespace(wait=waited.append))
    again = job.checkpoint().function
    again._group = job._group
    again.checkpoint()
    assert waited == [1740, 1740], "and in the next turn too"


@pytest.mark.slow
def test_a_job_on_two_machines_is_warned_requeued_and_completes(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    said = submit(tmp_path, Slurm(nodes=2), Layout(tp=2), overrides={"steps": "80", "sleep": "0.05"})
    assert "add/plain seed 0: job 7, output in " in said
    record = tmp_path / "spread" / "proxy-custom" / "add" / "plain" / "seed0"
    job = {"cwd": ROOT, "env": {**os.environ, **TWO_NODES}}
    first = subprocess.Popen(["bash", fake / "job.sh"], **job)
    metrics = record / "metrics.jsonl"
    limit = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < limit, (fake / "node0.log").read_text()
        assert first.poll() is None, (fake / "node0.log").read_text()
        time.sleep(0.1)
    for node in (0, 1):
        os.kill(int((fake / f"node{node}.pid").read_text()), signal.SIGUSR2)
    first.wait(60)
    assert (fake / "requeued").read_text() == "requeue 7\n"
    stopped_at = len(metrics.read_text().splitlines())
    assert 0 < stopped_at < 80
    assert json.loads((record / "checkpoints" / "state.json").read_text())[1] == stopped_at
    assert subprocess.run(["bash", fake / "job.sh"], **job, timeout=90).returncode == 0
    summary = json.loads((record / "summary.json").read_text())["summary"]
    assert summary == {"x": 45 * sum(range(81)), "rows": 80}
    console = Console(file=io.StringIO())
    overrides = {"steps": "80", "sleep": "0.05"}
    what = (EXPERIMENT, "proxy", Selection(studies=("add",), arms=("plain",), overrides=overrides), tmp_path)
    assert launcher.run_experiment(*what, console=console).complete == 1

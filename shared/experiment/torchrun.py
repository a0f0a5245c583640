"""The launcher inside a group that torchrun started by hand: one run after another, on all processes.

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr HOST --master-port 29500 \\
        -m papers run PAPER --study STUDY --scale gpu --tp 8 --dp 2

Special: rank 0 looks at the records and builds missing artifacts in a process of its own; the others wait for it in a
collective, at most for the timeout of their group (30 minutes). Records and cache lie on a file system that all see.
A run that fails with the same named error on every rank does not stop the others; any other failure ends the launch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shared.experiment import artifacts, launcher, progress, records, worker
from shared.experiment.contracts import AssayError, Experiment, Interrupted
from shared.experiment.group import naming_tmpdir
from shared.experiment.launcher import FAILED, INTERRUPTED, Outcome, Prepared, prepare
from shared.experiment.plan import Selection
from shared.experiment.pool import Entry, Pool
from shared.experiment.signals import StopSignals, request_stop
from shared.experiment.worker import BuildTask, RunTask
from shared.megatron.layout import Layout

if TYPE_CHECKING:
    from rich.console import Console


class ArtifactNotBuilt(AssayError):
    """What every run of a launch needs could not be built."""


def started_us() -> bool:
    """True in a process that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """True on rank 0, and without torchrun: who may speak."""
    return not started_us() or os.environ["RANK"] == "0"


def run_experiment(
    experiment: Experiment,
    scale: str,
    selection: Selection,
    runs_root: Path,
    *,
    console: Console,
    layout: Layout,
    go_on: str,
) -> Outcome:
    """`launcher.run_experiment` on every rank of a group; only rank 0's outcome has messages and counts.

    Raises the named errors of `launcher.run_experiment` before any work, on every rank. A run that fails on some ranks
    alone, or with another kind of error, ends this process with status 1, and torchrun ends the others.
    """
    from shared.experiment import ranks

    StopSignals().install()
    # Slurm warns of the end of a job's time with a signal that the user chooses; this one is submitit's.
    signal.signal(signal.SIGUSR2, request_stop)
    ranks.join(layout, scale)
    mine: list[Prepared] = []

    def ready() -> list[Entry]:
        mine.append(prepare(experiment, scale, selection, runs_root, console=console, layout=layout))
        return _with_artifacts(mine[0], console)

    try:
        runs = ranks.from_rank_zero(ready)
        finished = _run(runs, console, go_on)
    except AssayError:
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # Destructors of process groups wait for peers; torchrun acts once this process has ended.
        os._exit(1)
    if mine:
        mine[0].entries[:] = runs
        return launcher.conclude(mine[0], finished, go_on)
    failed = any(entry.ending == "failed" for entry in runs)
    return Outcome(INTERRUPTED if not finished else FAILED if failed else 0, "", 0, 0)


def _with_artifacts(prepared: Prepared, console: Console) -> list[Entry]:
    """The run entries with their artifacts at hand. Raises `Interrupted`, `ArtifactNotBuilt`."""
    builds = [entry for entry in prepared.entries if isinstance(entry.task, BuildTask)]
    if builds:
        with naming_tmpdir(), progress.display(console, builds, 1) as observer:
            # In a process of its own: a builder is written for one process, and this one belongs to a group.
            if not Pool(builds, 1, [worker.__name__], observer, {}).run():
                raise Interrupted("Stopped while artifacts were being built. Go on with the same command.")
    built = dict(prepared.built)
    for entry in builds:
        assert isinstance(entry.task, BuildTask)
        found = artifacts.find(entry.task.address) if entry.ending == "done" else None
        if found is None:
            raise ArtifactNotBuilt(f"{entry.key}: {entry.error or 'it vanished'}. Once the cause is gone, run again.")
        built[entry.key] = found
    runs = [entry for entry in prepared.entries if entry not in builds]
    for entry in runs:
        assert isinstance(entry.task, RunTask)
        entry.task = replace(entry.task, artifacts={name: built[key] for name, key in entry.needs.items()})
    return runs


def _run(runs: Sequence[Entry], console: Console, go_on: str) -> bool:
    """Work on every run; False if a signal cut it short."""
    from shared.experiment import ranks

    with progress.display(console, runs, 1) as observer:
        for entry in runs:
            assert isinstance(entry.task, RunTask)
            entry.started = time.monotonic()
            if is_first():
                observer.started(entry)
                records.set_reporter(_teller(entry, observer))
            try:
                ranks.run_on_ranks(entry.task)
                entry.ending = "done"
            except Interrupted as stop:
                entry.ending, entry.error = "stopped", str(stop)
            except AssayError as error:
                _fail(entry, error, go_on)
            entry.seconds = time.monotonic() - entry.started
            if is_first():
                observer.ended(entry)
            if entry.ending == "stopped":
                return False
    return True


def _fail(entry: Entry, error: AssayError, go_on: str) -> None:
    """Say what happened on this rank; end the process unless every rank is here for the same reason."""
    from shared.experiment import ranks

    assert isinstance(entry.task, RunTask)
    rank = os.environ["RANK"]
    entry.ending, entry.error = "failed", worker.sentence(error)
    _complain(f"error (rank {rank}): {entry.key}: {entry.error}")
    if is_first():
        entry.error_file = worker.keep_traceback(entry.task.error_file)
    if not ranks.failed_alike(entry.key, error):
        _complain(f"Not all ranks failed like rank {rank}, so this launch ends. Go on with: {go_on}")
        os._exit(1)


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _teller(entry: Entry, observer: progress.Lines | progress.Bars) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        entry.done, entry.total = done, total
        observer.progressed(entry)

    return tell

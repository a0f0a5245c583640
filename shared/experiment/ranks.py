"""What each process of a group does: rank 0 opens the record, all run, all agree when to stop.

    python -m shared.experiment.ranks TASKFILE        # started by torchrun, see shared.experiment.group

Special: a run function written for one process needs no change for its bookkeeping. Rank 0 logs, the calls of the
others do nothing; what they print is kept in `rank<k>.log` of the run's folder. A rank that a `GroupTask` started holds
a socket to its parent, which carries the last word, brings the wish to stop, and ends the rank when it closes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from shared.experiment import records
from shared.experiment.contracts import AssayError, Interrupted
from shared.experiment.files import writing
from shared.experiment.group import PARENT, GroupTask
from shared.experiment.signals import StopSignals, request_stop, stop_requested
from shared.experiment.worker import CPU_SCALES, RunTask, sentence
from shared.megatron.layout import ImpossibleLayout, Layout

T = TypeVar("T")
ALIKE_S = 30


def join(layout: Layout, scale: str) -> None:
    """Set up the process groups of `layout` in a process that torchrun started.

    Raises `ImpossibleLayout` if there are fewer GPUs than processes on this machine, or a wrong number of processes.
    """
    if scale in CPU_SCALES:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise ImpossibleLayout(
            f"layout {layout} puts {here} processes on a machine with {torch.cuda.device_count()} GPUs: one GPU a "
            "process, so lower the sizes or use more nodes"
        )
    from shared.megatron.init import initialize

    initialize(layout=layout)


def failed_alike(name: str, error: AssayError) -> bool:
    """True if every rank comes here with the same error for run `name`, so that no collective is left half-done.

    The default store carries the answers: ranks that did not fail are in a collective, and stay there.
    """
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    keys = [f"failed/{name}/{other}" for other in range(size)]
    store.set(keys[rank], f"{type(error).__name__}: {error}")
    try:
        store.wait(keys, timedelta(seconds=ALIKE_S))
    except RuntimeError:  # of any store
        return False
    return len({store.get(key) for key in keys}) == 1


def from_rank_zero(make: Callable[[], T]) -> T:
    """Value of `make()` on rank 0, on every rank. An `AssayError` there is raised on every rank."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except AssayError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


class RankContext:
    """`RunContext` on one rank. `record` is the open record on rank 0 and None elsewhere.

    `rows` and `stop_requested` are collective: every rank calls them at the same place.
    """

    def __init__(self, task: RunTask, record: records.RunDirectory | None) -> None:
        self.config = task.config
        self.seed = task.seed
        self.arm = task.arm
        self.study = task.study
        self.scale = task.scale
        self.dir = task.path
        self._artifacts = {name: built.path for name, built in task.artifacts.items()}
        self._record = record

    def artifact(self, name: str) -> Path:
        """Directory of a built artifact that the study declared."""
        if self._record is not None:
            return self._record.artifact(name)
        return self._artifacts[name]

    def log(self, step: int, **metrics: float) -> None:
        """Append one row, on rank 0."""
        if self._record is not None:
            self._record.log(step, **metrics)

    def time(self, step: int, **clocks: float) -> None:
        """Append one row to timing.jsonl, on rank 0."""
        if self._record is not None:
            self._record.time(step, **clocks)

    def rewind(self, step: int) -> None:
        """Drop logged rows with a step above `step`, on rank 0."""
        if self._record is not None:
            self._record.rewind(step)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, on every rank."""
        return from_rank_zero(lambda: self._record.rows() if self._record else [])

    def progress(self, done: int, total: int) -> None:
        """Tell the launcher how far this run is, from rank 0."""
        if self._record is not None:
            self._record.progress(done, total)

    def stop_requested(self) -> bool:
        """True on every rank once any of them was asked to stop."""
        asked = torch.tensor([int(stop_requested())])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints, the same on every rank; it goes when the run is complete."""
        folder = self.dir / "checkpoints"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        return folder


def run_on_ranks(task: RunTask) -> None:
    """Run, resume, or leave alone what another process completed; called on every rank of a group.

    Raises what `task.run` raises here; `CodeChanged`, and what opening the record raises, such as `RunBusy`, on every
    rank.
    """
    rank, opened = dist.get_rank(), []

    def is_complete() -> bool:
        # Each rank imported the code from disk, perhaps days after the launch.
        task.check_code({name: built.address for name, built in task.artifacts.items()})
        opened.append(task.open())
        return opened[0].completed is not None

    try:
        if from_rank_zero(is_complete):
            return
        record = opened[0] if opened else None
        with _kept_output(task.path / f"rank{rank}.log") if rank else contextlib.nullcontext():
            summary = task.run(RankContext(task, record))
            # Checkpoints go with `finish`: nobody may still be writing one.
            dist.barrier()
        if record is not None:
            record.finish(summary)
    finally:
        for record in opened:
            record.close()


@contextlib.contextmanager
def _kept_output(path: Path) -> Iterator[None]:
    """Send stdout and stderr of this process, C++ included, to a file, which goes if it stays empty."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(before, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if path.exists() and not path.stat().st_size:
            path.unlink()


class _Parent:
    """The process that started the group, at the other end of a socket."""

    def __init__(self, address: str, rank: int) -> None:
        self._connection = Client(address, family="AF_UNIX")
        self._rank = rank
        self._lock = threading.Lock()
        self.say("here")
        threading.Thread(target=self._obey, daemon=True).start()

    def say(self, kind: str, *rest: Any) -> None:
        """`here`, `progress` done total, or a last word: `done`, `stopped` sentence, `failed` sentence traceback."""
        try:
            with self._lock:
                self._connection.send((self._rank, kind, *rest))
        except OSError:
            os._exit(1)

    def _obey(self) -> None:
        try:
            while self._connection.recv() == "stop":
                request_stop()
        except (EOFError, OSError):
            pass
        # Blocked in a collective or not: without a parent, or after the death of a peer, there is nothing to wait for.
        os._exit(1)


def main(file: str, environment: Mapping[str, str] = os.environ) -> NoReturn:
    """One rank of a `GroupTask`: exit status 0 if the run is complete or stopped as asked, else 1."""
    parent = _Parent(environment[PARENT], int(environment["RANK"]))
    # Ctrl-C reaches the parent too, which decides and passes it on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Slurm warns of the end of a job's time with the signal that submitit asks for.
    signal.signal(signal.SIGUSR2, request_stop)
    StopSignals().install()
    records.set_reporter(lambda done, total: parent.say("progress", done, total))
    code = 0
    try:
        task: GroupTask = pickle.loads(Path(file).read_bytes())
        join(task.layout, task.scale)
        run_on_ranks(task)
        parent.say("done")
    except Interrupted as stop:
        parent.say("stopped", str(stop))
    except Exception as error:
        parent.say("failed", sentence(error), traceback.format_exc())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Destructors of process groups wait for peers that may be gone.
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])

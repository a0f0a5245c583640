"""One run as a group of processes: torchrun's agent, in the process that the pool or Slurm started for the run.

    GroupTask(..., layout=Layout(tp=2)).execute(print)     # in the pool's place of RunTask.execute

Special: the agent runs inside this process instead of behind `torchrun`, so that exit codes arrive as numbers and a
wish to stop goes to the ranks without torchrun's 30 s until SIGKILL. When one rank is gone, the others, blocked in a
collective or not, are ended at once; the record stays resumable.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from shared.experiment import records
from shared.experiment.contracts import AssayError, Interrupted
from shared.experiment.signals import stop_requested
from shared.experiment.worker import RunTask
from shared.megatron.layout import Layout

POLL_S = 0.2
JOIN_S = 900
SHOWN_LINES = 5
MAX_RANKS = 128
PARENT = "ASSAY_PARENT"
"""Variable with the address of the parent's socket, in the environment of the ranks."""


class RankFailed(AssayError):
    """A process of a group failed or was killed. The record is resumable."""


class LongTemporaryFolder(AssayError):
    """Sockets between processes lie in the folder for temporary files, and their paths are limited."""


@contextlib.contextmanager
def naming_tmpdir() -> Iterator[None]:
    """Raises `LongTemporaryFolder` where the system says that a socket's path is too long."""
    try:
        yield
    except OSError as error:
        if "AF_UNIX path too long" not in str(error):
            raise
        raise LongTemporaryFolder(
            f"The path of {tempfile.gettempdir()} is too long for the sockets between processes: set TMPDIR to a "
            "folder with a shorter path, of at most 60 characters."
        ) from error


@dataclass(frozen=True)
class Nodes:
    """Where this machine stands among those of one group. `endpoint` is `host:port` on machine 0."""

    count: int = 1
    index: int = 0
    endpoint: str = "localhost:0"


@dataclass(frozen=True)
class GroupTask(RunTask):
    """A run that is spread over `layout.world_size` processes."""

    layout: Layout

    def execute(self, note: Callable[[str], None]) -> None:
        """Run, resume, or leave alone what another process completed meanwhile.

        Raises `Interrupted` after a stop, `RankFailed` naming rank and signal or repeating the rank's error,
        `LongTemporaryFolder`.
        """
        Group(self, Nodes(), note).run()


class Group:
    """This machine's ranks of one run. `note` hears the last lines of a rank that died without a word."""

    def __init__(self, task: GroupTask, nodes: Nodes, note: Callable[[str], None]) -> None:
        self._task = task
        self._nodes = nodes
        self._note = note
        self._ears = _Ears()

    def run(self) -> None:
        """Start the ranks and wait for them. Raises as `GroupTask.execute`."""
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # The agent logs at length what is raised here in one sentence.
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        failures: Mapping[int, Any] = {}
        with tempfile.TemporaryDirectory(prefix="assay-") as folder:
            file = Path(folder) / "task.pickle"
            file.write_bytes(pickle.dumps(self._task))
            with self._ears.at(f"{folder}/parent"):
                config = LaunchConfig(
                    min_nodes=self._nodes.count,
                    max_nodes=self._nodes.count,
                    nproc_per_node=self._task.layout.world_size // self._nodes.count,
                    max_restarts=0,
                    run_id="assay",
                    logs_specs=DefaultLogsSpecs(log_dir=folder),
                    **_rendezvous(self._nodes),
                    # SIGTERM is ours: the ranks write checkpoints, however long that takes.
                    signals_to_handle="SIGQUIT",
                )
                try:
                    elastic_launch(config, sys.executable)("-m", "shared.experiment.ranks", str(file))
                except ChildFailedError as error:
                    failures = error.failures
        here = self._task.layout.world_size // self._nodes.count
        ranks = range(self._nodes.index * here, (self._nodes.index + 1) * here)
        _conclude(self._task, ranks, self._ears, failures, self._note)

    def wait(self, seconds: float) -> None:
        """Until every rank of this machine has had its last word, from whatever thread or signal handler."""
        end = time.monotonic() + seconds
        while self._ears.is_busy() and time.monotonic() < end:
            time.sleep(POLL_S)


def _rendezvous(nodes: Nodes) -> dict[str, Any]:
    if nodes.count == 1:
        # Laptops often have a host name that no resolver knows.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        return {"rdzv_backend": "c10d", "rdzv_endpoint": nodes.endpoint, "local_addr": "localhost"}
    # Static: ranks are dealt out in the order of the machines.
    order = {"rank": nodes.index, "timeout": JOIN_S}
    return {"rdzv_backend": "static", "rdzv_endpoint": nodes.endpoint, "rdzv_configs": order}


class _Ears(threading.Thread):
    """Hears this machine's ranks, passes a stop on to them, and hangs up on all when one is gone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.words: dict[int, tuple[Any, ...]] = {}
        self.first_failed: int | None = None
        self.first_lost: int | None = None
        self._door = socket.socket(socket.AF_UNIX)
        self._ranks: dict[Connection, int | None] = {}
        self._told: set[Connection] = set()
        self._closing = threading.Event()

    @contextlib.contextmanager
    def at(self, address: str) -> Iterator[None]:
        """Listen at a new socket, whose address the ranks find in their environment."""
        with naming_tmpdir():
            self._door.bind(address)
        self._door.listen(MAX_RANKS)
        os.environ[PARENT] = address
        self.start()
        try:
            yield
        finally:
            self._closing.set()
            self.join()

    def is_busy(self) -> bool:
        """True while a rank may still say something."""
        return bool(self._ranks)

    def run(self) -> None:
        while self._ranks or not self._closing.is_set():
            for ready in wait([self._door, *self._ranks], timeout=POLL_S):
                if ready is self._door:
                    self._ranks[Connection(self._door.accept()[0].detach())] = None
                elif isinstance(ready, Connection) and ready in self._ranks:
                    self._hear(ready)
            if stop_requested():
                self._tell_to_stop()
        self._door.close()

    def _hear(self, rank: Connection) -> None:
        try:
            number, kind, *rest = rank.recv()
        except (EOFError, OSError):
            number = self._ranks.pop(rank)
            rank.close()
            if number is None or number not in self.words:
                self.first_lost = number if self.first_lost is None else self.first_lost
                self._hang_up()
            return
        self._ranks[rank] = number
        if kind == "progress":
            records.report(*rest)
        elif kind != "here":
            self.words[number] = (kind, *rest)
            if kind == "failed":
                self.first_failed = number if self.first_failed is None else self.first_failed
                self._hang_up()

    def _hang_up(self) -> None:
        """End every rank that is left: it waits for one that will not come back."""
        for rank in self._ranks:
            rank.close()
        self._ranks = {}

    def _tell_to_stop(self) -> None:
        for rank in [rank for rank in self._ranks if rank not in self._told]:
            self._told.add(rank)
            # A rank that is gone is noticed where it is heard.
            with contextlib.suppress(OSError):
                rank.send("stop")


def _conclude(
    task: GroupTask, ranks: range, ears: _Ears, failures: Mapping[int, Any], note: Callable[[str], None]
) -> None:
    """Raise what became of this machine's `ranks`; `failures` maps some to torchrun's report of how they ended."""
    silent = [rank for rank in ranks if rank not in ears.words]
    if not failures and not silent:
        stopped = [word[1] for word in ears.words.values() if word[0] == "stopped"]
        if stopped:
            raise Interrupted(stopped[0])
        return
    # torchrun sends SIGTERM to the ranks that are left, some of which are too young to handle it.
    killed = [
        rank for rank, failure in failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    ]
    if not killed and ears.first_failed is not None:
        rank = ears.first_failed
        _, text, trace = ears.words[rank]
        raise RankFailed(f"rank {rank} of {task.layout.world_size}: {text}") from _Remote(trace)
    # The others were hung up on; the first to go may have ended with 0, by sys.exit.
    lost = [] if ears.first_lost is None else [ears.first_lost]
    rank = min(killed or lost or failures or silent)
    for line in _last_lines(task.path / f"rank{rank}.log"):
        note(f"[rank {rank}] {line}")
    end = "The others were ended; the run is resumable"
    code = failures[rank].exitcode if rank in failures else 0
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps by the system for want of memory" if name == "SIGKILL" else ""
        raise RankFailed(f"rank {rank} of {task.layout.world_size} was killed by {name}{memory}. {end}")
    raise RankFailed(f"rank {rank} of {task.layout.world_size} ended with code {code} and no word. {end}")


class _Remote(Exception):
    """Carries the traceback of a rank into the one that is kept."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _last_lines(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
    except OSError:
        return []

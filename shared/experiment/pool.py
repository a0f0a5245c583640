"""A pool with one process per task, that stops when asked, survives what its tasks do, and leaves no orphans.

Special: children are forked from a server that has imported the heavy modules once, so that a short run does not pay
seconds for imports. Ctrl-C, SIGTERM and SIGHUP go to the children as SIGTERM: they write a checkpoint and end; after
`GRACE_S`, or at the second Ctrl-C, they are killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from shared.experiment.artifacts import Built
from shared.experiment.worker import BuildTask, RunTask, child

GRACE_S = 30.0
POLL_S = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Ending = Literal["done", "stopped", "failed"]


@dataclass
class Entry:
    """A task in the pool. `needs` maps artifact names to the keys of the entries that build them."""

    key: str
    group: str
    task: RunTask | BuildTask
    cost: float
    needs: Mapping[str, str] = field(default_factory=dict)
    ending: Ending | None = None
    error: str = ""
    error_file: Path | None = None
    started: float = 0.0
    seconds: float = 0.0
    done: int = 0
    total: int = 0


class Observer(Protocol):
    """Who is told what happens."""

    def started(self, entry: Entry) -> None: ...
    def progressed(self, entry: Entry) -> None: ...
    def ended(self, entry: Entry) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class _Running:
    entry: Entry
    process: Any
    channel: Connection
    result: Any = None


class Pool:
    """Runs entries, at most `workers` at once, in their order, as soon as what they need is built."""

    def __init__(
        self,
        entries: Sequence[Entry],
        workers: int,
        preload: Sequence[str],
        observer: Observer,
        built: Mapping[str, Built],
    ) -> None:
        self._waiting = list(entries)
        self._workers = workers
        self._observer = observer
        self._built = dict(built)
        self._running: list[_Running] = []
        self._stops = 0
        self._terminated_at: float | None = None
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(list(preload))

    def run(self) -> bool:
        """Work until everything ended; False if a signal cut it short."""
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            while self._running or (self._waiting and not self._stops):
                self._start_ready()
                self._listen()
                self._stop_if_asked()
        finally:
            for running in self._running:
                running.process.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._stops == 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _start_ready(self) -> None:
        for entry in list(self._waiting):
            if self._stops or len(self._running) >= self._workers:
                return
            lost = [name for name, key in entry.needs.items() if self._failed(key)]
            if lost:
                self._waiting.remove(entry)
                self._end(entry, "failed", f"artifact {lost[0]} could not be built")
            elif all(key in self._built for key in entry.needs.values()):
                self._waiting.remove(entry)
                self._start(entry)

    def _failed(self, key: str) -> bool:
        pending = [*self._waiting, *(running.entry for running in self._running)]
        return key not in self._built and all(entry.key != key for entry in pending)

    def _start(self, entry: Entry) -> None:
        task = entry.task
        if isinstance(task, RunTask):
            ready = {name: self._built[key] for name, key in entry.needs.items()}
            task = replace(task, artifacts=ready)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=child, args=(task, theirs, dict(os.environ)), name=entry.key)
        entry.started = time.monotonic()
        process.start()
        theirs.close()
        self._running.append(_Running(entry, process, ours))
        self._observer.started(entry)

    def _listen(self) -> None:
        channels = [running.channel for running in self._running]
        ready = wait(channels, timeout=POLL_S) if channels else []
        for running in [running for running in self._running if running.channel in ready]:
            try:
                self._hear(running, running.channel.recv())
            except (EOFError, OSError):
                self._bury(running)

    def _hear(self, running: _Running, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        entry = running.entry
        if kind == "progress":
            entry.done, entry.total = rest
            self._observer.progressed(entry)
        elif kind == "note":
            self._observer.note(rest[0])
        else:
            entry.ending = kind
            entry.error = "" if kind == "done" else rest[0]
            entry.error_file = rest[1] if kind == "failed" else None
            running.result = rest[0]

    def _bury(self, running: _Running) -> None:
        """The channel closed: the child has ended, with or without a last word."""
        running.process.join()
        running.channel.close()
        self._running.remove(running)
        entry = running.entry
        if entry.ending is None:
            self._end(entry, *self._last_word(running.process.exitcode))
        else:
            if entry.ending == "done" and isinstance(running.result, Built):
                self._built[entry.key] = running.result
            self._end(entry, entry.ending, entry.error)

    def _last_word(self, code: int) -> tuple[Ending, str]:
        if self._stops:
            return "stopped", "ended without a checkpoint of its own"
        if code < 0:
            memory = ", perhaps by the system for want of memory (try --workers 1)" if code == -signal.SIGKILL else ""
            return "failed", f"the process was killed by {signal.Signals(-code).name}{memory}; the run is resumable"
        return "failed", f"the process ended with code {code} and no word; the run is resumable"

    def _end(self, entry: Entry, ending: Ending, error: str) -> None:
        entry.ending, entry.error = ending, error
        entry.seconds = time.monotonic() - entry.started if entry.started else 0.0
        self._observer.ended(entry)

    def _stop_if_asked(self) -> None:
        if not self._stops:
            return
        if self._terminated_at is None:
            self._terminated_at = time.monotonic()
            if self._running:
                self._observer.note(
                    f"Stopping: {len(self._running)} running write their checkpoints (Ctrl-C again to kill them)."
                )
            for running in self._running:
                running.process.terminate()
        if self._stops > 1 or time.monotonic() - self._terminated_at > GRACE_S:
            for running in self._running:
                running.process.kill()

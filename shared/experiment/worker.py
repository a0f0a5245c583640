"""One run or one artifact build in a process of its own, on one thread.

The parent talks through a pipe. It never writes to it: when it is gone the pipe closes, and the child ends at once.
Messages are tuples: ("progress", done, total), ("note", text), and one last word: ("done", result),
("stopped", sentence) or ("failed", sentence, path of the traceback).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shared.experiment import artifacts, codehash, records
from shared.experiment.contracts import Artifact, AssayError, Interrupted, RunContext
from shared.experiment.signals import StopSignals

ERROR_FILE = "error.txt"


class CodeChanged(AssayError):
    """The code on disk is no longer that of the launch. Raised before the record is opened."""


@dataclass(frozen=True)
class RunTask:
    """All that a child needs for one run; pickled, so `run` travels by name."""

    run: Callable[[RunContext], dict[str, Any]]
    path: Path
    config: Any
    seed: int
    arm: str
    study: str
    scale: str
    artifacts: Mapping[str, artifacts.Built]
    provenance: Mapping[str, Any]
    paper: str

    def check_code(self, addresses: Mapping[str, str]) -> None:
        """For a process that imports the code anew: raises `CodeChanged` unless it is what the record will name.

        `addresses` are those of the artifacts, by name.
        """
        launched, now = self.provenance["code_hash"], codehash.run_hash(self.paper, self.run, addresses)
        if now != launched:
            raise CodeChanged(
                f"The code changed since {self.study}/{self.arm} seed {self.seed} was started or submitted (hash then "
                f"{launched}, now {now}): start or submit it again, or restore that code. Its rows were not touched."
            )

    def open(self) -> records.RunDirectory:
        """Lock the record and make it ready. Raises what `RunDirectory.open` raises."""
        paths = {name: built.path for name, built in self.artifacts.items()}
        used = {name: {"address": b.address, "content": b.content} for name, b in self.artifacts.items()}
        provenance = {**self.provenance, "artifacts": used}
        run = records.RunDirectory.open(
            self.path,
            self.config,
            self.seed,
            self.arm,
            self.study,
            self.scale,
            artifacts=paths,
            provenance=provenance,
        )
        if run.completed is None:
            (run.dir / ERROR_FILE).unlink(missing_ok=True)
        return run

    def execute(self, note: Callable[[str], None]) -> None:
        """Run, resume, or leave alone what another process completed meanwhile."""
        with self.open() as run:
            if run.completed is None:
                run.finish(self.run(run))

    @property
    def error_file(self) -> Path:
        return self.path / ERROR_FILE


@dataclass(frozen=True)
class BuildTask:
    """One artifact build."""

    artifact: Artifact
    scale: str
    address: str

    def execute(self, note: Callable[[str], None]) -> artifacts.Built:
        return artifacts.build(self.artifact, self.scale, note)

    @property
    def error_file(self) -> Path:
        return artifacts.cache_root() / f"{self.address}.{ERROR_FILE}"


CPU_SCALES = ("smoke", "proxy")
"""Scales whose runs stay on the CPU where there is a GPU: decision 24."""


def child(task: RunTask | BuildTask, channel: Connection, environment: Mapping[str, str]) -> None:
    """Entry point of a process of the pool. `environment` is the parent's now, not that of the server we fork from."""
    os.environ.update(environment)
    if task.scale in CPU_SCALES:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The terminal sends Ctrl-C to every process; the parent decides and passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    StopSignals().install()
    threading.Thread(target=_end_with_parent, args=(channel,), daemon=True).start()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    records.set_reporter(lambda done, total: _send(channel, "progress", done, total))
    try:
        _send(channel, "done", task.execute(lambda text: _send(channel, "note", text)))
    except Interrupted as stop:
        _send(channel, "stopped", str(stop))
    except Exception as error:
        _send(channel, "failed", sentence(error), keep_traceback(task.error_file))


def _send(channel: Connection, *message: Any) -> None:
    try:
        channel.send(message)
    except OSError:
        os._exit(1)


def _end_with_parent(channel: Connection) -> None:
    try:
        channel.recv()
    except (EOFError, OSError):
        os._exit(1)


def sentence(error: Exception) -> str:
    """One line for a person; named errors speak for themselves."""
    text = " ".join(str(error).split())
    return text if isinstance(error, AssayError) else f"{type(error).__name__}: {text}"


def keep_traceback(path: Path) -> Path | None:
    """Write the traceback of the error that is being handled; None if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return None
    return path

"""Checkpoints that all ranks write and read together, in Megatron's torch_dist format; any layout loads any other's.

    checkpoints = DistributedCheckpoints(run.checkpoints, keep=2, keep_best=True)
    checkpoints.save(step, parallel_model.sharded_state(), contents, metric=loss, asynchronous=True)
    checkpoints.poll()                             # after each step: makes a save valid once every rank has written
    found = resume(run, checkpoints)               # verified; None to start from the beginning
    state = parallel_model.sharded_state(loading=True)
    parallel_model.load_sharded_state(checkpoints.load(found, state, model=config, precision="fp32"))

Every rank calls every method, in the same order; rank 0 decides and tells the others. One process needs no torchrun.

Megatron plans who writes what; the writing is ours. Megatron forks a process per save and collects results through a
Manager process that imports the main module again. A forked writer outlives a killed run and would race with its
successor; a thread dies with it, and needs no `if __name__ == "__main__"`. An asynchronous save therefore copies this
rank's share to host memory, and a thread writes it; `bench/README.md` has the measured cost.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.experiment.contracts import NonFinite, RunContext
from shared.experiment.files import move_aside, sync_folder
from shared.megatron.config import ModelConfig
from shared.training.agree import any_rank, from_rank_0, gather, rank, world_size
from shared.training.checkpoint import CheckpointNotWritten
from shared.training.manifest import (
    CheckpointDamaged,
    Contents,
    Stored,
    UnusableCheckpoint,
    damaged_files,
    newest_first,
    read_stored,
    refuse_mismatch,
    write_manifest,
)
from shared.training.torch_dist import Share, load_tensors, plan_share

_log = logging.getLogger(__name__)


class DistributedCheckpoints:
    """The newest `keep` checkpoints of one run in `directory`, and with `keep_best` also the one of lowest metric.

    `damaged` names what `latest`, `best` and `load` found not to be usable; it is left in place.
    """

    def __init__(self, directory: Path | str, keep: int = 2, keep_best: bool = False) -> None:
        self.directory = Path(directory)
        self.keep = keep
        self.keep_best = keep_best
        self.damaged: dict[Path, UnusableCheckpoint] = {}
        self._verified: set[Path] = set()
        self._pending: _Save | None = None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        contents: Contents,
        *,
        metric: float | None = None,
        asynchronous: bool = False,
    ) -> None:
        """Write a sharded state dict (it is used up); then drop what is neither among the newest nor the best.

        An asynchronous save returns once this rank's share is in host memory; `poll`, `wait` or the next `save` make
        it valid. A save that is still going on is waited for.

        Raises `CheckpointNotWritten` on every rank if any of them could not write (an asynchronous save: from the
        call that would have made it valid). What was saved before stays, and nothing half-written looks valid.
        """
        self.wait()
        if metric is not None and not math.isfinite(metric):
            raise NonFinite(f"Step {step}: the metric of the checkpoint is {metric}.")
        folder = _agree(self.directory, lambda: self._open_folder(step))
        share = plan_share(state, folder, snapshot=asynchronous)
        self._pending = _Save(step, folder, share, contents, metric)
        self._pending.start()
        if not asynchronous:
            self.wait()

    def poll(self) -> None:
        """Make a pending save valid if all ranks have written; otherwise return at once. Raises as `save` does."""
        if self._pending is not None and not any_rank(self._pending.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Finish a pending save. Raises as `save` does."""
        save, self._pending = self._pending, None
        if save is None:
            return
        save.join()
        reports = gather(save.report)
        path = _agree(self.directory, lambda: self._seal(save, reports))
        self._verified.add(path)
        if rank() == 0:
            self._retain()

    def latest(self) -> Stored | None:
        """The newest checkpoint whose every byte is as it was written; None if there is nothing at all.

        What cannot be used is named in a warning and skipped. Raises `UnusableCheckpoint` if there is something and
        none of it can be used: training again from the start should be a person's decision.
        """
        found = self._first_intact(self._stored())
        if found is None and self.damaged:
            path, why = next(iter(self.damaged.items()))
            raise type(why)(f"{why} No other checkpoint can be used: restore {path}, or move it away to start anew.")
        return found

    def best(self) -> Stored | None:
        """The intact checkpoint of lowest metric; None if there is none with a metric."""
        return self._first_intact(sorted((s for s in self._stored() if s.metric is not None), key=_by_metric))

    def load(
        self, stored: Stored, state: dict[str, Any], *, model: ModelConfig, precision: str, **expected: Any
    ) -> dict[str, Any]:
        """Fill a sharded state dict of this layout from a checkpoint of any layout; returns the state dict.

        The checkpoint must have been made with this `model` and `precision`; tensors of another precision would
        otherwise be filled without their float32 weights. `expected` gives further fields of `Contents` that it must
        agree with, such as `tokenizer`.
        Raises `CheckpointMismatch` naming each value that differs, `CheckpointDamaged` naming each file.
        """
        try:
            refuse_mismatch(stored, model=model, precision=precision, **expected)
            self._verify(stored)
            return load_tensors(state, stored.path)
        except UnusableCheckpoint as error:
            raise type(error)(f"{error} Last good checkpoint: {self.describe_latest(but=stored.path)}.") from None

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to `<name>.no-rows-1`, with a warning: the run will repeat them."""
        for stored in self._stored():
            if stored.step > step and rank() == 0:
                _log.warning("Rows of checkpoint %s were lost: it is set aside.", stored.path)
                move_aside(stored.path, "no-rows")

    def describe_latest(self, but: Path | None = None) -> str:
        """Path of the newest checkpoint that is not known to be unusable, or "none": for error messages."""
        good = [path for path in _candidates(self.directory) if path not in self.damaged and path != but]
        return str(good[-1]) if good else "none"

    def _stored(self) -> list[Stored]:
        """What rank 0 can read, newest first; the same on all ranks."""
        found, wrong = from_rank_0(_read_all(self.directory) if rank() == 0 else None)
        for path, error in wrong.items():
            self._note(path, error)
        return [stored for stored in found if stored.path not in self.damaged]

    def _first_intact(self, stored: list[Stored]) -> Stored | None:
        for candidate in stored:
            try:
                self._verify(candidate)
            except CheckpointDamaged:
                continue
            return candidate
        return None

    def _verify(self, stored: Stored) -> None:
        if stored.path in self._verified:
            return
        parts = gather(damaged_files(stored, rank(), world_size()))
        wrong = [line for part in parts for line in part]
        if wrong:
            error = CheckpointDamaged(f"{stored.path} is damaged: {'; '.join(wrong)}.")
            self._note(stored.path, error)
            raise error
        self._verified.add(stored.path)

    def _note(self, path: Path, error: UnusableCheckpoint) -> None:
        if path not in self.damaged:
            self.damaged[path] = error
            if rank() == 0:
                _log.warning("%s Going back to the one before.", error)

    def _open_folder(self, step: int) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".*-step-*"):
            shutil.rmtree(left)  # what a killed process was writing or deleting
        return Path(tempfile.mkdtemp(dir=self.directory, prefix=f".writing-step-{step:08d}-"))

    def _seal(self, save: _Save, reports: list[Any]) -> Path:
        """On rank 0: metadata and manifest, then the rename that makes the checkpoint valid."""
        try:
            for *_, failure in reports:
                if failure is not None:
                    raise RuntimeError(failure)
            files = {name: entry for _, part, _ in reports for name, entry in part.items()}
            files |= save.share.write_metadata([written for written, *_ in reports])
            name = write_manifest(save.folder, save.step, save.contents, save.metric, files)
            save.folder.chmod(0o755)
            sync_folder(save.folder)
            path = save.folder.rename(self.directory / name)
            sync_folder(self.directory)
            return path
        except BaseException:
            shutil.rmtree(save.folder, ignore_errors=True)
            raise

    def _retain(self) -> None:
        stored = [stored for stored in _read_all(self.directory)[0] if stored.path not in self.damaged]
        newest = {old.step: old for old in reversed(stored)}
        kept = sorted(newest.values(), key=lambda old: old.step)[-self.keep :]
        if self.keep_best:
            kept += sorted((s for s in stored if s.metric is not None), key=_by_metric)[:1]
        for old in stored:
            if old not in kept:
                _remove(old.path)


def resume(run: RunContext, checkpoints: DistributedCheckpoints) -> Stored | None:
    """The checkpoint to go on from, None for the beginning; drops the rows from its step on. Raises as `latest` does.

    For loops that log one row per step, from step 0. A power cut may keep a checkpoint and lose rows, which are not
    flushed to disk one by one; a record with a gap would be silently wrong, so such a checkpoint is set aside.
    """
    checkpoints.set_aside_after(len(run.rows()))
    found = checkpoints.latest()
    run.rewind(found.step - 1 if found else -1)
    return found


class _Save(threading.Thread):
    """This rank's part of one save, being written."""

    def __init__(self, step: int, folder: Path, share: Share, contents: Contents, metric: float | None) -> None:
        super().__init__(name=f"checkpoint-{step}")
        self.step = step
        self.folder = folder
        self.share = share
        self.contents = contents
        self.metric = metric
        self.report: tuple[list[Any], dict[str, Any], str | None] = ([], {}, "it was not written")

    def run(self) -> None:
        try:
            self.report = (*self.share.write(), None)
        except Exception as error:  # it is raised on all ranks once they have met
            self.report = ([], {}, _why(error))


def _agree(directory: Path, decide: Callable[[], Path]) -> Path:
    """What `decide` returns on rank 0, or the same `CheckpointNotWritten` everywhere."""
    path, failure = None, None
    if rank() == 0:
        try:
            path = decide()
        except (OSError, RuntimeError) as error:
            failure = _why(error)
    path, failure = from_rank_0((path, failure))
    if failure is not None:
        raise CheckpointNotWritten(
            f"Cannot write a checkpoint to {directory} ({failure}): free space or make the folder writable, then start "
            "again; earlier checkpoints are intact."
        )
    return path


def _why(error: Exception) -> str:
    """torch reports a full disk as a RuntimeError, with the system's error as its context."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return getattr(cause, "strerror", None) or str(error)


def _candidates(directory: Path) -> list[Path]:
    """Folders, oldest step first. A dot marks what is being written, deleted or was set aside."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and "." not in path.name)


def _read_all(directory: Path) -> tuple[list[Stored], dict[Path, UnusableCheckpoint]]:
    """Checkpoints with an intact manifest, newest first, and what is wrong with the other folders."""
    found, wrong = [], {}
    for path in _candidates(directory):
        try:
            found.append(read_stored(path))
        except UnusableCheckpoint as error:
            wrong[path] = error
    return newest_first(found), wrong


def _by_metric(stored: Stored) -> tuple[float, int]:
    """Of equal metrics the earlier one is the best."""
    assert stored.metric is not None
    return stored.metric, stored.step


def _remove(path: Path) -> None:
    """Rename first: a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    shutil.rmtree(path.rename(path.with_name(f".deleting-{path.name}")))
